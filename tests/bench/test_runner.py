"""Runs: failed samples are kept and not scored, a killed run continues, another run is refused."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_llm import __version__
from hydra_llm.bench.experiment import run_methods
from hydra_llm.bench.method import METHODS, OF_CHOICES, Parts, base_name, find_methods
from hydra_llm.bench.report.tables import results_table
from hydra_llm.bench.results import MethodResult, tabulate
from hydra_llm.bench.runlog import RunLog, Sample
from hydra_llm.bundle import Bundle
from hydra_llm.config import Settings
from hydra_llm.errors import BudgetExceeded, LLMError, LLMRefused, SettingsError
from hydra_llm.llm.concurrency import map_calls, run_sync
from hydra_llm.llm.fake import RuleLLM
from hydra_llm.tasks.base import CohortStats, Task
from hydra_llm.types import Message, Query, Record

TAGS = Task("tags", "classification", "Which tag? {input}", ("calm", "loud"), metrics=("accuracy",))
USERS = ("ann", "bob", "cid")
RECORDS = {
    user: [Record(user, str(i), f"rain {i}", TAGS.labels[i % 2], position=i) for i in range(4)]
    for user in USERS
}
QUERIES = [
    Query(user, f"q{i}", f"war {i}", TAGS.labels[i % 2], position=9)
    for user in USERS
    for i in range(4)
]
MANIFEST = {"methods": ["zero-shot", "rag"], "seed": 0}


def no_texts(texts: Sequence[str]) -> np.ndarray:
    return np.zeros((len(texts), 2), dtype=np.float32)


class Store:
    texts = staticmethod(no_texts)
    version = 0


def parts(llm: Any, **chosen: Any) -> Parts:
    given = Settings(**{"concurrency": 1, "samples": 2, "k": 1, **chosen})
    return Parts(Bundle(TAGS, given, {}, Store(), CohortStats()), llm, given, RECORDS)  # type: ignore[arg-type]


def asked_of(messages: Sequence[Message]) -> int:
    return int(messages[-1]["content"].split()[-1])


def right(messages: Sequence[Message], index: int, rng: random.Random) -> str:
    return TAGS.labels[asked_of(messages) % 2]


def run(
    llm: Any, log: RunLog | None = None, names: Sequence[str] = ("zero-shot",), **chosen: Any
) -> list[Sample]:
    return run_sync(lambda: run_methods(find_methods(names), parts(llm, **chosen), QUERIES, log))


def test_failed_samples_stay_visible_and_are_not_scored(tmp_path: Path) -> None:
    def rule(messages: Sequence[Message], index: int, rng: random.Random) -> str:
        at = asked_of(messages)
        if at == 2:
            raise LLMError("HTTP 500")
        return "who knows" if at == 1 else right(messages, index, rng)

    samples = run(RuleLLM(rule), RunLog(tmp_path / "run", MANIFEST))
    assert [(s.user, s.query) for s in samples] == [(q.user, q.id) for q in QUERIES]
    assert {s.query for s in samples if s.error} == {"q2"}
    assert {s.error for s in samples} == {"", "HTTP 500"}
    (row,) = tabulate(TAGS, samples)
    assert (row.queries, row.failed, row.unparsable) == (12, 3, 3)
    assert row.metrics["accuracy"][0] == pytest.approx(
        6 / 9
    )  # unreadable is wrong, failed is not counted
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    ]
    assert sum(line["error"] == "HTTP 500" and line["answer"] is None for line in lines) == 3
    assert results_table([row])[0]["failed"] == 3
    assert results_table([row])[0]["accuracy"] == "0.667"  # of three users nothing is said
    more = [replace(sample, user=f"{sample.user}{n}") for sample in samples for n in "ab"]
    (row,) = tabulate(TAGS, more)
    assert re.fullmatch(r"0\.667 \[0\.\d+, [01]\.\d+\]", results_table([row])[0]["accuracy"])


def test_a_method_of_which_every_call_failed_has_no_figure() -> None:
    def rule(messages: Sequence[Message], index: int, rng: random.Random) -> str:
        if len(messages) == 1:
            raise LLMError("HTTP 500")
        return right(messages, index, rng)

    row, other = tabulate(TAGS, run(RuleLLM(rule), names=("zero-shot", "rag")))
    assert not np.isnan(other.metrics["accuracy"][0])
    assert all(np.isnan(row.metrics["accuracy"]))
    assert row.to_json()["metrics"]["accuracy"] == [None, None, None]
    assert results_table([row])[0]["accuracy"] == "failed"
    json.dumps(row.to_json(), allow_nan=False)


@pytest.mark.parametrize("error", [LLMError("HTTP 500"), LLMRefused("HTTP 401")])
def test_all_calls_failing_raises_the_first_error(tmp_path: Path, error: LLMError) -> None:
    def rule(messages: Sequence[Message], index: int, rng: random.Random) -> str:
        raise error

    with pytest.raises(type(error), match=str(error)):
        run(RuleLLM(rule), RunLog(tmp_path, MANIFEST))
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) >= 1


def test_failed_samples_are_tried_again_and_the_others_are_not(tmp_path: Path) -> None:
    broken = True
    calls: list[int] = []

    def rule(messages: Sequence[Message], index: int, rng: random.Random) -> str:
        calls.append(asked_of(messages))
        if broken and asked_of(messages) == 2:
            raise LLMError("HTTP 500")
        return right(messages, index, rng)

    run(RuleLLM(rule), RunLog(tmp_path, MANIFEST))
    assert len(calls) == 12
    broken, calls = False, []
    samples = run(RuleLLM(rule), RunLog(tmp_path, MANIFEST))
    assert calls == [2, 2, 2]
    assert not any(sample.error for sample in samples)
    calls = []
    assert run(RuleLLM(rule), RunLog(tmp_path, MANIFEST)) == samples
    assert calls == []


def test_a_spent_budget_stops_the_run_and_keeps_what_is_done(tmp_path: Path) -> None:
    left = 5

    def rule(messages: Sequence[Message], index: int, rng: random.Random) -> str:
        nonlocal left
        left -= 1
        if left < 0:
            raise BudgetExceeded("5 calls are spent")
        return right(messages, index, rng)

    with pytest.raises(BudgetExceeded):
        run(RuleLLM(rule), RunLog(tmp_path, MANIFEST))
    assert len(RunLog(tmp_path, MANIFEST).samples) == 5
    left = 7
    assert len(run(RuleLLM(rule), RunLog(tmp_path, MANIFEST))) == 12


KILLED = """
import importlib.util, os, signal, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("test_run", {this!r})
here = importlib.util.module_from_spec(spec)
sys.modules["test_run"] = here
spec.loader.exec_module(here)
llm = here.RuleLLM(here.noting(Path({calls!r}), {fatal}))
here.run(llm, here.RunLog(Path({run!r}), here.MANIFEST), ("zero-shot", "rag"))
"""


def noting(calls: Path, fatal: int) -> Callable[[Sequence[Message], int, random.Random], str]:
    """Answers right, writes each call down, and is killed at call number `fatal`."""

    def rule(messages: Sequence[Message], index: int, rng: random.Random) -> str:
        with calls.open("a") as file:
            file.write(f"{messages[-1]['content']}\n")
        if len(calls.read_text().splitlines()) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return right(messages, index, rng)

    return rule


@pytest.mark.slow
def test_a_killed_run_goes_on_and_does_nothing_twice(tmp_path: Path) -> None:
    calls, folder = tmp_path / "calls", tmp_path / "run"
    script = KILLED.format(this=__file__, calls=str(calls), run=str(folder), fatal=17)
    killed = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with (folder / "samples.jsonl").open(
        "a"
    ) as file:  # as a kill in the middle of a line leaves it
        file.write('{"method": "rag", "user": "bob", "que')
    log = RunLog(folder, MANIFEST)
    assert len(log.samples) == 16
    samples = run(RuleLLM(noting(calls, -1)), log, ("zero-shot", "rag"))
    assert len(calls.read_text().splitlines()) == 25  # the one that was killed is asked again
    assert len(samples) == 24
    assert {s.key for s in samples} == {
        (m, q.user, q.id, 0) for m in ("zero-shot", "rag") for q in QUERIES
    }
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert (
        len({(line["method"], line["user"], line["query"]) for line in lines}) == len(lines) == 24
    )
    plain = run(RuleLLM(right), None, ("zero-shot", "rag"))
    assert [(s.key, s.answer, s.gold) for s in samples] == [
        (s.key, s.answer, s.gold) for s in plain
    ]


def begun(folder: Path, manifest: dict[str, Any] = MANIFEST) -> None:
    """A run that has made something."""
    RunLog(folder, manifest)
    (folder / "samples.jsonl").touch()


def test_a_manifest_without_results_is_replaced(tmp_path: Path) -> None:
    """As a run leaves it whose LLM was not there."""
    RunLog(tmp_path, MANIFEST)
    log = RunLog(tmp_path, {**MANIFEST, "seed": 1})
    log.complete({"weights": {"0": "a"}, "users": 2})
    assert json.loads((tmp_path / "manifest.json").read_text())["seed"] == 1
    RunLog(tmp_path, {**MANIFEST, "seed": 1}).complete({"weights": {"0": "a"}, "users": 2})
    with pytest.raises(SettingsError, match="weights.0: 'a' there, 'b' asked"):
        RunLog(tmp_path, {**MANIFEST, "seed": 1}).complete({"weights": {"0": "b"}, "users": 2})
    with pytest.raises(SettingsError, match="seed: 1 there, 0 asked"):
        RunLog(tmp_path, MANIFEST)


def test_another_runs_folder_is_refused_by_name_of_what_differs(tmp_path: Path) -> None:
    begun(tmp_path)
    with pytest.raises(SettingsError, match="seed: 0 there, 1 asked") as caught:
        RunLog(tmp_path, {**MANIFEST, "seed": 1})
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(SettingsError, match="limit: None there, 5 asked"):
        RunLog(tmp_path, {**MANIFEST, "limit": 5})
    RunLog(tmp_path, dict(reversed(MANIFEST.items())))


def test_of_many_settings_the_one_that_differs_is_named(tmp_path: Path) -> None:
    of_all = Settings().model_dump(mode="json")
    begun(tmp_path, {**MANIFEST, "settings": of_all})
    with pytest.raises(
        SettingsError, match=r"another run \(settings.temperature: 0.5 there, 1.0 asked\)"
    ):
        RunLog(tmp_path, {**MANIFEST, "settings": {**of_all, "temperature": 1.0}})


def test_a_kill_while_the_manifest_is_written_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format": 1, "meth')
    begun(tmp_path)
    written = json.loads((tmp_path / "manifest.json").read_text())
    assert {name: written[name] for name in MANIFEST} == MANIFEST
    with pytest.raises(SettingsError, match="holds another run"):
        RunLog(tmp_path, {**MANIFEST, "seed": 1})


def test_a_run_is_not_continued_by_another_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(tmp_path)
    written = json.loads((tmp_path / "manifest.json").read_text())
    import torch
    import transformers

    assert written["python"] == ".".join(map(str, sys.version_info[:3]))
    assert (written["torch"], written["transformers"]) == (
        torch.__version__,
        transformers.__version__,
    )
    monkeypatch.setattr("hydra_llm.bench.runlog.__version__", "9.9")
    with pytest.raises(SettingsError, match=f"hydra_llm: '{__version__}' there, '9.9' asked"):
        RunLog(tmp_path, MANIFEST)


@pytest.mark.parametrize(
    ("manifest", "fault"),
    [
        (
            '{"format": 99, "hydra_llm": "9.1", "more": []}',
            r"format 99 is made by a newer hydra-llm \(9\.1\)",
        ),
        ("[1]", "cannot be read"),
    ],
)
def test_a_manifest_that_cannot_be_continued_is_one_line(
    tmp_path: Path, manifest: str, fault: str
) -> None:
    (tmp_path / "manifest.json").write_text(manifest)
    (tmp_path / "samples.jsonl").touch()
    with pytest.raises(SettingsError, match=rf"manifest\.json.*{fault}.*take another --out"):
        RunLog(tmp_path, MANIFEST)


@pytest.mark.parametrize(
    "damage", [b"{", b"[]", b"{}", b"\xff", b'{"notes": [], "colour": 1}', b'{"notes": 5}']
)
def test_a_damaged_sample_is_named_by_its_line(tmp_path: Path, damage: bytes) -> None:
    log = RunLog(tmp_path, MANIFEST)
    log.add(Sample("m", "u", "q", "x", "x"))
    file = tmp_path / "samples.jsonl"
    file.write_bytes(file.read_bytes() + damage + b"\n" + file.read_bytes())
    with pytest.raises(SettingsError, match=r"samples\.jsonl:2: is no sample") as caught:
        RunLog(tmp_path, MANIFEST)
    assert "\n" not in str(caught.value)


def test_a_file_is_no_place_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    for place in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(
            SettingsError, match=r"taken(/below)?: is a file, or lies in one: a run is a folder"
        ):
            RunLog(place, MANIFEST)
    assert (tmp_path / "taken").read_text() == "mine"


@settings(max_examples=40, deadline=None)
@given(
    answer=st.none() | st.text(max_size=8),
    error=st.text(max_size=8),
    note=st.text(max_size=8),
    cut=st.integers(0, 30),
)
def test_samples_of_any_text_are_read_back(
    answer: str | None, error: str, note: str, cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("log")
    first = Sample(
        "m", "u\u2028", "q\x85\n", answer or "", answer, "", 2, 3, 1, 0.5, {"llm": 0.25}, (note,), 4
    )
    log = RunLog(folder, MANIFEST)
    log.add(first)
    log.add(Sample("m", "u", "failed", "", None, error or "HTTP 500"))
    size = (folder / "samples.jsonl").stat().st_size
    log.add(Sample("m", "u", "last", "x", "x", notes=("cut",)))
    with (folder / "samples.jsonl").open("r+b") as file:
        file.truncate(size + cut)
    again = RunLog(folder, MANIFEST)
    assert list(again.samples.values()) == [first]
    again.add(Sample("m", "u", "last", "x", "x"))
    assert list(RunLog(folder, MANIFEST).samples) == [first.key, ("m", "u", "last", 0)]


# ---- methods


def test_unparsable_answers_without_an_adapter_are_none() -> None:
    for name in ("zero-shot", "rag", "hydra-reranker", "random"):
        samples = run(RuleLLM(lambda *_: "who knows"), None, (name,))
        assert {sample.answer for sample in samples} == {None}, name


def test_baselines_see_what_they_say() -> None:
    llm = RuleLLM(right)
    run(llm, None, ("zero-shot",))
    assert not any("rain" in message["content"] for call in llm.calls for message in call)
    llm = RuleLLM(right)
    run(llm, None, ("rag",), k=2)
    assert all(
        sum("rain" in line for message in call for line in message["content"].splitlines()) == 2
        for call in llm.calls
    )
    assert len(llm.calls) == 12  # one answer, no samples
    llm = RuleLLM(right)
    samples = run(llm, None, ("user-majority",))
    assert llm.calls == []
    assert {sample.answer for sample in samples} == {"loud"}  # the latest of equals


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(SettingsError, match="unknown method 'best'"):
        find_methods(["rag", "best"])
    with pytest.raises(SettingsError, match="no method is named: take some of zero-shot, "):
        find_methods([])


def test_all_is_every_method_at_each_k_and_b() -> None:
    names = [method.name for method in find_methods(["all"], records=(1, 4), budget=(2,))]
    assert {base_name(name) for name in names} == set(METHODS.names()) - set(OF_CHOICES)
    picks = [method.name for method in find_methods(["all"], choices=True)]
    assert {base_name(name) for name in picks} > set(OF_CHOICES)
    assert [name for name in names if name.startswith(("rag@", "hydra@", "mbr"))] == [
        "rag@1",
        "rag@4",
        "hydra@1,2",
        "hydra@4,2",
        "mbr@2",
    ]
    assert "zero-shot" in names
    assert "scorer-only" not in [method.name for method in find_methods(["all"], "generation")]
    twice = find_methods(["rag@4", "all", "rag@4"], records=(4,))
    assert len({method.name for method in twice}) == len(twice)


def test_only_methods_with_an_adapter_answer_per_seed() -> None:
    llm = RuleLLM(right)
    several = [replace(parts(llm), seed=seed) for seed in (3, 5)]
    samples = run_sync(lambda: run_methods(find_methods(["rag", "hydra"]), several, QUERIES))
    assert [(s.method, s.seed) for s in samples] == [("rag", 3)] * 12 + [("hydra", 3)] * 12 + [
        ("hydra", 5)
    ] * 12


def test_rows_say_what_an_answer_cost() -> None:
    samples = [
        Sample(
            "m",
            "a",
            "1",
            "calm",
            "calm",
            calls=2,
            tokens=30,
            llm_seconds=1.0,
            seconds={"llm": 9.0, "rerank": 0.5, "adapt": 0.25},
        ),
        Sample(
            "m", "a", "2", "calm", "loud", calls=4, tokens=10, llm_seconds=2.0, seconds={"llm": 9.0}
        ),
        Sample("m", "a", "3", "calm", None, "HTTP 500"),
    ]
    (row,) = tabulate(TAGS, samples)
    assert isinstance(row, MethodResult)
    assert (row.calls, row.tokens, row.llm_seconds, row.own_seconds) == (3, 20, 1.5, 0.375)


# ---- many calls at once


def test_calls_keep_their_order_and_failures_their_place() -> None:
    output: list[tuple[int, int]] = []

    async def half(item: int) -> int:
        import anyio

        await anyio.sleep(0.002 * (6 - item))
        if item == 3:
            raise LLMError("three")
        return item * 10

    actual = run_sync(
        lambda: map_calls(
            half, range(6), limit=3, progress=lambda done, total: output.append((done, total))
        )
    )
    assert [str(result) for result in actual] == ["0", "10", "20", "three", "40", "50"]
    assert output == [(i, 6) for i in range(1, 7)]
