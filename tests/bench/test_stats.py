"""Bootstrap over users: against scipy and known answers, and by coverage on simulated users."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import f1_score

from hydra_llm.bench.stats import interval, over_tasks, paired, relative, score
from hydra_llm.errors import LLMError
from hydra_llm.tasks.base import Task

RATINGS = Task("r", "rating", "{input}", ("1", "2", "3", "4", "5"))
CLASSES = Task("c", "classification", "{input}", ("a", "b", "c"))
TEXTS = Task("t", "generation", "{input}")
nan = math.nan


@pytest.fixture(autouse=True)
def any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """The formulas hold for two users too, of which reports say nothing."""
    monkeypatch.setattr("hydra_llm.bench.stats.MIN_USERS", 2)


def names(count: int) -> list[str]:
    return [f"u{n}" for n in range(count)]


def widened(count: int, level: float = 0.95) -> float:
    """The level of a plain percentile interval that is as wide as the expanded one."""
    return float(
        1
        - 2
        * stats.norm.cdf(stats.t.ppf((1 - level) / 2, count - 1) * math.sqrt(count / (count - 1)))
    )


def simulated(
    rng: np.random.Generator, users: int, each: int, spread: float = 1.0
) -> tuple[np.ndarray, list[str]]:
    """Values of mean 0 that differ between users, and each value's user."""
    values = np.repeat(rng.normal(0, spread, users), each) + rng.normal(0, 1, users * each)
    return values, list(np.repeat(names(users), each))


