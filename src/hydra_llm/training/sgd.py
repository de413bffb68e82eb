"""What is not convex: the shared layer, a tuned encoder and `mlp` heads, trained together with the
users' heads by gradient (paper, section 3.1); `convex.py` fits the rest on the frozen features.

Reproducible by its seed; resumes from the checkpoint of the last epoch. Several processes share the
steps (`ranks.py`). Knows no tasks and no LLM.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hydra_llm import ranks
from hydra_llm.errors import BundleError
from hydra_llm.llm.concurrency import Progress
from hydra_llm.model.encoder import Encoder
from hydra_llm.model.heads import Head, SGDConfig
from hydra_llm.model.interactions import Groups
from hydra_llm.model.newton import losses
from hydra_llm.model.scorer import Scorer
from hydra_llm.training.calibration import FitReport, calibrate, evaluate_held_out
from hydra_llm.training.convex import UserHeads, fit_heads, held_out_scores, standardise
from hydra_llm.training.dataset import LabelledGroup, TrainingSet, folds


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's default generator, which some of torch needs, for this block alone."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        yield


class TextSource:
    """Pairs' features with gradients, for a tuned encoder; without it the kept ones are used."""

    def __init__(self, encoder: Encoder, groups: Sequence[LabelledGroup]):
        self.encoder, self.texts = encoder, [(group.left, group.rights) for group in groups]

    def fill(self, data: TrainingSet, index: Tensor) -> Groups:
        """The groups of `index` with fresh pair vectors [G, C, H]."""
        groups, texts = data.groups[index], [self.texts[i] for i in index.tolist()]
        lefts = [left for left, rights in texts for _ in rights]
        rights = [right for _, rights in texts for right in rights]
        vectors = self.encoder.forward_pairs(lefts, rights)
        right = vectors.new_zeros(*groups.mask.shape, vectors.shape[-1])
        right = right.masked_scatter(groups.mask[..., None].expand_as(right), vectors)
        return replace(groups, right=right)


def train_jointly(
    scorer: Scorer,
    data: TrainingSet,
    config: SGDConfig,
    source: TextSource | None = None,
    checkpoint: Path | None = None,
    done: Progress | None = None,
) -> tuple[list[float], UserHeads]:
    """Train interaction, shared head, side weights, the users' heads and, with a source, the
    encoder; with patience, until a held-out fifth of the users gains no more, and what was best for
    them is kept. Returns the mean loss of each epoch, and the heads.
    """
    standardise(scorer, data)
    held_out = held_out_users(data, config)
    train = torch.tensor([i for i, user in enumerate(data.users) if user not in set(held_out)])
    watched = torch.tensor(sorted(i for user in held_out for i in data.index[user])).long()
    run = _Run(scorer, data, source, config)
    if checkpoint is not None:
        run.resume(checkpoint)

    def after_epoch() -> None:
        if checkpoint is not None:
            run.write(checkpoint)
        if done is not None:
            done(len(run.losses), config.epochs)

    ranks.send(partial(run.train, train, watched))
    run.train(train, watched, after_epoch)
    return run.losses, run.heads()


def held_out_users(data: TrainingSet, config: SGDConfig) -> list[str]:
    """The fifth of the users from whom `train_jointly` does not learn; none without patience."""
    names = data.names()
    return folds(names, 5, config.seed)[0] if config.patience and len(names) >= 5 else []


