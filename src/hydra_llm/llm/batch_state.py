"""Which requests are in which batch, kept on disk before anything is sent: a run that was killed
finds its batches again. It holds hashes of requests, and no texts. Sends nothing.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra_llm.errors import UserFault
from hydra_llm.kv import CacheFile

SCHEMA = """
CREATE TABLE IF NOT EXISTS batches (
    id TEXT PRIMARY KEY, llm TEXT NOT NULL, created REAL NOT NULL, requests INTEGER NOT NULL,
    capabilities TEXT NOT NULL, file TEXT, batch TEXT, status TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS requests (
    id TEXT PRIMARY KEY, batch TEXT NOT NULL REFERENCES batches (id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS of_batch ON requests (batch);
"""
KEPT = 30 * 86400.0  # seconds after which a provider has deleted a batch's files


@dataclass(frozen=True, slots=True)
class KeptBatch:
    """A batch as the file knows it."""

    id: str  # of our own, in the batch's metadata
    created: float  # seconds since 1970
    requests: int
    file: str | None  # the provider's ids, once it has told them
    batch: str | None
    status: str  # preparing, sent, or how it ended

    def to_json(self) -> dict[str, Any]:
        return {"batch": self.batch, "status": self.status, "requests": self.requests}


class BatchState:
    """The batches of one LLM. UserFault, in every method: the file cannot be read or written."""

    def __init__(self, path: Path, llm: Mapping[str, Any]):
        self.llm, self.file = (
            json.dumps(dict(llm), sort_keys=True),
            CacheFile(path, SCHEMA, "batches", required=True),
        )
        self._forget_before(time.time() - KEPT)

    def begin(self, id: str, requests: Sequence[str], capabilities: Mapping[str, Any]) -> None:
        """A batch is about to be sent; a request that was in another one is in this one now."""
        row = (id, self.llm, time.time(), len(requests), json.dumps(capabilities), "preparing")
        self._write(
            ("INSERT INTO batches VALUES (?, ?, ?, ?, ?, NULL, NULL, ?)", [row]),
            ("INSERT OR REPLACE INTO requests VALUES (?, ?)", [(own, id) for own in requests]),
        )

    def update(self, id: str, **values: str) -> None:
        """Set `file`, `batch` or `status`."""
        names = ", ".join(f"{name} = ?" for name in values)
        self._write((f"UPDATE batches SET {names} WHERE id = ?", [(*values.values(), id)]))

    def forget(self, id: str) -> None:
        """A batch was never made, or its answers are gone."""
        self._write(
            ("DELETE FROM requests WHERE batch = ?", [(id,)]),
            ("DELETE FROM batches WHERE id = ?", [(id,)]),
        )

    def forget_requests(self, requests: Sequence[str]) -> None:
        """These have no answer in their batch: a later run asks them again."""
        self._write(("DELETE FROM requests WHERE id = ?", [(own,) for own in requests]))

    def batch_of(self, request: str) -> str | None:
        """The batch (our id) that a request is in."""
        query = "SELECT r.batch FROM requests r JOIN batches b ON b.id = r.batch WHERE r.id = ?"
        rows = self.file.read(f"{query} AND b.llm = ?", (request, self.llm))
        return rows[0][0] if rows else None

    def batches(self) -> list[KeptBatch]:
        """The LLM's batches, oldest first."""
        query = "SELECT id, created, requests, file, batch, status FROM batches WHERE llm = ?"
        return [KeptBatch(*row) for row in self.file.read(f"{query} ORDER BY created", (self.llm,))]

    def capabilities(self) -> dict[str, Any] | None:
        """Of the newest batch: what the model takes; None without a batch."""
        query = "SELECT capabilities FROM batches WHERE llm = ? ORDER BY created DESC LIMIT 1"
        rows = self.file.read(query, (self.llm,))
        return json.loads(rows[0][0]) if rows else None

    def close(self) -> None:
        self.file.close()

    def _forget_before(self, time: float) -> None:
        old = self.file.read("SELECT id FROM batches WHERE created < ?", (time,))
        for (id,) in old:
            self.forget(id)

    def _write(self, *statements: tuple[str, Sequence[Sequence[Any]]]) -> None:
        if not (self.file.keeps and self.file.write(*statements)):
            fault = "batches cannot be kept track of, and would be sent twice"
            raise UserFault(f"{self.file.path}: {fault}: free disk space, or leave --batch out")
