"""Experiments: seeds without further calls, cost estimates, SIGTERM, data of many shapes."""

import importlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hydra_llm.bench.estimate import estimate_cost, estimate_rows
from hydra_llm.bench.experiment import Experiment, run_experiment
from hydra_llm.bench.method import find_methods, split_names
from hydra_llm.bench.results import tabulate
from hydra_llm.bundle import Bundle
from hydra_llm.cli.main import run
from hydra_llm.config import load_settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.datasets.native import save
from hydra_llm.errors import DataError
from hydra_llm.llm.concurrency import PARALLEL
from hydra_llm.llm.fake import RuleLLM
from hydra_llm.llm.registry import wrap
from hydra_llm.tasks.base import Task
from hydra_llm.types import Message, Query, Record
from tests.waiting import FOREVER

pytestmark = pytest.mark.slow

WORDS = ("rain", "war", "love", "night", "star", "sea", "old", "song")
TAGS = Task("tags", "classification", "Which tag? {input}", ("calm", "loud", "odd"))
TITLES = Task("titles", "generation", "Title of: {input}")
SMALL: dict[str, Any] = {
    "samples": 3,
    "retrieved": 3,
    "k": 2,
    "queries_per_user": 2,
    "max_length": 32,
    "width": 16,
}


def users_data(
    task: Task, train: int = 4, new: int = 2, records: int = 8, queries: int = 2
) -> DataSet:
    dice = random.Random(1)

    def text() -> str:
        return " ".join(dice.sample(WORDS, 3))

    splits, history, asked = {}, [], []
    for number in range(train + new):
        user = f"u{number}"
        splits[user] = "train" if number < train else "test"
        for i in range(records + queries):
            output = dice.choice(task.labels) if task.labels else text()
            if i < records:
                history.append(Record(user, f"r{i}", text(), output, str(2000 + i)))
            elif number >= train:
                asked.append(Query(user, f"q{i}", text(), output, str(2000 + i)))
    return DataSet.from_records(task, splits, history, asked)  # type: ignore[arg-type]


def random_answer(messages: Sequence[Message], index: int, rng: random.Random) -> str:
    return rng.choice((*TAGS.labels, "a song of rain", "the old sea"))


def experiment(
    task: Task, folder: Path, methods: str = "all", llm: RuleLLM | None = None, **given: Any
) -> Experiment:
    settings = load_settings(cache=folder / "cache", **SMALL)
    result = find_methods(split_names(methods), task.kind, records=(1, 2), budget=(3,))
    return Experiment(
        users_data(task),
        wrap(llm or RuleLLM(random_answer), settings),
        settings,
        result,
        folder / "run",
        **given,
    )


@pytest.mark.parametrize("task", [TAGS, TITLES], ids=lambda task: task.name)
def test_more_seeds_need_no_more_calls(task: Task, tmp_path: Path) -> None:
    llm = RuleLLM(random_answer)
    once = run_experiment(experiment(task, tmp_path, llm=llm, seeds=(0,)))
    asked = len(llm.calls)
    more = experiment(task, tmp_path, llm=llm, seeds=(0, 1, 2))
    outcome = run_experiment(replace(more, out=tmp_path / "more"))
    assert len(llm.calls) == asked
    of_first, of_one = (
        {
            sample.key: sample.answer
            for sample in each
            if sample.seed == 0 or sample.method == "random@3"
        }  # whose seeds are places
        for each in (outcome.samples, once.samples)
    )
    assert of_first == of_one
    by_method = {
        method: {s.seed for s in outcome.samples if s.method == method}
        for method in {s.method for s in outcome.samples}
    }
    assert by_method["hydra@1,3"] == by_method["bbox-adapter@3"] == {0, 1, 2}
    assert by_method["random@3"] == {0, 1, 2}
    assert by_method["rag@1"] == by_method["oracle@3"] == by_method["hydra-reranker@2"] == {0}
    assert [entry["seed"] for entry in outcome.learning] == [0, 1, 2]
    assert outcome.learning[1]["reranker"] == outcome.learning[0]["reranker"]

    lines = (tmp_path / "more" / "samples.jsonl").read_text()
    again = run_experiment(replace(more, out=tmp_path / "more"))
    assert (tmp_path / "more" / "samples.jsonl").read_text() == lines
    assert [row.to_json() for row in tabulate(task, again.samples)] == [
        row.to_json() for row in tabulate(task, outcome.samples)
    ]


