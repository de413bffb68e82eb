"""`learn`, `fit` and `bench run` by the Batch API: the same results as by direct calls."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hydra_llm.cli.main import run
from hydra_llm.datasets.native import save
from tests.batch_server import Answer, BatchServer
from tests.bench.test_experiment import SMALL, TAGS, TITLES, users_data
from tests.bench.test_stops import answers

PENDING = 3  # exit code


def labels(body: dict[str, Any]) -> Answer:
    """A random tag for each text, by prompt and seed."""
    seeds = [f"{body['messages']}{body.get('seed', 0) + i}" for i in range(body.get("n", 1))]
    texts = [random.Random(seed).choice(TAGS.labels) for seed in seeds]
    choices = [
        {"index": i, "message": {"role": "assistant", "content": text}}
        for i, text in enumerate(texts)
    ]
    return 200, {"choices": choices, "usage": {"prompt_tokens": 9, "completion_tokens": 2}}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[BatchServer]:
    monkeypatch.setattr("hydra_llm.llm.batch.QUIET", 0.05)
    monkeypatch.setattr("hydra_llm.llm.batch.POLL", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-any")
    server = BatchServer(labels)
    yield server
    server.close()


def options(folder: Path, server: BatchServer, cache: str, *more: str) -> list[str]:
    given = {**SMALL, "cache": folder / cache, "reranker_check": "llm"}
    settings = [f"--set={name}={value}" for name, value in given.items()]
    return ["--llm", f"openai:gpt-4o@{server.url}", "--json", *settings, *more]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["wait", "submit"])
def test_a_run_by_batches_equals_one_by_calls(
    server: BatchServer, tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(users_data(TAGS), tmp_path / "data")

    def command(name: str, *more: str) -> list[str]:
        methods = ["--methods", "zero-shot,rag@1,hydra@1,3", "--out", str(tmp_path / name)]
        own = options(tmp_path, server, f"cache-{name}", *methods, *more)
        return ["bench", "run", str(tmp_path / "data"), *own]

    assert run(command("direct")) == 0
    calls = len(server.direct)
    assert calls > 20
    codes, server.polls = list[int](), 1 if mode == "wait" else 2
    while not codes or (codes[-1] == PENDING and len(codes) < 20):
        codes.append(run(command("batch", "--batch", mode)))
    if mode == "submit":
        assert codes[0] == PENDING
    assert codes[-1] == 0
    assert answers(tmp_path / "batch") == answers(tmp_path / "direct")
    assert len(server.direct) == calls + 1
    assert set(server.executed.values()) == {1}
    assert server.executed.total() == calls - 1
    assert len(server.batches) <= 8, "a few rounds"
    lines = capsys.readouterr().err
    assert "requests was sent" in lines
    assert ("run the same command again" in lines) == (mode == "submit")


@pytest.mark.slow
def test_learn_and_fit_by_batches(
    server: BatchServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(users_data(TITLES), tmp_path / "data")
    data, bundle = str(tmp_path / "data"), str(tmp_path / "bundle")
    own = options(tmp_path, server, "cache", "--batch", "wait", "--set", "fit_labels=llm")
    assert run(["learn", data, "--out", bundle, *own]) == 0
    learned = json.loads(capsys.readouterr().out)
    assert (learned["failed"], len(server.direct)) == (0, 1)
    assert learned["llm_calls"] == 1 + server.executed.total()
    own = options(tmp_path, server, "cache", "--batch", "wait")
    assert run(["fit", data, "--bundle", bundle, *own]) == 0
    assert len(server.direct) == 1
    assert run(["llm", "batches", own[1], "--set", f"cache={tmp_path / 'cache'}", "--json"]) == 0
    output = capsys.readouterr().out
    listed = json.loads(output[output.index("\n[") :])
    assert {batch["status"] for batch in listed} == {"completed"}
    assert sum(batch["done"] for batch in listed) == server.executed.total()


def test_an_estimate_has_the_price_of_batches(
    server: BatchServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(users_data(TAGS), tmp_path / "data")
    costs = []
    for batch in ([], ["--batch", "wait"]):
        places = ["--out", str(tmp_path / "run"), "--methods", "zero-shot", "--dry-run"]
        own = options(tmp_path, server, "cache", *places, *batch)
        assert run(["bench", "run", str(tmp_path / "data"), *own]) == 0
        costs.append(json.loads(capsys.readouterr().out)["total"]["cost"])
        (tmp_path / "cache" / "llm.sqlite").unlink()
    assert costs[1] == pytest.approx(costs[0] / 2)
    assert costs[1] > 0
    assert not server.batches


def test_batch_needs_an_endpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(users_data(TAGS), tmp_path / "data")
    command = ["learn", str(tmp_path / "data"), "--out", str(tmp_path / "bundle")]
    assert run([*command, "--llm", "fake:rule=labels", "--batch", "wait"]) == 2
    assert "has no Batch API" in capsys.readouterr().err
