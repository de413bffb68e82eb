"""Settings: flag > `--preset` > environment (`HYDRA_...`) > TOML file (`hydra-llm.toml`) > default.

On a learned bundle, the settings that it was learned with take the place of the defaults. One class
per group documents the settings; code reads them from the flat, frozen `Settings` (`settings.k`).
A setting is written `retrieval.k` or `k`. Secrets are no settings: the API key of an endpoint comes
from the environment variable that the OpenAI SDK reads. Imports neither torch nor an LLM.
"""

import difflib
import functools
import logging
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hydra_llm.errors import SettingsError
from hydra_llm.plugins import HEADS

SETTINGS_FILE = "hydra-llm.toml"
SERVE_TABLE = "serve"
"""The gateway's table in that file (gateway/settings.py)."""

logger = logging.getLogger(__name__)


def default_cache_folder() -> Path:
    """The default of `cache` (XDG base directories)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hydra-llm"


class Group(BaseModel):
    """Frozen settings that are exactly what they are given; unknown names are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True
    )


class RetrievalSettings(Group):
    """Which records of the user's history stand in the prompt."""

    retriever: str = "bm25"
    """bm25, dense, recent, random, nothing, or a name from the entry-point group
    `hydra_llm.retrievers`.
    """
    retrieved: int = Field(default=10, ge=0)
    """M: number of records that are retrieved and reranked."""
    k: int = Field(default=4, ge=0)
    """Number of records in the prompt, taken in the reranker's order."""
    max_prompt_tokens: int = Field(default=1536, ge=64)
    """Token limit of the prompt: the last records are cut first, then the query's text."""


class LLMSettings(Group):
    """How the black-box LLM is called, and the budget of a run."""

    max_tokens: int = Field(default=48, ge=1)
    """Max completion tokens per answer."""
    samples: int = Field(default=8, ge=1)
    """b: number of candidates, the greedy answer included (unless `greedy_first` is off)."""
    temperature: float = Field(default=0.5, ge=0)
    """Sampling temperature; the greedy answer uses 0."""
    constrain: bool = False
    """Constrain decoding to the task's labels, if the engine supports it."""
    concurrency: int = Field(default=8, ge=1)
    """Max concurrent calls."""
    timeout: float = Field(default=120.0, gt=0)
    """Timeout per call, in seconds."""
    retries: int = Field(default=3, ge=0)
    """Max retries per call (OpenAI SDK; honours Retry-After)."""
    max_calls: int | None = None
    """Budget: max calls that reach the LLM; None is no limit."""
    max_llm_tokens: int | None = None
    """Budget: max prompt plus completion tokens; None is no limit."""
    max_cost: float | None = None
    """Budget: max cost, at the prices below; None is no limit."""
    price_prompt: float = Field(default=0.0, ge=0)
    """Price per million prompt tokens."""
    price_completion: float = Field(default=0.0, ge=0)
    """Price per million completion tokens."""
    cache: Path = Field(default_factory=default_cache_folder)
    """Folder of the on-disk caches: LLM answers and encoder features."""


class ModelSettings(Group):
    """The encoder and the users' heads."""

    encoder: str = "minilm"
    """`minilm` (all-MiniLM-L6-v2 from its package), a Hugging Face model name, or a folder."""
    max_length: int = Field(default=256, ge=8)
    """Max tokens per encoded text; longer texts are truncated."""
    head: str = "linear"
    """Kind of a user's head, from 592,130 parameters (mlp) over `rank` (lowrank) to one (bias):
    mlp, linear, lowrank, kernel, bias or an installed one.
    """

    @field_validator("head")
    @classmethod
    def _known_head(cls, name: str) -> str:
        if name not in HEADS.builtin and name not in HEADS.names():
            raise ValueError(f"unknown head '{name}': take one of {', '.join(HEADS.names())}")
        return name


class TrainingSettings(Group):
    """Whom and what a bundle is learned from."""

    users: int | None = Field(default=None, ge=1)
    """Number of training users; None is all."""
    labelled_users: int | None = Field(default=None, ge=0)
    """Number of training users for whom the LLM is called to label pairs; None is all. The others
    contribute weak labels from their histories (tasks with labels).
    """
    queries_per_user: int = Field(default=3, ge=1)
    """Number of a user's latest records that serve as queries when the LLM labels pairs."""
    seed: int = 0
    """Seed of LLM samples, the random retriever, cross-validation folds and training."""


