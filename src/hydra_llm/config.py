"""Settings: flag > `--preset` > environment (`HYDRA_...`) > TOML file (`hydra-llm.toml`) > default.

A bundle's settings take the place of the defaults. Each group documents its settings; code reads
the flat, frozen `Settings` (`settings.k`). API keys are not settings: the OpenAI SDK reads them.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hydra_llm import environment as env
from hydra_llm.errors import SettingsError, did_you_mean
from hydra_llm.plugins import DETECTORS, HEADS, RETRIEVERS, Registry, read_prompts
from hydra_llm.presets import PRESETS
from hydra_llm.setting_names import Names

SERVE_TABLE = "serve"  # the gateway's table in that file (gateway/settings.py)


class Group(BaseModel):
    """Frozen settings that are exactly what they are given; unknown names are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True
    )
    error_prefix: ClassVar[str] = ""

    @classmethod
    def checked(cls, values: Mapping[str, Any]) -> Self:
        """Settings of these values and defaults alone. Raises SettingsError."""
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
        name = cls.error_prefix + (".".join(map(str, first["loc"])) or "settings")
        message = first["msg"].removeprefix("Value error, ")
        raise SettingsError(f"setting '{name}': {message} (got {first.get('input')!r})")


def known(registry: Registry[Any], name: str) -> str:
    """The name; ValueError if it is not registered."""
    if name not in registry.builtin and name not in registry.names():
        raise ValueError(registry.unknown(name))
    return name


class Retrieval(Group):
    """Which records of the user's history stand in the prompt."""

    retriever: str = "bm25"
    """bm25 (words), dense (encoder), hybrid (both), recent, random, nothing, or a plug-in."""
    retrieved: int = Field(default=10, ge=0)
    """M: number of records that are retrieved and reranked."""
    k: int = Field(default=4, ge=0)
    """Number of records in the prompt, taken in the reranker's order."""
    gate: Literal["auto", "always", "off"] = "auto"
    """Use only records that may help: auto, unless the task's own instruction asks; always; off."""
    max_prompt_tokens: int = Field(default=1536, ge=64)
    """Token limit of the prompt: the last records are cut first, then the query's text."""

    @field_validator("retriever")
    @classmethod
    def _known_retriever(cls, name: str) -> str:
        return known(RETRIEVERS, name)


class LLM(Group):
    """How the black-box LLM is called, and the budget of a run."""

    max_tokens: int = Field(default=48, ge=1)
    """Max completion tokens per answer."""
    samples: int = Field(default=8, ge=1)
    """b: number of candidates, the greedy answer included (unless `greedy_first` is off)."""
    temperature: float = Field(default=0.5, ge=0)
    """Sampling temperature; the greedy answer uses 0."""
    constrain: bool = False
    """Constrain decoding to the task's labels, if the engine supports it."""
    concurrency: Literal["auto"] | int = "auto"
    """Max concurrent calls. auto: as many as the endpoint takes, found by its answers (8 at first).
    """
    timeout: float = Field(default=120.0, gt=0)
    """Timeout per call, in seconds."""
    retries: int = Field(default=3, ge=0)
    """Max retries per call (OpenAI SDK; honours Retry-After). After a 429 to several calls at once
    fewer are sent, and no retry is counted.
    """
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
    prices: Path | None = None
    """TOML file of prices by model, above the list that is shipped; see docs/spend.md."""
    cache: Path = Field(default_factory=env.cache_folder)
    """Folder of the on-disk caches: LLM answers and encoder features."""

    @field_validator("concurrency", mode="before")
    @classmethod
    def _at_once(cls, value: object) -> object:
        if value == "auto" or (str(value).isdecimal() and int(str(value)) > 0):
            return value
        raise ValueError("write auto, or a whole number from 1")

    @field_validator("cache", "prices")
    @classmethod
    def _home(cls, path: Path | None) -> Path | None:
        return path and env.expanded(path)


class Model(Group):
    """The encoder and the users' heads."""

    encoder: str = "minilm"
    """`minilm` (all-MiniLM-L6-v2 from its package), a Hugging Face model name, or a folder."""
    head: str = "linear"
    """mlp (592,130 parameters), linear, lowrank (`rank`), kernel, bias (one), or a plug-in."""

    @field_validator("head")
    @classmethod
    def _known_head(cls, name: str) -> str:
        return known(HEADS, name)


