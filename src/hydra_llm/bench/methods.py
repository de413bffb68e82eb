"""The built-in methods: HYDRA, its parts, and what it is compared with.

`oracle`, `random`, `self-consistency` and `mbr` choose among HYDRA's own candidates; what calls no
LLM is a control. Sources: HYDRA (arXiv 2406.02888), sections 4.1 and 4.2; LaMP (arXiv 2304.11406).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from time import perf_counter
from typing import Any

import anyio

from hydra_llm.bench.bbox import BBoxAdapter
from hydra_llm.bench.choices import by_lot
from hydra_llm.bench.method import Answerer, Method, Parts, method
from hydra_llm.context import Context
from hydra_llm.llm.base import Sampling
from hydra_llm.llm.masked import masked
from hydra_llm.pipeline import UserPipeline, answer_text
from hydra_llm.plugins import PROMPTS
from hydra_llm.retrieve import Nothing, make_retriever
from hydra_llm.select import ByVotes, ByWords, Selection, Selector, all_labels
from hydra_llm.text import fold
from hydra_llm.types import Answer, Candidate, Message, Proposal, Query, Record, Usage

GREEDY: Mapping[str, Any] = {"samples": 1, "greedy_first": True}
"""Settings of a method that takes the LLM's temperature-0 answer alone."""


@method("prompt", source="HYDRA 4.1", uses=())
def zero_shot(parts: Parts) -> Answerer:
    """The LLM without any record."""
    return replace(parts.personalizer(**GREEDY, k=0), retriever=Nothing())


@method("prompt", takes=("k",), source="LaMP; HYDRA 4.1", uses=(), private=False)
def rag(parts: Parts) -> Answerer:
    """The retriever's first k records in the prompt."""
    return parts.personalizer(**GREEDY)


def _rag_with(name: str, what: str, source: str) -> Method:
    def build(parts: Parts) -> Answerer:
        embed, seed = parts.bundle.features.texts, parts.settings.seed
        chosen = make_retriever(PROMPTS[name], embed=embed, seed=seed)
        return replace(parts.personalizer(**GREEDY), retriever=chosen)

    fields: Any = {"takes": ("k",), "source": source, "uses": (), "private": False}
    return Method(name, what, "prompt", build, **fields)


icl_random = _rag_with("icl-random", "K random records in the prompt", "HYDRA 4.1")
recent = _rag_with("recent", "The k latest records in the prompt", "LaMP")
rag_dense = _rag_with("rag-dense", "The k nearest records by the encoder", "LaMP")


@method("prompt", takes=("k",), source="Richardson et al. 2023; HYDRA 4.1", uses=(), private=False)
def pag(parts: Parts) -> Answerer:
    """A profile written by the LLM, and k records."""
    return Profiled(parts.personalizer(**GREEDY))


PROFILE_RECORDS, PROFILE_TOKENS = 20, 96  # latest records that it is written from; its length
PROFILE = (
    "Below are earlier texts of one person, each with what this person answered.\n\n{records}\n\n"
    "In at most three sentences, say what is characteristic of this person's answers."
)


@dataclass(frozen=True)
class Profiled:
    """Puts a profile by the LLM, one per user and history, before the records."""

    inner: UserPipeline
    profiles: dict[tuple[str, int], str] = field(default_factory=dict)
    locks: dict[tuple[str, int], anyio.Lock] = field(default_factory=dict)

    async def aanswer(self, query: Query) -> Answer:
        context = self.inner.context_of(query)
        if not context.visible:
            return await self.inner.aanswer(context)
        key, usage = (query.user, len(context.visible)), Usage()
        async with self.locks.setdefault(key, anyio.Lock()):
            if key not in self.profiles:
                sampling = Sampling(max_tokens=PROFILE_TOKENS)
                llm = masked(self.inner.llm, self.inner.settings.mask)
                written = await llm.generate(self._question(context.visible), sampling)
                self.profiles[key], usage = answer_text(written.texts[0]).strip(), written.usage
        answer = await replace(self.inner, profile=self.profiles[key]).aanswer(context)
        total = answer.proposal.usage + usage
        return replace(answer, proposal=replace(answer.proposal, usage=total))

    def _question(self, visible: Sequence[Record]) -> list[Message]:
        """The latest records, each cut to its share of the prompt."""
        latest = visible[-PROFILE_RECORDS:]
        room = int(self.inner.settings.max_prompt_tokens * 3 / len(latest)) // 2
        lines = [f"{fold(record.input)[:room]} → {fold(record.output)[:room]}" for record in latest]
        return [{"role": "user", "content": PROFILE.replace("{records}", "\n".join(lines))}]


