"""The SQLite file under both on-disk caches: faults, refusals, and files that 0.1 has written."""

import logging
import sqlite3
from pathlib import Path

import pytest

from hydra_llm.errors import UserFault
from hydra_llm.kv import CacheFile
from hydra_llm.llm.base import Sampling
from hydra_llm.llm.cache import CachedLLM
from hydra_llm.llm.fake import RuleLLM

SCHEMA = "CREATE TABLE IF NOT EXISTS t (key TEXT PRIMARY KEY, value TEXT NOT NULL);"
INSERT = "INSERT OR IGNORE INTO t VALUES (?, ?)"


def open_file(path: Path, **options: bool) -> CacheFile:
    return CacheFile(path, SCHEMA, "things", **options)


def test_another_connection_finds_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "c.sqlite"
    file = open_file(path)
    assert file.write((INSERT, [("a", "1"), ("b", "2")]))
    assert file.write((INSERT, [("a", "later")]))  # the first value stays
    assert open_file(path).read("SELECT * FROM t ORDER BY key") == [("a", "1"), ("b", "2")]
    assert file.keeps


def test_a_write_is_one_transaction(tmp_path: Path) -> None:
    file = open_file(tmp_path / "c.sqlite")
    with pytest.raises(UserFault):
        file.write((INSERT, [("a", "1")]), ("INSERT INTO t VALUES (?, ?)", [("b", None)]))
    assert file.read("SELECT * FROM t") == []


def test_a_refused_write_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = open_file(tmp_path / "c.sqlite")
    file.connection.execute("PRAGMA query_only = ON")
    assert not file.write((INSERT, [("a", "1")]))
    assert not file.write((INSERT, [("a", "1")]))
    assert not file.keeps
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("hydra_llm.kv", logging.WARNING)
    file.connection.execute("PRAGMA query_only = OFF")
    assert file.write((INSERT, [("a", "1")])), "it is tried again"


@pytest.fixture
def no_folder(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("not a folder")
    return tmp_path / "file" / "c.sqlite"


def test_an_unwritable_place_becomes_memory(
    no_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = open_file(no_folder, erases=True)
    assert (file.keeps, len(caplog.records)) == (False, 1)
    assert file.write((INSERT, [("a", "1")]))
    assert file.read("SELECT value FROM t WHERE key = ?", ("a",)) == [("1",)]
    assert len(caplog.records) == 1
    with pytest.raises(UserFault, match="cannot open"):
        open_file(no_folder, required=True)


@pytest.mark.parametrize("content", [b"no database " * 500, b"SQLite format 3\0" + b"\xff" * 8000])
def test_a_damaged_file_is_a_fault_with_the_fix(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c.sqlite"
    path.write_bytes(content)
    with pytest.raises(UserFault) as caught:
        open_file(path)
    assert str(caught.value).startswith(f"{path}: the cache of things is damaged")
    assert "\n" not in str(caught.value)


def test_a_closed_file_is_not_called_damaged(tmp_path: Path) -> None:
    file = open_file(tmp_path / "c.sqlite")
    file.close()
    with pytest.raises(UserFault, match="cannot be read"):
        file.read("SELECT * FROM t")


def test_what_is_deleted_is_in_no_file(tmp_path: Path) -> None:
    file = open_file(tmp_path / "c.sqlite", erases=True)
    file.write((INSERT, [("a", "a secret"), ("b", "a film")]))
    with file.deleting() as database:
        database.execute("DELETE FROM t WHERE key = 'a'")
    assert file.read("SELECT value FROM t") == [("a film",)]
    assert not any(b"a secret" in path.read_bytes() for path in tmp_path.iterdir())
    file.connection.execute("PRAGMA query_only = ON")
    with pytest.raises(UserFault, match="could not be deleted"), file.deleting() as database:
        database.execute("DELETE FROM t")
    assert file.read("SELECT value FROM t") == [("a film",)]


# ---- files of version 0.1 keep answering

OLD_ANSWERS = """
CREATE TABLE requests (id TEXT PRIMARY KEY, payload TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE answers (
    request TEXT NOT NULL REFERENCES requests (id), candidate INTEGER NOT NULL, payload TEXT NOT
    NULL, PRIMARY KEY (request, candidate)
) WITHOUT ROWID;
INSERT INTO "requests" VALUES('64f7144d47aa6a130aa49f22919f8317f58a2e3cedd9af53733afac3b251be86',
'{"choices":[],"llm":{"constrains":false,"kind":"fake","model":"fake:old"},"max_tokens":128,
"messages":[{"content":"Name a film","role":"user"}],"seed":3,"stop":[],"temperature":0.5}');
INSERT INTO "answers" VALUES('64f7144d47aa6a130aa49f22919f8317f58a2e3cedd9af53733afac3b251be86',0,
'{"calls":1,"completion_tokens":2,"prompt_tokens":3,"seconds":0.0,"text":"said 0"}');
INSERT INTO "answers" VALUES('64f7144d47aa6a130aa49f22919f8317f58a2e3cedd9af53733afac3b251be86',1,
'{"calls":0,"completion_tokens":2,"prompt_tokens":0,"seconds":0.0,"text":"said 1"}');
INSERT INTO "answers" VALUES('476f2a577237c9e345fec7304800cf097943d87d510f6cda3c041840cf347f76',0,
'{"calls":1,"completion_tokens":2,"prompt_tokens":3,"seconds":0.0,"text":"greedy"}');
"""
"""What version 0.1 wrote for a prompt with two samples, and for a greedy answer."""


def write_old(path: Path, script: str) -> None:
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.executescript(script)
    database.close()


@pytest.mark.anyio
async def test_an_old_cache_of_answers_is_read(tmp_path: Path) -> None:
    write_old(tmp_path / "llm.sqlite", OLD_ANSWERS)
    llm = CachedLLM(
        RuleLLM(lambda *_: "asked", name="old"), tmp_path / "llm.sqlite", replay_only=True
    )
    messages = [{"role": "user", "content": "Name a film"}]
    sampled = await llm.generate(messages, Sampling(n=2, temperature=0.5, seed=3))
    assert (sampled.texts, sampled.usage.cached) == (("said 0", "said 1"), 1)
    assert (await llm.generate(messages, Sampling(max_tokens=7))).texts == ("greedy",)
