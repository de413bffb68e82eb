"""Sweeps: errors of the file, histories of new users, runs that continue."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from hydra_llm.bench.experiment import Experiment, learned_bundle
from hydra_llm.bench.method import find_methods
from hydra_llm.bench.runlog import read_run
from hydra_llm.bench.sweep import Sweep, SweepPoint, load_sweep
from hydra_llm.bundle import Bundle
from hydra_llm.cli.main import run
from hydra_llm.config import Settings
from hydra_llm.context import Context
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.datasets.native import save
from hydra_llm.errors import SettingsError
from hydra_llm.history import before
from hydra_llm.llm.registry import open_llm
from hydra_llm.select import LearnedSelector
from hydra_llm.tasks.base import Task
from hydra_llm.types import Candidate, Query, Record

SWEEP_FILES = sorted((Path(__file__).parents[2] / "benchmarks" / "sweeps").glob("*.toml"))
STARS = Task("stars", "rating", "How many stars? {input}", ("1", "2", "3"), metrics=("mae",))
SMALL = {
    "samples": 2,
    "retrieved": 2,
    "k": 1,
    "queries_per_user": 1,
    "constrain": True,
    "max_length": 32,
}
HEAD = 'name = "s"\nquestion = "Which?"\nx = "k"\nmethods = ["rag"]\n'


def made_up() -> DataSet:
    """Three training and two new users; the last record of each new one comes between that one's
    two queries.
    """
    users = {"t0": "train", "t1": "train", "t2": "train", "n0": "test", "n1": "test"}
    records, queries = [], []
    for at, user in enumerate(users):
        words = ("rain", "sun", "snow")
        records += [
            Record(
                user,
                f"r{i}",
                f"{words[i % 3]} in town {i}",
                str(1 + (i + at) % 3),
                f"{2000 + i}-01-01",
            )
            for i in range(8)
        ]
        if users[user] == "test":
            records.append(Record(user, "late", "a late film", "1", "2010-06-01"))
            queries += [
                Query(
                    user,
                    f"q{i}",
                    f"{words[i]} in the hills",
                    str(1 + (i + at) % 3),
                    f"{2010 + i}-01-01",
                )
                for i in range(2)
            ]
    return DataSet.from_records(STARS, users, records, queries)  # type: ignore[arg-type]


def written(folder: Path, text: str) -> Path:
    file = folder / "s.toml"
    file.write_text(text, encoding="utf-8")
    return file


# ---- the file


def test_points_and_grids_are_the_points_of_a_sweep(tmp_path: Path) -> None:
    grid = "vary = { k = [1, 4], votes = [true, false], history = [3] }\n\n"
    grid += '[[points]]\nx = "none"\nmethods = ["zero-shot"]\nsettings = { k = 0 }\n'
    result = load_sweep(written(tmp_path, HEAD + grid))
    assert [(point.x, point.series, point.settings, point.history) for point in result.points] == [
        ("none", "", {"k": 0}, "all"),
        (1, "votes=true, history=3", {"k": 1, "votes": True}, 3),
        (1, "votes=false, history=3", {"k": 1, "votes": False}, 3),
        (4, "votes=true, history=3", {"k": 4, "votes": True}, 3),
        (4, "votes=false, history=3", {"k": 4, "votes": False}, 3),
    ]
    assert [point.slug for point in result.points[:2]] == ["none", "1-votes-true-history-3"]
    assert result.points[0].methods == ("zero-shot",)


def test_a_points_folder_has_a_name_that_a_file_system_takes() -> None:
    long = [SweepPoint(x="x" * 3000 + end).slug for end in "ab"]
    assert long[0] != long[1]
    assert all(len(slug) < 100 for slug in long)
    assert SweepPoint(x="größer 小").slug == "größer-小"
    assert SweepPoint(x="cold_start", series="k=1, T=.5").slug == "cold-start-k-1-t-.5"
    assert SweepPoint(x="../..").slug == "point"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + "colour = 1\nvary = { k = [1] }", "colour: unknown key"),
        (HEAD + "[[points]]\nx = 1\n[[points]]\nx = 2\ncolour = 1", "points.2.colour: unknown key"),
        (HEAD + "vary = { k = [1] }\n[run]\nuser = 1", "run.user: unknown key"),
        (
            HEAD + "[[points]]\nx = 1\nsettings = { kk = 2 }",
            "points.1: unknown setting 'kk': did you mean retrieval.k?",
        ),
        (HEAD + "vary = { kk = [1] }", "points.1: unknown setting 'kk': did you mean retrieval.k?"),
        (
            HEAD + "vary = { k = [1] }\n[settings]\nkk = 1",
            "settings: unknown setting 'kk': did you mean retrieval.k?",
        ),
        (
            HEAD + "vary = { k = [1, -1] }",
            "points.2: setting 'k': Input should be greater than or equal to 0 (got -1)",
        ),
        (HEAD + "[[points]]\nsettings = { k = 1 }", "points.1.x: Field required"),
        (HEAD.replace('name = "s"\n', "") + "vary = { k = [1] }", "name: Field required"),
        (HEAD + "vary = { history = [-1] }", "history: Input should be greater than or equal to 0"),
        (HEAD, "has no points: write [[points]], or vary = {SETTING = [...]}"),
        (
            HEAD + "vary = { k = [1, 1] }",
            "points.2: is called '1' as points.1 is: give it another x or series",
        ),
        (HEAD + "[[points]]\nx = 1\nmethods = ['best']", "unknown method 'best'"),
        (HEAD + "vary = ", "not TOML"),
    ],
)
def test_a_fault_is_one_line_that_names_file_and_key(
    text: str, message: str, tmp_path: Path
) -> None:
    file = written(tmp_path, text)
    with pytest.raises(SettingsError) as caught:
        load_sweep(file)
    assert str(caught.value).startswith(f"{file}: {message}")
    assert "\n" not in str(caught.value)


def test_a_missing_sweep_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"none\.toml: no such sweep file"):
        load_sweep(tmp_path / "none.toml")


def test_there_is_a_file_for_each_sweep() -> None:
    named = (
        "k b history training_users cold_start head prior encoder record_answer selection"
        " label_rule reranker_labels parsing llm"
    )
    assert {file.stem for file in SWEEP_FILES} == set(named.split())


@pytest.mark.parametrize("file", SWEEP_FILES, ids=lambda file: file.stem)
def test_committed_sweep_files_are_valid(file: Path) -> None:
    """Its settings are valid, its points differ in something, and it says why it is there."""
    result = load_sweep(file)
    assert result.name == file.stem
    assert len(result.question) < 100
    assert file.read_text().startswith("# ")
    assert len(result.points) > 1
    points = [
        point.model_copy(update={"x": 0, "series": "", "settings": settings_of(result, point)})
        for point in result.points
    ]
    assert all(a != b for a, b in pairwise(points))


def settings_of(result: Sweep, point: SweepPoint) -> dict[str, Any]:
    return Settings.checked({**result.settings, **point.settings}).model_dump(mode="json")


# ---- histories


def test_with_history_keeps_the_latest_visible_records() -> None:
    data = made_up()
    assert data.with_history("all") is data
    for count in range(11):
        cut = data.with_history(count)
        for user in cut.users("test"):
            assert [record.id for record in cut.history(user)] == [f"r{i}" for i in range(8)][
                max(0, 8 - count) :
            ]
            assert cut.queries(user) == data.queries(user)
            for query in cut.queries(user):
                assert before(cut.history(user), query) == cut.history(
                    user
                )  # nothing is later than the query
        assert all(cut.history(user) == data.history(user) for user in cut.users("train"))
    assert len({data.with_history(count).digest for count in range(9)} | {data.digest}) == 10


# ---- heads


def experiment(folder: Path, **given: Any) -> Experiment:
    settings = Settings(**SMALL, cache=folder / "cache")
    return Experiment(
        made_up(),
        open_llm("fake:rule=labels", settings),
        settings,
        find_methods(["hydra"]),
        folder,
        **given,
    )


@pytest.mark.slow
def test_without_fit_new_users_have_the_shared_head(tmp_path: Path) -> None:
    asked = experiment(tmp_path)
    fitted = learned_bundle(asked, asked.settings, tmp_path / "b")
    bare = learned_bundle(replace(asked, fit=False), asked.settings, tmp_path / "b")
    for user in asked.new_users:
        assert "adapter" in fitted.heads_of(user)  # there is a head that could have leaked
        assert bare.heads_of(user) == {}
        assert [record.id for record in bare.records[user]] == [
            record.id for record in asked.data.history(user)
        ]


# ---- votes


@pytest.mark.slow
def test_without_votes_the_samples_count_for_nothing(tmp_path: Path) -> None:
    asked = experiment(tmp_path)
    bundle = learned_bundle(asked, asked.settings, tmp_path / "b")
    assert bundle.adapter is not None
    bundle.adapter.vote_weight[:] = 1.0  # as if the LLM had been of use
    query, visible = asked.data.queries("n0")[0], asked.data.history("n0")
    agreed = [
        Candidate(label, label, votes=5 * (label == "3"), greedy=label == "3")
        for label in STARS.labels
    ]
    blank = [Candidate(label, label) for label in STARS.labels]

    def shares(votes: bool, candidates: Sequence[Candidate]) -> list[float | None]:
        made = bundle.personalizer(
            asked.llm, asked.settings.model_copy(update={"vote_share": votes})
        ).selector
        assert isinstance(made, LearnedSelector)
        context = Context(query, tuple(visible), vectorize=made.featurizer.vectorize)
        scored, *_ = made.choose(context, candidates)
        assert [each.votes for each in scored] == [
            each.votes for each in candidates
        ]  # they are shown, only not counted
        return [each.probability for each in scored]

    assert shares(False, agreed) == shares(False, blank) == shares(True, blank)
    assert shares(True, agreed) != shares(True, blank)


# ---- the command

SWEEP = """
name = "cold"
question = "What do the first records bring?"
x = "records"
methods = ["hydra", "user-majority"]
points = [
    { x = 0, history = 0 }, { x = 4, history = 4 },
    { x = 4, history = 4, fit = false, series = "no head" },
]

