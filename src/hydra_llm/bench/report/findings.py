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
from typing import Any, TypeGuard

import numpy as np

from hydra_llm.bench.comparison import compare
from hydra_llm.bench.method import base_name
from hydra_llm.bench.report.cells import signed
from hydra_llm.bench.report.tables import Report, Run, TableRow
from hydra_llm.bench.runlog import Sample
from hydra_llm.bench.stats import Paired

RIVALS = ("prompt", "hydra", "adapter", "sampling", "control")
"""Groups that HYDRA is compared with: all but the bounds."""
BINS = 10


def findings(report: Report) -> list[str]:
    """The sentences of a run, one variant of HYDRA after the other."""
    own = [row for row in report.rows if base_name(row.method) == "hydra"]
    found = [sentence for row in own for sentence in _of_method(report, row)]
    first_seed = report.run.learning[:1]
    return [*found, *(sentence for learned in first_seed for sentence in _of_learning(learned))]


def _of_method(report: Report, own: TableRow) -> Iterator[str]:
    run, name, metric = report.run, own.method, report.metrics[0]
    samples = run.of(name)
    differences = {
        row.method: compare(run.task, samples, run.of(row.method)).metrics[metric]
        for row in report.rows
        if row.group in RIVALS and base_name(row.method) != "hydra"
    }
    yield from _comparisons(name, metric, differences, report.sign(metric))
    # bounds take the settings' k: only that variant selects among the same samples
    has_bounds = records_of(name) in (None, run.manifest.get("settings", {}).get("k"))
    if has_bounds:
        yield from _selection(report, own, metric)
    yield from _agreement(name, samples)
    if run.task.labels:
        correct = [(sample, sample.answer == sample.gold) for sample in samples]
        yield from _calibration(name, correct, "the user's answer")
    elif has_bounds:
        yield from _calibration(name, _as_good_as_oracle(run, samples), "as good as the best one")


# ---- comparisons


def _comparisons(
    name: str, metric: str, differences: Mapping[str, Paired], sign: int
) -> Iterator[str]:
    """At most three sentences: significantly better, significantly worse, and neither."""

    def listed(rivals: Sequence[str]) -> str:
        return ", ".join(f"{rival} ({signed(differences[rival])})" for rival in rivals)

    known = {
        rival: found for rival, found in differences.items() if not math.isnan(found.difference)
    }
    better = [
        rival for rival, found in known.items() if min(sign * found.low, sign * found.high) > 0
    ]
    worse = [
        rival for rival, found in known.items() if max(sign * found.low, sign * found.high) < 0
    ]
    neither = [rival for rival in known if rival not in (*better, *worse)]
    if better:
        yield f"{name} is better in {metric} than {listed(better)}."
    if worse:
        yield f"{name} is worse in {metric} than {listed(worse)}."
    if neither:
        behind = [rival for rival in neither if sign * known[rival].difference <= 0]
        end = f"; it is not ahead of {', '.join(behind)}." if behind else "."
        yield f"{name} is not separated in {metric} from {listed(neither)}{end}"


# ---- selection


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


def _agreement(name: str, samples: Sequence[Sample]) -> Iterator[str]:
    shares = [sample.agreement for sample in samples if sample.agreement is not None]
    if shares:
        same = np.mean([share > 1 - 1e-9 for share in shares])
        yield (
            f"For {name} the most frequent answer has {np.mean(shares):.0%} of the LLM's samples;"
            f" in {same:.0%} of the queries they all agree."
        )


# ---- calibration


def _as_good_as_oracle(run: Run, samples: Sequence[Sample]) -> Iterator[tuple[Sample, bool]]:
    """Texts are never correct: whether each pick has the gain of the best of its samples."""
    best = {
        (s.user, s.query): run.task.gain(s.answer, s.gold)
        for s in run.samples
        if base_name(s.method) == "oracle" and not s.error
    }
    for sample in samples:
        gain = best.get((sample.user, sample.query))
        if gain is not None and not sample.error:
            yield sample, run.task.gain(sample.answer, sample.gold) >= gain - 1e-9


def _calibration(name: str, picks: Iterable[tuple[Sample, bool]], correct_is: str) -> Iterator[str]:
    """Mean probability of the picks, share of correct ones, and the expected calibration error."""
    known = [
        (sample.probability, correct)
        for sample, correct in picks
        if sample.probability is not None and not sample.error
    ]
    if known:
        sure, right = (np.array(column, dtype=np.float64) for column in zip(*known, strict=True))
        yield (
            f"{name} gives its picks a probability of {sure.mean():.2f} on average, and"
            f" {right.mean():.2f} of them are {correct_is}; expected calibration error"
            f" {calibration_error(sure, right):.3f}."
        )


def calibration_error(probabilities: np.ndarray, correct: np.ndarray) -> float:
    """Expected calibration error of probabilities [N] in ten bins (Naeini et al. 2015)."""
    bins = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    inside = [bins == place for place in np.unique(bins)]
    gaps = (abs(probabilities[each].mean() - correct[each].mean()) * each.mean() for each in inside)
    return float(sum(gaps))


# ---- learning


def _of_learning(learned: Mapping[str, Any]) -> Iterator[str]:
    for name, pairs in (("reranker", "records"), ("adapter", "candidates")):
        report = learned.get(name) or {}
        if report.get("skipped"):
            yield f"No {name} was learned: {report['skipped']}."
        yield from _losses(name, pairs, report)
        if name == "reranker":
            yield from _first_record(report)


def _losses(name: str, pairs: str, report: Mapping[str, Any]) -> Iterator[str]:
    uniform, shared, user, with_votes, without = (
        report.get(f"loss_{key}")
        for key in ("uniform", "shared", "user", "with_votes", "without_votes")
    )
    if _number(uniform) and _number(shared) and _number(user):
        yield (
            f"On held-out training users the {name}'s cross-entropy over {pairs} is {uniform:.3f}"
            f" for equal shares, {shared:.3f} for the shared head, {user:.3f} for the users' own."
        )
    if _number(with_votes) and _number(without) and with_votes != without:
        end = "." if with_votes < without else ": they have no weight."
        yield (
            f"Where the LLM was asked about held-out training users, the {name}'s cross-entropy is"
            f" {without:.3f} without its votes and {with_votes:.3f} with them{end}"
        )


def _first_record(report: Mapping[str, Any]) -> Iterator[str]:
    first, pick, best = (report.get(f"gain_{key}") for key in ("first", "pick", "best"))
    if _number(first) and _number(pick) and _number(best):
        used = "its order is used" if pick >= first else "so the retriever's order stands in hydra"
        yield (
            f"There the LLM's answer is worth {pick:.3f} with the reranker's first record,"
            f" {first:.3f} with the retriever's first, {best:.3f} with the best: {used}."
        )


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not math.isnan(value)
