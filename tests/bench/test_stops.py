"""Stopped and refused runs: Ctrl-C, budget, incomplete recording, wrong golds, another run."""

import gzip
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hydra_llm.bench.experiment import run_experiment
from hydra_llm.cli.main import run
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.datasets.native import save
from hydra_llm.errors import SettingsError
from hydra_llm.llm.fake import RuleLLM
from hydra_llm.llm.registry import wrap
from tests.bench.test_experiment import SMALL, TAGS, TITLES, experiment, random_answer, users_data

QUICK = [f"--set={name}={value}" for name, value in SMALL.items()]

INTERRUPTED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from tests.bench.test_experiment import die_before
# a shell that put the tests into the background has it ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
once = iter([True])
os.kill = lambda process, number, kill=os.kill: next(once, None) and kill(process, signal.SIGINT)
die_before({before!r})
from hydra_llm.cli.main import main
main()
"""


def command(folder: Path, out: str, *more: str) -> list[str]:
    places = ["--out", str(folder / out), "--set", f"cache={folder / 'cache'}"]
    return [
        "bench",
        "run",
        str(folder / "data"),
        "--llm",
        "fake:rule=labels",
        "--json",
        *QUICK,
        *places,
        *more,
    ]


def answers(folder: Path) -> list[tuple[Any, ...]]:
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return sorted(
        (line["method"], line["user"], line["query"], line["seed"], line["answer"])
        for line in lines
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "before",
    [
        "hydra_llm.training.work.reranker_groups 1",
        "hydra_llm.training.work.train_scorer 1",
        "hydra_llm.model.persistence._write_new 1",
        "hydra_llm.bundle:Bundle.save 2",
        "hydra_llm.bench.runlog:RunLog.add 5",
        "hydra_llm.bench.runlog:RunLog.finish 1",
    ],
)
def test_ctrl_c_in_any_stage_can_be_continued(tmp_path: Path, before: str) -> None:
    save(users_data(TITLES), tmp_path / "data")
    # the LLM labels records too, so that each stage is there
    options = ("--methods", "rag@1,hydra@1,3", "--seeds", "0,1", "--set", "reranker_check=llm")
    asked = command(tmp_path, "run", *options)
    script = INTERRUPTED.format(tests=str(Path(__file__).parents[2]), before=before)
    stopped = subprocess.run([sys.executable, "-c", script, *asked], capture_output=True, text=True)
    assert (stopped.returncode, stopped.stdout) == (130, ""), stopped.stderr
    assert stopped.stderr.splitlines()[-1] == "hydra-llm: stopped; the same command continues"
    assert "Traceback" not in stopped.stderr
    assert run(asked) == 0
    assert run(command(tmp_path, "whole", *options)) == 0
    assert answers(tmp_path / "run") == answers(tmp_path / "whole")


def test_a_budget_stops_a_run_and_more_of_it_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(users_data(TAGS), tmp_path / "data")
    asked = command(tmp_path, "run", "--methods", "zero-shot,rag@1", "--set", "concurrency=1")
    assert run([*asked, "--set", "max_calls=3"]) == 1
    assert "3" in (output := capsys.readouterr().err.splitlines()[-1])
    assert "max_calls" in output
    assert len(answers(tmp_path / "run")) == 3
    assert run([*asked, "--set", "max_calls=100"]) == 0
    assert [row["failed"] for row in json.loads(capsys.readouterr().out)] == [0, 0]
    assert len(answers(tmp_path / "run")) == 8


def test_a_call_that_a_recording_lacks_is_named_and_not_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(users_data(TAGS), tmp_path / "data")
    file = str(tmp_path / "answers.jsonl.gz")
    assert run(command(tmp_path, "first", "--methods", "zero-shot", "--record", file)) == 0
    capsys.readouterr()
    replay = [
        "bench",
        "run",
        str(tmp_path / "data"),
        "--replay",
        file,
        "--json",
        *QUICK,
        "--set",
        f"cache={tmp_path / 'other'}",
    ]
    assert run([*replay, "--methods", "zero-shot,rag@1", "--out", str(tmp_path / "again")]) == 0
    output = capsys.readouterr()
    message = next(line for line in output.err.splitlines() if "answers failed" in line)
    assert message.startswith("4 of 8 answers failed, the first rag@1 on u4's q8: ")
    assert "recording" in message
    assert "retries" not in message  # a replay never asks
    rows = {row["method"]: row for row in json.loads(output.out)}
    assert (rows["zero-shot"]["failed"], rows["rag@1"]["failed"]) == (0, 4)
    assert rows["rag@1"]["metrics"]["accuracy"] == [None, None, None]


@pytest.mark.slow
def test_a_user_without_queries_is_left_out_among_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = users_data(TAGS, new=3)
    queries = {user: data.queries(user) for user in data.users("test") if user != "u5"}
    histories = {user: data.history(user) for user in data.users()}
    save(DataSet(data.task, data.splits, histories, queries), tmp_path / "data")
    assert run(command(tmp_path, "run", "--methods", "hydra@1,3,user-majority")) == 0
    assert [row["queries"] for row in json.loads(capsys.readouterr().out)] == [4, 4]
    assert {user for _, user, *_ in answers(tmp_path / "run")} == {"u4", "u6"}
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["users"] == 2


def test_a_gold_outside_the_labels_is_named_by_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(users_data(TAGS), tmp_path / "data")
    packed = tmp_path / "data" / "queries.jsonl.gz"
    lines = [
        json.loads(line) for line in gzip.decompress(packed.read_bytes()).decode().splitlines()
    ]
    lines[2]["output"] = "green"
    packed.unlink()
    packed.with_suffix("").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(command(tmp_path, "run", "--methods", "zero-shot")) == 2
    assert (
        "queries.jsonl:3: field 'output': 'green' is not one of the task's labels"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "stopped", [False, True], ids=["a whole run", "one that was stopped before it answered"]
)
def test_a_refused_command_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    """Neither with more users, who would have to be fitted, nor with other data, nor with another
    LLM.
    """
    llm = RuleLLM(random_answer)
    first = experiment(TITLES, tmp_path, "rag@1,hydra@1,3", llm, users=1, seeds=(0,))
    if stopped:

        def interrupted(*given: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("hydra_llm.bench.experiment.run_methods", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run_experiment(first)
    else:
        run_experiment(first)
    there, asked = files_of(tmp_path / "run"), len(llm.calls)
    for other, message in (
        (replace(first, users=2), "chosen.users: 1 there, 2 asked"),
        (replace(first, data=users_data(TITLES, new=3)), "data: '"),
        (
            replace(first, llm=wrap(RuleLLM(random_answer, name="another"), first.settings)),
            "llm.model: ",
        ),
        (replace(first, seeds=(0, 1)), r"seeds: \[0\] there, \[0, 1\] asked"),
        (replace(first, methods=first.methods[:1]), "learns: True there, False asked"),
    ):
        with pytest.raises(SettingsError, match=rf"holds another run \(.*{message}"):
            run_experiment(other)
        assert (files_of(tmp_path / "run"), len(llm.calls)) == (there, asked)
    assert len(run_experiment(first).samples) == 4