@pytest.mark.parametrize("count", [8, 60])
def test_without_clusters_it_is_scipys_percentile_bootstrap(count: int) -> None:
    values = np.random.default_rng(3).exponential(size=count)
    result = interval(values, names(count))
    expected = stats.bootstrap(
        (values,),
        np.mean,
        confidence_level=widened(count),
        method="percentile",
        n_resamples=40_000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    scale = values.std() / math.sqrt(count)
    assert result.low == pytest.approx(expected.low, abs=0.08 * scale)
    assert result.high == pytest.approx(expected.high, abs=0.08 * scale)


def test_for_a_mean_it_is_students_interval() -> None:
    values = np.random.default_rng(0).normal(size=50)
    expected = stats.t.interval(0.95, 49, values.mean(), values.std(ddof=1) / math.sqrt(50))
    assert interval(values, names(50)) == pytest.approx(expected, abs=0.02)


def test_rmse_is_scipys_on_users_sums() -> None:
    rng = np.random.default_rng(5)
    answers, golds, users = (
        rng.integers(1, 6, 200).astype(str),
        rng.integers(1, 6, 200).astype(str),
        list(np.repeat(names(40), 5)),
    )
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


def left_out(value: Callable[[list[int]], float], users: list[str]) -> tuple[float, float]:
    """Student's interval with the jackknife's error, written out: the metric of the kept places,
    with one user left out at a time.
    """
    each = [
        value([place for place, user in enumerate(users) if user != out])
        for out in dict.fromkeys(users)
    ]
    count, middle = len(each), sum(each) / len(each)
    reach = stats.t.ppf(0.975, count - 1) * math.sqrt(
        (count - 1) / count * sum((one - middle) ** 2 for one in each)
    )
    whole = value(list(range(len(users))))
    return whole - reach, whole + reach


def test_macro_f1_is_computed_anew_without_each_user() -> None:
    rng, users = np.random.default_rng(5), list(np.repeat(names(7), 3))
    answers, golds = (list(rng.choice(list(CLASSES.labels), 21)) for _ in range(2))

    def by_others(kept: list[int]) -> float:
        given, wanted = [answers[place] for place in kept], [golds[place] for place in kept]
        return float(
            f1_score(wanted, given, labels=list(CLASSES.labels), average="macro", zero_division=0)
        )

    assert interval(score(CLASSES, answers, golds)["macro_f1"], users) == pytest.approx(
        left_out(by_others, users)
    )
    same = paired(
        score(CLASSES, golds, golds)["macro_f1"], score(CLASSES, answers, golds)["macro_f1"], users
    )
    low, high = left_out(lambda kept: 1 - by_others(kept), users)
    assert (same.low, same.high) == pytest.approx((low, high))
    error = (high - low) / 2 / stats.t.ppf(0.975, 6)
    assert same.p == pytest.approx(2 * stats.t.sf(same.difference / error, 6))
    assert (
        paired(
            score(CLASSES, golds, golds)["macro_f1"],
            score(CLASSES, golds, golds)["macro_f1"],
            users,
        ).p
        == 1
    )


def test_bleu_is_computed_anew_on_every_draw() -> None:
    """With two users a draw is one of three data sets, so the interval's ends are the metric's
    extremes over these.
    """
    texts, references = ["a b c d e f", "x y z a b"], ["a b c d e g", "x y z a c"]
    each = [
        sacrebleu.corpus_bleu(texts[part], [references[part]]).score
        for part in (slice(1), slice(1, 2), slice(2))
    ]
    assert interval(score(TEXTS, texts, references)["bleu"], ["u", "v"]) == pytest.approx(
        (min(each), max(each))
    )


def test_copies_of_a_users_samples_add_no_certainty() -> None:
    values, users = simulated(np.random.default_rng(2), users=15, each=2)
    assert interval(np.tile(values, 20), users * 20) == pytest.approx(interval(values, users))
    assert np.ptp(interval(values, users)) > 1.2 * np.ptp(interval(values, names(30)))


@pytest.mark.parametrize("users", [6, pytest.param(30, marks=pytest.mark.slow)])
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
    result = []
    for run in range(runs):
        a, users = simulated(rng, users=12, each=2)
        result.append(paired(a, a + rng.normal(size=len(a)), users, draws=1000, seed=run).p)
    assert stats.kstest(result, "uniform").pvalue > 0.001
    assert np.mean(np.array(result) < 0.05) < 0.09


def test_pairing_sees_a_small_difference_that_two_intervals_hide() -> None:
    rng = np.random.default_rng(4)
    a, users = simulated(rng, users=20, each=5, spread=5.0)
    b = a - 0.3 + rng.normal(0, 0.1, len(a))
    result = paired(a, b, users)
    assert result.difference == pytest.approx(np.mean(a - b))
    assert 0.2 < result.low < result.difference < result.high < 0.4
    assert result.p < 0.01
    assert interval(a, users).low < interval(b, users).high
    t = stats.ttest_1samp((a - b).reshape(20, 5).mean(axis=1), 0).confidence_interval()
    assert (result.low, result.high) == pytest.approx((t.low, t.high), abs=0.01)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(-5, 5).map(lambda value: round(value, 6)), min_size=4, max_size=12),
    st.integers(0, 3),
)  # none within rounding of 0
def test_p_below_5_percent_iff_the_interval_excludes_zero(
    differences: list[float], seed: int
) -> None:
    result = paired(
        differences, [0.0] * len(differences), names(len(differences)), draws=2000, seed=seed
    )
    beyond = result.low > 1e-9 or result.high < -1e-9
    assert 0 < result.p <= 1
    assert abs(result.p - 0.05) < 0.02 or (result.p < 0.05) == beyond


def test_swapping_the_methods_turns_the_sign_only() -> None:
    rng = np.random.default_rng(9)
    a, users = simulated(rng, users=10, each=3)
    b = rng.normal(size=len(a))
    there, back = paired(a, b, users), paired(b, a, users)
    assert (back.difference, back.low, back.high, back.p) == pytest.approx(
        (-there.difference, -there.high, -there.low, there.p)
    )
    same = paired(a, a, users)
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_metrics_pair_through_their_sums() -> None:
    golds, users = ["1", "5", "3", "4"], ["u", "u", "v", "v"]
    good, bad = (
        score(RATINGS, golds, golds)["rmse"],
        score(RATINGS, ["2", "3", "4", "5"], golds)["rmse"],
    )
    result = paired(good, bad, users)
    assert result.difference == pytest.approx(-math.sqrt(7 / 4))
    assert (result.low, result.high) == pytest.approx((-math.sqrt(5 / 2), -1))


