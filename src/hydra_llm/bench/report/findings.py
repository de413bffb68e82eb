"""What a run says about HYDRA, in sentences with their figures; a sentence is there only if the run
holds its figures. Knows no LLM.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from hydra_llm.bench.choices import by_earlier
from hydra_llm.bench.method import base_name
from hydra_llm.bench.report.cells import signed
from hydra_llm.bench.report.tables import Report, Run, TableRow
from hydra_llm.bench.results import compare
from hydra_llm.bench.runlog import Sample
from hydra_llm.bench.stats import MIN_USERS, Paired


def to_json(report: Report) -> dict[str, Any]:
    """The sentences, HYDRA's differences from all other methods, and what was learned."""
    of_hydra = {
        name: {other: change._asdict() for other, change in own.items()}
        for name, own in differences(report).items()
    }
    learning = list(report.run.learning)
    return {"findings": findings(report), "differences": of_hydra, "learning": learning}


def findings(report: Report) -> list[str]:
    """The sentences of a run, one variant of HYDRA after the other."""
    return list(_findings(report))


@lru_cache(maxsize=64)  # several outputs of one report share them
def _findings(report: Report) -> tuple[str, ...]:
    sentences = [report.too_few] if report.too_few else []
    for row in report.rows:
        if _is_hydra(row.method):
            sentences += [*_comparisons(report, row.method), *_picks(report, row)]
            sentences += by_earlier(report.run.by_method, row.method)
    sentences += _chosen(report.run.learning)
    for learned in report.run.learning[:1]:  # the first seed
        sentences += _learning("reranker", "records", learned.get("reranker") or {})
        sentences += _learning("adapter", "candidates", learned.get("adapter") or {})
    if not report.too_few:
        sentences += _users_tested(report)
    sentences += _equal_mass(report)
    return tuple(sentences)


@lru_cache(maxsize=64)
def differences(report: Report) -> dict[str, dict[str, Paired]]:
    """Variant of HYDRA → other method → their paired difference in the first metric."""
    run, metric = report.run, report.metrics[0]
    found: dict[str, dict[str, Paired]] = {}
    others = [row.method for row in report.rows if row.group != "bound"]
    for name in filter(_is_hydra, others):
        for other in others:
            if not _is_hydra(other):
                change = compare(run.task, run.of(name), report.answers[other]).metrics[metric]
                if change.users >= MIN_USERS and not math.isnan(change.difference):
                    found.setdefault(name, {})[other] = change
    return found


def _is_hydra(method: str) -> bool:
    return base_name(method) == "hydra"


def _comparisons(report: Report, name: str) -> Iterator[str]:
    """Paired differences in the first metric: significantly better, worse, and neither."""
    metric = report.metrics[0]
    better, worse, neither, behind = [], [], [], []
    sign = report.sign(metric)
    for other, change in differences(report).get(name, {}).items():
        low, high = sorted((sign * change.low, sign * change.high))
        rival = f"{other} ({signed(change)})"
        if low > 0:
            better.append(rival)
        elif high < 0:
            worse.append(rival)
        else:
            neither.append(rival)
            if sign * change.difference <= 0:
                behind.append(other)
    if better:
        yield f"{name} is better in {metric} than {', '.join(better)}."
    if worse:
        yield f"{name} is worse in {metric} than {', '.join(worse)}."
    if neither:
        end = f"; it is not ahead of {', '.join(behind)}." if behind else "."
        yield f"{name} is not separated in {metric} from {', '.join(neither)}{end}"


def _picks(report: Report, own: TableRow) -> Iterator[str]:
    """What selection could gain (a random sample → the best one) and gains; how far samples agree:
    if all are equal, there is nothing to select; calibration.
    """
    run, name, metric = report.run, own.method, report.metrics[0]
    samples, k = run.of(name), name.partition("@")[2].partition(",")[0]  # k is "": as in settings
    # bounds take the settings' k: only that variant selects among the same samples
    has_bounds = not k or int(k) == run.manifest.get("settings", {}).get("k")
    bounds = {
        base_name(row.method): row.result.metrics[metric][0]
        for row in report.rows
        if row.group == "bound"
    }
    value = own.result.metrics[metric][0]
    expected, best = bounds.get("random", math.nan), bounds.get("oracle", math.nan)
    if has_bounds and abs(best - expected) > 0:
        yield (
            f"Choosing among the LLM's samples can move {metric} from {expected:.3f} (a random one)"
            f" to {best:.3f} (the best one); {name} reaches {value:.3f},"
            f" {(value - expected) / (best - expected):.0%} of that difference."
        )
    agreements = [sample.agreement for sample in samples if sample.agreement is not None]
    if agreements:
        same = np.mean([share > 1 - 1e-9 for share in agreements])
        yield (
            f"For {name} the most frequent answer has {np.mean(agreements):.0%} of the LLM's"
            f" samples; in {same:.0%} of the queries they all agree."
        )
    if has_bounds or run.task.labels:
        yield from _calibration(run, name, samples)


