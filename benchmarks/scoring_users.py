"""Whether scoring 20 candidates for one user takes equally long with few and with very many users,
and how much memory a user takes.

    python benchmarks/scoring_users.py [--runs 60] [--seed 0] [--json]

Each run scores for random users, so that many users do not fit the processor's cache; both sizes
are run in turn. `cross` features at H = 768. Exits with 1 if many users are more than 1.2 times as
slow, or if a user takes more memory than documented. Memory is that of the heads, and beside it the
growth of the process.
"""

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Limit, finish, in_turn, options, show, summary

from hydra_llm.model.heads import HeadMatrix, make_head
from hydra_llm.model.heads.kernel import pack
from hydra_llm.model.interactions import Cross, Groups
from hydra_llm.model.scorer import Scorer

H, CANDIDATES, RANK, PAIRS, CALLS = 768, 20, 16, 4, 20
"""Width, candidates, K, kept pairs of a user of `kernel`, calls within one timed run."""
KINDS = {
    "linear": (100, 100_000),
    "lowrank": (100, 100_000),
    "kernel": (100, 100_000),
    "bias": (100, 100_000),
    "mlp": (100, 1_000),
}
"""Users in the small and in the large bank; 1,000 `mlp` heads are 2.4 GB."""
NUMBERS = {"linear": 769, "lowrank": RANK, "kernel": 2 + PAIRS * (H + 1), "bias": 1, "mlp": 592_130}
"""Expected 32-bit numbers of one user (`kernel`: φ and one residual for each kept pair)."""


def main() -> None:
    given = options(__doc__, runs=60).parse_args()
    torch.manual_seed(given.seed)
    rows = [measure(kind, given) for kind in KINDS]
    limits = [limit for row in rows for limit in limits_of(row)]
    finish(given, {"rows": rows}, [line for row in rows for line in lines_of(row)], limits)


def measure(kind: str, given: argparse.Namespace) -> dict[str, Any]:
    sizes, grown = KINDS[kind], []
    filled_ones: dict[int, tuple[Scorer, HeadMatrix]] = {}
    for users in sizes:
        before = resident()
        filled_ones[users] = filled(kind, users)
        grown.append(resident() - before)
    jobs: dict[str, Callable[[], object]] = {
        str(users): scoring(*each, given.seed) for users, each in filled_ones.items()
    }
    times = {
        name: [value / CALLS for value in values]
        for name, values in in_turn(jobs, given.runs, warm_up=3).items()
    }
    small, large = (summary(times[str(users)]) for users in sizes)
    small_bytes, large_bytes = (number_bytes(filled_ones[users][1]) for users in sizes)
    weight = (large_bytes - small_bytes) / (sizes[1] - sizes[0])
    return {
        "head": kind,
        "users": sizes,
        "small": small,
        "large": large,
        "ratio": large["median_ms"] / small["median_ms"],
        "numbers_per_user": weight / 4,
        "numbers_expected": NUMBERS[kind],
        "process_bytes_per_user": grown[1] / sizes[1],
    }


def filled(kind: str, users: int) -> tuple[Scorer, HeadMatrix]:
    """A scorer, and a head of random numbers for each user."""
    interaction = Cross(H)
    scorer = Scorer(interaction, make_head(kind, interaction, rank=RANK), ())
    size = scorer.head.numbers_per_user
    lengths = np.full(users, size or len(pack(torch.zeros(PAIRS, H), torch.zeros(PAIRS, 1))))
    draw = np.random.default_rng(0)
    numbers = draw.standard_normal(int(lengths.sum()), dtype=np.float32)
    if size is None:  # what each head begins with
        starts = np.cumsum(lengths) - lengths
        numbers[starts], numbers[starts + 1] = H, 1
    names = {f"user {i}": i for i in range(users)}
    heads = HeadMatrix(names, numbers, np.cumsum(lengths), np.zeros((users, 2)))
    return scorer.eval(), heads


def scoring(scorer: Scorer, heads: HeadMatrix, seed: int) -> Callable[[], object]:
    lots, users = random.Random(seed), list(heads)
    groups = Groups(
        torch.zeros(1, 0),
        torch.randn(1, CANDIDATES, H),
        torch.zeros(1, CANDIDATES, 0),
        torch.ones(1, CANDIDATES, dtype=torch.bool),
    )

    def run() -> None:
        for _ in range(CALLS):
            scorer.score(groups, [heads[lots.choice(users)]])

    return run


def number_bytes(heads: HeadMatrix) -> int:
    return sum(len(head.numbers) * 4 for head in heads.values())


def resident() -> int:
    """Bytes of this process in memory (Linux); 0 where that cannot be read."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * 4096 if statm.exists() else 0


def limits_of(row: dict[str, Any]) -> list[Limit]:
    low, high = (f"{users:,}" for users in row["users"])
    return [
        Limit(f"{row['head']}: time with {high} users / with {low}", row["ratio"], 1.2),
        Limit(
            f"{row['head']}: numbers per user / expected",
            row["numbers_per_user"] / row["numbers_expected"],
            1.0,
        ),
    ]


def lines_of(row: dict[str, Any]) -> list[str]:
    small, large = row["users"]
    weight = (
        f"{row['numbers_per_user']:,.0f} numbers a user ({row['numbers_per_user'] * 4 / 1024:,.1f}"
        " KiB)"
    )
    return [
        show(f"{row['head']}, {small:,} users", row["small"], digits=3),
        show(
            f"{row['head']}, {large:,} users", row["large"], f"  ratio {row['ratio']:.2f}", digits=3
        ),
        f"    {weight}; the process grew by {row['process_bytes_per_user'] / 1024:,.1f} KiB a user",
    ]


if __name__ == "__main__":
    main()
