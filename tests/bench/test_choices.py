"""The benchmark on recorded choices: figures by hand, controls, and a run of the commands that
needs no LLM and is repeated to the digit.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hydra_llm.bench.choices import Shuffled, by_earlier, earlier, figures
from hydra_llm.bench.method import find_methods
from hydra_llm.bench.report.findings import findings
from hydra_llm.bench.report.sweeps import sweep_rows
from hydra_llm.bench.report.tables import comparison_rows, make_report, open_run, results_table
from hydra_llm.bench.results import compare, scored, tabulate
from hydra_llm.bench.runlog import Sample, as_read
from hydra_llm.bundle import Bundle
from hydra_llm.cli.main import run
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.datasets.native import load, save
from hydra_llm.errors import SettingsError
from hydra_llm.history import as_query
from hydra_llm.model.head import Head
from hydra_llm.tasks.base import CHOICE_METRICS, Task
from hydra_llm.types import Answer, Candidate, Choice, Proposal, Query
from tests.made_choices import TASK, choices_of, write_choices

replay = pytest.importorskip("replay", reason="the source package carries no benchmarks")
publish = pytest.importorskip("publish", reason="the source package carries no benchmarks")

QUERY = Query("ada", "q", "then", "b", offered=("a", "b", "c", "d"))


def answer(
    scores: list[float | None], chosen: int = 0, shares: list[float] | None = None
) -> Answer:
    given = shares or [None] * len(scores)
    candidates = tuple(
        Candidate(text, text, score=score, probability=share)
        for text, score, share in zip(QUERY.offered, scores, given, strict=True)
    )
    return Answer("a", Proposal(QUERY, (), (), (), candidates), candidates, chosen)


@pytest.mark.parametrize(
    ("scores", "chosen", "accuracy", "mrr"),
    [
        ([0.0, 2.0, 1.0, -1.0], 1, 1.0, 1.0),
        ([3.0, 2.0, 1.0, -1.0], 0, 0.0, 1 / 2),
        ([3.0, 2.0, 4.0, 5.0], 3, 0.0, 1 / 4),
        ([0.0, 0.0, 0.0, 0.0], 0, 1 / 4, (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4),  # by lot
        ([1.0, 1.0, 0.0, 0.0], 0, 1 / 2, (1 + 1 / 2) / 2),
        ([2.0, 1.0, 1.0, 0.0], 0, 0.0, (1 / 2 + 1 / 3) / 2),
        ([None, None, None, None], 2, 0.0, 1 / 3),  # the pick, then in the order shown
    ],
)
def test_figures_of_a_choice(
    scores: list[float | None], chosen: int, accuracy: float, mrr: float
) -> None:
    found = figures(answer(scores, chosen))
    assert found == pytest.approx({"choice_accuracy": accuracy, "mrr": mrr})


def test_log_loss_is_that_of_the_one_that_was_taken() -> None:
    found = figures(answer([1.0, 2.0, 0.0, 0.0], 1, [0.2, 0.7, 0.05, 0.05]))
    assert found["log_loss"] == pytest.approx(-math.log(0.7))


def test_metrics_are_means_and_absent_without_probabilities() -> None:
    values = [{"choice_accuracy": 1.0, "mrr": 1.0}, {"choice_accuracy": 0.0, "mrr": 0.5}]
    samples = [
        Sample("first", f"u{i}", "q", "b", "a", choice={"earlier": 3.0, **own})
        for i, own in enumerate(values)
    ]
    metrics = scored(TASK, samples)
    assert metrics["choice_accuracy"].value == 0.5
    assert metrics["mrr"].value == 0.75
    assert math.isnan(metrics["log_loss"].value)
    failed = Sample("first", "u2", "q", "b", None, error="no")
    assert scored(TASK, [*samples, failed])["mrr"].value == 0.75
    (row,) = tabulate(TASK, samples)
    assert row.to_json()["metrics"]["log_loss"] == [None, None, None]


def test_what_has_no_log_loss_has_not_failed() -> None:
    """A method without probabilities, with and without a failed call, and one without answers."""
    known = {"earlier": 3.0, "choice_accuracy": 1.0, "mrr": 1.0}

    def made(method: str, failed: int, **more: float) -> list[Sample]:
        every = [Sample(method, f"u{i}", "q", "b", "b", choice=known | more) for i in range(6)]
        dead = [replace(s, answer=None, choice={}, error="no") for s in every[:failed]]
        return [*dead, *every[failed:]]

    base = made("hydra", 0, log_loss=0.5)
    others = {f"first {n}": made(f"first {n}", n) for n in (0, 1, 6)}
    table = results_table(tabulate(TASK, [s for own in others.values() for s in own]))
    assert [row["log-loss"] for row in table] == ["none", "none", "failed"]
    against = {name: compare(TASK, own, base) for name, own in others.items()}
    rows = comparison_rows(against)
    assert [row["log_loss"] for row in rows] == ["none", "none", "failed"]
    assert [row["choice_accuracy"][:6] for row in rows] == ["+0.000", "+0.000", "failed"]
    assert [row["worst tenth"] for row in rows] == ["+0.000", "+0.000", ""]
    reports = [row.to_json() for row in tabulate(TASK, others["first 1"])]
    methods = [{**reports[0], "against": against["first 1"].to_json()}]
    point = {"x": 1, "methods": methods}
    result = as_read({"x": "users", "metric": "log_loss", "points": [point]})
    (row,) = sweep_rows(result)
    assert (row["log_loss"], row["log_loss minus first point's"]) == ("none", "none")


def test_earlier_choices_are_counted() -> None:
    records = choices_of("ada", 5, long=True)
    assert earlier(records, as_query(records[3])) == {"earlier": 3.0}
    assert earlier(records, Query("ada", "q", "x")) == {}


def test_findings_by_the_number_of_earlier_choices() -> None:
    own = [
        Sample("hydra", "u", str(i), "b", "a", choice={"earlier": i, "choice_accuracy": i >= 4})
        for i in range(8)
    ]
    (sentence,) = by_earlier({"hydra": own}, "hydra")
    assert "after 0 to 1 hydra 0.000 (2 choices)" in sentence
    assert "after 6 to 7 hydra 1.000 (2 choices)" in sentence


@pytest.mark.filterwarnings("error")
def test_a_rival_without_answers_has_failed() -> None:
    own = [
        Sample("hydra", "u", str(i), "b", "b", choice={"earlier": i, "choice_accuracy": 1.0})
        for i in range(8)
    ]
    dead = [replace(s, method="mismatched", choice={"earlier": 0.0}, error="no") for s in own]
    (sentence,) = by_earlier({"hydra": own, "mismatched": dead}, "hydra")
    assert sentence.count("hydra 1.000, mismatched failed (2 choices)") == 4
    assert "nan" not in sentence


def test_shuffled_heads_are_those_of_others_with_the_own_age() -> None:
    heads = {f"u{i}": Head(np.array([float(i)]), records=i, until=float(i)) for i in range(5)}
    other = Shuffled(heads, 0)
    assert all(other[name].numbers[0] != heads[name].numbers[0] for name in heads)
    assert sorted(own.numbers[0] for own in other.values()) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert all(other[name].records == heads[name].records for name in heads)


def test_methods_of_recorded_choices() -> None:
    able = [method.name for method in find_methods(["all"], "generation", choices=True)]
    assert able[:2] == ["hydra", "hydra-shared"]
    assert {"no-history", "first", "longest", "random", "mismatched"} <= set(able)
    assert not {"rag", "mbr", "scorer-only"} & set(able)
    others = [method.name for method in find_methods(["all"], "generation", choices=False)]
    assert not {"first", "longest", "shuffled-heads"} & set(others)
    with pytest.raises(SettingsError, match="'rag' cannot answer recorded choices: take some of"):
        find_methods(["rag"], "generation", choices=True)
    with pytest.raises(SettingsError, match="'first' answers recorded choices only"):
        find_methods(["first"], "generation", choices=False)


@pytest.mark.slow
@pytest.mark.usefixtures("shared_minilm")
def test_a_run_on_choices_needs_no_llm_and_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = write_choices(tmp_path / "next"), tmp_path / "run"
    assert run(["learn", str(data), "--out", str(tmp_path / "bundle")]) == 0
    assert run(["fit", str(data), "--bundle", str(tmp_path / "bundle")]) == 0
    assert run(["bench", "run", str(data), "--out", str(out)]) == 0
    report = make_report(open_run(out))
    assert report.baseline == "random"
    rows = {row.method: row.result.metrics for row in report.rows}
    assert rows["random"]["choice_accuracy"][0] == pytest.approx(1 / 3)
    assert rows["random"]["log_loss"][0] == pytest.approx(math.log(3))
    assert rows["longest"]["choice_accuracy"][0] == 0.5
    assert all(row.result.calls == 0 for row in report.rows)
    assert any("earlier choices" in sentence for sentence in findings(report))
    monkeypatch.setattr(replay, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(publish, "RESULTS", tmp_path / "results")
    command = ["publish.py", str(out), "next", "--data", "next", "--against", "random"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as end:
        publish.main()
    assert not end.value.code
    commands = json.loads((tmp_path / "results" / "next" / "commands.json").read_text())
    assert commands == {"data": "next", "bench run": [], "against": "random"}
    published, again = replay.replay_run("next", tmp_path, tmp_path / "again")
    assert replay.differing(published, again)[0] == []


def write_log(file: Path, users: int, each: int) -> None:
    """A log of choices as JSON lines: every other user takes the longest, the others the shortest;
    what is taken begins with a word of the input.
    """
    rows = []
    for number in range(users):
        for choice in choices_of(f"user{number}", each, long=number % 2 == 0):
            word = choice.input.split()[0]
            texts = [
                f"{word} {text}" if place == choice.chosen else text
                for place, text in enumerate(choice.candidates)
            ]
            row = {"user": choice.user, "input": choice.input, "chosen": choice.chosen}
            rows.append({**row, "time": choice.time, "candidates": texts})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
@pytest.mark.usefixtures("shared_minilm")
def test_a_log_is_imported_and_run_by_folds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every user is new once; the word model reads choices as it reads records."""
    write_log(tmp_path / "log.jsonl", users=9, each=12)
    data, out = tmp_path / "data", tmp_path / "run"
    place = ["--out", str(data), "--choices", "--prompt", "Go on: {input}"]
    assert run(["data", "import", str(tmp_path / "log.jsonl"), *place]) == 0
    command = ["bench", "run", str(data), "--folds", "3", "--set", f"cache={tmp_path / 'cache'}"]
    command += ["--methods", "hydra,hydra-shared,no-history,mismatched,shuffled-heads,longest"]
    capsys.readouterr()
    assert run([*command, "--out", str(out), "--json"]) == 0
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)}
    queries = sum(1 for _ in load(data).stream_queries())
    assert {row["queries"] for row in rows.values()} == {queries}
    assert all(row["calls"] == row["failed"] == 0 for row in rows.values())
    accuracy = {name: row["metrics"]["choice_accuracy"][0] for name, row in rows.items()}
    assert accuracy["hydra"] > 0.8 > accuracy["longest"]
    bundles = [Bundle.load(out / f"bundle-{fold}") for fold in (1, 2, 3)]
    new = [set(bundle.records) - set(bundle.trained_on) for bundle in bundles]
    assert sorted(user for own in new for user in own) == sorted(load(data).users())
    for bundle, own in zip(bundles, new, strict=True):
        assert bundle.word_model is not None
        assert "expected_rouge" in bundle.scorers["adapter"].side_names
        assert bundle.population.choices == sum(len(bundle.records[u]) for u in bundle.trained_on)
        known = {record.id for user in own for record in bundle.records[user]}
        assert not known & {query.id for user in own for query in load(data).queries(user)}
    lines = (out / "samples.jsonl").read_text()
    assert run([*command, "--out", str(out)]) == 0
    assert (out / "samples.jsonl").read_text() == lines


