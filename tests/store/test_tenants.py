"""Every statement about rows of users names a user, but for a few that are about all."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.sql import visitors

from hydra_llm.store import schema
from hydra_llm.store.change import UserChange
from hydra_llm.store.store import Store
from hydra_llm.store.values import Key, Request, StoredFeedback, StoredHead, StoredResponse
from hydra_llm.types import Record

OF_TENANTS = {*schema.OF_USERS, schema.users}
ABOUT_ALL = {
    "users": "for learning, which an operator starts",
    "user_counts": "a page of users; the caller's own where `names` are given",
    "request": "by an id that nobody can guess; the caller is checked against its user",
    "response": "by an id that nobody can guess; the caller is checked against its user",
    "texts_in_use": "features are shared, and deleted only if nobody has the text",
    "claim_job": "the jobs of all users wait in one queue",
    "update_job": "the worker has claimed it",
    "key": "the caller's, before it is known for whom it may speak",
    "keys": "for operators",
    "latest_jobs": "for operators",
    "latest_keys": "for operators",
    "add_accesses": "the audit log: a user is a keyed hash there",
    "accesses": "for operators",
    "prune_accesses": "the retention of the audit log",
    "add_session": "",
    "session": "by the hash of what a browser holds",
    "end_session": "by the hash of what a browser holds",
    "add_activity": "figures without users",
    "activity": "figures without users",
    "prune_activity": "by age",
    "has_keys": "",
    "add_key": "",
    "revoke_key": "for operators",
    "set_bundle": "",
    "bundle": "",
    "salt": "",
    "add_spend": "of all who have spent since the last time",
    "spend": "sums; of the caller's where `users` are given",
    "spent": "sums that limits compare",
    "forget_spenders": "by age",
    "prune_totals": "by age",
    "take_requests": "of a key",
    "versions": "of users whom a server has in memory",
    "watched": "tokens without users",
    "limits": "for operators",
    "set_limit": "for operators",
    "prune": "by age",
    "scrub": "",
    "erase": "",
    "truncate_log": "",
    "counts": "for operators",
    "user_and_job_counts": "counts alone",
    "check": "for operators",
    "check_write": "",
    "close": "",
    "check_file": "",
    "reading": "",
    "writing": "",
    "rows": "",
    "run_outside_transaction": "",
}
"""Methods that need not name a user, and why."""


def changed(store: Store, do: Callable[[UserChange], object]) -> None:
    with store.change("ada") as ada:
        do(ada)


FEEDBACK = StoredFeedback("r", 1.0, {"said": {}})
SAME = StoredFeedback("s", 1.0, {"said": {}, "record": "1"})
OF_ONE_USER: dict[str, Callable[[Store], object]] = {
    "state": lambda store: store.state("ada"),
    "records": lambda store: store.records("ada"),
    "record_page": lambda store: store.record_page("ada"),
    "same_record": lambda store: store.same_record("ada", Record("ada", "9", "tea", "green")),
    "some_records": lambda store: store.some_records("ada", ["1"]),
    "is_off": lambda store: store.is_off("ada"),
    "switch": lambda store: changed(store, lambda ada: ada.switch(off=True)),
    "off_records": lambda store: store.off_records("ada"),
    "switch_record": lambda store: changed(store, lambda ada: ada.switch_record("1", off=True)),
    "unknown": lambda store: changed(store, lambda ada: ada.unknown(["1"])),
    "forget_feedback": lambda store: changed(
        store, lambda ada: ada.forget_feedback(["feedback:r"])
    ),
    "heads": lambda store: store.heads("ada", "bundle"),
    "change": lambda store: changed(store, lambda ada: None),
    "add_records": lambda store: store.add_records("ada", [Record("ada", "2", "tea", "red")]),
    "delete_user": lambda store: store.delete_user("ada"),
    "export_user": lambda store: store.export_user("ada"),
    "add_request": lambda store: store.add_request(Request("r", "ada", 1.0, "", "q", {})),
    "latest_requests": lambda store: store.latest_requests("ada", 3),
    "unlearned_feedback": lambda store: store.unlearned_feedback("ada", 3, bundle="bundle"),
    "add_job": lambda store: store.add_job("job", "ada", "fit"),
    "job": lambda store: store.job("ada", "job"),
    "add": lambda store: changed(
        store,
        lambda ada: ada.add([Record("ada", "1", "tea", "blue"), Record("ada", "3", "tea", "x")]),
    ),
    "count_with": lambda store: changed(store, lambda ada: ada.count_with([])),
    "remove": lambda store: changed(store, lambda ada: ada.remove("feedback:r")),
    "forget_heads": lambda store: changed(store, lambda ada: ada.forget_heads()),
    "put_heads": lambda store: changed(
        store, lambda ada: ada.put_heads("bundle", {"adapter": StoredHead(1, 0.0, b"1234")})
    ),
    "put_feedback": lambda store: changed(store, lambda ada: ada.put_feedback(FEEDBACK)),
    "add_response": lambda store: store.add_response(
        StoredResponse("a", "ada", 1.0, None, {}), version=None
    ),
    "responses": lambda store: store.responses("ada", ["b"]),
    "conversation": lambda store: store.conversation("ada", "b"),
    "delete_response": lambda store: store.delete_response("ada", "b", request="r"),
    "hand_over": lambda store: changed(
        store, lambda ada: (ada.put_feedback(SAME), ada.hand_over("1"))
    ),
    "mark_learned": lambda store: changed(store, lambda ada: ada.mark_learned(["r"])),
}


def test_every_method_of_the_store_is_one_of_the_two() -> None:
    methods = {
        name
        for kind in (Store, UserChange)
        for name, _ in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith("_")
    }
    assert methods == OF_ONE_USER.keys() | ABOUT_ALL.keys()


@pytest.mark.parametrize("method", OF_ONE_USER)
def test_each_statement_names_the_user(tmp_path: Path, method: str) -> None:
    store = Store(f"sqlite:///{tmp_path / 'store.db'}")
    for user in ("ada", "bob"):
        ids = ("1", "feedback:r")
        store.add_records(user, [Record(user, id, "tea", "green") for id in ids])
        store.add_key(Key(f"key-{user}", user, "", False, (user,), 1.0, None))
    store.add_request(Request("r", "bob", 1.0, "", "q", {}))
    store.add_response(StoredResponse("b", "bob", 1.0, None, {}), version=None)
    with store.change("bob") as bob:
        bob.put_feedback(StoredFeedback("of bob", 1.0, {"said": {}}))
    seen: list[Any] = []
    sa.event.listen(
        store.engine, "before_execute", lambda connection, statement, *_: seen.append(statement)
    )
    before = store.export_user("bob")
    seen.clear()
    if method == "add_request":
        store.prune(2.0)
        seen.clear()
    OF_ONE_USER[method](store)
    read = [statement for statement in seen if not isinstance(statement, sa.Insert)]
    assert read
    assert [str(statement) for statement in read if not names_a_user(statement)] == []
    for statement in seen:
        if isinstance(statement, sa.Insert) and statement.table in schema.OF_USERS:
            assert "user" in str(statement.compile().params) or "user" in str(statement)
    if method != "add_request":
        assert store.export_user("bob") == before


def names_a_user(statement: Any) -> bool:
    """Whether a condition of the statement is that a user's column equals a value."""
    mine = {table.c.user for table in schema.OF_USERS}
    mine |= {schema.users.c.key, schema.users.c.name, schema.key_users.c.name}
    tables = {part for part in visitors.iterate(statement) if isinstance(part, sa.Table)}
    tables |= {
        part.table
        for part in visitors.iterate(statement)
        if isinstance(part, sa.Column) and isinstance(part.table, sa.Table)
    }
    if not tables & OF_TENANTS:
        return True
    equals = [
        part
        for part in visitors.iterate(statement)
        if isinstance(part, sa.BinaryExpression) and part.operator is sa.sql.operators.eq
    ]
    return any(part.left in mine and isinstance(part.right, sa.BindParameter) for part in equals)
