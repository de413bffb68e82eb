"""`hydra-llm demo` with the real SmolLM2, smaller: offline (conftest refuses all but loopback),
whole, and replayed by a repeat.
"""

import json
import math
from typing import Any

import pytest

from hydra_llm.bench.method import DEMO
from hydra_llm.cli import demo
from hydra_llm.cli.main import run
from hydra_llm.llm.gguf import GgufLLM

SMALL = {"TRAINING_USERS": 6, "NEW_USERS": 2, "QUERIES": 1}


@pytest.fixture
def llm_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What reached the engine."""
    calls: list[Any] = []
    real = GgufLLM.generate

    async def generate(self: GgufLLM, *arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return await real(self, *arguments, **options)

    monkeypatch.setattr(GgufLLM, "generate", generate)
    for name, value in SMALL.items():
        monkeypatch.setattr(demo, name, value)
    smaller = {
        "k": 1,
        "retrieved": 2,
        "queries_per_user": 1,
        "labelled_users": 2,
        "samples": 3,
        "epochs": 1,
        "width": 16,
    }
    monkeypatch.setattr(demo, "SETTINGS", {**demo.SETTINGS, **smaller})
    return calls


@pytest.mark.llm
@pytest.mark.slow
def test_the_demo_is_offline_and_a_repeat_makes_no_llm_call(
    llm_calls: list[Any], refused: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def output_of(*arguments: str) -> str:
        assert run(["demo", "--users", "2", "--seed", "3", *arguments]) == 0
        return capsys.readouterr().out

    table = output_of()
    assert llm_calls
    assert not refused
    llm_calls.clear()
    again = json.loads(output_of("--json"))
    assert not llm_calls

    assert [row["method"] for row in again["rows"]] == list(DEMO)
    assert len(DEMO) == 8
    for row in again["rows"]:
        assert (row["queries"], row["failed"]) == (2, 0)
        value, low, high = row["metrics"]["mae"]
        assert math.isfinite(value)
        assert 0 <= value <= 4
        assert low is high is None  # two users have no interval
        (line,) = (line for line in table.splitlines() if line.split()[:1] == [row["method"]])
        assert f" {value:.3f} " in line
        assert line.split()[-5:-3] == [str(row["queries"]), f"{row['calls']:.4g}"]
    example = again["example"]
    assert {candidate["answer"] for candidate in example["candidates"]} == set("12345")
    assert example["answer"] == example["candidates"][example["chosen"]]["answer"]
    assert f"The pick: {example['answer']}\n" in table
    assert "it has the least expected error" in table
