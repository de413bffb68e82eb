"""Many tests at once, users made worse, calibration, and the best prompt chosen on other users."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, permutation_test

from hydra_llm.bench.calibration import calibration
from hydra_llm.bench.multiple import compare_users, holm, sign_flip_p
from hydra_llm.bench.report import best_prompt, tables
from hydra_llm.bench.report.cells import p_value
from hydra_llm.bench.report.findings import findings
from hydra_llm.bench.report.markdown import markdown
from hydra_llm.bench.results import pair
from hydra_llm.bench.runlog import RunLog, Sample
from hydra_llm.cli.main import run
from tests.bench.test_report import MANIFEST, STARS, change


def test_holm_is_that_of_the_paper() -> None:
    """Against R: p.adjust(c(.01, .04, .03, .005), "holm")."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    found = holm([0.04, math.nan, 0.03])
    assert found[0] == found[2] == pytest.approx(0.06)
    assert math.isnan(found[1])


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_rejects_step_by_step(p_values: list[float]) -> None:
    """By definition: the smallest p against α/m, the next against α/(m − 1), until one holds."""
    rejected, left = set(), sorted(range(len(p_values)), key=lambda i: p_values[i])
    while left and p_values[left[0]] * len(left) < 0.05:
        rejected.add(left.pop(0))
    assert {i for i, p in enumerate(holm(p_values)) if p < 0.05} == rejected


@pytest.mark.parametrize("values", [[0.5, 0.2, -0.1, 0.4, 0.3], [1, 1, -1, 1, 0, 1, 1, 0.5]])
def test_the_sign_flip_test_is_scipys(values: Sequence[float]) -> None:
    found = permutation_test(
        (np.array(values),), np.sum, permutation_type="samples", n_resamples=np.inf
    )
    assert sign_flip_p(values) == pytest.approx(found.pvalue)


def test_many_queries_are_tested_by_random_signs() -> None:
    assert sign_flip_p([]) == sign_flip_p([0.0, 0.0]) == 1.0
    assert sign_flip_p([1.0] * 20) == pytest.approx(1 / 20_001)
    even = [1.0, -1.0] * 8 + [1.0] * 4
    exact = 2 * binom.cdf(8, 20, 0.5)  # |12 − 8| or more
    assert sign_flip_p(even) == pytest.approx(exact, abs=0.02)


def samples(method: str, user: str, answers: str, fold: int | None = None) -> list[Sample]:
    return [
        Sample(method, user, f"q{i}", "3", answer, calls=1, fold=fold)
        for i, answer in enumerate(answers)
    ]


def test_users_made_worse_by_more_than_noise() -> None:
    """Ten of ten queries worse is .002, enough for Holm over four users; three of three is not."""
    own = {"worse": "5" * 10, "better": "3" * 10, "few": "555", "same": "4" * 10}
    base = {"worse": "3" * 10, "better": "4" * 10, "few": "333", "same": "4" * 10}
    ours, theirs = (
        [s for u, a in side.items() for s in samples("m", u, a)] for side in (own, base)
    )
    found = compare_users(STARS, pair(ours, theirs))
    assert (found.users, found.worse, found.better) == (4, 1, 1)
    assert (found.worse_alone, found.better_alone, found.testable) == (1, 1, 3)
    nobody = compare_users(STARS, [])
    assert (nobody.users, nobody.worse, nobody.testable) == (0, 0, 0)


def test_calibration_error_in_bins_of_equally_many() -> None:
    """Two bins of ten: |.35 − .4| and |.8 − .6|, each half of the answers."""
    sure = [0.3, 0.4] * 5 + [0.8] * 10
    right = [True] * 4 + [False] * 6 + [True] * 6 + [False] * 4
    found = calibration(sure, right)
    assert found is not None
    assert found.error == pytest.approx((0.05 + 0.2) / 2)
    assert [count for count, *_ in found.bins] == [10, 10]
    assert (found.answers, found.accuracy, found.probability) == (20, 0.5, pytest.approx(0.575))
    equal = calibration([0.7] * 100, [True] * 70 + [False] * 30)
    assert equal is not None
    assert (len(equal.bins), equal.error) == (1, pytest.approx(0))  # equal ones are not torn apart
    assert calibration([], []) is None
    few = calibration([0.9, 0.7], [True, False])
    assert few is not None
    assert len(few.bins) == 1
    assert few.error == pytest.approx(0.3)
    dice = np.random.default_rng(0)
    drawn = dice.random(5000)
    honest = calibration(list(drawn), list(dice.random(5000) < drawn))
    assert honest is not None
    assert len(honest.bins) == 10
    assert honest.error < 0.03