@method(
    "hydra",
    takes=("k",),
    source="HYDRA 4.2",
    uses=("reranker",),
    requires=("reranker",),
    private=False,
)
def hydra_reranker(parts: Parts) -> Answerer:
    """Reranked records, first answer."""
    return parts.with_settings(rerank="always").personalizer(rerank=True, **GREEDY)


@method(
    "hydra",
    takes=("b",),
    source="HYDRA 4.2",
    uses=("adapter",),
    requires=("adapter",),
    asks="votes",
)
def hydra_adapter(parts: Parts) -> Answerer:
    """Answers without records, the adapter picks."""
    return replace(parts.personalizer(adapt=True, k=0), retriever=Nothing(), beside=())


@method(
    "hydra", takes=("k", "b"), source="HYDRA 4.2", requires=("reranker", "adapter"), private=False
)
def hydra_published(parts: Parts) -> Answerer:
    """Reranker and adapter: sampled candidates at temperature 1, best score."""
    sampled = {"candidates": "sampled", "select": "best", "temperature": 1.0, "greedy_first": False}
    always = parts.with_settings(rerank="always")  # even if `hydra` keeps the retriever's order
    return replace(always.personalizer(rerank=True, adapt=True, **sampled), beside=())


def _adapted(parts: Parts) -> Answerer:
    """Of recorded choices: the adapter's pick."""
    return parts.personalizer(adapt=True)


def _adapted_alike(parts: Parts) -> Answerer:
    """Of recorded choices: the adapter's pick with the shared head."""
    return _adapted(replace(parts, bundle=parts.bundle.without_heads()))


@method("hydra", takes=("k", "b"), source="HYDRA 4.2; docs/method.md", picks=_adapted, asks="votes")
def hydra(parts: Parts) -> Answerer:
    """Reranker and adapter with this project's selection."""
    return parts.personalizer(rerank=True, adapt=True)


@method("control", takes=("k", "b"), source="docs/method.md", picks=_adapted_alike, asks="votes")
def hydra_shared(parts: Parts) -> Answerer:
    """Hydra with the shared heads for everybody."""
    return replace(parts, bundle=parts.bundle.without_heads()).personalizer(rerank=True, adapt=True)


@method("adapter", takes=("b",), source="Sun et al. 2024; HYDRA 4.1", private=False)
def bbox_adapter(parts: Parts) -> Answerer:
    """One energy for all users, adapted to each user in online rounds, picks."""
    return BBoxAdapter(parts)


Pick = Callable[[Parts, Query, Sequence[Candidate]], int]


@dataclass(frozen=True)
class Picking(Selector):
    """Picks by a function alone."""

    parts: Parts
    pick: Pick

    def choose(self, context: Context, candidates: Sequence[Candidate]) -> Selection:
        return Selection(list(candidates), self.pick(self.parts, context.query, candidates))


def among_samples(group: str, **fields: Any) -> Callable[[Pick], Method]:
    """Make a method of a function that picks one of hydra's samples, see `method`."""

    def make(pick: Pick) -> Method:
        @wraps(pick)
        def build(parts: Parts) -> Answerer:
            sampled = parts.with_settings(label_probabilities=False)
            return replace(sampled.personalizer(rerank=True), selector=Picking(parts, pick))

        return method(group, takes=("b",), uses=("reranker",), **fields)(build)

    return make


