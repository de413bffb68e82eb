"""What a run says about HYDRA, in sentences with their figures.

    comparisons   paired differences from every method that is no bound: significant or not
    selection     what selection could gain (a random sample → the best one), and how much it gains
    agreement     how far the LLM's samples agree: if they are all equal, there is nothing to select
    calibration   the adapter's probabilities against the share of correct picks
    learning      what reranker and heads reached on held-out training users
A sentence is there only if the run holds its figures. Knows no LLM.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hydra_llm.bench.comparison import compare
from hydra_llm.bench.method import base_name
from hydra_llm.bench.report.cells import signed
from hydra_llm.bench.report.tables import Report, TableRow
from hydra_llm.bench.runlog import Sample
from hydra_llm.bench.stats import Paired

BINS = 10


def findings(report: Report) -> list[str]:
    """The sentences of a run, one variant of HYDRA after the other."""
    own = [row for row in report.rows if base_name(row.method) == "hydra"]
    sentences = [sentence for row in own for sentence in _of_method(report, row)]
    for learned in report.run.learning[:1]:  # the first seed
        for name, pairs in (("reranker", "records"), ("adapter", "candidates")):
            sentences += _of_learning(name, pairs, learned.get(name) or {})
    return sentences


def _of_method(report: Report, own: TableRow) -> Iterator[str]:
    run, name, metric = report.run, own.method, report.metrics[0]
    samples = run.of(name)
    changes = {
        row.method: compare(run.task, samples, run.of(row.method)).metrics[metric]
        for row in report.rows
        if row.group != "bound" and base_name(row.method) != "hydra"
    }
    yield from _comparisons(name, metric, changes, report.sign(metric))
    # bounds take the settings' k: only that variant selects among the same samples
    has_bounds = records_of(name) in (None, run.manifest.get("settings", {}).get("k"))
    if has_bounds:
        yield from _selection(report, own, metric)
    agreements = [sample.agreement for sample in samples if sample.agreement is not None]
    if agreements:
        same = np.mean([share > 1 - 1e-9 for share in agreements])
        yield (
            f"For {name} the most frequent answer has {np.mean(agreements):.0%} of the LLM's"
            f" samples; in {same:.0%} of the queries they all agree."
        )
    if run.task.labels:
        correct = [(sample, sample.answer == sample.gold) for sample in samples]
        yield from _calibration(name, correct, "the user's answer")
    elif has_bounds:
        yield from _calibration(
            name, _as_good_as_oracle(report, samples), "as good as the best one"
        )


def _comparisons(name: str, metric: str, changes: Mapping[str, Paired], sign: int) -> Iterator[str]:
    """At most three sentences: significantly better, significantly worse, and neither."""

    def listed(rivals: Sequence[str]) -> str:
        return ", ".join(f"{rival} ({signed(changes[rival])})" for rival in rivals)

    better, worse, neither, behind = [], [], [], []
    for rival, change in changes.items():
        ends = sorted((sign * change.low, sign * change.high))
        if math.isnan(change.difference):
            continue
        if ends[0] > 0:
            better.append(rival)
        elif ends[1] < 0:
            worse.append(rival)
        else:
            neither.append(rival)
            behind += [rival] if sign * change.difference <= 0 else []
    if better:
        yield f"{name} is better in {metric} than {listed(better)}."
    if worse:
        yield f"{name} is worse in {metric} than {listed(worse)}."
    if neither:
        end = f"; it is not ahead of {', '.join(behind)}." if behind else "."
        yield f"{name} is not separated in {metric} from {listed(neither)}{end}"


def records_of(name: str) -> int | None:
    """`hydra@4,8` → 4; None for a name without parameters, as the settings' k holds."""
    numbers = name.partition("@")[2]
    return int(numbers.split(",")[0]) if numbers else None


