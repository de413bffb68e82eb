"""`hydra-llm llm`: checks of an LLM, and its batches."""

from contextlib import aclosing
from typing import Annotated, Any

import typer
from typer import Argument, Option

from hydra_llm.cli import console
from hydra_llm.cli.options import AsJson, GivenSettings, with_option_sets
from hydra_llm.config import load_settings
from hydra_llm.errors import SettingsError
from hydra_llm.llm.base import ChatLLM, Sampling
from hydra_llm.llm.concurrency import run_sync
from hydra_llm.llm.endpoint import without_userinfo
from hydra_llm.llm.meter import Meter, Prices
from hydra_llm.llm.registry import bare_llm
from hydra_llm.types import Generation

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command()
@with_option_sets
def check(
    spec: Annotated[
        str, Argument(help="openai:MODEL[@URL], gguf:PATH, openvino:PATH, smollm2 or fake:KIND.")
    ],
    options: GivenSettings,
    as_json: AsJson = False,
) -> None:
    """Call an LLM without the cache: model, latency, native `n`, token counts."""
    settings = load_settings(file=options.config, **options.given())
    prices = Prices(settings.price_prompt, settings.price_completion)
    meter = Meter(bare_llm(spec, settings), prices=prices)
    figures = {"llm": without_userinfo(spec), **run_sync(lambda: examine(meter))}
    if not as_json:
        del figures["usage"]
    console.emit(figures, as_json)


@app.command()
@with_option_sets
def batches(
    spec: Annotated[str, Argument(help="openai:MODEL[@URL].")],
    options: GivenSettings,
    cancel: Annotated[str | None, Option(help="Cancel the batch of this id.")] = None,
    as_json: AsJson = False,
) -> None:
    """List an LLM's batches that `--batch` has sent, as the endpoint tells them now."""
    from hydra_llm.llm.batch import BatchLLM, from_spec

    name, _, rest = spec.partition(":")
    if name != "openai":
        raise SettingsError(f"{without_userinfo(spec)} has no Batch API: write openai:MODEL[@URL]")

    async def listed(llm: BatchLLM) -> list[dict[str, Any]]:
        async with aclosing(llm):
            if cancel is not None:
                console.say(f"{cancel}: {await llm.cancel(cancel)}")
            return [await llm.status(kept) for kept in llm.state.batches()]

    llm = from_spec(rest, load_settings(file=options.config, **options.given()))
    console.emit(run_sync(lambda: listed(llm)), as_json)


async def examine(llm: ChatLLM) -> dict[str, Any]:
    """Call an LLM for one answer, two samples and, if the engine can, one constrained answer."""
    question = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    choices = ("Paris", "Rome")
    constrained = Generation(())
    async with aclosing(llm):
        greedy = await llm.generate(question, Sampling(max_tokens=16))
        two = Sampling(n=2, temperature=1.0, max_tokens=16, seed=1)
        samples = await llm.generate(question, two)
        if llm.identity["constrains"]:
            closed = Sampling(max_tokens=16, choices=choices)
            constrained = await llm.generate(question, closed)
    return {
        "model": llm.identity["model"],
        "kind": llm.identity["kind"],
        "answer": greedy.texts[0],
        "seconds": round(greedy.usage.seconds, 3),
        "native_n": samples.usage.calls == 1,
        "seconds_of_two_samples": round(samples.usage.seconds, 3),
        "prompt_tokens": greedy.usage.tokens[0],
        "completion_tokens": greedy.usage.tokens[1],
        "constrains": bool(set(constrained.texts) & set(choices)),
        "usage": (greedy.usage + samples.usage + constrained.usage).to_json(),
    }