# users of two folds; `rag@1` is best for the first fold, `rag@4` for the second
FOLDS = {"rag@1": ("33333", "55555"), "rag@4": ("44444", "44444"), "hydra@4,8": ("33333", "33334")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    log = RunLog(tmp_path / "run", MANIFEST)
    for method, of_folds in FOLDS.items():
        for fold, answers in enumerate(of_folds, 1):
            for place, answer in enumerate(answers):
                for sample in samples(method, f"u{fold}{place}", answer * 2, fold):
                    log.add(sample)
    return tmp_path / "run"


def test_the_best_prompt_is_chosen_on_other_folds(folder: Path) -> None:
    opened = tables.open_run(folder)
    prompts = {name: opened.of(name) for name in ("rag@1", "rag@4")}
    chosen = best_prompt.on_training_users(STARS, prompts)
    for metric in ("mae", "rmse"):
        actual = {(s.fold, s.answer) for s in chosen[metric]}
        assert actual == {(1, "4"), (2, "5")}  # each fold's best is the other fold's worst
        assert len(chosen[metric]) == 20
    assert best_prompt.on_training_users(STARS, {"rag": samples("rag", "u", "33")}) == {}

    made = tables.make_report(opened)
    rows = {row.method: row for row in made.rows}
    assert (made.baseline, made.honest) == (best_prompt.NAME, True)
    assert rows[best_prompt.NAME].result.metrics["mae"][0] == 1.5
    assert rows[best_prompt.NAME].comparison is None
    against = rows["hydra@4,8"].comparison
    assert against is not None
    assert against.metrics["mae"].difference == pytest.approx(0.1 - 1.5)
    (over, _), hydra = rows["hydra@4,8"].over_hindsight, rows["hydra@4,8"]
    assert change(over) == pytest.approx((0.9 + (1 - math.sqrt(0.1))) / 2)  # MAE 1 to .1, RMSE
    assert change(hydra.over_prompts) > change(over)
    named = {row.method: row for row in tables.make_report(opened, "rag@4").rows}
    honest = named[best_prompt.NAME].comparison
    assert honest is not None
    assert honest.metrics["mae"].difference == pytest.approx(0.5)
    assert not [name for name, _ in made.marks if name == best_prompt.NAME]


def test_both_choices_and_holm_are_shown(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["bench", "show", str(folder), "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)["runs"]
    assert (shown["best_prompts"], shown["comparisons"]) == ("training users", 3)
    hydra = {row["method"]: row for row in shown["methods"]}["hydra@4,8"]
    assert hydra["over_prompts"][0] > hydra["over_hindsight"][0] > 0
    assert 0 <= hydra["holm"] < 0.05
    assert shown["users_tested"]["hydra@4,8"]["users"] == 10
    assert run(["bench", "show", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "3 comparisons in MAE" in printed
    assert "with hindsight: --folds" not in printed
    told = " ".join(printed.split())
    assert "hydra@4,8 is better in mae than rag@1" in told
    assert f"{best_prompt.NAME} (-1.400 [" in told


def test_without_folds_the_report_says_hindsight(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run", MANIFEST)
    for place in range(6):
        for method, answer in (("rag@4", "4"), ("hydra@4,8", "3")):
            log.add(Sample(method, f"u{place}", "a", "3", answer))
    made = tables.make_report(tables.open_run(tmp_path / "run"))
    assert not made.honest
    text = markdown([made])
    assert "The best prompts are chosen with hindsight: --folds chooses on other users." in text
    assert any("makes 0 significantly worse than rag@4" in line for line in findings(made))
    assert (p_value(0.0), p_value(0.0123)) == ("< 0.001", "0.012")


def test_over_tasks_both_choices_are_shown(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "samples.jsonl").write_text((folder / "samples.jsonl").read_text())
    manifest = json.loads((folder / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "data": "another"}))
    reports = [tables.make_report(tables.open_run(each)) for each in (folder, other)]
    found = tables.overall(reports)["hydra@4,8"]
    assert set(found) == {
        *("all metrics", "without BLEU"),
        *("all metrics, with hindsight", "without BLEU, with hindsight"),
    }
    one = next(row for row in reports[0].rows if row.method == "hydra@4,8")
    assert found["all metrics"].change == pytest.approx(change(one.over_prompts))
    assert found["all metrics, with hindsight"].change == pytest.approx(
        change(one.over_hindsight[0])
    )