class Training(Group):
    """Whom and what a bundle is learned from."""

    users: int | None = Field(default=None, ge=1)
    """Number of training users; None is all."""
    labelled_users: int | None = Field(default=None, ge=0)
    """Training users whose pairs the LLM labels; the others' labels are weak; None is all."""
    fit_labels: Literal["history", "llm"] = "history"
    """New users' adapter heads for free texts with a word model. history: the shared head, no LLM
    calls: the word model reads their records; llm: fitted to the LLM's samples for their records.
    """
    queries_per_user: int = Field(default=3, ge=1)
    """Number of a user's latest records that serve as queries when the LLM labels pairs."""
    seed: int = 0
    """Seed of LLM samples, the random retriever, cross-validation folds and training."""


class Selection(Group):
    """How the answer is selected among the candidates."""

    candidates: Literal["sampled", "labels"] = "labels"
    """sampled: the LLM's samples; labels: every label, with vote shares (tasks with labels)."""
    label_probabilities: bool = False
    """Grey box: the LLM's own probabilities of the labels, from one call, in place of samples."""
    select: Literal["auto", "best", "expected-gain"] = "auto"
    """best: highest score, as published; expected-gain: highest mean gain by softmax of scores.
    auto: best for free texts with a word model, whose scores estimate gains; else expected-gain.
    """
    abstention_threshold: float = Field(default=0.0, ge=0)
    """Keep candidate 0 unless the margin exceeds this many posterior SDs of the head; 0 is off."""


