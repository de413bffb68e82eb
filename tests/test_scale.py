"""What `benchmarks/scale.py` says of a series: slopes of known laws, verdicts, and runs that go on
where the last one stopped.
"""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

scale: Any = pytest.importorskip("scale", reason="the source package carries no benchmarks")

SIZES = (1_000, 3_000, 10_000, 100_000)


def repeats(exponent: float, noise: float = 0.02) -> list[list[float]]:
    rng = np.random.default_rng(0)
    return [
        [float(2.0 * x**exponent * np.exp(noise * rng.standard_normal())) for _ in range(3)]
        for x in SIZES
    ]


@pytest.mark.parametrize(
    ("exponent", "expected", "verdict"),
    [
        (0.0, 0.0, "flat"),
        (0.3, 0.0, "NOT flat"),
        (0.6, 1.0, "at most linear"),
        (1.0, 1.0, "at most linear"),
        (1.3, 1.0, "NOT at most linear"),
    ],
)
def test_a_known_power_gets_its_verdict(exponent: float, expected: float, verdict: str) -> None:
    slope = scale.slope(SIZES, repeats(exponent))
    assert slope.low <= exponent <= slope.high
    assert slope.value == pytest.approx(exponent, abs=0.05)
    assert slope.verdict(expected) == verdict


def test_what_scatters_too_much_is_not_called_flat() -> None:
    scattered = scale.slope(SIZES, [[1.0], [3.0], [0.5], [2.0]])
    assert scattered.verdict(0.0) == "not shown to be flat"
    assert scale.slope(SIZES[:2], [[1.0], [1.0]]).verdict(0.0) == "not shown to be flat"


def point(users: int) -> dict[str, Any]:
    """What a size of a linear `learn` and a flat rest would give; a user's heads have 1 KB."""
    heads = {"learn": users / 1000, "fit": users / 10_000}
    made: dict[str, Any] = {"users": users, "heads MB": heads}
    for figure in scale.SERIES:
        made[figure] = [users / 100 if figure == "learn cpu s" else 300.0]
    for name, own in heads.items():
        made[f"{name} peak MB"] = [300.0 + own]
    return made


def test_memory_of_heads_is_not_counted() -> None:
    points = {f"users {users}": point(users) for users in (100, 300, *SIZES)}
    rows = {row["series"]: row for row in scale.rows_of(points)}
    assert {row["verdict"] for row in rows.values()} == {"flat", "at most linear"}
    memory = rows["learn, peak MB without heads"]
    assert memory["slope"].value == pytest.approx(0.0, abs=1e-9)
    assert memory["from"] == scale.SMALLEST
    assert rows["ask, peak MB"]["from"] == 100


def test_a_run_goes_on_behind_what_is_kept(tmp_path: Path) -> None:
    names = ("records", "texts", "base_users", "calls", "runs", "seed")
    args = Namespace(out=tmp_path / "scale.json", **dict.fromkeys(names, 1))
    assert scale.stored(args) == {}
    points = {"users 100": point(100), "users 300": point(300)}
    scale.save(args, points)
    assert scale.stored(args) == points
    assert json.loads(args.out.read_text())["series"]
    args.records = 2
    with pytest.raises(SystemExit, match=r"scale\.json was measured with .*name another --out"):
        scale.stored(args)
