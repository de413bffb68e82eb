"""Users take turns as new users: nothing of a fold's users is learned from, and no call is made for
labels that the evaluation does not make anyway.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hydra_llm.bench.estimate import estimate_cost
from hydra_llm.bench.experiment import Experiment, Outcome, learned_bundles, run_experiment
from hydra_llm.bench.folds import deal, evaluated_users
from hydra_llm.bench.method import find_methods, split_names
from hydra_llm.bench.report.summary import learning_rows
from hydra_llm.bench.report.tables import make_report, open_run
from hydra_llm.bench.runlog import export_lamp
from hydra_llm.cli.main import run
from hydra_llm.config import Settings, load_settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.datasets.native import save
from hydra_llm.errors import LLMError, SettingsError
from hydra_llm.history import before
from hydra_llm.llm.fake import RuleLLM
from hydra_llm.llm.registry import wrap
from hydra_llm.tasks.base import Task
from hydra_llm.types import Query, Record
from tests.bench.test_experiment import SMALL, TAGS, TITLES, random_answer, users_data
from tests.made_choices import choice_data

FEW: dict[str, Any] = {**SMALL, "queries_per_user": 3}


def data_of(task: Task, queries: int = 2) -> DataSet:
    """Six users with queries, of both splits; the last one has none."""
    data = users_data(task, train=0, new=7, queries=queries)
    splits = {user: "test" if user in ("u4", "u5") else "train" for user in data.users()}
    records = {user: data.history(user) for user in data.users()}
    asked = {user: data.queries(user) if user != "u6" else [] for user in data.users()}
    return DataSet(task, splits, records, asked)  # type: ignore[arg-type]


def experiment(
    data: DataSet, folder: Path, llm: RuleLLM, methods: str, folds: int = 3, **given: Any
) -> Experiment:
    chosen = {**FEW, **given.pop("settings", {})}
    settings = load_settings(cache=folder / "cache", **chosen)
    named = find_methods(split_names(methods), data.task.kind)
    model, out = wrap(llm, settings), given.pop("out", folder / "run")
    return Experiment(data, model, settings, named, out, folds=folds, **given)


def test_users_are_dealt_evenly_and_the_same_each_time() -> None:
    data = data_of(TAGS)
    assert evaluated_users(data, None) == ["u4", "u5", "u0", "u1", "u2", "u3"]
    assert evaluated_users(data, 3) == ["u4", "u5", "u0"]
    options: dict[str, Any] = {"users": 5, "limit": 1}
    folds = deal(data, Settings(), 2, **options)
    new = [fold.data.users("test") for fold in folds]
    assert sorted(map(len, new)) == [2, 3]
    assert sorted(user for own in new for user in own) == ["u0", "u1", "u2", "u4", "u5"]
    assert new == [fold.data.users("test") for fold in deal(data, Settings(), 2, **options)]
    others = [
        [f.data.users("test") for f in deal(data, Settings(seed=s), 2, **options)] for s in range(6)
    ]
    assert any(other != new for other in others)
    for fold, own in zip(folds, new, strict=True):
        assert set(fold.data.users("train")) == set(data.users()) - set(own)
        assert fold.settings.labelled_users == 5 - len(own)
        for user in own:
            assert fold.data.history(user) == data.history(user)
        assert [record.id for record in fold.data.history("u3")][-2:] == ["query:q8", "query:q9"]
        assert not fold.data.queries("u3")  # not evaluated: weak labels alone


def test_labels_of_a_training_user_are_the_evaluated_queries() -> None:
    (fold, _) = deal(data_of(TAGS), Settings(), 2, users=None, limit=1)
    for user in set(fold.data.users("train")) - {"u6"}:
        assert [query.id for query in fold.data.queries(user)] == ["q8"]
        assert fold.data.history(user)[-1].id == "query:q9"
    assert (fold.settings.label_queries, fold.settings.label_order) == ("queries", "retriever")
    (fold, _) = deal(data_of(TITLES), Settings(), 2, users=None, limit=1)
    assert fold.settings.label_queries == "both"
    kept = Settings(label_queries="history", label_order="reranker", labelled_users=1)
    (fold, _) = deal(data_of(TAGS), kept, 2, users=None, limit=1)
    assert fold.settings == kept


@pytest.mark.parametrize(
    ("folds", "users", "fault"),
    [
        (7, None, "--folds 7: 6 users are evaluated, .* take --folds 6 or fewer"),
        (2, 1, "--folds 2: 1 users are evaluated, .* leave --folds out"),
    ],
)
def test_folds_without_users_are_refused(folds: int, users: int | None, fault: str) -> None:
    with pytest.raises(SettingsError, match=fault):
        deal(data_of(TAGS), Settings(), folds, users=users, limit=None)


def test_too_few_training_users_are_refused() -> None:
    with pytest.raises(SettingsError, match="fold 1 leaves 1 training users .*: take more folds"):
        deal(data_of(TAGS), Settings(users=1), 3, users=None, limit=None)


def mixed_data() -> DataSet:
    """Six users of both splits, each with choices and plain records, and two queries of each."""
    of_choices = choice_data(users=6, history=3, queries=2)
    plain = [
        Record(user, f"p{i}", f"text {i}", "a title", str(i + 1))
        for user in of_choices.users()
        for i in range(2)
    ]
    asked = [
        Query(user, f"a{i}", f"new text {i}", "a title", "1700000000")
        for user in of_choices.users()
        for i in range(2)
    ]
    records = [*plain, *of_choices.stream_history()]
    queries = [*of_choices.stream_queries(), *asked]
    return DataSet.from_records(of_choices.task, of_choices.splits, records, queries)


@pytest.mark.parametrize("choices", [True, False])
def test_of_mixed_data_a_turn_decides_who_is_new(choices: bool) -> None:
    """Whatever the split says: of new users nothing but the history is known, so that their own
    heads may answer; of all others every answer is.
    """
    data = mixed_data()
    turns = deal(data, Settings(), 3, users=None, limit=None, choices=choices)
    assert {user for turn in turns for user in turn.data.users("test")} == set(data.users())
    for turn in turns:
        for user in turn.data.users():
            queries, records = turn.data.queries(user), turn.data.history(user)
            assert [bool(query.offered) for query in queries] == [choices] * 2
            if user in turn.data.users("test"):
                assert records == data.history(user)
                assert all(before(records, query) == records for query in queries)
            else:
                others = {q.id for q in data.queries(user)} - {q.id for q in queries}
                left = {record.id for record in records} - {r.id for r in data.history(user)}
                assert left == {f"query:{id}" for id in others}


def test_new_users_of_a_turn_have_the_history_that_is_asked(tmp_path: Path) -> None:
    run = experiment(data_of(TAGS), tmp_path, RuleLLM(random_answer), "rag@2", history=3)
    for turn in run.turns():
        for user in turn.data.users():
            count = len(turn.data.history(user))
            assert count == 3 if user in turn.new_users else count >= 8


def changed(data: DataSet, users: set[str]) -> DataSet:
    """Other texts and answers in these users' histories and queries."""

    def record(old: Record) -> Record:
        return replace(old, input=f"quite another {old.input}", output=TAGS.labels[0])

    def query(old: Query) -> Query:
        return replace(old, input=f"no {old.input}", gold=TAGS.labels[-1])

    def all_of(get: Callable[[str], Any], change: Callable[[Any], Any]) -> Mapping[str, Any]:
        return {u: [change(e) if u in users else e for e in get(u)] for u in data.users()}

    return DataSet(
        data.task, data.splits, all_of(data.history, record), all_of(data.queries, query)
    )


