"""What is not convex: the shared layer, a tuned encoder and `mlp` heads, trained together with the
users' heads by gradient.

This is the paper's own way (section 3.1): base and heads learn jointly from all training users. The
convex way of `fit.py` runs after it on the frozen features, except for `mlp` heads. Training is
reproducible by its seed, and stops and resumes: after every epoch all that it needs is written to a
checkpoint. Knows no tasks and no LLM.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hydra_llm.errors import BundleError
from hydra_llm.model.encoder import Encoder
from hydra_llm.model.heads import LinearBank, LowRankBank, MLPBank
from hydra_llm.model.interactions import Groups
from hydra_llm.model.scorer import Scorer
from hydra_llm.training.calibration import HeldOut, calibrate, weigh_picks
from hydra_llm.training.convex import FitReport, judge, standardise
from hydra_llm.training.dataset import Table, folds
from hydra_llm.training.newton import losses
from hydra_llm.types import LabelledGroup

EpochDone = Callable[[int, int, float], None]
"""Called with (epochs done, epochs, mean training loss per group)."""


@dataclass(frozen=True)
class Plan:
    """How joint training goes."""

    epochs: int = 30
    lr: float = 1e-3
    batch: int = 64
    """Pairs per step, rounded to whole groups."""
    weight_decay: float = 0.01
    patience: int = 5
    """Epochs without a better loss on held-out users before training stops; 0 trains all epochs, as
    the paper does.
    """
    seed: int = 0


class TextSource:
    """Pairs' features computed with gradients, for a tuned encoder; `None` in its place means the
    table's kept features.
    """

    def __init__(self, encoder: Encoder, groups: Sequence[LabelledGroup]):
        self.encoder = encoder
        self.texts = [(group.left, group.rights) for group in groups]

    def fill(self, table: Table, index: Tensor) -> Groups:
        """The groups of `index` with fresh pair vectors [G, C, H]."""
        groups = table.groups[index]
        pairs = [(self.texts[i][0], right) for i in index.tolist() for right in self.texts[i][1]]
        vectors = self.encoder.forward_pairs(
            [left for left, _ in pairs], [right for _, right in pairs]
        )
        right = vectors.new_zeros(*groups.mask.shape, vectors.shape[-1])
        right = right.masked_scatter(groups.mask[..., None].expand_as(right), vectors)
        return Groups(groups.left, right, groups.evidence, groups.mask, groups.target)


def train_joint(
    scorer: Scorer,
    table: Table,
    plan: Plan,
    *,
    source: TextSource | None = None,
    checkpoint: Path | None = None,
    done: EpochDone | None = None,
) -> list[float]:
    """Train interaction, shared head, evidence weights, the users' heads and, with a source, the
    encoder. Returns the mean loss of each epoch.

    With patience, a fifth of the users are held out to tell when to stop, and what was best for
    them is kept.
    """
    names = table.names()
    scorer.enrol(names)
    standardise(scorer, table)
    held = set(held_out_users(table, plan))
    train = torch.tensor([i for i, user in enumerate(table.users) if user not in held])
    watch = torch.tensor(
        [i for i, user in enumerate(table.users) if user in held], dtype=torch.long
    )
    state = _State(scorer, source, plan, _fingerprint(table, plan, scorer.loss))
    run = state.resume(checkpoint) or _Run(
        _watch_loss(scorer, table, watch, source), state.values()
    )
    while len(run.losses) < plan.epochs and not (plan.patience and run.waited >= plan.patience):
        run.losses.append(_epoch(scorer, table, train, state, source, plan, len(run.losses)))
        # without held-out users the last epoch is the best
        run.watch(
            _watch_loss(scorer, table, watch, source) if held else -float(len(run.losses)), state
        )
        if checkpoint is not None:
            state.write(checkpoint, run)
        if done is not None:
            done(len(run.losses), plan.epochs, run.losses[-1])
    state.put(run.best_values)
    state.freeze()
    for name, records in table.seen().items():
        scorer.learned_from(name, records)
    return run.losses


def held_out_users(table: Table, plan: Plan) -> list[str]:
    """The fifth of the users from whom `train_joint` does not learn; nobody without patience, or
    where there are fewer than five.
    """
    names = table.names()
    return folds(names, 5, plan.seed)[0] if plan.patience and len(names) >= 5 else []


def _epoch(
    scorer: Scorer,
    table: Table,
    train: Tensor,
    state: "_State",
    source: TextSource | None,
    plan: Plan,
    epoch: int,
) -> float:
    order = train[
        torch.randperm(
            len(train), generator=torch.Generator().manual_seed(plan.seed * 1000 + epoch)
        )
    ]
    total, count = 0.0, 0
    torch.manual_seed(plan.seed * 1000 + epoch)  # dropout of a tuned encoder
    for index in _batches(table, order, plan.batch):
        groups = source.fill(table, index) if source else table.groups[index]
        rows = scorer.rows([table.users[i] for i in index.tolist()])
        assert groups.target is not None
        loss = losses(scorer.core(groups, rows), groups.target, groups.mask, scorer.loss).sum()
        state.step((loss + state.prior(rows, table)) / len(index))
        total, count = total + float(loss.detach()), count + len(index)
    return total / max(1, count)


def _batches(table: Table, order: Tensor, pairs: int) -> Iterator[Tensor]:
    """Groups in order, as many at once as have about `pairs` pairs."""
    sizes = table.groups.mask.sum(-1)
    start, held = 0, 0
    for end, i in enumerate(order.tolist(), 1):
        held += int(sizes[i])
        if held >= pairs or end == len(order):
            yield order[start:end]
            start, held = end, 0


@torch.no_grad()
def _watch_loss(scorer: Scorer, table: Table, index: Tensor, source: TextSource | None) -> float:
    """Mean loss of the held-out users under the shared head; 0 where nobody is held out."""
    if not len(index):
        return 0.0
    groups = source.fill(table, index) if source else table.groups[index]
    assert groups.target is not None
    scores = scorer.core(groups, torch.full((len(index),), -1))
    return float(losses(scores, groups.target, groups.mask, scorer.loss).mean())


class _State:
    """Everything that training changes: parameters, the bank's rows, the optimizer; to and from a
    checkpoint.
    """

    def __init__(self, scorer: Scorer, source: TextSource | None, plan: Plan, fingerprint: str):
        self.scorer, self.plan, self.fingerprint = scorer, plan, fingerprint
        bank = scorer.bank
        self.rows = (
            bank.weight.requires_grad_(True)
            if isinstance(bank, LinearBank | LowRankBank | MLPBank)
            else None
        )
        decayed: list[Tensor] = list(scorer.interaction.parameters())
        if source is not None:
            decayed += list(source.encoder.parameters())
            source.encoder.train()
        self.source = source
        free: list[Tensor] = [*scorer.bank.shared_parameters(), scorer.side_weight]
        free += [] if self.rows is None else [self.rows]
        self.tensors = decayed + free
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": plan.weight_decay},
                {"params": free, "weight_decay": plan.weight_decay / 10},
            ],
            lr=plan.lr,
        )
        self.counts: Tensor | None = None

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.tensors, 1.0)
        self.optimizer.step()

    def prior(self, rows: Tensor, table: Table) -> Tensor:
        """½ λ |δᵤ|² of the users in a batch, spread over each user's groups so that an epoch counts
        it once.
        """
        if self.rows is None:
            return torch.zeros(())
        if self.counts is None:
            self.counts = torch.bincount(
                self.scorer.rows(table.users), minlength=len(self.scorer.users)
            ).clamp_min(1)
        own = self.rows[rows] ** 2
        return 0.5 * self.scorer.prior_precision * (own.sum(-1) / self.counts[rows]).sum()

    def values(self) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in self.tensors]

    @torch.no_grad()
    def put(self, values: Sequence[Tensor]) -> None:
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor.copy_(value)

    def freeze(self) -> None:
        """Training is over: nothing asks for gradients any more."""
        if self.rows is not None:
            self.scorer.bank.weight = self.rows.detach()
        if self.source is not None:
            self.source.encoder.eval()

    # ---- checkpoint: safetensors with the course of the run in its header, replaced in one step

    def write(self, path: Path, run: "_Run") -> None:
        tensors = {
            f"value.{i}": tensor.detach().contiguous() for i, tensor in enumerate(self.tensors)
        }
        tensors |= {f"best.{i}": tensor.contiguous() for i, tensor in enumerate(run.best_values)}
        for i, tensor in enumerate(self.tensors):
            for name, value in self.optimizer.state.get(tensor, {}).items():
                tensors[f"optimizer.{name}.{i}"] = value.detach().clone().contiguous()
        course = {
            "losses": run.losses,
            "best": run.best,
            "waited": run.waited,
            "fingerprint": self.fingerprint,
        }
        temporary = path.with_suffix(".part")
        path.parent.mkdir(parents=True, exist_ok=True)  # the bundle's own folder comes last
        save_file(tensors, temporary, {"course": json.dumps(course)})
        temporary.replace(path)

    def resume(self, path: Path | None) -> "_Run | None":
        """Take up a checkpoint if there is one.

        Raises:
            BundleError: it is damaged, or of other settings or data.
        """
        if path is None or not path.is_file():
            return None
        try:
            tensors = load_file(path)
            with safe_open(path, "pt") as file:
                course = json.loads(file.metadata()["course"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise BundleError(
                f"{path}: a damaged checkpoint ({error}): delete it to start anew"
            ) from None
        shapes = [
            tensors[f"value.{i}"].shape if f"value.{i}" in tensors else None
            for i in range(len(self.tensors))
        ]
        if course["fingerprint"] != self.fingerprint or shapes != [
            tensor.shape for tensor in self.tensors
        ]:
            raise BundleError(
                f"{path}: a checkpoint of other settings or data: delete it to start anew"
            )
        self.put([tensors[f"value.{i}"] for i in range(len(self.tensors))])
        for i, tensor in enumerate(self.tensors):
            found = {
                name.split(".")[1]: v
                for name, v in tensors.items()
                if name.startswith("optimizer.") and name.endswith(f".{i}")
            }
            if found:
                self.optimizer.state[tensor] = found
        return _Run(
            course["best"],
            [tensors[f"best.{i}"] for i in range(len(self.tensors))],
            course["losses"],
            course["waited"],
        )


@dataclass
class _Run:
    """How far training has come, and what was best so far."""

    best: float
    """Lowest loss of the held-out users."""
    best_values: list[Tensor]
    losses: list[float] = field(default_factory=list)
    """Mean training loss of each epoch."""
    waited: int = 0
    """Epochs since the best one."""

    def watch(self, found: float, state: _State) -> None:
        if found < self.best:
            self.best, self.best_values, self.waited = found, state.values(), 0
        else:
            self.waited += 1


def _fingerprint(table: Table, plan: Plan, loss: str) -> str:
    """Names the settings and the data, so that no other run goes on from its checkpoint; the number
    of epochs may grow.
    """
    groups = table.groups
    settings = [
        plan.lr,
        plan.batch,
        plan.weight_decay,
        plan.patience,
        plan.seed,
        loss,
        list(table.users),
    ]
    hasher = hashlib.sha256(json.dumps(settings).encode())
    for tensor in (groups.left, groups.right, groups.evidence, groups.mask, groups.target):
        if tensor is not None:
            hasher.update(tensor.contiguous().numpy().tobytes())
    return hasher.hexdigest()


def fit_mlp(
    scorer: Scorer, table: Table, names: Sequence[str], plan: Plan, *, random_start: bool
) -> None:
    """Fit `mlp` heads of some users on kept features, everything shared frozen: each by a small
    gradient descent of its own, so that nobody's head depends on who else is fitted. Whoever has
    no groups has the shared head.

    Drawn towards the shared head (the prior, as strong as the weight decay), or started at random
    and only decayed, as the authors' code does.
    """
    bank = scorer.bank
    assert isinstance(bank, MLPBank)
    scorer.enrol(names)
    groups, seen = table.by_user(), table.seen()
    for name in names:
        bank.clear(scorer.row(name))
        scorer.learned_from(name, seen.get(name, 0))
        if name in groups:
            bank.weight[scorer.row(name)] = _descend(
                scorer, bank, table.take(groups[name]), plan, random_start
            )


def _descend(scorer: Scorer, bank: MLPBank, own: Table, plan: Plan, random_start: bool) -> Tensor:
    """One user's δ."""
    shared = bank.shared.detach()
    lot = zlib.crc32(own.users[0].encode("utf-8", "surrogatepass")) ^ plan.seed
    delta = bank.random(1, lot)[0] - shared if random_start else torch.zeros_like(shared)
    delta.requires_grad_(True)
    optimizer = torch.optim.AdamW([delta], lr=plan.lr, weight_decay=0.0)
    with torch.no_grad():
        x, evidence = scorer.interaction(own.groups), scorer.side_score(own.groups)
    target, mask = own.groups.target, own.groups.mask
    assert target is not None
    for epoch in range(plan.epochs):
        order = torch.randperm(len(own), generator=torch.Generator().manual_seed(plan.seed + epoch))
        for index in _batches(own, order, plan.batch):
            heads = (shared + delta).expand(len(index), -1)
            loss = losses(
                bank.apply_heads(x[index], heads) + evidence[index],
                target[index],
                mask[index],
                scorer.loss,
            ).sum() / len(index)
            pull = shared + delta if random_start else delta
            optimizer.zero_grad()
            (loss + 0.5 * plan.weight_decay * pull.square().sum()).backward()
            optimizer.step()
    return delta.detach()


def fit_unseen(scorer: Scorer, table: Table, plan: Plan, *, random_start: bool) -> FitReport:
    """The users whom joint training held out get `mlp` heads: of their earlier groups, to calibrate
    on the later ones; then of all.
    """
    unseen = held_out_users(table, plan)
    report = FitReport(users=len(table.names()), groups=len(table))
    if not unseen:
        return report
    held_out = []
    for early, late in table.of(unseen).split_steps():
        fit_mlp(scorer, early, unseen, plan, random_start=random_start)
        with torch.no_grad():
            nobody, own = (
                scorer.core(late.groups, rows)
                for rows in (torch.full((len(late),), -1), scorer.rows(late.users))
            )
        held_out.append(HeldOut(late, nobody, own))
    judge(scorer, held_out, report)
    calibrate(scorer, held_out, report)
    weigh_picks(scorer, held_out, report)
    fit_mlp(scorer, table, unseen, plan, random_start=random_start)
    return report