def _selection(report: Report, own: TableRow, metric: str) -> Iterator[str]:
    """How far the pick comes from a random sample to the best one."""
    bounds = {
        base_name(row.method): row.result.metrics[metric][0]
        for row in report.rows
        if row.group == "bound"
    }
    value = own.result.metrics[metric][0]
    expected, best = bounds.get("random", math.nan), bounds.get("oracle", math.nan)
    if not math.isnan(expected) and not math.isnan(best) and expected != best:
        yield (
            f"Choosing among the LLM's samples can move {metric} from {expected:.3f} (one by lot)"
            f" to {best:.3f} (the best one); {own.method} reaches {value:.3f},"
            f" {(value - expected) / (best - expected):.0%} of that way."
        )


def _as_good_as_oracle(report: Report, samples: Sequence[Sample]) -> Iterator[tuple[Sample, bool]]:
    """Texts are never correct: whether each pick has the gain of the best of its samples."""
    gain, run = report.run.task.gain, report.run
    best = {
        (sample.user, sample.query): gain(sample.answer, sample.gold)
        for name in run.methods
        for sample in run.of(name)
        if base_name(name) == "oracle" and not sample.error
    }
    for sample in samples:
        bound = best.get((sample.user, sample.query))
        if bound is not None and not sample.error:
            yield sample, gain(sample.answer, sample.gold) >= bound - 1e-9


def _calibration(name: str, picks: Iterable[tuple[Sample, bool]], correct_is: str) -> Iterator[str]:
    """Mean probability of the picks, share of correct ones, and the expected calibration error."""
    known = [
        (sample.probability, correct)
        for sample, correct in picks
        if sample.probability is not None and not sample.error
    ]
    if known:
        sure, right = np.array(known, dtype=np.float64).T
        yield (
            f"{name} gives its picks a probability of {sure.mean():.2f} on average, and"
            f" {right.mean():.2f} of them are {correct_is}; expected calibration error"
            f" {calibration_error(sure, right):.3f}."
        )


def calibration_error(probabilities: np.ndarray, correct: np.ndarray) -> float:
    """Expected calibration error of probabilities [N] in ten bins (Naeini et al. 2015)."""
    bins = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    inside = [bins == place for place in np.unique(bins)]
    gaps = (abs(probabilities[at].mean() - correct[at].mean()) * at.mean() for at in inside)
    return float(sum(gaps))


def _of_learning(name: str, pairs: str, report: Mapping[str, Any]) -> Iterator[str]:
    """What the reranker or the adapter reached on held-out training users."""
    if report.get("skipped"):
        yield f"No {name} was learned: {report['skipped']}."
    if losses := _numbers(report, "loss_uniform", "loss_shared", "loss_user"):
        yield (
            f"On held-out training users the {name}'s cross-entropy over {pairs} is {losses[0]:.3f}"
            f" for equal shares, {losses[1]:.3f} for the shared head, {losses[2]:.3f} for the"
            " users' own."
        )
    votes = _numbers(report, "loss_with_votes", "loss_without_votes")
    if votes and votes[0] != votes[1]:
        end = "." if votes[0] < votes[1] else ": they have no weight."
        yield (
            f"Where the LLM was asked about held-out training users, the {name}'s cross-entropy is"
            f" {votes[1]:.3f} without its votes and {votes[0]:.3f} with them{end}"
        )
    gains = _numbers(report, "gain_first", "gain_pick", "gain_best")
    if gains and name == "reranker":
        first, pick, best = gains
        used = "its order is used" if pick >= first else "so the retriever's order stands in hydra"
        yield (
            f"There the LLM's answer is worth {pick:.3f} with the reranker's first record,"
            f" {first:.3f} with the retriever's first, {best:.3f} with the best: {used}."
        )


def _numbers(report: Mapping[str, Any], *names: str) -> list[float]:
    """The values of these names; empty if one of them is no number."""
    values = [report.get(name) for name in names]
    numbers = [v for v in values if isinstance(v, int | float) and not math.isnan(v)]
    return numbers if len(numbers) == len(names) else []
