"""Time to fit both heads of a new user on 50 queries with 8 pairs each, and held-out loss, compared
with the published method.

    python benchmarks/fit_user.py [--data FOLDER] [--features tower|cross] [--users 20] [--new 3]
    [--runs 2] [--seed 0] [--json]

    ours        linear heads with the prior; base and hyperparameters from other users
    published   implemented from the paper: a randomly initialized MLP head (H×H, tanh, H→2) on the
                frozen encoder, which reads every pair again in every epoch; 2 epochs, batch 64,
                learning rate 2e-5, AdamW with weight decay 0.01, cross-entropy
    baseline    the same MLP head on cached features; learning rate 1e-3, at most 200 epochs, early
                stopping on the user's last fifth

Encoder, groups and labels are the same for all. The held-out log-loss per pair is over the new
users' later groups. Exits with 1 if a limit is missed.
"""

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
from hydra_llm.training.dataset import LabelledGroup, make_training_set

KNOWN, HELD_OUT, TRAINING_GROUPS = 50, 25, 12
"""A new user's groups for fitting and for evaluation; groups of each training user."""
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
    parser.add_argument("--data", type=Path, help="folder of a data set; default: simulated users")
    parser.add_argument(
        "--features",
        choices=("tower", "cross"),
        default="tower",
        help="features of `ours`; the published method uses cross",
    )
    parser.add_argument("--users", type=int, default=20, help="training users")
    parser.add_argument("--new", type=int, default=3, help="new users")
    args = parser.parse_args()
    warnings.filterwarnings(
        "ignore", message="std"
    )  # std of no side features: the published method has none, so `ours` has none here
    settings = load_settings(loss="binary", features=args.features, seed=args.seed)
    encoder = open_encoder("minilm")
    store = FeatureCache(encoder)
    training, cases, probabilities = make_cases(args, store)
    start = time.perf_counter()
    scorers = {
        name: learn_scorer(store, settings, CLASSIFY, name, getattr(training, name), (), RULE)[0]
        for name in SCORERS
    }
    learn_seconds = time.perf_counter() - start
    times = time_variants(cases[0], scorers, encoder, store, args)
    quality = evaluate(cases, scorers, store, probabilities, args.seed)
    report(args, settings, cases, times, quality, learn_seconds)


# ---- data


def make_cases(
    args: argparse.Namespace, store: FeatureCache
) -> tuple[Rows, list[Case], dict[tuple[str, str], tuple[float, ...]]]:
    if args.data is None:
        training = simulated_rows(
            simulate_users(args.users, args.seed, "old"), TRAINING_GROUPS, args.seed
        )
        new = simulated_rows(
            simulate_users(args.new, args.seed, "new"), KNOWN + HELD_OUT, args.seed
        )
    else:
        data = open_data(args.data)
        longest = sorted(data.users("test"), key=lambda user: -len(data.answered(user)))[: args.new]
        training = real_rows(
            data, data.users("train")[: args.users], store, TRAINING_GROUPS, args.seed
        )
        new = real_rows(data, longest, store, KNOWN + HELD_OUT, args.seed)
    names = list(dict.fromkeys(group.user for group in new.adapter))
    return training, [make_case(new, name) for name in names], new.probabilities


def make_case(rows: Rows, user: str) -> Case:
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


# ---- methods


def ours(case: Case, scorers: dict[str, Scorer], store: FeatureCache, user: str) -> dict[str, Head]:
    """The user's head of each scorer."""
    heads = {}
    for name, scorer in scorers.items():
        groups = [replace(group, user=user) for group in case.known[name]]
        data = make_training_set(store, scorer.interaction, groups, rule=RULE, loss=scorer.loss)
        heads[name] = fit_heads(scorer, data, [user])[user]
    return heads


def random_head(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2))


Read = Callable[[list[str], list[str]], Tensor]
"""Texts of pairs → vectors [B, H]: by the frozen encoder or from the cache."""


