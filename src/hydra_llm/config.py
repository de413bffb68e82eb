"""Settings: flag > environment (`HYDRA_...`) > TOML file (`hydra-llm.toml`) > preset > default, or
what a bundle was learned with.

One flat class, so that every run can print and store all that it was run with. Secrets never stand
here: the key of an endpoint comes from the environment variable that the OpenAI SDK reads. Knows
neither torch nor any LLM.
"""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from hydra_llm.errors import SettingsError

SETTINGS_FILE = "hydra-llm.toml"
SERVE_TABLE = "serve"
"""The gateway's table in it (server/settings.py)."""


def default_cache_folder() -> Path:
    """Where answers and features are kept unless `cache` says otherwise (XDG)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hydra-llm"


class Given(BaseSettings):
    """Settings that are exactly what they are given; environment and file are read by whoever loads
    them.
    """

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


class Settings(Given):
    """All that changes what hydra-llm does, beside the data and the LLM's own name.

    `Settings(...)` is exactly what it is given; `load_settings` also reads environment, file and
    preset.
    """

    model_config = SettingsConfigDict(
        env_prefix="HYDRA_", extra="forbid", frozen=True, allow_inf_nan=False
    )

    # ---- retrieval and prompt
    retriever: str = "bm25"
    """bm25, dense, recent, random, nothing, or a name from the entry-point group
    `hydra_llm.retrievers`.
    """
    retrieved: int = Field(default=10, ge=0)
    """M: how many records are retrieved and reranked."""
    k: int = Field(default=4, ge=0)
    """How many records, after reranking, stand in the prompt."""
    prompt_style: Literal["auto", "block", "turns"] = "auto"
    """Records as a list in one message, or as earlier turns; auto: turns for tasks with labels, a
    block for texts.
    """
    max_prompt_tokens: int = Field(default=1536, ge=64)
    """The prompt is cut to this many tokens: last records first, then the query's text."""

    # ---- the black box
    max_tokens: int = Field(default=48, ge=1)
    """Longest answer, in the LLM's tokens."""
    samples: int = Field(default=8, ge=1)
    """b: the greedy answer and b − 1 samples (all b sampled where `greedy_first` is off)."""
    greedy_first: bool = True
    """Candidate 0 is the temperature-0 answer."""
    temperature: float = Field(default=0.5, ge=0)
    """Of the sampled candidates."""
    constrain: bool = False
    """Constrain answers of tasks with labels to those labels, where the engine can."""
    parsing: Literal["lenient", "strict"] = "lenient"
    """How answers are read: `strict` as LaMP does, `lenient` also finds the answer within a
    sentence.
    """
    concurrency: int = Field(default=8, ge=1)
    """Calls in flight at once."""
    timeout: float = Field(default=120.0, gt=0)
    """Seconds until a call counts as failed."""
    retries: int = Field(default=3, ge=0)
    """Of a failed call, by the endpoint's SDK, which waits as long as the endpoint asks."""
    max_calls: int | None = None
    """Budget: calls that reach the LLM. None is no limit."""
    max_llm_tokens: int | None = None
    """Budget: prompt and completion tokens together."""
    max_cost: float | None = None
    """Budget: money, by the prices below."""
    price_prompt: float = Field(default=0.0, ge=0)
    """Per million prompt tokens."""
    price_completion: float = Field(default=0.0, ge=0)
    """Per million completion tokens."""
    cache: Path = Field(default_factory=default_cache_folder)
    """Folder of the LLM's answers and the encoder's features."""

    # ---- the factorized model
    encoder: str = "minilm"
    """`minilm` (all-MiniLM-L6-v2 from its package), a Hugging Face name, or a folder."""
    pooling: Literal["mean", "cls"] = "mean"
    """How the encoder's tokens become one vector."""
    max_length: int = Field(default=256, ge=8)
    """The encoder's window in tokens; longer texts are cut."""
    features: Literal["tower", "cross"] = "tower"
    """tower: each text is encoded once; cross: each pair is encoded as one text, as in the paper.
    """
    head: Literal["mlp", "linear", "lowrank", "kernel"] = "linear"
    """What a user's own part is, from 592,130 numbers (mlp) to K (lowrank)."""
    rank: int = Field(default=16, ge=1)
    """K of the `lowrank` head."""
    width: int = Field(default=128, ge=8)
    """H of the shared layer that `tower` features pass through."""
    prior: Literal["shared", "random"] = "shared"
    """A new `mlp` head starts at (and is drawn towards) the shared head, or starts at random as in
    the authors' code. With `random`, as published, all training users are trained on: no user is
    held out, so the scores of `mlp` heads are not calibrated.
    """
    label_features: bool = True
    """For a closed set of labels: a block of weights per label on the query's vector, in place of
    pair features (`tower` only).
    """
    label_rank: int = Field(default=64, ge=1)
    """Principal directions of the query's vector that label features keep."""
    tune_encoder: bool = False
    """Fine-tune the encoder together with base and heads (`cross` only)."""

    # ---- learning
    users: int | None = Field(default=None, ge=1)
    """How many training users; None is all."""
    asked_users: int | None = Field(default=None, ge=0)
    """How many of them have pairs that cost LLM calls; the others teach by their histories alone
    (tasks with labels). None is all.
    """
    queries_per_user: int = Field(default=3, ge=1)
    """Latest records of a user that serve as queries where pairs cost LLM calls."""
    loss: Literal["listwise", "binary"] = "listwise"
    """Candidates of a group compete (listwise), or each pair is right or wrong by itself, as in the
    paper (binary).
    """
    reranker_labels: Literal["history", "llm"] = "history"
    """What the reranker learns from. history: how good each record's own answer would be for the
    query, which costs no call; what the LLM made of single records then calibrates and judges.
    llm: that alone, as in the paper (benchmarks/reranker_labels.py).
    """
    rerank: Literal["auto", "always"] = "auto"
    """auto: the retriever's order stands where the LLM's answers with the reranker's first records
    were worth less, on held-out users.
    """
    label_rule: Literal["above-mean", "graded", "gold-positive"] = "graded"
    """What teaches: those above the group's mean, the gains themselves, or the gold answer added as
    the one positive (texts).
    """
    record_answer: bool = True
    """The record's answer is part of the reranker's text."""
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate of joint training."""
    batch: int = Field(default=64, ge=1)
    """Pairs per step of joint training."""
    epochs: int | None = Field(default=None, ge=0)
    """At most, of joint training; 0 is none. By default 30 for `mlp` heads, 2 for a tuned encoder,
    and none for what is convex: the shared layer of `tower` stays at its principal directions
    (benchmarks/encoder_frozen_or_tuned.py).
    """
    weight_decay: float = Field(default=0.01, ge=0)
    """Of joint training."""

    # ---- choosing
    candidates: Literal["sampled", "labels"] = "labels"
    """Candidates are the LLM's samples, or every label with the LLM's vote share as evidence (tasks
    with labels).
    """
    select: Literal["best", "expected-gain"] = "expected-gain"
    """The best score, as published, or the pick with the greatest expected gain under the scores'
    distribution.
    """
    caution: float = Field(default=0.0, ge=0)
    """The first candidate stands where the pick's expected lead is less than so many standard
    deviations of what the user's head leaves uncertain; 0 takes every lead.
    """
    votes: bool = True
    """Whether what the LLM's samples say counts in the adapter's score (tasks with labels)."""

    seed: int = 0
    """Of the LLM's samples, of retrieval by lot, and of folds and training."""
    fit_seed: int | None = Field(default=None, ge=0)
    """Of folds and training alone; None is `seed`. Bundles of several share labels and candidates.
    """

    @property
    def training_seed(self) -> int:
        """The seed of folds and training."""
        return self.seed if self.fit_seed is None else self.fit_seed


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
"""The authors' settings (paper, appendix on implementation; DESIGN 5)."""