def test_new_users_are_asked_with_what_training_users_choose(tmp_path: Path) -> None:
    """The LLM is right where it sees one record; k is 2, unless a method names another one."""
    data = users_data(TAGS)
    known = {record.input: record.output for user in data.users() for record in data.answered(user)}
    shown = list[int]()

    def rule(messages: Sequence[Message], index: int, rng: random.Random) -> str:
        shown.append(sum(message["role"] == "assistant" for message in messages))
        answer = next(own for text, own in known.items() if text in messages[-1]["content"])
        return answer if shown[-1] == 1 else next(tag for tag in TAGS.labels if tag != answer)

    llm = RuleLLM(rule)
    one = experiment(TAGS, tmp_path, "hydra,hydra@2,3", llm, seeds=(0, 1))
    more = {"choose": "auto", "ask": "always", "rerank": "never", "gate": "off"}
    one = replace(one, settings=one.settings.model_copy(update=more))
    cost = {stage.stage: stage.calls for stage in estimate_cost(one).stages}
    outcome = run_experiment(one)
    for seed in (0, 1):
        learned = Bundle.load(tmp_path / "run" / f"bundle-{seed}")
        assert (learned.settings.k, learned.settings.choose) == (1, "auto")
        assert learned.report["chosen"]["k"] == 1
    tried = outcome.learning[0]["chosen"]["tried"]
    assert [entry["k"] for entry in tried][:4] == [2, 0, 1, 4]
    gains = [entry["gain"] for entry in tried]  # other records have the same input
    assert gains[2] > 0.5 > max(gains[0], gains[1], gains[3])
    assert outcome.learning[0]["stages"]["choose sampling"]["calls"] >= cost["choose sampling"] > 0
    assert "choose sampling" not in outcome.learning[1]["stages"]
    tokens = {
        method: sum(s.tokens or 0 for s in outcome.samples if s.method == method)
        for method in ("hydra", "hydra@2,3")
    }
    assert tokens["hydra"] < tokens["hydra@2,3"]
    asked = len(llm.calls)
    again = run_experiment(one)
    assert len(llm.calls) == asked
    assert [s.answer for s in again.samples] == [s.answer for s in outcome.samples]


def test_methods_of_equally_many_records_ask_one_after_the_other(tmp_path: Path) -> None:
    """In whatever order they are named: an engine inside the process still holds the prompt of the
    greedy answer when samples are drawn.
    """
    one = experiment(
        TAGS,
        tmp_path,
        "hydra@2,3,hydra@1,3,rag@2,rag@1,zero-shot,user-majority,hydra-adapter@3,hydra-reranker@2",
    )
    settings = one.settings.model_copy(update={"concurrency": 1})
    outcome = run_experiment(replace(one, settings=settings))
    lines = [
        json.loads(line)["method"]
        for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    ]
    once = [
        "zero-shot",
        "user-majority",
        "hydra-adapter@3",
        "hydra@1,3",
        "rag@1",
        "hydra@2,3",
        "rag@2",
        "hydra-reranker@2",
    ]
    assert lines == once * 4
    assert outcome.samples[0].method == "hydra@2,3"


