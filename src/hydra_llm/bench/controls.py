"""Controls that HYDRA must beat to be personal: another user's history and heads, and a shared
model with one offset a user. See also `methods.py`.

    mismatched    the same pipeline for the same query, as if another user had asked
    user-offset   y = f(x) + b_u   f a ridge regression on the input's vector
    item-offset   y = m_x + b_u    m_x the mean of training users' answers to the same input

y is a rating, or an indicator of each label. m and b are random effects, each shrunk by the ratio
of the variance within to the variance between, as estimated from training users (analysis of
variance; Searle, Casella and McCulloch 1992, "Variance components", section 3.6).

Letters: N records, D width of vectors, V numbers of a target (1, or labels).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hydra_llm.bench.method import Answerer, Method, NotAsked, Parts, method
from hydra_llm.bench.methods import ScorerOnly, WithoutLLM
from hydra_llm.select import first_best
from hydra_llm.tasks.base import Floats, Task
from hydra_llm.tasks.rating import Rating, number_of
from hydra_llm.types import ALWAYS, Answer, Query, Record

RIDGES = (1.0, 10.0, 100.0, 1000.0)
PARTS = 5  # of the training users, to choose the ridge
MOST = 1e6  # ratio of variances where there is none between


@dataclass(frozen=True)
class Mismatched:
    """Asks each query as another user, all of whose records it may see."""

    inner: Answerer
    partners: Mapping[str, str]

    async def aanswer(self, query: Query) -> Answer:
        if query.user not in self.partners:
            raise NotAsked(
                "no other user is evaluated with this one: take more users, or fewer folds"
            )
        return await self.inner.aanswer(as_another(query, self.partners[query.user]))


def as_another(query: Query, user: str) -> Query:
    """The query as if that user had asked it, after all of this user's records."""
    return replace(query, user=user, time="", span=ALWAYS, position=2**62)


def _mismatched_choice(parts: Parts) -> Answerer:
    return Mismatched(parts.personalizer(adapt=True), parts.partners)


@method(
    "control", takes=("k", "b"), source="docs/benchmark.md", picks=_mismatched_choice, asks="votes"
)
def mismatched(parts: Parts) -> Answerer:
    """Hydra with another user's history and heads."""
    return Mismatched(parts.personalizer(rerank=True, adapt=True), parts.partners)


@method("control", labels_only=True, uses=("adapter",), requires=("adapter",), asks="never")
def scorer_mismatched(parts: Parts) -> Answerer:
    """Scorer-only with another user's history and heads, no LLM."""
    return Mismatched(ScorerOnly(parts.personalizer(adapt=True)), parts.partners)


@dataclass(frozen=True)
class Targets:
    """Answers of a task with labels as numbers, and back."""

    task: Task

    def of(self, records: Sequence[Record]) -> Floats:
        """[N, V] of records whose answers are labels."""
        if isinstance(self.task.strategy, Rating):
            return np.array([[number_of(record.output)] for record in records])
        return (
            np.array([[record.output == label for label in self.task.labels] for record in records])
            * 1.0
        )

    def answer(self, values: Floats) -> str:
        """The label of predicted numbers [V]: the nearest rating, or the largest indicator."""
        if isinstance(self.task.strategy, Rating):
            values = -abs(np.array([number_of(label) for label in self.task.labels]) - values[0])
        return self.task.labels[first_best(values)]


@dataclass(frozen=True)
class UserOffset:
    """A base and how much an offset is shrunk: b_u = Σ (y − base) / (n + ratio)."""

    targets: Targets
    base: Callable[[Sequence[str]], Floats]  # inputs → [N, V]
    ratio: float

    def answer(self, query: Query, visible: Sequence[Record]) -> str:
        values = self.base([query.input])[0]
        own = [record for record in visible if record.output in self.targets.task.labels]
        if own:
            residuals = self.targets.of(own) - self.base([record.input for record in own])
            values = values + residuals.sum(axis=0) / (len(own) + self.ratio)
        return self.targets.answer(values)


