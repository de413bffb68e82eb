"""Gain and harm by groups of users: `bench show --by`."""

import json
import math
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from hydra_llm.bench.report.groups import ByGroup, by_group, grouped
from hydra_llm.bench.runlog import Sample
from hydra_llm.cli.main import run
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.datasets.native import load, save
from hydra_llm.types import Query, Record

from .test_report import MANIFEST, OFF_BY, STARS, USERS, write


def changed(errors: dict[str, int], group_of: dict[str, str]) -> ByGroup:
    """The method is off by so much on a user's two queries; the baseline is off by 1."""

    def samples(method: str, off: dict[str, int]) -> list[Sample]:
        return [Sample(method, u, q, "3", OFF_BY[own]) for u, own in off.items() for q in "ab"]

    own, base = samples("m", errors), samples("b", dict.fromkeys(errors, 1))
    return by_group(STARS, list(zip(own, base, strict=True)), group_of, ("sex", "m", "b"))


def test_gain_harm_and_gap_of_groups() -> None:
    """A step is a quarter. Of the first group one of three loses a step, of the other none."""
    found = changed(
        {"a": 0, "b": 0, "c": 2, "d": 0, "e": 0, "f": 1}, dict(zip("abcdef", "xxxyyy", strict=True))
    )
    worst, best = found.groups
    assert (worst.group, best.group) == ("x", "y")
    assert (worst.users, worst.queries) == (3, 6)
    assert worst.gain == pytest.approx(0.25 / 3)
    assert (worst.harmed, worst.harm) == (pytest.approx(1 / 3), pytest.approx(0.25 / 3))
    assert (best.gain, best.harmed, best.harm) == (pytest.approx(0.5 / 3), 0, 0)
    assert found.gap == pytest.approx(0.25 / 3)


def test_gains_and_harm_are_those_of_fairlearn() -> None:
    from fairlearn.metrics import MetricFrame

    dice, users = np.random.default_rng(0), [f"u{i}" for i in range(40)]
    group_of = {user: str(dice.choice(["x", "y", "z"])) for user in users}
    off = {user: int(dice.integers(0, 3)) for user in users}
    found = changed(off, group_of)
    changes = {user: (1 - own) / 4 for user, own in off.items()}
    frame = MetricFrame(
        metrics={
            "gain": lambda _, own: np.mean(own),
            "harm": lambda _, own: np.mean(np.maximum(0, -np.asarray(own))),
            "harmed": lambda _, own: np.mean(np.asarray(own) < 0),
        },
        y_true=[0] * len(users),
        y_pred=[changes[user] for user in users],
        sensitive_features=[group_of[user] for user in users],
    )
    golden = frame.by_group
    for own in found.groups:
        for name in ("gain", "harm", "harmed"):
            assert getattr(own, name) == pytest.approx(golden.loc[own.group, name])
    assert [own.group for own in found.groups] == list(golden["gain"].sort_values().index)
    assert found.gap == pytest.approx(frame.difference()["gain"])


def test_the_gaps_p_value_is_that_of_all_deals() -> None:
    errors = {"a": 0, "b": 0, "c": 0, "d": 1, "e": 2, "f": 2, "g": 1}
    found = changed(errors, dict(zip("abcdefg", "xxxyyyy", strict=True)))
    gains = [0.25, 0.25, 0.25, 0, -0.25, -0.25, 0]
    gaps = [abs(np.mean(deal[:3]) - np.mean(deal[3:])) for deal in permutations(gains)]
    exact = np.mean(np.array(gaps) >= found.gap - 1e-9)
    assert found.gap == pytest.approx(0.375)
    assert found.gap_p == pytest.approx(exact, abs=0.01)
    low, high = found.gap_interval
    assert low <= found.gap <= high


def test_groups_of_one_user_have_no_gap() -> None:
    found = changed({"a": 0, "b": 2}, {"a": "x"})
    assert [own.group for own in found.groups] == ["unknown", "x"]
    assert math.isnan(found.gap)
    assert found.to_json()["gap"] is None


def test_numbers_are_divided_into_ranges() -> None:
    ages = {f"u{i}": float(age) for i, age in enumerate(range(20, 40))}
    groups = grouped(ages)
    sizes = [list(groups.values()).count(name) for name in dict.fromkeys(groups.values())]
    assert list(dict.fromkeys(groups.values())) == ["20 to 24", "25 to 29", "30 to 34", "35 to 39"]
    assert sizes == [5, 5, 5, 5]
    some = grouped({**ages, "none": "unknown"})
    assert some == {**groups, "none": "unknown"}, "one user without an age changes no other's group"
    assert grouped({"a": 1, "b": 2.0, "c": 1}) == {"a": "1", "b": "2", "c": "1"}
    assert grouped({"a": "F", "b": " ", "c": 3}) == {"a": "F", "b": "unknown", "c": "3"}
    assert set(grouped({f"u{i}": 5.0 if i else float(i) for i in range(9)}).values()) == {"0", "5"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve new users, whose number of records differs, every other one of them `F`."""
    records = [
        Record(user, f"r{i}", f"text {i}", "3")
        for place, user in enumerate(USERS)
        for i in range(place + 1)
    ]
    queries = [Query(user, query, "a text", "3") for user in USERS for query in ("a", "b")]
    made = DataSet.from_records(STARS, dict.fromkeys(USERS, "test"), records, queries)
    save(made, tmp_path / "d")
    users = [
        {"user": user, "split": "test", "sex": "FM"[place % 2]} for place, user in enumerate(USERS)
    ]
    lines = "".join(json.dumps(user) + "\n" for user in users)
    (tmp_path / "d" / "users.jsonl").write_text(lines)
    return tmp_path / "d"


@pytest.fixture
def folder(tmp_path: Path, data: Path) -> Path:
    """HYDRA is right for every other user."""
    manifest = {**MANIFEST, "data": load(data).digest}
    answers = {"hydra@4,8": [OFF_BY[i % 2] for i in range(12)], "rag@4": [OFF_BY[1]] * 12}
    return write(tmp_path / "run", answers, manifest)


def test_show_by_a_column(data: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = ["bench", "show", str(folder), "--data", str(data), "--by"]
    assert run([*shown, "sex"]) == 0
    printed = capsys.readouterr().out
    assert "hydra@4,8 minus rag@4 by sex, the worst group first" in printed
    assert "Gap between the best and the worst group: +0.250 [+0.250, +0.250]" in printed
    assert run([*shown, "sex", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["runs"][0]["by"]
    assert [(own["group"], own["users"], own["gain"]) for own in found["groups"]] == [
        ("M", 6, 0),
        ("F", 6, pytest.approx(0.25)),
    ]
    assert found["gap_p"] < 0.01
    for field in ("history", "activity"):
        assert run([*shown, field]) == 0
        assert f"by {field}, the worst group first" in capsys.readouterr().out


def test_faults_of_groups_are_one_line(
    data: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = ["bench", "show", str(folder)]
    assert run([*shown, "--by", "sex"]) == 2
    assert "--by sex needs --data FOLDER" in capsys.readouterr().err
    assert run([*shown, "--by", "age", "--data", str(data)]) == 2
    assert "users.jsonl has no such column: history, activity, sex" in capsys.readouterr().err
    other = write(tmp_path / "other", {"hydra": [OFF_BY[0]] * 12, "rag@4": [OFF_BY[1]] * 12})
    assert run(["bench", "show", str(other), "--by", "sex", "--data", str(data)]) == 2
    assert "has answered another data set" in capsys.readouterr().err