class SelectionSettings(Group):
    """How the answer is selected among the candidates."""

    candidates: Literal["sampled", "labels"] = "labels"
    """sampled: the LLM's samples; labels: every label, with the LLM's vote share as a side feature
    (tasks with labels).
    """
    select: Literal["best", "expected-gain"] = "expected-gain"
    """best: highest score, as published; expected-gain: highest expected gain under the softmax of
    the scores.
    """
    abstention_threshold: float = Field(default=0.0, ge=0)
    """Keep candidate 0 unless the expected-gain margin exceeds this many posterior SDs of the
    user's head; 0 disables abstention.
    """


class ResearchSettings(Group):
    """Model variants, training hyperparameters and ablations; the defaults suit most uses."""

    prompt_style: Literal["auto", "block", "turns"] = "auto"
    """block: records as a list in one message; turns: records as earlier chat turns; auto: turns
    for tasks with labels, block for texts.
    """
    greedy_first: bool = True
    """Candidate 0 is the greedy (temperature 0) answer."""
    parsing: Literal["lenient", "strict"] = "lenient"
    """strict: parse answers as LaMP does; lenient: also find the answer within a sentence."""
    pooling: Literal["mean", "cls"] = "mean"
    """Pooling of the encoder's token vectors."""
    features: Literal["tower", "cross"] = "tower"
    """tower: bi-encoder, each text is encoded once; cross: cross-encoder, each pair is encoded as
    one text, as in the paper.
    """
    rank: int = Field(default=16, ge=1)
    """K: number of basis heads of the `lowrank` head."""
    width: int = Field(default=128, ge=8)
    """H: width of the shared layer on bi-encoder features."""
    prior: Literal["shared", "random"] = "shared"
    """Initialization of a new `mlp` head. shared: start at the shared head and shrink towards it;
    random: start at random, as in the authors' code. With `random` no user is held out, so the
    scores of `mlp` heads are not calibrated.
    """
    label_features: bool = True
    """Label-bilinear features for a closed set of labels: one weight block per label on the query
    vector, instead of pair features (`tower` only).
    """
    label_rank: int = Field(default=64, ge=1)
    """Number of principal components of the query vector in label-bilinear features."""
    tune_encoder: bool = False
    """Fine-tune the encoder jointly with the shared weights and heads (`cross` only)."""
    loss: Literal["listwise", "binary"] = "listwise"
    """listwise: softmax cross-entropy over a group's candidates; binary: cross-entropy per pair, as
    in the paper.
    """
    reranker_labels: Literal["history", "llm"] = "history"
    """history: a record's label is the gain of its own answer on the query, without LLM calls; LLM
    answers with single records then calibrate and evaluate the reranker. llm: LLM answers are the
    only labels, as in the paper (benchmarks/reranker_labels.py).
    """
    rerank: Literal["auto", "always"] = "auto"
    """auto: keep the retriever's order if the LLM's answers with reranked records had a lower gain
    on held-out users.
    """
    label_rule: Literal["above-mean", "graded", "gold-positive"] = "graded"
    """Positives of a group: candidates above its mean gain (above-mean), candidates weighted by
    gain (graded), or the gold answer added as the only positive (gold-positive, texts).
    """
    record_answer: bool = True
    """Include the record's answer in the reranker's input text."""
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate of SGD training (`mlp` heads, tuned encoder)."""
    batch: int = Field(default=64, ge=1)
    """Pairs per batch of SGD training."""
    epochs: int | None = Field(default=None, ge=0)
    """Max epochs of SGD training; 0 is none. None is 30 for `mlp` heads, 2 for a tuned encoder and
    0 for convex heads, whose shared layer stays at its principal components
    (benchmarks/encoder_frozen_or_tuned.py).
    """
    weight_decay: float = Field(default=0.01, ge=0)
    """Weight decay of SGD training."""
    vote_share: bool = True
    """Use the LLM's vote share in the adapter's score (tasks with labels)."""
    fit_seed: int | None = Field(default=None, ge=0)
    """Seed of folds and training only; None is `seed`. Bundles that differ only in it share labels
    and candidates.
    """


GROUPS: Mapping[str, type[Group]] = {
    "retrieval": RetrievalSettings,
    "llm": LLMSettings,
    "model": ModelSettings,
    "training": TrainingSettings,
    "selection": SelectionSettings,
    "research": ResearchSettings,
}
GROUP_OF: Mapping[str, str] = {
    name: group for group, settings in GROUPS.items() for name in settings.model_fields
}
"""Flat name → group."""
STORED_NAMES: Mapping[str, str] = {
    "abstention_threshold": "caution",
    "labelled_users": "asked_users",
    "vote_share": "votes",
}
"""Former names: bundles, manifests and run logs keep them, and they are accepted as aliases."""
_RENAMED = {old: new for new, old in STORED_NAMES.items()}


class Settings(
    ResearchSettings,
    SelectionSettings,
    TrainingSettings,
    ModelSettings,
    LLMSettings,
    RetrievalSettings,
):
    """All settings, flat: everything that changes a result, beside the data and the LLM.

    `Settings(...)` reads no environment and no file; `load_settings` does. Names may be flat
    (`k`), grouped (`{"retrieval.k": 2}`, `retrieval={"k": 2}`) or former ones.

    Raises:
        SettingsError: an unknown name.
    """

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, values: Any) -> Any:
        return flat(values) if isinstance(values, Mapping) else values

    @property
    def training_seed(self) -> int:
        """The seed of folds and training."""
        return self.seed if self.fit_seed is None else self.fit_seed

    def stored(self) -> dict[str, Any]:
        """What bundles and manifests record: JSON values, without `LOCAL`, under stored names."""
        kept = self.model_dump(mode="json", exclude=set(LOCAL))
        return {STORED_NAMES.get(name, name): value for name, value in kept.items()}


PAPER: Mapping[str, Any] = {
    "encoder": "allenai/longformer-base-4096",
    "pooling": "cls",
    "features": "cross",
    "max_length": 4096,
    "tune_encoder": True,
    "head": "mlp",
    "prior": "random",
    "lr": 2e-5,
    "batch": 64,
    "epochs": 2,
    "weight_decay": 0.01,
    "retrieved": 10,
    "k": 1,
    "samples": 8,
    "greedy_first": False,
    "temperature": 1.0,
    "candidates": "sampled",
    "select": "best",
    "loss": "binary",
    "label_rule": "above-mean",
    "record_answer": False,
    "reranker_labels": "llm",
    "rerank": "always",
    "users": 100,
}
"""The authors' settings (HYDRA, arXiv 2406.02888, appendix on implementation details)."""

