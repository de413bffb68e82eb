"""An OpenAI-compatible endpoint by its Batch API. Requests are collected until no further one
comes, then sent as one batch; what depends on their answers is in a later one. A batch is on
disk before it is sent (`batch_state.py`): the same command finds it again and sends nothing
twice. The first call of all is made directly: a wrong key, model or parameter shows at once.
"""

from hydra_llm.extras import require

require("openai", "the Batch API")

import json
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio
import openai

from hydra_llm.config import Settings
from hydra_llm.errors import BatchPending, BatchRefused, LLMError, LLMRefused
from hydra_llm.llm.base import Batch, Sampling
from hydra_llm.llm.batch_state import BatchState, KeptBatch
from hydra_llm.llm.cache import canonical
from hydra_llm.llm.endpoint import Capabilities, CapabilityCache, endpoint_of
from hydra_llm.llm.limiter import Gate
from hydra_llm.llm.openai import OpenAILLM
from hydra_llm.llm.wire import failure
from hydra_llm.types import Generation, Message

MOST_REQUESTS, MOST_BYTES = 50_000, 200_000_000  # of a batch's file
AT_ONCE = 100_000  # calls that may wait
QUIET = 1.0  # seconds without a further request, after which a batch is sent
POLL, MOST_POLL = 5.0, 60.0  # seconds between two looks at a batch, at first and at most
AGAIN = frozenset((408, 409, 429, 500, 502, 503, 504))  # of one request: in another batch
ENDED = frozenset(("completed", "failed", "expired", "cancelled"))
OURS = "hydra_llm"  # the metadata's name of our id
PATH = "/v1/chat/completions"

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Ticket:
    """A request that waits for its answer."""

    id: str
    body: Mapping[str, Any]
    attempts: int = 0
    batch: str = ""  # our id; empty while in none
    reply: tuple[int, bytes] | None = None
    error: LLMError | None = None

    @property
    def is_open(self) -> bool:
        return self.reply is None and self.error is None

    @property
    def line(self) -> bytes:
        row = {"custom_id": self.id, "method": "POST", "url": PATH, "body": self.body}
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"