@pytest.mark.parametrize(
    ("task", "labels"),
    [(TAGS, "history"), (TITLES, "history"), (TITLES, "llm")],
    ids=["tags", "titles", "titles-llm"],
)
def test_an_estimate_counts_the_calls_of_the_run(task: Task, labels: str, tmp_path: Path) -> None:
    """Exactly, where no reranker puts records in an order that nobody can know before; else never
    less. New users cost calls where the word model does not take the place of the LLM's labels.
    """
    llm = RuleLLM(random_answer)
    plain = experiment(
        task, tmp_path, "zero-shot,rag@1,rag@2,recent@2,pag@1,self-consistency@3", llm
    )
    plain = replace(plain, settings=plain.settings.model_copy(update={"fit_labels": labels}))
    result = estimate_cost(plain)
    made = len(llm.calls)
    assert 0 < result.sampled <= 5
    assert {stage.stage.split()[0] for stage in result.stages} == {"label", "answer"} | (
        {"fit"} if labels == "llm" else set()
    )
    run_experiment(plain)
    spent = len(
        {json.dumps([list(map(dict, call))]) for call in llm.calls}
    )  # the fake is called once for each text
    assert result.total.calls >= spent - made
    after = estimate_cost(plain)
    assert after.total.kept > 0
    assert after.total.calls < result.total.calls

    prompts = experiment(
        task, tmp_path / "prompts", "zero-shot,rag@1,rag@2,recent@2", llm := RuleLLM(random_answer)
    )
    counted, made = estimate_cost(prompts), len(llm.calls)
    assert 8 < counted.total.calls <= 16  # two methods may show the same records
    run_experiment(prompts)
    assert len(llm.calls) == counted.total.calls  # those that the plan made are kept
    assert made == counted.sampled == 5
    assert (nothing := estimate_cost(prompts)).total.calls == 0
    assert nothing.total.kept == counted.total.calls


def test_an_estimate_uses_measured_tokens_and_prices(tmp_path: Path) -> None:
    one = experiment(TAGS, tmp_path, "zero-shot")
    prices = {"price_prompt": 2e6, "price_completion": 0.0}
    result = estimate_cost(replace(one, settings=one.settings.model_copy(update=prices)))
    (stage,) = result.stages
    assert stage.cost == 2 * stage.prompt_tokens > 0
    assert stage.calls == 4


def test_an_estimate_takes_the_list_of_prices_or_has_none(tmp_path: Path) -> None:
    one = experiment(TAGS, tmp_path / "without", "zero-shot")
    assert {row["money"] for row in estimate_rows(estimate_cost(one))} == {"no price"}
    one = experiment(TAGS, tmp_path / "listed", "zero-shot")
    file = tmp_path / "prices.toml"
    file.write_text('[models]\n"*" = { input = 2e6, output = 0 }')
    listed = replace(one, settings=one.settings.model_copy(update={"prices": file}))
    (stage,) = estimate_cost(listed).stages
    assert stage.cost == 2 * stage.prompt_tokens > 0


def test_estimated_minutes_are_wall_clock(tmp_path: Path) -> None:
    assert estimate_cost(experiment(TAGS, tmp_path, "zero-shot")).texts == 0  # reads nothing
    one = experiment(TAGS, tmp_path, "hydra@1,3")
    result = estimate_cost(one)
    assert result.parallel == PARALLEL
    assert (
        0 < result.texts <= 6 * 8 * 2 + 2 * 2
    )  # records with and without their answers, and queries; what was gone through is kept
    assert result.encoding > 0
    whole = replace(
        result, stages=tuple(replace(stage, seconds=80.0) for stage in result.stages), encoding=20.0
    )
    assert whole.seconds == 80.0 * len(result.stages) / result.parallel + 20.0
    whole = replace(whole, stages=whole.stages[:1])
    *_, encode, total = estimate_rows(whole)
    assert (encode["stage"], encode["minutes"]) == (f"encode {result.texts} texts", 0.3)
    assert total["minutes"] == round(whole.seconds / 60, 1)
    assert estimate_cost(one).texts < result.texts  # what it encoded is kept


def test_methods_without_their_required_part_are_left_out(tmp_path: Path) -> None:
    lines: list[str] = []
    same = RuleLLM(
        lambda messages, index, rng: "a song"
    )  # no two candidates differ: no adapter can be learned
    methods = "rag@1,hydra@1,3,hydra-adapter@3,hydra-published@1,3"
    outcome = run_experiment(experiment(TITLES, tmp_path, methods, same, say=lines.append))
    assert list(dict.fromkeys(sample.method for sample in outcome.samples)) == [
        "rag@1",
        "hydra@1,3",
    ]
    why = (
        "which requires the adapter: no two candidates of a query differed in what they were worth"
    )
    assert [line for line in lines if "left out" in line] == [
        f"left out: {name}, {why}" for name in ("hydra-adapter@3", "hydra-published@1,3")
    ]
    alone = experiment(TITLES, tmp_path, "hydra-adapter@3", same, say=lines.append)
    with pytest.raises(
        DataError, match=r"no method is left: no adapter was learned \(no two candidates"
    ):
        run_experiment(alone)