PRESETS: Mapping[str, Mapping[str, Any]] = {"default": {}, "paper": PAPER}

LOCAL = frozenset(LLMSettings.model_fields) - {"max_tokens", "samples", "temperature", "constrain"}
"""Settings that a bundle does not carry: they belong to the machine and the run."""

FIXED = frozenset(
    {"users", "labelled_users", *ModelSettings.model_fields, *ResearchSettings.model_fields}
) - {"prompt_style", "greedy_first", "parsing", "rerank", "vote_share"}
"""Settings that are fixed when a bundle is learned: features, scorers, heads and their training.
`fit`, `ask` and `bench run` may change the others: LLM calls and the selection of answers.
"""


# ---- names


def resolve(name: str, hint: bool = False) -> str:
    """The flat name of a setting that is written `retrieval.k`, `k` or by a former name; `hint`
    logs the grouped spelling, once per name, if another one was used.

    Raises:
        SettingsError: an unknown name; suggests the nearest ones.
    """
    group, dot, last = name.strip().lower().replace("-", "_").rpartition(".")
    found = _RENAMED.get(last, last)
    if found not in GROUP_OF or (dot and group != GROUP_OF[found]):
        raise unknown(name, [*GROUP_OF, *_RENAMED], spelled)
    if hint and spelled(found) != f"{group}.{last}":
        log_renamed(name, spelled(found))
    return found


def spelled(name: str) -> str:
    """How a setting is written, `retrieval.k`, by its flat or former name."""
    found = _RENAMED.get(name, name)
    return f"{GROUP_OF[found]}.{found}"


def unknown(name: str, known: Iterable[str], spelled: Callable[[str], str]) -> SettingsError:
    """The error for an unknown setting, with the nearest known names."""
    near = difflib.get_close_matches(name.lower().rpartition(".")[2], list(known), 3)
    names = list(dict.fromkeys(map(spelled, near)))
    fix = f"did you mean {' or '.join(names)}?" if names else "see docs/settings.md"
    return SettingsError(f"unknown setting '{name}': {fix}")