@pytest.mark.slow
def test_a_fold_learns_nothing_from_its_own_users(tmp_path: Path) -> None:
    """Its shared weights and its training users' heads are the same to the last bit, whatever its
    own users did; those of other folds are not.
    """
    data, llm = data_of(TAGS), RuleLLM(random_answer)
    (first, *_) = deal(data, Settings(), 3, users=None, limit=None)
    other = changed(data, set(first.data.users("test")))
    found = []
    for name, own in (("a", data), ("b", other)):
        run = experiment(own, tmp_path, llm, "hydra@2,3", out=tmp_path / name)
        weights: list[Any] = []
        for turn in run.turns():
            (bundle,) = learned_bundles(replace(turn, fit=False)).values()
            weights.append((bundle.weights, bundle.population))  # a digest of the weights' file
        found.append(weights)
    assert found[0][0] == found[1][0]
    for one, two in zip(found[0][1:], found[1][1:], strict=True):
        assert one[0] != two[0]


def answered(outcome: Outcome) -> Counter[tuple[str, str, str]]:
    return Counter((s.method, s.user, s.query) for s in outcome.samples)


@pytest.mark.slow
def test_labels_cost_no_call_beyond_the_evaluation(tmp_path: Path) -> None:
    """Labels: the same prompts as `hydra` asks in the retriever's order."""
    data, llm, plain = data_of(TAGS), RuleLLM(random_answer), RuleLLM(random_answer)
    settings = {"rerank": "never", "temperature": 1.0}
    run = experiment(data, tmp_path, llm, "hydra@2,3", settings=settings)
    counted = estimate_cost(run)
    outcome = run_experiment(run)
    alone = experiment(data, tmp_path / "x", plain, "self-consistency@3", settings=settings)
    run_experiment(alone)
    assert llm.calls
    assert {json.dumps(list(map(dict, c))) for c in llm.calls} == {
        json.dumps(list(map(dict, c))) for c in plain.calls
    }
    assert len(llm.calls) == len(plain.calls) == 6 * 2 * 2
    assert counted.total.calls == 6 * 2 * 2  # a greedy call and one for the other samples
    assert set(answered(outcome).values()) == {1}
    assert len(outcome.samples) == 12


