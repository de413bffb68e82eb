"""Tables of a run: figures, marks of the best, paired differences by user."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from scipy.stats import t

from hydra_llm.bench.report import tables as report
from hydra_llm.bench.results import compare, pair, queries_needed, tabulate
from hydra_llm.bench.runlog import RunLog, Sample
from hydra_llm.bench.stats import Paired, Relative
from hydra_llm.cli.main import run
from hydra_llm.errors import SettingsError
from hydra_llm.tasks.base import Task

STARS = Task("stars", "rating", "How many stars? {input}", ("1", "2", "3", "4", "5"))
USERS = tuple(f"u{i:02}" for i in range(12))
MANIFEST = {"data": "d", "task": STARS.to_json(), "llm": {"model": "m"}, "users": 12, "queries": 24}


def write(
    folder: Path,
    answers: Mapping[str, Sequence[str | None]],
    manifest: Mapping[str, object] = MANIFEST,
) -> Path:
    """A run in which each user has two queries whose gold answer is 3; `answers` by method, one for
    each user.
    """
    log = RunLog(folder, manifest)
    for place, user in enumerate(USERS):
        for query in ("a", "b"):
            for method, given in answers.items():
                log.add(Sample(method, user, query, "3", given[place], calls=1))
    return folder


OFF_BY = {0: "3", 1: "4", 2: "5"}


def answers(*errors: int) -> list[str | None]:
    """Twelve users' answers that are off by so much, repeated in turn."""
    return [OFF_BY[errors[i % len(errors)]] for i in range(12)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    actual = {
        "user-majority": answers(0),
        "hydra@4,8": answers(1, 0),
        "rag@4": answers(1),
        "rag@1": answers(2),
        "mbr": answers(1, 0, 0),
    }
    return write(tmp_path / "run", {**actual, "oracle": answers(0)})


def test_every_method_is_in_its_part_of_the_table(folder: Path) -> None:
    lines = report.make_report(report.open_run(folder)).rows
    actual = {line.method: (line.group, line.result.metrics["mae"][0]) for line in lines}
    assert actual == {
        "rag@1": ("prompt", 2.0),
        "rag@4": ("prompt", 1.0),
        "hydra@4,8": ("hydra", 0.5),
        "mbr": ("sampling", pytest.approx(1 / 3)),
        "oracle": ("bound", 0.0),
        "user-majority": ("control", 0.0),
    }
    assert list(actual) == ["rag@1", "rag@4", "hydra@4,8", "mbr", "oracle", "user-majority"]


def test_bounds_and_baselines_are_not_marked_as_best(folder: Path) -> None:
    opened = report.open_run(folder)
    places = report.make_report(opened).marks
    assert {key: place for key, place in places.items() if key[1] == "mae"} == {
        ("mbr", "mae"): 1,
        ("hydra@4,8", "mae"): 2,
    }


def change(actual: Relative | None) -> float:
    assert actual is not None
    return actual.change


def test_the_default_baseline_is_the_best_prompt(folder: Path) -> None:
    lines = {line.method: line for line in report.make_report(report.open_run(folder)).rows}
    assert lines["rag@4"].comparison is None
    assert change(lines["hydra@4,8"].over_prompts) == pytest.approx(
        (0.5 + 1 - math.sqrt(0.5)) / 2
    )  # MAE 1 to .5, RMSE 1 to .71
    assert change(lines["rag@1"].over_prompts) == pytest.approx(-1)
    named = {line.method: line for line in report.make_report(report.open_run(folder), "mbr").rows}
    assert named["mbr"].comparison is None
    with pytest.raises(SettingsError, match="no method 'best'"):
        report.make_report(report.open_run(folder), "best")


def test_comparison_counts_users_and_their_worst_tenth() -> None:
    def samples(values: Sequence[str]) -> list[Sample]:
        return [
            Sample("m", user, query, "3", value)
            for user, value in zip(USERS, values, strict=True)
            for query in "ab"
        ]

    base = samples(["4"] * 12)
    own = samples(["3"] * 5 + ["4"] * 4 + ["5"] * 3)
    actual = compare(STARS, own, base)
    assert (actual.wins, actual.ties, actual.losses) == (5, 4, 3)
    assert actual.worst_tenth == pytest.approx(-0.25)  # one step of four
    assert actual.metrics["mae"].difference == pytest.approx((-5 + 3) / 12)
    assert actual.metrics["mae"].samples == 24
    broken = [
        replace(sample, answer=None, error="HTTP 500") if sample.user == "u11" else sample
        for sample in own
    ]
    without = compare(STARS, broken, base)
    assert (without.wins, without.ties, without.losses) == (
        5,
        4,
        2,
    )  # failed is neither lost nor won
    assert without.metrics["mae"].samples == 22


def seeded(answers: Mapping[int, str], user: str = "u") -> list[Sample]:
    return [Sample("m", user, "q", "3", answer, seed=seed) for seed, answer in answers.items()]


def test_samples_are_paired_by_seed() -> None:
    def answers_of(
        own: Mapping[int, str], base: Mapping[int, str]
    ) -> list[tuple[str | None, str | None]]:
        return [(mine.answer, its.answer) for mine, its in pair(seeded(own), seeded(base))]

    assert answers_of({0: "1", 1: "2"}, {1: "4", 0: "3"}) == [("1", "3"), ("2", "4")]
    assert answers_of({0: "1", 1: "2"}, {0: "3"}) == [("1", "3"), ("2", "3")]
    assert answers_of({7: "1"}, {0: "3", 1: "4"}) == [("1", "3"), ("1", "4")]
    assert answers_of({0: "1", 1: "2", 2: "5"}, {1: "3", 2: "4", 3: "1"}) == [
        ("2", "3"),
        ("5", "4"),
    ]
    assert pair(seeded({0: "1"}), seeded({0: "1"}, "another")) == []


def test_samples_of_random_are_not_seeds() -> None:
    turns = [
        replace(sample, method="random@8")
        for sample in seeded({place: str(1 + place % 5) for place in range(8)})
    ]
    assert len(pair(turns, [sample for sample in turns if sample.seed < 2])) == 16
    for seeds in ({0: "1", 1: "2", 2: "3"}, {10: "1", 11: "2"}, {0: "4"}):
        for pairs in (pair(turns, seeded(seeds)), [(b, a) for a, b in pair(seeded(seeds), turns)]):
            assert sorted((a.seed, b.seed) for a, b in pairs) == sorted(
                (place, seed) for place in range(8) for seed in seeds
            )
    assert len(pair(turns, turns)) == 8


def test_a_result_over_seeds_counts_each_query_once() -> None:
    samples = [
        each for user, own in (("a", "1"), ("b", "3")) for each in seeded({0: own, 1: "3"}, user)
    ]
    (row,) = tabulate(STARS, samples)
    assert (row.queries, row.metrics["mae"][0]) == (2, 0.5)
    assert {seed: actual["mae"] for seed, actual in row.seeds.items()} == {0: 1.0, 1: 0.0}
    (single,) = tabulate(STARS, samples[:1])
    assert single.seeds == {}


def test_a_difference_needs_the_more_queries_the_smaller_it_is() -> None:
    def spread(difference: float, users: int, samples: int) -> Paired:
        """A difference whose standard error is .1, with Student's interval."""
        reach = 0.1 * float(t.ppf(0.975, users - 1))
        return Paired(difference, difference - reach, difference + reach, 0.3, samples, users)

    for users in (5, 12, 500):  # few users widen the interval, not the need
        assert queries_needed(spread(0.1, users, 100), 100) == math.ceil(100 * 2.8**2)
        assert queries_needed(spread(0.28, users, 300), 100) == 100  # three seeds of each
    assert queries_needed(Paired(0.0, -0.1, 0.1, 1.0, 100, 10), 100) is None
    assert queries_needed(Paired(0.1, math.nan, math.nan, math.nan, 1, 1), 1) is None


def test_overall_is_the_mean_over_tasks_of_common_methods(folder: Path, tmp_path: Path) -> None:
    other = write(
        tmp_path / "other",
        {"rag@4": answers(1), "hydra@4,8": answers(1), "new": answers(0)},
        {**MANIFEST, "data": "another"},
    )
    tables = [
        report.make_report(opened) for opened in (report.open_run(folder), report.open_run(other))
    ]
    actual = report.overall(tables)
    assert set(actual) == {"rag@4", "hydra@4,8"}
    first, second = (
        change({line.method: line for line in each.rows}["hydra@4,8"].over_prompts)
        for each in tables
    )
    assert actual["hydra@4,8"]["all metrics"].change == pytest.approx((first + second) / 2)
    assert report.overall(tables[:1]) == report.overall([tables[0], tables[0]]) == {}


def test_two_runs_are_compared_on_their_common_methods(folder: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other", {"rag@4": answers(0), "new": answers(1)})
    (method, actual), *more = report.compare_runs(
        report.open_run(folder), report.open_run(other)
    ).items()
    assert (method, more) == ("rag@4", [])
    assert (actual.wins, actual.metrics["mae"].difference) == (12, -1.0)
    foreign = write(tmp_path / "foreign", {"rag@4": answers(0)}, {**MANIFEST, "data": "e"})
    with pytest.raises(SettingsError, match="other data sets"):
        report.compare_runs(report.open_run(folder), report.open_run(foreign))
    lonely = write(tmp_path / "lonely", {"new": answers(0)})
    with pytest.raises(SettingsError, match="no method in common"):
        report.compare_runs(report.open_run(folder), report.open_run(lonely))


def test_a_run_that_goes_on_is_read_and_left_as_it_is(folder: Path) -> None:
    file = folder / "samples.jsonl"
    file.write_bytes(file.read_bytes() + b'{"method": "rag@4", "us')  # another process is writing
    before = file.read_bytes()
    assert len(report.open_run(folder).samples) == 6 * 24
    assert file.read_bytes() == before


def test_the_commands_print_it_and_write_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "report.md"
    assert run(["bench", "show", str(folder), "--markdown", str(text), "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    (shown,) = output["runs"]
    assert output["over_tasks"] == {}
    by_method = {row["method"]: row for row in shown["methods"]}
    assert by_method["mbr"]["against"]["wins"] == 8
    written = text.read_text()
    assert "| choosing without learning | mbr | 0.333 [" in written
    assert "### Against rag@4" in written
    assert "film" not in written
    assert run(["bench", "compare", str(folder), str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mbr"]["ties"] == 12
    odd = write(tmp_path / "odd", {}, MANIFEST)
    (odd / "samples.jsonl").unlink(missing_ok=True)
    (odd / "samples.jsonl").mkdir()
    for wrong, message in (
        (tmp_path, "is no run"),
        (odd, "samples.jsonl: cannot be read (Is a directory)"),
        (write(tmp_path / "old", {}, {**MANIFEST, "task": "stars"}), "older hydra-llm"),
    ):
        assert run(["bench", "show", str(wrong)]) == 2
        assert message in capsys.readouterr().err
