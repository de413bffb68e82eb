"""Whether scoring 20 candidates for one user takes equally long with few and with very many users,
and how much memory a user needs.

    python benchmarks/scoring_users.py [--runs 60] [--seed 0] [--json]

Each run scores for random users, so that many users do not fit into the processor's cache; both
sizes run alternately. `cross` features at H = 768. Exits with 1 if scoring is more than 1.2 times
as slow with many users, or if a user needs more memory than documented. Memory is that of the
heads; the growth of the process is shown beside it.
"""

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Limit, finish, in_turn, options, show, summary

from hydra_llm.model.heads import Head, make_head
from hydra_llm.model.heads.kernel import pack
from hydra_llm.model.interactions import Cross, Groups
from hydra_llm.model.scorer import Scorer

H, CANDIDATES, RANK, KERNEL_PAIRS, CALLS = 768, 20, 16, 4, 20
"""Width, candidates, K, pairs per `kernel` head, calls per timed run."""
KINDS = {
    "linear": (100, 100_000),
    "lowrank": (100, 100_000),
    "kernel": (100, 100_000),
    "bias": (100, 100_000),
    "mlp": (100, 1_000),
}
"""Numbers of users that are compared; 1,000 `mlp` heads are 2.4 GB."""
EXPECTED_NUMBERS = {
    "linear": 769,
    "lowrank": RANK,
    "kernel": 2 + KERNEL_PAIRS * (H + 1),
    "bias": 1,
    "mlp": 592_130,
}
"""Expected 32-bit numbers per user (`kernel`: φ and one residual for each pair)."""
Heads = dict[str, Head]


def main() -> None:
    args = options(__doc__, runs=60).parse_args()
    torch.manual_seed(args.seed)
    rows = [measure(kind, args) for kind in KINDS]
    limits = [limit for row in rows for limit in limits_of(row)]
    finish(args, {"rows": rows}, [line for row in rows for line in report_lines(row)], limits)


def measure(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    sizes, grown = KINDS[kind], []
    banks: dict[int, tuple[Scorer, Heads]] = {}
    for users in sizes:
        before = resident()
        banks[users] = make_bank(kind, users)
        grown.append(resident() - before)
    jobs: dict[str, Callable[[], object]] = {
        str(users): scoring(*bank, args.seed) for users, bank in banks.items()
    }
    times = {
        name: [value / CALLS for value in values]
        for name, values in in_turn(jobs, args.runs, warm_up=3).items()
    }
    small, large = (summary(times[str(users)]) for users in sizes)
    small_bytes, large_bytes = (number_bytes(banks[users][1]) for users in sizes)
    bytes_per_user = (large_bytes - small_bytes) / (sizes[1] - sizes[0])
    return {
        "head": kind,
        "users": sizes,
        "small": small,
        "large": large,
        "ratio": large["median_ms"] / small["median_ms"],
        "numbers_per_user": bytes_per_user / 4,
        "numbers_expected": EXPECTED_NUMBERS[kind],
        "process_bytes_per_user": grown[1] / sizes[1],
    }


def make_bank(kind: str, users: int) -> tuple[Scorer, Heads]:
    """A scorer, and a head of random numbers for each user."""
    interaction = Cross(H)
    scorer = Scorer(interaction, make_head(kind, interaction, rank=RANK), ())
    size = scorer.head.numbers_per_user
    lengths = np.full(
        users, size or len(pack(torch.zeros(KERNEL_PAIRS, H), torch.zeros(KERNEL_PAIRS, 1)))
    )
    draw = np.random.default_rng(0)
    numbers = draw.standard_normal(int(lengths.sum()), dtype=np.float32)
    if size is None:  # the header of each `kernel` head
        starts = np.cumsum(lengths) - lengths
        numbers[starts], numbers[starts + 1] = H, 1
    ends = np.cumsum(lengths).tolist()
    places = enumerate(zip([0, *ends[:-1]], ends, strict=True))
    heads = {f"user {i}": Head(numbers[start:end]) for i, (start, end) in places}
    return scorer.eval(), heads


def scoring(scorer: Scorer, heads: Heads, seed: int) -> Callable[[], object]:
    rng, users = random.Random(seed), list(heads)
    groups = Groups(
        torch.zeros(1, 0),
        torch.randn(1, CANDIDATES, H),
        torch.zeros(1, CANDIDATES, 0),
        torch.ones(1, CANDIDATES, dtype=torch.bool),
    )

    def run() -> None:
        for _ in range(CALLS):
            scorer.score(groups, [heads[rng.choice(users)]])

    return run


def number_bytes(heads: Heads) -> int:
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


def report_lines(row: dict[str, Any]) -> list[str]:
    small, large = row["users"]
    size = (
        f"{row['numbers_per_user']:,.0f} numbers per user"
        f" ({row['numbers_per_user'] * 4 / 1024:,.1f} KiB)"
    )
    return [
        show(f"{row['head']}, {small:,} users", row["small"], digits=3),
        show(
            f"{row['head']}, {large:,} users", row["large"], f"  ratio {row['ratio']:.2f}", digits=3
        ),
        f"    {size}; the process grew by {row['process_bytes_per_user'] / 1024:,.1f} KiB per user",
    ]


if __name__ == "__main__":
    main()
