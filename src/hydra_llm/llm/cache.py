"""Keeps every text of an LLM, so that a repeated call costs nothing and gives the same text. Wraps
any `ChatLLM`; knows no budget and no prices.

A SQLite file with two tables: `requests` (all that was asked, as JSON, under its SHA-256) and
`answers` (one text under its request and its index among the samples; a prompt that was too long
has its refusal at index -1, so that a replay without the LLM cuts it alike). JSON only, never
pickle. Index i is the same row for 4 and for 8 samples: only missing ones are asked for. Several
processes may share the file: the first text stored stays.
"""

import hashlib
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio

from hydra_llm.errors import LLMError, LLMRefused
from hydra_llm.kv import CacheFile
from hydra_llm.llm.base import ChatLLM, PartlyFailed, Sampling
from hydra_llm.types import Generation, Message, Usage

SCHEMA = """
CREATE TABLE IF NOT EXISTS requests (id TEXT PRIMARY KEY, payload TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS answers (
    request TEXT NOT NULL REFERENCES requests (id), candidate INTEGER NOT NULL,
    payload TEXT NOT NULL, PRIMARY KEY (request, candidate)
) WITHOUT ROWID;
"""
REQUEST = "INSERT OR IGNORE INTO requests VALUES (?, ?)"
ANSWER = "INSERT OR IGNORE INTO answers VALUES (?, ?, ?)"
OWN = "SELECT candidate, payload FROM answers WHERE request = ? AND candidate BETWEEN ? AND ?"
ALL = (
    "SELECT r.payload, a.candidate, a.payload FROM answers a JOIN requests r ON r.id = a.request"
    " WHERE a.candidate >= 0 ORDER BY r.id, a.candidate"
)
REFUSED = -1
"""The index of a request's refusal among its answers."""
Row = Mapping[str, Any]
"""One stored text: `text`, `calls`, `prompt_tokens`, `completion_tokens`, `seconds`; the rows of a
call add up to its usage.
"""


def request_of(
    identity: Mapping[str, Any], messages: Sequence[Message], sampling: Sampling
) -> dict[str, Any]:
    """All that changes the output. A greedy answer has no seed: it depends on none."""
    return {
        "llm": dict(identity),
        "messages": [dict(message) for message in messages],
        "temperature": float(sampling.temperature),
        "max_tokens": sampling.max_tokens,
        "stop": list(sampling.stop),
        "seed": sampling.seed if sampling.temperature > 0 else None,
        "choices": list(sampling.choices),
    }


def key_of(request: Mapping[str, Any]) -> str:
    """The SHA-256 of the request's canonical JSON."""
    return hashlib.sha256(_json(request).encode()).hexdigest()