class _Run:
    """What training changes (parameters, numbers, optimizer), its course and its checkpoints."""

    def __init__(
        self, scorer: Scorer, data: TrainingSet, source: TextSource | None, config: SGDConfig
    ):
        self.scorer, self.data, self.source, self.config = scorer, data, source, config
        rows = {name: row for row, name in enumerate(data.names())}
        self.row = torch.tensor([rows[user] for user in data.users], dtype=torch.long)  # [G]
        self.numbers = torch.zeros(len(rows), scorer.head.joint_numbers, requires_grad=True)
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
        self.counts = torch.bincount(self.row, minlength=len(rows)).clamp_min(1)
        self.losses: list[float] = []  # mean training loss of each epoch
        self.best, self.best_values = math.inf, self.values()  # lowest loss of held-out users
        self.waited = 0  # epochs since the best one

    def train(
        self, train: Tensor, watched: Tensor, after_epoch: Callable[[], None] = lambda: None
    ) -> None:
        """The epochs that are left, in each process; `watched` are the held-out users' groups."""
        if self.best == math.inf:
            self.best = self.watch_loss(watched)
        config = self.config
        while len(self.losses) < config.epochs and not 0 < config.patience <= self.waited:
            self.losses.append(self.epoch(train))
            # without held-out users the last epoch is the best
            loss = self.watch_loss(watched) if len(watched) else -float(len(self.losses))
            if loss < self.best:
                self.best, self.best_values, self.waited = loss, self.values(), 0
            else:
                self.waited += 1
            after_epoch()
        self.put(self.best_values)

    def epoch(self, train: Tensor) -> float:
        """One pass; the mean loss per group."""
        seed = self.config.seed * 1000 + len(self.losses)
        draw = torch.Generator().manual_seed(seed)
        order = train[torch.randperm(len(train), generator=draw)]
        total, count = 0.0, 0
        shared = [tensor for tensor in self.tensors if tensor is not self.numbers]
        with seeded(ranks.own_seed(seed)):  # dropout of a tuned encoder
            for index in self.config.batches(self.data.groups.mask.sum(-1), order):
                self.optimizer.zero_grad()
                total += self.backward(ranks.portion(index), len(index))
                ranks.sum_gradients(shared, self.numbers, self.row[index].unique())
                nn.utils.clip_grad_norm_(self.tensors, 1.0)
                self.optimizer.step()
                count += len(index)
        return ranks.summed(total) / max(1, count)

    def backward(self, index: Tensor, count: int) -> float:
        """Add the gradients of a batch of `count` groups that these are or are a part of; the sum
        of their losses.
        """
        if not len(index):
            return 0.0
        scorer, groups, rows = self.scorer, self.groups(index), self.row[index]
        x = scorer.interaction(groups)
        own = scorer.head.score_numbers(scorer.interaction, x, self.numbers[rows])
        loss = self.losses_of(own + scorer.side_score(groups), index).sum()
        # ½ λ |δ|² of the batch's users, each divided by the number of the user's groups
        squares = (self.numbers[rows] ** 2).sum(-1)
        prior = 0.5 * scorer.prior_precision * (squares / self.counts[rows]).sum()
        ((loss + prior) / count).backward()
        return float(loss.detach())

    def groups(self, index: Tensor) -> Groups:
        return self.source.fill(self.data, index) if self.source else self.data.groups[index]

    def losses_of(self, scores: Tensor, index: Tensor) -> Tensor:
        data, loss = self.data, self.scorer.loss
        return losses(scores, data.target[index], data.groups.mask[index], loss)

    @torch.no_grad()
    def watch_loss(self, index: Tensor) -> float:
        """Mean loss of the held-out users under the shared head; 0 without held-out users."""
        if not len(index):
            return 0.0
        own, mean = ranks.portion(index), 0.0
        if len(own):
            mean = float(self.losses_of(self.scorer.core(self.groups(own)), own).mean())
        return ranks.summed(mean * (len(own) / len(index)))

    def values(self) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in self.tensors]

    @torch.no_grad()
    def put(self, values: Sequence[Tensor]) -> None:
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor.copy_(value)

    def heads(self) -> UserHeads:
        """What was trained of each user; the encoder's training is over."""
        if self.source is not None:
            self.source.encoder.eval()
        if not self.numbers.numel():
            return {}
        seen, heads = self.data.records_seen(), UserHeads()
        for name, own in zip(self.data.names(), self.numbers.detach(), strict=True):
            numbers = torch.from_numpy(self.scorer.head.empty())
            numbers[: len(own)] = own
            heads[name] = Head.of(numbers, seen[name])
        return heads

    # ---- checkpoint: safetensors with the state of the run in its header, replaced in one step

    def write(self, path: Path) -> None:
        tensors: dict[str, Tensor] = {}
        for i, (tensor, best) in enumerate(zip(self.tensors, self.best_values, strict=True)):
            tensors |= {f"value.{i}": tensor.detach(), f"best.{i}": best}
            for name, value in self.optimizer.state.get(tensor, {}).items():
                tensors[f"optimizer.{name}.{i}"] = value.detach().clone()
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        parts = ("losses", "best", "waited", "fingerprint")
        course = {name: getattr(self, name) for name in parts}
        temporary = path.with_suffix(".part")
        path.parent.mkdir(parents=True, exist_ok=True)  # the bundle's own folder comes last
        save_file(tensors, temporary, {"course": json.dumps(course)})
        temporary.replace(path)

    def resume(self, path: Path) -> bool:
        """Continue from a checkpoint, if any. Raises BundleError: damaged, or of another run."""
        if not path.is_file():
            return False
        try:
            with safe_open(path, "pt") as file:
                course = json.loads(file.metadata()["course"])
            tensors = load_file(path)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            advice = "delete it to start anew"
            raise BundleError(f"{path}: a damaged checkpoint ({error}): {advice}") from None
        count = range(len(self.tensors))
        values = [tensors[f"value.{i}"] for i in count if f"value.{i}" in tensors]
        fits = [value.shape for value in values] == [tensor.shape for tensor in self.tensors]
        if course["fingerprint"] != self.fingerprint or not fits:
            fault = "a checkpoint of other settings or data: delete it to start anew"
            raise BundleError(f"{path}: {fault}")
        self.put(values)
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            if part == "optimizer":
                key, _, i = rest.rpartition(".")
                self.optimizer.state[self.tensors[int(i)]][key] = value
        self.best, self.best_values = course["best"], [tensors[f"best.{i}"] for i in count]
        self.losses, self.waited = course["losses"], course["waited"]
        return True

    @cached_property
    def fingerprint(self) -> str:
        """Identifies settings and data (not the number of epochs), so that checkpoints fit."""
        config, groups = self.config, self.data.groups
        numbers = [config.lr, config.batch, config.weight_decay, config.patience, config.seed]
        described = json.dumps([*numbers, self.scorer.loss, list(self.data.users)])
        hasher = hashlib.sha256(described.encode())
        named = ("left", "text", "right", "side_features", "mask", "target")
        for tensor in (getattr(groups, name) for name in named):
            if tensor is not None:
                hasher.update(tensor.contiguous().numpy().tobytes())
        return hasher.hexdigest()


def fit_unseen(scorer: Scorer, data: TrainingSet, config: SGDConfig) -> tuple[FitReport, UserHeads]:
    """Heads of the users held out of joint training; those of earlier groups calibrate on later."""
    unseen = held_out_users(data, config)
    report = FitReport(users=len(data.names()), groups=len(data))
    if not unseen:
        return report, {}
    held_out = held_out_scores(scorer, data.of(unseen).prequential_splits(), unseen, config)
    evaluate_held_out(scorer, held_out, report)
    calibrate(scorer, held_out, report)
    return report, fit_heads(scorer, data, unseen, sgd=config)
