"""From a written name to a black box: `openai:MODEL[@URL]`, `gguf:PATH`, `smollm2`, `replay:FILE`,
`fake:...`, or a plug-in's name.

A plug-in is an entry point of the group `hydra_llm.llms`: a function `(rest of the spec, settings)
-> ChatLLM`. The built-in ones are entry points too, only written down here. Each is wrapped as
cache around meter, so that kept answers cost no budget.
"""

import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from hydra_llm.config import Settings
from hydra_llm.errors import SettingsError
from hydra_llm.llm.base import ChatLLM
from hydra_llm.llm.cache import CachedLLM
from hydra_llm.llm.meter import Budget, Meter, Prices
from hydra_llm.llm.recording import replayed
from hydra_llm.plugins import Registry

LLMS: Registry[Callable[[str, Settings], ChatLLM]] = Registry(
    "hydra_llm.llms",
    {
        "openai": "hydra_llm.llm.openai:from_spec",
        "gguf": "hydra_llm.llm.gguf:from_path",
        "smollm2": "hydra_llm.llm.gguf:smollm2",
        "fake": "hydra_llm.llm.fake:from_spec",
    },
    kind="LLM",
)
REPLAY = "replay:"
"""A recording in place of an LLM: it needs neither cache nor meter."""
ENDPOINT = re.compile(r"(.+?)(?:@(https?://.+))?")
MEANT_AS_URL = re.compile(r"@[^@/]*://|@[\w.-]+:\d+(?:/|$)")
FORMS = (
    "openai:MODEL[@URL], gguf:PATH, smollm2, replay:RECORDING,"
    " fake:echo|rule=labels|script=PATH|fail=KIND[,every=N]"
)


def open_llm(spec: str, settings: Settings) -> CachedLLM:
    """Build the LLM that `spec` names, cached in `settings.cache`, metered, priced and limited by
    the settings.

    Raises:
        SettingsError: an unknown spec, or what it needs is not there.
        UserFault: the cache cannot be opened.
    """
    if spec.startswith(REPLAY):
        return replayed(Path(spec.removeprefix(REPLAY)))
    return wrap(bare_llm(spec, settings), settings)


def wrap(llm: ChatLLM, settings: Settings, path: Path | None = None) -> CachedLLM:
    """Cache around meter around `llm`; the cache lies in `path` or in the settings' folder."""
    prices = Prices(settings.price_prompt, settings.price_completion)
    budget = Budget(settings.max_calls, settings.max_llm_tokens, settings.max_cost)
    # An engine that runs one call at a time gets them in the order in which they were made: the
    # next one often shares its prompt.
    concurrency = min(settings.concurrency, getattr(llm, "parallel", settings.concurrency))
    meter = Meter(llm, prices=prices, budget=budget, concurrency=concurrency)
    return CachedLLM(meter, path or settings.cache / "llm.sqlite")


def bare_llm(spec: str, settings: Settings) -> ChatLLM:
    """The LLM itself, without cache and meter."""
    name, _, rest = spec.partition(":")
    known = LLMS.names()
    if name not in known:
        installed = "".join(f", {other}:..." for other in known if other not in LLMS.builtin)
        raise SettingsError(
            f"unknown LLM '{without_userinfo(spec)}': take one of {FORMS}{installed}"
        )
    return LLMS.load(name)(rest, settings)


def endpoint_of(rest: str) -> tuple[str, str | None]:
    """Model and URL of `openai:MODEL[@URL]`, what stands behind the colon; a model's name may hold
    an @ of its own.

    Raises:
        SettingsError: no model, or what looks like a URL and is none: the model would be asked for
            at another place than was meant.
    """
    found = ENDPOINT.fullmatch(rest)
    if found is None or MEANT_AS_URL.search(found[1]) or not _is_url(found[2]):
        told = without_userinfo(rest)
        raise SettingsError(
            f"openai:{told} needs a model: openai:MODEL, or openai:MODEL@URL (http:// or https://)"
            " for another endpoint"
        )
    return found[1], found[2]


def _is_url(text: str | None) -> bool:
    """Whether it can be taken apart; nothing is the usual endpoint."""
    try:
        return text is None or (bool(urlsplit(text).hostname) and urlsplit(text).port != 0)
    except ValueError:  # brackets that do not close, a port that is no number
        return False


def without_userinfo(text: str) -> str:
    """A text without the names and passwords of the URLs in it."""
    return re.sub(r"(://|@(?=[^/\s@]*:))[^/\s]*@", r"\1", text)