[settings]
samples = 2
retrieved = 2
k = 1
queries_per_user = 1
constrain = true
max_length = 32
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(made_up(), tmp_path / "data")
    written(tmp_path, SWEEP)
    return tmp_path


def call(folder: Path, *more: object, llm: str = "fake:rule=labels") -> int:
    options = ["--out", folder / "out", "--set", f"cache={folder / 'cache'}", *more]
    options += ["--llm", llm] if llm else []
    return run(
        [str(part) for part in ("bench", "sweep", folder / "s.toml", folder / "data", *options)]
    )


def read(folder: Path) -> Any:
    return json.loads((folder / "out" / "sweep.json").read_text())


def figures(result: Mapping[str, Any]) -> list[Any]:
    return [
        (point["x"], point.get("series"), each["method"], each["metrics"])
        for point in result["points"]
        for each in point["methods"]
    ]


@pytest.mark.slow
def test_methods_that_ask_no_llm_need_none(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(folder, SWEEP.replace('"hydra", "user-majority"', '"scorer-only", "user-majority"'))
    assert call(folder, llm="") == 0
    capsys.readouterr()
    assert {method for _, _, method, _ in figures(read(folder))} == {"scorer-only", "user-majority"}
    written(folder, SWEEP.replace('"hydra", "user-majority"', '"rag", "user-majority"'))
    assert call(folder, llm="") == 2
    assert capsys.readouterr().err.count("method 'rag' asks an LLM: give one of --llm SPEC") == 1


@pytest.mark.slow
def test_a_sweep_runs_draws_and_continues_without_calls(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(folder, "--plot", folder / "plot.svg") == 0
    table = capsys.readouterr().out
    result = read(folder)
    assert [(x, series, method) for x, series, method, _ in figures(result)] == [
        (x, series, method)
        for x, series in ((0, None), (4, None), (4, "no head"))
        for method in ("hydra", "user-majority")
    ]
    assert (result["question"], result["metric"]) == ("What do the first records bring?", "mae")
    majority = [metrics for _, _, method, metrics in figures(result) if method == "user-majority"]
    assert majority[0]["mae"][0] == 0.5  # the middle label, 2, where 1, 2, 2, 3 is right
    assert majority[1] == majority[2]
    for method in result["points"][1]["methods"]:
        first = next(
            each for each in result["points"][0]["methods"] if each["method"] == method["method"]
        )
        assert first["against"] is None
        change = method["metrics"]["mae"][0] - first["metrics"]["mae"][0]
        assert method["against"]["metrics"]["mae"]["difference"] == pytest.approx(change, abs=1e-6)
    assert re.search(r"4\s+no head\s+hydra", table)
    drawing = (folder / "plot.svg").read_text()
    assert "hydra, no head" in drawing
    assert "What do the first records bring?" in drawing
    assert not (folder / "out" / "sweep.svg").exists()
    heads = {
        name: Bundle.load(folder / "out" / name / "bundle").heads["adapter"]
        for name in ("0", "4", "4-no-head")
    }
    assert {name: "n0" in each for name, each in heads.items()} == {
        "0": True,
        "4": True,
        "4-no-head": False,
    }
    samples = {name: (folder / "out" / name / "samples.jsonl").read_bytes() for name in heads}

    (folder / "cache" / "llm.sqlite").unlink()  # whatever would be asked now fails
    assert call(folder, "--set", "max_calls=0", "--json") == 0
    assert figures(json.loads(capsys.readouterr().out)) == figures(read(folder)) == figures(result)
    assert {
        name: (folder / "out" / name / "samples.jsonl").read_bytes() for name in heads
    } == samples
    assert (folder / "out" / "sweep.svg").exists()


@pytest.mark.slow
def test_bench_show_reads_a_sweep_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(folder) == 0
    table = capsys.readouterr().out
    out, page, text = folder / "out", tmp_path / "page.html", tmp_path / "text.md"
    assert (
        run(
            [
                "bench",
                "show",
                str(out),
                str(out / "4"),
                "--html",
                str(page),
                "--markdown",
                str(text),
            ]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert [line.split() for line in table.splitlines() if "no head" in line] == [
        line.split() for line in shown.splitlines() if "no head" in line
    ]
    assert "hydra, no head" in page.read_text()
    assert "What do the first records bring?" in page.read_text()
    assert text.read_text().count("no head") == 2
    assert run(["bench", "show", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sweeps"] == [read(folder)]
    (out / "sweep.json").write_text('{"points": [{}]}')
    assert run(["bench", "show", str(out)]) == 2
    assert "sweep.json cannot be read" in capsys.readouterr().err


@pytest.mark.slow
def test_points_of_the_same_settings_learn_once(folder: Path) -> None:
    assert call(folder) == 0
    bundles = [Bundle.load(folder / "out" / name / "bundle") for name in ("0", "4", "4-no-head")]
    (base,) = (folder / "out" / "bases").iterdir()
    assert [sorted(set(bundle.records)) for bundle in (Bundle.load(base / "bundle"), *bundles)] == [
        ["t0", "t1", "t2"],
        ["n0", "n1", "t0", "t1", "t2"],
        ["n0", "n1", "t0", "t1", "t2"],
        ["t0", "t1", "t2"],
    ]
    assert [len(bundle.records["n0"]) for bundle in bundles[:2]] == [0, 4]
    alone = experiment(folder / "alone")  # as a run without a study learns it
    own = learned_bundle(
        replace(alone, data=alone.data.with_history(4)), alone.settings, folder / "alone" / "b"
    )
    assert own.weights == bundles[1].weights


@pytest.mark.slow
def test_a_failing_point_is_reported_and_others_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(folder, SWEEP.replace("{ x = 0, history = 0 }", '{ x = 0, llm = "nobody:none" }'))
    assert call(folder) == 0
    result = read(folder)
    assert result["points"][0]["error"].startswith("unknown LLM 'nobody:none'")
    assert [len(point["methods"]) for point in result["points"]] == [0, 2, 2]
    assert result["points"][1]["methods"][0]["against"] is None  # the first that there is
    assert "point 0 failed: unknown LLM 'nobody:none'" in capsys.readouterr().err


def test_a_sweep_whose_points_all_fail_is_an_error(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(folder, llm="fake:fail=error") == 1
    assert "as wished" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_settings_of_points_override_the_command_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(
        folder,
        SWEEP.replace(
            "{ x = 0, history = 0 }", '{ x = "two", settings = { samples = 2 }, methods = ["rag"] }'
        ),
    )
    assert call(folder, "--set", "samples=3", "--users", 1, "--limit", 1) == 0
    assert "samples is set by points of the sweep" in capsys.readouterr().err
    for name, samples in (("two", 2), ("4", 3)):
        manifest, _ = read_run(folder / "out" / name)
        assert (manifest["settings"]["samples"], manifest["users"], manifest["queries"]) == (
            samples,
            1,
            1,
        )
