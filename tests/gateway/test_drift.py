"""Drift from feedback: what counts as wanted, the interval of the difference, where it is shown."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_llm.gateway.activity import FEEDBACK, HOUR, UNWANTED, WANTED, Activity
from hydra_llm.gateway.drift import BEFORE, RECENT, Judged, difference, drift, drift_of
from hydra_llm.store.store import Store
from hydra_llm.store.values import Happened

from .conftest import World, records_of, running

pytestmark = pytest.mark.anyio
NOW = 1_000 * 24 * HOUR + 5.0


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [  # Newcombe 1998, table II, method 10
        ((56, 70), (48, 80), (0.2, 0.0524, 0.3339)),
        ((9, 10), (3, 10), (0.6, 0.1705, 0.8090)),
        ((6, 7), (2, 7), (0.5714, 0.0582, 0.8062)),
        ((5, 56), (0, 29), (0.0893, -0.0381, 0.1926)),
        ((0, 10), (0, 20), (0.0, -0.1611, 0.2775)),
        ((10, 10), (0, 10), (1.0, 0.6075, 1.0)),
    ],
)
def test_the_interval_is_newcombes(
    one: tuple[int, int], other: tuple[int, int], expected: tuple[float, ...]
) -> None:
    sides = [Judged(7, count, wanted) for wanted, count in (one, other)]
    assert difference(*sides) == pytest.approx(expected, abs=5e-5)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 60), st.integers(0, 60))
def test_it_holds_the_difference_and_turns_with_the_sides(a: int, b: int, c: int, d: int) -> None:
    one, other = Judged(7, a + b, a), Judged(28, c + d, c)
    found = difference(one, other)
    if not (a + b and c + d):
        assert found is None
        return
    assert found is not None
    value, low, high = found
    assert -1 - 1e-9 <= low <= value + 1e-9
    assert value - 1e-9 <= high <= 1 + 1e-9
    assert difference(other, one) == pytest.approx((-value, -high, -low))


def happened(ago: float, wanted: int, unwanted: int) -> list[Happened]:
    hour = int(NOW - ago) // HOUR * HOUR
    rows = ((WANTED, wanted), (UNWANTED, unwanted))
    return [Happened(hour, FEEDBACK, name, count) for name, count in rows]


def test_each_hour_is_on_one_side() -> None:
    rows = [*happened(HOUR, 5, 15), *happened(RECENT + HOUR, 40, 10), *happened(BEFORE, 1, 0)]
    rows += happened(RECENT + BEFORE + HOUR, 1000, 0)  # too old
    rows += [Happened(rows[0].hour, "answer", "personal", 99)]
    found = drift(rows, NOW)
    assert (found.recent, found.before) == (Judged(7, 20, 5), Judged(28, 51, 41))
    assert found.found
    assert found.as_json()["recent"] == {"days": 7, "feedback": 20, "wanted": 5}
    better = drift([*happened(HOUR, 15, 5), *happened(RECENT + HOUR, 4, 40)], NOW)
    assert not better.found
    assert drift([], NOW).as_json() == {
        "recent": {"days": 7, "feedback": 0, "wanted": 0},
        "before": {"days": 28, "feedback": 0, "wanted": 0},
        "difference": None,
        "drift": False,
    }


def test_it_is_read_of_the_store(store: Store) -> None:
    for ago, judged in ((HOUR, (False,) * 9), (RECENT + 2 * HOUR, (True,) * 9)):
        activity = Activity(clock=lambda ago=ago: NOW - ago)  # type: ignore[misc]
        activity.answered("personal", {})
        for wanted in judged:
            activity.judged(wanted)
        activity.keep(store)
    found = drift_of(store, NOW)
    assert (found.recent.wanted, found.before.wanted, found.found) == (0, 9, True)


async def judged(world: World, **said: object) -> bool:
    """Give feedback on a fresh answer; whether it counts as wanted."""
    reply = (await world.ask("a storm at sea")).json()
    sent = {"request_id": reply["personalization"]["request_id"], **said}
    assert (await world.http.post("/v1/feedback", json=sent)).status_code == 200
    gateway = world.app.state.gateway
    before = {own.name: own.count for own in gateway.store.activity(0, kind=FEEDBACK)}
    gateway.telemetry.activity.keep(gateway.store)
    after = {own.name: own.count for own in gateway.store.activity(0, kind=FEEDBACK)}
    (name,) = [name for name in after if after[name] != before.get(name, 0)]
    assert after[name] == before.get(name, 0) + 1
    return bool(name == WANTED)


async def test_what_counts_as_wanted(store: Store, bundles: dict[str, Path]) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store, bundles["titles"], candidates=3) as world:
        says = ["calm", "loud", "odd"]
        world.upstream.rule = lambda body, index: says[index]
        assert await judged(world, chosen=0)
        assert not await judged(world, chosen=1)
        assert await judged(world, rating=0.5)
        assert not await judged(world, rating=0.4)
        assert not await judged(world, rejected=True)
        assert not await judged(world, edited="neither of them")
        shown = (await world.http.get("/v1/activity")).json()["drift"]
        assert shown["recent"]["feedback"] == 6
        page = (await world.http.get("/metrics")).text
        assert 'hydra_wanted_ratio{days="7"}' in page
        assert "hydra_drift 0.0" in page


async def test_an_edit_that_leaves_the_label_is_wanted(
    store: Store, bundles: dict[str, Path]
) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store, bundles["tags"]) as world:
        reply = (await world.ask("a storm at sea")).json()
        got = reply["choices"][0]["message"]["content"]
        other = next(label for label in ("calm", "loud") if label != got.strip())
        assert await judged(world, edited=f" {got}\n")
        assert not await judged(world, edited=other)
