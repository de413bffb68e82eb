"""Time to fit the heads of many new users on kept features, and how far users who are fitted
together are from each one alone.

    python benchmarks/fit_many.py [--users 10000] [--rows 50] [--alone 20] [--seed 0] [--json]

Users have unlike numbers of rows (labelled queries), half to one and a half times --rows, drawn at
random; features and labels are random too: a time does not depend on what they mean. Fitted are a
reranker (bi-encoder features of ten records, width 128) and an adapter (features of 15 labels, 64
directions) with each kind of head in --heads, block by block as in `hydra-llm fit`; drawing is not
timed. `apart` is the largest difference of a number between users fitted together and alone;
`alone` is the time of these. Times are CPU seconds of all threads; the limit is for both scorers
with linear heads, at two cores. Exits with 1 if a limit is missed.
"""

import argparse
import time
from typing import Any

import numpy as np
import torch
from measure import Limit, finish, options
from torch.nn.functional import normalize, one_hot

from hydra_llm.model.heads import make_head
from hydra_llm.model.interactions import Groups, Interaction, LabelBilinear, Tower
from hydra_llm.model.scorer import Scorer
from hydra_llm.training.convex import fit_heads
from hydra_llm.training.dataset import TrainingSet
from hydra_llm.training.fitting import BLOCK_RECORDS

ENCODER, WIDTH, RECORDS, LABELS, DIRECTIONS, SIDE, RANK = 384, 128, 10, 15, 64, 6, 16
SCORERS = {"reranker": RECORDS, "adapter": LABELS}
CORES, LIMIT_SECONDS = 2, 60.0


def main() -> None:
    parser = options(__doc__, runs=1)
    parser.add_argument("--users", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=50, help="mean number of rows of a user")
    parser.add_argument("--alone", type=int, default=20, help="users who are fitted alone too")
    parser.add_argument("--heads", nargs="+", default=["linear", "lowrank"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measured(name, head, args) for head in args.heads for name in SCORERS]
    lines = [
        f"{row['scorer']:<9} {row['head']:<8} {row['users']:>7,} users {row['rows']:>9,} rows"
        f" {row['cpu_s']:8.1f} s CPU {row['ms_per_user']:7.2f} ms a user"
        f" {row['alone_ms']:7.2f} ms alone   apart {row['apart']:.1e}"
        for row in rows
    ]
    linear = sum(row["cpu_s"] for row in rows if row["head"] == "linear")
    limits = [
        Limit(f"both linear heads of {args.users:,} users, s", linear / CORES, LIMIT_SECONDS),
        Limit("largest difference", max(row["apart"] for row in rows), 1e-6),
    ]
    finish(args, {"rows": rows}, lines, limits)


def measured(name: str, head: str, args: argparse.Namespace) -> dict[str, Any]:
    """A scorer's heads for all users, block by block; the first block's users alone too."""
    draw = torch.Generator().manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    sizes = rng.integers(args.rows // 2, args.rows * 3 // 2 + 1, args.users)
    per_block = max(1, BLOCK_RECORDS // args.rows)
    scorer, apart, alone, spent, wall = None, 0.0, 0.0, 0.0, 0.0
    for start in range(0, args.users, per_block):
        data = drawn(name, sizes[start : start + per_block].tolist(), start, draw)
        scorer = scorer or blank(name, head, data)
        cpu, clock = time.process_time(), time.perf_counter()
        heads = fit_heads(scorer, data, data.names())
        spent, wall = spent + time.process_time() - cpu, wall + time.perf_counter() - clock
        if start == 0:
            some = data.names()[: args.alone]
            sets = [data.of([user]) for user in some]
            cpu = time.process_time()
            own = [fit_heads(scorer, one, one.names()) for one in sets]
            alone = (time.process_time() - cpu) / len(some)
            apart = max(
                float(np.abs(one[user].numbers - heads[user].numbers).max())
                for user, one in zip(some, own, strict=True)
            )
    return {
        "scorer": name,
        "head": head,
        "users": args.users,
        "rows": int(sizes.sum()),
        "cpu_s": spent,
        "wall_s": wall,
        "ms_per_user": 1000 * spent / args.users,
        "alone_ms": 1000 * alone,
        "apart": apart,
    }


def drawn(name: str, sizes: list[int], start: int, draw: torch.Generator) -> TrainingSet:
    """Users with so many rows each."""
    count, candidates = sum(sizes), SCORERS[name]
    left = normalize(torch.randn(count, ENCODER, generator=draw), dim=-1)
    right = None
    if name == "reranker":
        right = normalize(torch.randn(count, candidates, ENCODER, generator=draw), dim=-1)
    mask = torch.ones(count, candidates, dtype=torch.bool)
    best = torch.randint(0, candidates, (count,), generator=draw) % 3
    target = one_hot(best, candidates).float()
    side = torch.randn(count, candidates, SIDE, generator=draw)
    groups = Groups(left, right, side, mask, target)
    users = tuple(f"u{start + i}" for i, size in enumerate(sizes) for _ in range(size))
    places = torch.cat([torch.arange(size) for size in sizes])
    return TrainingSet(groups, users, places, torch.zeros(count, dtype=torch.bool), target)


def blank(name: str, head: str, data: TrainingSet) -> Scorer:
    """A scorer with a random shared head, and for `lowrank` a random basis."""
    interaction: Interaction = Tower(ENCODER, WIDTH)
    if name == "adapter":
        interaction = LabelBilinear(ENCODER, LABELS, DIRECTIONS)
    interaction.prepare(data.groups)
    kind = make_head(head, interaction, rank=RANK)
    draw = torch.Generator().manual_seed(1)
    for value in [*kind.parameters(), *kind.buffers()]:
        value.data.copy_(0.1 * torch.randn(value.shape, generator=draw))
    return Scorer(interaction, kind, [f"side{n}" for n in range(SIDE)])


if __name__ == "__main__":
    main()