def test_failed_samples_are_left_out_for_both() -> None:
    users = ["u", "u", "v", "v", "w"]
    result = paired([1.0, nan, 2.0, 3.0, nan], [0.0, 9.0, nan, 1.0, 9.0], users)
    assert result.difference == pytest.approx(((1 - 0) + (3 - 1)) / 2)
    assert result.samples == 2
    failed = score(RATINGS, ["1", LLMError("x"), "3"], ["1", "1", "1"])["mae"]
    assert interval(failed, ["u", "u", "v"]) == interval([0.0, nan, 2.0], ["u", "u", "v"]) == (0, 2)


def test_one_user_or_none_gives_no_certainty() -> None:
    for values, users in (([1.0, 2.0], ["u", "u"]), ([], []), ([nan, nan], ["u", "v"])):
        assert all(math.isnan(end) for end in interval(values, users))
        result = paired(values, values, users)
        assert math.isnan(result.low)
        assert math.isnan(result.p)
    assert paired([1.0, 2.0], [0.0, 0.0], ["u", "u"]).difference == 1.5


def test_intervals_are_deterministic_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    values, users = simulated(np.random.default_rng(1), users=9, each=2)
    first = interval(values, users, draws=3000, seed=5)
    assert (
        first
        == interval(values, users, draws=3000, seed=5)
        != interval(values, users, draws=3000, seed=6)
    )
    monkeypatch.setattr("hydra_llm.bench.stats.CELLS", 100)
    assert interval(values, users, draws=3000, seed=5) == pytest.approx(first)


def test_a_share_is_as_sure_as_the_jackknife_says() -> None:
    rng, users = np.random.default_rng(4), list(np.repeat(names(9), 4))
    golds, better, worse = (list(rng.integers(1, 6, 36).astype(str)) for _ in range(3))
    own, base = score(RATINGS, better, golds), score(RATINGS, worse, golds)

    def share(kept: list[int]) -> float:
        errors = [
            [abs(float(answers[i]) - float(golds[i])) for i in kept] for answers in (better, worse)
        ]
        (mae, base_mae), (rmse, base_rmse) = (
            [float(np.mean(np.array(e) ** p) ** (1 / p)) for e in errors] for p in (1, 2)
        )
        return ((base_mae - mae) / base_mae + (base_rmse - rmse) / base_rmse) / 2

    result = relative([(own[name], base[name], users) for name in ("mae", "rmse")])
    assert result is not None
    assert result.change == pytest.approx(share(list(range(36))))
    assert result.interval() == pytest.approx(left_out(share, users))
    assert math.sqrt(sum(part**2 for part in result.parts.values())) == pytest.approx(result.error)
    others = result._replace(parts={f"other {user}": part for user, part in result.parts.items()})
    both = over_tasks([result, others])  # two tasks as sure as this one: √2 less error
    assert (both.change, both.error, both.freedom) == pytest.approx(
        (result.change, result.error / math.sqrt(2), 16)
    )
    same = over_tasks([result, result])  # the same people and answers twice are no surer
    assert (same.error, same.freedom) == pytest.approx((result.error, 8))
    lost = score(RATINGS, [*better, LLMError("x")], [*golds, "1"])["mae"]
    alone = relative(
        [(lost, score(RATINGS, [*worse, "1"], [*golds, "1"])["mae"], [*users, "nobody"])]
    )
    assert alone == relative(
        [(own["mae"], base["mae"], users)]
    )  # who was never answered is no user
    nothing = score(RATINGS, golds, golds)["mae"]
    assert relative([(own["mae"], nothing, users)]) is None


def test_a_wrong_number_of_users_raises() -> None:
    with pytest.raises(ValueError, match="2 samples, but 1 users"):
        interval([1.0, 2.0], ["u"])


@pytest.mark.parametrize("count", [1, 4, 5])
def test_of_fewer_than_five_users_nothing_is_said(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hydra_llm.bench.stats.MIN_USERS", 5)
    users, golds = names(count), ["1", "5", "3", "4", "2"][:count]
    a, b = score(RATINGS, golds, golds)["mae"], score(RATINGS, ["3"] * count, golds)["mae"]
    own, change, over = interval(a, users), paired(a, b, users), relative([(a, b, users)])
    assert over is not None
    known = [not math.isnan(v) for v in (*own, change.low, change.high, change.p, *over.interval())]
    assert set(known) == {count == 5}
    assert not math.isnan(change.difference)
