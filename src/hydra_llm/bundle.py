"""What was learned, together: scorers, encoder, population, records; from and to a folder on disk.

The files themselves are `model/bundle.py`'s business; this module knows what they mean. A bundle
holds the records of the users that it has heads for (they are what is retrieved): treat it as their
data. Knows no LLM beyond its identity.
"""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra_llm.config import LOCAL, Settings, checked, load_settings, settings_over
from hydra_llm.errors import BundleError, DataError, SettingsError
from hydra_llm.llm.base import ChatLLM
from hydra_llm.model.feature_cache import FeatureCache
from hydra_llm.model.persistence import (
    BundleFiles,
    encoder_config,
    encoder_of,
    read_bundle,
    write_bundle,
)
from hydra_llm.model.scorer import Scorer
from hydra_llm.pipeline import Personalizer, Pipeline
from hydra_llm.rerank import KeepOrder, LearnedReranker, Reranker
from hydra_llm.retrieve import make_retriever
from hydra_llm.select import FirstCandidate, LearnedSelector, Selector
from hydra_llm.side_features import CohortStats, Featurizer
from hydra_llm.tasks.base import Task
from hydra_llm.types import Record


@dataclass
class Bundle:
    """A learned reranker and adapter with all that they need to answer."""

    task: Task
    settings: Settings
    llm: Mapping[str, Any]
    """Identity of the LLM that the pairs were labelled with."""
    store: FeatureCache
    population: CohortStats
    reranker: Scorer | None = None
    adapter: Scorer | None = None
    records: dict[str, list[Record]] = field(default_factory=dict, repr=False)
    """Of the users who have a head, oldest first; empty for one without a history."""
    trained_on: tuple[str, ...] = ()
    """The users from whom the shared base was learned; a head of any other user leaves no trace in
    the base.
    """
    report: dict[str, Any] = field(default_factory=dict)
    """How learning went: strengths, held-out losses, calls, seconds."""
    weights: str = ""
    """SHA-256 of the weights' file that this was read from: two bundles of other scorers differ in
    it.
    """
    learned_with: Settings | None = None
    """What `save` writes: by default the first `settings`; a copy that answers or fits with others
    keeps these.
    """
    versions: dict[Path, str] = field(default_factory=dict)
    """Folder → SHA-256 of the config.json that was last read or written there; copies of this
    bundle share it.
    """

    def __post_init__(self) -> None:
        self.learned_with = self.learned_with or self.settings

    @cached_property
    def featurizer(self) -> Featurizer:
        return Featurizer(self.task, self.store, self.population)

    @property
    def scorers(self) -> dict[str, Scorer]:
        """The scorers that there are, by name."""
        return {
            name: scorer
            for name, scorer in (("reranker", self.reranker), ("adapter", self.adapter))
            if scorer is not None
        }

    @property
    def reranks(self) -> bool:
        """Whether the reranker orders: not where its first records were worth less than the
        retriever's on held-out users.
        """
        pick, first = (
            self.report.get("reranker", {}).get(name) for name in ("gain_pick", "gain_first")
        )
        return pick is None or first is None or not pick < first

    def check_task(self, task: Task) -> None:
        """See that data of this task can be read, fitted and scored by this bundle.

        Raises:
            DataError: it is of another kind, or has other labels.
        """
        if task.kind != self.task.kind or task.labels != self.task.labels:
            raise DataError(
                f"the data set's task '{task.name}' is not the bundle's '{self.task.name}': kind"
                " and labels must agree"
            )

    def pipeline(
        self, settings: Settings | None = None, *, rerank: bool = True, adapt: bool = True
    ) -> Pipeline:
        """The stages with this bundle's parts; a part that is switched off is the null part."""
        chosen, featurizer = settings or self.settings, self.featurizer
        rerank = rerank and (self.reranks or chosen.rerank == "always")
        reranker: Reranker = KeepOrder()
        if rerank and self.reranker:
            reranker = LearnedReranker(self.reranker, featurizer, with_answer=chosen.record_answer)
        selector: Selector = FirstCandidate()
        if adapt and self.adapter:
            selector = LearnedSelector(
                self.adapter,
                featurizer,
                select=chosen.select,
                votes=chosen.vote_share,
                abstention_threshold=chosen.abstention_threshold,
            )
        retriever = make_retriever(chosen.retriever, embed=self.store.texts, seed=chosen.seed)
        return Pipeline(self.task, retriever, chosen, reranker, selector, featurizer.vectorize)

    def personalizer(
        self,
        llm: ChatLLM,
        settings: Settings | None = None,
        *,
        rerank: bool = True,
        adapt: bool = True,
    ) -> Personalizer:
        """`pipeline` with an LLM and this bundle's records."""
        stages = self.pipeline(settings, rerank=rerank, adapt=adapt)
        return Personalizer.of(stages, llm, self.records)

    def without_heads(self) -> "Bundle":
        """The same bundle for which everybody is a stranger: the shared heads answer. The
        non-personal control.
        """
        return replace(self, reranker=_headless(self.reranker), adapter=_headless(self.adapter))

    def without_people(self, hashed: Callable[[str], str]) -> "Bundle":
        """What is shared alone: no head, no record, and who taught under hashes; for where heads
        and records have their own store.
        """
        scorers = [
            None if scorer is None else scorer.without_users()
            for scorer in (self.reranker, self.adapter)
        ]
        return replace(
            self,
            reranker=scorers[0],
            adapter=scorers[1],
            records={},
            trained_on=tuple(map(hashed, self.trained_on)),
        )

    def settings_with(
        self, preset: str | None = None, file: Path | None = None, /, **given: object
    ) -> Settings:
        """The bundle's settings, overridden by file, environment, preset and `given`; entries that
        are None count as not given.

        Raises:
            SettingsError: an unknown setting, a value out of range, or another value for what was
                fixed in learning.
        """
        return settings_over(self.settings, preset, file, **given)

    # ---- disk

    def save(self, folder: Path | str) -> Path:
        """Write the bundle; an older one at the same place is replaced only when this one is
        complete.

        Raises:
            BundleError: another process is writing there or has changed the bundle since this one
                was read, or the disk fails.
        """
        folder, encoder, settings = (
            Path(folder),
            self.store.encoder,
            self.learned_with or self.settings,
        )
        scorers = self.scorers
        config = {
            "task": self.task.to_json(),
            "settings": settings.stored(),
            "llm": dict(self.llm),
            "encoder": encoder_config(encoder),
            "population": asdict(self.population),
            "scorers": {name: scorer.config() for name, scorer in scorers.items()},
            "trained_on": list(self.trained_on),
            "without_records": [user for user, its in self.records.items() if not its],
            "report": self.report,
        }
        tensors = {
            f"{name}.{key}": value.contiguous()
            for name, scorer in scorers.items()
            for key, value in scorer.tensors().items()
        }
        files = BundleFiles(
            config, tensors, self.records, self.card(), encoder if settings.tune_encoder else None
        )
        self.versions[folder.resolve()] = write_bundle(
            folder, files, replaces=self.versions.get(folder.resolve())
        )
        return folder

    @classmethod
    def load(
        cls, folder: Path | str, *, cache: Path | None = None, here: Settings | None = None
    ) -> "Bundle":
        """Read a bundle. `here` tells what a bundle does not carry (`LOCAL`); by default
        environment and file do.

        Raises:
            BundleError: not there, damaged, of a newer format, or its encoder is not what it was
                learned with. SettingsError: the environment or the settings file is at fault.
        """
        machine = (here or load_settings()).model_dump(include=set(LOCAL))
        files = read_bundle(Path(folder))
        config, encoder = files.config, encoder_of(files)
        try:
            settings = checked({**config["settings"], **machine})
            scorers = {
                name: _scorer(name, entry, files.tensors)
                for name, entry in config["scorers"].items()
            }
            population = CohortStats(
                **{
                    **config["population"],
                    "label_shares": tuple(config["population"]["label_shares"]),
                }
            )
            return cls(
                task=Task.from_json(config["task"], f"{folder}/config.json"),
                settings=settings,
                llm=config["llm"],
                store=FeatureCache(encoder, (cache or settings.cache) / "features.sqlite"),
                population=population,
                reranker=scorers.get("reranker"),
                adapter=scorers.get("adapter"),
                records=files.records | {user: [] for user in config.get("without_records", ())},
                trained_on=tuple(config["trained_on"]),
                report=config["report"],
                weights=config["files"]["weights.safetensors"]["sha256"],
                versions={Path(folder).resolve(): config["sha256"]},
            )
        except (KeyError, TypeError, RuntimeError, DataError, SettingsError) as error:
            raise BundleError(
                f"{folder}: config.json and the weights do not fit together"
                f" ({type(error).__name__}: {error})"
            ) from None

    def card(self) -> str:
        """The model card: what this is, what it was learned from, what it must not be used for."""
        heads = self.scorers
        lines = [
            f"# hydra-llm bundle for task {self.task.name}",
            "",
            f"- Kind: {self.task.kind}; labels: {', '.join(self.task.labels) or 'none'}",
            (
                f"- Learned from {len(self.trained_on)} training users; heads for"
                f" {len(self.records)} users, whose records it holds."
            ),
            (
                "- LLM that labelled the pairs:"
                f" {self.llm.get('model', self.llm.get('kind', 'unknown'))}"
            ),
            f"- Encoder: {self.store.encoder.name} (digest {self.store.encoder.digest[:12]})",
            *(
                f"- {name}: {s.interaction.kind} features, {s.bank.kind} head,"
                f" {s.bank.numbers_per_user} numbers a user"
                for name, s in heads.items()
            ),
            "",
            (
                "It holds personal records and parameters derived from them: handle it as its"
                " users' data. Scores are calibrated on held-out"
            ),
            "users of the training set only; users and tasks unlike those are out of its range.",
        ]
        return "\n".join(lines) + "\n"


def _scorer(name: str, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> Scorer:
    return Scorer.restore(
        config,
        {
            key.removeprefix(f"{name}."): t
            for key, t in tensors.items()
            if key.startswith(f"{name}.")
        },
    )


def _headless(scorer: Scorer | None) -> Scorer | None:
    """The scorer, all else shared with it, without the names of its users."""
    if scorer is None:
        return None
    stranger = copy(scorer)
    stranger.users, stranger.known, stranger.empty = {}, {}, []
    return stranger
