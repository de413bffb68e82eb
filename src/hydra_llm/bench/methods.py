"""The built-in methods: HYDRA, its parts, and what it is compared with.

Sources: HYDRA (arXiv 2406.02888), sections 4.1 and 4.2; LaMP (arXiv 2304.11406).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import anyio

from hydra_llm.bench.baselines import ByVoteShare, NthSample, Oracle, ScorerOnly, WithoutLLM
from hydra_llm.bench.bbox import BBoxAdapter
from hydra_llm.bench.method import Answerer, Parts, method
from hydra_llm.llm.base import Sampling
from hydra_llm.pipeline import UserPipeline
from hydra_llm.retrieve import Nothing, make_retriever
from hydra_llm.select import Selector
from hydra_llm.text import fold
from hydra_llm.types import Answer, Message, Query, Record, Usage

GREEDY: Mapping[str, Any] = {"samples": 1, "greedy_first": True}
"""Settings of a method that takes the LLM's temperature-0 answer alone."""
ALWAYS: Mapping[str, Any] = {"rerank": "always"}
"""The paper's methods use the reranker even if `hydra` would keep the retriever's order."""


@method("prompt", source="HYDRA 4.1", uses=())
def zero_shot(parts: Parts) -> Answerer:
    """The LLM without any record."""
    return replace(parts.personalizer(**GREEDY, k=0), retriever=Nothing())


@method("prompt", takes=("k",), source="HYDRA 4.1", uses=())
def icl_random(parts: Parts) -> Answerer:
    """K random records in the prompt."""
    return _rag_with("random", parts)


@method("prompt", takes=("k",), source="LaMP", uses=())
def recent(parts: Parts) -> Answerer:
    """The k latest records in the prompt."""
    return _rag_with("recent", parts)


@method("prompt", takes=("k",), source="LaMP; HYDRA 4.1", uses=())
def rag(parts: Parts) -> Answerer:
    """The retriever's first k records in the prompt."""
    return parts.personalizer(**GREEDY)


@method("prompt", takes=("k",), source="LaMP", uses=())
def rag_dense(parts: Parts) -> Answerer:
    """The k nearest records by the encoder."""
    return _rag_with("dense", parts)


@method("prompt", takes=("k",), source="Richardson et al. 2023; HYDRA 4.1", uses=())
def pag(parts: Parts) -> Answerer:
    """A profile written by the LLM, and k records."""
    return Profiled(parts.personalizer(**GREEDY))


def _rag_with(name: str, parts: Parts) -> Answerer:
    retriever = make_retriever(name, embed=parts.bundle.store.texts, seed=parts.settings.seed)
    return replace(parts.personalizer(**GREEDY), retriever=retriever)


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
                written = await self.inner.llm.generate(self._question(context.visible), sampling)
                self.profiles[key], usage = written.texts[0].strip(), written.usage
        answer = await replace(self.inner, profile=self.profiles[key]).aanswer(context)
        total = answer.proposal.usage + usage
        return replace(answer, proposal=replace(answer.proposal, usage=total))

    def _question(self, visible: Sequence[Record]) -> list[Message]:
        """The latest records, each cut to its share of the prompt."""
        latest = list(visible)[-PROFILE_RECORDS:]
        room = int(self.inner.settings.max_prompt_tokens * 3 / len(latest)) // 2
        lines = [f"{fold(record.input)[:room]} → {fold(record.output)[:room]}" for record in latest]
        return [{"role": "user", "content": PROFILE.replace("{records}", "\n".join(lines))}]


@method("hydra", takes=("k",), source="HYDRA 4.2", uses=("reranker",), requires=("reranker",))
def hydra_reranker(parts: Parts) -> Answerer:
    """Reranked records, first answer."""
    return parts.with_settings(**ALWAYS).personalizer(rerank=True, **GREEDY)


@method("hydra", takes=("b",), source="HYDRA 4.2", uses=("adapter",), requires=("adapter",))
def hydra_adapter(parts: Parts) -> Answerer:
    """Answers without records, the adapter picks."""
    return replace(parts.personalizer(adapt=True, k=0), retriever=Nothing())


@method("hydra", takes=("k", "b"), source="HYDRA 4.2", requires=("reranker", "adapter"))
def hydra_published(parts: Parts) -> Answerer:
    """Reranker and adapter: sampled candidates at temperature 1, best score."""
    sampled = {"candidates": "sampled", "select": "best", "temperature": 1.0, "greedy_first": False}
    return parts.with_settings(**ALWAYS).personalizer(rerank=True, adapt=True, **sampled)


@method("hydra", takes=("k", "b"), source="HYDRA 4.2; docs/method.md")
def hydra(parts: Parts) -> Answerer:
    """Reranker and adapter with this project's selection."""
    return parts.personalizer(rerank=True, adapt=True)


@method("control", takes=("k", "b"), source="docs/method.md")
def hydra_shared(parts: Parts) -> Answerer:
    """Hydra with the shared heads for everybody."""
    return replace(parts, bundle=parts.bundle.without_heads()).personalizer(rerank=True, adapt=True)


@method("adapter", takes=("b",), source="Sun et al. 2024; HYDRA 4.1")
def bbox_adapter(parts: Parts) -> Answerer:
    """One energy for all users, adapted to each user in online rounds, picks."""
    return BBoxAdapter.of(parts)


@method("sampling", takes=("b",), source="Wang et al. 2023", uses=("reranker",))
def self_consistency(parts: Parts) -> Answerer:
    """The most frequent answer among hydra's samples."""
    return _selecting(ByVoteShare(parts.bundle.task, "best"), parts)


@method("sampling", takes=("b",), source="Kumar and Byrne 2004", uses=("reranker",))
def mbr(parts: Parts) -> Answerer:
    """Minimum Bayes risk: the sample that is closest to the others."""
    return _selecting(ByVoteShare(parts.bundle.task, "expected-gain"), parts)


@method("bound", takes=("b",), uses=("reranker",), per_sample=True)
def random(parts: Parts) -> Answerer:
    """Expected score of a uniformly random sample of hydra's: the mean over all of them."""
    return _selecting(NthSample(parts.seed), parts)


@method("bound", takes=("b",), uses=("reranker",))
def oracle(parts: Parts) -> Answerer:
    """Upper bound: the best of hydra's samples."""
    return _selecting(Oracle(parts.bundle.task), parts)


def _selecting(selector: Selector, parts: Parts) -> Answerer:
    return replace(parts.personalizer(rerank=True), selector=selector)


@method("control", uses=())
def user_majority(parts: Parts) -> Answerer:
    """The user's own median or majority, no LLM."""
    typical = parts.bundle.task.strategy.typical
    return WithoutLLM(
        parts.personalizer(), lambda _, visible: typical([record.output for record in visible])
    )


@method("control", uses=())
def copy_nearest(parts: Parts) -> Answerer:
    """1-NN: the answer of the user's most similar record, no LLM."""
    nearest = make_retriever("dense", embed=parts.bundle.store.texts)

    def answer(query: Query, visible: Sequence[Record]) -> str:
        ranked = nearest.retrieve(query, visible, 1)
        return ranked[0].record.output if ranked else parts.bundle.task.strategy.typical([])

    return WithoutLLM(parts.personalizer(), answer)


@method("control", labels_only=True, uses=("adapter",), requires=("adapter",))
def scorer_only(parts: Parts) -> Answerer:
    """All labels by the adapter, no LLM."""
    return ScorerOnly(parts.personalizer(adapt=True))