class CachedLLM:
    """Any LLM with its answers kept in `path`. With `replay_only` a missing answer is an error, and
    the LLM is never asked; errors name `name`, by default the path.

    Raises:
        UserFault: the file cannot be opened, or is damaged.
    """

    def __init__(
        self, inner: ChatLLM, path: Path | str, *, replay_only: bool = False, name: str = ""
    ):
        self.inner, self.replay_only, self.name = inner, replay_only, name or str(path)
        self.used: dict[str, set[int]] = {}
        """Key of each request of this process → indices of the texts it got (`REFUSED` among them):
        what a recording holds.
        """
        self.file = CacheFile(Path(path), SCHEMA, "answers", required=True)
        self._replayed = Usage()
        self._unwritten: dict[str, dict[int, Row]] = {}  # the disk refused them: key → rows
        self._locks: dict[str, anyio.Lock] = {}

    @property
    def identity(self) -> Mapping[str, Any]:
        return self.inner.identity

    @property
    def parallel(self) -> int:
        """Calls at once, as far as the inner LLM tells."""
        return int(getattr(self.inner, "parallel", 1))

    @property
    def usage(self) -> Usage:
        """What the inner LLM spent, if it counts, and what the cache answered: tokens and seconds
        as they once were, cost 0.
        """
        spent: Usage = getattr(self.inner, "usage", Usage())
        return spent + self._replayed

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        """Return n texts, kept ones where there are any. Identical calls in flight are made once; n
        greedy texts are one call.

        Raises:
            LLMError: as the inner LLM says, or it gave too few texts, or `replay_only` and the
                answer is not there.
        """
        request = request_of(self.identity, messages, sampling)
        key, distinct = key_of(request), sampling.n if sampling.temperature > 0 else 1
        async with self._turn(key):
            rows = self._read(key, 0, distinct - 1)
            usage = _replayed(rows)
            self._replayed += usage
            for first, count in _runs([index for index in range(distinct) if index not in rows]):
                if self.replay_only:
                    raise self._not_kept(key, first)
                drawn = replace(sampling, n=count, seed=_drawn_with(key, sampling.seed, first))
                made, fault = await _arrived(self.inner.generate(messages, drawn), count)
                rows |= self._write(key, request, dict(enumerate(_rows(made), first)))
                usage += made.usage
                if isinstance(fault, LLMRefused) and fault.fits is not None:
                    refusal = {"refused": str(fault), "fits": fault.fits}
                    self._use(key, [REFUSED])
                    self._write(key, request, {REFUSED: refusal})
                if fault:
                    raise fault
        self._use(key, range(distinct))
        texts = tuple(rows[index]["text"] for index in range(distinct))
        return Generation(texts * (sampling.n // distinct), usage)

    def kept(self, key: str) -> dict[int, Row]:
        """What is stored under a request's key: index → row."""
        return self._read(key, REFUSED, sys.maxsize)

    def keep(self, key: str, rows: Mapping[int, Row]) -> None:
        """Store rows of a recording, whose requests are known by their keys alone."""
        self._write(key, {}, rows)

    def rows(self) -> Iterator[tuple[Mapping[str, Any], int, Row]]:
        """Everything in the file: request, index, stored text with its share of the usage."""
        for request, candidate, payload in self.file.read(ALL):
            yield json.loads(request), candidate, json.loads(payload)

    async def aclose(self) -> None:
        self.file.close()
        await self.inner.aclose()

    @asynccontextmanager
    async def _turn(self, key: str) -> AsyncIterator[None]:
        """One identical call at a time: the next one finds the answers kept."""
        lock = self._locks.setdefault(key, anyio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked():  # else it has passed on to one that waited
                self._locks.pop(key, None)

    def _use(self, key: str, candidates: Iterable[int]) -> None:
        self.used.setdefault(key, set()).update(candidates)

    def _read(self, key: str, first: int, last: int) -> dict[int, Row]:
        rows = self._unwritten.get(key, {})
        found = {index: row for index, row in rows.items() if first <= index <= last}
        for index, payload in self.file.read(OWN, (key, first, last)):
            found[index] = json.loads(payload)
        return found

    def _write(
        self, key: str, request: Mapping[str, Any], rows: Mapping[int, Row]
    ) -> dict[int, Row]:
        """Keep the rows; returns them as they are kept: where another process was first, its text
        is the answer.
        """
        if not rows:
            return {}
        answers = [(key, index, _json(row)) for index, row in rows.items()]
        if not self.file.write((REQUEST, [(key, _json(request))]), (ANSWER, answers)):
            self._unwritten.setdefault(key, {}).update(rows)
            return dict(rows)
        kept = self._read(key, REFUSED, max(rows))
        return {index: kept[index] for index in rows}

    def _not_kept(self, key: str, candidate: int) -> LLMError:
        """The refusal that was kept, or that there is nothing."""
        if refused := self._read(key, REFUSED, REFUSED).get(REFUSED):
            self._use(key, [REFUSED])
            return LLMRefused(refused["refused"], fits=refused["fits"])
        return LLMError(
            f"{self.name}: no kept answer for request {key}, candidate {candidate}, and nothing may"
            " be asked"
        )


def _drawn_with(key: str, seed: int | None, first: int) -> int | None:
    """The seed of a request's sample `first`: that of sample 0 plus `first`, however many are asked
    for at once.

    Each prompt has seeds of its own: with one for all, sample i would be the same quantile of every
    answer's distribution, and the samples' noise common to all queries.
    """
    return None if seed is None else (seed + int(key[:8], 16)) % 2**31 + first


async def _arrived(call: Awaitable[Generation], count: int) -> tuple[Generation, LLMError | None]:
    """The texts that came, `count` at most, and the error if there are fewer."""
    try:
        made = await call
    except PartlyFailed as error:
        return error.made, error
    except LLMError as error:
        return Generation(()), error
    if len(made.texts) < count:
        return made, PartlyFailed(f"the LLM gave {len(made.texts)} of {count} texts", made)
    return Generation(made.texts[:count], made.usage), None


def _rows(made: Generation) -> list[Row]:
    """One row per text; calls and prompt are the first one's, the rest is shared out evenly."""
    count, usage = len(made.texts), made.usage
    even, rest = divmod(usage.completion_tokens, count or 1)
    return [
        {
            "text": text,
            "calls": usage.calls if index == 0 else 0,
            "prompt_tokens": usage.prompt_tokens if index == 0 else 0,
            "completion_tokens": even + (index < rest),
            "seconds": usage.seconds / count,
        }
        for index, text in enumerate(made.texts)
    ]


def _replayed(rows: Mapping[int, Row]) -> Usage:
    """What kept rows cost when they were made, as cached calls; no money is spent again."""
    total = Usage()
    for row in rows.values():
        prompt, completion = row["prompt_tokens"], row["completion_tokens"]
        total += Usage(0, row["calls"], 0, prompt, completion, seconds=row["seconds"])
    return total


def _runs(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbouring indices as (first, count): each run is one call."""
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and sum(runs[-1]) == index:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((index, 1))
    return runs


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
