"""One epoch of gradient training by one process and by two that share its steps.

    python benchmarks/processes.py [--runs 5] [--groups 64] [--users 16] [--batch 64] [--seed 0]
    [--json]

tuned: MiniLM (22 million weights) fine-tuned on pairs of texts. mlp: users' heads on frozen vectors
of its width (148,610 numbers each). Ways: one process with one thread; one with two threads, which
is what a single process does on two cores; two processes with one thread each, as
`accelerate launch --multi_gpu --num_processes 2` starts them. They run alternately. The second
epoch of each run is timed in the first process: starting and sending the training set are left out.
Two idle cores are needed. There is no limit: the ratios say when launching pays.
"""

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import time

import torch
from measure import finish, options, show, summary
from simulated_users import LABELS, words

from hydra_llm import ranks
from hydra_llm.model.encoder import open_encoder
from hydra_llm.model.heads import SGDConfig, make_head
from hydra_llm.model.interactions import Cross, Groups
from hydra_llm.model.scorer import Scorer
from hydra_llm.training.dataset import LabelledGroup, TrainingSet
from hydra_llm.training.sgd import TextSource, train_jointly

WAYS = {"1 process": (1, 1), "1 process, 2 threads": (1, 2), "2 processes": (2, 1)}
"""Name → processes, and threads of each."""
CANDIDATES, WIDTH = 8, 384


def main() -> None:
    parser = options(__doc__, runs=5)
    parser.add_argument("--groups", type=int, default=64, help="of 8 pairs each")
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64, help="pairs of a step")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)  # one of the ways
    args = parser.parse_args()
    if args.work:
        work(args)
        return
    times: dict[str, dict[str, list[float]]] = {"tuned": {}, "mlp": {}}
    for _ in range(args.runs):
        for way in WAYS:
            for part, seconds in run(way, args).items():
                times[part].setdefault(way, []).append(1000 * seconds)
    rows = [
        {"training": part, "way": way, **summary(own), "ratio": ratio(own, ways["1 process"])}
        for part, ways in times.items()
        for way, own in ways.items()
    ]
    lines = [
        show(f"{row['training']}, {row['way']}", row, f"; of 1 process: {row['ratio']:.2f}")
        for row in rows
    ]
    finish(args, {"rows": rows}, lines, [])


def ratio(own: list[float], base: list[float]) -> float:
    """The median of the ratios of runs that were made one after the other."""
    ratios = torch.tensor([one / other for one, other in zip(own, base, strict=True)])
    return float(ratios.median())


def run(way: str, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of an epoch of each training."""
    count, threads = WAYS[way]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, "--work", "--seed", str(args.seed)]
    for name in ("groups", "users", "batch"):
        command += [f"--{name}", str(getattr(args, name))]
    places = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    named = {**places, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": threads}
    started = []
    for rank in range(count):
        own = {name: str(value) for name, value in {**named, "RANK": rank}.items()}
        own = {**os.environ, **own, "LOCAL_RANK": str(rank)}
        started.append(subprocess.Popen(command, env=own, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"{way}: a process failed")
    seconds: dict[str, float] = json.loads(outputs[0])
    return seconds


def work(args: argparse.Namespace) -> None:
    """Both trainings, in each process of a way."""
    if ranks.follows():
        return
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with ranks.leading("local", steps=True, say=lambda line: None):
        config = SGDConfig(epochs=2, batch=args.batch, patience=0, seed=args.seed)
        data = training_set(args)
        encoder = open_encoder("minilm", max_length=64)
        source = TextSource(encoder, texts(args))
        print(
            json.dumps(
                {
                    "tuned": epoch_seconds(scorer("linear", data), data, config, source),
                    "mlp": epoch_seconds(scorer("mlp", data), data, config),
                }
            )
        )


def user_of(group: int, args: argparse.Namespace) -> str:
    return f"u{group * args.users // args.groups:04}"


def texts(args: argparse.Namespace) -> list[LabelledGroup]:
    draw = random.Random(args.seed)
    lefts = [words(draw.sample(LABELS, 2), 20, draw) for _ in range(args.groups)]
    rights = [[words([name], 10, draw) for name in LABELS[:CANDIDATES]] for _ in lefts]
    sides = torch.zeros(CANDIDATES, 0).numpy()
    gains = (1.0,) + (0.0,) * (CANDIDATES - 1)
    return [
        LabelledGroup(user_of(i, args), str(i), left, tuple(own), gains, sides, i)
        for i, (left, own) in enumerate(zip(lefts, rights, strict=True))
    ]


def training_set(args: argparse.Namespace) -> TrainingSet:
    """Vectors by lot, of which a time does not depend; the first candidate is the right one."""
    draw, count = torch.Generator().manual_seed(args.seed), args.groups
    vectors = torch.randn(count, CANDIDATES, WIDTH, generator=draw)
    mask = torch.ones(count, CANDIDATES, dtype=torch.bool)
    target = torch.zeros(count, CANDIDATES)
    target[:, 0] = 1.0
    groups = Groups(torch.zeros(count, 0), vectors, torch.zeros(count, CANDIDATES, 0), mask, target)
    users = tuple(user_of(i, args) for i in range(count))
    voted = torch.zeros(count, dtype=torch.bool)
    return TrainingSet(groups, users, torch.arange(count), voted, target)


def scorer(head: str, data: TrainingSet) -> Scorer:
    interaction = Cross(WIDTH)
    interaction.prepare(data.groups)
    return Scorer(interaction, make_head(head, interaction), ())


def epoch_seconds(
    scorer: Scorer, data: TrainingSet, config: SGDConfig, source: TextSource | None = None
) -> float:
    """Of the second epoch."""
    ends: list[float] = []

    def done(epoch: int, total: int) -> None:
        ends.append(time.perf_counter())

    train_jointly(scorer, data, config, source, done=done)
    return ends[1] - ends[0]


if __name__ == "__main__":
    main()