class Research(Group):
    """Model variants, training hyperparameters and ablations; the defaults suit most uses."""

    prompt_style: Literal["auto", "block", "turns"] = "auto"
    """Records as a list (block) or as chat turns (turns); auto: turns with labels, else block."""
    greedy_first: bool = True
    """Candidate 0 is the greedy (temperature 0) answer."""
    candidate_prompts: str = ""
    """Free texts: other prompts, as zero-shot,recent@4, each asked once in place of a sample."""
    parsing: Literal["lenient", "strict"] = "lenient"
    """strict: parse answers as LaMP does; lenient: also find the answer within a sentence."""
    pooling: Literal["mean", "cls"] = "mean"
    """Pooling of the encoder's token vectors: their mean, or the first one (cls)."""
    base_users: int = Field(default=2000, ge=1)
    """Training users, by lot, from whom all that is shared is learned; others get heads alone."""
    max_length: int = Field(default=256, ge=8)
    """Max tokens per encoded text; longer texts are truncated."""
    encoder_precision: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    """Numbers that the encoder computes with; auto: as the bundle was learned, fp32 for a new one.
    `ask`, `serve` and `bench run --bundle` may take another one; `fit` may not, nor `learn` int8.
    """
    features: Literal["tower", "cross"] = "tower"
    """tower: bi-encoder, texts encoded alone; cross: cross-encoder on pairs, as in the paper."""
    rank: int = Field(default=16, ge=1)
    """K: number of basis heads of the `lowrank` head."""
    width: int = Field(default=128, ge=8)
    """H: width of the shared layer on bi-encoder features."""
    prior: Literal["shared", "random"] = "shared"
    """Start of a new `mlp` head: at the shared head, or random (as published; not calibrated)."""
    label_features: bool = True
    """Label-bilinear features: weights per label on the query vector (labels, `tower` only)."""
    word_model: bool = True
    """Learn which words answers have, for the adapter (free texts)."""
    label_rank: int | None = Field(default=None, ge=1)
    """Principal components of the query vector in label-bilinear features; None: by the data."""
    head_prior: Literal["learned", "isotropic"] = "learned"
    """Prior of `linear` and `lowrank` heads for labels: learned from the training users, or I/λ."""
    discount: Literal["none", "auto"] | float = "none"
    """What a record counts less than the one after it in the fit of a head: none, a rate between 0
    and 1, or auto: by later records of training users, if that is better than none.
    """
    tune_encoder: bool = False
    """Fine-tune the encoder jointly with the shared weights and heads (`cross` only)."""
    loss: Literal["listwise", "binary"] = "listwise"
    """listwise: softmax cross-entropy of a group; binary: cross-entropy per pair, as the paper."""
    reranker_labels: Literal["history", "llm"] = "history"
    """history: gains of the records' own answers, no LLM calls; llm: LLM answers, as published."""
    reranker_check: Literal["history", "llm"] = "history"
    """What checks and calibrates a reranker of weak labels: those of held-out users, or the LLM."""
    rerank: Literal["auto", "always", "never"] = "auto"
    """always, never, or auto: only if that did not lower the gain on held-out users."""
    label_queries: Literal["auto", "history", "queries", "both"] = "auto"
    """Labelled of training users: latest records, known queries, or queries first, then records."""
    label_order: Literal["auto", "reranker", "retriever"] = "auto"
    """Order of records in prompts of labelled candidates; auto: retriever's in runs with folds."""
    labelling: Literal["all", "adaptive"] = "all"
    """adaptive: queries are labelled in rounds until that does not help; of equal answers one."""
    choose: Literal["given", "auto"] = "given"
    """auto: k, temperature and number of samples by training users' queries; given: as set."""
    label_rule: Literal["above-mean", "graded", "gold-positive"] = "graded"
    """Positives: above-mean gain, graded by gain, or gold-positive: the gold answer is added."""
    record_answer: bool = True
    """Include the record's answer in the reranker's input text."""
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate of SGD training (`mlp` heads, tuned encoder)."""
    batch: int = Field(default=64, ge=1)
    """Pairs per batch of SGD training."""
    epochs: int | None = Field(default=None, ge=0)
    """Max SGD epochs; None is 30 for `mlp` heads, 2 for a tuned encoder, 0 for convex heads."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Weight decay of SGD training."""
    vote_share: bool = True
    """Use the LLM's vote share in the adapter's score (tasks with labels)."""
    ask: Literal["auto", "always"] = "auto"
    """auto: the LLM is not asked where its answers did not help on held-out users; always."""
    fit_seed: int | None = Field(default=None, ge=0)
    """Seed of folds and training; None is `seed`. Bundles differing in it alone share labels."""

    private: bool = False
    """The LLM never sees a record: none is in a prompt, and none is labelled by it."""
    mask: str = ""
    """Personal data that the LLM gets as placeholders: email, phone, card, iban, name, or plug-ins,
    with commas. Answers have it again; see docs/privacy.md.
    """
    dp_epsilon: float | None = Field(default=None, gt=0)
    """ε of user-level differential privacy of what users share (labels and ratings); None: off."""
    dp_delta: float | None = Field(default=None, gt=0, lt=1)
    """δ of it; None is 1 / users^1.1."""
    engine: str = "local"
    """Who labels, encodes and fits heads: local, this process; ray, workers of Ray on this machine
    or of the cluster that it is part of; ray:HOST:PORT, of that cluster. The results are the same.
    """

    @field_validator("mask")
    @classmethod
    def _known_detectors(cls, names: str) -> str:
        return ",".join(known(DETECTORS, own) for own in names.replace(",", " ").split())

    @field_validator("engine")
    @classmethod
    def _known_engine(cls, name: str) -> str:
        if name not in ("local", "ray") and not re.fullmatch(r"ray:[^/:]+:\d+", name):
            raise ValueError("take local, ray or ray:HOST:PORT")
        return name

    @field_validator("discount", mode="before")
    @classmethod
    def _rate(cls, value: object) -> object:
        with suppress(TypeError, ValueError):
            if value in ("none", "auto") or 0 < float(str(value)) < 1:
                return value
        raise ValueError("write none, auto, or a rate above 0 and below 1")

    @field_validator("candidate_prompts")
    @classmethod
    def _known_prompts(cls, names: str) -> str:
        read_prompts(names)
        return names


GROUPS: Mapping[str, type[Group]] = {
    kind.__name__.lower(): kind for kind in (Retrieval, LLM, Model, Training, Selection, Research)
}
GROUP_OF = {name: group for group, kind in GROUPS.items() for name in kind.model_fields}
STORED_NAMES: Mapping[str, str] = {
    "abstention_threshold": "caution",
    "labelled_users": "asked_users",
    "vote_share": "votes",
}
"""Former names: bundles, manifests and run logs keep them, and they are accepted as aliases."""
RENAMED = {old: new for new, old in STORED_NAMES.items()}
NAMES = Names(GROUP_OF, RENAMED)


