"""What was spent, on both databases: sums are right whoever adds at once and whoever is deleted."""

import threading
import time

import pytest

from hydra_llm.store import schema
from hydra_llm.store.store import Store
from hydra_llm.store.values import NANO, Key, Limited, Spend, Spender, Total
from hydra_llm.types import Record

DAY = "2026-11-30"
ONE = Spend(1, 100, 20, 10, 0, 3 * NANO)


def total(store: Store) -> Spend:
    (group,) = store.spend()
    return group.spend


def test_sums_by_any_column(store: Store) -> None:
    assert total(store) == Spend()
    assert store.spend("model") == []
    ada, bob = Spender(DAY, "k1", "ada", "m"), Spender("2026-11-29", "k2", "bob", "n", "samples")
    store.add_spend({ada: ONE, bob: ONE})
    store.add_spend({ada: ONE})
    assert total(store) == ONE + ONE + ONE
    assert [(g.by, g.spend.calls) for g in store.spend("user")] == [
        ({"user": "ada"}, 2),
        ({"user": "bob"}, 1),
    ]
    assert [g.by["day"] for g in store.spend("day", "kind")] == ["2026-11-29", DAY]
    assert [g.by for g in store.spend("model", limit=1)] == [{"model": "m"}]
    assert store.spend("key", since=DAY, until=DAY)[0].by == {"key": "k1"}
    assert store.spend(users=["bob"])[0].spend == ONE
    assert store.spend(key="k1", since="2026-12-01")[0].spend == Spend()
    assert store.counts()["spend"] == 2


def test_what_no_price_is_known_of_costs_not_zero() -> None:
    assert Spend().money == 0
    assert ONE.money == 3.0
    unpriced = Spend(1, 5, 5, 0, 10)
    assert unpriced.money is None
    assert (ONE + unpriced).money == 3.0


def test_servers_add_at_once(store: Store) -> None:
    """In any order of their users: none is lost, and none waits for another for ever."""
    users = [f"u{i}" for i in range(5)]
    keys = {user: user_key(store, user) for user in users}

    def add(turn: int) -> None:
        for i in range(20):
            order = users if (turn + i) % 2 else users[::-1]
            spent = {Spender(DAY, "k", user, "m", user_key=keys[user]): ONE for user in order}
            store.add_spend(spent, {Total("user", user, DAY): ONE for user in order})

    threads = [threading.Thread(target=add, args=(turn,)) for turn in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert total(store).calls == 4 * 20 * 5
    assert store.spent([Total("user", "u3", DAY)]) == {
        Total("user", "u3", DAY): Spend(prompt_tokens=80 * 120, cost=80 * 3 * NANO)
    }


def user_key(store: Store, user: str) -> int:
    store.add_records(user, [Record(user, "1", "q", "a")])
    version = store.state(user).version
    assert version is not None
    return schema.key_of(version)


def test_a_deleted_users_spend_is_nobodys(store: Store) -> None:
    """The sums stay; neither the name nor a key that was this user's alone is anywhere."""
    ada = user_key(store, "ada")
    for id, users in (("own", ("ada",)), ("both", ("ada", "bob"))):
        store.add_key(Key(id, id, "", False, users, 1.0, None, bound=id == "own"))
        store.set_limit("key", id, "5/day")
    store.set_limit("user", "ada", "5/day")
    spenders = [Spender(DAY, key, "ada", "m", user_key=ada) for key in ("own", "both")]
    rest = [Spender(DAY, "own", "", "m"), Spender(DAY, "both", "bob", "m")]
    totals = [Total("user", "ada", DAY), Total("key", "own", DAY), Total("key", "both", DAY)]
    store.add_spend(dict.fromkeys([*spenders, *rest], ONE), dict.fromkeys(totals, ONE))
    export = store.export_user("ada")
    assert export is not None
    assert [row["cost"] for row in export["spend"]] == [3 * NANO] * 2
    before = total(store)
    counts = store.delete_user("ada")
    assert counts is not None
    assert (counts["spend"], counts["keys"]) == (2, 1)
    assert total(store) == before
    assert {(g.by["user"], g.by["key"], g.spend.calls) for g in store.spend("user", "key")} == {
        ("", "", 2),
        ("", "both", 1),
        ("bob", "both", 1),
    }
    assert set(store.spent(totals)) == {Total("key", "both", DAY)}
    assert store.limits() == [Limited("key", "both", "5/day")]
    # A request that was under way comes to its end.
    store.add_spend({spenders[1]: ONE}, {totals[0]: ONE})
    assert store.spend(users=["ada"])[0].spend == Spend()
    assert set(store.spent(totals)) == {Total("key", "both", DAY)}
    assert total(store) == before + ONE
    again = user_key(store, "ada")
    assert again != ada
    store.add_spend({spenders[1]: ONE})
    assert store.spend(users=["ada"])[0].spend == Spend()


def test_a_user_of_whom_nothing_else_is_kept_is_deleted_too(store: Store) -> None:
    store.add_spend({Spender(DAY, "k", "eve", "m"): ONE})
    assert store.delete_user("eve") == {"keys": 0, "spend": 1}
    assert store.spend("user")[0].by == {"user": ""}
    assert store.delete_user("eve") is None


def test_old_spend_is_nobodys(store: Store) -> None:
    old = [Spender("2025-01-01", "k", user, "m") for user in ("ada", "bob")]
    store.add_spend(dict.fromkeys([*old, Spender(DAY, "k", "ada", "m")], ONE))
    assert store.forget_spenders("2026-01-01") == 2
    assert store.forget_spenders("2026-01-01") == 0
    assert [(tuple(g.by.values()), g.spend.calls) for g in store.spend("day", "user", "key")] == [
        (("2025-01-01", "", ""), 2),
        ((DAY, "ada", "k"), 1),
    ]


def test_totals_of_ended_periods_go(store: Store) -> None:
    periods = ["2026-11-29", DAY, "2026-10", "2026-11", "m0100", "m0200"]
    store.add_spend({}, {Total("key", "k", period): ONE for period in periods})
    store.prune_totals(DAY, "2026-11", "m0150")
    left = store.spent([Total("key", "k", period) for period in periods])
    assert {t.period for t in left} == {DAY, "2026-11", "m0200"}


def test_a_limit_is_set_replaced_and_removed(store: Store) -> None:
    store.set_limit("user", "ada", "5/day")
    store.set_limit("user", "ada", "6/day")
    store.set_limit("key", "k", "none")
    assert store.limits() == [Limited("key", "k", "none"), Limited("user", "ada", "6/day")]
    store.set_limit("user", "ada", None)
    assert store.limits() == [Limited("key", "k", "none")]


@pytest.mark.slow
def test_a_deletion_amid_additions_keeps_the_sums(store: Store) -> None:
    ada, ended = user_key(store, "ada"), time.monotonic() + 1.0

    def add() -> None:
        while time.monotonic() < ended:
            for spender in (Spender(DAY, "k", "ada", "m", user_key=ada), Spender(DAY, "k", "x")):
                store.add_spend({spender: ONE})
                added.append(spender)

    added: list[Spender] = []
    threads = [threading.Thread(target=add) for _ in range(3)]
    for thread in threads:
        thread.start()
    store.delete_user("ada")
    store.delete_user("x")
    for thread in threads:
        thread.join()
    assert total(store).calls == len(added)
    assert store.spend(users=["ada"])[0].spend == Spend()
