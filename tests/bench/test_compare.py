"""Bootstrap over users: against scipy, against known answers, and by coverage on simulated users."""

import math

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hydra_llm.bench.compare import interval, paired
from hydra_llm.bench.metrics import Failed, score
from hydra_llm.tasks.task import Task

RATINGS = Task("r", "rating", "{input}", ("1", "2", "3", "4", "5"))
CLASSES = Task("c", "classification", "{input}", ("a", "b", "c"))
TEXTS = Task("t", "generation", "{input}")
nan = math.nan


def names(count: int) -> list[str]:
    return [f"u{n}" for n in range(count)]


def widened(count: int, level: float = 0.95) -> float:
    """The level of a plain percentile interval that is as wide as the expanded one."""
    return float(1 - 2 * stats.norm.cdf(stats.t.ppf((1 - level) / 2, count - 1) * math.sqrt(count / (count - 1))))


def simulated(rng: np.random.Generator, users: int, each: int, spread: float = 1.0) -> tuple[np.ndarray, list[str]]:
    """Values of mean 0 that differ between users, and each value's user."""
    values = np.repeat(rng.normal(0, spread, users), each) + rng.normal(0, 1, users * each)
    return values, list(np.repeat(names(users), each))


@pytest.mark.parametrize("count", [8, 60])
def test_without_clusters_it_is_scipys_percentile_bootstrap(count: int) -> None:
    values = np.random.default_rng(3).exponential(size=count)
    found = interval(values, names(count))
    expected = stats.bootstrap(
        (values,), np.mean, confidence_level=widened(count), method="percentile", n_resamples=40_000, rng=np.random.default_rng(1)
    ).confidence_interval
    scale = values.std() / math.sqrt(count)
    assert found.low == pytest.approx(expected.low, abs=0.08 * scale)
    assert found.high == pytest.approx(expected.high, abs=0.08 * scale)


def test_for_a_mean_it_is_students_interval() -> None:
    values = np.random.default_rng(0).normal(size=50)
    expected = stats.t.interval(0.95, 49, values.mean(), values.std(ddof=1) / math.sqrt(50))
    assert interval(values, names(50)) == pytest.approx(expected, abs=0.02)


def test_rmse_is_scipys_on_users_sums() -> None:
    rng = np.random.default_rng(5)
    answers, golds, users = rng.integers(1, 6, 200).astype(str), rng.integers(1, 6, 200).astype(str), list(np.repeat(names(40), 5))
    metric = score(RATINGS, list(answers), list(golds))["rmse"]
    errors = (answers.astype(float) - golds.astype(float)) ** 2
    sums = errors.reshape(40, 5).sum(axis=1)
    expected = stats.bootstrap(
        (sums,),
        lambda drawn, axis: np.sqrt(drawn.sum(axis=axis) / 200),
        confidence_level=widened(40),
        method="percentile",
        n_resamples=40_000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert interval(metric, users) == pytest.approx(tuple(expected), abs=0.01)


def test_macro_f1_and_bleu_are_computed_anew_on_every_draw() -> None:
    """With two users a draw is one of three data sets, so the interval's ends are the metric's extremes over these."""
    answers, golds, users = ["a", "b", "b", "c"], ["a", "b", "c", "c"], ["u", "u", "v", "v"]
    parts = (slice(2), slice(2, 4), slice(4))
    each = [score(CLASSES, answers[part], golds[part])["macro_f1"].value for part in parts]
    assert max(each) == each[2]  # no mean over users would reach it
    assert interval(score(CLASSES, answers, golds)["macro_f1"], users) == pytest.approx((min(each), max(each)))
    texts, references = ["a b c d e f", "x y z a b"], ["a b c d e g", "x y z a c"]
    each = [sacrebleu.corpus_bleu(texts[part], [references[part]]).score for part in (slice(1), slice(1, 2), slice(2))]
    assert interval(score(TEXTS, texts, references)["bleu"], ["u", "v"]) == pytest.approx((min(each), max(each)))


def test_copies_of_a_users_samples_add_no_certainty() -> None:
    values, users = simulated(np.random.default_rng(2), users=15, each=2)
    assert interval(np.tile(values, 20), users * 20) == pytest.approx(interval(values, users))
    assert np.ptp(interval(values, users)) > 1.2 * np.ptp(interval(values, names(30)))


@pytest.mark.parametrize("users", [6, 30])
def test_the_interval_covers_the_truth_as_often_as_it_says(users: int) -> None:
    rng, runs = np.random.default_rng(7), 600
    covered = 0
    for run in range(runs):
        values, named = simulated(rng, users, each=3)
        low, high = interval(values, named, draws=1000, seed=run)
        covered += low <= 0 <= high
    assert 0.92 <= covered / runs <= 0.98  # the plain percentile interval covers .85 with 6 users


def test_without_a_difference_p_is_uniform() -> None:
    rng, runs = np.random.default_rng(11), 400
    found = []
    for run in range(runs):
        a, users = simulated(rng, users=12, each=2)
        found.append(paired(a, a + rng.normal(size=len(a)), users, draws=1000, seed=run).p)
    assert stats.kstest(found, "uniform").pvalue > 0.001
    assert np.mean(np.array(found) < 0.05) < 0.09


def test_pairing_sees_a_small_difference_that_two_intervals_hide() -> None:
    rng = np.random.default_rng(4)
    a, users = simulated(rng, users=20, each=5, spread=5.0)
    b = a - 0.3 + rng.normal(0, 0.1, len(a))
    found = paired(a, b, users)
    assert found.difference == pytest.approx(np.mean(a - b))
    assert 0.2 < found.low < found.difference < found.high < 0.4
    assert found.p < 0.01
    assert interval(a, users).low < interval(b, users).high
    t = stats.ttest_1samp((a - b).reshape(20, 5).mean(axis=1), 0).confidence_interval()
    assert (found.low, found.high) == pytest.approx((t.low, t.high), abs=0.01)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=4, max_size=12), st.integers(0, 3))