@pytest.mark.slow
@pytest.mark.parametrize("task", [TAGS, TITLES], ids=lambda task: task.name)
def test_a_run_with_folds_is_continued(task: Task, tmp_path: Path) -> None:
    data, llm = data_of(task), RuleLLM(random_answer)
    methods = "rag@2,hydra@2,3,hydra-shared@2,3,bbox-adapter@3,oracle@3,user-majority"
    run = experiment(data, tmp_path, llm, methods, seeds=(0, 1), limit=1)
    outcome = run_experiment(run)
    asked = len(llm.calls)
    folds = {turn.fold: set(turn.new_users) for turn in run.turns()}
    assert all(sample.user in folds[sample.fold] for sample in outcome.samples)
    assert {s.user for s in outcome.samples} == {"u0", "u1", "u2", "u3", "u4", "u5"}
    assert {s.query for s in outcome.samples} == {"q8"}
    names = {path.name for path in (tmp_path / "run").glob("bundle*")}
    assert names == {f"bundle-{fold}-{seed}" for fold in (1, 2, 3) for seed in (0, 1)}
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["folds"] == [{"users": 2, "queries": 2}] * 3
    assert manifest["trained_on"] == 5
    assert set(manifest["weights"]) == {f"{fold}-{seed}" for fold in (1, 2, 3) for seed in (0, 1)}
    assert [(row["fold"], row["seed"]) for row in outcome.learning][:3] == [(1, 0), (1, 1), (2, 0)]

    assert "label records" not in outcome.learning[0]["stages"]  # weak labels check the reranker
    assert outcome.learning[0]["reranker"].get("checked_by") == "history"

    lines = (tmp_path / "run" / "samples.jsonl").read_text()
    (tmp_path / "run" / "samples.jsonl").write_text("".join(lines.splitlines(True)[:20]))
    again = run_experiment(experiment(data, tmp_path, llm, methods, seeds=(0, 1), limit=1))
    assert len(llm.calls) == asked
    assert [(s.key, s.answer) for s in again.samples] == [
        (s.key, s.answer) for s in outcome.samples
    ]