class Settings(Research, Selection, Training, Model, LLM, Retrieval):
    """All settings, flat: all that changes a result, beside the data and the LLM.

    `Settings(...)` reads no environment and no file; `load_settings` does. Names may be flat
    (`k`), grouped (`{"retrieval.k": 2}`, `retrieval={"k": 2}`) or former ones.
    """

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, values: Any) -> Any:
        return NAMES.flat(values) if isinstance(values, Mapping) else values

    @property
    def of_encoder(self) -> dict[str, Any]:
        """How `open_encoder` opens the encoder of a new bundle."""
        precision = self.encoder_precision
        chosen = "fp32" if precision == "auto" else precision
        return {"pooling": self.pooling, "max_length": self.max_length, "precision": chosen}

    @property
    def learns_reranker(self) -> bool:
        """Whether there are records in prompts that a reranker could put in order."""
        return self.retrieved > 0 and self.rerank != "never" and not self.private

    @property
    def training_seed(self) -> int:
        """The seed of folds and training."""
        return self.seed if self.fit_seed is None else self.fit_seed

    def stored(self) -> dict[str, Any]:
        """What bundles and manifests record: JSON values, without `LOCAL`, under stored names."""
        values = self.model_dump(mode="json", exclude=set(LOCAL))
        return {STORED_NAMES.get(name, name): value for name, value in values.items()}


LOCAL = frozenset(LLM.model_fields) - {"max_tokens", "samples", "temperature", "constrain"}
LOCAL |= {"engine", "mask"}
"""Settings that a bundle does not carry: they belong to the machine and the run."""

CHANGEABLE = {"prompt_style", "greedy_first", "parsing", "rerank", "vote_share", "ask"}
CHANGEABLE |= {"candidate_prompts", "encoder_precision", "engine", "private", "mask"}
_LEARNED = {"users", "labelled_users", *Model.model_fields, *Research.model_fields}
FIXED = frozenset(_LEARNED - CHANGEABLE)
"""Fixed when a bundle is learned. `fit`, `ask`, `bench run` may change LLM calls and selection."""


def load_settings(preset: str | None = None, file: Path | None = None, **given: Any) -> Settings:
    """The settings of a run. `given` are flags; entries that are None count as not given.
    SettingsError: an unknown preset or setting, a value out of range, or a file not in TOML.
    """
    return Settings.checked({**_sources(preset, file), **NAMES.flat(given)})


def settings_over(
    learned: Settings, preset: str | None = None, file: Path | None = None, **given: Any
) -> Settings:
    """A bundle's settings, overridden by file, environment, preset and flags; of `FIXED` settings
    only flags are read. Raises SettingsError as `load_settings`, or if they disagree.
    """
    sources = {name: value for name, value in _sources(preset, file).items() if name not in FIXED}
    chosen = Settings.checked({**learned.model_dump(), **sources, **NAMES.flat(given)})
    return as_learned(learned, chosen)


def as_learned(learned: Settings, chosen: Settings) -> Settings:
    """`chosen`; SettingsError names the first of its `FIXED` settings that differs."""
    for name in sorted(FIXED):
        fixed, other = getattr(learned, name), getattr(chosen, name)
        if fixed != other:
            problem = f"was fixed to {fixed!r} when the bundle was learned"
            raise SettingsError(f"setting '{name}': {problem}; learn another bundle for {other!r}")
    return chosen


def _sources(preset: str | None, file: Path | None) -> dict[str, Any]:
    """The values of file, environment and preset; a later one overrides."""
    if preset is not None and preset not in PRESETS:
        near = did_you_mean(preset, PRESETS)
        raise SettingsError(f"unknown preset '{preset}'{near}: take one of {', '.join(PRESETS)}")
    table = env.settings_file(file)
    table.pop(SERVE_TABLE, None)
    named = dict(PRESETS[preset or "default"])
    return NAMES.flat(table, hint=True) | environment(VARIABLES) | named


# HYDRA_FIT_SEED is the option --seed of `hydra-llm fit`.
_FLAT = {f"HYDRA_{name}".upper(): name for name in GROUP_OF if name != "fit_seed"}
_FORMER = {f"HYDRA_{old}".upper(): new for old, new in RENAMED.items()}
_GROUPED = {f"HYDRA_{group}_{name}".upper(): name for name, group in GROUP_OF.items()}
VARIABLES: Mapping[str, str] = _FLAT | _FORMER | _GROUPED
"""Environment variable → flat name; the grouped spelling of a setting comes last and wins."""


def environment(variables: Mapping[str, str]) -> dict[str, Any]:
    """The values of those of these variables that are set and not empty, by setting."""
    given = env.variables()
    return {name: given[variable] for variable, name in variables.items() if variable in given}