def test_p_is_below_5_percent_just_where_the_interval_excludes_zero(differences: list[float], seed: int) -> None:
    found = paired(differences, [0.0] * len(differences), names(len(differences)), draws=2000, seed=seed)
    beyond = found.low > 1e-9 or found.high < -1e-9
    assert 0 < found.p <= 1
    assert abs(found.p - 0.05) < 0.02 or (found.p < 0.05) == beyond


def test_swapping_the_methods_turns_the_sign_only() -> None:
    rng = np.random.default_rng(9)
    a, users = simulated(rng, users=10, each=3)
    b = rng.normal(size=len(a))
    there, back = paired(a, b, users), paired(b, a, users)
    assert (back.difference, back.low, back.high, back.p) == pytest.approx((-there.difference, -there.high, -there.low, there.p))
    same = paired(a, a, users)
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_metrics_pair_through_their_sums() -> None:
    golds, users = ["1", "5", "3", "4"], ["u", "u", "v", "v"]
    good, bad = score(RATINGS, golds, golds)["rmse"], score(RATINGS, ["2", "3", "4", "5"], golds)["rmse"]
    found = paired(good, bad, users)
    assert found.difference == pytest.approx(-math.sqrt(7 / 4))
    assert (found.low, found.high) == pytest.approx((-math.sqrt(5 / 2), -1))


def test_failed_samples_are_left_out_for_both() -> None:
    users = ["u", "u", "v", "v", "w"]
    found = paired([1.0, nan, 2.0, 3.0, nan], [0.0, 9.0, nan, 1.0, 9.0], users)
    assert found.difference == pytest.approx(((1 - 0) + (3 - 1)) / 2)
    assert found.samples == 2
    failed = score(RATINGS, ["1", Failed("x"), "3"], ["1", "1", "1"])["mae"]
    assert interval(failed, ["u", "u", "v"]) == interval([0.0, nan, 2.0], ["u", "u", "v"]) == (0, 2)


def test_one_user_or_none_gives_no_certainty() -> None:
    for values, users in (([1.0, 2.0], ["u", "u"]), ([], []), ([nan, nan], ["u", "v"])):
        assert all(math.isnan(end) for end in interval(values, users))
        found = paired(values, values, users)
        assert math.isnan(found.low)
        assert math.isnan(found.p)
    assert paired([1.0, 2.0], [0.0, 0.0], ["u", "u"]).difference == 1.5


def test_the_same_seed_gives_the_same_interval_and_parts_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    values, users = simulated(np.random.default_rng(1), users=9, each=2)
    first = interval(values, users, draws=3000, seed=5)
    assert first == interval(values, users, draws=3000, seed=5) != interval(values, users, draws=3000, seed=6)
    monkeypatch.setattr("hydra_llm.bench.compare.CELLS", 100)
    assert interval(values, users, draws=3000, seed=5) == pytest.approx(first)


def test_a_wrong_number_of_users_is_told() -> None:
    with pytest.raises(ValueError, match="2 samples, but 1 users"):
        interval([1.0, 2.0], ["u"])
