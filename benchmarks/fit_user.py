"""How long it takes to fit both heads of one new user on 50 queries with 8 pairs each, and how good
they are, against the authors' way.

    python benchmarks/fit_user.py [--data FOLDER] [--features tower|cross] [--runs 2] [--seed 0]
    [--json]

Ours: linear heads under the prior, with base and strengths learned on other users, and cached
features. The authors' way, implemented from the paper: a random head (H×H, tanh, H→2) on the frozen
encoder, which reads every pair again in every epoch; 2 epochs, batch 64, learning rate 2e-5, AdamW
with weight decay 0.01, cross-entropy. A fairer baseline of the same shape: cached features,
learning rate 1e-3, at most 200 epochs, early stopping on the user's last fifth. Encoder, rows and
labels are the same for all. The held-out log-loss per pair is over the new users' later groups.
Exits with 1 if a limit is missed.
"""

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from measure import Limit, finish, in_turn, options, show, summary
from simulated_users import (
    CLASSIFY,
    Rows,
    learn_scorer,
    open_data,
    real_rows,
    simulate_users,
    simulated_rows,
)
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from hydra_llm.config import Settings, load_settings
from hydra_llm.model.encoder import Encoder, open_encoder
from hydra_llm.model.feature_cache import FeatureCache
from hydra_llm.model.heads import Head
from hydra_llm.model.scorer import Scorer
from hydra_llm.training.convex import fit_heads
from hydra_llm.training.dataset import make_training_set
from hydra_llm.types import LabelledGroup

KNOWN, HELD_OUT, TRAINING_GROUPS = 50, 25, 12
"""A new user's groups to fit on and to be judged on; groups of each training user."""
SCORERS = ("reranker", "adapter")
RULE = "exact"  # labels are 0 or 1
Groups = Sequence[LabelledGroup]


@dataclass(frozen=True)
class Case:
    """One new user: groups to fit on, and later ones, by scorer."""

    name: str
    known: dict[str, Groups]
    later: dict[str, Groups]


def main() -> None:
    parser = options(__doc__, runs=2)
    parser.add_argument(
        "--data", type=Path, help="a data set's folder; without it, users are made up"
    )
    parser.add_argument(
        "--features",
        choices=("tower", "cross"),
        default="tower",
        help="of our way; the authors' is cross",
    )
    parser.add_argument("--users", type=int, default=20, help="training users")
    parser.add_argument("--new", type=int, default=3, help="new users")
    given = parser.parse_args()
    warnings.filterwarnings(
        "ignore", message="std"
    )  # the spread of no evidence: the authors' way has none, so neither has ours
    settings = load_settings(loss="binary", features=given.features, seed=given.seed)
    encoder = open_encoder("minilm")
    store = FeatureCache(encoder)
    training, cases, chances = rows_of(given, store)
    began = time.perf_counter()
    scorers = {
        name: learn_scorer(store, settings, CLASSIFY, name, getattr(training, name), (), RULE)[0]
        for name in SCORERS
    }
    learned_in = time.perf_counter() - began
    times = timed(cases[0], scorers, encoder, store, given)
    quality = judged(cases, scorers, store, chances, given.seed)
    report(given, settings, cases, times, quality, learned_in)


# ---- the rows


def rows_of(
    given: argparse.Namespace, store: FeatureCache
) -> tuple[Rows, list[Case], dict[tuple[str, str], tuple[float, ...]]]:
    if given.data is None:
        training = simulated_rows(
            simulate_users(given.users, given.seed, "old"), TRAINING_GROUPS, given.seed
        )
        new = simulated_rows(
            simulate_users(given.new, given.seed, "new"), KNOWN + HELD_OUT, given.seed
        )
    else:
        data = open_data(given.data)
        longest = sorted(data.users("test"), key=lambda user: -len(data.answered(user)))[
            : given.new
        ]
        training = real_rows(
            data, data.users("train")[: given.users], store, TRAINING_GROUPS, given.seed
        )
        new = real_rows(data, longest, store, KNOWN + HELD_OUT, given.seed)
    names = list(dict.fromkeys(group.user for group in new.adapter))
    return training, [case(new, name) for name in names], new.chances