def published_head(groups: Groups, read: Read, width: int, seed: int) -> nn.Sequential:
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


def tuned_baseline(groups: Groups, store: FeatureCache, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    cut = len(groups) - max(1, len(groups) // 5)
    (x, labels), (x_last, last) = (
        cached_pairs(groups[:cut], store),
        cached_pairs(groups[cut:], store),
    )
    head = random_head(x.shape[1])
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.01)
    best, best_loss = copy.deepcopy(head.state_dict()), float("inf")
    for _ in range(200):
        for batch in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            cross_entropy(head(x[batch]), labels[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            held_out_loss = float(cross_entropy(head(x_last), last))
        if held_out_loss < best_loss:
            best, best_loss = copy.deepcopy(head.state_dict()), held_out_loss
    head.load_state_dict(best)
    return head


def cached_pairs(groups: Groups, store: FeatureCache) -> tuple[Tensor, Tensor]:
    """Cached vectors [B, H] and labels [B] of all pairs."""
    left, right, labels = pairs(groups)
    return torch.from_numpy(store.pairs(left, right)), labels


# ---- time


def time_variants(
    case: Case,
    scorers: dict[str, Scorer],
    encoder: Encoder,
    store: FeatureCache,
    args: argparse.Namespace,
) -> dict[str, list[float]]:
    new_names = (f"another {i}" for i in count())
    slow: dict[str, Callable[[], object]] = {
        "published": lambda: [
            published_head(groups, encoder.forward_pairs, encoder.width, args.seed)
            for groups in case.known.values()
        ],
        "ours, with encoding": lambda: ours(case, scorers, FeatureCache(encoder), next(new_names)),
        "baseline, cached features": lambda: [
            tuned_baseline(groups, store, args.seed) for groups in case.known.values()
        ],
    }
    for groups in case.known.values():
        cached_pairs(groups, store)
    times = in_turn(slow, args.runs, warm_up=0)  # the look-ups above warmed up the encoder
    times["ours, cached features"] = in_turn(
        {"": lambda: ours(case, scorers, store, next(new_names))}, 10 * args.runs, warm_up=5
    )[""]
    for name, scorer in scorers.items():
        table = make_training_set(
            store, scorer.interaction, case.known[name], rule=RULE, loss=scorer.loss
        )
        steps: dict[str, Callable[[], object]] = {
            f"  {name}: look up features": lambda n=name, s=scorer: make_training_set(
                store, s.interaction, case.known[n], rule=RULE, loss=s.loss
            ),  # type: ignore[misc]
            f"  {name}: fit the head": lambda s=scorer, t=table: fit_heads(s, t, [case.name]),  # type: ignore[misc]
        }
        times |= in_turn(steps, 10 * args.runs)
    return times


# ---- quality


def evaluate(
    cases: Sequence[Case],
    scorers: dict[str, Scorer],
    store: FeatureCache,
    probabilities: dict[tuple[str, str], tuple[float, ...]],
    seed: int,
) -> dict[str, dict[str, float]]:
    """Held-out log-loss per pair by method and scorer, the mean over new users."""
    read_cached: Read = lambda left, right: torch.from_numpy(store.pairs(left, right))  # noqa: E731
    held_out_loss: dict[str, dict[str, list[float]]] = {}
    for case in cases:
        heads = ours(case, scorers, store, case.name)
        for name, scorer in scorers.items():
            x, labels = cached_pairs(case.later[name], store)
            losses = {
                "ours": our_loss(scorer, case.later[name], heads[name], store),
                "shared head": our_loss(scorer, case.later[name], None, store),
                "published": float(
                    cross_entropy(
                        published_head(case.known[name], read_cached, x.shape[1], seed)(x), labels
                    ).detach()
                ),
                "baseline": float(
                    cross_entropy(tuned_baseline(case.known[name], store, seed)(x), labels).detach()
                ),
                "constant (share of positives)": share_loss(pairs(case.known[name])[2], labels),
            }
            if probabilities:
                losses["best possible"] = best_loss(case.later[name], name, probabilities)
            for variant, loss in losses.items():
                held_out_loss.setdefault(variant, {}).setdefault(name, []).append(loss)
    return {
        variant: {name: statistics.mean(values) for name, values in by_scorer.items()}
        for variant, by_scorer in held_out_loss.items()
    }


def our_loss(scorer: Scorer, groups: Groups, head: Head | None, store: FeatureCache) -> float:
    table = make_training_set(store, scorer.interaction, groups, rule=RULE, loss=scorer.loss)
    assert table.groups.target is not None
    scores, mask = scorer.score(table.groups, [head] * len(table)), table.groups.mask
    return float(binary_cross_entropy_with_logits(scores[mask], table.groups.target[mask]))


def share_loss(known: Tensor, labels: Tensor) -> float:
    """The log-loss of a constant prediction: the share of positives among the known pairs."""
    share = (known.sum() + 1) / (len(known) + 2)
    return float(
        binary_cross_entropy_with_logits(torch.logit(share).expand(len(labels)), labels.float())
    )


def best_loss(
    groups: Groups, name: str, probabilities: dict[tuple[str, str], tuple[float, ...]]
) -> float:
    predicted = torch.tensor(
        [chance for group in groups for chance in probabilities[name, group.query]]
    )
    return float(nn.functional.binary_cross_entropy(predicted, pairs(groups)[2].float()))


# ---- report


def report(
    args: argparse.Namespace,
    settings: Settings,
    cases: Sequence[Case],
    times: dict[str, list[float]],
    quality: dict[str, dict[str, float]],
    learn_seconds: float,
) -> None:
    rows = {name: summary(values) for name, values in times.items()}
    variants = "ours, cached features", "ours, with encoding", "published"
    ours_ms, ours_encoding_ms, published_ms = (rows[variant]["median_ms"] for variant in variants)
    known = cases[0].known
    sizes = {name: [len(known[name]), len(pairs(known[name])[2])] for name in SCORERS}
    ratios = {
        "cached_features": published_ms / ours_ms,
        "with_encoding": published_ms / ours_encoding_ms,
    }
    title = "held-out log-loss per pair"
    lines = [
        f"{settings.features} features, {settings.head} heads; trained in {learn_seconds:.1f} s",
        f"groups and pairs of the timed user: {sizes}",
        *(show(name, row) for name, row in rows.items()),
        (
            f"time of published / ours: {published_ms / ours_ms:.0f} with cached features,"
            f" {published_ms / ours_encoding_ms:.1f} with encoding"
        ),
        f"{title:<40} {'reranker':>9} {'adapter':>9}   ({len(cases)} new users)",
        *(
            f"{variant:<40} {by['reranker']:9.3f} {by['adapter']:9.3f}"
            for variant, by in quality.items()
        ),
    ]
    args.data = str(args.data) if args.data else None
    result: dict[str, Any] = {
        "timed_user": sizes,
        "new_users": len(cases),
        "learn_seconds": learn_seconds,
        "times": rows,
        "ratios": ratios,
        "log_loss": quality,
    }
    finish(args, result, lines, limits_of(ours_ms, published_ms, quality))


def limits_of(
    ours_ms: float, published_ms: float, quality: dict[str, dict[str, float]]
) -> list[Limit]:
    limits = [
        Limit("both heads of a new user, cached features, ms", ours_ms, 100.0),
        Limit("published / ours with cached features", published_ms / ours_ms, 50.0, at_least=True),
    ]
    for name in SCORERS:
        difference = quality["ours"][name] - quality["published"][name]
        limits.append(Limit(f"log-loss of the {name}, ours - published", difference, 0.0))
    return limits


if __name__ == "__main__":
    main()
