"""LLMs by spec, `NAME[:REST]`, as cache around meter: cached answers cost no budget.

A plug-in is an entry point of the group `hydra_llm.llms`: a function `(REST, settings) -> ChatLLM`.
"""

from collections.abc import Callable
from pathlib import Path

from hydra_llm.config import Settings
from hydra_llm.environment import expanded
from hydra_llm.errors import SettingsError
from hydra_llm.llm.base import Batch, ChatLLM
from hydra_llm.llm.cache import CachedLLM, open_recording
from hydra_llm.llm.endpoint import Endpoint, endpoint_of, without_userinfo
from hydra_llm.llm.meter import Budget, Meter, Prices
from hydra_llm.plugins import Registry

LLMS: Registry[Callable[[str, Settings], ChatLLM]] = Registry(
    "hydra_llm.llms",
    {
        "openai": "hydra_llm.llm.openai:from_spec",
        "gguf": "hydra_llm.llm.gguf:from_path",
        "openvino": "hydra_llm.llm.openvino:from_path",
        "smollm2": "hydra_llm.llm.gguf:smollm2",
        "none": "hydra_llm.llm.none:from_spec",
        "fake": "hydra_llm.llm.fake:from_spec",
    },
    kind="LLM",
    needs=("__call__",),
)


def open_llm(spec: str, settings: Settings, *, batch: Batch | None = None) -> CachedLLM:
    """The LLM of a spec, cached in `settings.cache`, metered and limited by the settings; with
    `batch` by its Batch API: wait until batches are done, or submit them and raise BatchPending.
    Raises SettingsError for an unknown spec or what it lacks, UserFault if the cache does not open.
    """
    if spec.startswith("replay:"):  # a recording needs neither cache nor meter
        return open_recording(expanded(Path(spec.removeprefix("replay:"))))
    if batch is not None and not spec.startswith("none"):
        all_at_once = settings.model_copy(update={"concurrency": "auto"})
        return wrap(_batch_llm(spec, settings, batch), all_at_once)
    return wrap(bare_llm(spec, settings), settings)


def _batch_llm(spec: str, settings: Settings, batch: Batch) -> ChatLLM:
    name, _, rest = spec.partition(":")
    if name != "openai":
        raise SettingsError(f"{without_userinfo(spec)} has no Batch API: leave --batch out")
    if (settings.max_llm_tokens, settings.max_cost) != (None, None):
        why = "a batch is sent before its tokens are known"
        raise SettingsError(f"--batch and max_llm_tokens or max_cost: {why}: take max_calls")
    from hydra_llm.llm.batch import from_spec

    return from_spec(rest, settings, batch)


def wrap(llm: ChatLLM, settings: Settings, path: Path | None = None) -> CachedLLM:
    """Cache around meter around `llm`; the cache file is `path` or in the settings' folder."""
    prices = Prices(settings.price_prompt, settings.price_completion)
    budget = Budget(settings.max_calls, settings.max_llm_tokens, settings.max_cost)
    # An engine that runs one call at a time gets them in order: the next one may share its prompt.
    parallel = None if settings.concurrency == "auto" else settings.concurrency
    meter = Meter(llm, prices=prices, budget=budget, parallel=parallel)
    return CachedLLM(meter, path or settings.cache / "llm.sqlite")


def check_spec(spec: str) -> None:
    """Raise SettingsError for a spec that is unknown or lacks its key, as opening it does, but
    before a command imports what takes seconds.
    """
    name, _, rest = spec.partition(":")
    if name != "replay":
        _check_name(spec)
    if name == "openai":
        Endpoint.of(spec, endpoint_of(rest)[1])


def bare_llm(spec: str, settings: Settings) -> ChatLLM:
    """The LLM itself, without cache and meter."""
    name, _, rest = spec.partition(":")
    _check_name(spec)
    if rest.startswith("~"):  # no shell has seen it behind the colon
        rest = str(expanded(Path(rest)))
    return LLMS.load(name)(rest, settings)


def _check_name(spec: str) -> None:
    known = LLMS.names()
    if spec.partition(":")[0] not in known:
        installed = "".join(f", {other}:..." for other in known if other not in LLMS.builtin)
        builtin = "openai:MODEL[@URL], gguf:PATH, openvino:PATH, smollm2, replay:RECORDING"
        fakes = "fake:echo|rule=labels|script=PATH|fail=KIND[,every=N]"
        forms = f"take one of {builtin}, {fakes}{installed}"
        raise SettingsError(LLMS.unknown(without_userinfo(spec), forms))
