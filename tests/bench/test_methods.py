"""Methods: records in the prompt, candidates, picks and costs; names with parameters; plug-ins."""

import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hydra_llm.bench.experiment import run_methods
from hydra_llm.bench.method import (
    BUILTIN,
    METHODS,
    Answerer,
    Parts,
    find_methods,
    installed,
    load_method,
    method,
    split_names,
)
from hydra_llm.bench.methods import WithoutLLM
from hydra_llm.bench.report.tables import GROUPS, Run, group_of
from hydra_llm.bench.results import tabulate
from hydra_llm.bench.runlog import Sample
from hydra_llm.bundle import Bundle
from hydra_llm.config import Settings
from hydra_llm.context import Context
from hydra_llm.errors import SettingsError
from hydra_llm.llm.concurrency import run_sync
from hydra_llm.llm.fake import RuleLLM
from hydra_llm.pipeline import UserPipeline
from hydra_llm.retrieve import Recent
from hydra_llm.tasks.base import CohortStats, Task
from hydra_llm.types import Candidate, Message, Query, Record

TAGS = Task(
    "tags", "classification", "Which tag? {input}", ("calm", "loud", "odd"), metrics=("accuracy",)
)
STARS = Task("stars", "rating", "How many stars? {input}", ("1", "2", "3", "4", "5"))
TITLES = Task("titles", "generation", "Title of: {input}")
TEXTS = ("rain one", "war two", "love three", "rain four")
RECORDS = {
    "u": [Record("u", str(i), text, TAGS.labels[i % 3], position=i) for i, text in enumerate(TEXTS)]
}
QUERY = Query("u", "q", "war five", "odd", position=9)


class Store:
    """Vectors that count the letter a text begins with, so that `war` is near `war`."""

    version = 0

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        return np.array(
            [[text.startswith(word) for word in ("rain", "war", "love")] for text in texts],
            dtype=np.float32,
        )


def parts(llm: Any, task: Task = TAGS, **chosen: Any) -> Parts:
    given = Settings(**{"samples": 4, "k": 2, "retrieved": 3, "prompt_style": "block", **chosen})
    return Parts(Bundle(task, given, {}, Store(), CohortStats()), llm, given, RECORDS)  # type: ignore[arg-type]


def answer(name: str, llm: RuleLLM, **chosen: Any) -> Sample:
    (sample,) = run_sync(lambda: run_methods(find_methods([name]), parts(llm, **chosen), [QUERY]))
    assert not sample.error
    return sample


def loud(messages: Sequence[Message], index: int, rng: random.Random) -> str:
    return "loud"


def shown(llm: RuleLLM) -> list[str]:
    """The records' texts in the first prompt, in its order."""
    text = "".join(message["content"] for message in llm.calls[0])
    return sorted((record for record in TEXTS if record in text), key=text.index)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("zero-shot", []),
        ("rag", ["rain four", "war two"]),  # the best stands last
        ("rag@1", ["war two"]),
        (
            "rag@4",
            ["rain one", "love three", "rain four", "war two"],
        ),  # more than are retrieved by default
        ("recent@2", ["love three", "rain four"]),
        ("rag-dense@1", ["war two"]),
    ],
)
def test_the_llm_is_shown_what_the_name_says(name: str, expected: list[str]) -> None:
    llm = RuleLLM(loud)
    assert answer(name, llm).method == name
    assert shown(llm) == expected
    assert len(llm.calls) == 1


def test_pag_writes_one_profile_per_history() -> None:
    def rule(messages: Sequence[Message], index: int, rng: random.Random) -> str:
        return "likes it loud" if "characteristic" in messages[-1]["content"] else "loud"

    llm, later = RuleLLM(rule), [replace(QUERY, id=f"q{i}") for i in range(3)]
    samples = run_sync(lambda: run_methods(find_methods(["pag@1"]), parts(llm), later))
    about, *asked = llm.calls
    assert all(
        f"{record.input} → {record.output}" in about[0]["content"] for record in RECORDS["u"]
    )
    assert [call[0] for call in asked] == [{"role": "system", "content": "likes it loud"}] * 3
    assert all("war two" in call[-1]["content"] for call in asked)
    assert sorted(sample.calls for sample in samples) == [1, 1, 2]
    early = RuleLLM(rule)
    run_sync(
        lambda: run_methods(find_methods(["pag@1"]), parts(early), [replace(QUERY, position=1)])
    )
    assert "war two" not in str(early.calls)  # nor is a profile written from what came later
    assert len(early.calls) == 2