def _calibration(run: Run, name: str, samples: Sequence[Sample]) -> Iterator[str]:
    """Mean probability of the picks, share of correct ones, and the expected calibration error. An
    LLM's texts are never correct: picks with the gain of the best of the samples count as such.
    """
    gain, is_closed = run.task.gain, bool(run.task.labels)
    best = {
        (sample.user, sample.query): gain(sample.answer, sample.gold)
        for method, of_method in run.by_method.items()
        for sample in of_method
        if not is_closed and base_name(method) == "oracle" and not sample.error
    }
    picks: list[tuple[float, float]] = []
    for sample in samples:
        if sample.probability is None or sample.error:
            continue
        if is_closed:
            picks.append((sample.probability, sample.answer == sample.gold))
        elif sample.choice:
            picks.append((sample.probability, sample.choice["choice_accuracy"]))
        elif (bound := best.get((sample.user, sample.query))) is not None:
            as_good = gain(sample.answer, sample.gold) >= bound - 1e-9
            picks.append((sample.probability, as_good))
    if picks:
        sure, right = np.array(picks, dtype=np.float64).T
        correct = "the user's answer" if is_closed else "as good as the best one"
        if any(sample.choice for sample in samples):
            correct = "the one that was taken"
        yield (
            f"{name} gives its picks a probability of {sure.mean():.2f} on average, and"
            f" {right.mean():.2f} of them are {correct}; expected calibration error"
            f" {calibration_error(sure, right):.3f}."
        )


def calibration_error(probabilities: np.ndarray, correct: np.ndarray) -> float:
    """Expected calibration error of probabilities [N] in ten bins (Naeini et al. 2015)."""
    bins = np.minimum((probabilities * 10).astype(int), 9)
    inside = [bins == place for place in np.unique(bins)]
    gaps = (abs(probabilities[at].mean() - correct[at].mean()) * at.mean() for at in inside)
    return float(sum(gaps))


def _users_tested(report: Report) -> Iterator[str]:
    """Users who are significantly worse or better off than with records alone."""
    for name, own in report.users_tested.items():
        k = name.partition("@")[2].partition(",")[0]
        base = f"rag@{k}" if k else "rag"
        yield (
            f"Of {own.users} users, {name} makes {own.worse} significantly worse than {base} and"
            f" {own.better} better (exact paired test of each user, Holm over users); alone"
            f" {own.worse_alone} and {own.better_alone} have p < 0.05, where chance gives at most"
            f" {0.025 * own.users:.1f} each. {own.testable} users have queries enough for the"
            " corrected test."
        )


def _equal_mass(report: Report) -> Iterator[str]:
    """Calibration of every method that gives a probability."""
    cells = [
        f"{name} {own.error:.3f} ({own.probability:.2f} for {own.accuracy:.2f})"
        for name, own in report.calibrations.items()
    ]
    if cells:
        yield (
            "Expected calibration error in bins of equally many answers (mean probability for the"
            f" share that is right): {', '.join(cells)}."
        )


def _chosen(learning: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What training users chose, and of how many folds and seeds."""
    every = [entry["chosen"] for entry in learning if entry.get("chosen")]
    chosen = [own for own in every if own.get("queries") != 0]  # by none: nothing was chosen
    values = [f"k {own['k']}, T {own['temperature']}, b {own['samples']}" for own in chosen]
    for value, count in Counter(values).most_common():
        where = f" in {count} of {len(values)} bundles" if count < len(values) else ""
        yield f"By training users' queries{where}: {value} (choose = auto)."


def _learning(name: str, pairs: str, report: Mapping[str, Any]) -> Iterator[str]:
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
        end = "." if votes[0] < votes[1] else ": they do not help, and count for nothing."
        yield (
            f"Where the LLM was asked about held-out training users, the {name}'s cross-entropy is"
            f" {votes[1]:.3f} without its votes and {votes[0]:.3f} with them{end}"
        )
    gains = _numbers(report, "gain_first", "gain_pick", "gain_best")
    if gains and name == "reranker":
        first, pick, best = gains
        if report.get("checked_by") == "history":
            used = "it helps" if pick >= first else "so hydra keeps the retriever's order"
            yield (
                f"There the first record's own answer is worth {pick:.3f} in the reranker's order,"
                f" {first:.3f} in the retriever's, {best:.3f} at best: {used}."
            )
            return
        used = "its order is used" if pick >= first else "so hydra keeps the retriever's order"
        yield (
            f"There the LLM's answer is worth {pick:.3f} with the reranker's first record,"
            f" {first:.3f} with the retriever's first, {best:.3f} with the best: {used}."
        )


def _numbers(report: Mapping[str, Any], *names: str) -> list[float]:
    """The values of these names; empty if one of them is no number."""
    values = [report.get(name) for name in names]
    numbers = [v for v in values if isinstance(v, int | float) and not math.isnan(v)]
    return numbers if len(numbers) == len(names) else []
