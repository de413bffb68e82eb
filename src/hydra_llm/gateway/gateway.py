"""THE GATEWAY'S MAIN PATH: conversation → person → retrieve → rerank → place → upstream → adapt →
reply.

Never worse: what fails on the way is left out and counted. Without a user, history or question the
caller's request goes through as it is; without a reranker the retriever's order stands; of the
candidates those that came in time are enough; without an adapter the first is the answer. Knows the
store by its methods and the upstream by its three.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from secrets import token_hex
from typing import Any

from hydra_llm.errors import HydraError
from hydra_llm.gateway.batching import Overloaded
from hydra_llm.gateway.deployment import Deployment
from hydra_llm.gateway.placement import place
from hydra_llm.gateway.pseudonyms import Pseudonyms
from hydra_llm.gateway.schemas import (
    ChatRequest,
    Heard,
    PersonalizationOptions,
    chunk_head,
    delta,
    has_more_than_text,
    text_of,
)
from hydra_llm.gateway.scoring import Found, Picked, Search, as_they_came, choose, pairs_of
from hydra_llm.gateway.settings import ServeSettings
from hydra_llm.gateway.telemetry import Telemetry
from hydra_llm.gateway.timed_reads import TimedReads
from hydra_llm.gateway.upstream import Upstream, UpstreamError, event, learn_samples, usage_of
from hydra_llm.gateway.user_cache import UserSnapshot, texts_of
from hydra_llm.llm.endpoint import CapabilityCache
from hydra_llm.store.store import Store
from hydra_llm.store.values import Request
from hydra_llm.tasks.base import Task
from hydra_llm.text import repair
from hydra_llm.types import Record


@dataclass(frozen=True)
class Plan:
    """What will be asked for whom, before the upstream is."""

    body: dict[str, Any]
    """For the upstream, with records in its messages where there are any."""
    plain: dict[str, Any]
    """For the upstream, as the caller wrote it."""
    reason: str | None
    """Why it goes through as it is; None where it is personal."""
    serving: Deployment
    person: UserSnapshot | None = None
    question: str = ""
    visible: tuple[Record, ...] = ()
    shown: tuple[Record, ...] = ()
    candidates: int = 1
    explain: bool = False
    warm: bool = True
    """Whether the user's records have been encoded: until then nothing is reranked, and one answer
    is asked for.
    """
    id: str = field(default_factory=lambda: f"req_{token_hex(12)}")
    seconds: dict[str, float] = field(default_factory=dict)


def _in_its_words(task: Task, text: str) -> str:
    """A record's input as the task asks it; one that came with the instruction around it stays as
    it is.
    """
    return text if task.input_of(text) else task.ask(text)


@dataclass(frozen=True)
class Reply:
    """A completion, and why it is not personal if it is not."""

    completion: dict[str, Any]
    plan: Plan
    abstained: bool = False
    """Whether the adapter left the first candidate."""


class Gateway:
    """Answers chat requests as each user would want."""

    def __init__(
        self,
        store: Store,
        reads: TimedReads,
        upstream: Upstream,
        settings: ServeSettings,
        serving: Deployment,
        observer: Telemetry,
        salt: str,
    ):
        self.store, self.reads, self.upstream, self.settings, self.observer = (
            store,
            reads,
            upstream,
            settings,
            observer,
        )
        self.serving = serving
        self.names = Pseudonyms(salt)
        self._room = min(
            settings.max_prompt_tokens, getattr(upstream, "room", settings.max_prompt_tokens)
        )
        self.wanted: str | None = None
        """The bundle that the store named last."""
        self._capabilities = CapabilityCache()

    # ---- before the upstream

    async def plan(self, request: ChatRequest, body: Mapping[str, Any], user: str | None) -> Plan:
        """Everything up to what the upstream is asked."""
        plain = self.names.hidden(
            {name: value for name, value in body.items() if name != "personalization"}
        )
        if request.n is not None:
            plain["n"] = request.n  # as it was read: 2.0 is a 2 to JSON's eyes
        serving, wishes = self.serving, request.personalization or PersonalizationOptions()
        as_it_is, asked = (
            partial(Plan, plain, plain, serving=serving),
            repair(text_of(body["messages"][-1])),
        )
        # A question in the words of the bundle's task: what scorers and records know is the text
        # within them.
        within = serving.task.input_of(asked)
        question = within or asked
        reason = _why_not(request, body["messages"], user, wishes)
        if reason is not None or user is None:
            return as_it_is(reason or "no-user")
        started = time.perf_counter()
        found = await self._found(serving, user, question, wishes.k or 0)
        if isinstance(found, str):
            return as_it_is(found)
        k = serving.settings.k if wishes.k is None else wishes.k
        ask = partial(_in_its_words, serving.task) if within else str
        placed, shown = place(
            body["messages"],
            found.ranked[:k],
            placement=self.settings.placement,
            max_tokens=self._room,
            ask=ask,
        )
        wanted = wishes.candidates or self.settings.candidates
        return Plan(
            {**plain, "messages": placed},
            plain,
            None,
            serving,
            found.person,
            question,
            visible=found.visible,
            shown=tuple(shown),
            candidates=max(wanted, request.n or 1) if serving.picks and found.warm else 1,
            explain=wishes.explain,
            warm=found.warm,
            seconds={**found.seconds, "prepare": time.perf_counter() - started},
        )

    async def _found(
        self, serving: Deployment, user: str, question: str, wanted: int
    ) -> Found | str:
        """The user with the records for a question; or why there are none. Whatever fails must not
        cost the caller an answer.
        """
        try:
            person = await self._person(serving, user)
        except Exception as error:
            self.observer.failed("store", error)
            return "store-failure"
        if person is None:
            return "unknown-user"
        try:
            search = Search(serving, person, question, self.observer, wanted)
            found = await serving.together.run(search.found, [question], pairs=search.pairs)
        except Overloaded as error:
            self.observer.failed("scoring", error)
            return "overloaded"
        except Exception as error:
            self.observer.failed("retriever", error)
            return "scoring-failure"
        if found is None:
            return "no-history"
        if not found.warm and serving.warming is not None:
            serving.warming.begin(user)
        return found

    async def _person(self, serving: Deployment, user: str) -> UserSnapshot | None:
        """The user as the store has it now, from memory where that is the same."""
        version = (await self.reads.read(partial(self.store.state, user))).version
        if version is None:
            return None
        return serving.people.at_hand(user, version) or await self.reads.read(
            partial(serving.people.load, user)
        )

    # ---- the upstream

    async def answer(self, plan: Plan) -> Reply:
        """The completion for a plan.

        Raises:
            UpstreamError: the upstream gave none.
        """
        if plan.reason is not None:
            return Reply(await self._timed(plan, plan.plain), plan)
        try:
            made = (
                await self._candidates(plan)
                if plan.candidates > 1
                else [await self._timed(plan, plan.body)]
            )
        except UpstreamError as error:
            plan = self.without_records(plan, error)
            return Reply(await self._timed(plan, plan.plain), plan)
        return await self._reply(plan, made)

    def without_records(self, plan: Plan, error: UpstreamError) -> Plan:
        """The plan as the caller asked, where the records may be what the upstream cannot take.

        Raises:
            UpstreamError: the given one, where it is about something else.
        """
        if plan.reason is not None or error.status not in (400, 413, 422):
            raise error
        self.observer.failed("records", error)
        return replace(plan, reason="upstream-refused")

    async def _timed(self, plan: Plan, body: Mapping[str, Any]) -> dict[str, Any]:
        started = time.perf_counter()
        try:
            bare = {name: value for name, value in body.items() if name != "stream_options"}
            completion: dict[str, Any] = await self.upstream.complete({**bare, "stream": False})
        finally:
            plan.seconds["upstream"] = time.perf_counter() - started
        return completion

    async def _candidates(self, plan: Plan) -> list[dict[str, Any]]:
        """The caller's own request first, and samples beside it; those that came before the
        deadline.

        Raises:
            UpstreamError: none came.
        """
        own = int(plan.plain.get("n") or 1)
        started = time.perf_counter()
        bodies = self._bodies(plan, plan.candidates - own)
        made = await self._asked(bodies, own)
        plan.seconds["upstream"] = time.perf_counter() - started
        learn_samples(self._capabilities, bodies[-1], made)
        good = [each for each in made if not isinstance(each, UpstreamError)]
        errors = [each for each in made if isinstance(each, UpstreamError)]
        for error in errors:
            self.observer.failed("candidates", error)
        if not good:
            raise errors[0]
        return good

    def _bodies(self, plan: Plan, samples: int) -> list[dict[str, Any]]:
        """The caller's own request, as many answers as the caller wants, and what brings so many
        samples.
        """
        first = {
            name: value
            for name, value in plan.body.items()
            if name not in ("stream", "stream_options")
        }
        more = {
            **first,
            **({"seed": first["seed"] + 1} if isinstance(first.get("seed"), int) else {}),
        }
        known = self._capabilities.of(str(plan.body.get("model")))
        if "temperature" not in known.refused:
            more["temperature"] = max(
                float(first.get("temperature") or 0.0), self.settings.temperature
            )
        if samples < 1:
            return [first]
        return (
            [first, {**more, "n": samples}] if known.native_n else [first, *_singles(more, samples)]
        )

    async def _asked(self, bodies: Sequence[dict[str, Any]], own: int) -> list[Any]:
        """Completions or `UpstreamError`s, in the bodies' order, as of the deadline, with at least
        what the caller's own request brings.
        """
        made: list[Any] = [
            UpstreamError(504, "the upstream did not answer before the deadline")
        ] * len(bodies)

        async def ask(place: int) -> None:
            try:
                made[place] = await self.upstream.complete(bodies[place])
            except UpstreamError as error:
                made[place] = error
            except (
                Exception
            ) as error:  # which nobody waits for: asyncio would log it with its message
                made[place] = UpstreamError(
                    502, f"the upstream's answer cannot be read ({type(error).__name__})"
                )

        tasks = [asyncio.create_task(ask(place)) for place in range(len(bodies))]
        try:
            await asyncio.wait(tasks, timeout=self.settings.deadline)
            if (
                sum(len(each["choices"]) for each in made if not isinstance(each, UpstreamError))
                < own
            ):
                await tasks[
                    0
                ]  # the caller's own request has as long as it would have had without this program
        finally:
            for task in tasks:
                task.cancel()
        return made

    # ---- behind the upstream

    async def _reply(self, plan: Plan, made: Sequence[dict[str, Any]]) -> Reply:
        choices = [choice for completion in made for choice in completion["choices"]]
        picked = await self._pick(plan, choices) if plan.candidates > 1 else as_they_came(choices)
        count = int(plan.plain.get("n") or 1)
        out = [{**choice, "index": place} for place, choice in enumerate(picked.choices[:count])]
        completion = {**made[0], "choices": out, "usage": usage_of(made)}
        kept = await self._keep(plan, picked)
        if self.settings.personalization:
            completion["personalization"] = _told(plan, picked, kept)
        return Reply(completion, plan, picked.abstained)

    async def _pick(self, plan: Plan, choices: Sequence[dict[str, Any]]) -> Picked:
        """The adapter's order of what came; as it came where the adapter fails."""
        started = time.perf_counter()
        try:
            assert plan.person is not None
            texts = [repair(text_of(choice["message"])) for choice in choices]
            picked = await plan.serving.together.run(
                partial(
                    choose, plan.serving, plan.person, plan.question, plan.visible, choices, texts
                ),
                texts,
                pairs=partial(pairs_of, plan.serving, plan.question, texts),
            )
        except Exception as error:  # whatever it is, it must not cost the caller an answer
            self.observer.failed("adapter", error)
            picked = as_they_came(choices)
        plan.seconds["adapt"] = time.perf_counter() - started
        return picked

    async def _keep(self, plan: Plan, picked: Picked) -> bool:
        """Keep the request for feedback; whether it was."""
        said = [repair(text_of(choice["message"])) for choice in picked.choices]
        candidates = [
            {
                "said": text,
                "text": c.text,
                "answer": c.answer,
                "votes": c.votes,
                "greedy": c.greedy,
                "score": c.score,
            }
            for c, text in zip(picked.candidates, said, strict=False)
        ]
        shown = said[len(candidates) : int(plan.plain.get("n") or 1)]
        repeats = [
            {"candidate": which, "said": text}
            for which, text in zip(picked.repeats, shown, strict=False)
        ]
        content = {"candidates": candidates, "repeats": repeats, "visible": len(plan.visible)}
        try:
            assert plan.person is not None
            request = Request(
                plan.id, plan.person.name, time.time(), plan.serving.id, plan.question, content
            )
            kept = await self.reads.read(
                partial(self.store.add_request, request, version=plan.person.version)
            )
            if not kept:  # deleted while the upstream was asked
                await plan.serving.together.run(
                    partial(plan.serving.forget, plan.person.name), must=True
                )
                texts = [
                    plan.question,
                    *said,
                    *(c.text for c in picked.candidates),
                    *texts_of(plan.person.records),
                ]
                await self.reads.read(partial(plan.serving.forget_texts, self.store, texts))
        except HydraError as error:
            self.observer.failed("store", error)
            return False
        return kept

    # ---- streams

    async def stream(self, plan: Plan) -> AsyncIterator[bytes]:
        """The upstream's own stream, for a plan with one candidate; a personal one is kept for
        feedback, and told of, before it ends.

        Raises:
            UpstreamError: before the first byte.
        """
        pieces = self.upstream.stream(
            {**(plan.plain if plan.reason else plan.body), "stream": True}
        )
        async for piece in (
            pieces if plan.reason is not None else self._told_at_its_end(plan, pieces)
        ):
            yield piece

    async def _told_at_its_end(
        self, plan: Plan, pieces: AsyncIterator[bytes]
    ) -> AsyncIterator[bytes]:
        heard, started = Heard(), time.perf_counter()
        async for piece in pieces:
            if heard.ended:
                yield piece
                continue
            if whole := heard.take(piece):
                yield whole
            if heard.ended:
                plan.seconds["upstream"] = time.perf_counter() - started
                yield await self._last_words(plan, heard) + heard.rest
        if not heard.ended:
            await self._last_words(plan, heard)
            if heard.rest:
                yield heard.rest

    async def _last_words(self, plan: Plan, heard: Heard) -> bytes:
        """Keep what a stream has said; returns the chunk that tells of it, with a choice that says
        nothing: clients read the first one.
        """
        picked = as_they_came(heard.choices)
        kept = any(heard.texts.values()) and await self._keep(plan, picked)
        if not self.settings.personalization:
            return b""
        head = {**chunk_head(f"chatcmpl-{plan.id}", plan.body["model"]), **heard.head}
        return event(
            {**head, "choices": [delta(0, {})], "personalization": _told(plan, picked, kept)}
        )


