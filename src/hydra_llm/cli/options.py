"""Options that several commands share, alone or as sets: a set is a frozen dataclass whose fields
are options, and one parameter of a command that is decorated with `with_option_sets`.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from hydra_llm.cli import console
from hydra_llm.config import NAMES, Settings, load_settings
from hydra_llm.errors import SettingsError
from hydra_llm.extras import require
from hydra_llm.llm.base import Batch
from hydra_llm.llm.cache import CachedLLM, merge_recording, write_recording
from hydra_llm.llm.registry import open_llm

if TYPE_CHECKING:
    from hydra_llm.bundle import Bundle
    from hydra_llm.store.store import Store

LLM_HELP = "openai:MODEL[@URL], gguf:PATH, openvino:PATH, smollm2, replay:FILE, fake:KIND"
BATCH_HELP = "By the Batch API, for less money: wait, or submit and stop."
SET_HELP = "A setting (docs/settings.md), as model.head=kernel; repeatable."
LLM = Annotated[str, Option("--llm", help=f"{LLM_HELP}; see `llm check`.")]
LearnLLM = Annotated[str, Option("--llm", help=f"{LLM_HELP}; none for recorded choices.")]
BundleFolder = Annotated[Path, Option("--bundle", help="Folder of a learned bundle.")]
Limit = Annotated[int | None, Option(min=1, help="Max number, for a first look.")]
AsJson = Annotated[bool, Option("--json", help="Print JSON.")]
Wide = Annotated[bool, Option("--wide", help="All columns, at any width of the terminal.")]
Private = Annotated[bool, Option("--private", help="The LLM never sees a record.")]
STORE_HELP = "sqlite:///FILE, or postgresql+psycopg://USER@HOST/DATABASE."
StoreURL = Annotated[str, Option("--store", help=STORE_HELP)]
DEFAULT_STORE = "sqlite:///hydra-llm.db"


def with_option_sets(command: Callable[..., None]) -> Callable[..., None]:
    """The command with one option for each field of its parameters that are option sets."""
    sets: dict[str, Any] = {}
    options: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        if is_dataclass(parameter.annotation):
            sets[name] = parameter.annotation
            options += inspect.signature(sets[name]).parameters.values()
        else:
            options.append(parameter)
    options = [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in options]

    @wraps(command)
    def call(**values: Any) -> None:
        for name, kind in sets.items():
            values[name] = kind(**{field.name: values.pop(field.name) for field in fields(kind)})
        command(**values)

    vars(call)["__signature__"] = inspect.Signature(options)
    call.__annotations__ = {option.name: option.annotation for option in options}
    return call


@dataclass(frozen=True)
class GivenSettings:
    """Settings by `--set` and `--config`."""

    config: Annotated[Path | None, Option(help="TOML file; default: hydra-llm.toml.")] = None
    set_: Annotated[list[str] | None, Option("--set", metavar="NAME=VALUE", help=SET_HELP)] = None

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Names and values of `--set`; a pair without `=` is an error."""
        for pair in self.set_ or ():
            name, equals, value = pair.partition("=")
            if not equals:
                raise SettingsError(f"--set {pair}: write NAME=VALUE")
            yield name.strip().replace("-", "_"), value.strip()

    def given(self, **flags: Any) -> dict[str, Any]:
        """`--set` pairs and flags as settings, by their flat names; a flag wins."""
        pairs = {NAMES.resolve(name, hint=True): value for name, value in self.pairs()}
        return pairs | {name: value for name, value in flags.items() if value is not None}


@dataclass(frozen=True)
class RunSettings(GivenSettings):
    """Settings by `--seed`, `--preset`, `--set` and `--config`."""

    seed: Annotated[int | None, Option(help="Seed of sampling, folds and training.")] = None
    preset: Annotated[str | None, Option(help="default, or paper: the authors' settings.")] = None

    def given(self, **flags: Any) -> dict[str, Any]:
        return super().given(seed=self.seed, **flags)

    def settings(self, **flags: Any) -> Settings:
        """The settings of a command (precedence: config.py)."""
        return load_settings(self.preset, self.config, **self.given(**flags))

    def open_bundle(self, folder: Path, **flags: Any) -> "tuple[Bundle, Settings]":
        """A bundle, and its settings overridden by those of the command."""
        from hydra_llm.bundle import Bundle

        bundle = Bundle.load(folder, here=self.settings(**flags))
        return bundle, bundle.settings_with(self.preset, self.config, **self.given(**flags))


@dataclass(frozen=True)
class LearnSettings(RunSettings):
    """Settings of commands that learn or fit, with `--engine`."""

    engine: Annotated[str | None, Option(help="local, ray, or ray:HOST:PORT (Ray's workers).")] = (
        None
    )

    def __post_init__(self) -> None:
        if (self.engine or "").startswith("ray"):
            require("ray", "--engine ray")  # before a command imports what takes seconds

    def given(self, **flags: Any) -> dict[str, Any]:
        return super().given(engine=self.engine, **flags)


@dataclass(frozen=True)
class Selection:
    """How the answer is selected."""

    candidates: Annotated[str | None, Option(help="sampled, or labels: every label.")] = None
    select: Annotated[str | None, Option(help="auto, best (highest score) or expected-gain.")] = (
        None
    )


@dataclass(frozen=True)
class Recording:
    """How the LLM is called, and where its answers are recorded."""

    record: Annotated[Path | None, Option(help="Record the LLM's answers in this file.")] = None
    batch: Annotated[Batch | None, Option(help=BATCH_HELP)] = None

    @contextmanager
    def opened(self, spec: str, settings: Settings, *, direct: bool = False) -> Iterator[CachedLLM]:
        """The LLM of a command, `direct` without batches; recorded answers are reused, and new ones
        always recorded.
        """
        llm = open_llm(spec, settings, batch=None if direct else self.batch)
        console.say_logged("hydra_llm.llm.batch")
        if self.record is not None and self.record.exists():
            merge_recording(self.record, llm)
        try:
            yield llm
        finally:
            if self.record is not None:
                write_recording(self.record, llm)


@dataclass(frozen=True)
class RecordedLLM(Recording):
    """The LLM of a benchmark: called, or replayed from a recording."""

    llm: Annotated[str | None, Option(help=f"{LLM_HELP}; or give --replay.")] = None
    replay: Annotated[Path | None, Option(help="A recording with all answers.")] = None

    def spec(self, default: str = "") -> str:
        """The LLM's spec; exactly one of `--llm` and `--replay` must be given, or one of them at
        most where there is a default.
        """
        specs = [] if self.llm is None else [self.llm]
        specs += [] if self.replay is None else [f"replay:{self.replay}"]
        if len(specs) > 1 or not (specs or default):
            raise SettingsError("give one of --llm SPEC and --replay FILE")
        return specs[0] if specs else default


@contextmanager
def open_store(url: str, timeout: float = 3600.0, *, create: bool = False) -> "Iterator[Store]":
    """A store that is closed at the end; `timeout` is in seconds, long for maintenance. `create`:
    one that is not there is made, and said so; else that is a StoreError.
    """
    from hydra_llm.store.store import Store

    with closing(Store(url, timeout=timeout, create=create)) as store:
        if store.created:
            console.say(f"store {store.name}: created")
        yield store
