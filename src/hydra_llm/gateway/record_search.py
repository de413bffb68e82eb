"""A user's records for one question, in the scoring thread (batching.py). Knows no HTTP, no store.

Two steps, because a cross-encoder reads pairs: first `pairs` of all waiting requests, which are
encoded in one batch, then `run`.
"""

import time
from dataclasses import dataclass, field
from functools import cached_property

from hydra_llm.context import Context
from hydra_llm.gateway.deployment import Deployment
from hydra_llm.gateway.telemetry import Telemetry
from hydra_llm.gateway.user_cache import UserSnapshot
from hydra_llm.types import Query, Ranked


@dataclass(frozen=True)
class SearchResult:
    """A user's records for a question."""

    user: UserSnapshot
    context: Context
    ranked: list[Ranked]  # best first
    seconds: dict[str, float]  # by stage
    warm: bool  # the user's history is encoded; else the retriever's order stands


@dataclass
class RecordSearch:
    """Retrieves and reranks."""

    deployment: Deployment
    user: UserSnapshot
    question: str
    telemetry: Telemetry
    k: int = 0  # records that the request asks for: so many are retrieved at least
    seconds: dict[str, float] = field(default_factory=dict)

    @cached_property
    def context(self) -> Context:
        """The question comes after all of the user's records."""
        visible = self.deployment.readable(self.user.records)
        query = Query(self.user.name, "asked", self.question)
        return self.deployment.pipeline.context(query, visible, self.user.heads)

    @cached_property
    def retrieved(self) -> list[Ranked]:
        started = time.perf_counter()
        retrieved = self.deployment.pipeline.retrieve(self.context, self.k)
        self.seconds["retrieve"] = time.perf_counter() - started
        return retrieved

    def pairs(self) -> list[tuple[str, str]]:
        """What a cross-encoder will read."""
        return self.deployment.pipeline.reranker.pairs(self.context, self.retrieved)

    def run(self) -> SearchResult | None:
        """The records, best first; None for a user without any."""
        ranked, visible = self.retrieved, self.context.visible
        if not visible:
            return None
        warm, started = self.deployment.users.is_warm(self.user, visible), time.perf_counter()
        if warm:
            try:
                ranked = self.deployment.pipeline.rerank(self.context, ranked)
            except Exception as error:  # the answer is worth more than the order
                self.telemetry.failed("reranker", error)
        self.seconds["rerank"] = time.perf_counter() - started
        return SearchResult(self.user, self.context.at_rest(), ranked, self.seconds, warm)
