"""Metrics of parsed answers against gold ones, kept so that a bootstrap can draw them again.

A metric is a function of sums over samples (sufficient statistics), so that the same few lines give
its value and its 10,000 bootstrap values, for means as for RMSE, macro-F1 and BLEU. An answer that
cannot be parsed (None) counts as wrong; one whose call failed (`Failed`) is NaN and counted, never
0. DESIGN 3. Knows neither users nor LLMs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hydra_llm.tasks.base import METRICS, Task, rating, scale

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""Sums [D, S] → values [D]."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Stands for the answer of a call that failed."""

    error: str


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure and what it was computed from. Letters: N samples, S sums, D bootstrap draws."""

    name: str
    value: float
    """NaN where no sample was scored."""
    rows: Floats
    """[N, S] sufficient statistics of each sample; NaN where its call failed."""
    statistic: Statistic
    samples: Floats
    """[N] the metric of each sample, NaN where its call failed; empty where a single sample has
    none (RMSE, macro-F1, BLEU).
    """
    failed: int = 0
    """Samples without an answer, not in `value`."""
    unparsable: int = 0
    """Samples whose answer could not be read; in `value` as wrong."""
    higher_is_better: bool = True
    drawable: bool = True
    """False where draws of users are no picture of the data: macro-F1, whose draws lack whole
    labels.
    """


def score(
    task: Task, answers: Sequence[str | Failed | None], golds: Sequence[str]
) -> dict[str, Metric]:
    """Score parsed answers by every metric of the task, in its order.

    Raises:
        DataError: a gold rating is not a number.
        ValueError: there are more answers than golds, or fewer.
    """
    pairs = list(zip(answers, golds, strict=True))
    failed = np.array([isinstance(answer, Failed) for answer, _ in pairs], dtype=bool)
    scored = [(answer, gold) for answer, gold in pairs if not isinstance(answer, Failed)]
    unparsable = sum(answer is None for answer, _ in scored)
    return {
        name: _metric(name, task, scored, failed, unparsable)
        for name in task.metrics or METRICS[task.kind]
    }


def mean(sums: Floats) -> Floats:
    """[D, 2] of (sum, count) → [D]."""
    means: Floats = np.divide(
        sums[:, 0], sums[:, 1], out=np.full(len(sums), np.nan), where=sums[:, 1] > 0
    )
    return means


_Pairs = Sequence[tuple[str | None, str]]


def _metric(
    name: str, task: Task, scored: _Pairs, failed: NDArray[np.bool_], unparsable: int
) -> Metric:
    rows_of, statistic, has_samples, higher = _METRICS[name]
    rows = _spread(rows_of(task, scored), failed)
    value = float(statistic(np.nansum(rows, axis=0, keepdims=True))[0]) if scored else np.nan
    samples = rows[:, 0] if has_samples else np.empty(0)
    return Metric(
        name,
        value,
        rows,
        statistic,
        samples,
        int(failed.sum()),
        unparsable,
        higher,
        drawable=name != "macro_f1",
    )


def _spread(scored: Floats, failed: NDArray[np.bool_]) -> Floats:
    """[scored, S] → [N, S] with NaN rows where calls failed."""
    rows = np.full((len(failed), scored.shape[1]), np.nan)
    rows[~failed] = scored
    return rows


def _with_count(values: Sequence[float]) -> Floats:
    return np.array([values, np.ones(len(values))], dtype=np.float64).T


# ---- classification


def _correct(task: Task, pairs: _Pairs) -> Floats:
    return _with_count([float(answer == gold) for answer, gold in pairs])


def _confusion(task: Task, pairs: _Pairs) -> Floats:
    """[N, 3 L]: for each label, whether it is right here, answered here, gold here."""
    places = {label: place for place, label in enumerate(task.labels)}
    rows = np.zeros((len(pairs), 3, len(places)))
    for row, (answer, gold) in zip(rows, pairs, strict=True):
        for part, label in enumerate((answer if answer == gold else None, answer, gold)):
            if label in places:
                row[part, places[label]] = 1
    return rows.reshape(len(pairs), 3 * len(places))


def _macro_f1(sums: Floats) -> Floats:
    """Mean F1 over the task's labels; a label that nobody gave and that was never gold counts 0, as
    in scikit-learn and LaMP.
    """
    right, given, gold = np.moveaxis(sums.reshape(len(sums), 3, -1), 1, 0)
    macro: Floats = np.divide(
        2 * right, given + gold, out=np.zeros_like(right), where=given + gold > 0
    ).mean(axis=1)
    return macro


# ---- rating


def _distances(task: Task, pairs: _Pairs) -> list[float]:
    low, high = scale(task.labels)
    return [
        max(rating(g) - low, high - rating(g)) if a is None else abs(rating(a) - rating(g))
        for a, g in pairs
    ]


def _absolute(task: Task, pairs: _Pairs) -> Floats:
    return _with_count(_distances(task, pairs))


def _squared(task: Task, pairs: _Pairs) -> Floats:
    return _with_count([distance**2 for distance in _distances(task, pairs)])


def _root_mean(sums: Floats) -> Floats:
    return np.sqrt(mean(sums))


# ---- generation


def _rouge(kind: str) -> Callable[[Task, _Pairs], Floats]:
    def rows(task: Task, pairs: _Pairs) -> Floats:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([kind], use_stemmer=False)
        return _with_count(
            [scorer.score(gold, answer or "")[kind].fmeasure for answer, gold in pairs]
        )

    return rows


def _ngrams(task: Task, pairs: _Pairs) -> Floats:
    """[N, 10]: length of answer and gold, then right and all n-grams of the answer for n = 1 to 4,
    by sacrebleu.
    """
    from sacrebleu.metrics.bleu import BLEU

    scores = [BLEU().corpus_score([answer or ""], [[gold]]) for answer, gold in pairs]
    return np.array(
        [[s.sys_len, s.ref_len, *s.counts, *s.totals] for s in scores], dtype=np.float64
    ).reshape(-1, 10)


def _bleu(sums: Floats) -> Floats:
    """0 to 100: sacrebleu's corpus BLEU (13a, exponential smoothing), computed from its sums."""
    ours, theirs, right, total = sums[:, 0], sums[:, 1], sums[:, 2:6], sums[:, 6:10]
    missed = 2.0 ** np.cumsum(right == 0, axis=1)
    precision = np.where(right > 0, right, 1 / missed) / np.maximum(total, 1)
    shortness = np.exp(np.minimum(0, 1 - theirs / np.maximum(ours, 1)))
    defined = right.any(axis=1) & (total > 0).all(axis=1)
    return np.where(defined, 100 * shortness * np.exp(np.log(precision).mean(axis=1)), 0.0)


_METRICS: Mapping[str, tuple[Callable[[Task, _Pairs], Floats], Statistic, bool, bool]] = {
    "accuracy": (_correct, mean, True, True),
    "macro_f1": (_confusion, _macro_f1, False, True),
    "mae": (_absolute, mean, True, False),
    "rmse": (_squared, _root_mean, False, False),
    "rouge1": (_rouge("rouge1"), mean, True, True),
    "rougeL": (_rouge("rougeL"), mean, True, True),
    "bleu": (_ngrams, _bleu, False, True),
}
"""Name → rows of the samples, statistic of their sums, whether one sample has a value, whether more
is better.
"""
