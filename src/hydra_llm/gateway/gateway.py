"""A chat request to a completion: user → retrieve → rerank → render → upstream → select → reply.

The stages are the library's. A failing part is left out and counted, and never costs the caller an
answer: without a user, history or question the request goes through as it is; without a reranker
the retriever's order stands; without an adapter the first choice is the answer.
"""

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from secrets import token_hex
from typing import Any

from hydra_llm.context import Context
from hydra_llm.errors import HydraError
from hydra_llm.gateway.batching import Overloaded
from hydra_llm.gateway.choices import RankedChoices, answers_task, choice_texts, rank, unranked
from hydra_llm.gateway.chunks import StreamReader, chunk_head, delta, event
from hydra_llm.gateway.deployment import Deployment
from hydra_llm.gateway.pseudonyms import Pseudonyms
from hydra_llm.gateway.record_search import Found, RecordSearch
from hydra_llm.gateway.sampling import CandidateSampler, Sampled, without
from hydra_llm.gateway.schemas import ChatRequest, PersonalizationOptions, has_more_than_text
from hydra_llm.gateway.settings import ServeSettings
from hydra_llm.gateway.telemetry import Telemetry
from hydra_llm.gateway.timed_reads import TimedReads
from hydra_llm.gateway.upstream import Upstream, UpstreamError, usage_of
from hydra_llm.gateway.user_cache import UserSnapshot, texts_of
from hydra_llm.prompt import text_of
from hydra_llm.store.store import Store
from hydra_llm.store.values import Request
from hydra_llm.text import repair
from hydra_llm.types import Record

RECORDS_REFUSED = (400, 413, 422)  # statuses of an upstream that may not take the records


@dataclass(frozen=True)
class Personalization:
    """What makes a request personal."""

    user: UserSnapshot
    context: Context
    shown: tuple[Record, ...]  # the records in the prompt
    candidates: int  # how many to ask for; 1 where there is no adapter, or no time for it
    in_task_words: bool  # whether the question is the task's instruction around a text
    warm: bool
    explain: bool


@dataclass(frozen=True)
class RoutedRequest:
    """What the upstream will be asked, and for whom."""

    body: dict[str, Any]  # with records in its messages, if personal
    plain: dict[str, Any]  # as the caller wrote it
    deployment: Deployment
    reason: str | None = None  # why it is not personal; None where it is
    personal: Personalization | None = None
    id: str = field(default_factory=lambda: f"req_{token_hex(12)}")
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def n(self) -> int:  # choices that the caller wants
        return int(self.plain.get("n") or 1)

    @property
    def candidates(self) -> int:
        return self.personal.candidates if self.personal else 1

    def passed_through(self, reason: str) -> "RoutedRequest":
        """The same request as the caller wrote it."""
        return replace(self, body=self.plain, reason=reason, personal=None)


@dataclass(frozen=True)
class Reply:
    """A completion, and the request as it was asked in the end."""

    completion: dict[str, Any]
    request: RoutedRequest
    abstained: bool = False