def variance_ratio(values: Floats, owners: Sequence[str]) -> float:
    """Variance within owners by variance between them, of values [N, V], summed over V."""
    unique, owner = np.unique(np.asarray(owners, dtype=str), return_inverse=True)
    counts = np.bincount(owner)
    total, groups = len(values), len(unique)
    means = np.stack([np.bincount(owner, column) for column in values.T], 1) / counts[:, None]
    within = float(((values - means[owner]) ** 2).sum()) / max(1, total - groups)
    spread = float((counts[:, None] * (means - values.mean(axis=0)) ** 2).sum())
    effective = total - float((counts**2).sum()) / total
    between = (spread - (groups - 1) * within) / effective if effective > 0 else 0.0
    return min(MOST, within / between) if between > 0 else MOST


Fitted = tuple[Callable[[Sequence[str]], Floats], Floats]
"""The base, and the training records' residuals [N, V] by bases that have not seen the record."""


def item_means(inputs: Sequence[str], values: Floats) -> Fitted:
    """The mean of each input's answers, shrunk to the mean of all; of a new input that mean."""
    overall, ratio = values.mean(axis=0), variance_ratio(values, inputs)
    unique, item = np.unique(np.asarray(inputs, dtype=str), return_inverse=True)
    sums = np.stack([np.bincount(item, column) for column in (values - overall).T], 1)
    counts = np.bincount(item)
    known = overall + sums / (counts + ratio)[:, None]
    means = dict(zip(unique.tolist(), known, strict=True))
    others = np.broadcast_to((counts[item] - 1 + ratio)[:, None], values.shape)
    without = np.zeros_like(values)  # of an input that was answered once
    np.divide(sums[item] - (values - overall), others, out=without, where=others > 0)
    return lambda texts: np.array(
        [means.get(text, overall) for text in texts]
    ), values - overall - without


def ridge_on(vectors: Floats, values: Floats, owners: Sequence[str]) -> tuple[Floats, Floats]:
    """The coefficients [1 + D, V] of the ridge that predicts held-out owners best, and their
    residuals [N, V].
    """
    x = np.concatenate([np.ones((len(vectors), 1)), vectors], axis=1)
    part = np.unique(np.asarray(owners, dtype=str), return_inverse=True)[1] % PARTS
    penalty = np.ones(x.shape[1])
    penalty[0] = 1e-6
    gram, moments = x.T @ x, x.T @ values
    best = np.full_like(values, np.inf)
    for ridge in RIDGES:
        residuals = np.empty_like(values)
        for held in range(PARTS):
            own = part == held
            left = gram - x[own].T @ x[own] + np.diag(ridge * penalty)
            residuals[own] = values[own] - x[own] @ np.linalg.solve(
                left, moments - x[own].T @ values[own]
            )
        if (residuals**2).sum() < (best**2).sum():
            best, chosen = residuals, ridge
    return np.linalg.solve(gram + np.diag(chosen * penalty), moments), best


def _offset(
    what: str, name: str, fit: Callable[[Parts, Sequence[Record], Floats], Fitted]
) -> Method:
    def build(parts: Parts) -> Answerer:
        task, targets = parts.bundle.task, Targets(parts.bundle.task)
        known = [r for own in parts.training.values() for r in own if r.output in task.labels]
        if not known:
            known = [Record("", "", "", label) for label in task.labels]  # nothing is known
        base, residuals = fit(parts, known, targets.of(known))
        ratio = variance_ratio(residuals, [record.user for record in known])
        return WithoutLLM(parts.personalizer(), UserOffset(targets, base, ratio).answer)

    return Method(name, what, "control", build, labels_only=True, uses=(), asks="never")


def _by_vector(parts: Parts, known: Sequence[Record], values: Floats) -> Fitted:
    embed = parts.bundle.features.texts
    vectors = np.asarray(embed([record.input for record in known]), dtype=np.float64)
    weights, residuals = ridge_on(vectors, values, [record.user for record in known])
    return lambda texts: weights[0] + np.asarray(embed(list(texts))) @ weights[1:], residuals


def _by_item(parts: Parts, known: Sequence[Record], values: Floats) -> Fitted:
    return item_means([record.input for record in known], values)


user_offset = _offset(
    "A shared ridge regression on the input and one offset a user, no LLM",
    "user-offset",
    _by_vector,
)
item_offset = _offset(
    "Training users' mean answer to the same input and one offset a user, no LLM",
    "item-offset",
    _by_item,
)
