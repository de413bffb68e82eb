"""The gate of a bundle: which questions belong to the task, and from when on a record helps.

Membership is a logistic regression of training inputs against generic requests. Its threshold is a
quantile of the scores of users whom the regression has not seen. The floor of records compares what
a record's own answer would be worth with the answer of another user's record.
"""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hydra_llm.bundle import Bundle
from hydra_llm.gate import BUCKETS, FORM_WIDTH, Floats, Floor, GateWeights, forms, generic_requests
from hydra_llm.history import as_query, before, in_order
from hydra_llm.types import Record

LEAST_INPUTS = 100  # distinct training inputs; with fewer, words are compared (gate.LexicalGate)
MOST_INPUTS = 1500
QUANTILE = 0.02  # of held-out users' own inputs below the threshold
FOLDS = 4  # of users
RIDGE = 1.0
ENCODER_SCALE, WORD_SCALE, SURFACE_SCALE = 9.0, 6.0, 3.0
"""Tuned on training users and generic requests: the share of these that pass."""
STEPS = 50  # of L-BFGS
FLOOR_QUERIES = 200
LEAST_DROPPED = 20  # held-out records below the floor, else none is dropped


def fit_gate(bundle: Bundle) -> tuple[GateWeights | None, dict[str, Any]]:
    """The gate of a bundle whose scorers are learned, and its report; None with too few inputs."""
    if bundle.settings.dp_epsilon is not None:
        return None, {"skipped": "it would be learned without differential privacy"}
    inputs = _distinct_inputs(bundle)
    if len(inputs) < LEAST_INPUTS:
        reason = f"{len(inputs)} distinct training inputs, at least {LEAST_INPUTS} are needed"
        return None, {"skipped": reason}
    users, texts = [user for user, _ in inputs], [text for _, text in inputs]
    own, other = _features(bundle, texts), _features(bundle, generic_requests())
    names = list(dict.fromkeys(users))
    fold = np.array([names.index(user) % FOLDS for user in users])
    other_fold = np.arange(len(other)) % FOLDS
    held_out, generic = np.zeros(len(own)), np.zeros(len(other))
    for part in range(min(FOLDS, len(names))):
        weights = _logistic(own[fold != part], other[other_fold != part])
        held_out[fold == part] = own[fold == part] @ weights
        generic[other_fold == part] = other[other_fold == part] @ weights
    threshold = float(np.quantile(held_out, QUANTILE))
    floor, gains = fit_floor(bundle)
    weights = _scales(bundle) * _logistic(own, other)
    report = {"inputs": len(own), "generic_passed": float((generic >= threshold).mean()), **gains}
    return GateWeights(weights, threshold, floor), report


def _distinct_inputs(bundle: Bundle) -> list[tuple[str, str]]:
    """(user, input) of up to `MOST_INPUTS` distinct inputs of training users."""
    first = {r.input: user for user in bundle.trained_on for r in bundle.records.get(user, ())}
    rows = [(user, text) for text, user in first.items()]
    random.Random(bundle.settings.training_seed).shuffle(rows)
    return rows[:MOST_INPUTS]


def _features(bundle: Bundle, texts: Sequence[str]) -> Floats:
    vectors = bundle.features.texts(texts)
    return np.concatenate([vectors, forms(texts)], 1) * _scales(bundle)


def _scales(bundle: Bundle) -> Floats:
    """[H + D] of the features: the larger, the less a weight is drawn towards 0."""
    width = bundle.features.encoder.width
    sizes = [width, BUCKETS, FORM_WIDTH - BUCKETS]
    return np.repeat([ENCODER_SCALE, WORD_SCALE, SURFACE_SCALE], sizes)


