"""Keeps every text that an LLM gave, so that a repeat costs nothing and gives the same (DESIGN 6).
Wraps any `ChatLLM`.

A SQLite file with two tables: `requests` (all that was asked, as JSON, under its SHA-256) and
`answers` (one text, under its request and its index among the candidates; a prompt that was too
long has its refusal at index -1, for a replay without the LLM to cut it as it was cut). JSON only,
never pickle. Index i is the same row whether 4 or 8 candidates were asked for; only missing ones
are asked for. Several processes may share the file: what was stored first stays. Knows no budget
and no prices.
"""

import hashlib
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import groupby
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
REFUSED = -1
"""Where a request's refusal stands among its answers."""
Row = Mapping[str, Any]
"""One stored text: `text`, `calls`, `prompt_tokens`, `completion_tokens`, `seconds`; the shares of
a call's rows add up to the call.
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
    the LLM is never asked.

    Raises:
        UserFault: the file cannot be opened, or is damaged.
    """

    def __init__(
        self, inner: ChatLLM, path: Path | str, *, replay_only: bool = False, name: str = ""
    ):
        self.inner, self.path, self.replay_only, self.name = (
            inner,
            Path(path),
            replay_only,
            name or str(path),
        )
        self.used: dict[str, set[int]] = {}
        """Key of each request that this process made → which candidates it got (`REFUSED` among
        them): what a recording holds.
        """
        self._replayed = Usage()
        self._unwritten: dict[
            tuple[str, int], Row
        ] = {}  # answers that the disk refused: kept for this process
        self._turns: dict[str, anyio.Lock] = {}
        self.file = CacheFile(self.path, SCHEMA, "answers", required=True)

    @property
    def identity(self) -> Mapping[str, Any]:
        return self.inner.identity

    @property
    def parallel(self) -> int:
        """Calls at once, as far as the inner LLM tells."""
        return int(getattr(self.inner, "parallel", 1))

    @property
    def usage(self) -> Usage:
        """What the inner LLM spent (if it counts), and what the cache answered: tokens and seconds
        as they once were, cost 0.
        """
        spent: Usage = getattr(self.inner, "usage", Usage())
        return spent + self._replayed

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        """Return n texts, kept ones first looked up; identical calls in flight are made once, n
        greedy texts are one call.

        Raises:
            LLMError: as the inner LLM says, or it gave too few texts, or `replay_only` and the
                answer is not there.
        """
        request = request_of(self.identity, messages, sampling)
        key, distinct = key_of(request), sampling.n if sampling.temperature > 0 else 1
        async with self._turn(key):
            rows = self._read(key, distinct)
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
                    self._use(key, [REFUSED])
                    self._write(
                        key, request, {REFUSED: {"refused": str(fault), "fits": fault.fits}}
                    )
                if fault:
                    raise fault
        self._use(key, range(distinct))
        texts = tuple(rows[index]["text"] for index in range(distinct))
        return Generation(texts * (sampling.n // distinct), usage)

    def kept(self, key: str) -> dict[int, Row]:
        """What is stored under a request's key: candidate → row."""
        return self._read(key, sys.maxsize, REFUSED)

    def keep(self, key: str, rows: Mapping[int, Row]) -> None:
        """Store rows of a recording, whose requests are known by their keys alone."""
        self._write(key, {}, rows)

    def _use(self, key: str, candidates: Iterable[int]) -> None:
        self.used.setdefault(key, set()).update(candidates)

    def rows(self) -> Iterator[tuple[Mapping[str, Any], int, Row]]:
        """Everything in the file: the request, the candidate's index, the stored text with its
        share of the usage.
        """
        query = (
            "SELECT r.payload, a.candidate, a.payload FROM answers a JOIN requests r ON r.id ="
            " a.request"
        )
        query += " WHERE a.candidate >= 0 ORDER BY r.id, a.candidate"
        for request, candidate, payload in self.file.read(query):
            yield json.loads(request), candidate, json.loads(payload)

    async def aclose(self) -> None:
        self.file.close()
        await self.inner.aclose()

    @asynccontextmanager
    async def _turn(self, key: str) -> AsyncIterator[None]:
        """One identical call at a time: the next one finds the answers kept."""
        lock = self._turns.setdefault(key, anyio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked():  # else it has passed on to one that waited
                self._turns.pop(key, None)

    def _read(self, key: str, count: int, first: int = 0) -> dict[int, Row]:
        query = (
            "SELECT candidate, payload FROM answers WHERE request = ? AND candidate >= ? AND"
            " candidate < ?"
        )
        found = self.file.read(query, (key, first, count))
        unwritten = {
            index: row
            for (request, index), row in self._unwritten.items()
            if request == key and first <= index < count
        }
        return unwritten | {index: json.loads(payload) for index, payload in found}

    def _not_kept(self, key: str, candidate: int) -> LLMError:
        """The refusal that was kept, or that there is nothing."""
        if refused := self._read(key, 0, REFUSED).get(REFUSED):
            self._use(key, [REFUSED])
            return LLMRefused(refused["refused"], fits=refused["fits"])
        return LLMError(
            f"{self.name}: no kept answer for request {key}, candidate {candidate}, and nothing may"
            " be asked"
        )

    def _write(
        self, key: str, request: Mapping[str, Any], rows: Mapping[int, Row]
    ) -> Mapping[int, Row]:
        """Keep the rows; returns them as they are kept: where another process was first, its text
        is the answer.
        """
        if not rows:
            return rows
        kept = self.file.write(  # one transaction: a kill leaves all of a call or nothing
            ("INSERT OR IGNORE INTO requests VALUES (?, ?)", [(key, _json(request))]),
            (
                "INSERT OR IGNORE INTO answers VALUES (?, ?, ?)",
                [(key, index, _json(row)) for index, row in rows.items()],
            ),
        )
        if not kept:
            self._unwritten |= {(key, index): row for index, row in rows.items()}
            return rows
        stored = self._read(key, max(rows) + 1, REFUSED)
        return {index: stored[index] for index in rows}


def _drawn_with(key: str, seed: int | None, first: int) -> int | None:
    """The seed of a request's sample `first`; sample i has that of sample 0 plus i, however many
    are asked for at once.

    Each prompt has draws of its own: with one seed for all, sample i would be the same quantile of
    every answer's distribution, and the noise of the samples would be common to all queries.
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
    """One row per text; what the call cost is shared out: calls and prompt to the first, the rest
    evenly.
    """
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
        total += Usage(
            cached=row["calls"],
            prompt_tokens=row["prompt_tokens"],
            completion_tokens=row["completion_tokens"],
            seconds=row["seconds"],
        )
    return total


def _runs(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbouring indices as (first, count): each run is one call."""
    groups = [
        list(group) for _, group in groupby(enumerate(indices), lambda pair: pair[1] - pair[0])
    ]
    return [(group[0][1], len(group)) for group in groups]


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