def test_methods_that_learn_nothing_cost_no_label(tmp_path: Path) -> None:
    llm = RuleLLM(random_answer)
    outcome = run_experiment(experiment(TAGS, tmp_path, "rag@1,user-majority,copy-nearest", llm))
    assert len(llm.calls) == 4
    assert not (tmp_path / "run" / "bundle").exists()
    assert {sample.method for sample in outcome.samples} == {
        "rag@1",
        "user-majority",
        "copy-nearest",
    }


def test_an_estimate_leaves_out_what_a_method_cannot_answer(tmp_path: Path) -> None:
    """One new user has no other one for `mismatched`: the run goes on, and so does its estimate."""
    asked = experiment(TAGS, tmp_path, "rag@1,mismatched@1,3")
    alone = replace(asked, data=users_data(TAGS, new=1))
    stages = {stage.stage: stage.calls for stage in estimate_cost(alone).stages}
    assert stages["answer rag@1"] > 0
    assert not stages.get("answer mismatched@1,3")
    with pytest.raises(DataError, match="no new user has a query"):
        estimate_cost(replace(asked, data=users_data(TAGS, new=0)))


def test_an_estimate_counts_the_calls_for_probabilities_alone(tmp_path: Path) -> None:
    """Their texts are cached by a strict run, which has not asked for probabilities."""
    llm = RuleLLM(random_answer, choose=lambda messages, index, rng, labels: rng.choice(labels))
    given = experiment(TAGS, tmp_path, "rag@1", llm=llm)
    strict = replace(given, settings=given.settings.model_copy(update={"constrain": True}))
    run_experiment(strict)
    assert estimate_cost(strict).total.calls == 0
    update = {"label_probabilities": True}
    grey = replace(strict, settings=strict.settings.model_copy(update=update), out=tmp_path / "g")
    before, counted = len(llm.calls), estimate_cost(grey)
    run_experiment(grey)
    assert counted.total.calls == len(llm.calls) - before == 4


