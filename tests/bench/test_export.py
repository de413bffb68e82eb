"""Exports are what inspect_ai and LaMP read. inspect_ai itself reads the log where it is installed;
its schema, stored in `data/`, is checked in any case.
"""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pydantic_core
import pytest

from hydra_llm.bench.report.tables import open_run
from hydra_llm.bench.results import tabulate
from hydra_llm.bench.runlog import RunLog, Sample
from hydra_llm.cli.main import run
from hydra_llm.tasks.base import Task

STARS = Task("film_stars", "rating", "Stars? {input}", ("1", "2", "3", "4", "5"), like="LaMP-3")
MANIFEST = {"data": "d" * 64, "task": STARS.to_json(), "settings": {"k": 4}}
LLM = {"kind": "gguf", "model": "models/tiny.gguf"}
SCHEMA = Path(__file__).parent / "data/inspect_eval_log.schema.json"
RECORD = {"id": "r", "input": "ships", "output": "5", "time": "", "score": 1.0, "rank": 0}
DETAILS = {
    "input": "a film about the sea",
    "records": [RECORD | {"usefulness": None}],
    "shown": 1,
    "messages": [{"role": "system", "content": "Answer."}, {"role": "user", "content": "Stars?"}],
    "candidates": [{"text": "one", "answer": "1"}, {"text": "I say 4", "answer": "4"}],
    "chosen": 1,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two users with two queries each; the second query of the second user failed, or was not read;
    hydra has two seeds, and rag no details.
    """
    log = RunLog(tmp_path / "run", {**MANIFEST, "llm": LLM})
    costs: dict[str, Any] = {"calls": 8, "tokens": 90, "completion_tokens": 20, "llm_seconds": 0.5}
    for user in ("ada", "bob"):
        for query in ("q0", "q1"):
            bad = (user, query) == ("bob", "q1")
            for seed in (0, 1):
                sample = Sample("hydra", user, query, "3", "4", seed=seed, probability=0.5, **costs)
                failed = Sample("hydra", user, query, "3", None, "HTTP 500", seed=seed)
                log.add(failed if bad else sample, DETAILS)
            log.add(Sample("rag", user, query, "3", None if bad else "3", tokens=None))
    return tmp_path / "run"


def exported(folder: Path, to: str, out: Path | None = None) -> dict[str, Any]:
    """Method → content of its file."""
    target = [] if out is None else ["--out", str(out)]
    assert run(["bench", "export", str(folder), "--to", to, *target]) == 0
    files = (out or folder / to).glob("*.json")
    found = {file.stem.rpartition("_")[2]: json.loads(file.read_text()) for file in files}
    return {name: found[name] for name in sorted(found)}


def strict(schema: Any) -> Any:
    """The schema, which refuses names that inspect_ai does not know, as it drops their values."""
    if isinstance(schema, dict):
        closed = {name: strict(own) for name, own in schema.items()}
        return {"additionalProperties": False, **closed} if "properties" in schema else closed
    return [strict(own) for own in schema] if isinstance(schema, list) else schema


def test_half_of_a_surrogate_pair_is_repaired(folder: Path) -> None:
    """Strict readers refuse it, escaped too."""
    details = folder / "details.jsonl"
    details.write_text(details.read_text().replace('"a film about', '"\\udc00a film about'))
    exported(folder, "inspect")
    written = [file.read_bytes() for file in (folder / "inspect").glob("*.json")]
    assert written
    for content in written:
        pydantic_core.from_json(content)
    assert "\ufffda film about" in b"".join(written).decode()


def test_inspect_log_keeps_its_schema(folder: Path) -> None:
    validator = jsonschema.Draft202012Validator(strict(json.loads(SCHEMA.read_text())))
    for log in exported(folder, "inspect").values():
        validator.validate(log)
    log["samples"][0]["gain"] = 1  # the check itself: a name of ours
    assert not validator.is_valid(log)


def test_inspect_log_has_samples_scores_and_metrics(folder: Path, tmp_path: Path) -> None:
    logs = exported(folder, "inspect", tmp_path / "out")
    assert list(logs) == ["hydra", "rag"]
    log = logs["hydra"]
    assert (log["eval"]["model"], log["eval"]["solver"]) == ("gguf/tiny.gguf", "hydra")
    assert (log["eval"]["dataset"]["samples"], log["eval"]["config"]) == (4, {"epochs": 2})
    counts = log["results"]
    assert (counts["total_samples"], counts["completed_samples"]) == (8, 6)
    opened = open_run(folder)
    for result in tabulate(opened.task, opened.samples):
        scores = logs[result.method]["results"]["scores"][0]["metrics"]
        assert {name: own["value"] for name, own in scores.items()} == {
            name: value for name, (value, *_) in result.metrics.items()
        }
    sample = log["samples"][0]
    assert (sample["id"], sample["epoch"], sample["target"]) == ("ada/q0", 1, "3")
    assert sample["input"] == DETAILS["input"]
    assert [own["role"] for own in sample["messages"]] == ["system", "user", "assistant"]
    assert sample["messages"][-1]["content"] == "I say 4"
    gain = sample["scores"]["gain"]
    assert (gain["value"], gain["answer"]) == (0.75, "4")
    assert sample["output"]["usage"] == {
        "input_tokens": 70,
        "output_tokens": 20,
        "total_tokens": 90,
    }
    failed = log["samples"][-1]
    assert failed["error"]["message"] == "HTTP 500"
    assert "scores" not in failed
    unread = logs["rag"]["samples"][-1]
    assert (unread["scores"]["gain"]["value"], unread["scores"]["gain"]["answer"]) == (0.0, None)
    assert "usage" not in unread["output"]  # the LLM did not tell its tokens


def test_inspect_ai_reads_the_log(folder: Path) -> None:
    reader = pytest.importorskip("inspect_ai.log", reason="inspect_ai is not installed")
    exported(folder, "inspect")
    listed = reader.list_eval_logs(str(folder / "inspect"))
    logs = {log.eval.solver: log for log in map(reader.read_eval_log, listed)}
    assert set(logs) == {"hydra", "rag"}
    sample = logs["hydra"].samples[0]
    assert (sample.output.completion, sample.scores["gain"].value) == ("I say 4", 0.75)
    assert logs["hydra"].results.scores[0].metrics["mae"].value == 1.0


def test_lamp_answers_are_of_the_first_seed(folder: Path) -> None:
    answers = exported(folder, "lamp")
    assert answers["rag"] == {
        "task": "LaMP_3",
        "golds": [
            {"id": "ada/q0", "output": "3"},
            {"id": "ada/q1", "output": "3"},
            {"id": "bob/q0", "output": "3"},
            {"id": "bob/q1", "output": ""},
        ],
    }
    assert len(answers["hydra"]["golds"]) == 4


def test_bad_input_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "export", str(folder), "--to", "csv"]) == 2
    assert "inspect" in capsys.readouterr().err
    (folder / "file").write_text("")
    assert run(["bench", "export", str(folder), "--to", "lamp", "--out", str(folder / "file")]) == 2
    assert "name a folder with --out" in capsys.readouterr().err
    assert run(["bench", "export", str(folder / "none"), "--to", "lamp"]) == 2
    assert "is no run" in capsys.readouterr().err