PRESETS: Mapping[str, Mapping[str, Any]] = {"default": {}, "paper": PAPER}


OF_THIS_MACHINE = frozenset(
    {
        "cache",
        "concurrency",
        "timeout",
        "retries",
        "max_calls",
        "max_llm_tokens",
        "max_cost",
        "price_prompt",
        "price_completion",
    }
)
"""Settings that a bundle does not carry: they belong to where it runs."""

OF_LEARNING = frozenset(
    {
        *("encoder", "pooling", "max_length", "tune_encoder"),  # what the features are
        *(
            "features",
            "width",
            "label_features",
            "label_rank",
            "record_answer",
        ),  # what the scorers read
        *(
            "head",
            "rank",
            "prior",
            "loss",
            "label_rule",
            "reranker_labels",
        ),  # what a head is, and what it is fitted to
        *(
            "lr",
            "batch",
            "epochs",
            "weight_decay",
            "fit_seed",
        ),  # how `mlp` heads are fitted: scores are calibrated for heads of that kind
        *("users", "asked_users"),  # who taught
    }
)
"""Settings that are fixed when a bundle is learned: its scorers mean nothing under others. `fit`,
`ask` and `bench run` may change the rest, which is how the LLM is asked and how an answer is
chosen.
"""


def load_settings(preset: str = "default", file: Path | None = None, **given: Any) -> Settings:
    """Build the settings of a run. `given` are the flags; entries that are None were not given.

    Raises:
        SettingsError: an unknown preset or setting, a value out of range, or a file that is not
            TOML.
    """
    return checked({**_around(preset, file), **_flags(given)})


