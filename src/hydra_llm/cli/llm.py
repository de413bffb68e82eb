"""`hydra-llm llm`: what an LLM can do before a run is trusted to it."""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from hydra_llm.cli import console
from hydra_llm.cli.options import AsJson, Config, Set, settings_of
from hydra_llm.llm.base import ChatLLM, Sampling
from hydra_llm.types import Usage

QUESTION = "What is the capital of France? Answer with one word."
app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def llm() -> None:
    """Look at the LLMs that can be asked."""


@app.command()
def check(
    spec: Annotated[
        str, typer.Argument(help="openai:MODEL[@URL], gguf:PATH, smollm2 or fake:KIND.")
    ],
    config: Config = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Ask one question, past the cache: model, latency, native `n`, token counts."""
    from hydra_llm.llm.concurrency import run_sync
    from hydra_llm.llm.meter import Meter, Prices
    from hydra_llm.llm.registry import bare_llm, without_userinfo

    settings = settings_of(None, config, set_)
    meter = Meter(
        bare_llm(spec, settings), prices=Prices(settings.price_prompt, settings.price_completion)
    )
    found = {"llm": without_userinfo(spec), **run_sync(lambda: examine(meter))}
    console.emit(
        found if as_json else {name: value for name, value in found.items() if name != "usage"},
        as_json,
    )


async def examine(llm: ChatLLM) -> dict[str, Any]:
    """What one question, two samples of its answer and (where the engine can) one constrained
    answer tell about an LLM.
    """
    messages = [{"role": "user", "content": QUESTION}]
    try:
        greedy = await llm.generate(messages, Sampling(max_tokens=16))
        two = Sampling(n=2, temperature=1.0, max_tokens=16, seed=1)
        samples = await llm.generate(messages, two)
        choices = ("Paris", "Rome") if llm.identity["constrains"] else ()
        label = (
            await llm.generate(messages, Sampling(max_tokens=16, choices=choices))
            if choices
            else None
        )
    finally:
        await llm.aclose()
    usage = greedy.usage
    return {
        "model": llm.identity["model"],
        "kind": llm.identity["kind"],
        "answer": greedy.texts[0],
        "seconds": round(usage.seconds, 3),
        "native_n": samples.usage.calls == 1,
        "seconds_of_two_samples": round(samples.usage.seconds, 3),
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "constrains": label is not None and label.texts[0] in choices,
        "usage": asdict(greedy.usage + samples.usage + (label.usage if label else Usage())),
    }
