"""A chat request to a completion: user → retrieve → rerank → render → upstream → select → reply.
A part that fails is left out and counted, and never costs the caller an answer: the request is
passed through, the retriever's order is kept, or the first choice is the answer.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio

from hydra_llm.errors import HydraError
from hydra_llm.gateway.batching import Overloaded
from hydra_llm.gateway.chunks import StreamReader, chunk_head, delta, event, only_tells_usage
from hydra_llm.gateway.deployment import Deployment
from hydra_llm.gateway.identity import hide_user
from hydra_llm.gateway.masked import MaskedUpstream
from hydra_llm.gateway.metered import MeteredUpstream
from hydra_llm.gateway.pictures import Pictures
from hydra_llm.gateway.routed import (
    NotPersonal,
    PersonalRequest,
    RoutedRequest,
    asked_question,
    personalization_of,
)
from hydra_llm.gateway.sampling import Body, CandidateSampler, without
from hydra_llm.gateway.schemas import ChatRequest, PersonalizationOptions
from hydra_llm.gateway.scoring import (
    RankedChoices,
    RecordSearch,
    choice_texts,
    rank,
    scored_texts,
    unranked,
    without_words,
)
from hydra_llm.gateway.settings import ServeSettings
from hydra_llm.gateway.spend import Ledger, paying
from hydra_llm.gateway.spend_limits import Limits
from hydra_llm.gateway.structured import asking_message, form_of, is_text
from hydra_llm.gateway.telemetry import Telemetry, note
from hydra_llm.gateway.turns import asking
from hydra_llm.gateway.upstream import Upstream, UpstreamError, usage_of
from hydra_llm.gateway.user_cache import TimedReads, UserSnapshot, texts_of
from hydra_llm.store.store import Store
from hydra_llm.store.values import Request

UNREAD = ("disabled", "no-question")  # reasons of which no user was read
FAILED = (("retriever", "scoring-failure"), ("scoring", "overloaded"))  # part, reason: by overload
RECORDS_REFUSED = (400, 413, 422)  # statuses of an upstream that may not take the records


@dataclass(eq=False)
class Gateway:
    """Answers chat requests as each user would want."""

    store: Store
    reads: TimedReads
    upstream: Upstream
    settings: ServeSettings
    deployment: Deployment
    telemetry: Telemetry
    ledger: Ledger
    active_bundle: str | None = None  # the bundle that the store named last
    pictures: Pictures | None = None  # None: nothing describes pictures

    def __post_init__(self) -> None:
        self.salt = self.store.salt()  # of pseudonyms
        self.told = asyncio.Event()  # the store tells of something that `app._watch` looks at
        self.limits = Limits(self.store, self.settings.key_limits, self.settings.user_limits)
        self._sampler = CandidateSampler(self.telemetry, self.settings.deadline)

    @property
    def metered(self) -> Upstream:
        """The upstream, with its calls counted and personal data masked."""
        metered = MeteredUpstream(self.upstream, self.ledger, self.telemetry)
        names = self.deployment.pipeline.settings.mask
        return MaskedUpstream(metered, names) if names else metered

    # ---- before the upstream

    async def route(
        self, request: ChatRequest, body: Mapping[str, Any], user: str | None
    ) -> RoutedRequest:
        """Everything up to what the upstream is asked."""
        asking.set(user or "")
        own = without(body, "personalization")
        plain = hide_user(own, self.salt, self.settings.user_fields)
        if request.n is not None:
            plain["n"] = request.n  # as parsed: JSON also writes 2 as 2.0
        routed = RoutedRequest(request, body=plain, plain=plain, deployment=self.deployment)
        try:
            if user is None:
                raise NotPersonal("no-user")
            with routed.deployment.batcher.attending():
                return await self._personalized(routed, user)
        except NotPersonal as reason:
            if user is not None and str(reason) in UNREAD:
                await self.read_payer(user)
            return routed.passed_through(str(reason))

    async def read_payer(self, user: str) -> None:
        """Note on the bill whom the store knows: the user may be deleted until it is paid."""
        if (bill := paying.get()) is not None:
            with suppress(HydraError):
                bill.known((await self.reads.read(partial(self.store.state, user))).version)

    async def _personalized(self, routed: RoutedRequest, user: str) -> PersonalRequest:
        """The request with records in its messages."""
        started = time.perf_counter()
        options, plain, deployment = routed.options, routed.plain, routed.deployment
        settings, form = deployment.pipeline.settings, form_of(plain)
        pictures = await self._pictures(routed)
        question = asked_question(routed, pictures)
        search = await self.search(
            deployment, user, question, options, answers=True, pictures=pictures
        )
        shown = search.ranked[: settings.k if options.k is None else options.k]
        prompt, *beside = deployment.pipeline.render_all(
            search.context.query,
            [shown, *search.beside],
            conversation=plain["messages"],
            window=getattr(self.upstream, "room", None),
            style=None if form == "text" else "system",
        )
        adapter = deployment.bundle.adapter if deployment.bundle else None
        several = bool(adapter) and search.warm and form != "fixed"
        style = deployment.pipeline.prompt_style if form == "text" else "system"
        words = deployment.pipeline.task.strategy.prompt_words()
        return PersonalRequest(
            asked=routed.asked,
            body={**plain, "messages": list(prompt.messages)},
            beside=[list(own.messages) for own in beside],
            plain=plain,
            deployment=deployment,
            seconds={**search.seconds, "prepare": time.perf_counter() - started},
            candidates=max(options.samples or settings.samples, routed.n) if several else 1,
            search=search,
            prompt_records=prompt.records,
            in_task_words=search.in_task_words,
            form=form,
            words=words if prompt.records and style != "turns" else None,
        )

    async def _pictures(self, routed: RoutedRequest) -> list[str]:
        """What the pictures of the question show, where that is switched on."""
        if self.pictures is None or not self.settings.vision_requests or not routed.options.enabled:
            return []
        content = asking_message(routed.plain["messages"]).get("content")
        try:
            with anyio.fail_after(self.settings.deadline):
                return await self.pictures.of_question(content)
        except Exception as error:  # whatever it is must not cost the caller an answer
            self.telemetry.failed("vision", error)
            return []

    async def search(
        self,
        deployment: Deployment,
        name: str,
        question: str,
        options: PersonalizationOptions,
        *,
        answers: bool = False,
        pictures: Sequence[str] = (),
    ) -> RecordSearch:
        """The user's records for a question; NotPersonal names the reason why there are none.
        `answers`: to answer it, which the user may have switched off. `pictures`: lines that say
        what stands beside the text.
        """
        user = await self._user(deployment, name, answers)
        # Scorers and records know the text within the task's instruction.
        within = deployment.pipeline.task.input_of(question)
        # One character more than a record may have: feedback on a longer one makes no record.
        text = "\n".join(filter(None, [within or question, *pictures]))
        text = text[: self.settings.max_text + 1]
        how: Any = {"in_task_words": within is not None, "gated": options.gate}
        search = RecordSearch(deployment, user, text, self.telemetry, options.k or 0, **how)
        search.span = self.telemetry.tracing.parent
        try:
            read: Any = {"texts": search.texts, "pairs": search.pairs}
            await deployment.batcher.run(search.run, user=name, **read)
        except Exception as error:
            part, reason = FAILED[isinstance(error, Overloaded)]
            self.telemetry.failed(part, error)
            raise NotPersonal(reason) from None
        if not search.context.visible:
            raise NotPersonal("no-history")
        if not search.warm:
            deployment.prefetch(name)
        if search.reason:
            raise NotPersonal(search.reason)
        return search

    async def _user(self, deployment: Deployment, name: str, answers: bool) -> UserSnapshot:
        try:
            user = await self.reads.read(partial(deployment.users.current, name))
        except Exception as error:
            self.telemetry.failed("store", error)
            raise NotPersonal("store-failure") from None
        if (bill := paying.get()) is not None:
            bill.known(None if user is None else user.version)
        if user is None:
            raise NotPersonal("unknown-user")
        if answers and user.off:
            raise NotPersonal("switched-off")
        return user

    # ---- the upstream

    async def answer(self, request: RoutedRequest) -> tuple[Body, RoutedRequest]:
        """A completion, and the request as it was asked in the end; else raises `UpstreamError`."""
        started = time.perf_counter()
        temperature = request.deployment.pipeline.settings.temperature
        try:
            with self.telemetry.tracing.stage("sample", hydra__asked=request.candidates) as span:
                completions, greedy = await self._sampler.sample(
                    self.metered,
                    request.body,
                    request.candidates,
                    temperature,
                    request.sample_if if isinstance(request, PersonalRequest) else None,
                    beside=request.beside,
                )
                span.set(hydra__answers=sum(len(one["choices"]) for one in completions))
        except UpstreamError as error:
            answer = await self.answer(self.without_records(request, error))
            self.telemetry.failed(
                "records", error
            )  # what is refused without them too is not theirs
            return answer
        request.seconds["upstream"] = time.perf_counter() - started
        if not isinstance(request, PersonalRequest):
            self.telemetry.answered(request.reason, request.seconds)
            return completions[0], request
        with request.deployment.batcher.attending():
            return await self._chosen(request, completions, greedy), request

    def without_records(self, request: RoutedRequest, error: UpstreamError) -> RoutedRequest:
        """The request as the caller wrote it; raises if it is not the records that were refused."""
        if not isinstance(request, PersonalRequest) or error.status not in RECORDS_REFUSED:
            raise error
        return request.passed_through("upstream-refused")

    # ---- behind the upstream

    async def _chosen(
        self, request: PersonalRequest, completions: Sequence[Body], greedy: int
    ) -> Body:
        """The completion with the user's pick first, which is kept for feedback."""
        own, *samples = [completion["choices"] for completion in completions]
        if request.form != "text":  # a call of a tool is no other text
            samples = [list(filter(is_text, sample)) for sample in samples]
        choices = [choice for part in (own, *samples) for choice in part]
        if request.words is not None:
            choices = [without_words(request.words, choice) for choice in choices]
        note(candidates=len(choices))
        with self.telemetry.tracing.stage("select", hydra__candidates=len(choices)) as span:
            ranked = await self._rank(request, choices, greedy)
            span.set(hydra__reason=ranked.unscored or "scored", hydra__abstained=ranked.abstained)
        choices = [{**choice, "index": i} for i, choice in enumerate(ranked.choices[: request.n])]
        answer = {"id": request.completion_id, "choices": choices, "usage": usage_of(completions)}
        completion = {**completions[0], **answer}
        kept = await self._keep(request, ranked)
        if self.settings.personalization:
            completion["personalization"] = personalization_of(request, ranked, kept)
        chosen = None if ranked.unscored else ranked.abstained
        self.telemetry.answered(None, request.seconds, chosen)
        return completion

    async def _rank(
        self, request: PersonalRequest, choices: Sequence[Body], greedy: int
    ) -> RankedChoices:
        """The choices in the adapter's order; as they came where there is none, or it fails."""
        started = time.perf_counter()
        context, pipeline = request.search.context, request.deployment.pipeline
        texts = scored_texts(choices)
        if request.candidates == 1:
            return unranked(choices, request.unscored)
        if request.form != "text" and not all(map(is_text, choices)):
            return unranked(choices, "not-text")
        try:
            # The LLM may not have been asked for a label where the question is not in the task's
            # words: then its answers may be no labels, and are not scored.
            task = pipeline.task
            if task.labels:
                asked_for_label = request.in_task_words or task.parse(texts[0], "strict")
                if not asked_for_label:
                    return unranked(choices, "no-label")

            def pairs() -> Sequence[tuple[str, str]]:
                return pipeline.selector.pairs(context, pipeline.read(texts, greedy)[0])

            name = request.search.user.name
            asked = request.options.explain
            explained = [own.record for own in request.search.ranked] if asked else ()
            seen = context.without_vectors()
            ranked = partial(rank, pipeline, seen, choices, greedy, explained)
            how: Any = {"user": name, "texts": lambda: texts, "pairs": pairs}
            ranking: RankedChoices = await request.deployment.batcher.run(ranked, **how)
            return ranking
        except Exception as error:  # whatever it is must not cost the caller an answer
            self.telemetry.failed("adapter", error)
            return unranked(choices, "scoring-failure")
        finally:
            request.seconds["adapt"] = time.perf_counter() - started

    async def _keep(self, request: PersonalRequest, ranked: RankedChoices) -> bool:
        """Keep the request for feedback; whether it was. Calls of tools are no answer to judge."""
        if not any(choice_texts(ranked.choices)):
            return False
        deployment, user, context = request.deployment, request.search.user, request.search.context
        question = context.query.input
        content = ranked.stored(request.n, len(context.visible))
        content["records"] = [record.id for record in request.prompt_records]
        stored = Request(request.id, user.name, time.time(), deployment.id, question, content)
        try:
            add = partial(self.store.add_request, stored, version=user.version)
            kept = await self.reads.read(add)
            if not kept:  # deleted while the upstream was asked
                await deployment.batcher.run(partial(deployment.drop, user.name), user="")
                texts = [question, *choice_texts(ranked.choices), *texts_of(user.records)]
                texts += [candidate.text for candidate in ranked.candidates]
                await self.reads.read(partial(deployment.forget_texts, texts))
        except HydraError as error:
            self.telemetry.failed("store", error)
            return False
        return kept

    # ---- streams

    async def stream(self, request: RoutedRequest) -> AsyncIterator[bytes]:
        """The upstream's stream; a personal one is kept for feedback and told of before its end."""
        started = time.perf_counter()
        words = request.words if isinstance(request, PersonalRequest) and request.n == 1 else None
        reader = StreamReader(request.completion_id, words)
        body, options = {**request.body, "stream": True}, request.body.get("stream_options") or {}
        for_us = self.settings.stream_usage and not options.get("include_usage")
        if for_us:
            body["stream_options"] = {**options, "include_usage": True}
        async for piece in self.metered.stream(body):
            if for_us and only_tells_usage(piece):
                continue
            if reader.ended or not isinstance(request, PersonalRequest):
                yield piece
                continue
            if passed := reader.take(piece):
                yield passed
            if reader.ended:
                request.seconds["upstream"] = time.perf_counter() - started
                yield await self._last_chunk(request, reader) + reader.rest
        request.seconds.setdefault("upstream", time.perf_counter() - started)
        if isinstance(request, PersonalRequest) and not reader.ended:
            if passed := reader.close():
                yield passed
            last = await self._last_chunk(request, reader)
            if last and (reader.rest or reader.answered):  # else it was cut
                yield b"\n\n" + last if passed else last
            if reader.rest:
                yield reader.rest

    async def _last_chunk(self, request: PersonalRequest, reader: StreamReader) -> bytes:
        """Keep what was streamed; the chunk with `personalization`, and a choice for clients."""
        ranked = unranked(reader.choices, request.unscored)
        kept = await self._keep(request, ranked)
        if not self.settings.personalization:
            return b""
        id = request.completion_id
        head = {**chunk_head(id, request.body["model"]), **reader.head, "id": id}
        personalization = personalization_of(request, ranked, kept)
        return event({**head, "choices": [delta(0, {})], "personalization": personalization})
