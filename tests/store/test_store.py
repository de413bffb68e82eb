"""The store, on both databases: what was written is there, once, for everybody, and what was
deleted is nowhere.
"""

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
import with_postgres
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hydra_llm.errors import SettingsError, StoreError
from hydra_llm.history import before, parse_time
from hydra_llm.store import migrate, schema
from hydra_llm.store.backup import backup, open_backup, restore
from hydra_llm.store.change import StaleVersion
from hydra_llm.store.database import create_engine
from hydra_llm.store.store import Store
from hydra_llm.store.values import (
    Added,
    Key,
    Request,
    Spend,
    Spender,
    StoredFeedback,
    StoredHead,
    StoredResponse,
)
from hydra_llm.types import UNREADABLE, Query, Record
from tests.store.writer import write
from tests.waiting import until


def record(id: str, output: str = "yes", time: str = "2020-01-01", user: str = "ada") -> Record:
    return Record(user, id, f"question {id}", output, time, parse_time(time))


def request(id: str, user: str = "ada", **content: object) -> Request:
    return Request(id, user, 1.0, "bundle", "asked", content)


# ---- records


def test_records_come_back_in_order_and_again_change_nothing(store: Store) -> None:
    sent = [record("b"), record("a"), record("c", time="")]
    assert store.add_records("ada", sent) == Added(3, 0, 0)
    version, records = store.records("ada")
    assert version is not None
    assert version == store.state("ada").version
    assert records == [dataclasses.replace(record, position=i) for i, record in enumerate(sent)]
    assert store.add_records("ada", sent) == Added(0, 0, 3)
    assert store.state("ada").version == version, "nothing changed, so no server need read again"
    added = store.add_records("ada", [record("a", "no"), record("d")])
    assert (added.added, added.changed, added.unchanged) == (1, 1, 0)
    assert [(record.id, record.input, record.output) for record in added.replaced] == [
        ("a", "question a", "yes")
    ]
    assert [(record.id, record.output, record.position) for record in store.records("ada")[1]] == [
        ("b", "yes", 0),
        ("a", "no", 1),
        ("c", "yes", 2),
        ("d", "yes", 3),
    ]
    assert store.state("ada").version == version + 1


