"""The artifact of learning: shared weights, users' heads and records; from and to a folder.

It holds the records of the users that it has heads for: treat it as their data. `model/persistence`
has the file format. Knows no LLM beyond its identity.
"""

from hydra_llm.extras import require

require("learn", "a bundle")

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from hydra_llm.config import LOCAL, Settings, load_settings, settings_over
from hydra_llm.errors import BundleError, DataError, SettingsError
from hydra_llm.gate import Gate, GateWeights, LearnedGate, LexicalGate
from hydra_llm.llm.base import ChatLLM
from hydra_llm.model.bundle_users import delete_user, write_users
from hydra_llm.model.encoder import Encoder
from hydra_llm.model.feature_cache import FeatureCache
from hydra_llm.model.heads import Head
from hydra_llm.model.persistence import (
    USERS_FORMAT,
    BundleFiles,
    encoder_config,
    encoder_of,
    precision_of,
    read_bundle,
    read_config,
    write_bundle,
)
from hydra_llm.model.precision import Precision
from hydra_llm.model.scorer import Scorer
from hydra_llm.model.upgrade import tensors_of, upgraded
from hydra_llm.model.word_model import WordModel
from hydra_llm.pipeline import Heads, Pipeline, Records, UserPipeline
from hydra_llm.rerank import KeepOrder, LearnedReranker, Reranker
from hydra_llm.retrieve import make_retriever, prompt_records
from hydra_llm.select import FirstCandidate, LearnedSelector, Selector
from hydra_llm.side_features import Featurizer
from hydra_llm.tasks.base import CohortStats, Task

WORDS = "words"  # prefix of the word model's tensors
CARD_WARNING = """
It holds personal records and parameters derived from them: handle it as its users' data. Scores \
are calibrated on held-out
users of the training set only; users and tasks unlike those are out of its range.
"""


