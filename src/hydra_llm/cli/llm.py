"""`hydra-llm llm`: checks of an LLM."""

from dataclasses import asdict
from typing import Annotated, Any

import typer
from typer import Argument

from hydra_llm.cli import console
from hydra_llm.cli.options import AsJson, GivenSettings, with_option_sets
from hydra_llm.config import load_settings
from hydra_llm.llm.base import ChatLLM, Sampling
from hydra_llm.types import Usage

QUESTION = "What is the capital of France? Answer with one word."
app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def llm() -> None:
    """Check an LLM."""


@app.command()
@with_option_sets
def check(
    spec: Annotated[str, Argument(help="openai:MODEL[@URL], gguf:PATH, smollm2 or fake:KIND.")],
    options: GivenSettings,
    as_json: AsJson = False,
) -> None:
    """Call an LLM without the cache: model, latency, native `n`, token counts."""
    from hydra_llm.llm.concurrency import run_sync
    from hydra_llm.llm.endpoint import without_userinfo
    from hydra_llm.llm.meter import Meter, Prices
    from hydra_llm.llm.registry import bare_llm

    settings = load_settings(file=options.config, **options.given())
    prices = Prices(settings.price_prompt, settings.price_completion)
    meter = Meter(bare_llm(spec, settings), prices=prices)
    found = {"llm": without_userinfo(spec), **run_sync(lambda: examine(meter))}
    shown = {name: value for name, value in found.items() if as_json or name != "usage"}
    console.emit(shown, as_json)


async def examine(llm: ChatLLM) -> dict[str, Any]:
    """Call an LLM for one answer, two samples and, if the engine can, one constrained answer."""
    messages = [{"role": "user", "content": QUESTION}]
    try:
        greedy = await llm.generate(messages, Sampling(max_tokens=16))
        two = Sampling(n=2, temperature=1.0, max_tokens=16, seed=1)
        samples = await llm.generate(messages, two)
        choices = ("Paris", "Rome") if llm.identity["constrains"] else ()
        closed = Sampling(max_tokens=16, choices=choices)
        label = await llm.generate(messages, closed) if choices else None
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
