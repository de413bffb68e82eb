"""Findings, costs and costs of learning come from the figures of the run."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hydra_llm.bench.report.findings import calibration_error, findings
from hydra_llm.bench.report.markdown import markdown
from hydra_llm.bench.report.summary import cost_rows, learning_rows
from hydra_llm.bench.report.tables import Run, comparison_rows, make_report, method_rows, open_run
from hydra_llm.bench.runlog import RunLog, Sample
from hydra_llm.cli.main import run
from hydra_llm.errors import SettingsError
from hydra_llm.llm.meter import Prices
from hydra_llm.tasks.base import Task

TAGS = Task(
    "tags",
    "classification",
    "Which tag? {input}",
    ("calm", "loud"),
    metrics=("accuracy",),
    like="LaMP-2",
)
USERS = tuple(f"u{i:02}" for i in range(20))
MANIFEST = {
    "data": "d",
    "task": TAGS.to_json(),
    "llm": {"model": "m"},
    "users": 20,
    "queries": 80,
    "settings": {"k": 4},
}
RIGHT: Mapping[str, int] = {
    "rag@4": 1,
    "hydra@4,8": 3,
    "mbr@8": 3,
    "scorer-only": 4,
    "random@8": 2,
    "oracle@8": 4,
}
"""How many of a user's four queries a method answers right."""


def spent(users: int, seconds: float, calls: int = 0) -> dict[str, float]:
    return {
        "users": users,
        "seconds": seconds,
        "calls": calls,
        "prompt_tokens": 100 * calls,
        "completion_tokens": 10 * calls,
    }


LEARNED = {
    "seed": 0,
    "users": 10,
    "stages": {"label records": spent(3, 30.0, calls=12), "fit adapter": spent(10, 1.0)},
    "fitted": {"users": 20, "stages": {"fit adapter": spent(20, 0.5)}},
    "reranker": {
        "loss_uniform": 1.6,
        "loss_shared": 1.5,
        "loss_user": 1.4,
        "gain_first": 0.6,
        "gain_pick": 0.7,
        "gain_best": 0.9,
    },
    "adapter": {
        "loss_uniform": 0.7,
        "loss_shared": 0.6,
        "loss_user": math.nan,
        "vote_weight": {"llm_votes": 0.1},
        "loss_with_votes": 0.4,
        "loss_without_votes": 0.5,
    },
}


def made(folder: Path, learning: list[dict[str, Any]]) -> Run:
    log = RunLog(folder, MANIFEST)
    for user in USERS:
        for place in range(4):
            for method, right in RIGHT.items():
                own = (
                    {"probability": 0.75, "agreement": 1.0 if place else 0.5}
                    if method == "hydra@4,8"
                    else {}
                )
                answer = "calm" if place < right else "loud"
                costs = {
                    "calls": 2,
                    "tokens": 110,
                    "completion_tokens": 10,
                    "llm_seconds": 2.0,
                    "seconds": {"retrieve": 0.5, "llm": 9.0},
                }
                log.add(Sample(method, user, str(place), "calm", answer, **costs, **own))  # type: ignore[arg-type]
    log.finish([], learning)
    return open_run(folder)


def test_findings_compare_hydra_and_give_reasons(tmp_path: Path) -> None:
    opened = made(tmp_path, [LEARNED, {**LEARNED, "seed": 1}])
    assert findings(make_report(opened)) == [
        "hydra@4,8 is better in accuracy than rag@4 (+0.500 [+0.500, +0.500]).",
        "hydra@4,8 is worse in accuracy than scorer-only (-0.250 [-0.250, -0.250]).",
        (
            "hydra@4,8 is not separated in accuracy from mbr@8 (+0.000 [+0.000, +0.000]); it is not"
            " ahead of mbr@8."
        ),
        (
            "Choosing among the LLM's samples can move accuracy from 0.500 (a random one) to 1.000"
            " (the best one); hydra@4,8 reaches 0.750, 50% of that difference."
        ),
        (
            "For hydra@4,8 the most frequent answer has 88% of the LLM's samples; in 75% of the"
            " queries they all agree."
        ),
        (
            "hydra@4,8 gives its picks a probability of 0.75 on average, and 0.75 of them are the"
            " user's answer; expected calibration error 0.000."
        ),
        (
            "On held-out training users the reranker's cross-entropy over records is 1.600 for"
            " equal shares, 1.500 for the shared head, 1.400 for the users' own."
        ),
        (
            "There the LLM's answer is worth 0.700 with the reranker's first record, 0.600 with the"
            " retriever's first, 0.900 with the best: its order is used."
        ),
        (
            "Where the LLM was asked about held-out training users, the adapter's cross-entropy is"
            " 0.500 without its votes and 0.400 with them."
        ),
        (
            f"Of {len(USERS)} users, hydra@4,8 makes 0 significantly worse than rag@4 and 0 better"
            " (exact paired test of each user, Holm over users); alone 0 and 0 have p < 0.05, where"
            f" chance gives at most {0.025 * len(USERS):.1f} each. 0 users have queries enough for"
            " the corrected test."
        ),
        (
            "Expected calibration error in bins of equally many answers (mean probability for the"
            " share that is right): hydra@4,8 0.000 (0.75 for 0.75)."
        ),
    ]


