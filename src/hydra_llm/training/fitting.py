"""Users' heads, a block of users at a time: what an engine does of `Work.fit_users`."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from time import perf_counter

from hydra_llm.bundle import Bundle
from hydra_llm.llm.base import ChatLLM
from hydra_llm.llm.concurrency import StageProgress
from hydra_llm.llm.none import NoLLM
from hydra_llm.pipeline import UserPipeline
from hydra_llm.rerank import record_text
from hydra_llm.side_features import Featurizer
from hydra_llm.training.convex import UserHeads
from hydra_llm.training.dataset import LabelledGroup
from hydra_llm.training.encode import encode_histories
from hydra_llm.training.labelling import (
    choice_groups,
    offers_all,
    weak_adapter_groups,
    weak_reranker_groups,
)
from hydra_llm.training.train_scorer import head_data, silent, solve_heads
from hydra_llm.types import Record

RERANKER, ADAPTER = "reranker", "adapter"
BLOCK_RECORDS = 10_000  # about how many are labelled and fitted at once: 400 MB of features


@dataclass(frozen=True)
class Block:
    """Some users."""

    users: Sequence[str]
    records: Mapping[str, Sequence[Record]]  # theirs
    asked: Sequence[LabelledGroup] = ()  # what the LLM labelled of them, of one scorer


@dataclass(frozen=True)
class Fitting:
    """What the blocks share."""

    bundle: Bundle
    names: Sequence[str]  # of the scorers whose heads are fitted
    encodes: bool = True  # whether texts are encoded ahead, with progress
    progress: StageProgress = silent

    def elsewhere(self) -> "Fitting":
        """The same for another process, which has no other user's data and no screen."""
        settings = self.bundle.settings.model_copy(update={"engine": "local"})
        bundle = replace(self.bundle, settings=settings, records={}, heads={})
        return replace(self, bundle=bundle, progress=silent)


@dataclass
class Fitted:
    """Heads by scorer and user; seconds by scorer, of all and of the convex problems alone."""

    users: Sequence[str]
    heads: dict[str, UserHeads] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    solved: dict[str, float] = field(default_factory=dict)


def fit_block(fitting: Fitting, block: Block) -> Fitted:
    """The heads of the users of a block, on weak labels where there are some."""
    bundle, fitted = replace(fitting.bundle, records=block.records), Fitted(block.users)
    every = list(chain.from_iterable(block.records.values()))
    if fitting.encodes:
        encode_histories(bundle, every, fitting.progress, ranks=bundle.reranker is not None)
    for name in fitting.names:
        plain = plain_pipeline(bundle, NoLLM(), name)
        groups = weak_groups(name, plain, bundle.featurizer, block.users)
        started = perf_counter()
        labelled, encoded = head_data(bundle, name, [*groups, *block.asked]), perf_counter()
        fitted.heads[name] = solve_heads(bundle, name, labelled, block.users)
        fitted.solved[name] = perf_counter() - encoded
        fitted.seconds[name] = perf_counter() - started
        if name == RERANKER:
            encode_ranked(bundle, every)
    return fitted


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


def plain_pipeline(bundle: Bundle, llm: ChatLLM, name: str) -> UserPipeline:
    """The pipeline without the scorer that is to be learned or fitted."""
    rerank = name == ADAPTER and bundle.settings.label_order != "retriever"
    return bundle.personalizer(llm, rerank=rerank, adapt=name == RERANKER)


def encode_ranked(bundle: Bundle, records: Iterable[Record]) -> None:
    """Encode what the reranker reads of records: else a user's first question waits for it."""
    if not bundle.scorers[RERANKER].interaction.reads_pairs:
        with_answer = bundle.settings.record_answer
        bundle.features.texts([record_text(own, with_answer=with_answer) for own in records])


def asks_llm(bundle: Bundle, name: str) -> bool:
    """Whether heads of this scorer are fitted to what the LLM does, beside recorded choices."""
    of_llm = bundle.settings.reranker_labels == "llm"
    if name == RERANKER:
        return of_llm
    by_words = bundle.word_model is not None and bundle.settings.fit_labels == "history"
    return not offers_all(bundle.task, bundle.settings) and (of_llm or not by_words)


def weak_groups(
    name: str, plain: UserPipeline, featurizer: Featurizer, users: Sequence[str], since: int = 0
) -> list[LabelledGroup]:
    """The groups that histories give without an LLM: not for a reranker that learns as published;
    for an adapter that does not learn from every label, recorded choices alone. `since`: without
    those of so many records of each user, the oldest.
    """
    if name == RERANKER and plain.settings.reranker_labels == "llm":
        return []
    if name == RERANKER:
        made = (weak_reranker_groups(plain, featurizer, user, since) for user in users)
    else:
        # In private mode no sample of the LLM says what else the user could have answered.
        private = plain.settings.private and bool(plain.task.labels)
        every = private or offers_all(plain.task, plain.settings)
        of_records = weak_adapter_groups if every else choice_groups
        made = (of_records(featurizer, plain.records[user], since) for user in users)
    return list(chain.from_iterable(made))