def test_random_records_depend_on_the_seed_only() -> None:
    drawn = []
    for seed in (0, 0, 1, 2, 3, 4):
        llm = RuleLLM(loud)
        answer("icl-random@2", llm, seed=seed)
        drawn.append(tuple(shown(llm)))
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 2


@pytest.mark.parametrize(
    "name", ["self-consistency@3", "mbr@3", "oracle@3", "hydra@2,3", "hydra-adapter@3"]
)
def test_candidates_are_as_many_as_the_name_says(name: str) -> None:
    texts = 0

    def rule(messages: Sequence[Message], index: int, rng: random.Random) -> str:
        nonlocal texts
        texts += 1
        return "loud"

    answer(name, RuleLLM(rule), candidates="sampled")
    assert texts == 3


@pytest.mark.parametrize("name", ["user-majority", "copy-nearest"])
def test_baselines_without_llm_make_no_call(name: str) -> None:
    llm = RuleLLM(loud)
    assert answer(name, llm).calls == 0
    assert llm.calls == []


def test_the_nearest_records_answer_is_copied() -> None:
    assert answer("copy-nearest", RuleLLM(loud)).answer == "loud"  # of "war two"
    (method,) = find_methods(["copy-nearest"])
    control = method.build(parts(RuleLLM(loud), STARS))
    assert (
        run_sync(lambda: control.aanswer(Query("new", "q", "x"))).text == "3"
    )  # nothing to copy: the middle of the scale


def of(**votes: int) -> list[Candidate]:
    return [
        Candidate(text.strip("_"), None if text == "_" else text.strip("_"), count)
        for text, count in votes.items()
    ]


def pick(
    name: str, task: Task, candidates: Sequence[Candidate], query: Query = QUERY, seed: int = 0
) -> int:
    """The candidate that a method picks, by its index."""
    (method,) = find_methods([name])
    pipeline = method.build(replace(parts(RuleLLM(loud), task), seed=seed))
    assert isinstance(pipeline, UserPipeline)
    return pipeline.selector.choose(Context(query), candidates).chosen


def test_votes_pick_the_mode_the_median_and_the_middle() -> None:
    stars = of(_1=3, _4=2, _5=2)
    assert pick("self-consistency", STARS, stars) == 0
    assert pick("mbr", STARS, stars) == 1  # the median of 1 1 1 4 4 5 5
    texts = [
        Candidate(text, text, 1)
        for text in ("a storm at sea", "the great war", "the great war again")
    ]
    assert pick("mbr", TITLES, texts) == 1
    # what cannot be read has no vote
    assert pick("self-consistency", TAGS, of(_=9, calm=1, loud=2)) == 2
    assert pick("self-consistency", TAGS, of(_=9)) == 0


def test_the_oracle_is_the_best_of_the_samples_and_no_better() -> None:
    assert pick("oracle", TAGS, of(calm=5, loud=2, odd=1)) == 2
    assert pick("oracle", STARS, of(_1=1, _3=1), Query("u", "q", "", "4")) == 1
    assert pick("oracle", TAGS, of(calm=5, loud=2)) == 0
    # the right label, but the LLM did not give it
    assert pick("oracle", TAGS, of(calm=5, odd=0)) == 0


def test_random_answers_once_per_sample() -> None:
    given = of(calm=3, loud=1, odd=0)
    assert [pick("random", TAGS, given, seed=place) for place in range(4)] == [0, 0, 0, 1]
    assert pick("random", TAGS, of(calm=0, loud=0), seed=2) == 0  # there is no sample
    llm = RuleLLM(lambda messages, index, rng: ("odd", "calm", "odd", "loud", "odd")[index])
    having = parts(llm, candidates="sampled")
    samples = run_sync(
        lambda: run_methods(find_methods(["random@5", "self-consistency@5"]), having, [QUERY])
    )
    assert sorted(str(sample.answer) for sample in samples[:-1]) == [
        "calm",
        "loud",
        "odd",
        "odd",
        "odd",
    ]
    assert [sample.seed for sample in samples] == [0, 1, 2, 3, 4, 0]
    (row, _) = tabulate(TAGS, samples)
    assert (row.metrics["accuracy"][0], row.queries) == (0.6, 1)
    assert (
        len({str(call) for call in llm.calls}) == 1
    )  # all turns share the query's prompt, and with a cache its samples


