"""A cache around any `ChatLLM`: a repeated call costs nothing and gives the same text.

A SQLite file with two tables: `requests` (JSON by its SHA-256) and `answers` (JSON by request and
index of the sample). Sample i is the same row for 4 and for 8 samples: only missing ones are drawn.
Several processes may share the file: the first text stored stays.

A recording (`bench run --record`, `--replay`) is one run's part of it: gzipped JSON lines with the
LLM's identity, then each request's key (never a prompt) and rows. The same run gives equal bytes.
"""

import gzip
import hashlib
import json
import zlib
from collections import defaultdict
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import anyio

from hydra_llm.errors import LLMError, LLMRefused, UserFault
from hydra_llm.kv import IN_MEMORY, CacheFile
from hydra_llm.llm.base import ChatLLM, PartlyFailed, Sampling
from hydra_llm.types import Generation, Message, Usage

SCHEMA = """
CREATE TABLE IF NOT EXISTS requests (id TEXT PRIMARY KEY, payload TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS answers (
    request TEXT NOT NULL REFERENCES requests (id), candidate INTEGER NOT NULL,
    payload TEXT NOT NULL, PRIMARY KEY (request, candidate)
) WITHOUT ROWID;
"""
FORMAT = 1  # of a recording
REFUSED = -1  # index of a refusal for length: a replay without the LLM cuts the prompt alike
CHOICES = -2  # index of the choices' probabilities; the row is empty where the LLM tells none
Json = Mapping[str, Any]
Rows = dict[int, Json]  # a request's texts by index, each with its share of the call's usage


def canonical(value: Any) -> str:
    """The one JSON text of a value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def request_of(identity: Json, messages: Sequence[Message], sampling: Sampling) -> Json:
    """All that changes the output. A greedy answer has no seed: it depends on none."""
    fields = asdict(sampling) | {"temperature": float(sampling.temperature)}
    # A call that asked for probabilities answers one that does not; no `form`: as in older caches.
    for name in ("n", "probabilities", *(() if sampling.form else ("form",))):
        del fields[name]
    if not sampling.temperature > 0:
        fields["seed"] = None
    return {"llm": dict(identity), "messages": list(map(dict, messages)), **fields}


def key_of(request: Json) -> str:
    """The SHA-256 of the request's canonical JSON."""
    return hashlib.sha256(canonical(request).encode()).hexdigest()