# ---- small things


def _why_not(
    request: ChatRequest,
    messages: Sequence[Mapping[str, Any]],
    user: str | None,
    wishes: PersonalizationOptions,
) -> str | None:
    if user is None:
        return "no-user"
    if not wishes.enabled:
        return "disabled"
    if request.tools or request.functions or has_more_than_text(messages):
        return "tools"
    if messages[-1].get("role") != "user" or not text_of(messages[-1]).strip():
        return "no-question"
    return None


def _singles(body: dict[str, Any], count: int) -> list[dict[str, Any]]:
    seed = body.get("seed")
    bare = {name: value for name, value in body.items() if name != "n"}
    return [{**bare, "seed": seed + i} if isinstance(seed, int) else bare for i in range(count)]


def _told(plan: Plan, picked: Picked, kept: bool) -> dict[str, Any]:
    """The object `personalization` of a reply."""
    told: dict[str, Any] = {
        "request_id": plan.id if kept else None,
        "records": [record.id for record in plan.shown],
        "warm": plan.warm,
        "candidates": len(picked.candidates),
        "abstained": picked.abstained,
        "scores": [candidate.score for candidate in picked.candidates],
        "seconds": {stage: round(seconds, 4) for stage, seconds in plan.seconds.items()},
    }
    if plan.explain:
        told["texts"] = [
            text_of(choice["message"]) for choice in picked.choices[: len(picked.candidates)]
        ]
        told["probabilities"] = [candidate.probability for candidate in picked.candidates]
        told["shown"] = [
            {"id": record.id, "input": record.input, "output": record.output}
            for record in plan.shown
        ]
    return told
