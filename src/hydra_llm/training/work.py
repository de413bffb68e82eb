"""What learning and fitting do, stage by stage: word model, labels, reranker, adapter, gate.

`api.py` opens what they need and says who is learned from.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from time import perf_counter

from hydra_llm.bundle import Bundle
from hydra_llm.errors import LLMError
from hydra_llm.llm.base import ChatLLM
from hydra_llm.llm.concurrency import StageProgress
from hydra_llm.llm.none import NoLLM, is_none
from hydra_llm.model.upgrade import reranker_helps
from hydra_llm.pipeline import UserPipeline
from hydra_llm.rerank import record_text
from hydra_llm.side_features import Featurizer
from hydra_llm.training.choosing import choose_sampling, chosen_over, judged, some_of_each
from hydra_llm.training.dataset import LabelledGroup
from hydra_llm.training.encode import encode_histories
from hydra_llm.training.gate import fit_gate
from hydra_llm.training.labelling import (
    Asked,
    Collected,
    adapter_groups,
    asks_of_records,
    choice_groups,
    offers_all,
    reads_labels,
    reranker_groups,
    training_queries,
    weak_adapter_groups,
    weak_reranker_groups,
)
from hydra_llm.training.learned import Learned
from hydra_llm.training.resume import SampleCheckpoint
from hydra_llm.training.strengths import Strengths
from hydra_llm.training.train_scorer import (
    LabelledData,
    head_data,
    solve_heads,
    target_rule,
    train_scorer,
)
from hydra_llm.training.word_model import TOO_FEW, WordModels, learn_word_model
from hydra_llm.types import Overlaid, StageCost

CHUNK_USERS = 500  # whose heads are fitted at once: bounds memory
RERANKER, ADAPTER = "reranker", "adapter"
STAGES = {RERANKER: "label records", ADAPTER: "label candidates"}
WORD_STAGE, CHOICE_STAGE = "fit word model", "choose sampling"
SKIPPED = {  # why none is learned where all gains are equal
    RERANKER: "no retrieved record changed what the LLM's answer was worth",
    ADAPTER: "no two candidates of a query differed in what they were worth",
}
ERRORS = {  # of the report, told where a sample was learned from
    "prior_error": "the prior's covariance (relative)",
    "loss_user_error": "the held-out loss",
}
NO_LLM = "no LLM was given"


@dataclass(frozen=True)
class Work:
    """Learning or fitting: its result so far, the LLM, and where progress is reported."""

    learned: Learned
    llm: ChatLLM
    progress: StageProgress
    out: Path | str | None = None  # the bundle's folder, beside which checkpoints lie
    strengths: Strengths = Strengths()
    asked: Asked | None = None  # of training users; new users are asked about their latest records

    async def learn(self, first: Bundle | None) -> None:
        """The reranker, or that of `first`; then the adapter."""
        learned, settings = self.learned, self.learned.bundle.settings
        self.fit_words(first)
        ranking: LabelledData | None = None
        if first is not None:
            scorers = {name: own for name, own in first.scorers.items() if name == RERANKER}
            heads = {name: own for name, own in first.heads.items() if name == RERANKER}
            bundle = replace(learned.bundle, scorers=scorers, heads=heads)
            learned.bundle = replace(bundle, use_reranker=first.use_reranker)
            learned.report(reranker=first.report.get(RERANKER, {}))
        elif is_none(self.llm):
            learned.report(reranker={"skipped": NO_LLM})
        elif settings.retrieved > 0 and settings.rerank != "never":
            ranking = await self.labelled_data(RERANKER)
            self.train(ranking, tune=settings.tune_encoder)
        await self.choose(first)
        picking = await self.labelled_data(ADAPTER)
        self.train(picking, tune=settings.tune_encoder)
        if settings.tune_encoder and picking is not None:
            self.train(ranking)  # the encoder has moved under the reranker
        self.fit_gate()

    async def choose(self, first: Bundle | None) -> None:
        """k, temperature and number of samples, by training users or as those of `first`."""
        learned, bundle, asked = self.learned, self.learned.bundle, self.asked
        if bundle.settings.choose != "auto" or is_none(self.llm) or asked is None:
            return
        if first is not None:
            settings = chosen_over(bundle.settings, first.settings)
            learned.bundle = replace(bundle, settings=settings, learned_with=settings)
            learned.report(chosen=first.report.get("chosen", {}))
            return
        queries = some_of_each(asked.all)
        plain = judged(replace(self.plain(ADAPTER), records=asked.records), bundle)
        choice = await choose_sampling(plain, queries, partial(self.progress, CHOICE_STAGE))
        settings = choice.settings
        learned.bundle = replace(bundle, settings=settings, learned_with=settings)
        learned.report(chosen=choice.to_json())
        users = len({query.user for query in queries})
        learned.stages[CHOICE_STAGE] = StageCost(users, choice.usage.seconds, choice.usage)
        learned.notes.append(f"chosen by training users: {choice}")

    def fit_words(self, first: Bundle | None) -> None:
        """Learn the word model of free texts, or take that of `first`."""
        learned, started = self.learned, perf_counter()
        bundle = learned.bundle
        if bundle.task.labels or not bundle.settings.word_model:
            return
        models: WordModels | None = None
        if first is not None and first.word_model and first.word_models:
            models = WordModels(first.word_model, first.word_models)
        else:
            self.progress(WORD_STAGE, 0, 1)
            models = learn_word_model(bundle.records, bundle.settings.seed)
            self.progress(WORD_STAGE, 1, 1)
        if models is None:
            learned.notes.append(f"no word model was learned: {TOO_FEW}")
            return
        learned.bundle = replace(bundle, word_model=models.model, word_models=models.without)
        learned.stages[WORD_STAGE] = StageCost(len(learned.users), perf_counter() - started)

    def fit_gate(self) -> None:
        """Fit the gate, with the encoder and reranker as they are now."""
        learned, started = self.learned, perf_counter()
        self.progress("fit gate", 0, 1)
        gate, report = fit_gate(learned.bundle)
        self.progress("fit gate", 1, 1)
        learned.bundle = replace(learned.bundle, gate=gate)
        learned.report(gate=report)
        learned.stages["fit gate"] = StageCost(len(learned.users), perf_counter() - started)

    async def labelled_data(self, name: str) -> LabelledData | None:
        """What a scorer is trained on; None where no candidate is better than another."""
        learned, bundle, users = self.learned, self.learned.bundle, self.learned.users
        plain = self.plain(name)
        collected = Collected(lambda featurizer: [])
        if name == ADAPTER or asks_of_records(bundle.settings):
            collected = await self.collect(name, plain, users[: bundle.settings.labelled_users])

        def made(featurizer: Featurizer) -> list[LabelledGroup]:
            return [*collected.groups(featurizer), *_weak_groups(name, plain, featurizer, users)]

        first = made(known := bundle.featurizer)

        def groups(featurizer: Featurizer) -> list[LabelledGroup]:
            return first if featurizer is known else made(featurizer)

        if not any(len(set(group.gains)) > 1 for group in first):
            learned.report(**{name: {"skipped": SKIPPED[name]}})
            learned.notes.append(f"no {name} was learned: {SKIPPED[name]}")
            return None
        side_names = getattr(bundle.featurizer, f"{name}_names")
        by_label = name == ADAPTER and reads_labels(bundle.task, bundle.settings)
        return LabelledData(name, groups, side_names, target_rule(bundle, name), by_label)

    def plain(self, name: str) -> UserPipeline:
        """The pipeline without the scorer that is to be learned or fitted."""
        bundle, adapt = self.learned.bundle, name == RERANKER
        rerank = name == ADAPTER and bundle.settings.label_order != "retriever"
        return bundle.personalizer(self.llm, rerank=rerank, adapt=adapt)

    async def collect(self, name: str, plain: UserPipeline, users: Sequence[str]) -> Collected:
        """Let the LLM label what it is asked about training users, or new users' latest records."""
        learned, stage, most = self.learned, STAGES[name], plain.settings.queries_per_user
        if is_none(self.llm):
            return Collected(lambda featurizer: [])
        latest = (training_queries(plain.task, plain.records[user], most) for user in users)
        queries, label = list(chain(*latest)), adapter_groups
        if self.asked is not None:
            queries, plain = self.asked.all, replace(plain, records=self.asked.records)
        if name == RERANKER:
            label = reranker_groups
        collected = await label(plain, queries, partial(self.progress, stage))
        learned.failures += collected.failures
        learned.stages[stage] = StageCost(len(users), collected.usage.seconds, collected.usage)
        if collected.notes:
            count = f"{len(collected.notes)} notes on {collected.calls} questions"
            learned.notes.append(f"{stage}: {count}, the first: {collected.notes[0]}")
        if collected.failures and len(collected.failures) == collected.calls:
            raise LLMError(f"every call failed, the first with: {collected.failures[0]}")
        return collected

    def train(self, data: LabelledData | None, *, tune: bool = False) -> None:
        """Train a scorer; held-out users decide whether a reranker is used."""
        if data is None:
            return
        learned, started = self.learned, perf_counter()
        checkpoint = None if self.out is None else Path(f"{self.out}.{data.name}.checkpoint")
        bundle = train_scorer(learned.bundle, data, tune, checkpoint, self.progress, self.strengths)
        learned.stages[f"fit {data.name}"] = StageCost(len(learned.users), perf_counter() - started)
        prior = bundle.report[data.name].get("prior", "")
        if prior and prior != "learned":
            none, _, why = prior.partition(" ")
            shared = f"all users share the {data.name}'s head {why}"
            other = f"the prior of the {data.name}'s heads is {prior}"
            learned.notes.append(shared if none == "none" else other)
        if data.name == RERANKER:
            if not asks_of_records(bundle.settings):
                checked = {**bundle.report[RERANKER], "checked_by": "history"}
                bundle = replace(bundle, report={**bundle.report, RERANKER: checked})
            helps = reranker_helps(bundle.report)
            if bundle.use_reranker and not helps:
                reason = "on held-out users the reranker's first records were worth less"
                learned.notes.append(f"the retriever's order is kept: {reason}")
            bundle = replace(bundle, use_reranker=helps)
        learned.bundle = bundle

    async def fit(self) -> None:
        """The users' heads of each scorer, on weak labels where there are some; where no LLM is
        asked, so many users at a time as memory allows.
        """
        users = self.learned.users
        size = CHUNK_USERS if is_none(self.llm) else max(1, len(users))
        for start in range(0, max(1, len(users)), size):
            await self._fit(users[start : start + size])
            if size < len(users):
                self.progress("fit heads", min(start + size, len(users)), len(users))

    async def learn_from(
        self, users: Sequence[str], first: Bundle | None
    ) -> SampleCheckpoint | None:
        """Learn from those on whom the blank bundle rests, then fit the others' heads; where there
        are others, a checkpoint, to be removed when the bundle is written.
        """
        learned = self.learned
        if len(learned.users) == len(users):
            await self.learn(first)
            return None
        checkpoint = SampleCheckpoint.of(learned, self.out)
        if not checkpoint.resume(learned):
            await self.learn(first)
        drawn, report = len(learned.bundle.trained_on), learned.bundle.report.get(ADAPTER, {})
        note = f"what all users share was learned from {drawn} of {len(users)} users, drawn by lot"
        for name, what in ERRORS.items():
            if (error := report.get(name)) is not None:
                note += f"; standard error of {what} {error:.2g}"
        learned.notes.append(note)
        learned.report(base_users=drawn)
        await self.fit_others(users, checkpoint)
        return checkpoint

    async def fit_others(self, users: Sequence[str], checkpoint: SampleCheckpoint) -> None:
        """The heads of those among these users from whom nothing shared was learned, by their
        histories alone: the LLM is not asked. Goes on where the checkpoint ends.
        """
        learned = self.learned
        done = set(learned.bundle.trained_on).union(*learned.bundle.heads.values())
        missing, others = [user for user in users if user not in done], replace(self, llm=NoLLM())
        checkpoint.write(learned)
        for start in range(0, len(missing), CHUNK_USERS):
            chunk = missing[start : start + CHUNK_USERS]
            await others._fit(chunk)
            checkpoint.write_now_and_then(learned)
            self.progress("fit heads", len(users) - len(missing) + start + len(chunk), len(users))
        learned.users = tuple(users)

    async def _fit(self, users: Sequence[str]) -> None:
        learned, given = self.learned, self.learned.bundle
        every = list(chain.from_iterable(given.records[user] for user in users))
        encode_histories(given, every, self.progress, ranks=given.reranker is not None)
        for name in (name for name in (RERANKER, ADAPTER) if name in learned.bundle.scorers):
            plain, bundle = self.plain(name), learned.bundle
            groups, of_llm = _weak_groups(name, plain, bundle.featurizer, users), name == ADAPTER
            of_choices = all(group.exact for group in groups)  # records need the LLM beside them
            if bundle.word_model and bundle.settings.fit_labels == "history":
                of_llm = False
            if of_choices and (of_llm or bundle.settings.reranker_labels == "llm"):
                collected = await self.collect(name, plain, users)
                groups += collected.groups(bundle.featurizer)
            started = perf_counter()
            labelled = head_data(bundle, name, groups)
            encoded = perf_counter()
            heads = solve_heads(bundle, name, labelled, users)
            stage, ended = f"fit {name}", perf_counter()
            learned.solved[stage] = learned.solved.get(stage, 0.0) + ended - encoded
            own = Overlaid(heads, bundle.heads.get(name, {}))
            learned.bundle = replace(bundle, heads={**bundle.heads, name: own})
            before = learned.stages.get(stage, StageCost(0, 0.0))
            seconds = before.seconds + ended - started
            learned.stages[stage] = StageCost(before.users + len(users), seconds)
        bundle = learned.bundle
        # Encode what the reranker reads of these users: else their first question waits for it.
        if bundle.reranker is not None and not bundle.reranker.interaction.reads_pairs:
            records = chain(*(bundle.records[user] for user in users))
            with_answer = bundle.settings.record_answer
            bundle.features.texts(
                [record_text(record, with_answer=with_answer) for record in records]
            )


def _weak_groups(
    name: str, plain: UserPipeline, featurizer: Featurizer, users: Sequence[str]
) -> list[LabelledGroup]:
    """The groups that histories give without an LLM: not for a reranker that learns as published;
    for an adapter that does not learn from every label, recorded choices alone.
    """
    if name == RERANKER and plain.settings.reranker_labels != "llm":
        return [group for user in users for group in weak_reranker_groups(plain, featurizer, user)]
    if name == ADAPTER and offers_all(plain.task, plain.settings):
        records = (plain.records[user] for user in users)
        return [group for own in records for group in weak_adapter_groups(featurizer, own)]
    if name == ADAPTER:
        return [group for user in users for group in choice_groups(featurizer, plain.records[user])]
    return []
