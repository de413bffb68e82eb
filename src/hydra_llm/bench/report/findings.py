"""What a run says of HYDRA, in sentences with their numbers: whom it beats, whom it does not, and
why not.

    against   paired differences from every prompt, control and rival: separated by their interval
              or not
    room      what choosing could gain (a sample by lot → the best sample), and how much of it
              HYDRA's pick gains
    samples   how far the LLM's samples agree: where they all say the same, no adapter has a choice
    sure      how the adapter's probabilities compare with how often it is right
    learned   what reranker and heads reached on held-out training users
A sentence is there only where the run holds its numbers. Knows no LLM.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np

from hydra_llm.bench.report.tables import Line, Run, compare, plain
from hydra_llm.bench.runlog import Sample
from hydra_llm.bench.stats import Paired

RIVALS = ("prompt", "hydra", "adapter", "sampling", "control")
"""Groups that HYDRA is held against, its own parts and the published form among them; bounds are no
rivals.
"""
BINS = 10


def findings(run: Run, lines: Sequence[Line]) -> list[str]:
    """The sentences of a run, HYDRA's variants one after the other."""
    own = [line for line in lines if plain(line.row.method) == "hydra"]
    found = [sentence for line in own for sentence in _of_method(run, lines, line)]
    return [*found, *(sentence for told in run.learning[:1] for sentence in _of_learning(told))]


def _of_method(run: Run, lines: Sequence[Line], own: Line) -> Iterator[str]:
    name, samples = own.row.method, run.of(own.row.method)
    rivals = {
        line.row.method: line
        for line in lines
        if line.group in RIVALS and plain(line.row.method) != "hydra"
    }
    metric = next(iter(own.row.metrics))
    differences = {
        rival: compare(run.task, samples, run.of(rival)).metrics[metric] for rival in rivals
    }
    yield from _against(name, metric, differences, run.task.metric_specs[metric].sign)
    if records_of(name) in (None, run.manifest.get("settings", {}).get("k")):
        yield from _room(lines, own, metric)
    yield from _agreement(name, samples)
    if run.task.labels:
        yield from _sureness(
            name,
            [(sample, sample.answer == sample.gold) for sample in samples],
            "the user's answer",
        )
    elif records_of(name) in (None, run.manifest.get("settings", {}).get("k")):
        yield from _sureness(name, _best_or_not(run, samples), "as good as the best one")


# ---- against whom


def _against(
    name: str, metric: str, differences: Mapping[str, Paired], better: int
) -> Iterator[str]:
    """Three sentences at most: separated above, separated below, and neither."""

    def told(rivals: Sequence[str]) -> str:
        return ", ".join(f"{rival} ({_signed(differences[rival])})" for rival in rivals)

    known = {
        rival: found for rival, found in differences.items() if not math.isnan(found.difference)
    }
    above = [
        rival for rival, found in known.items() if min(better * found.low, better * found.high) > 0
    ]
    below = [
        rival for rival, found in known.items() if max(better * found.low, better * found.high) < 0
    ]
    open_ = [rival for rival in known if rival not in above and rival not in below]
    if above:
        yield f"{name} is better in {metric} than {told(above)}."
    if below:
        yield f"{name} is worse in {metric} than {told(below)}."
    if open_:
        behind = [rival for rival in open_ if better * known[rival].difference <= 0]
        yield f"{name} is not separated in {metric} from {told(open_)}" + (
            f"; it is not ahead of {', '.join(behind)}." if behind else "."
        )


def _signed(found: Paired) -> str:
    interval = "" if math.isnan(found.low) else f" [{found.low:+.3f}, {found.high:+.3f}]"
    return f"{found.difference:+.3f}{interval}"


# ---- why


def records_of(name: str) -> int | None:
    """`hydra@4,8` → 4; None where the name has no parameters, so that the settings' hold."""
    numbers = name.partition("@")[2]
    return int(numbers.split(",")[0]) if numbers else None