def test_a_text_pick_is_correct_if_as_good_as_the_oracle(tmp_path: Path) -> None:
    titles = Task("titles", "generation", "Title? {input}", metrics=("rouge1",))
    opened = made(tmp_path, [])
    picks = [
        replace(
            s, answer={"calm": "a calm night", "loud": "rain"}[s.answer or ""], gold="a calm night"
        )
        for s in opened.samples
        if s.method in ("hydra@4,8", "oracle@8")
    ]
    text = Run(opened.folder, {**opened.manifest, "task": titles.to_json()}, titles, tuple(picks))
    message = (
        "gives its picks a probability of 0.75 on average, and 0.75 of them are as good as the best"
        " one; expected"
    )
    assert any(message in each for each in findings(make_report(text)))
    other = replace(
        text, manifest={**text.manifest, "settings": {"k": 2}}
    )  # whose bounds stand on other samples
    assert not any("probability" in each for each in findings(make_report(other)))


def test_bounds_of_other_samples_give_no_finding(tmp_path: Path) -> None:
    opened = made(tmp_path, [])
    other = Run(
        opened.folder, {**opened.manifest, "settings": {"k": 2}}, opened.task, opened.samples
    )
    assert any("Choosing among" in sentence for sentence in findings(make_report(opened)))
    assert not any("Choosing among" in sentence for sentence in findings(make_report(other)))


def test_missing_figures_give_no_finding(tmp_path: Path) -> None:
    skipped = {"reranker": {"skipped": "no record mattered"}, "adapter": {}}
    sentences = findings(make_report(opened := made(tmp_path, [skipped])))
    assert "No reranker was learned: no record mattered." in sentences
    assert not any("held-out" in sentence for sentence in sentences)
    alone = Run(
        opened.folder,
        opened.manifest,
        opened.task,
        tuple(s for s in opened.samples if s.method == "rag@4"),
    )
    assert findings(make_report(alone)) == []


def test_of_few_users_only_that_is_said(tmp_path: Path) -> None:
    opened = made(tmp_path, [])
    few = sorted({sample.user for sample in opened.samples})[:4]
    samples = tuple(sample for sample in opened.samples if sample.user in few)
    report = make_report(replace(opened, samples=samples))
    first, *others = findings(report)
    needs = "at least 5 users are needed for intervals and p-values"
    assert first == f"Nothing can be said about differences: 4 answered, {needs}."
    assert not any("better" in line or "separated" in line for line in others)
    cells = str([*method_rows(report), *comparison_rows(report.comparisons)])
    assert "[0" not in cells
    assert " p " not in cells
    assert "%" not in cells
    assert not report.marks
    text = markdown([report])
    assert text.index(first) < text.index("| part |"), "before any figure"
    assert text.count(first) == 1
    assert "second best" not in text


def test_calibration_error_against_the_definition() -> None:
    rng = np.random.default_rng(0)
    sure, right = rng.random(500), (rng.random(500) < 0.5).astype(float)
    expected = 0.0
    for low in np.arange(10) / 10:
        inside = [(s, r) for s, r in zip(sure, right, strict=True) if low <= s < low + 0.1]
        expected += (
            len(inside)
            / 500
            * abs(np.mean([s for s, _ in inside]) - np.mean([r for _, r in inside]))
        )
    assert calibration_error(sure, right) == pytest.approx(expected)
    assert calibration_error(np.ones(3), np.ones(3)) == 0.0


