"""What is not convex: the shared layer, a tuned encoder and `mlp` heads, trained together with the
users' heads by gradient (paper, section 3.1).

`convex.py` runs after it on the frozen features, except for `mlp` heads. Training is reproducible
by its seed, and stops and resumes: after every epoch all that it needs goes to a checkpoint. Knows
no tasks and no LLM.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hydra_llm.errors import BundleError
from hydra_llm.model.encoder import Encoder
from hydra_llm.model.heads import Head, SGDConfig
from hydra_llm.model.interactions import Groups
from hydra_llm.model.newton import losses
from hydra_llm.model.scorer import Scorer
from hydra_llm.training.calibration import calibrate, evaluate_held_out, evaluate_picks
from hydra_llm.training.convex import Heads, fit_heads, held_out_scores, standardise
from hydra_llm.training.dataset import TrainingSet, folds
from hydra_llm.training.report import FitReport
from hydra_llm.types import LabelledGroup

EpochDone = Callable[[int, int, float], None]  # epochs done, epochs, mean loss per group


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's default generator, which some of torch needs, for this block alone."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        yield


class TextSource:
    """Pairs' features with gradients, for a tuned encoder; without it the kept ones are used."""

    def __init__(self, encoder: Encoder, groups: Sequence[LabelledGroup]):
        self.encoder = encoder
        self.texts = [(group.left, group.rights) for group in groups]

    def fill(self, data: TrainingSet, index: Tensor) -> Groups:
        """The groups of `index` with fresh pair vectors [G, C, H]."""
        groups, texts = data.groups[index], [self.texts[i] for i in index.tolist()]
        lefts = [left for left, rights in texts for _ in rights]
        vectors = self.encoder.forward_pairs(
            lefts, [right for _, rights in texts for right in rights]
        )
        right = vectors.new_zeros(*groups.mask.shape, vectors.shape[-1])
        right = right.masked_scatter(groups.mask[..., None].expand_as(right), vectors)
        return replace(groups, right=right)


def train_jointly(
    scorer: Scorer,
    data: TrainingSet,
    config: SGDConfig,
    *,
    source: TextSource | None = None,
    checkpoint: Path | None = None,
    done: EpochDone | None = None,
) -> tuple[list[float], Heads]:
    """Train interaction, shared head, side weights, the users' heads and, with a source, the
    encoder. Returns the mean loss of each epoch, and the heads.

    With patience, a fifth of the users are held out to tell when to stop, and what was best for
    them is kept.
    """
    standardise(scorer, data)
    held = held_out_users(data, config)
    train = torch.tensor([i for i, user in enumerate(data.users) if user not in set(held)])
    watched = torch.tensor([i for user in held for i in data.index[user]], dtype=torch.long)
    watched = watched.sort().values
    state = _State(scorer, data, source, config)
    run = state.resume(checkpoint) or _Run(state.watch_loss(watched), state.values())
    while len(run.losses) < config.epochs and not run.exhausted(config.patience):
        run.losses.append(state.epoch(train, len(run.losses)))
        # without held-out users the last epoch is the best
        run.watch(state.watch_loss(watched) if held else -float(len(run.losses)), state)
        if checkpoint is not None:
            state.write(checkpoint, run)
        if done is not None:
            done(len(run.losses), config.epochs, run.losses[-1])
    state.put(run.best_values)
    return run.losses, state.heads()


def held_out_users(data: TrainingSet, config: SGDConfig) -> list[str]:
    """The fifth of the users from whom `train_jointly` does not learn; none without patience, or
    of fewer than five.
    """
    names = data.names()
    return folds(names, 5, config.seed)[0] if config.patience and len(names) >= 5 else []