@pytest.mark.slow
@pytest.mark.usefixtures("shared_minilm")
def test_choices_among_labels_run_by_folds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pick is one of the labels that were offered; training users' choices need no LLM."""
    labels = ("calm", "loud", "odd")
    task = Task("tags", "classification", "Which? {input}", labels, tuple(CHOICE_METRICS))
    records, queries = list[Choice](), list[Query]()
    for user in (f"u{number}" for number in range(4)):
        for place in range(6):
            own, text = labels[place % 2], ("quiet night", "busy street")[place % 2]
            shown = ("odd", own) if place % 3 else (own, "odd")
            fields = (user, f"{user}-{place}", f"{text} {place}", own, str(2000 + place))
            if place < 4:
                taken = {"candidates": shown, "chosen": shown.index(own)}
                records.append(Choice(*fields, position=place, **taken))  # type: ignore[arg-type]
            else:
                queries.append(Query(*fields, offered=shown))
    splits = {f"u{number}": "train" for number in range(4)}
    save(DataSet.from_records(task, splits, records, queries), tmp_path / "data")  # type: ignore[arg-type]
    command = ["bench", "run", str(tmp_path / "data"), "--folds", "2", "--json"]
    command += ["--methods", "hydra,random", "--out", str(tmp_path / "run")]
    capsys.readouterr()
    assert run([*command, "--set", f"cache={tmp_path / 'cache'}"]) == 0
    hydra, lot = json.loads(capsys.readouterr().out)
    assert hydra["queries"] == lot["queries"] == 8
    assert hydra["failed"] == hydra["calls"] == 0
    assert hydra["metrics"]["choice_accuracy"][0] == 1
    assert lot["metrics"]["choice_accuracy"][0] == 0.5


def test_other_data_still_ask_for_an_llm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "task.json").write_text(json.dumps(TASK.to_json() | {"metrics": ["rouge1"]}))
    (folder / "users.jsonl").write_text('{"user": "ada", "split": "test"}\n')
    entry = {"user": "ada", "id": "1", "input": "x", "output": "y"}
    for name in ("history", "queries"):
        (folder / f"{name}.jsonl").write_text(json.dumps(entry) + "\n")
    assert run(["bench", "run", str(folder), "--out", str(tmp_path / "run")]) == 2
    assert "give one of --llm SPEC and --replay FILE" in capsys.readouterr().err
    assert (
        run(["bench", "run", str(folder), "--out", str(tmp_path / "run"), "--methods", "rag"]) == 2
    )
