"""A run's answers in one file, to repeat it without the LLM (`bench run --record`, `--replay`).

Gzipped JSON lines: the LLM's identity, then each request's key (a SHA-256, never a prompt) with its
texts and what they cost. The same run gives the same bytes.
"""

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra_llm.errors import UserFault
from hydra_llm.kv import IN_MEMORY
from hydra_llm.llm.base import Sampling
from hydra_llm.llm.cache import CachedLLM, canonical
from hydra_llm.types import Generation, Message

FORMAT = 1
Requests = dict[str, dict[int, Any]]  # key → index of the text → row


@dataclass(frozen=True)
class RecordedLLM:
    """The LLM of a recording: it has an identity, and is never called."""

    identity: Mapping[str, Any]

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        raise AssertionError("a recorded LLM was called")

    async def aclose(self) -> None:
        """Nothing to release."""


def write_recording(file: Path, llm: CachedLLM) -> int:
    """Add this process's requests to the file; returns how many it holds then.

    Raises UserFault: the file cannot be written, or is a recording of another LLM.
    """
    requests = _of_llm(file, llm) if file.exists() else {}
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
    for key, rows in _of_llm(file, llm).items():
        llm.store(key, rows)


def _of_llm(file: Path, llm: CachedLLM) -> Requests:
    identity, requests = read_recording(file)
    if identity != dict(llm.identity):
        other = f"is a recording of another LLM ({identity.get('model')})"
        raise UserFault(f"{file}: {other}: take another file")
    return requests


def read_recording(file: Path) -> tuple[dict[str, Any], Requests]:
    """The LLM's identity, and each request's rows.

    Raises UserFault: not there, damaged, or of a newer format.
    """
    try:
        content = gzip.decompress(file.read_bytes()).decode("ascii")
        lines = map(json.loads, content.splitlines())
        header = next(lines)
        if (version := header["format"]) > FORMAT:
            newer = f"format {version} is made by a newer hydra-llm: install that one"
            raise UserFault(f"{file}: {newer}")
        rows = ((line["key"], line["rows"].items()) for line in lines)
        return header["llm"], {key: {int(i): row for i, row in items} for key, items in rows}
    except (StopIteration, KeyError, TypeError, AttributeError) as error:
        raise UserFault(f"{file}: is no recording ({type(error).__name__}: {error})") from None
    except OSError as error:  # not there, or no gzip
        raise UserFault(f"{file}: the recording cannot be read ({error})") from None
    except (ValueError, EOFError, zlib.error) as error:
        raise UserFault(f"{file}: the recording is damaged ({error})") from None


def open_recording(file: Path) -> CachedLLM:
    """The recorded LLM: a request that is not in the recording is an error."""
    identity, requests = read_recording(file)
    llm = CachedLLM(RecordedLLM(identity), IN_MEMORY, replay_only=True, name=str(file))
    for key, rows in requests.items():
        llm.store(key, rows)
    return llm