def _logistic(own: Floats, other: Floats) -> Floats:
    """[H + D] weights of a logistic regression in which both classes count alike."""
    x = torch.tensor(np.concatenate([own, other]), dtype=torch.float32)
    sign = torch.cat([torch.ones(len(own)), -torch.ones(len(other))])
    share = torch.cat([torch.full((len(own),), len(other) / len(own)), torch.ones(len(other))])
    weights = torch.zeros(x.shape[1], requires_grad=True)
    search = torch.optim.LBFGS([weights], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        search.zero_grad()
        losses = torch.nn.functional.softplus(-sign * (x @ weights))
        total = (share * losses).sum() + RIDGE / 2 * weights.square().sum()
        total.backward()
        return total

    search.step(loss)
    return weights.detach().numpy().astype(np.float64)


# ---- records


def fit_floor(bundle: Bundle) -> tuple[Floor, dict[str, Any]]:
    """The floor, fitted on half of the users and kept if it holds for the others: the records
    below it were worth less than another user's answer. Else every record passes.
    """
    rows, gains, users = _record_gains(bundle)
    half = users % 2 == 0
    if len(set(users[half])) < 1 or len(set(users[~half])) < 1:
        return Floor(), {}
    floor = _line(rows[half], gains[half])
    below = ~half & (floor.gain(rows[:, 1], rows[:, 2]) < 0)
    count, dropped = int(below.sum()), float(gains[below].mean()) if below.any() else 0.0
    report = {"records_below": count, "gain_below": dropped, "records_held_out": int((~half).sum())}
    if count < LEAST_DROPPED or dropped >= 0:
        return Floor(), report
    return floor, report


def _line(rows: Floats, gains: Floats) -> Floor:
    moments = rows.T @ rows + 1e-3 * len(rows) * np.diag([0.0, 0.01, 0.01])
    return Floor(*np.linalg.lstsq(moments, rows.T @ gains, rcond=None)[0].tolist())


def _record_gains(bundle: Bundle) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """[N, 3] of 1, cosine and usefulness of retrieved records; [N] the gain of each one's answer
    above the mean one of other users' answers; [N] the number of each one's user.
    """
    task, plain = bundle.task, bundle.pipeline()
    dice = random.Random(bundle.settings.training_seed)
    known = [name for name in bundle.trained_on if bundle.records.get(name)]
    rows, gains, users = [], [], []
    for number, query_record in _sampled(bundle, dice):
        query = as_query(query_record)
        visible = before(bundle.records[query.user], query)
        context = plain.context(query, visible)
        ranked = plain.rerank(context, plain.retrieve(context))
        if not ranked:
            continue
        gold, others = query.gold or "", _others(bundle, known, query.user, len(ranked), dice)
        none = float(np.mean([task.gain(_answer(bundle, r), gold) for r in others]))
        vectors = bundle.features.texts([query.input, *(item.record.input for item in ranked)])
        for item, vector in zip(ranked, vectors[1:], strict=True):
            rows.append((1.0, float(vector @ vectors[0]), item.usefulness or 0.0))
            gains.append(task.gain(_answer(bundle, item.record), gold) - none)
            users.append(number)
    return np.array(rows).reshape(-1, 3), np.array(gains), np.array(users, dtype=np.int64)


def _sampled(bundle: Bundle, dice: random.Random) -> list[tuple[int, Record]]:
    """Training users' records that see earlier ones, each with the number of its user."""
    found = []
    for number, user in enumerate(bundle.trained_on):
        own = [r for r in in_order(bundle.records.get(user, ())) if bundle.task.is_answer(r.output)]
        found += [(number, record) for record in own[len(own) // 2 :]]
    return dice.sample(found, min(len(found), FLOOR_QUERIES))


def _others(
    bundle: Bundle, known: Sequence[str], user: str, count: int, dice: random.Random
) -> list[Record]:
    """As many records of other users among the known, or of this one if there is no other."""
    names = [name for name in known if name != user]
    return [dice.choice(bundle.records[dice.choice(names or [user])]) for _ in range(count)]


def _answer(bundle: Bundle, record: Record) -> str | None:
    return record.output if bundle.task.is_answer(record.output) else None
