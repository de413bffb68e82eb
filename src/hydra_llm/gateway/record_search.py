"""A user's records for one question, in the scoring thread. Knows no HTTP and no store."""

import time
from dataclasses import dataclass, field
from functools import cached_property

from hydra_llm.context import Context
from hydra_llm.gateway.deployment import Deployment
from hydra_llm.gateway.telemetry import Telemetry
from hydra_llm.gateway.user_cache import UserSnapshot
from hydra_llm.types import Query, Ranked


@dataclass(eq=False)
class RecordSearch:
    """Retrieves and reranks, in two steps as a cross-encoder reads pairs: first `pairs` of all
    waiting requests, which are encoded in one batch (batching.py), then `run`.
    """

    deployment: Deployment
    user: UserSnapshot
    question: str
    telemetry: Telemetry
    k: int  # records that the request asks for: so many are retrieved at least
    seconds: dict[str, float] = field(default_factory=dict, init=False)  # by stage
    warm: bool = field(default=False, init=False)
    """Whether the user's history is encoded; else the retriever's order stands."""

    @cached_property
    def context(self) -> Context:
        """The question comes after all of the user's records."""
        visible = self.deployment.readable(self.user.records)
        query = Query(self.user.name, "asked", self.question)
        return self.deployment.pipeline.context(query, visible, self.user.heads)

    @cached_property
    def ranked(self) -> list[Ranked]:
        """Best first: in the retriever's order until they are reranked."""
        started = time.perf_counter()
        retrieved = self.deployment.pipeline.retrieve(self.context, self.k)
        self.seconds["retrieve"] = time.perf_counter() - started
        return retrieved

    def pairs(self) -> list[tuple[str, str]]:
        """What a cross-encoder will read."""
        return self.deployment.pipeline.reranker.pairs(self.context, self.ranked)

    def run(self) -> None:
        """Rank the records."""
        retrieved, visible, started = self.ranked, self.context.visible, time.perf_counter()
        self.warm = bool(visible) and self.deployment.users.is_warm(self.user, visible)
        if self.warm:
            try:
                self.ranked = self.deployment.pipeline.rerank(self.context, retrieved)
            except Exception as error:  # the answer is worth more than the order
                self.telemetry.failed("reranker", error)
        self.seconds["rerank"] = time.perf_counter() - started
        self.context = self.context.at_rest()  # not its vectors, while others are answered
