"""Options of `bench`, until it takes bundles of options. Knows no data and no LLM."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hydra_llm.config import Settings, load_settings
from hydra_llm.errors import SettingsError

if TYPE_CHECKING:
    from hydra_llm.bundle import Bundle
    from hydra_llm.llm.cache import CachedLLM

LLM = Annotated[
    str,
    typer.Option(
        "--llm",
        help="openai:MODEL[@URL], gguf:PATH, smollm2, replay:FILE or fake:KIND; see `llm check`.",
    ),
]
MaybeLLM = Annotated[
    str | None,
    typer.Option(
        "--llm", help="openai:MODEL[@URL], gguf:PATH, smollm2 or fake:KIND; or give --replay."
    ),
]
Replay = Annotated[
    Path | None,
    typer.Option(help="In place of --llm: take every answer from this recording, ask no LLM."),
]
BundleFolder = Annotated[Path, typer.Option("--bundle", help="Folder of a learned bundle.")]
Seed = Annotated[int | None, typer.Option(help="Seed of sampling, folds and training.")]
Limit = Annotated[int | None, typer.Option(min=1, help="At most so many, for a first look.")]
Preset = Annotated[str | None, typer.Option(help="default, or paper: the authors' settings.")]
Config = Annotated[
    Path | None,
    typer.Option(help="TOML file of settings; without it hydra-llm.toml of this folder, if there."),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Any setting of docs/settings.md, e.g. --set head=kernel.",
    ),
]
Record = Annotated[
    Path | None,
    typer.Option(
        help=(
            "Add what the LLM answered to this file; `replay:FILE` as the LLM repeats the command"
            " without it."
        )
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Candidates = Annotated[
    str | None,
    typer.Option(help="sampled: the LLM's samples; labels: every label, samples are votes."),
]
Select = Annotated[str | None, typer.Option(help="best score, or expected-gain.")]


def given(pairs: list[str] | None, **flags: Any) -> dict[str, Any]:
    """`--set` pairs and flags as settings; a flag wins.

    Raises:
        SettingsError: a pair without `=`.
    """
    out: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise SettingsError(f"--set {pair}: write NAME=VALUE")
        out[name.strip().replace("-", "_")] = value.strip()
    return out | {name: value for name, value in flags.items() if value is not None}


def settings_of(
    preset: str | None, config: Path | None, pairs: list[str] | None, **flags: Any
) -> Settings:
    """The settings of a command: flags over environment over file over preset over default."""
    return load_settings(preset, config, **given(pairs, **flags))


def open_bundle(
    folder: Path, preset: str | None, config: Path | None, pairs: list[str] | None, **flags: Any
) -> "tuple[Bundle, Settings]":
    """A bundle and its settings for a command: flags over environment over file over preset over
    the bundle's own.
    """
    from hydra_llm.bundle import Bundle

    name, asked = preset, given(pairs, **flags)
    bundle = Bundle.load(folder, here=load_settings(name, config, **asked))
    return bundle, bundle.settings_with(name, config, **asked)


def llm_or_replay(llm: str | None, replay: Path | None) -> str:
    """The LLM's spec from `--llm SPEC` or `--replay FILE`.

    Raises:
        SettingsError: both, or neither.
    """
    if (llm is None) == (replay is None):
        raise SettingsError("give one of --llm SPEC and --replay FILE")
    return llm or f"replay:{replay}"


@contextmanager
def opened_llm(spec: str, settings: Settings, record: Path | None) -> "Iterator[CachedLLM]":
    """The LLM of a command; what a recording holds it need not be asked, and what it answers is
    added however the command ends.
    """
    from hydra_llm.llm.recording import take_up, write_recording
    from hydra_llm.llm.registry import open_llm

    llm = open_llm(spec, settings)
    if record is not None and record.exists():
        take_up(record, llm)
    try:
        yield llm
    finally:
        if record is not None:
            write_recording(record, llm)