@functools.cache
def log_renamed(old: str, new: str) -> None:
    """Log the current spelling of a setting or option, once per name."""
    logger.warning("'%s' is now written '%s'", old, new)


def flat(values: Mapping[str, Any], hint: bool = False) -> dict[str, Any]:
    """Settings under their flat names, without those that are None; tables of groups are unpacked.
    Raises as `resolve`.
    """
    out: dict[str, Any] = {}
    for name, value in values.items():
        if name in GROUPS and isinstance(value, Mapping):
            out |= flat({f"{name}.{key}": each for key, each in value.items()}, hint)
        elif value is not None:
            out[resolve(name, hint)] = value
    return out


# ---- sources


def load_settings(preset: str | None = None, file: Path | None = None, **given: Any) -> Settings:
    """The settings of a run. `given` are flags; entries that are None count as not given.

    Raises:
        SettingsError: an unknown preset or setting, a value out of range, or a file that is not
            TOML.
    """
    return checked({**_sources(preset, file), **flat(given)})


def settings_over(
    learned: Settings, preset: str | None = None, file: Path | None = None, **given: Any
) -> Settings:
    """A bundle's settings, overridden by file, environment, preset and flags; of `FIXED` settings
    only flags are read, and they must agree.

    Raises:
        SettingsError: as `load_settings`, or a flag that changes a fixed setting.
    """
    sources = {k: value for k, value in _sources(preset, file).items() if k not in FIXED}
    return as_learned(learned, checked({**learned.model_dump(), **sources, **flat(given)}))


def as_learned(learned: Settings, chosen: Settings) -> Settings:
    """`chosen`, if its `FIXED` settings are those of `learned`.

    Raises:
        SettingsError: names the first setting that differs.
    """
    for name in sorted(FIXED):
        fixed, asked = getattr(learned, name), getattr(chosen, name)
        if fixed != asked:
            raise SettingsError(
                f"setting '{name}': was fixed to {fixed!r} when the bundle was learned; learn"
                f" another bundle for {asked!r}"
            )
    return chosen


def _sources(preset: str | None, file: Path | None) -> dict[str, Any]:
    """What file, environment and preset say, each over the one before."""
    if preset is not None and preset not in PRESETS:
        raise SettingsError(f"unknown preset '{preset}': take one of {', '.join(PRESETS)}")
    in_file = {name: value for name, value in settings_file(file).items() if name != SERVE_TABLE}
    return {**flat(in_file, hint=True), **environment(VARIABLES), **PRESETS[preset or "default"]}


def _variables() -> Iterable[tuple[str, str]]:
    for name, group in GROUP_OF.items():
        # HYDRA_FIT_SEED is the option --seed of `hydra-llm fit`.
        if name != "fit_seed":
            yield f"HYDRA_{name.upper()}", name
            if name in STORED_NAMES:
                yield f"HYDRA_{STORED_NAMES[name].upper()}", name
        yield f"HYDRA_{group.upper()}_{name.upper()}", name


VARIABLES: Mapping[str, str] = dict(_variables())
"""Environment variable → flat name; the grouped spelling of a setting comes last and wins."""


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The values of those of these variables that are set, by setting; case does not matter."""
    found = {variable.upper(): value for variable, value in os.environ.items()}
    return {name: found[variable] for variable, name in variables.items() if variable in found}


def settings_file(file: Path | None) -> dict[str, Any]:
    """The settings file, or the one of this folder; nothing where there is none.

    Raises:
        SettingsError: the named file does not exist, or it is not TOML.
    """
    place = file or Path(SETTINGS_FILE)
    if not place.is_file():
        if file is None:
            return {}
        raise SettingsError(f"{file}: no such settings file")
    try:
        return tomllib.loads(place.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SettingsError(f"{place}: not TOML: {error}") from None


AnyGroup = TypeVar("AnyGroup", bound=Group)


def validated(kind: type[AnyGroup], values: Mapping[str, Any], prefix: str = "") -> AnyGroup:
    """Settings of one class; `prefix` goes before the name in an error.

    Raises:
        SettingsError: an unknown setting or a value out of range.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "settings"
        raise SettingsError(
            f"setting '{prefix}{place}': {first['msg']} (got {first.get('input')!r})"
        ) from None


def checked(values: Mapping[str, Any]) -> Settings:
    """Settings of these values and defaults alone; raises as `validated`."""
    return validated(Settings, values)