@dataclass(eq=False)
class Gateway:
    """Answers chat requests as each user would want."""

    store: Store
    reads: TimedReads
    upstream: Upstream
    settings: ServeSettings
    deployment: Deployment
    telemetry: Telemetry
    active_bundle: str | None = None  # the bundle that the store named last

    def __post_init__(self) -> None:
        self.pseudonyms = Pseudonyms(self.store.salt())
        self._sampler = CandidateSampler(self.telemetry, self.settings.deadline)

    # ---- before the upstream

    async def route(
        self, request: ChatRequest, body: Mapping[str, Any], user: str | None
    ) -> RoutedRequest:
        """Everything up to what the upstream is asked."""
        plain = self.pseudonyms.hidden(without(body, "personalization"))
        if request.n is not None:
            plain["n"] = request.n  # as parsed: JSON also writes 2 as 2.0
        options = request.personalization or PersonalizationOptions()
        routed, started = RoutedRequest(plain, plain, self.deployment), time.perf_counter()
        reason = _why_not(request, body["messages"], user, options)
        if reason is not None or user is None:
            return routed.passed_through(reason or "no-user")
        question = repair(text_of(body["messages"][-1]))
        # Scorers and records know the text within the task's instruction.
        within = routed.deployment.task.input_of(question)
        snapshot = await self._snapshot(routed.deployment, user)
        if isinstance(snapshot, str):
            return routed.passed_through(snapshot)
        found = await self._found(routed.deployment, snapshot, within or question, options.k or 0)
        if isinstance(found, str):
            return routed.passed_through(found)
        routed = self._personalized(routed, snapshot, found, options, within is not None)
        routed.seconds.update(found.seconds, prepare=time.perf_counter() - started)
        return routed

    def _personalized(
        self,
        routed: RoutedRequest,
        user: UserSnapshot,
        found: Found,
        options: PersonalizationOptions,
        in_task_words: bool,
    ) -> RoutedRequest:
        """The request with records in its messages."""
        settings, render = routed.deployment.settings, routed.deployment.pipeline.render
        records = found.ranked[: settings.k if options.k is None else options.k]
        messages, window = routed.plain["messages"], getattr(self.upstream, "room", None)
        prompt = render(found.context.query, records, conversation=messages, window=window)
        several = routed.deployment.selects and found.warm
        count = max(options.candidates or settings.samples, routed.n) if several else 1
        shown = found.context, prompt.records, count
        personal = Personalization(user, *shown, in_task_words, found.warm, options.explain)
        body = {**routed.plain, "messages": list(prompt.messages)}
        return replace(routed, body=body, personal=personal)

    async def _found(
        self, deployment: Deployment, user: UserSnapshot, question: str, k: int
    ) -> Found | str:
        """The user's records for a question, or why there are none."""
        try:
            search = RecordSearch(deployment, user, question, self.telemetry, k)
            found = await deployment.batcher.run(search.run, [question], pairs=search.pairs)
        except Overloaded as error:
            self.telemetry.failed("scoring", error)
            return "overloaded"
        except Exception as error:
            self.telemetry.failed("retriever", error)
            return "scoring-failure"
        if found is None:
            return "no-history"
        if not found.warm and deployment.prefetcher is not None:
            deployment.prefetcher.begin(user.name)
        return found

    async def _snapshot(self, deployment: Deployment, user: str) -> UserSnapshot | str:
        """The user as the store has it now, from memory where that is the same; or why not."""
        try:
            return await deployment.users.current(self.reads, user) or "unknown-user"
        except Exception as error:  # whatever fails must not cost the caller an answer
            self.telemetry.failed("store", error)
            return "store-failure"

    # ---- the upstream

    async def answer(self, request: RoutedRequest) -> Reply:
        """The completion of a request.

        Raises:
            UpstreamError: the upstream gave none.
        """
        if request.personal is None:
            return Reply(await self._complete(request, request.plain), request)
        try:
            sampled = await self._sample(request)
        except UpstreamError as error:
            request = self.without_records(request, error)
            return Reply(await self._complete(request, request.plain), request)
        ranked = await self._rank(request, sampled)
        choices = [{**choice, "index": i} for i, choice in enumerate(ranked.choices[: request.n])]
        completion = {**sampled.completions[0], "choices": choices}
        completion["usage"] = usage_of(sampled.completions)
        kept = await self._keep(request, ranked)
        if self.settings.personalization:
            completion["personalization"] = _personalization(request, ranked, kept)
        return Reply(completion, request, ranked.abstained)

    def without_records(self, request: RoutedRequest, error: UpstreamError) -> RoutedRequest:
        """The request as the caller wrote it, where the records may be what was refused.

        Raises:
            UpstreamError: the given one, where it is about something else.
        """
        if request.personal is None or error.status not in RECORDS_REFUSED:
            raise error
        self.telemetry.failed("records", error)
        return request.passed_through("upstream-refused")

    async def _complete(self, request: RoutedRequest, body: Mapping[str, Any]) -> dict[str, Any]:
        started = time.perf_counter()
        try:
            bare = {**without(body, "stream_options"), "stream": False}
            completion: dict[str, Any] = await self.upstream.complete(bare)
        finally:
            request.seconds["upstream"] = time.perf_counter() - started
        return completion

    async def _sample(self, request: RoutedRequest) -> Sampled:
        body, count = request.body, request.candidates
        if count == 1:
            return Sampled([await self._complete(request, body)], 0)
        started, temperature = time.perf_counter(), request.deployment.settings.temperature
        sampled = await self._sampler.sample(self.upstream, body, count, temperature)
        request.seconds["upstream"] = time.perf_counter() - started
        return sampled

    # ---- behind the upstream

    async def _rank(self, request: RoutedRequest, sampled: Sampled) -> RankedChoices:
        """The choices in the adapter's order; as they came where there is none, or it fails."""
        personal, choices, greedy = request.personal, sampled.choices, sampled.greedy
        if personal is None or personal.candidates == 1:
            return unranked(choices)
        started, pipeline = time.perf_counter(), request.deployment.pipeline
        try:
            texts = choice_texts(choices)
            if not answers_task(pipeline, texts, personal.in_task_words):
                return unranked(choices)

            def pairs() -> Sequence[tuple[str, str]]:
                candidates, _ = pipeline.read(texts, greedy)
                return pipeline.selector.pairs(personal.context, candidates)

            ranked = partial(rank, pipeline, personal.context.at_rest(), choices, greedy)
            return await request.deployment.batcher.run(ranked, texts, pairs=pairs)
        except Exception as error:  # whatever it is must not cost the caller an answer
            self.telemetry.failed("adapter", error)
            return unranked(choices)
        finally:
            request.seconds["adapt"] = time.perf_counter() - started

    async def _keep(self, request: RoutedRequest, ranked: RankedChoices) -> bool:
        """Keep the request for feedback; whether it was."""
        personal, deployment = request.personal, request.deployment
        assert personal is not None
        user, question = personal.user, personal.context.query.input
        content = ranked.stored(request.n, len(personal.context.visible))
        stored = Request(request.id, user.name, time.time(), deployment.id, question, content)
        try:
            keep = partial(self.store.add_request, stored, version=user.version)
            kept = await self.reads.read(keep)
            if not kept:  # deleted while the upstream was asked
                await deployment.batcher.run(partial(deployment.forget, user.name), must=True)
                texts = [question, *choice_texts(ranked.choices), *texts_of(user.records)]
                texts += [candidate.text for candidate in ranked.candidates]
                await self.reads.read(partial(deployment.forget_texts, self.store, texts))
        except HydraError as error:
            self.telemetry.failed("store", error)
            return False
        return kept

    # ---- streams

    async def stream(self, request: RoutedRequest) -> AsyncIterator[bytes]:
        """The upstream's own stream for one candidate. A personal one is kept for feedback, and
        gets the object `personalization`, before it ends.

        Raises:
            UpstreamError: before the first byte.
        """
        pieces = self.upstream.stream({**request.body, "stream": True})
        async for piece in pieces if request.personal is None else self._kept(request, pieces):
            yield piece

    async def _kept(
        self, request: RoutedRequest, pieces: AsyncIterator[bytes]
    ) -> AsyncIterator[bytes]:
        reader, started = StreamReader(), time.perf_counter()
        async for piece in pieces:
            if reader.ended:
                yield piece
                continue
            if passed := reader.take(piece):
                yield passed
            if reader.ended:
                request.seconds["upstream"] = time.perf_counter() - started
                yield await self._last_chunk(request, reader) + reader.rest
        if not reader.ended:
            await self._last_chunk(request, reader)
            if reader.rest:
                yield reader.rest

    async def _last_chunk(self, request: RoutedRequest, reader: StreamReader) -> bytes:
        """Keep what a stream has said; returns the chunk with `personalization`. It has an empty
        choice, as clients read the first one.
        """
        ranked = unranked(reader.choices)
        kept = any(reader.texts.values()) and await self._keep(request, ranked)
        if not self.settings.personalization:
            return b""
        head = {**chunk_head(f"chatcmpl-{request.id}", request.body["model"]), **reader.head}
        personalization = _personalization(request, ranked, kept)
        return event({**head, "choices": [delta(0, {})], "personalization": personalization})


def _why_not(
    request: ChatRequest,
    messages: Sequence[Mapping[str, Any]],
    user: str | None,
    options: PersonalizationOptions,
) -> str | None:
    """Why a request is not personal, as far as itself tells."""
    if user is None:
        return "no-user"
    if not options.enabled:
        return "disabled"
    if request.tools or request.functions or has_more_than_text(messages):
        return "tools"
    if messages[-1].get("role") != "user" or not text_of(messages[-1]).strip():
        return "no-question"
    return None


def _personalization(request: RoutedRequest, ranked: RankedChoices, kept: bool) -> dict[str, Any]:
    """The object `personalization` of a reply."""
    personal = request.personal
    assert personal is not None
    return {
        "request_id": request.id if kept else None,
        "records": [record.id for record in personal.shown],
        "warm": personal.warm,
        **ranked.summary(),
        "seconds": {stage: round(seconds, 4) for stage, seconds in request.seconds.items()},
        **(ranked.explained(personal.shown) if personal.explain else {}),
    }