@pytest.mark.slow
def test_only_failed_calls_are_retried_by_a_repeat(tmp_path: Path) -> None:
    """A turn of one user has no other one for `mismatched`: it is said, and no repeat helps."""

    class Failing(RuleLLM):
        async def generate(self, messages: Any, sampling: Any) -> Any:
            if "u4" in str(messages):
                raise LLMError("out of order")
            return await super().generate(messages, sampling)

    data = DataSet.from_records(
        TAGS,
        {f"u{i}": "train" for i in range(4)} | {"u4": "test"},
        [Record(f"u{i}", f"r{r}", f"text {r} of u{i}", "calm") for i in range(5) for r in range(4)],
        [Query("u4", "q", "what of u4?", "odd"), Query("u4", "p", "what else?", "odd")],
    )
    methods = "zero-shot,mismatched@1,3"

    def failures(llm: RuleLLM, folder: str) -> str:
        run = experiment(data, tmp_path / folder, llm, methods)
        return run_experiment(replace(run, folds=None)).failures

    alone = failures(RuleLLM(random_answer), "alone")
    assert alone.startswith("2 of 4 answers failed, the first mismatched@1,3 on u4's q:")
    assert alone.endswith("fewer folds")
    both = failures(Failing(random_answer), "both")
    assert both.startswith("3 of 4 answers failed")
    assert both.endswith("; the same command retries 1 of them")


@pytest.mark.slow
def test_bench_run_takes_folds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(data_of(TAGS), tmp_path / "data")
    settings = [f"--set={name}={value}" for name, value in FEW.items()]
    cache, llm = ["--set", f"cache={tmp_path / 'cache'}"], ["--llm", "fake:rule=labels"]
    command = [
        "bench",
        "run",
        str(tmp_path / "data"),
        *llm,
        *settings,
        *cache,
        "--methods",
        "rag@2",
    ]
    assert run([*command, "--out", str(tmp_path / "run"), "--folds", "2", "--json"]) == 0
    (rag,) = json.loads(capsys.readouterr().out)
    assert rag["queries"] == 12
    assert run([*command, "--out", str(tmp_path / "r"), "--folds", "9"]) == 2
    assert "--folds 9: 6 users are evaluated" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_costs_of_folds_count_each_label_once(tmp_path: Path) -> None:
    """Two queries and one record of each of six users; as new users, three records of each."""
    data, llm = data_of(TITLES), RuleLLM(random_answer)
    methods = "rag@2,hydra@2,3,mismatched@2,3"
    settings = {"rerank": "never", "fit_labels": "llm"}
    run = experiment(data, tmp_path, llm, methods, settings=settings, limit=2)
    outcome = run_experiment(run)
    outcome.log.finish([], outcome.learning)
    opened = open_run(tmp_path / "run")
    rows = {row["stage"]: row for row in learning_rows(make_report(opened))}
    assert {row["seed"] for row in rows.values()} == {"all"}
    assert "reranker" not in outcome.learning[0]  # rerank=never
    new = rows["label candidates, new users"]
    assert (new["users"], new["LLM calls"]) == (6, 6 * 3 * 2)  # three records each
    assert (rows["label candidates"]["users"], rows["label candidates"]["LLM calls"]) == (6, 36)
    other = {s.user: s for s in outcome.samples if s.method == "mismatched@2,3"}
    assert set(other) == {"u0", "u1", "u2", "u3", "u4", "u5"}
    assert not any(sample.error for sample in other.values())
    folder = export_lamp(tmp_path / "run", "LaMP-4", outcome.samples)
    golds = json.loads((folder / "hydra@2,3.json").read_text())["golds"]
    assert len(golds) == 12
