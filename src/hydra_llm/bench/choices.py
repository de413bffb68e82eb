"""Methods on recorded choices: each query brings its candidates, and no LLM is asked. The figures
of an answer, the controls that know no taste, and what a run says by the number of earlier choices.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hydra_llm.bench.method import Answerer, Parts, method
from hydra_llm.bench.runlog import Sample
from hydra_llm.context import Context
from hydra_llm.history import before
from hydra_llm.model.head import Head
from hydra_llm.select import Selection, Selector, first_best
from hydra_llm.text import length
from hydra_llm.types import Answer, Candidate, Choice, Query, Record

QUARTERS = 4
Rate = Callable[[Sequence[Candidate]], list[float]]  # candidates → their scores


def earlier(records: Sequence[Record], query: Query) -> dict[str, float]:
    """How many choices of the user a recorded choice sees; empty for any other query."""
    if not query.offered:
        return {}
    seen = sum(isinstance(record, Choice) for record in before(records, query))
    return {"earlier": float(seen)}


def figures(answer: Answer) -> dict[str, float]:
    """The metrics (`tasks.base.CHOICE_METRICS`) of one recorded choice: of equal scores each order
    is as likely; without a probability of the candidate that was taken there is no log-loss.
    """
    candidates, query = answer.candidates, answer.proposal.query
    taken = query.offered.index(query.gold or "")
    scores = np.array([-np.inf if own.score is None else own.score for own in candidates])
    if np.isinf(scores).any():
        scores[Selection(list(candidates), answer.chosen).ranking] = -np.arange(len(candidates))
    above, equal = int((scores > scores[taken]).sum()), int((scores == scores[taken]).sum())
    found = {
        "choice_accuracy": 0.0 if above else 1 / equal,
        "mrr": float(np.mean(1 / np.arange(above + 1, above + equal + 1))),
    }
    probability = candidates[taken].probability
    if probability is not None:
        found["log_loss"] = -math.log(max(probability, 1e-12))
    return found


# ---- methods


@dataclass(frozen=True)
class Rated(Selector):
    """Ranks the candidates by a number, of equal ones the first; `shares`: the numbers are log
    probabilities but for a constant.
    """

    rate: Rate
    shares: bool = False

    def choose(self, context: Context, candidates: Sequence[Candidate]) -> Selection:
        scores = np.array(self.rate(candidates), dtype=np.float64)
        share = np.exp(scores - scores.max())
        rated = [
            replace(own, score=float(score), probability=float(p) if self.shares else None)
            for own, score, p in zip(candidates, scores, share / share.sum(), strict=True)
        ]
        return Selection(rated, first_best(scores))


def _rated(parts: Parts, rate: Rate, *, shares: bool = False) -> Answerer:
    return replace(parts.personalizer(), selector=Rated(rate, shares))


@method("control", uses=(), only_choices=True, asks="never")
def first(parts: Parts) -> Answerer:
    """Of recorded choices: the candidate that was shown first."""
    return _rated(parts, lambda candidates: [-float(place) for place in range(len(candidates))])


@method("control", uses=(), only_choices=True, asks="never")
def longest(parts: Parts) -> Answerer:
    """Of recorded choices: the candidate of most words."""
    return _rated(parts, lambda candidates: [float(length(own.text)) for own in candidates])


def by_lot(parts: Parts) -> Answerer:
    """Any candidate, each as likely: its figures are exact expectations."""
    return _rated(parts, lambda candidates: [0.0] * len(candidates), shares=True)


@method("control", uses=("adapter",), requires=("adapter",), only_choices=True, asks="never")
def no_history(parts: Parts) -> Answerer:
    """Of recorded choices: hydra with the shared head and no earlier choice of the user."""
    nobody = replace(parts, bundle=parts.bundle.without_heads(), records={})
    return nobody.personalizer(adapt=True)


@method("control", uses=("adapter",), requires=("adapter",), only_choices=True, asks="never")
def shuffled_heads(parts: Parts) -> Answerer:
    """Of recorded choices: hydra with another user's head for each user."""
    heads = parts.bundle.heads.get("adapter", {})
    bundle = replace(parts.bundle, heads={"adapter": Shuffled(heads, parts.seed)})
    return replace(parts, bundle=bundle).personalizer(adapt=True)


class Shuffled(Mapping[str, Head]):
    """Each user with another one's numbers, and the own head's age: what it may answer stays."""

    def __init__(self, heads: Mapping[str, Head], seed: int):
        names, self._heads = sorted(heads), heads
        order = np.random.default_rng(seed).permutation(len(names))
        self._other = {names[a]: names[b] for a, b in zip(order, np.roll(order, 1), strict=True)}

    def __getitem__(self, name: str) -> Head:
        return replace(self._heads[name], numbers=self._heads[self._other[name]].numbers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._other)

    def __len__(self) -> int:
        return len(self._other)


# ---- by the number of earlier choices


def by_earlier(samples: Mapping[str, Sequence[Sample]], name: str) -> Iterator[str]:
    """The accuracy of a method, and of the controls, in quarters of the queries: by how many
    choices of their user came before. `samples` are each method's.
    """
    own = [sample for sample in samples[name] if sample.choice]
    rivals = [
        other for other in (name, "hydra-shared", "no-history", "mismatched") if other in samples
    ]
    if len(own) < QUARTERS:
        return
    counts = np.array([sample.choice["earlier"] for sample in own])
    cuts = np.unique(np.quantile(counts, np.arange(1, QUARTERS) / QUARTERS))
    parts = []
    for part in range(len(cuts) + 1):
        inside = counts[np.searchsorted(cuts, counts, side="left") == part]
        if len(inside):
            low, high = int(inside.min()), int(inside.max())
            found = ((other, _accuracy(samples[other], low, high)) for other in rivals)
            means = (
                f"{other} {'failed' if mean is None else format(mean, '.3f')}"
                for other, mean in found
            )
            parts.append(f"after {low} to {high} {', '.join(means)} ({len(inside)} choices)")
    yield f"Accuracy by the number of the user's earlier choices: {'; '.join(parts)}."


def _accuracy(samples: Sequence[Sample], low: int, high: int) -> float | None:
    """The mean over the samples with so many earlier choices; None if all of them failed."""
    known = [
        sample.choice["choice_accuracy"]
        for sample in samples
        if sample.choice and not sample.error and low <= sample.choice["earlier"] <= high
    ]
    return float(np.mean(known)) if known else None
