"""The check of the committed results finds every changed figure."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from hydra_llm.cli.main import run
from hydra_llm.datasets.native import save
from tests.bench.test_experiment import TAGS, users_data

replay: Any = pytest.importorskip("replay", reason="the source package carries no benchmarks")
publish: Any = pytest.importorskip("publish", reason="the source package carries no benchmarks")

PUBLISHED: dict[str, Any] = {
    "methods": {
        "rag@4": {"metrics": {"mae": [0.5, 0.4, None]}, "own_seconds": 3.0, "seconds": {"llm": 2.0}}
    },
    "findings": ["hydra gains 0.250 of 3 users.", "No reranker was learned."],
}


def changed(text: str, new: str) -> Any:
    return json.loads(json.dumps(PUBLISHED).replace(text, new, 1))


def test_only_measured_seconds_and_the_fourth_decimal_may_differ() -> None:
    for again in (
        PUBLISHED,
        changed("3.0", "9.0"),
        changed("2.0", "9.0"),
        changed("0.5", "0.5004"),
        changed("0.250", "0.251"),
        {**PUBLISHED, "comparisons": 3},  # newer than what was published
    ):
        assert replay.differing(PUBLISHED, again) == ([], 5)


@pytest.mark.parametrize(
    ("again", "line"),
    [
        (changed("0.5", "0.501"), "methods.rag@4.metrics.mae.0: 0.5 published, 0.501 repeated"),
        (changed("null", "0.6"), "methods.rag@4.metrics.mae.2: None published, 0.6 repeated"),
        (
            changed("0.250", "0.260"),
            (
                "findings.0: hydra gains 0.250 of 3 users. published, hydra gains 0.260 of 3 users."
                " repeated"
            ),
        ),
        (
            changed("gains", "loses"),
            (
                "findings.0: hydra gains 0.250 of 3 users. published, hydra loses 0.250 of 3 users."
                " repeated"
            ),
        ),
        (changed(', "No reranker was learned."', ""), "findings.1: only published"),
        ({**PUBLISHED, "more": 1}, "more: only repeated"),
    ],
)
def test_what_differs_is_named(again: Any, line: str) -> None:
    assert replay.differing(PUBLISHED, again)[0] == [line]


@pytest.mark.slow
def test_replay_repeats_a_run_and_finds_changed_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HYDRA_CACHE", str(tmp_path / "cache"))
    for module in (publish, replay):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(replay, "LABELS", "none.json")
    save(users_data(TAGS), tmp_path / "data" / "tags")
    arguments = (
        "--methods zero-shot,rag@4,hydra@2,3,random@3,oracle@3 --set samples=3 --set retrieved=3"
        " --set k=2"
    )
    recording, out = tmp_path / "r.jsonl.gz", tmp_path / "run"
    llm = ["--llm", "fake:rule=labels", "--record", str(recording)]
    assert (
        run(
            [
                "bench",
                "run",
                str(tmp_path / "data" / "tags"),
                *llm,
                "--out",
                str(out),
                *arguments.split(),
            ]
        )
        == 0
    )
    command = [
        "publish",
        str(out),
        "tags_60",
        "--data",
        "tags",
        "--recording",
        str(recording),
        f"--arguments={arguments}",
    ]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="0"):
        publish.main()
    kept = tmp_path / "results" / "tags_60" / "recording.jsonl.gz"
    command[2], command[6] = "tags_again", str(kept)  # which uses the first one's recording
    with pytest.raises(SystemExit, match="0"):
        publish.main()
    assert not (tmp_path / "results" / "tags_again" / kept.name).exists()
    assert not replay.counts_overall("tags_again")
    capsys.readouterr()

    def repeated(name: str = "tags_60") -> tuple[int, str]:
        monkeypatch.setenv("HYDRA_CACHE", str(tmp_path / name))
        monkeypatch.setattr(sys, "argv", ["replay", str(tmp_path / "data"), "--only", name])
        with pytest.raises(SystemExit) as ended:
            replay.main()
        return int(ended.value.code or 0), capsys.readouterr().out

    code, message = repeated()
    assert code == 0, message
    assert "tags_60: the same in " in message
    code, message = repeated("tags_again")
    assert code == 0, message
    assert "tags_again: the same in " in message
    file = tmp_path / "results" / "tags_60" / "report.json"
    report = json.loads(file.read_text())
    report["methods"][1]["metrics"]["accuracy"][0] += 0.001
    file.write_text(json.dumps(report))
    code, message = repeated()
    assert code == 1
    assert "tags_60: DIFFERS in " in message
    assert f"methods.{report['methods'][1]['method']}.metrics.accuracy.0: " in message