class _State:
    """What training changes: parameters, the users' numbers, the optimizer; and its checkpoints."""

    def __init__(
        self, scorer: Scorer, data: TrainingSet, source: TextSource | None, config: SGDConfig
    ):
        self.scorer, self.data, self.source, self.config = scorer, data, source, config
        self.fingerprint = _fingerprint(data, config, scorer.loss)
        names = data.names()
        rows = {name: row for row, name in enumerate(names)}
        self.row = torch.tensor([rows[user] for user in data.users], dtype=torch.long)  # [G]
        self.numbers = torch.zeros(len(names), scorer.head.joint_numbers, requires_grad=True)
        decayed: list[Tensor] = list(scorer.interaction.parameters())
        if source is not None:
            decayed += list(source.encoder.parameters())
            source.encoder.train()
        free: list[Tensor] = [*scorer.head.joint_parameters(), scorer.side_weight]
        free += [self.numbers] if self.numbers.numel() else []
        self.tensors = decayed + free
        strong = {"params": decayed, "weight_decay": config.weight_decay}
        weak = {"params": free, "weight_decay": config.weight_decay / 10}
        self.optimizer = torch.optim.AdamW([strong, weak], lr=config.lr)
        self.counts = torch.bincount(self.row, minlength=len(names)).clamp_min(1)

    def groups(self, index: Tensor) -> Groups:
        return self.source.fill(self.data, index) if self.source else self.data.groups[index]

    def epoch(self, train: Tensor, epoch: int) -> float:
        """One pass; the mean loss per group."""
        seed, sizes = self.config.seed * 1000 + epoch, self.data.groups.mask.sum(-1)
        draw = torch.Generator().manual_seed(seed)
        order = train[torch.randperm(len(train), generator=draw)]
        total, count = 0.0, 0
        with seeded(seed):  # dropout of a tuned encoder
            for index in self.config.batches(sizes, order):
                loss = self.loss(index)
                self.step((loss + self.prior(self.row[index])) / len(index))
                total, count = total + float(loss.detach()), count + len(index)
        return total / max(1, count)

    def loss(self, index: Tensor) -> Tensor:
        """The summed loss of a batch under its users' heads."""
        groups, scorer, numbers = self.groups(index), self.scorer, self.numbers[self.row[index]]
        x = scorer.interaction(groups)
        own = scorer.head.score_numbers(scorer.interaction, x, numbers)
        return self._losses(own + scorer.side_score(groups), groups).sum()

    def _losses(self, scores: Tensor, groups: Groups) -> Tensor:
        assert groups.target is not None
        return losses(scores, groups.target, groups.mask, self.scorer.loss)

    @torch.no_grad()
    def watch_loss(self, index: Tensor) -> float:
        """Mean loss of the held-out users under the shared head; 0 where nobody is held out."""
        if not len(index):
            return 0.0
        groups = self.groups(index)
        return float(self._losses(self.scorer.core(groups), groups).mean())

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.tensors, 1.0)
        self.optimizer.step()

    def prior(self, rows: Tensor) -> Tensor:
        """½ λ |δ|² of the users in a batch, each divided by the number of the user's groups."""
        own = self.numbers[rows] ** 2
        return 0.5 * self.scorer.prior_precision * (own.sum(-1) / self.counts[rows]).sum()

    def values(self) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in self.tensors]

    @torch.no_grad()
    def put(self, values: Sequence[Tensor]) -> None:
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor.copy_(value)

    def heads(self) -> Heads:
        """What was trained of each user; the encoder's training is over."""
        if self.source is not None:
            self.source.encoder.eval()
        if not self.numbers.numel():
            return {}
        kind, seen, heads = self.scorer.head, self.data.records_seen(), {}
        for name, own in zip(self.data.names(), self.numbers.detach(), strict=True):
            numbers = torch.from_numpy(kind.empty())
            numbers[: len(own)] = own
            heads[name] = Head.of(numbers, seen[name])
        return heads

    # ---- checkpoint: safetensors with the state of the run in its header, replaced in one step

    def write(self, path: Path, run: "_Run") -> None:
        tensors: dict[str, Tensor] = {}
        for i, (tensor, best) in enumerate(zip(self.tensors, run.best_values, strict=True)):
            tensors |= {f"value.{i}": tensor.detach(), f"best.{i}": best}
            for name, value in self.optimizer.state.get(tensor, {}).items():
                tensors[f"optimizer.{name}.{i}"] = value.detach().clone()
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        course = {"losses": run.losses, "best": run.best, "waited": run.waited}
        course["fingerprint"] = self.fingerprint
        temporary = path.with_suffix(".part")
        path.parent.mkdir(parents=True, exist_ok=True)  # the bundle's own folder comes last
        save_file(tensors, temporary, {"course": json.dumps(course)})
        temporary.replace(path)

    def resume(self, path: Path | None) -> "_Run | None":
        """Continue from a checkpoint if there is one.

        Raises:
            BundleError: it is damaged, or of other settings or data.
        """
        if path is None or not path.is_file():
            return None
        tensors, course = _read_checkpoint(path)
        count = range(len(self.tensors))
        values = [tensors[f"value.{i}"] for i in count if f"value.{i}" in tensors]
        fits = [value.shape for value in values] == [tensor.shape for tensor in self.tensors]
        if course["fingerprint"] != self.fingerprint or not fits:
            raise BundleError(
                f"{path}: a checkpoint of other settings or data: delete it to start anew"
            )
        self.put(values)
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            if part == "optimizer":
                key, _, i = rest.rpartition(".")
                self.optimizer.state[self.tensors[int(i)]][key] = value
        best = [tensors[f"best.{i}"] for i in count]
        return _Run(course["best"], best, course["losses"], course["waited"])


def _read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            course = json.loads(file.metadata()["course"])
        return load_file(path), course
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        fault = f"a damaged checkpoint ({error}): delete it to start anew"
        raise BundleError(f"{path}: {fault}") from None


@dataclass
class _Run:
    """How far training has come, and what was best so far."""

    best: float  # lowest loss of the held-out users
    best_values: list[Tensor]
    losses: list[float] = field(default_factory=list)  # mean training loss of each epoch
    waited: int = 0  # epochs since the best one

    def exhausted(self, patience: int) -> bool:
        return bool(patience) and self.waited >= patience

    def watch(self, loss: float, state: _State) -> None:
        if loss < self.best:
            self.best, self.best_values, self.waited = loss, state.values(), 0
        else:
            self.waited += 1


def _fingerprint(data: TrainingSet, config: SGDConfig, loss: str) -> str:
    """Identifies settings and data (not the number of epochs), so that checkpoints fit."""
    groups = data.groups
    numbers = [config.lr, config.batch, config.weight_decay, config.patience, config.seed]
    hasher = hashlib.sha256(json.dumps([*numbers, loss, list(data.users)]).encode())
    for tensor in (groups.left, groups.right, groups.side_features, groups.mask, groups.target):
        if tensor is not None:
            hasher.update(tensor.contiguous().numpy().tobytes())
    return hasher.hexdigest()


def fit_unseen(scorer: Scorer, data: TrainingSet, config: SGDConfig) -> tuple[FitReport, Heads]:
    """Heads of the users whom joint training held out: of earlier groups, to calibrate on the later
    ones; then of all.
    """
    unseen = held_out_users(data, config)
    report = FitReport(users=len(data.names()), groups=len(data))
    if not unseen:
        return report, {}
    held_out = []
    for early, late in data.of(unseen).prequential_splits():
        heads = fit_heads(scorer, early, unseen, sgd=config)
        held_out.append(held_out_scores(scorer, late, heads))
    evaluate_held_out(scorer, held_out, report)
    calibrate(scorer, held_out, report)
    evaluate_picks(scorer, held_out, report)
    return report, fit_heads(scorer, data, unseen, sgd=config)
