"""What learning and fitting do, stage by stage: word model, labels, reranker, adapter, gate.

`api.py` opens what they need and says who is learned from.
"""

from collections.abc import Callable, Mapping, Sequence
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
from hydra_llm.side_features import Featurizer
from hydra_llm.training.adaptive import Label, Rounds, in_turns, judge_by_refit, judge_by_votes
from hydra_llm.training.choosing import choose_sampling, chosen_over, judged, some_of_each
from hydra_llm.training.dataset import LabelledGroup
from hydra_llm.training.encode import encode_histories
from hydra_llm.training.engine import open_engine
from hydra_llm.training.fitting import (
    ADAPTER,
    RERANKER,
    Block,
    Fitting,
    asks_llm,
    blocks,
    encode_ranked,
    fit_block,
    plain_pipeline,
    weak_groups,
)
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
)
from hydra_llm.training.learned import Learned
from hydra_llm.training.refit import Groups, KeptFit, continued, refit
from hydra_llm.training.resume import SampleCheckpoint
from hydra_llm.training.strengths import Strengths
from hydra_llm.training.train_scorer import LabelledData, target_rule, train_scorer
from hydra_llm.training.word_model import TOO_FEW, WordModels, learn_word_model
from hydra_llm.types import Query, StageCost

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
        elif settings.learns_reranker:
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
        return plain_pipeline(self.learned.bundle, self.llm, name)

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
        bundle = self.learned.bundle
        asks = {
            name: asks_llm(bundle, name) for name in (RERANKER, ADAPTER) if name in bundle.scorers
        }
        ranks = bundle.reranker is not None
        if self.kept is not None:
            for place, user in enumerate(users, 1):
                encode_histories(bundle, bundle.records[user], self.progress, ranks=ranks)
                for name, is_asked in asks.items():
                    await self._go_on(name, user, asks=is_asked)
                    self.progress(stage or f"fit {name}", place, len(users))
                done()
            return
        # With an LLM all at once: its calls take longer than all else, and are told together.
        if users and not (any(asks.values()) and not is_none(self.llm)):
            self._fit(Fitting(bundle, list(asks), progress=self.progress), users, stage, done)
            return
        every = list(chain.from_iterable(bundle.records[user] for user in users))
        encode_histories(bundle, every, self.progress, ranks=ranks)
        for name, is_asked in asks.items():
            bundle, asked = self.learned.bundle, list[LabelledGroup]()
            if is_asked:
                collected = await self.collect(name, self.plain(name), users)
                asked = collected.groups(bundle.featurizer)
            fitting = Fitting(bundle, [name], encodes=False, progress=self.progress)
            self._fit(fitting, users, stage, done, asked=asked, at_once=True)

    def _fit(
        self,
        fitting: Fitting,
        users: Sequence[str],
        stage: str,
        done: Callable[[], None],
        *,
        asked: Sequence[LabelledGroup] = (),
        at_once: bool = False,
    ) -> None:
        """Heads by the engine; `asked` is what the LLM labelled, `at_once` of users in memory."""
        learned, fitted, records = self.learned, 0, fitting.bundle.records
        engine, own = open_engine(fitting.bundle.settings.engine), dict[str, list[LabelledGroup]]()
        for group in asked:
            own.setdefault(group.user, []).append(group)
        whole = at_once and not (engine.spreads and users)
        parts = (
            Block(
                block,
                {user: records[user] for user in block},
                list(chain.from_iterable(own.get(user, ()) for user in block)),
            )
            for block in ([users] if whole else blocks(users, records))
        )
        shared = fitting.elsewhere() if engine.spreads else fitting
        for block in engine.each(fit_block, shared, parts):
            fitted += len(block.users)
            for name, heads in block.heads.items():
                learned.add_heads(name, heads, block.seconds[name], block.solved[name])
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

    async def _go_on(self, name: str, user: str, *, asks: bool) -> None:
        """The head of one user, from what is kept of the fit before."""
        learned, bundle = self.learned, self.learned.bundle
        plain, before = self.plain(name), continued(self.kept, bundle, name, [user])
        since, of_llm = len(before.records) if before else 0, list[LabelledGroup]()
        weak = weak_groups(name, plain, bundle.featurizer, [user], since)
        queries = self.latest(plain, [user]) if asks else []
        if asks:
            unasked = before.unasked(queries) if before else queries
            collected = await self.collect(name, plain, [user], queries=unasked)
            of_llm = collected.groups(bundle.featurizer)
        refit(learned, name, Groups(user, weak, of_llm, queries), before)
        if name == RERANKER:
            encode_ranked(bundle, bundle.records[user])