@among_samples("sampling", source="Wang et al. 2023")
def self_consistency(parts: Parts, query: Query, candidates: Sequence[Candidate]) -> int:
    """The most frequent answer among hydra's samples."""
    return ByVotes(parts.bundle.task, "best").pick(candidates)


@among_samples("sampling", source="Kumar and Byrne 2004")
def mbr(parts: Parts, query: Query, candidates: Sequence[Candidate]) -> int:
    """Minimum Bayes risk: the sample that is closest to the others."""
    return ByVotes(parts.bundle.task, "expected-gain").pick(candidates)


@among_samples("bound", per_sample=True, picks=by_lot)
def random(parts: Parts, query: Query, candidates: Sequence[Candidate]) -> int:
    """Expected score of a uniformly random sample of hydra's: the mean over all of them."""
    samples = [i for i, c in enumerate(candidates) for _ in range(c.votes)] or [0]
    return samples[parts.seed % len(samples)]


@among_samples("bound")
def oracle(parts: Parts, query: Query, candidates: Sequence[Candidate]) -> int:
    """The best of hydra's samples, by the gold answer; other candidates may be better."""
    gain, gold = parts.bundle.task.gain, query.gold or ""
    gains = [gain(c.answer, gold) if c.votes else -1.0 for c in candidates]
    return gains.index(max(gains))


@dataclass(frozen=True)
class WithoutLLM:
    """An answer from the user's visible records alone."""

    personalizer: UserPipeline
    answer: Callable[[Query, Sequence[Record]], str]

    async def aanswer(self, query: Query) -> Answer:
        started = perf_counter()
        context = self.personalizer.context_of(query)
        text = self.answer(query, context.visible)
        candidates, seconds = (Candidate(text, text),), {"retrieve": perf_counter() - started}
        proposal = Proposal(query, (), (), (), candidates, seconds=seconds)
        return Answer(text, proposal, candidates, 0)


@method("control", uses=(), asks="never")
def user_majority(parts: Parts) -> Answerer:
    """The user's own median or majority, no LLM."""
    typical = parts.bundle.task.strategy.typical
    own = parts.personalizer()
    return WithoutLLM(own, lambda _, visible: typical([record.output for record in visible]))


@method("control", uses=(), asks="never")
def copy_nearest(parts: Parts) -> Answerer:
    """1-NN: the answer of the user's most similar record, no LLM."""
    nearest = make_retriever("dense", embed=parts.bundle.features.texts)

    def answer(query: Query, visible: Sequence[Record]) -> str:
        ranked = nearest.retrieve(query, visible, 1)
        return ranked[0].record.output if ranked else parts.bundle.task.strategy.typical([])

    return WithoutLLM(parts.personalizer(), answer)


@dataclass(frozen=True)
class ScorerOnly:
    """All labels by the scorer, without the LLM's votes: what `hydra` is better by is the LLM's."""

    personalizer: UserPipeline

    async def aanswer(self, query: Query) -> Answer:
        labels = tuple(all_labels(self.personalizer.task, []))
        proposal = Proposal(query, (), (), (), labels)
        return self.personalizer.decide(self.personalizer.context_of(query), proposal)


@method("control", labels_only=True, uses=("adapter",), requires=("adapter",), asks="never")
def scorer_only(parts: Parts) -> Answerer:
    """All labels by the adapter, no LLM."""
    return ScorerOnly(parts.personalizer(adapt=True))


@method(
    "control",
    takes=("k", "b"),
    texts_only=True,
    uses=("reranker", "word_model"),
    requires=("word_model",),
)
def expected_rouge(parts: Parts) -> Answerer:
    """The sample with the greatest expected ROUGE by the word model, no adapter."""
    own = parts.personalizer(rerank=True)
    return replace(own, selector=ByWords(parts.bundle.featurizer))
