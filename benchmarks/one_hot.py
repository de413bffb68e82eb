"""Selecting one user's numbers by a one-hot product over all users, as the paper's authors do,
beside a look-up in a bundle's file of users and in memory.

    python benchmarks/one_hot.py [--runs 30] [--folder FOLDER] [--json]

A store of users by itself is measured by scale.py. Ratios vary with the load of the machine.
"""

import argparse
import random
import tempfile
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import finish, in_turn, options, show, summary
from scale_steps import H, Made

from hydra_llm.model.head import Head
from hydra_llm.model.heads.base import gather
from hydra_llm.model.users_file import UsersFile

PUBLISHED = 592_130  # numbers per user and scorer of the published head: H × H + H + 2 × H + 2
ONE_HOT_USERS = (100, 1_000, 10_000)
BLOCK = 400_000_000  # numbers of the matrix of all users that are in memory at once


def main() -> None:
    parser = options(__doc__, runs=30)
    parser.add_argument("--folder", type=Path, help="default: a temporary one")
    args = parser.parse_args()
    rows = [one_hot(*case, args) for case in one_hot_cases()]
    finish(args, {"one_hot": rows}, report_lines(rows), [])


def one_hot_cases() -> list[tuple[int, int]]:
    return [(users, size) for size in (H + 1, PUBLISHED) for users in ONE_HOT_USERS]


def one_hot(users: int, size: int, args: argparse.Namespace) -> dict[str, Any]:
    """One user's numbers [1, size] by a one-hot vector [1, users] times the matrix [users, size],
    and by a look-up in the file; where the matrix would not fit, by blocks of its columns.
    """
    torch.set_num_threads(1)
    columns = min(size, BLOCK // users)
    blocks = -(-size // columns)
    matrix = torch.randn(users, columns)
    rng, kept = random.Random(args.seed), min(users, 200 if size == PUBLISHED else users)
    draw = np.random.default_rng(args.seed)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        made = Made(kept, lambda _: Head(draw.standard_normal(size, dtype=np.float32)))
        UsersFile.create(Path(folder) / "users", {"adapter": made}, {})
        with closing(UsersFile(Path(folder) / "users")) as file:
            heads = file.heads("adapter")

            def product() -> None:
                chosen = torch.zeros(1, users)
                chosen[0, rng.randrange(users)] = 1
                for _ in range(blocks):
                    chosen @ matrix

            def look_up() -> None:
                gather([heads[f"user-{rng.randrange(kept):07d}"]], size)

            def in_memory() -> None:
                gather([Head(matrix[rng.randrange(users)].numpy())] * blocks, columns)

            jobs = {"product": product, "look_up": look_up, "in_memory": in_memory}
            runs = args.runs if users * size < 10**9 else max(3, args.runs // 6)
            times = {name: summary(ms) for name, ms in in_turn(jobs, runs, warm_up=3).items()}
    product_ms = times["product"]["median_ms"]
    ratios = {"ratio": product_ms / times["look_up"]["median_ms"]}
    ratios["ratio_in_memory"] = product_ms / times["in_memory"]["median_ms"]
    told = {"users": users, "numbers": size, "matrix_gb": users * size * 4 / 1e9, "blocks": blocks}
    return {**told, **times, **ratios, "users_in_file": kept}


def report_lines(rows: list[Mapping[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        blocks = f", {row['blocks']} blocks of columns" if row["blocks"] > 1 else ""
        lines += [
            f"{row['users']:,} users of {row['numbers']:,} numbers: one-hot / look-up in the file ="
            f" {row['ratio']:,.1f}, / row of a matrix in memory = {row['ratio_in_memory']:,.1f}"
            f" (matrix of {row['matrix_gb']:.2f} GB{blocks})",
            show("    one-hot product", row["product"], digits=4),
            show("    look-up in the file", row["look_up"], digits=4),
        ]
    return lines


if __name__ == "__main__":
    main()