class BatchLLM(OpenAILLM):
    """As `OpenAILLM`; `waits`: until batches have ended, else BatchPending once they are sent."""

    def __init__(self, model: str, *, state: Path, waits: bool = True, **options: Any):
        super().__init__(model, **options)
        self.waits, self.state = waits, BatchState(state, self.identity)
        self.most_requests, self.most_bytes = MOST_REQUESTS, MOST_BYTES
        self._capabilities = CapabilityCache(seconds=math.inf)  # batches take hours
        self._retries = int(options.get("retries", 3))
        self._first, self._driver = Gate(lambda: 1), Gate(lambda: 1)
        self._direct = False  # while the first call is made
        self._known = False  # whether what the model takes is known
        self._taken_up = False  # whether what an earlier run has sent is known
        self._narrow = False  # whether one batch is sent after the other
        self._tickets: dict[str, Ticket] = {}  # the open ones
        self._numbers: Counter[str] = Counter()  # of requests with the same body
        self._seconds = 0.0  # a request's share of its batch's time
        if kept := self.state.capabilities():
            refused = frozenset(kept["refused"])
            self._capabilities.learn(model, Capabilities(**{**kept, "refused": refused}))
            self._known = True

    @property
    def parallel(self) -> int:
        return AT_ONCE

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        """As `OpenAILLM` says; the first call is made directly, and the others wait for it."""
        if not self._known:
            async with self._first:
                if not self._known:
                    self._direct = True
                    try:
                        generation = await super().generate(messages, sampling)
                    except LLMRefused:
                        raise
                    except LLMError as error:  # as each one's would
                        raise BatchPending(f"no batch was sent: {error}") from None
                    finally:
                        self._direct = False
                    self._known = True
                    return generation
        return await super().generate(messages, sampling)

    async def cancel(self, batch: str) -> str:
        """Cancel a batch by the provider's id; its status then."""
        answer = await self._told(self._connected().batches.cancel(batch))
        return str(answer.status)

    async def status(self, kept: KeptBatch) -> dict[str, Any]:
        """A batch as the provider tells it now, with the requests that are done."""
        if kept.batch is None:
            return kept.to_json()
        batch = await self._told(self._connected().batches.retrieve(kept.batch))
        counts = batch.request_counts
        done = {"done": counts.completed, "failed": counts.failed} if counts else {}
        return {**kept.to_json(), "status": batch.status, **done}

    async def aclose(self) -> None:
        self.state.close()
        await super().aclose()

    def _read(self, answer: Mapping[str, Any], wanted: Sequence[str]) -> Generation:
        generation = super()._read(answer, wanted)
        seconds = 0.0 if self._direct else self._seconds
        return replace(generation, usage=replace(generation.usage, seconds=seconds))

    async def _post(self, sent: Mapping[str, Any]) -> tuple[int, bytes]:
        """Status and content of the answer, when its batch has ended. One of those that wait does
        the work of all.
        """
        if self._direct:
            return await super()._post(sent)
        body = {"model": self.model, **sent}
        digest = sha256(canonical([dict(self.identity), body]).encode()).hexdigest()[:40]
        ticket = Ticket(f"{digest}-{self._numbers[digest]}", body)
        self._numbers[digest] += 1  # equal requests are as many answers
        self._tickets[ticket.id] = ticket
        try:
            while ticket.is_open:
                async with self._driver:
                    if ticket.is_open:
                        await self._step()
        finally:
            self._tickets.pop(ticket.id, None)
        if ticket.error is not None:
            raise ticket.error
        assert ticket.reply is not None
        return ticket.reply

    async def _step(self) -> None:
        """Send what waits, and look after what was sent until a batch has ended."""
        try:
            if not self._taken_up:
                await self._take_up()
            if any(not ticket.batch for ticket in self._open()):
                await self._quiet()
                await self._send_batches()
            await self._collect()
        except LLMError as error:
            refused = isinstance(error, LLMRefused)
            stop = BatchRefused(str(error)) if refused else error
            for ticket in self._open():
                ticket.error = stop

    def _open(self) -> list[Ticket]:
        return [ticket for ticket in self._tickets.values() if ticket.is_open]

    async def _quiet(self) -> None:
        """Wait until no further request comes."""
        before = -1
        while before != (now := self._numbers.total()):
            before = now
            await anyio.sleep(QUIET)

    async def _take_up(self) -> None:
        """Find what an earlier run has sent without being told the batch's id."""
        for kept in self.state.batches():
            if kept.batch is None and kept.file is None:
                self.state.forget(kept.id)  # it was not sent
            elif kept.batch is None:
                found = await self._find(kept.id, kept.created)
                if found is None:
                    self.state.forget(kept.id)
                else:
                    self.state.update(kept.id, batch=found, status="sent")
        self._taken_up = True

    async def _find(self, id: str, created: float) -> str | None:
        """The provider's id of the batch that carries our id."""
        listed = await self._told(self._connected().batches.list(limit=100))
        while True:
            for batch in listed.data:
                if (batch.metadata or {}).get(OURS) == id:
                    return str(batch.id)
            if not listed.has_next_page() or listed.data[-1].created_at < created - 86400:
                return None
            listed = await self._told(listed.get_next_page())

    async def _send_batches(self) -> None:
        waiting = []
        for ticket in self._open():
            if not ticket.batch and ticket.attempts == 0:
                ticket.batch = self.state.batch_of(ticket.id) or ""
            if not ticket.batch:
                waiting.append(ticket)
        for part in self._parts(waiting):
            if self._narrow and any(ticket.batch for ticket in self._open()):
                return  # one after the other
            await self._send_batch(part)

    def _parts(self, tickets: Sequence[Ticket]) -> Iterator[list[Ticket]]:
        """As many as a file may hold."""
        part, size = list[Ticket](), 0
        for ticket in tickets:
            length = len(ticket.line)
            if part and (len(part) == self.most_requests or size + length > self.most_bytes):
                yield part
                part, size = [], 0
            part.append(ticket)
            size += length
        if part:
            yield part

    async def _send_batch(self, tickets: Sequence[Ticket]) -> None:
        id = uuid4().hex
        capabilities = asdict(self.capabilities)
        capabilities["refused"] = sorted(capabilities["refused"])
        self.state.begin(id, [ticket.id for ticket in tickets], capabilities)
        content = b"".join(ticket.line for ticket in tickets)
        upload = ("requests.jsonl", content, "application/jsonl")
        client = self._connected()
        try:
            file = await self._told(client.files.create(file=upload, purpose="batch"))
        except LLMError:
            self.state.forget(id)
            raise
        self.state.update(id, file=file.id)
        batch = await self._create(id, file.id)
        self.state.update(id, batch=batch, status="sent")
        for ticket in tickets:
            ticket.batch, ticket.attempts = id, ticket.attempts + 1
        log.info("batch %s of %s requests was sent", batch, f"{len(tickets):,}")

    async def _create(self, id: str, file: str) -> str:
        """Make the batch of a file. Where no answer came, it is looked for before it is tried
        again: the SDK's own retries would make a second one.
        """
        create: Any = self._connected().with_options(max_retries=0).batches.create
        make = partial(create, input_file_id=file, endpoint=PATH, completion_window="24h")
        for attempt in range(self._retries + 1):
            try:
                return str((await self._told(make(metadata={OURS: id}))).id)
            except LLMRefused:
                self.state.forget(id)
                raise
            except LLMError:
                if found := await self._find(id, math.inf):
                    return found
                if attempt == self._retries:
                    raise
                await anyio.sleep(min(0.5 * 2**attempt, 8.0))
        raise AssertionError

    async def _collect(self) -> None:
        """Look at the batches of those that wait until one has ended; give out its answers."""
        pause, shown = POLL, ""
        while True:
            groups: dict[str, list[Ticket]] = defaultdict(list)
            for ticket in self._open():
                groups[ticket.batch].append(ticket)
            kept = {own.id: own for own in self.state.batches()}
            if groups.pop("", []) and not (self._narrow and groups):
                return  # some came meanwhile
            done = total = 0
            for id, tickets in groups.items():
                batch = await self._retrieved(kept.get(id))
                if batch is None:
                    self._ask_again(tickets, "is not known any more")
                    self.state.forget(id)
                    return
                if batch.status in ENDED:
                    await self._give_out(kept[id], batch, tickets)
                    return
                done += batch.request_counts.completed if batch.request_counts else 0
                total += kept[id].requests
            line = f"{done:,} of {total:,} requests in {len(groups)} batches are answered"
            if not self.waits:
                raise BatchPending(f"{line}: run the same command again to go on")
            if line != shown:
                log.info(line)
            shown = line
            await anyio.sleep(pause)
            pause = min(1.5 * pause, MOST_POLL)

    async def _retrieved(self, kept: KeptBatch | None) -> Any:
        """A batch as it is now; None: the provider does not know it any more."""
        try:
            known = kept and kept.batch
            return known and await self._told(self._connected().batches.retrieve(known))
        except LLMRefused:
            return None

    async def _give_out(self, kept: KeptBatch, batch: Any, tickets: Sequence[Ticket]) -> None:
        """Give the answers of a batch that has ended to those that wait for them."""
        if batch.status == "failed":
            self.state.forget(kept.id)
            self._refuse(batch, tickets)
            return
        self.state.update(kept.id, status=batch.status)
        begun, ended = batch.in_progress_at or batch.created_at, batch.completed_at
        self._seconds = max(1.0, (ended or begun) - begun) / kept.requests
        lines: dict[str, Mapping[str, Any]] = {}
        for file in filter(None, (batch.output_file_id, batch.error_file_id)):
            lines |= await self._lines(file)
        unanswered = []
        for ticket in tickets:
            response = lines.get(ticket.id, {}).get("response") or {}
            status = int(response.get("status_code") or 0)
            content = json.dumps(response.get("body")).encode()
            if status == 200 and (fault := failure(status, content)):
                status = fault.status or 502
            if status == 0 or status in AGAIN:
                unanswered.append(ticket)
            else:
                ticket.reply = status, content
        failed = [t.id for t in tickets if t.reply is None or t.reply[0] >= 300]
        self.state.forget_requests(failed)
        if batch.status == "cancelled":
            stopped = f"the batch {batch.id} was cancelled: the same command sends the rest again"
            for ticket in unanswered:
                ticket.error = BatchPending(stopped)
        else:
            self._ask_again(unanswered, f"was {batch.status} without its answer")
        log.info("batch %s is %s: %s answers", batch.id, batch.status, f"{len(lines):,}")

    async def _lines(self, file: str) -> dict[str, Mapping[str, Any]]:
        """A file's lines by their `custom_id`, without those that cannot be read."""
        try:
            content = (await self._told(self._connected().files.content(file))).content
        except LLMRefused:
            return {}
        lines = {}
        for text in content.splitlines():
            try:
                line = json.loads(text)
                lines[str(line["custom_id"])] = line
            except (ValueError, KeyError, TypeError):
                continue
        return lines

    def _ask_again(self, tickets: Sequence[Ticket], why: str) -> None:
        """In another batch, a few times."""
        for ticket in tickets:
            if ticket.attempts > self._retries:
                ticket.error = LLMError(self._line(f"the batch {why}"))
            ticket.batch, ticket.attempts = "", max(1, ticket.attempts)

    def _refuse(self, batch: Any, tickets: Sequence[Ticket]) -> None:
        """A batch was refused as a whole: half as large where too much waits, else an error."""
        errors = batch.errors.data if batch.errors and batch.errors.data else []
        codes = {error.code for error in errors}
        if "token_limit_exceeded" in codes and len(tickets) > 1:
            self._narrow, self.most_requests = True, max(1, len(tickets) // 2)
            for ticket in tickets:
                ticket.batch, ticket.attempts = "", max(1, ticket.attempts - 1)
            return
        told = errors[0].message if errors else "no reason was told"
        raise LLMRefused(self._line(f"the batch {batch.id} was refused: {told}"))

    async def _told(self, call: Any) -> Any:
        """What files and batches answer. LLMRefused: it will fail again. BatchPending: the endpoint
        cannot be reached, or fails.
        """
        try:
            return await call
        except openai.APIStatusError as error:
            line = self._line(f"batches: HTTP {error.status_code}: {error.message}")
            again = error.status_code in AGAIN or error.status_code >= 500
            raise (BatchPending if again else LLMRefused)(line) from None
        except (openai.OpenAIError, ValueError) as error:
            line = self._line(f"batches: no answer: {error.__cause__ or error}")
            raise BatchPending(f"{line}; run the same command again to go on") from None


def from_spec(rest: str, settings: Settings, batch: Batch = "wait") -> BatchLLM:
    """`openai:MODEL[@URL]` by its Batch API; its state lies in the settings' cache folder."""
    model, url = endpoint_of(rest)
    options = settings.model_dump(include={"timeout", "retries"})
    state = settings.cache / "batches.sqlite"
    return BatchLLM(model, base_url=url, state=state, waits=batch == "wait", **options)