def test_costs_are_per_query_and_per_learning_stage(tmp_path: Path) -> None:
    opened = made(tmp_path, [LEARNED])
    priced = make_report(opened, prices=Prices(prompt=1e6, completion=2e6))
    rows = {row["method"]: row for row in cost_rows(priced)}
    assert (rows["rag@4"]["money"], rows["rag@4"]["LLM s"], rows["rag@4"]["retrieve ms"]) == (
        120.0,
        2.0,
        500.0,
    )
    label, train, fit = learning_rows(priced)
    assert label == {
        "seed": 0,
        "stage": "label records",
        "users": 3,
        "LLM calls": 12,
        "tokens": 1320,
        "money": 1440.0,
        "seconds": 30.0,
        "s per user": 10.0,
    }
    assert (train["stage"], train["LLM calls"], train["s per user"]) == ("fit adapter", 0, 0.1)
    assert (fit["stage"], fit["users"], fit["s per user"]) == ("fit adapter, new users", 20, 0.025)


def test_what_training_users_chose_is_said(tmp_path: Path) -> None:
    one, other = ({"k": k, "temperature": 0.5, "samples": 8} for k in (1, 4))
    folds = [{**LEARNED, "chosen": chosen} for chosen in (one, other, one)]
    said = [line for line in findings(make_report(made(tmp_path, folds))) if "choose" in line]
    assert said == [
        "By training users' queries in 2 of 3 bundles: k 1, T 0.5, b 8 (choose = auto).",
        "By training users' queries in 1 of 3 bundles: k 4, T 0.5, b 8 (choose = auto).",
    ]
    assert not any("choose" in line for line in findings(make_report(made(tmp_path, [LEARNED]))))


def test_stages_shared_by_seeds_are_listed_once(tmp_path: Path) -> None:
    rows = learning_rows(make_report(made(tmp_path, [LEARNED, {**LEARNED, "seed": 1}])))
    assert [(row["seed"], row["stage"]) for row in rows] == [
        ("all", "label records"),
        (0, "fit adapter"),
        (0, "fit adapter, new users"),
        (1, "fit adapter"),
        (1, "fit adapter, new users"),
    ]


def test_online_learning_costs_are_counted_once(tmp_path: Path) -> None:
    opened = made(tmp_path, [])
    learned = (
        {"": spent(5, 9.0, calls=40)},
        {"4:u0": spent(1, 1.0, calls=2)},
        {"4:u1": spent(1, 3.0, calls=2)},
        {"": spent(5, 9.0, calls=40)},
    )
    samples = [
        replace(opened.samples[0], method="bbox-adapter@8", query=str(n), learned=each)
        for n, each in enumerate(learned)
    ]
    samples.append(
        replace(samples[1], query="later", learned={"6:u0": spent(1, 2.0, calls=2)})
    )  # with more of his history: another one
    samples += [replace(sample, seed=1) for sample in samples]  # asks the same
    shared, new = learning_rows(
        make_report(replace(opened, samples=tuple(samples)))
    )  # it was stopped, and learned again when it went on
    assert (shared["stage"], shared["users"], shared["LLM calls"]) == ("bbox-adapter@8", 5, 40)
    assert (new["stage"], new["users"], new["LLM calls"], new["s per user"]) == (
        "bbox-adapter@8, new users",
        2,
        6,
        3.0,
    )


def test_the_command_prints_costs_and_findings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path / "run", [LEARNED])
    assert (
        run(["bench", "show", str(tmp_path / "run"), "--costs", "--price-prompt", "1000000"]) == 0
    )
    printed = capsys.readouterr().out
    assert "What a query costs" in printed
    assert "- hydra@4,8 is better in accuracy than rag@4" in printed
    assert run(["bench", "show", str(tmp_path / "run"), "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)["runs"]
    assert (len(shown["findings"]), shown["learning"][0]["users"]) == (11, 10)
    change = shown["differences"]["hydra@4,8"]["rag@4"]
    assert f"than rag@4 ({change['difference']:+.3f} [{change['low']:+.3f}" in shown["findings"][0]
    text = markdown([make_report(open_run(tmp_path / "run"), "rag@4")])
    assert "LaMP-style, shaped like LaMP-2" in text
    assert "### What it says\n\n- hydra@4,8 is better" in text
    (tmp_path / "run" / "learning.json").write_text("[")
    with pytest.raises(SettingsError, match=r"learning\.json cannot be read"):
        open_run(tmp_path / "run")
