"""A run's answers in one file, so that anyone can repeat the run without the LLM: `bench run
--record FILE`, `bench run --replay FILE`.

Gzipped JSON lines: the LLM's identity, then each request's key (the SHA-256 of all that was asked,
never a prompt) with its texts and what they cost. The same run gives the same bytes.
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra_llm.errors import UserFault
from hydra_llm.kv import IN_MEMORY
from hydra_llm.llm.base import Sampling
from hydra_llm.llm.cache import CachedLLM
from hydra_llm.types import Generation, Message

FORMAT = 1
Requests = dict[str, dict[int, Any]]
"""Key → index of the text → row."""


class Recorded:
    """The LLM of a recording: known by its identity, never asked."""

    def __init__(self, identity: Mapping[str, Any]):
        self.identity = identity

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        """Never called: `CachedLLM` only replays."""
        raise AssertionError("a recorded LLM was asked")

    async def aclose(self) -> None:
        """Nothing to release."""


def write_recording(file: Path, llm: CachedLLM) -> int:
    """Add what this process asked `llm` for to what the file holds; returns the file's number of
    requests.

    Raises:
        UserFault: the file cannot be written, or is a recording of another LLM.
    """
    requests = _of_llm(file, llm) if file.exists() else {}
    for key, used in llm.used.items():
        kept, rows = llm.kept(key), requests.setdefault(key, {})
        rows.update((index, kept[index]) for index in sorted(used) if index in kept)
    lines: list[Any] = [{"format": FORMAT, "llm": dict(llm.identity)}]
    lines += [{"key": key, "rows": requests[key]} for key in sorted(requests)]
    text = "".join(json.dumps(line, sort_keys=True, separators=(",", ":")) + "\n" for line in lines)
    temporary = file.with_name(file.name + ".part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(gzip.compress(text.encode("ascii"), mtime=0))
        temporary.replace(file)
    except OSError as error:
        raise UserFault(f"{file}: the recording cannot be written ({error.strerror})") from None
    return len(requests)


def take_up(file: Path, llm: CachedLLM) -> None:
    """Put a recording's answers into the cache of `llm`: a run that was stopped on another machine
    resumes.

    Raises:
        UserFault: as `read_recording`, or it is a recording of another LLM.
    """
    for key, rows in _of_llm(file, llm).items():
        llm.keep(key, rows)


def _of_llm(file: Path, llm: CachedLLM) -> Requests:
    identity, requests = read_recording(file)
    if identity != dict(llm.identity):
        raise UserFault(
            f"{file}: is a recording of another LLM ({identity.get('model')}): take another file"
        )
    return requests


def read_recording(file: Path) -> tuple[dict[str, Any], Requests]:
    """The LLM's identity, and each request's rows.

    Raises:
        UserFault: not there, damaged, or of a newer format.
    """
    lines = _lines(file)
    try:
        header = next(lines)
        if header["format"] > FORMAT:
            raise UserFault(
                f"{file}: format {header['format']} is made by a newer hydra-llm: install that one"
            )
        return header["llm"], {
            line["key"]: {int(index): row for index, row in line["rows"].items()} for line in lines
        }
    except (StopIteration, KeyError, TypeError, AttributeError) as error:
        raise UserFault(f"{file}: is no recording ({type(error).__name__}: {error})") from None


def _lines(file: Path) -> Iterator[Any]:
    try:
        yield from map(json.loads, gzip.decompress(file.read_bytes()).decode("ascii").splitlines())
    except OSError as error:  # not there, or no gzip
        raise UserFault(f"{file}: the recording cannot be read ({error})") from None
    except (ValueError, EOFError, zlib.error) as error:
        raise UserFault(f"{file}: the recording is damaged ({error})") from None


def replayed(file: Path) -> CachedLLM:
    """The recorded LLM: a request that is not in the recording is an error.

    Raises:
        UserFault: as `read_recording`.
    """
    identity, requests = read_recording(file)
    llm = CachedLLM(Recorded(identity), IN_MEMORY, replay_only=True, name=str(file))
    for key, rows in requests.items():
        llm.keep(key, rows)
    return llm