def _room(lines: Sequence[Line], own: Line, metric: str) -> Iterator[str]:
    """How far the pick comes between the bounds of its own samples; the bounds take the settings'
    k, so only that variant has them.
    """
    bounds = {
        plain(line.row.method): line.row.metrics[metric][0]
        for line in lines
        if line.group == "bound"
    }
    value = own.row.metrics[metric][0]
    lot, best = bounds.get("random", math.nan), bounds.get("oracle", math.nan)
    if math.isnan(lot) or math.isnan(best) or lot == best:
        return
    yield (
        f"Choosing among the LLM's samples can move {metric} from {lot:.3f} (one by lot) to"
        f" {best:.3f} (the best one); {own.row.method} reaches {value:.3f},"
        f" {(value - lot) / (best - lot):.0%} of that way."
    )


def _agreement(name: str, samples: Sequence[Sample]) -> Iterator[str]:
    shares = [sample.agreement for sample in samples if sample.agreement is not None]
    if shares:
        same = np.mean([share > 1 - 1e-9 for share in shares])
        usual = (
            f"For {name} the most frequent answer has {np.mean(shares):.0%} of the LLM's samples"
        )
        yield f"{usual}; in {same:.0%} of the queries they all agree."


def _best_or_not(run: Run, samples: Sequence[Sample]) -> Iterator[tuple[Sample, bool]]:
    """Texts are never right or wrong: whether each pick is worth as much as the best of the samples
    that it was picked from.
    """
    best = {
        (s.user, s.query): run.task.gain(s.answer, s.gold)
        for s in run.samples
        if plain(s.method) == "oracle" and not s.error
    }
    for sample in samples:
        if (there := best.get((sample.user, sample.query))) is not None and not sample.error:
            yield sample, run.task.gain(sample.answer, sample.gold) >= there - 1e-9


def _sureness(name: str, picks: Iterable[tuple[Sample, bool]], right_is: str) -> Iterator[str]:
    """Mean probability of the picks beside the share of right ones, and the expected calibration
    error in ten bins.
    """
    said = [
        (sample.probability, good)
        for sample, good in picks
        if sample.probability is not None and not sample.error
    ]
    if not said:
        return
    sure, right = (np.array(column, dtype=np.float64) for column in zip(*said, strict=True))
    yield (
        f"{name} gives its picks a probability of {sure.mean():.2f} on average, and"
        f" {right.mean():.2f} of them are {right_is}; expected calibration error"
        f" {calibration_error(sure, right):.3f}."
    )


def calibration_error(sure: np.ndarray, right: np.ndarray) -> float:
    """Mean distance of probability [N] and share of right ones [N] in ten equal bins, weighted by
    their size (Naeini et al. 2015).
    """
    bins = np.minimum((sure * BINS).astype(int), BINS - 1)
    return float(
        sum(
            abs(sure[bins == place].mean() - right[bins == place].mean()) * (bins == place).mean()
            for place in np.unique(bins)
        )
    )


# ---- what learning says


def _of_learning(told: Mapping[str, Any]) -> Iterator[str]:
    for name, what, first in (
        ("reranker", "records", "the retriever's first"),
        ("adapter", "candidates", ""),
    ):
        report = told.get(name) or {}
        if report.get("skipped"):
            yield f"No {name} was learned: {report['skipped']}."
        if all(_number(report.get(key)) for key in ("loss_uniform", "loss_shared", "loss_user")):
            yield (
                f"On held-out training users the {name}'s cross-entropy over {what} is"
                f" {report['loss_uniform']:.3f} for equal shares, {report['loss_shared']:.3f} for"
                f" the shared head, {report['loss_user']:.3f} for the users' own."
            )
        with_votes, without = (report.get(key) for key in ("loss_with_votes", "loss_without_votes"))
        if _number(with_votes) and _number(without) and with_votes != without:
            yield (
                f"Where the LLM was asked about held-out training users, the {name}'s cross-entropy"
                f" is {without:.3f} without its votes and {with_votes:.3f} with them"
                + ("." if with_votes < without else ": they have no weight.")
            )
        if first and all(
            _number(report.get(key)) for key in ("gain_first", "gain_pick", "gain_best")
        ):
            used = (
                "its order is used"
                if report["gain_pick"] >= report["gain_first"]
                else "so the retriever's order stands in hydra"
            )
            yield (
                f"There the LLM's answer is worth {report['gain_pick']:.3f} with the {name}'s first"
                f" record, {report['gain_first']:.3f} with {first}, {report['gain_best']:.3f} with"
                f" the best: {used}."
            )


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not math.isnan(value)