def test_names_carry_parameters() -> None:
    assert split_names("rag@1, hydra@4,8,mbr,") == ["rag@1", "hydra@4,8", "mbr"]
    assert [method.name for method in find_methods(["rag@1", "hydra@4,8", "rag"])] == [
        "rag@1",
        "hydra@4,8",
        "rag",
    ]


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("rag@", "rag@k"),
        ("rag@0", "rag@k"),
        ("rag@1,2", "rag@k"),
        ("hydra@4", "hydra@k,b"),
        ("rag@x", "rag@k"),
        ("user-majority@1", "without"),
    ],
)
def test_a_wrong_parameter_error_shows_the_right_form(name: str, form: str) -> None:
    with pytest.raises(SettingsError, match=f"method '{name}': write it as .*{form}"):
        find_methods([name])


def test_a_method_for_labels_is_left_out_or_refused_for_texts() -> None:
    assert "scorer-only" not in {method.name for method in find_methods(["all"], "generation")}
    assert "scorer-only" in {method.name for method in find_methods(["all"], "rating")}
    with pytest.raises(
        SettingsError,
        match="'scorer-only' answers classification and rating tasks only, this one is generation",
    ):
        find_methods(["scorer-only"], "generation")


# ---- methods of other packages


@method("sampling", takes=("k",), source="another package", uses=())
def parrot(parts: Parts) -> Answerer:
    """The answer of the latest of k records."""
    latest = replace(parts.personalizer(samples=1, greedy_first=True), retriever=Recent())
    return WithoutLLM(latest, lambda query, visible: visible[-latest.settings.k].output)


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package whose entry points are a method, a broken one and no method at all."""
    points = [
        EntryPoint("parrot", "foreign_methods:parrot", METHODS.group),
        EntryPoint("broken", "foreign_methods:absent", METHODS.group),
        EntryPoint("number", "foreign_methods:number", METHODS.group),
    ]
    module = SimpleNamespace(parrot=parrot, number=3)
    monkeypatch.setitem(sys.modules, "foreign_methods", module)
    monkeypatch.setattr("hydra_llm.plugins.entry_points", lambda group: points)


@pytest.mark.usefixtures("foreign")
def test_a_method_of_another_package_runs_in_the_table() -> None:
    result = find_methods(["rag@1", "parrot@2", "parrot@4"])
    samples = run_sync(lambda: run_methods(result, parts(RuleLLM(loud)), [QUERY]))
    assert [(sample.method, sample.answer) for sample in samples] == [
        ("rag@1", "loud"),
        ("parrot@2", "odd"),
        ("parrot@4", "calm"),
    ]
    assert [row.method for row in tabulate(TAGS, samples)] == ["rag@1", "parrot@2", "parrot@4"]
    assert group_of("parrot@2") == "sampling"
    run = Run(Path("run"), {}, TAGS, tuple(reversed(samples)))
    assert list(run.by_method) == ["rag@1", "parrot@2", "parrot@4"]  # built-in ones first
    with pytest.raises(SettingsError, match="write it as parrot@k"):
        find_methods(["parrot@1,2"])


@pytest.mark.usefixtures("foreign")
def test_foreign_methods_are_listed_beside_the_built_in_ones() -> None:
    names = METHODS.names()
    assert names[: len(BUILTIN)] == list(BUILTIN)
    assert set(names[len(BUILTIN) :]) == {"parrot", "broken", "number"}
    assert load_method("parrot").what == "The answer of the latest of k records"
    assert load_method("rag").source == "LaMP; HYDRA 4.1"


@pytest.mark.usefixtures("foreign")
@pytest.mark.parametrize("name", ["broken", "number"])
def test_a_broken_foreign_method_is_a_settings_error(name: str) -> None:
    with pytest.raises(SettingsError, match=name):
        find_methods([name])
    assert installed("nothing-like-it") is None


def test_every_built_in_method_has_the_name_it_is_registered_by() -> None:
    for name in BUILTIN:
        assert METHODS.load(name).name == name
        assert METHODS.load(name).what
        assert METHODS.load(name).group in GROUPS