@dataclass(frozen=True)
class Bundle:
    """A learned reranker and adapter; learning and fitting give a new one."""

    task: Task
    settings: Settings
    llm: Mapping[str, Any]
    """Identity of the LLM that labelled the training data."""
    features: FeatureCache
    population: CohortStats
    scorers: Mapping[str, Scorer] = field(default_factory=dict, repr=False)
    """By name, "reranker" and "adapter": those that were learned."""
    heads: Heads = field(default_factory=dict, repr=False)
    """Users who are in none of them get the shared head."""
    gate: GateWeights | None = None
    """None in bundles of older versions, and with few training inputs: words are compared then."""
    word_model: WordModel | None = None
    """What words an answer has; None for tasks with labels, and in bundles of older versions."""
    word_models: Mapping[str, WordModel] = field(default_factory=dict, repr=False)
    """By training user, those that have not seen the user: while learning, not saved."""
    precision: Precision = "fp32"
    """Of the features that scorers and heads were learned from; another one may be scored only."""
    use_reranker: bool = True
    """False where the retriever's first records were worth more on held-out users."""
    records: Records = field(default_factory=dict, repr=False)
    """Of the users who were fitted, oldest first; empty for one without a history."""
    trained_on: tuple[str, ...] = ()
    """The users from whom the shared weights were learned; of others they hold nothing."""
    report: Mapping[str, Any] = field(default_factory=dict)
    """How learning went: strengths, held-out losses, calls, seconds."""
    weights: str = ""
    """SHA-256 of the weights' file that this was read from."""
    learned_with: Settings | None = None
    """What `save` writes: by default the first `settings`; copies with others keep these."""
    versions: dict[Path, str] = field(default_factory=dict)
    """Folder → version of what was last read or written there, shared by copies."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "learned_with", self.learned_with or self.settings)

    @cached_property
    def featurizer(self) -> Featurizer:
        models = self.word_model, self.word_models
        return Featurizer(self.task, self.features, self.population, *models)

    @property
    def parts(self) -> frozenset[str]:
        """What was learned: scorers by name, and `word_model`."""
        return frozenset(self.scorers) | ({"word_model"} if self.word_model else set())

    @property
    def reranker(self) -> Scorer | None:
        return self.scorers.get("reranker")

    @property
    def adapter(self) -> Scorer | None:
        return self.scorers.get("adapter")

    def heads_of(self, user: str) -> dict[str, Head]:
        """A user's heads by scorer; none for an unknown user."""
        own = {name: heads.get(user) for name, heads in self.heads.items()}
        return {name: head for name, head in own.items() if head is not None}

    def check_task(self, task: Task) -> None:
        """Raise DataError if data of this task cannot be read, fitted and scored by this bundle."""
        if task.kind != self.task.kind or task.labels != self.task.labels:
            tasks = f"the data set's task '{task.name}' is not the bundle's '{self.task.name}'"
            raise DataError(f"{tasks}: kind and labels must agree")

    def check_precision(self) -> None:
        """Raise SettingsError where heads would be fitted on features of another precision."""
        if (other := self.features.encoder.precision) != self.precision:
            learned = f"the bundle was learned with {self.precision}, not {other}"
            why = "its heads belong to those vectors, and scores of others differ"
            fix = "leave it out, or learn another bundle"
            raise SettingsError(f"setting 'encoder_precision': {learned}: {why}: {fix}")

    def pipeline(
        self, settings: Settings | None = None, *, rerank: bool = True, adapt: bool = True
    ) -> Pipeline:
        """The stages with this bundle's parts; a part that is switched off is the null part."""
        chosen, featurizer = settings or self.settings, self.featurizer
        reranker: Reranker = KeepOrder()
        selector: Selector = FirstCandidate()
        wanted = {"always": True, "never": False}.get(chosen.rerank, self.use_reranker)
        if rerank and self.reranker and wanted and not chosen.private:
            reranker = LearnedReranker(self.reranker, featurizer, with_answer=chosen.record_answer)
        if adapt and self.adapter:
            selector = LearnedSelector(self.adapter, featurizer, chosen)
        embed, seed = self.features.texts, chosen.seed
        retriever = make_retriever(chosen.retriever, embed=embed, seed=seed)
        gate: Gate = LearnedGate(self.gate, embed) if self.gate else LexicalGate()
        others = "" if self.task.labels else chosen.candidate_prompts
        beside = prompt_records(others, retriever, embed=embed, seed=seed)
        vectorize = featurizer.vectorize
        return Pipeline(self.task, retriever, chosen, reranker, selector, gate, beside, vectorize)

    def personalizer(
        self,
        llm: ChatLLM,
        settings: Settings | None = None,
        *,
        rerank: bool = True,
        adapt: bool = True,
    ) -> UserPipeline:
        """`pipeline` with an LLM and this bundle's records and heads."""
        stages = self.pipeline(settings, rerank=rerank, adapt=adapt)
        return UserPipeline.of(stages, llm, self.records, self.heads)

    def without_heads(self) -> "Bundle":
        """The non-personal baseline: the same bundle with the shared heads for every user."""
        return replace(self, heads={})

    def without_people(self, hashed: Callable[[str], str]) -> "Bundle":
        """The shared weights, and hashes of the training users: heads and records are elsewhere."""
        return replace(self, heads={}, records={}, trained_on=tuple(map(hashed, self.trained_on)))

    def settings_with(
        self, preset: str | None = None, file: Path | None = None, /, **given: object
    ) -> Settings:
        """The bundle's settings, overridden by file, environment, preset and `given`, without None.

        Raises:
            SettingsError: unknown, out of range, or another value for what was fixed in learning.
        """
        return settings_over(self.settings, preset, file, **given)

    # ---- disk

    def save(self, folder: Path | str) -> Path:
        """Write the bundle; an older one at this place is replaced when this one is complete.

        Raises:
            BundleError: another process writes there or changed it since it was read; a full disk.
            SettingsError: its encoder has another precision than it was learned with.
        """
        self.check_precision()
        folder, settings = Path(folder), self.learned_with or self.settings
        scorers: dict[str, Any] = {}
        tensors: dict[str, Any] = {}
        for name, scorer in self.scorers.items():
            scorers[name], own = scorer.config(), scorer.tensors()
            tensors |= {f"{name}.{key}": value.contiguous() for key, value in own.items()}
        if self.gate:
            tensors["gate.weights"] = torch.tensor(self.gate.weights)
        if self.word_model:
            arrays = self.word_model.arrays().items()
            tensors |= {f"{WORDS}.{key}": torch.from_numpy(value) for key, value in arrays}
        encoder = self.features.encoder if settings.tune_encoder else None
        config = {
            "gate": self.gate and self.gate.config(),
            "word_model": self.word_model and self.word_model.config(),
            "task": self.task.to_json(),
            "settings": settings.stored(),
            "llm": dict(self.llm),
            "encoder": encoder_config(self.features.encoder),
            "population": asdict(self.population),
            "scorers": scorers,
            "use_reranker": self.use_reranker,
            "trained_on": list(self.trained_on),
            "report": dict(self.report),
        }
        heads = {name: self.heads.get(name, {}) for name in scorers}
        files = BundleFiles(config, tensors, self.records, self.card(), encoder, heads)
        place = folder.resolve()
        self.versions[place] = write_bundle(folder, files, replaces=self.versions.get(place))
        return folder

    def save_users(self, folder: Path | str, users: Sequence[str]) -> Path:
        """Write these users' heads and records into the bundle that this one was read from; all
        others stay as they are, also those that another process has written since.

        Raises:
            BundleError: another process changed more than users; a full disk.
        """
        folder = Path(folder)
        place = folder.resolve()
        if version := self.versions.get(place):
            heads = {name: self.heads.get(name, {}) for name in self.scorers}
            written = write_users(folder, users, heads, self.records, version=version)
            if written:
                self.versions[place] = written
                return folder
        return self.save(folder)

    @classmethod
    def load(
        cls, folder: Path | str, *, cache: Path | None = None, here: Settings | None = None
    ) -> "Bundle":
        """Read a bundle; `here` has the settings that none carries (default: environment, file).

        Raises:
            BundleError: not there, damaged, of a newer format, or learned with another encoder.
            SettingsError: the environment or the settings file is at fault.
        """
        here = here or load_settings()
        machine, asked = here.model_dump(include=set(LOCAL)), here.encoder_precision
        files = read_bundle(Path(folder))
        encoder = encoder_of(files, None if asked == "auto" else asked)
        try:
            bundle = cls._of(upgraded(files), encoder, cache, machine)
        except (DataError, SettingsError) as error:  # such as a plug-in that is not installed here
            raise BundleError(f"{folder}: {error}") from None
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            fault = "config.json and the weights do not fit together"
            raise BundleError(f"{folder}: {fault} ({type(error).__name__}: {error})") from None
        for interaction in (scorer.interaction for scorer in bundle.scorers.values()):
            interaction.rounded = "bf16" in (encoder.precision, bundle.precision)
            knows = getattr(interaction, "known", None) is not None
            if knows and encoder.precision == "int8":
                why = "the bundle knows texts by their vectors, which int8 moves too far"
                raise SettingsError(f"setting 'encoder_precision': {why}: take fp32 or bf16")
        bundle.versions[Path(folder).resolve()] = files.version
        return bundle

    @classmethod
    def _of(
        cls, files: BundleFiles, encoder: Encoder, cache: Path | None, machine: Mapping[str, Any]
    ) -> "Bundle":
        config = files.config
        settings = Settings.checked({**config["settings"], **machine})
        shares = tuple(config["population"]["label_shares"])
        words = {key: value.numpy() for key, value in tensors_of(WORDS, files.tensors).items()}
        scorers = {
            name: Scorer.restore(entry, tensors_of(name, files.tensors))
            for name, entry in config["scorers"].items()
        }
        return cls(
            task=Task.from_json(config["task"], "config.json"),
            settings=settings,
            llm=config["llm"],
            features=FeatureCache(encoder, (cache or settings.cache) / "features.sqlite"),
            population=CohortStats(**{**config["population"], "label_shares": shares}),
            scorers=scorers,
            heads=files.heads,
            gate=GateWeights.restore(config.get("gate"), files.tensors.get("gate.weights")),
            word_model=WordModel.restore(config.get("word_model"), words),
            precision=precision_of(config),
            use_reranker=config["use_reranker"],
            records=files.records,
            trained_on=tuple(config["trained_on"]),
            report=config["report"],
            weights=config["files"]["weights.safetensors"]["sha256"],
        )

    def card(self) -> str:
        """The model card: what this is, what it was learned from, what it must not be used for."""
        model = self.llm.get("model", self.llm.get("kind", "unknown"))
        task, encoder = self.task, self.features.encoder
        lines = [
            f"# hydra-llm bundle for task {task.name}\n",
            f"- Kind: {task.kind}; labels: {', '.join(task.labels) or 'none'}",
            f"- Learned from {len(self.trained_on)} training users; when it was written, heads for"
            f" {len(self.records)} users, whose records it holds.",
            f"- LLM that labelled the training data: {model}",
            f"- Encoder: {encoder.name} ({encoder.precision}, digest {encoder.digest[:12]})",
        ]
        for name, scorer in self.scorers.items():
            size = scorer.head.numbers_per_user
            numbers = f"{size} numbers a user" if size else "numbers that grow with the history"
            parts = f"{scorer.interaction.kind} features, {scorer.head.name} head"
            lines.append(f"- {name}: {parts}, {numbers}")
        if self.word_model:
            count = len(self.word_model.population.counts)
            lines.append(f"- word model: {count} words that at least two users share, with counts")
        return "\n".join([*lines, CARD_WARNING])


def delete_from(folder: Path, user: str) -> dict[str, int] | None:
    """As `delete_user`, from a bundle of any format: an older one is first written in this one."""
    if read_config(folder)["format"] < USERS_FORMAT:
        Bundle.load(folder).save(folder)
    return delete_user(folder, user)
