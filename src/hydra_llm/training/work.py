"""What learning and fitting do, stage by stage: word model, labels, reranker, adapter, gate.

`api.py` opens what they need and says who is learned from.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from hydra_llm.training.adaptive import Label, Rounds, in_turns, judge_by_refit, judge_by_votes
from hydra_llm.training.choosing import choose_sampling, chosen_over, judged, some_of_each
from hydra_llm.training.dataset import LabelledGroup
from hydra_llm.training.encode import encode_histories
from hydra_llm.training.gate import fit_gate
from hydra_llm.training.labelling import (
    Asked,
    Collected,
    adapter_groups,
    asks_of_records,
    made_once,
    offers_all,
    reads_labels,
    reranker_groups,
    training_queries,
    unasked_groups,
    weak_groups,
)
from hydra_llm.training.learned import Learned
from hydra_llm.training.refit import KeptFit, New, continued, places_of, solve
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
from hydra_llm.types import Overlaid, Query, Record, StageCost

RERANKER, ADAPTER = "reranker", "adapter"
ADAPTER_LABELS = "labelling"  # the report's entry on adaptive labelling
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
BLOCK_RECORDS = 10_000  # about how many are labelled and fitted at once: 400 MB of features


@dataclass(frozen=True)
class Work:
    """Learning or fitting: its result so far, the LLM, and where progress is reported."""

    learned: Learned
    llm: ChatLLM
    progress: StageProgress
    out: Path | str | None = None  # the bundle's folder, beside which checkpoints lie
    strengths: Strengths = Strengths()
    asked: Asked | None = None  # of training users; new users are asked about their latest records
    kept: Mapping[str, KeptFit] | None = None  # of earlier fits by user, which go on; None: nothing

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
        picking = await self.labelled_data(ADAPTER, first)
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

    async def labelled_data(self, name: str, first: Bundle | None = None) -> LabelledData | None:
        """What a scorer is trained on; None where no candidate is better than another."""
        learned, bundle, users = self.learned, self.learned.bundle, self.learned.users
        plain = self.plain(name)
        side_names = getattr(bundle.featurizer, f"{name}_names")
        by_label = name == ADAPTER and reads_labels(bundle.task, bundle.settings)

        def data_of(collected: Collected) -> LabelledData:
            def made(featurizer: Featurizer) -> list[LabelledGroup]:
                weak = weak_groups(name, plain, featurizer, users)
                return [*collected.groups(featurizer), *weak]

            return LabelledData(
                name, made_once(made), side_names, target_rule(bundle, name), by_label
            )

        data, most = data_of(Collected(lambda featurizer: [])), bundle.settings.labelled_users
        if name == ADAPTER and bundle.settings.labelling == "adaptive" and not is_none(self.llm):
            data = await self.adaptively(plain, data_of, first)
        elif name == ADAPTER or asks_of_records(bundle.settings):
            data = data_of(await self.collect(name, plain, users[:most]))
        if not any(len(set(group.gains)) > 1 for group in data.groups(bundle.featurizer)):
            learned.report(**{name: {"skipped": SKIPPED[name]}})
            learned.notes.append(f"no {name} was learned: {SKIPPED[name]}")
            return None
        return data

    async def adaptively(
        self,
        plain: UserPipeline,
        data_of: Callable[[Collected], LabelledData],
        first: Bundle | None,
    ) -> LabelledData:
        """The adapter's data with as many labels of the LLM as help, or those of `first`."""
        learned, bundle, asked = self.learned, self.learned.bundle, self.asked
        assert asked is not None  # of training users
        users, strengths = learned.users[: bundle.settings.labelled_users], None
        if first is not None and ADAPTER_LABELS in first.report:
            known = first.report[ADAPTER_LABELS]
            queries = in_turns(asked.all, bundle.settings.seed)[: known["queries"]]
            learned.report(**{ADAPTER_LABELS: known})
            return data_of(await self.collect(ADAPTER, plain, users, queries=queries))
        if offers_all(bundle.task, bundle.settings):
            pipeline = replace(plain, records=asked.records)
            unasked = Collected(lambda made: unasked_groups(pipeline, made, asked.all))
            judge, strengths = judge_by_votes(
                bundle, data_of(unasked), self.strengths, self.progress
            )
        else:
            judge = judge_by_refit(bundle, data_of, self.strengths)
        rounds = Rounds(judge, bundle.settings.seed)
        collected = await self.collect(ADAPTER, plain, users, rounds=rounds)
        learned.report(**{ADAPTER_LABELS: rounds.report})
        learned.notes.append(str(rounds))
        return replace(data_of(collected), strengths=strengths)

    def plain(self, name: str) -> UserPipeline:
        """The pipeline without the scorer that is to be learned or fitted."""
        bundle, adapt = self.learned.bundle, name == RERANKER
        rerank = name == ADAPTER and bundle.settings.label_order != "retriever"
        return bundle.personalizer(self.llm, rerank=rerank, adapt=adapt)

    async def collect(
        self,
        name: str,
        plain: UserPipeline,
        users: Sequence[str],
        *,
        rounds: Rounds | None = None,
        queries: Sequence[Query] | None = None,
    ) -> Collected:
        """Let the LLM label what it is asked about training users, or new users' latest records;
        `queries`: some of them.
        """
        learned, stage = self.learned, STAGES[name]
        if is_none(self.llm):
            return Collected(lambda featurizer: [])
        if self.asked is not None:
            queries = self.asked.all if queries is None else queries
            plain = replace(plain, records=self.asked.records)
        elif queries is None:
            queries = self.latest(plain, users)
        label: Label = reranker_groups if name == RERANKER else adapter_groups
        if rounds is not None:
            label = partial(rounds.label, label)
        collected = await label(plain, queries, partial(self.progress, stage))
        learned.failures += collected.failures
        learned.stages[stage] = StageCost(len(users), collected.usage.seconds, collected.usage)
        if collected.notes:
            count = f"{len(collected.notes)} notes on {collected.calls} questions"
            learned.notes.append(f"{stage}: {count}, the first: {collected.notes[0]}")
        if collected.failures and len(collected.failures) == collected.calls:
            raise LLMError(f"every call failed, the first with: {collected.failures[0]}")
        return collected

    def latest(self, plain: UserPipeline, users: Sequence[str]) -> list[Query]:
        """The queries of which new users' records are labelled."""
        most = plain.settings.queries_per_user
        return list(chain(*(training_queries(plain.task, plain.records[u], most) for u in users)))

    def train(self, data: LabelledData | None, *, tune: bool = False) -> None:
        """Train a scorer; held-out users decide whether a reranker is used."""
        if data is None:
            return
        learned, started = self.learned, perf_counter()
        checkpoint = None if self.out is None else Path(f"{self.out}.{data.name}.checkpoint")
        strengths = data.strengths or self.strengths
        bundle = train_scorer(learned.bundle, data, tune, checkpoint, self.progress, strengths)
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
        """The users' heads of each scorer, on weak labels where there are some."""
        await self.fit_users(self.learned.users)

    async def fit_users(
        self, users: Sequence[str], stage: str = "", done: Callable[[], None] = lambda: None
    ) -> None:
        """The heads of these users, block by block. `stage`: of the progress; `done` is called
        after each block.
        """
        bundle, fitted = self.learned.bundle, 0
        asks = {
            name: self.asks_to_fit(name) for name in (RERANKER, ADAPTER) if name in bundle.scorers
        }
        # With an LLM all at once: its calls take longer than all else, and are told together.
        at_once = not users or (any(asks.values()) and not is_none(self.llm))
        parts = [users] if at_once else blocks(users, bundle.records)
        for block in parts if self.kept is None else [[user] for user in users]:
            every = list(chain.from_iterable(bundle.records[user] for user in block))
            encode_histories(bundle, every, self.progress, ranks=bundle.reranker is not None)
            fitted += len(block)
            for name in asks:
                await self._fit(name, block, asks=asks[name])
                self.progress(stage or f"fit {name}", fitted, len(users))
            done()

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
        missing = [user for user in users if user not in done]
        others = replace(self, llm=NoLLM())
        checkpoint.write(learned)
        done_now = partial(checkpoint.write_now_and_then, learned)
        if missing:
            await others.fit_users(missing, "fit heads", done_now)
        learned.users = tuple(users)

    async def _fit(self, name: str, users: Sequence[str], *, asks: bool) -> None:
        learned, stage = self.learned, f"fit {name}"
        bundle, plain = learned.bundle, self.plain(name)
        before = continued(self.kept, bundle, name, users)
        made = partial(weak_groups, name, plain, bundle.featurizer, users)
        weak, of_llm = made(len(before.records) if before else 0), list[LabelledGroup]()
        queries = self.latest(plain, users) if asks else []
        if asks:
            unasked = before.unasked(queries) if before else queries
            collected = await self.collect(name, plain, users, queries=unasked)
            of_llm = collected.groups(bundle.featurizer)
        started = perf_counter()
        labelled, encoded = head_data(bundle, name, [*weak, *of_llm]), perf_counter()
        if self.kept is None:
            heads = solve_heads(bundle, name, labelled, users)
        else:
            wanted, places = {query.id for query in queries}, places_of(weak, of_llm)
            head, kept = solve(bundle, name, New(users[0], labelled, places), before, wanted)
            heads = {users[0]: head}
            if kept is not None:
                learned.kept.setdefault(users[0], {})[name] = kept
        ended, spent = perf_counter(), learned.stages.get(stage, StageCost(0, 0.0))
        learned.solved[stage] = learned.solved.get(stage, 0.0) + ended - encoded
        own = Overlaid(heads, bundle.heads.get(name, {}))
        learned.bundle = replace(bundle, heads={**bundle.heads, name: own})
        seconds = spent.seconds + ended - started
        learned.stages[stage] = StageCost(spent.users + len(users), seconds, spent.usage)
        # Encode what the reranker reads of these users: else their first question waits for it.
        if name == RERANKER and not bundle.scorers[name].interaction.reads_pairs:
            with_answer = bundle.settings.record_answer
            records = chain(*(bundle.records[user] for user in users))
            texts = [record_text(record, with_answer=with_answer) for record in records]
            bundle.features.texts(texts)

    def asks_to_fit(self, name: str) -> bool:
        """Whether heads of this scorer are fitted to what the LLM does, beside recorded choices."""
        bundle, of_llm = self.learned.bundle, self.learned.bundle.settings.reranker_labels == "llm"
        if name == RERANKER:
            return of_llm
        by_words = bundle.word_model is not None and bundle.settings.fit_labels == "history"
        return not offers_all(bundle.task, bundle.settings) and (of_llm or not by_words)


def blocks(
    users: Sequence[str], records: Mapping[str, Sequence[Record]], most: int = BLOCK_RECORDS
) -> Iterator[list[str]]:
    """The users in order, as many at once as have about `most` records: what is made of them fits
    into memory, however many there are.
    """
    block, count = list[str](), 0
    for user in users:
        block, count = [*block, user], count + len(records.get(user, ()))
        if count >= most:
            yield block
            block, count = [], 0
    if block:
        yield block