class CachedLLM:
    """An LLM whose answers are kept in `path`; with `replay_only` a missing answer is an error.

    `used` holds the indices that each request of this process got, by key, for a recording. Errors
    name `name`, by default the path. UserFault: the file cannot be opened, or is damaged.
    """

    def __init__(self, inner: ChatLLM, path: Path | str, replay_only: bool = False, name: str = ""):
        self.inner, self.replay_only, self.name = inner, replay_only, name or str(path)
        self.used: defaultdict[str, set[int]] = defaultdict(set)
        self.file = CacheFile(Path(path), SCHEMA, "answers", required=True)
        self._replayed = Usage()
        self._unwritten: dict[str, Rows] = {}  # rows that the disk refused, by key
        self._locks: WeakValueDictionary[str, anyio.Lock] = WeakValueDictionary()

    @property
    def identity(self) -> Json:
        return self.inner.identity

    @property
    def parallel(self) -> int:
        """Calls at once, as of now."""
        return int(getattr(self.inner, "parallel", 1))

    @property
    def usage(self) -> Usage:
        """What the inner LLM spent, if it counts, and what the cache answered, at no cost."""
        return self._replayed + getattr(self.inner, "usage", Usage())

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        """Return n texts, cached ones first. Identical calls run once; n greedy texts are one call.
        Raises LLMError: as the inner LLM says, too few texts, or `replay_only` and no answer.
        """
        request = request_of(self.identity, messages, sampling)
        key, distinct = key_of(request), sampling.n if sampling.temperature > 0 else 1
        async with self._locks.setdefault(key, anyio.Lock()):  # a second call finds the answers
            stored = self.stored(key)
            rows = {index: row for index, row in stored.items() if 0 <= index < distinct}
            self._replayed += (usage := _usage_of(rows))
            missing = [index for index in range(distinct) if index not in rows]
            wanted = sampling.probabilities and bool(sampling.choices)
            shares: Json | None = stored.get(CHOICES) if wanted else None
            if wanted and shares is None and not missing and not self.replay_only:
                missing = [0]  # asked once more, for the probabilities alone
            if missing and self.replay_only:
                raise self._not_kept(key, stored, missing[0])
            for _, numbered in groupby(enumerate(missing), lambda item: item[1] - item[0]):
                run = [index for _, index in numbered]  # neighbours are drawn in one call
                drawn = replace(sampling, n=len(run), seed=_sample_seed(key, sampling.seed, run[0]))
                generation, error = await _receive(self.inner.generate(messages, drawn), len(run))
                if wanted and error is None:
                    told: Rows = {CHOICES: {"probabilities": dict(generation.probabilities)}}
                    shares = self.store(key, told, request)[CHOICES]
                rows |= self.store(key, dict(zip(run, _rows(generation), strict=False)), request)
                usage += generation.usage
                if isinstance(error, LLMRefused) and error.fits is not None:
                    self.used[key].add(REFUSED)
                    self.store(key, {REFUSED: {"refused": str(error), "fits": error.fits}}, request)
                if error:
                    raise error
        self.used[key].update(range(distinct))
        probabilities: Mapping[str, float] = {}
        if shares is not None:
            self.used[key].add(CHOICES)
            probabilities = shares["probabilities"]
        texts = tuple(rows[index]["text"] for index in range(distinct))
        return Generation(texts * (sampling.n // distinct), usage, probabilities=probabilities)

    def _not_kept(self, key: str, stored: Rows, index: int) -> LLMError:
        """The error of a replay that lacks a text; the refusal where that was kept."""
        if refused := stored.get(REFUSED):
            self.used[key].add(REFUSED)
            return LLMRefused(refused["refused"], fits=refused["fits"])
        lacks = f"no kept answer for request {key}, candidate {index}"
        error = LLMError(f"{self.name}: {lacks}, and nothing may be asked")
        error.lasting = True
        return error

    def stored(self, key: str) -> Rows:
        """The stored rows of a request by index, its refusal among them."""
        query = "SELECT candidate, payload FROM answers WHERE request = ? ORDER BY candidate"
        rows = {index: json.loads(payload) for index, payload in self.file.read(query, (key,))}
        return self._unwritten.get(key, {}) | rows

    def store(self, key: str, rows: Rows, request: Json | None = None) -> Rows:
        """Store rows and return them as stored: of several processes the first one's text stays.
        Of a recording's requests only the keys are known.
        """
        if not rows:
            return {}
        answers = [(key, index, canonical(row)) for index, row in rows.items()]
        if not self.file.write(
            ("INSERT OR IGNORE INTO requests VALUES (?, ?)", [(key, canonical(request or {}))]),
            ("INSERT OR IGNORE INTO answers VALUES (?, ?, ?)", answers),
        ):
            self._unwritten.setdefault(key, {}).update(rows)
            return dict(rows)
        stored = self.stored(key)
        return {index: stored[index] for index in rows}

    async def aclose(self) -> None:
        self.file.close()
        await self.inner.aclose()


def _usage_of(rows: Rows) -> Usage:
    """Of kept texts, as cached calls: no money is spent again."""
    usage = Usage()
    for row in rows.values():
        tokens = row["prompt_tokens"], row["completion_tokens"]
        spent = Usage(0, row["calls"], 0, *(count or 0 for count in tokens))
        usage += replace(spent, seconds=row["seconds"], untold=int(None in tokens))
    return usage


def _sample_seed(key: str, seed: int | None, first: int) -> int | None:
    """The seed of a request's sample `first`, however many are drawn at once. Each prompt has its
    own: else sample i would be the same quantile of every answer distribution.
    """
    return None if seed is None else (seed + int(key[:8], 16)) % 2**31 + first


async def _receive(call: Awaitable[Generation], count: int) -> tuple[Generation, LLMError | None]:
    """At most `count` texts, and the error if there are fewer."""
    try:
        generation = await call
    except LLMError as error:
        return getattr(error, "partial", Generation(())), error
    if (received := len(generation.texts)) < count:
        return generation, PartlyFailed(f"the LLM gave {received} of {count} texts", generation)
    return replace(generation, texts=generation.texts[:count], ends=()), None


def _rows(generation: Generation) -> list[Json]:
    """One row per text; calls and prompt are the first one's, the rest is shared out evenly."""
    count, usage, rows = len(generation.texts), generation.usage, list[Json]()
    even, rest = divmod(usage.completion_tokens, count or 1)
    for index, text in enumerate(generation.texts):
        calls, prompt = (0, 0) if index else (usage.calls, usage.prompt_tokens)
        tokens = (None, None) if usage.untold else (prompt, even + (index < rest))
        cost = {"calls": calls, "prompt_tokens": tokens[0], "completion_tokens": tokens[1]}
        rows.append({"text": text, **cost, "seconds": usage.seconds / count})
    return rows


@dataclass(frozen=True)
class RecordedLLM:
    """The LLM of a recording: it has an identity, and is never called."""

    identity: Json

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        raise AssertionError("a recorded LLM was called")

    async def aclose(self) -> None:
        """Nothing to release."""


def write_recording(file: Path, llm: CachedLLM) -> int:
    """Add this process's requests to the file; returns how many it holds then.
    Raises UserFault: the file cannot be written, or is a recording of another LLM.
    """
    requests = read_recording(file, llm)[1] if file.exists() else {}
    for key, used in llm.used.items():
        stored, rows = llm.stored(key), requests.setdefault(key, {})
        rows.update((index, stored[index]) for index in sorted(used) if index in stored)
    lines: list[Any] = [{"format": FORMAT, "llm": dict(llm.identity)}]
    lines += [{"key": key, "rows": requests[key]} for key in sorted(requests)]
    text = "".join(canonical(line) + "\n" for line in lines)
    temporary = file.with_name(file.name + ".part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(gzip.compress(text.encode("ascii"), mtime=0))
        temporary.replace(file)
    except OSError as error:
        raise UserFault(f"{file}: the recording cannot be written ({error.strerror})") from None
    return len(requests)


def merge_recording(file: Path, llm: CachedLLM) -> None:
    """Put a recording's answers into the cache of the same LLM, to resume another machine's run."""
    for key, rows in read_recording(file, llm)[1].items():
        llm.store(key, rows)


def read_recording(file: Path, llm: CachedLLM | None = None) -> tuple[Json, dict[str, Rows]]:
    """The LLM's identity, and each request's rows. Raises UserFault: not there, damaged, of a newer
    format, or of another LLM than `llm`.
    """
    try:
        content = gzip.decompress(file.read_bytes()).decode("ascii")
        lines = map(json.loads, content.splitlines())
        header = next(lines)
        if (version := header["format"]) > FORMAT:
            fault = f"format {version} is made by a newer hydra-llm: install that one"
            raise UserFault(f"{file}: {fault}")
        rows = ((line["key"], line["rows"].items()) for line in lines)
        requests = {key: {int(i): row for i, row in items} for key, items in rows}
        identity = header["llm"]
    except (StopIteration, KeyError, TypeError, AttributeError) as error:
        raise UserFault(f"{file}: is no recording ({type(error).__name__}: {error})") from None
    except OSError as error:  # not there, or no gzip
        raise UserFault(f"{file}: the recording cannot be read ({error})") from None
    except (ValueError, EOFError, zlib.error) as error:
        raise UserFault(f"{file}: the recording is damaged ({error})") from None
    if llm is not None and identity != dict(llm.identity):
        other = f"is a recording of another LLM ({identity.get('model')})"
        raise UserFault(f"{file}: {other}: take another file")
    return identity, requests


def open_recording(file: Path) -> CachedLLM:
    """The recorded LLM: a request that is not in the recording is an error."""
    identity, requests = read_recording(file)
    llm = CachedLLM(RecordedLLM(identity), IN_MEMORY, replay_only=True, name=str(file))
    for key, rows in requests.items():
        llm.store(key, rows)
    return llm