def case(rows: Rows, user: str) -> Case:
    own: dict[str, list[LabelledGroup]] = {
        name: [group for group in getattr(rows, name) if group.user == user] for name in SCORERS
    }
    cut = {name: min(KNOWN, len(groups) * 2 // 3) for name, groups in own.items()}
    return Case(
        user, {n: g[: cut[n]] for n, g in own.items()}, {n: g[cut[n] :] for n, g in own.items()}
    )


def pairs(groups: Groups) -> tuple[list[str], list[str], Tensor]:
    """Left texts, right texts and labels [B] of all pairs."""
    flat = [
        (group.left, right, gain)
        for group in groups
        for right, gain in zip(group.rights, group.gains, strict=True)
    ]
    return (
        [left for left, _, _ in flat],
        [right for _, right, _ in flat],
        torch.tensor([int(gain) for _, _, gain in flat]),
    )


# ---- the ways


def ours(case: Case, scorers: dict[str, Scorer], store: FeatureCache, user: str) -> dict[str, Head]:
    """The user's head of each scorer."""
    heads = {}
    for name, scorer in scorers.items():
        groups = [renamed(group, user) for group in case.known[name]]
        data = make_training_set(store, scorer.interaction, groups, rule=RULE, loss=scorer.loss)
        heads[name] = fit_heads(scorer, data, [user])[user]
    return heads


def renamed(group: LabelledGroup, user: str) -> LabelledGroup:
    return LabelledGroup(
        user,
        group.query,
        group.left,
        group.rights,
        group.gains,
        group.side_features,
        group.position,
        group.voted,
    )


def random_head(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2))


Read = Callable[[list[str], list[str]], Tensor]
"""Pairs' texts → their vectors [B, H]: the encoder itself, or what is kept of it, which is the same
as it is frozen.
"""


def authors_way(groups: Groups, read: Read, width: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    left, right, labels = pairs(groups)
    head = random_head(width)
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-5, weight_decay=0.01)
    for _ in range(2):
        for batch in torch.randperm(len(labels)).split(64):
            with torch.no_grad():
                x = read([left[i] for i in batch], [right[i] for i in batch])
            optimizer.zero_grad()
            cross_entropy(head(x), labels[batch]).backward()
            optimizer.step()
    return head


def fairer_rival(groups: Groups, store: FeatureCache, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    cut = len(groups) - max(1, len(groups) // 5)
    (x, labels), (x_last, last) = kept(groups[:cut], store), kept(groups[cut:], store)
    head = random_head(x.shape[1])
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.01)
    best, best_loss = copy.deepcopy(head.state_dict()), float("inf")
    for _ in range(200):
        for batch in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            cross_entropy(head(x[batch]), labels[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            found = float(cross_entropy(head(x_last), last))
        if found < best_loss:
            best, best_loss = copy.deepcopy(head.state_dict()), found
    head.load_state_dict(best)
    return head


def kept(groups: Groups, store: FeatureCache) -> tuple[Tensor, Tensor]:
    """Kept vectors [B, H] and labels [B] of all pairs."""
    left, right, labels = pairs(groups)
    return torch.from_numpy(store.pairs(left, right)), labels


# ---- time


def timed(
    case: Case,
    scorers: dict[str, Scorer],
    encoder: Encoder,
    store: FeatureCache,
    given: argparse.Namespace,
) -> dict[str, list[float]]:
    fresh = (f"another {i}" for i in count())
    slow: dict[str, Callable[[], object]] = {
        "the authors' way": lambda: [
            authors_way(groups, encoder.forward_pairs, encoder.width, given.seed)
            for groups in case.known.values()
        ],
        "ours, the encoder's pass included": lambda: ours(
            case, scorers, FeatureCache(encoder), next(fresh)
        ),
        "the fairer rival, features kept": lambda: [
            fairer_rival(groups, store, given.seed) for groups in case.known.values()
        ],
    }
    for groups in case.known.values():
        kept(groups, store)
    times = in_turn(slow, given.runs, warm_up=0)  # the look-ups above have warmed the encoder
    times["ours, features kept"] = in_turn(
        {"": lambda: ours(case, scorers, store, next(fresh))}, 10 * given.runs, warm_up=5
    )[""]
    for name, scorer in scorers.items():
        table = make_training_set(
            store, scorer.interaction, case.known[name], rule=RULE, loss=scorer.loss
        )
        steps: dict[str, Callable[[], object]] = {
            f"  {name}: look the features up": lambda n=name, s=scorer: make_training_set(
                store, s.interaction, case.known[n], rule=RULE, loss=s.loss
            ),  # type: ignore[misc]
            f"  {name}: fit the head": lambda s=scorer, t=table: fit_heads(s, t, [case.name]),  # type: ignore[misc]
        }
        times |= in_turn(steps, 10 * given.runs)
    return times


# ---- quality


def judged(
    cases: Sequence[Case],
    scorers: dict[str, Scorer],
    store: FeatureCache,
    chances: dict[tuple[str, str], tuple[float, ...]],
    seed: int,
) -> dict[str, dict[str, float]]:
    """Held-out log-loss per pair by way and scorer, the mean over new users."""
    kept_rows: Read = lambda left, right: torch.from_numpy(store.pairs(left, right))  # noqa: E731
    found: dict[str, dict[str, list[float]]] = {}
    for one in cases:
        heads = ours(one, scorers, store, one.name)
        for name, scorer in scorers.items():
            x, labels = kept(one.later[name], store)
            losses = {
                "ours": our_loss(scorer, one.later[name], heads[name], store),
                "the shared head alone": our_loss(scorer, one.later[name], None, store),
                "the authors' way": float(
                    cross_entropy(
                        authors_way(one.known[name], kept_rows, x.shape[1], seed)(x), labels
                    ).detach()
                ),
                "the fairer rival": float(
                    cross_entropy(fairer_rival(one.known[name], store, seed)(x), labels).detach()
                ),
                "the share of ones": share_loss(pairs(one.known[name])[2], labels),
            }
            if chances:
                losses["the best possible"] = best_loss(one.later[name], name, chances)
            for way, loss in losses.items():
                found.setdefault(way, {}).setdefault(name, []).append(loss)
    return {
        way: {name: statistics.mean(values) for name, values in by_scorer.items()}
        for way, by_scorer in found.items()
    }


def our_loss(scorer: Scorer, groups: Groups, head: Head | None, store: FeatureCache) -> float:
    table = make_training_set(store, scorer.interaction, groups, rule=RULE, loss=scorer.loss)
    assert table.groups.target is not None
    scores, mask = scorer.score(table.groups, [head] * len(table)), table.groups.mask
    return float(binary_cross_entropy_with_logits(scores[mask], table.groups.target[mask]))


def share_loss(known: Tensor, labels: Tensor) -> float:
    """What knowing only how often this user's pairs are 1 costs."""
    share = (known.sum() + 1) / (len(known) + 2)
    return float(
        binary_cross_entropy_with_logits(torch.logit(share).expand(len(labels)), labels.float())
    )


def best_loss(
    groups: Groups, name: str, chances: dict[tuple[str, str], tuple[float, ...]]
) -> float:
    odds = torch.tensor([chance for group in groups for chance in chances[name, group.query]])
    return float(nn.functional.binary_cross_entropy(odds, pairs(groups)[2].float()))


# ---- the report


def report(
    given: argparse.Namespace,
    settings: Settings,
    cases: Sequence[Case],
    times: dict[str, list[float]],
    quality: dict[str, dict[str, float]],
    learned_in: float,
) -> None:
    rows = {name: summary(values) for name, values in times.items()}
    ways = "ours, features kept", "ours, the encoder's pass included", "the authors' way"
    own, whole, theirs = (rows[way]["median_ms"] for way in ways)
    known = cases[0].known
    sizes = {name: [len(known[name]), len(pairs(known[name])[2])] for name in SCORERS}
    ratios = {"features_kept": theirs / own, "with_our_one_pass": theirs / whole}
    title = "held-out log-loss per pair"
    lines = [
        f"{settings.features} features, {settings.head} heads; base learned in {learned_in:.1f} s",
        f"groups and pairs of the timed user: {sizes}",
        *(show(name, row) for name, row in rows.items()),
        (
            f"the authors' way takes {theirs / own:.0f} times as long; with our one encoder pass"
            f" included {theirs / whole:.1f} times"
        ),
        f"{title:<40} {'reranker':>9} {'adapter':>9}   ({len(cases)} new users)",
        *(f"{way:<40} {by['reranker']:9.3f} {by['adapter']:9.3f}" for way, by in quality.items()),
    ]
    given.data = str(given.data) if given.data else None
    result: dict[str, Any] = {
        "timed_user": sizes,
        "new_users": len(cases),
        "learned_in_s": learned_in,
        "times": rows,
        "ratios": ratios,
        "log_loss": quality,
    }
    finish(given, result, lines, limits_of(own, theirs, quality))


def limits_of(own: float, theirs: float, quality: dict[str, dict[str, float]]) -> list[Limit]:
    limits = [
        Limit("both heads of a new user, features kept, ms", own, 100.0),
        Limit("the authors' way / ours, features kept", theirs / own, 50.0, at_least=True),
    ]
    for name in SCORERS:
        less = quality["ours"][name] - quality["the authors' way"][name]
        limits.append(Limit(f"log-loss of the {name}, ours - the authors'", less, 0.0))
    return limits


if __name__ == "__main__":
    main()
