"""A user's records for one question, in the scoring thread (batching.py). Knows no HTTP, no store.

Two steps, because a cross-encoder reads pairs: first `pairs` of all waiting requests, which are
encoded in one batch, then `run`.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

from hydra_llm.context import Context
from hydra_llm.gateway.deployment import Deployment
from hydra_llm.gateway.telemetry import Telemetry
from hydra_llm.gateway.user_cache import UserSnapshot
from hydra_llm.types import Query, Ranked


@dataclass(frozen=True)
class Found:
    """The records for a question."""

    context: Context
    ranked: list[Ranked]  # best first
    seconds: dict[str, float]
    warm: bool = True  # the user's history is encoded; else the retriever's order stands


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
        with self._timed("retrieve"):
            return self.deployment.pipeline.retrieve(self.context, self.k)

    def pairs(self) -> list[tuple[str, str]]:
        """What a cross-encoder will read."""
        return self.deployment.pipeline.reranker.pairs(self.context, self.retrieved)

    def run(self) -> Found | None:
        """The records, best first; None for a user without any."""
        users, pipeline = self.deployment.users, self.deployment.pipeline
        ranked, visible = self.retrieved, self.context.visible
        if not visible:
            return None
        warm = users.is_warm(self.user, visible)
        with self._timed("rerank"):
            if warm:
                try:
                    ranked = pipeline.rerank(self.context, ranked)
                except Exception as error:  # the answer is worth more than the order
                    self.telemetry.failed("reranker", error)
        return Found(self.context.at_rest(), ranked, self.seconds, warm)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - started