def test_a_recreated_user_never_has_an_old_version(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that still holds the deleted one in memory must see that it is out of date, whatever
    clocks say.
    """
    seen = set[int | None]()
    for clock in (2e9, 1e9, 1e9):
        monkeypatch.setattr(
            "hydra_llm.store.store.time",
            SimpleNamespace(time=lambda clock=clock: clock, time_ns=lambda clock=clock: int(clock)),
        )
        for i in range(5):
            store.add_records("ada", [record(f"more{i}")])
            assert store.state("ada").version not in seen
            seen.add(store.state("ada").version)
        store.delete_user("ada")
    assert len(seen) == 15


def test_a_user_who_is_unknown_has_nothing(store: Store) -> None:
    assert store.state("bob").version is None
    assert store.records("bob") == (None, [])
    assert store.heads("bob", "bundle") == {}
    assert store.delete_user("bob") is None
    assert store.export_user("bob") is None
    assert store.add_job("j", "bob", "fit") is None
    with pytest.raises(StoreError, match="no such user"), store.change("bob"):
        raise AssertionError("a change of nobody began")


def test_removing_a_record_deletes_heads_and_keeps_positions(store: Store) -> None:
    store.add_records("ada", [record("a"), record("b")])
    with store.change("ada") as ada:
        ada.put_heads("bundle", {"adapter": StoredHead(2, 1.5, b"\0\1")})
    with store.change("ada") as ada:
        assert not ada.remove("z")
        assert ada.remove("a")
    assert store.heads("ada", "bundle") == {}
    store.add_records("ada", [record("c")])
    assert [(record.id, record.position) for record in store.records("ada")[1]] == [
        ("b", 1),
        ("c", 2),
    ]


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.lists(
        st.lists(
            st.tuples(
                st.sampled_from("abcd"),
                st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
            )
        )
    )
)
def test_any_order_of_writes_ends_as_a_dict_would(
    store: Store, batches: list[list[tuple[str, str]]]
) -> None:
    store.delete_user("ada")
    known: dict[str, str] = {}
    for batch in batches:
        store.add_records("ada", [record(id, output) for id, output in batch])
        known.update(batch)
    assert {record.id: record.output for record in store.records("ada")[1]} == known


# ---- versions


def test_a_writer_with_a_stale_version_is_refused(store: Store) -> None:
    store.add_records("ada", [record("a")])
    read = store.state("ada").version
    store.add_records("ada", [record("b")])
    with pytest.raises(StaleVersion, match="read again"), store.change("ada", version=read) as ada:
        ada.put_heads("bundle", {"adapter": StoredHead(1, 1.5, b"old")})
    assert store.heads("ada", "bundle") == {}


def test_an_error_inside_a_change_undoes_all_of_it(store: Store) -> None:
    store.add_records("ada", [record("a")])

    def begin_and_fail() -> None:
        with store.change("ada") as ada:
            ada.add([record("b")])
            ada.put_heads("bundle", {"adapter": StoredHead(1, 1.5, b"x")})
            raise ZeroDivisionError

    before = store.state("ada")
    with pytest.raises(ZeroDivisionError):
        begin_and_fail()
    assert [record.id for record in store.records("ada")[1]] == ["a"]
    assert store.heads("ada", "bundle") == {}
    assert store.state("ada") == before


def test_no_update_is_lost_between_threads_and_connections(store: Store, url: str) -> None:
    other = Store(url)
    failures: list[BaseException] = []
    store.add_records("ada", [])
    first = store.state("ada").version

    def add(place: Store, name: str) -> None:
        try:
            for i in range(10):
                place.add_records("ada", [record(f"{name}{i}")])
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=add, args=(place, f"{i}-"))
        for i, place in enumerate((store, other, store, other))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    other.close()
    assert not failures
    version, records = store.records("ada")
    assert first is not None
    assert version is not None
    assert (version - first, len(records)) == (40, 40)
    assert [record.position for record in records] == list(range(40))


def test_another_engine_on_the_database_sees_a_write_at_once(store: Store, url: str) -> None:
    other = Store(url)
    assert other.state("ada").version is None
    store.add_records("ada", [record("a")])
    assert other.state("ada").version == store.state("ada").version is not None
    store.set_bundle("/bundles/new")
    assert other.state("ada").bundle == "/bundles/new"
    store.set_bundle(None)
    assert other.state("ada").bundle is None
    other.close()


def test_heads_come_back_with_the_time_until_which_they_learned(store: Store) -> None:
    store.add_records("ada", [record("a")])
    heads = {
        "adapter": StoredHead(3, 893214333.25, b"\0\1"),
        "reranker": StoredHead(0, -math.inf, b""),
    }
    with store.change("ada") as ada:
        ada.put_heads("bundle", heads)
    assert store.heads("ada", "bundle") == heads
    assert store.heads("ada", "other") == {}
    exported = store.export_user("ada")
    assert exported is not None
    untils = {row["scorer"]: row["until"] for row in exported["heads"]}
    assert untils == {"adapter": 893214333.25, "reranker": None}
    json.dumps(untils, allow_nan=False)


def test_a_kept_time_that_is_refused_by_now_is_unknown(store: Store) -> None:
    store.add_records("ada", [dataclasses.replace(record("a"), time="202401")])
    (kept,) = store.records("ada")[1]
    assert (kept.time, kept.span) == ("202401", UNREADABLE)
    assert before([kept], Query("ada", "q", "x")) == [kept]


def test_records_come_oldest_first_not_as_uploaded(store: Store) -> None:
    times = {"new": "2024-06-01", "none": "", "old": "2019-06-01", "mid": "2022"}
    store.add_records("ada", [dataclasses.replace(record(id), time=t) for id, t in times.items()])
    assert [r.id for r in store.records("ada")[1]] == ["old", "mid", "new", "none"]


# ---- feedback, requests, keys, jobs


def test_feedback_counts_once_and_the_last_word_stands(store: Store) -> None:
    store.add_records("ada", [record("a")])
    said = StoredFeedback("r1", 5.0, {"said": {"chosen": 1}, "why": ["ü"], "score": 0.1})
    with store.change("ada") as ada:
        assert ada.put_feedback(said)
    with store.change("ada") as ada:
        assert not ada.put_feedback(
            dataclasses.replace(said, content={**said.content, "score": 0.2})
        )
    with store.change("ada") as ada:
        assert ada.put_feedback(StoredFeedback("r1", 5.0, {"said": {"chosen": 2}}))
        assert ada.put_feedback(said)
    with store.change("ada") as ada:
        ada.put_feedback(StoredFeedback("r0", 7.0, {"said": {}}))
        ada.put_feedback(StoredFeedback("r2", 3.0, {"said": {}}))
    assert [feedback.request for feedback in store.unlearned_feedback("ada", 10)] == [
        "r2",
        "r1",
        "r0",
    ]
    assert store.unlearned_feedback("ada", 2)[0] == said
    with store.change("ada") as ada:
        ada.mark_learned(["r0", "r1", "unknown"])
        ada.put_feedback(StoredFeedback("r3", 1.0, {"said": {}}))
    assert [feedback.request for feedback in store.unlearned_feedback("ada")] == ["r3", "r2"]
    assert store.counts()["feedback"] == 4
    learned = store.unlearned_feedback("ada", or_learned=True)
    with store.change("ada") as ada:
        ada.forget_heads()
    assert store.unlearned_feedback("ada") == learned


def test_only_feedback_of_the_bundle_with_a_group_is_read(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add_records("ada", [record("a")])
    with store.change("ada") as ada:
        for i in range(9):
            content = {
                "said": {},
                "bundle": "x" if i % 3 else "y",
                "group": {"gains": [0, 1]} if i % 2 else None,
            }
            ada.put_feedback(StoredFeedback(f"r{i}", float(i), content))
    assert len(store.unlearned_feedback("ada")) == 9
    read = []
    monkeypatch.setattr(
        "hydra_llm.store.store.StoredFeedback",
        lambda *row: read.append(row) or StoredFeedback(*row),
    )
    assert [feedback.request for feedback in store.unlearned_feedback("ada", 2, bundle="x")] == [
        "r5",
        "r7",
    ]
    assert len(read) == 2, "however many others there are"
    assert [feedback.request for feedback in store.unlearned_feedback("ada", bundle="y")] == ["r3"]
    assert store.unlearned_feedback("ada", 5, bundle="z") == []


def test_a_request_of_a_deleted_user_is_not_kept(store: Store) -> None:
    for _ in range(2):
        store.add_records("ada", [record("a")])
        version = store.state("ada").version
        store.add_records("ada", [record("b")])
        assert store.add_request(request("r1"), version=version), "the same user, with more records"
        store.delete_user("ada")
        assert not store.add_request(request("r1"), version=version)
        store.add_records("ada", [record("a"), record("b"), record("c")])
        assert not store.add_request(request("r1"), version=version)
        assert store.request("r1") is None


def test_responses_are_kept_by_user_and_form_conversations(store: Store) -> None:
    def response(id: str, previous: str | None = None, user: str = "ada") -> StoredResponse:
        return StoredResponse(id, user, float(len(id)), previous, {"said": id})

    turns = [response("1"), response("22", "1"), response("333", "22")]
    for turn in turns:
        assert store.add_response(turn, version=None), "the user is created"
    assert store.add_response(response("b", "22", "bob"), version=None)
    assert store.users() == ["ada", "bob"]
    assert store.response("22") == turns[1]
    assert store.conversation("ada", "333") == turns
    assert store.conversation("ada", "22") == turns[:2]
    assert store.conversation("bob", "333") == []
    assert store.conversation("bob", "b") == [response("b", "22", "bob")], "none of another user"
    assert store.responses("ada", ["333", "b", "1", "x"]) == {"1": turns[0], "333": turns[2]}
    assert not store.delete_response("bob", "22", request="")
    assert store.prune(1.5) == (2, 0)
    assert store.conversation("ada", "333") == turns[1:], "the first names one that is gone"
    assert store.delete_response("ada", "333", request="")
    assert store.response("333") is None
    version = store.state("ada").version
    store.delete_user("ada")
    assert store.response("22") is None
    assert not store.add_response(response("4444"), version=version)
    store.add_records("ada", [record("a")])
    assert not store.add_response(response("4444"), version=version), "not the same user"


def test_requests_are_kept_found_and_forgotten(store: Store) -> None:
    store.add_records("ada", [record("a")])
    store.add_request(request("r1", candidates=["x", "y"]))
    store.add_request(dataclasses.replace(request("r2"), created=9.0))
    store.add_request(request("r3", user="nobody"))
    assert store.request("r1") == request("r1", candidates=["x", "y"])
    assert store.request("r3") is None
    assert store.prune(5.0) == (1, 0)
    assert store.request("r1") is None
    assert store.request("r2") is not None


def test_a_store_that_had_keys_stays_closed_without_any(store: Store) -> None:
    """Deleting a user deletes the key that spoke for that user alone; nobody is let in for that."""
    store.add_records("ada", [record("a")])
    store.add_key(Key("k", "hash", "", False, ("ada",), 1.0, None))
    store.delete_user("ada")
    assert store.keys() == []
    assert store.has_keys()
    store.add_key(Key("k2", "hash2", "", False, ("bob",), 1.0, None))
    assert store.delete_user("bob") == {"keys": 1, "spend": 0}, "known by a key alone"
    assert store.delete_user("bob") is None


def test_texts_in_use_are_found(store: Store) -> None:
    store.add_records("ada", [Record("ada", "1", "a", "b"), Record("ada", "2", "c", "d")])
    store.add_request(request("r1"))
    assert store.texts_in_use(["a", "b", "a → b", "c → b", "e", "asked", "a → b → c"]) == {
        "a",
        "b",
        "a → b",
        "asked",
    }
    assert store.texts_in_use([f"text {i}" for i in range(1200)] + ["d"]) == {"d"}
    assert store.texts_in_use([]) == set()
    long = "the same beginning, longer than what the index has of a text: "
    store.add_records("eve", [Record("eve", "1", f"{long}1", f"{long}茶")])
    assert store.texts_in_use([long, f"{long}1", f"{long}2", f"{long}茶"]) == {
        f"{long}1",
        f"{long}茶",
    }
    store.delete_user("eve")
    store.add_records("bob", [Record("bob", "1", "a", "z")])
    assert store.texts_in_use(["a", "b", "a → b", "a → z", "asked"], except_user="ada") == {
        "a",
        "a → z",
    }


def test_texts_in_use_are_looked_up_by_indexes(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'store.db'}")
    plans = []

    @sa.event.listens_for(store.engine, "before_cursor_execute")
    def explain(
        connection: sa.Connection, cursor: Any, statement: str, values: Any, *_: Any
    ) -> None:
        if "substr" in statement:
            cursor.execute(f"EXPLAIN QUERY PLAN {statement}", values)
            plans.append(str(cursor.fetchall()))

    store.texts_in_use(["a text", "x" * 99])
    store.close()
    indexes = ("ix_records_input", "ix_records_output", "ix_requests_question")
    assert [name for name, plan in zip(indexes, plans, strict=True) if name not in plan] == []


def test_keys(store: Store) -> None:
    admin = Key("k1", "hash1", "for all", True, (), 1.0, None)
    bound = Key("k2", "hash2", "for two", False, ("ada", "bob"), 2.0, None)
    assert not store.has_keys()
    store.add_key(admin)
    store.add_key(bound)
    assert store.has_keys()
    assert store.keys() == [admin, bound]
    assert store.key("k2") == bound
    assert store.key("k3") is None
    assert store.revoke_key("k2")
    assert not store.revoke_key("k3")
    revoked = store.key("k2")
    assert revoked is not None
    assert revoked.revoked is not None
    assert store.revoke_key("k2")
    assert store.key("k2") == revoked, "a key is revoked once"


def test_a_job_has_one_worker_and_is_taken_over_when_it_dies(store: Store, url: str) -> None:
    store.add_records("ada", [record("a")])
    assert store.claim_job() is None
    job = store.add_job("j1", "ada", "fit")
    assert job is not None
    assert store.job("ada", "j1") == job
    assert store.job("bob", "j1") is None
    other, claimed = Store(url), []
    threads = [
        threading.Thread(target=lambda place=place: claimed.append(place.claim_job()))
        for place in (store, other)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    other.close()
    assert [job.id for job in claimed if job] == ["j1"]
    assert store.update_job("j1", 3, 10)
    assert store.claim_job() is None
    time.sleep(0.02)
    again = store.claim_job(abandoned_after=0.01)
    assert again is not None
    assert (again.id, again.done, again.total) == ("j1", 3, 10)
    store.update_job("j1", 10, 10, state="done")
    assert store.claim_job(abandoned_after=0.0) is None
    assert (store.prune(0.0), store.prune(time.time() + 1)) == ((0, 0), (0, 1))
    assert store.counts()["jobs"] == 0
    assert not store.update_job("j1", 11, 11)


# ---- deletion and export


def fill(store: Store, name: str, secret: str) -> None:
    """Everything that can be kept about a user, with `secret` in each text."""
    store.add_records(
        name, [record(f"{secret}-{i}", f"{secret} answer", user=name) for i in range(50)]
    )
    with store.change(name) as user:
        user.put_heads(
            "bundle",
            {
                "adapter": StoredHead(50, 86400.5, secret.encode() * 100),
                "reranker": StoredHead(50, -math.inf, secret.encode()),
            },
        )
        user.put_feedback(StoredFeedback(f"request-{name}", 1.0, {"said": {"edited": secret}}))
    store.add_request(request(f"request-{name}", user=name, text=secret))
    response = StoredResponse(f"response-{name}", name, 1.0, None, {"said": secret})
    store.add_response(response, version=None)
    store.add_job(f"job-{name}", name, "fit")
    store.update_job(f"job-{name}", 0, 0, state="failed", error=secret)
    store.add_key(Key(f"key-{name}", f"hash-{name}", secret, False, (name,), 1.0, None))
    store.add_spend({Spender("2026-11-30", f"key-{name}", name, "m"): Spend(1, 5, 5)})


def test_an_export_holds_all_that_a_deletion_deletes(store: Store) -> None:
    fill(store, "ada", "marmalade")
    exported = store.export_user("ada")
    deleted = store.delete_user("ada")
    assert exported is not None
    assert deleted == {
        name: len(exported[name])
        for name in (*(table.name for table in schema.OF_USERS), "keys", "spend")
    }
    assert deleted["records"] == 50
    assert set(deleted) == {table.name for table in schema.OF_USERS} | {"keys", "spend"}


def test_deletion_leaves_no_byte_and_changes_nobody_else(store: Store, tmp_path: Path) -> None:
    fill(store, "lovelace", "marmalade")
    fill(store, "bob", "rhubarb")
    store.add_key(Key("both", "hash-both", "two people", False, ("lovelace", "bob"), 1.0, None))
    before = store.export_user("bob")
    assert _bytes_with(store, tmp_path, b"marmalade")
    store.delete_user("lovelace")
    store.scrub()
    assert not _bytes_with(store, tmp_path, b"marmalade")
    assert not _bytes_with(store, tmp_path, b"lovelace")
    assert _bytes_with(store, tmp_path, b"rhubarb")
    assert store.export_user("bob") == before
    key = store.key("both")
    assert key is not None
    assert key.users == ("bob",)
    assert store.has_keys()
    fill_again = store.add_records("lovelace", [record("a")])
    assert fill_again == Added(1, 0, 0)


def test_sqlite_leaves_no_byte_even_before_it_is_scrubbed(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'store.db'}")
    fill(store, "ada", "marmalade")
    store.delete_user("ada")
    assert store.truncate_log()
    assert not _bytes_with(store, tmp_path, b"marmalade")
    store.close()


def test_scrub_says_that_a_transaction_still_reads_deleted_rows(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    if store.on_sqlite:
        pytest.skip("of PostgreSQL alone: SQLite overwrites what it deletes")
    fill(store, "ada", "marmalade")
    with store.reading() as reader, monkeypatch.context() as patched:
        reader.scalar(sa.text("SELECT 1"))  # VACUUM would wait for a reader of its tables
        store.delete_user("ada")
        patched.setattr("hydra_llm.store.upkeep.SCRUBS", 1)
        with pytest.raises(StoreError, match="try again"):
            store.scrub()
    store.scrub()  # waits for snapshots that the server itself takes for a moment


def _bytes_with(store: Store, folder: Path, needle: bytes) -> bool:
    """Whether the database's files hold the bytes: SQLite's own, or the files of PostgreSQL's
    tables.
    """
    if store.on_sqlite:
        return any(needle in file.read_bytes() for file in folder.iterdir())
    with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("CHECKPOINT")
        of_ours = "FROM pg_class WHERE relnamespace = 'public'::regnamespace"
        ours = sa.text(f"SELECT pg_relation_filepath(oid) {of_ours} AND relkind IN ('r', 'i')")
        toasts = sa.text(f"SELECT pg_relation_filepath(reltoastrelid) {of_ours}")
        paths = [
            path for statement in (ours, toasts) for path in connection.scalars(statement) if path
        ]
    data = Path(os.environ["TEST_POSTGRES_DATA"])
    return any(needle in (data / path).read_bytes() for path in paths)


# ---- backup, check, migrations


def test_a_backup_is_a_store_and_fills_an_empty_one(store: Store, tmp_path: Path) -> None:
    fill(store, "ada", "marmalade")
    fill(store, "bob", "rhubarb")
    file = tmp_path / "backup.db"
    counts = backup(store, file)
    assert counts == store.counts()
    with pytest.raises(StoreError, match="exists already"):
        backup(store, file)
    saved = open_backup(file)
    with pytest.raises(StoreError, match="is not empty"):
        restore(store, saved)
    exports = {name: store.export_user(name) for name in store.users()}
    for name in exports:
        store.delete_user(name)
    with pytest.raises(StoreError, match="is not empty"):  # there is what nobody has spent
        restore(store, saved)
    with store.writing() as connection:
        connection.execute(sa.delete(schema.spend))
    assert restore(store, saved) == counts
    saved.close()
    assert {name: store.export_user(name) for name in store.users()} == exports
    store.add_records("eve", [record("a")])
    assert store.users() == ["ada", "bob", "eve"]
    assert store.check() == []


def test_check_reports_changed_tables(store: Store) -> None:
    store.add_records("ada", [record("a")])
    assert store.check() == []
    with store.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE jobs ADD COLUMN more INTEGER")
        connection.exec_driver_sql("DROP INDEX ix_jobs_state")
    assert len(store.check()) == 2


def test_a_damaged_file_is_reported_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "store.db"
    store = Store(f"sqlite:///{file}")
    store.add_records("ada", [record(f"r{i}", "x" * 500) for i in range(200)])
    store.close()
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2 : len(raw) // 2 + 20000] = random.Random(0).randbytes(20000)
    file.write_bytes(raw)
    with pytest.raises(StoreError, match=r"^store sqlite:.*malformed$"):
        Store(f"sqlite:///{file}").check()


def test_the_migrations_make_the_schema(store: Store) -> None:
    assert store.check() == []
    assert migrate.version_of(store.engine) == migrate.LATEST


def test_keys_of_the_first_version_keep_their_meaning(url: str) -> None:
    engine = create_engine(url)
    migrate.upgrade(engine, "0001")
    with engine.begin() as connection:
        for id, admin, names in (
            ("one", False, ["ada"]),
            ("two", False, ["ada", "bob"]),
            ("all", True, []),
        ):
            values = {"id": id, "hash": id, "label": "", "admin": admin, "created": 1.0}
            connection.execute(
                sa.text(
                    "INSERT INTO keys (id, hash, label, admin, created) VALUES (:id, :hash, :label,"
                    " :admin, :created)"
                ),
                values,
            )
            for name in names:
                connection.execute(
                    sa.text("INSERT INTO key_users (key, name) VALUES (:key, :name)"),
                    {"key": id, "name": name},
                )
    with pytest.raises(StoreError, match="run `hydra-llm store migrate`"):
        Store(url)
    assert migrate.version_of(engine) == "0001"
    migrate.upgrade(engine)
    assert migrate.version_of(engine) == migrate.LATEST
    engine.dispose()
    store = Store(url)
    keys = [store.key(id) for id in ("one", "two", "all")]
    assert [(key.bound, key.users) for key in keys if key] == [
        (True, ("ada",)),
        (False, ("ada", "bob")),
        (False, ()),
    ]
    assert store.check() == []
    store.close()


def test_heads_of_the_second_version_have_no_known_time(url: str) -> None:
    engine = create_engine(url)
    migrate.upgrade(engine, "0002")
    with engine.begin() as connection:
        for line in (
            "INSERT INTO users (name, version, created) VALUES ('ada', 1, 1.0)",
            'INSERT INTO heads ("user", bundle, scorer, known, delta, updated) SELECT'
            " key, 'bundle', 'adapter', 7, CAST('four' AS {bytes}), 1.0 FROM users",
        ):
            of_bytes = "BLOB" if engine.dialect.name == "sqlite" else "BYTEA"
            connection.exec_driver_sql(line.format(bytes=of_bytes))
    assert migrate.version_of(engine) == "0002"
    migrate.upgrade(engine)
    assert migrate.version_of(engine) == migrate.LATEST
    engine.dispose()
    store = Store(url)
    assert store.heads("ada", "bundle") == {"adapter": StoredHead(7, -math.inf, b"four")}
    assert store.check() == []
    store.close()


def test_tables_of_another_version_are_refused_with_the_fix(store: Store, url: str) -> None:
    def set_version(value: str) -> None:
        with store.engine.begin() as connection:
            connection.execute(sa.text("UPDATE alembic_version SET version_num = :v"), {"v": value})

    set_version("9999")
    with pytest.raises(StoreError, match="which a newer hydra-llm has made"):
        Store(url)
    with store.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE alembic_version")
    with pytest.raises(StoreError, match="take another database"):
        Store(url)


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("nonsense", "no database URL"),
        ("mysql://host/db", "mysql is not supported"),
        ("sqlite://", "name a file"),
    ],
)
def test_urls_that_cannot_be_opened(url: str, fault: str) -> None:
    with pytest.raises(SettingsError, match=fault):
        Store(url)


def test_a_missing_database_is_one_line_without_the_password(tmp_path: Path) -> None:
    with pytest.raises(StoreError) as caught:
        Store("postgresql+psycopg://me:secret-word@127.0.0.1:1/db")
    assert "secret-word" not in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(StoreError, match="unable to open"):
        Store(f"sqlite:///{tmp_path / 'no' / 'folder' / 'store.db'}")


# ---- kill -9

# Writers fork from a server that has imported the store: an import for each would take a second.
WRITERS = multiprocessing.get_context("forkserver")
WRITERS.set_forkserver_preload(["tests.store.writer"])


@pytest.mark.slow
def test_acknowledged_writes_survive_fifty_kills(url: str) -> None:
    acknowledged = 0
    for _ in range(50):
        told, telling = WRITERS.Pipe(duplex=False)
        writer = WRITERS.Process(target=write, args=(url, acknowledged, telling))
        writer.start()
        telling.close()  # so that the end of the writer is the end of the pipe
        for _ in range(3):
            acknowledged = told.recv() + 1
        writer.kill()
        with contextlib.suppress(EOFError):
            while True:
                acknowledged = told.recv() + 1
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        store = Store(url)
        ids = [record.id for record in store.records("ada")[1]]
        assert store.check() == []
        store.close()
        assert ids[: 2 * acknowledged] == [
            f"{kind}{i}" for i in range(acknowledged) for kind in "rs"
        ]
        assert len(ids) % 2 == 0, "half of a write is none"
        assert len(ids) - 2 * acknowledged <= 2, (
            "at most the write that was under way came through unacknowledged"
        )


@pytest.mark.slow
def test_acknowledged_writes_survive_postgresql_restarts() -> None:
    """A server of this test alone: others keep theirs."""
    programs = with_postgres.binaries()
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    with with_postgres.server(programs) as environment:
        store = Store(environment["TEST_POSTGRES_URL"])
        acknowledged: list[str] = []
        refused: list[str] = []
        ended = threading.Event()

        def write() -> None:
            while not ended.is_set():
                id = f"r{len(acknowledged) + len(refused)}"
                try:
                    store.add_records("ada", [record(id)])
                    acknowledged.append(id)
                except StoreError as error:
                    refused.append(str(error))
                    time.sleep(0.01)

        writer = threading.Thread(target=write)
        writer.start()
        for _ in range(3):
            before = len(acknowledged)
            until(lambda before=before: len(acknowledged) > before + 5)
            with_postgres.restart(programs, environment["TEST_POSTGRES_DATA"])
        before = len(acknowledged)
        until(lambda: len(acknowledged) > before + 5)
        ended.set()
        writer.join()
        there = {record.id for record in store.records("ada")[1]}
        store.close()
    assert refused, "it was restarted under load"
    assert all("\n" not in line for line in refused)
    assert set(acknowledged) <= there
    assert len(there - set(acknowledged)) <= 3, (
        "a write whose acknowledgement was lost may be there, once a restart"
    )