def test_bench_run_takes_k_b_seeds_and_dry_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(users_data(TAGS), tmp_path / "data")
    settings = [f"--set={name}={value}" for name, value in SMALL.items()]
    common = [
        "bench",
        "run",
        str(tmp_path / "data"),
        "--llm",
        "fake:rule=labels",
        *settings,
        "--set",
        f"cache={tmp_path / 'cache'}",
    ]
    out = ["--out", str(tmp_path / "run")]
    assert (
        run(
            [
                *common,
                *out,
                "--methods",
                "all",
                "--k",
                "1",
                "--b",
                "3",
                "--seeds",
                "0,4",
                "--dry-run",
                "--json",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["total"]["calls"] > 0
    assert not (tmp_path / "run").exists()
    assert (
        run(
            [
                *common,
                *out,
                "--methods",
                "rag,hydra@1,3",
                "--seeds",
                "0,4",
                "--set",
                "price_prompt=1000000",
                "--json",
            ]
        )
        == 0
    )
    rag, hydra = json.loads(capsys.readouterr().out)
    assert (rag["seeds"], set(hydra["seeds"]), hydra["queries"]) == ({}, {"0", "4"}, 4)
    assert rag["cost"] > 0
    assert set(rag["seconds"]) == {"retrieve", "rerank", "prompt", "llm", "adapt"}
    learning = json.loads((tmp_path / "run" / "learning.json").read_text())
    assert [entry["seed"] for entry in learning] == [0, 4]
    assert {stage: spent["calls"] for stage, spent in learning[0]["fitted"]["stages"].items()} == {
        "fit reranker": 0,
        "fit adapter": 0,
    }
    label = learning[0]["stages"]["label candidates"]
    assert (label["users"], label["calls"]) == (
        4,
        learning[1]["stages"]["label candidates"]["calls"],
    )  # asked once, told by both
    for wrong, fault in (
        (["--k", "1,x"], "--k 1,x: write whole numbers from 1 with commas, as 1,2,4"),
        (["--seeds", "-1"], "--seeds -1: write whole numbers from 0"),
        (
            ["--seeds", "0", "--bundle", str(tmp_path / "run" / "bundle-0")],
            "--seeds learns a bundle for each: leave --bundle out",
        ),
    ):
        assert run([*common, *out, *wrong]) == 2
        assert fault in capsys.readouterr().err


def test_a_recording_takes_the_place_of_the_llm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(users_data(TAGS), tmp_path / "data")
    settings = [f"--set={name}={value}" for name, value in SMALL.items()]
    common = [
        "bench",
        "run",
        str(tmp_path / "data"),
        "--methods",
        "rag,hydra@1,3",
        "--json",
        *settings,
    ]
    recording = str(tmp_path / "answers.jsonl.gz")
    llm = ["--llm", "fake:rule=labels"]
    first = [
        *llm,
        "--record",
        recording,
        "--out",
        str(tmp_path / "first"),
        "--set",
        f"cache={tmp_path / 'cache'}",
    ]
    again = [
        "--replay",
        recording,
        "--out",
        str(tmp_path / "again"),
        "--set",
        f"cache={tmp_path / 'other'}",
    ]
    assert run([*common, *first]) == 0
    asked = json.loads(capsys.readouterr().out)
    assert run([*common, *again]) == 0
    for before, after in zip(asked, json.loads(capsys.readouterr().out), strict=True):
        assert (before["metrics"], before["calls"]) == (after["metrics"], after["calls"])
    for both in ([*llm, *again], again[2:]):
        assert run([*common, *both]) == 2
        assert "give one of --llm SPEC and --replay FILE" in capsys.readouterr().err


def test_a_user_without_queries_is_no_user_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(users_data(TAGS, queries=0), tmp_path / "data")
    assert (
        run(
            [
                "bench",
                "run",
                str(tmp_path / "data"),
                "--llm",
                "fake:echo",
                "--out",
                str(tmp_path / "run"),
                "--methods",
                "rag",
            ]
        )
        == 2
    )
    assert (
        "no new user has a query whose answer is known: users.jsonl needs users with split 'test'"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()


def test_data_that_changed_since_the_run_began_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(users_data(TAGS), tmp_path / "data")
    command = [
        "bench",
        "run",
        str(tmp_path / "data"),
        "--llm",
        "fake:rule=labels",
        "--out",
        str(tmp_path / "run"),
        "--methods",
        "rag",
    ]
    assert run([*command, "--set", f"cache={tmp_path / 'cache'}"]) == 0
    save(users_data(TAGS, queries=3), tmp_path / "other")
    assert (
        run(
            [
                *command[:2],
                str(tmp_path / "other"),
                *command[4 - 1 :],
                "--set",
                f"cache={tmp_path / 'cache'}",
            ]
        )
        == 2
    )
    assert re.search(r"holds another run \(data: '\w+' there, '\w+' asked", capsys.readouterr().err)


class Answers(BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint that answers three times and then lets everybody wait."""

    asked = 0
    go = threading.Event()

    def do_POST(self) -> None:
        type(self).asked += 1
        if type(self).asked > 3:
            type(self).go.wait(FOREVER)
        message = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "calm"},
        }
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        body = json.dumps(
            {
                "id": "c",
                "object": "chat.completion",
                "created": 0,
                "model": "m",
                "choices": [message],
                "usage": usage,
            }
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """A test's server says nothing."""


def test_sigterm_loses_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM amid a run, as a scheduler sends it: what was answered is in the recording, and
    nothing of it is asked again.
    """
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    Answers.asked, Answers.go = 0, threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    save(users_data(TAGS), tmp_path / "data")
    llm = f"openai:m@http://127.0.0.1:{server.server_address[1]}/v1"
    command = [
        "bench",
        "run",
        str(tmp_path / "data"),
        "--llm",
        llm,
        "--methods",
        "rag@1,recent@2",
        "--set",
        "concurrency=1",
    ]

    def begun(cache: str, out: str) -> subprocess.Popen[str]:
        places = [
            "--set",
            f"cache={tmp_path / cache}",
            "--out",
            str(tmp_path / out),
            "--record",
            str(tmp_path / "recording.jsonl.gz"),
        ]
        entry = [sys.executable, "-c", "from hydra_llm.cli.main import main; main()"]
        return subprocess.Popen(
            [*entry, *command, *places], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    process = begun("one", "first")
    while Answers.asked < 4:
        time.sleep(0.05)
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=FOREVER)
    assert (process.returncode, err.splitlines()[-1]) == (
        130,
        "hydra-llm: stopped; the same command continues",
    )
    assert len((tmp_path / "first" / "samples.jsonl").read_text().splitlines()) == 3
    Answers.go.set()
    Answers.asked = 0
    _, err = (other := begun("two", "second")).communicate(
        timeout=FOREVER
    )  # another machine: no cache, the recording alone
    assert other.returncode == 0, err
    assert Answers.asked == 5
    server.shutdown()
    server.server_close()


KILLED = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("test_experiment", {this!r})
here = importlib.util.module_from_spec(spec)
sys.modules["test_experiment"] = here
spec.loader.exec_module(here)
from hydra_llm.bench import experiment
from tests.learning import quick_learn
experiment.learn = quick_learn
here.die_before({before!r})
here.noted_run(Path({folder!r}), {fatal})
"""


def die_before(name: str) -> None:
    """kill -9 of this process as soon as `MODULE.FUNCTION` is called for the `TIMES`th time;
    nothing for an empty name.
    """
    if not name:
        return
    path, times = name.split()
    where, _, function = path.rpartition(".")
    owner: Any = importlib.import_module(where.partition(":")[0])
    owner = getattr(owner, where.partition(":")[2], owner)
    real, left = getattr(owner, function), iter(range(int(times) - 1))

    def dying(*given: Any, **named: Any) -> Any:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given, **named)

    setattr(owner, function, dying)


def noted_run(folder: Path, fatal: int) -> list[Any]:
    """A run whose LLM writes each call down, and is killed at call number `fatal`."""
    calls = folder / "calls"

    def rule(messages: Sequence[Message], index: int, rng: random.Random) -> str:
        with calls.open("a") as file:
            file.write(json.dumps([[dict(message) for message in messages], index]) + "\n")
        if len(calls.read_text().splitlines()) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return random_answer(messages, index, rng)

    methods = "zero-shot,rag@2,hydra@2,3,bbox-adapter@3"
    one = experiment(TITLES, folder, methods, RuleLLM(rule), seeds=(0, 1))
    settings = one.settings.model_copy(update={"concurrency": 1})
    outcome = run_experiment(replace(one, settings=settings))
    return [(sample.key, sample.answer, sample.error) for sample in outcome.samples]


def test_a_kill_in_any_stage_loses_only_the_call_in_flight(tmp_path: Path) -> None:
    """kill -9 while records are labelled, candidates are labelled, new users are fitted, and
    queries are answered; and without a call in flight: in training, with half a bundle written,
    between fitting and saving, before the results are written.
    """
    (tmp_path / "whole").mkdir()
    expected = noted_run(tmp_path / "whole", -1)
    whole = (tmp_path / "whole" / "calls").read_text().splitlines()
    for share in (0.1, 0.45, 0.7, 0.95):
        folder = tmp_path / str(share)
        folder.mkdir()
        fatal = int(share * len(whole))
        killed = run_script(
            KILLED.format(this=__file__, folder=str(folder), fatal=fatal, before="")
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert noted_run(folder, -1) == expected
        again = (folder / "calls").read_text().splitlines()
        assert len(again) - len(whole) <= one_call(again[fatal - 1 :], again[: fatal - 1])
    for before in (
        "hydra_llm.training.work.train_scorer 2",
        "hydra_llm.model.persistence._write_new 1",
        "hydra_llm.bundle:Bundle.save 2",
        "hydra_llm.bench.runlog:RunLog.add 5",
    ):
        folder = tmp_path / before
        folder.mkdir()
        killed = run_script(
            KILLED.format(this=__file__, folder=str(folder), fatal=-1, before=before)
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert noted_run(folder, -1) == expected
        assert sorted((folder / "calls").read_text().splitlines()) == sorted(whole)


def run_script(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", text],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def one_call(after: Sequence[str], before: Sequence[str]) -> int:
    """Texts of the call in flight: those of its prompt that were written down before the kill."""
    prompt = json.loads(after[0])[0]
    return 1 + sum(json.loads(line)[0] == prompt for line in before)