def settings_over(
    learned: Settings, preset: str = "default", file: Path | None = None, **given: Any
) -> Settings:
    """A bundle's settings with preset, file, environment and flags on top, but for those of
    `OF_LEARNING`, which stay.

    Raises:
        SettingsError: as `load_settings`, or a flag for what was fixed when the bundle was learned.
    """
    around = {
        name: value for name, value in _around(preset, file).items() if name not in OF_LEARNING
    }
    return as_learned(learned, checked({**learned.model_dump(), **around, **_flags(given)}))


def as_learned(learned: Settings, chosen: Settings) -> Settings:
    """`chosen`, if it leaves alone what was fixed in learning.

    Raises:
        SettingsError: names the first setting that it does not.
    """
    for name in sorted(OF_LEARNING):
        fixed, asked = getattr(learned, name), getattr(chosen, name)
        if fixed != asked:
            raise SettingsError(
                f"setting '{name}': was fixed to {fixed!r} when the bundle was learned; learn"
                f" another bundle for {asked!r}"
            )
    return chosen


def _around(preset: str, file: Path | None) -> dict[str, Any]:
    """What preset, file and environment say, the later over the earlier."""
    if preset not in PRESETS:
        raise SettingsError(f"unknown preset '{preset}': take one of {', '.join(PRESETS)}")
    return {**PRESETS[preset], **_of_commands(file), **EnvSettingsSource(Settings)()}


def _of_commands(file: Path | None) -> dict[str, Any]:
    """What the settings file says, but for the gateway's own table."""
    return {name: value for name, value in settings_file(file).items() if name != SERVE_TABLE}


def settings_file(file: Path | None) -> dict[str, Any]:
    """The settings file, or the one of this folder; nothing where there is none.

    Raises:
        SettingsError: the named file is not there, or it is not TOML.
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


def _flags(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name.lower(): value for name, value in given.items() if value is not None}


def checked(values: Mapping[str, Any]) -> Settings:
    """Settings of these values and defaults alone.

    Raises:
        SettingsError: an unknown setting or a value out of range.
    """
    try:
        return Settings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "settings"
        raise SettingsError(
            f"setting '{place}': {first['msg']} (got {first.get('input')!r})"
        ) from None
