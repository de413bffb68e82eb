"""Users' rows in a temporary file: what comes back, what stays in memory, threads."""

import random
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_llm import rows as module
from hydra_llm.errors import UserFault
from hydra_llm.rows import LATEST, Lazy, Rows

added = st.lists(st.tuples(st.sampled_from("abcd"), st.text() | st.lists(st.integers())))


def plain(user: str, own: list[Any]) -> list[tuple[str, Any]]:
    return [(user, row) for row in own]


@given(added)
def test_a_users_rows_come_back_in_order(pairs: list[tuple[str, Any]]) -> None:
    """Whoever's rows stand between them, and also when they are read before more are added."""
    rows, expected = Rows(plain), dict[str, list[Any]]()
    for user, row in pairs:
        rows.add(user, row)
        expected.setdefault(user, []).append((user, row))
        assert rows[user] == expected[user]
        assert rows.count(user) == len(expected[user])
    assert rows == expected
    assert list(rows) == list(expected), "users stand in the order of their first rows"
    assert "nobody" not in rows
    assert rows.count("nobody") == 0
    with pytest.raises(KeyError):
        rows["nobody"]


def test_values_of_the_latest_users_alone_stay_in_memory() -> None:
    made = list[str]()

    def value(user: str) -> str:
        made.append(user)
        return user * 2

    users = [f"u{number}" for number in range(LATEST + 1)]
    values = Lazy(users, value)
    assert (len(values), list(values), made) == (len(users), users, [])
    assert values["u0"] == values["u0"] == "u0u0"
    assert made == ["u0"]
    assert list(values.values()) == [user * 2 for user in users]
    assert values["u0"] == "u0u0"
    assert made == [*users, "u0"], "it had to make room"


def test_memory_does_not_hold_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 MB of rows of 500 users, of which a read one takes its own alone."""
    monkeypatch.setattr(module, "MEMORY_BYTES", 2**16)
    rows, text = Rows(plain), "x" * 800
    tracemalloc.start()
    for number in range(20_000):
        rows.add(f"u{number // 40}", text)
    assert sum(map(len, rows.values())) == 20_000
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    latest = LATEST * 40 * (len(text) + 300)
    assert held < latest + 2**20
    assert peak < latest + 2**21


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_a_full_disk_is_one_line_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(size: int) -> Any:
        return Path("/dev/full").open("wb+", buffering=0)

    monkeypatch.setattr(module, "SpooledTemporaryFile", full)
    with pytest.raises(UserFault, match=r"cannot keep records \(.*No space.*TMPDIR"):
        Rows(plain).add("u", "row")


def test_threads_read_what_belongs_to_each_user() -> None:
    rows = Rows(plain)
    for number in range(3000):
        rows.add(f"u{number % 300}", number)
    draw = random.Random(0)
    users = [f"u{draw.randrange(300)}" for _ in range(2000)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(rows.raw, users))
    assert all(
        own == list(range(int(user[1:]), 3000, 300)) for user, own in zip(users, found, strict=True)
    )
