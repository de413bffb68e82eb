"""Learning the shared base and the heads on frozen features (DESIGN 5, paper section 3.1).

Everything here is convex and deterministic, for all users at once:
    base      shared head and evidence weights, ridge-penalised
    heads     δᵤ under the Gaussian prior, see `solve` strengths ridge and prior precision are
              chosen by what counts: the loss on the later groups of users whom the base has
              never seen and whose heads were fitted on their earlier groups only
    calibrate β and the weight of the LLM's votes, on the same held-out scores
`joint.py` holds what is not convex (the shared layer of `tower`, a tuned encoder, `mlp` heads).
Knows no texts and no LLM.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hydra_llm.model.heads import KernelBank, LinearBank, LowRankBank
from hydra_llm.model.scorer import Scorer
from hydra_llm.training.calibration import HeldOut, calibrate, weigh_picks
from hydra_llm.training.dataset import Cut, Table, chunks_of_users, folds
from hydra_llm.training.kernel import learn_kernel, remember_users
from hydra_llm.training.newton import Problem, head_problem, in_basis, losses, solve

RIDGES = (1.0, 3.0, 10.0, 30.0, 300.0, 3000.0)
PRECISIONS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1000.0)
SIDE_RIDGES = (1.0, 10.0, 100.0, 1000.0)
SMALL_TABLE = 2000
"""Groups above which a handful of evidence weights need no choice of ridge."""
FOLDS = 3
"""Parts of the users who take turns as those whom the base has not seen."""
TINY_TABLE, TINY_FOLDS = 300, 10
"""Up to so many groups there are more parts: a base without a third of them would be far from the
one that serves.
"""


@dataclass
class FitReport:
    """What was chosen, and what it reached on held-out later groups of users whom the base had not
    seen.
    """

    users: int = 0
    groups: int = 0
    ridge: float = RIDGES[1]
    evidence_ridge: float = SIDE_RIDGES[0]
    precision: float = PRECISIONS[3]
    held_out_groups: int = 0
    loss_uniform: float = float("nan")
    """Of equal shares: what knowing nothing costs."""
    loss_shared: float = float("nan")
    """With the shared head alone."""
    loss_user: float = float("nan")
    """With each user's own head."""
    loss_calibrated: float = float("nan")
    """With β and the votes, on the groups that have votes where there are such; on these very
    groups they were fitted.
    """
    loss_with_votes: float = float("nan")
    """On the same groups, each user's with a β and weights of votes that the others taught."""
    loss_without_votes: float = float("nan")
    """Likewise with a β alone: what the LLM's votes add to the scorer is the difference."""
    gain_first: float = float("nan")
    """Mean gain of the first candidates of those groups: the retriever's first record, the LLM's
    greedy text, the task's first label.
    """
    gain_pick: float = float("nan")
    """Of those that the users' own heads score highest."""
    gain_best: float = float("nan")
    """Of the best there are: no scorer can do more."""
    scale: float = 1.0
    vote_weight: dict[str, float] = field(default_factory=dict)

    def to_json(self, *, convex: bool = True) -> dict[str, Any]:
        """Everything; the strengths only where they were used."""
        strengths = {"ridge", "evidence_ridge", "precision"}
        return {
            name: value for name, value in asdict(self).items() if convex or name not in strengths
        }


class Split(NamedTuple):
    """Users who teach, and the names of others who judge."""

    train: Table
    part: list[str]


@torch.no_grad()
def fit_base(scorer: Scorer, table: Table, ridge: float, evidence_ridge: float = 1.0) -> None:
    """Set the shared head and the evidence weights to the minimiser of the ridge-penalised loss;
    nobody's δ is used.
    """
    groups, size = table.groups, scorer.interaction.size
    standardise(scorer, table)
    evidence = ((groups.evidence - scorer.side_mean) / scorer.side_scale)[None]
    head = head_problem(
        scorer.interaction, scorer.interaction(groups)[None], *_padded(groups, None), scorer.loss
    )
    problem = Problem(
        lambda v: (
            head.dot(v[:, : head.size]) + torch.einsum("ugce,ue->ugc", evidence, v[:, head.size :])
        ),
        lambda r: torch.cat([head.outer(r), torch.einsum("ugce,ugc->ue", evidence, r)], 1),
        head.size + evidence.shape[-1],
        head.offset,
        head.target,
        head.mask,
        scorer.loss,
    )
    precision = torch.full((problem.size,), ridge)
    precision[size : head.size], precision[head.size :] = 1e-3, evidence_ridge
    v = solve(problem, precision)[0]
    bank = scorer.bank
    assert isinstance(bank, LinearBank | LowRankBank | KernelBank)
    bank.shared.copy_(v[:size])
    bank.shared_bias.copy_(v[size] if head.size > size else torch.zeros(()))
    scorer.side_weight.copy_(v[head.size :])


def standardise(scorer: Scorer, table: Table) -> None:
    """From here on the evidence counts in deviations from its mean in this table."""
    rows = table.groups.evidence[table.groups.mask]
    scorer.side_mean = rows.mean(0)
    spread = (rows - scorer.side_mean).square().mean(0).sqrt()
    scorer.side_scale = torch.where(spread > 1e-6, spread, torch.ones_like(spread))


def _padded(groups: Any, offset: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Offset, target and mask with a leading user dimension of 1."""
    return (
        (torch.zeros_like(groups.target) if offset is None else offset)[None],
        groups.target[None],
        groups.mask[None],
    )


@torch.no_grad()
def solve_deltas(
    scorer: Scorer,
    table: Table,
    names: Sequence[str],
    precision: float,
    basis: Tensor | None = None,
) -> dict[str, Tensor]:
    """Each user's δ [V] (binary: V + 1 with the bias; with a basis: its K coefficients) on the
    groups that the table has.
    """
    found: dict[str, Tensor] = {}
    width = (
        scorer.interaction.size
        if scorer.interaction.kind != "label"
        else table.groups.left.shape[1]
    )
    for chunk, index in chunks_of_users(table, names, per_group=width * table.groups.mask.shape[1]):
        flat = index.clamp_min(0).flatten()
        groups = table.groups[flat]
        assert groups.target is not None
        shape = (*index.shape, groups.mask.shape[1])
        x = scorer.interaction(groups)
        nobody = torch.full((len(flat),), -1)
        offset = scorer.bank(scorer.interaction, x, nobody) + scorer.side_score(groups)
        mask = groups.mask.view(shape) & (index >= 0)[..., None]
        target = groups.target.view(shape) * mask
        problem = head_problem(
            scorer.interaction,
            x.view(*index.shape, *x.shape[1:]),
            offset.view(shape),
            target,
            mask,
            scorer.loss,
        )
        values = solve(problem if basis is None else in_basis(problem, basis), precision)
        found |= dict(zip(chunk, values, strict=True))
    return found


@torch.no_grad()
def fit_heads(scorer: Scorer, table: Table, names: Sequence[str]) -> None:
    """Fit the heads of some users on all their groups, with everything shared frozen: new users, or
    old ones again.
    """
    scorer.enrol(names)
    bank, precision = scorer.bank, float(scorer.prior_precision)
    seen = table.seen()
    for name in names:  # whoever has no groups any more has the shared head again
        bank.clear(scorer.row(name))
        scorer.learned_from(name, seen.get(name, 0))
    if isinstance(bank, KernelBank):
        remember_users(scorer, table, names)
    elif isinstance(bank, LowRankBank):
        for name, value in solve_deltas(
            scorer, table, names, precision, _with_bias(scorer, bank.basis)
        ).items():
            bank.weight[scorer.row(name)] = value
    elif isinstance(bank, LinearBank):
        size = scorer.interaction.size
        for name, value in solve_deltas(scorer, table, names, precision).items():
            bank.weight[scorer.row(name)] = value[:size]
            bank.bias[scorer.row(name)] = value[size] if len(value) > size else 0.0
    else:
        raise TypeError(f"{bank.kind} heads are not convex: see joint.py")


def _with_bias(scorer: Scorer, basis: Tensor) -> Tensor:
    return (
        basis
        if scorer.loss == "listwise"
        else torch.cat([basis, basis.new_zeros(len(basis), 1)], 1)
    )


def fit_all(
    scorer: Scorer, table: Table, *, seed: int = 0, unseen: Sequence[str] = ()
) -> FitReport:
    """Choose the strengths, fit base and heads of every user of the table, calibrate.
    `interaction.prepare` must have run.

    `unseen` are the users from whom a trained interaction has not learned: only they can tell what
    helps a new user. Without them the users take turns in folds, which is fair where the
    interaction has seen no labels.

    `table` holds the training users' groups; where some are voted and some not (labels), the base
    and the heads learn from those without votes, and the voted ones only calibrate.
    """
    plain = table.only_voted(False) if 0 < int(table.voted.sum()) < len(table) else table
    names = plain.names()
    scorer.enrol(names)
    report = FitReport(users=len(names), groups=len(plain))
    count = FOLDS if len(plain) > TINY_TABLE else TINY_FOLDS
    parts = (
        [list(unseen)]
        if unseen
        else folds(names, min(count, len(names)), seed)
        if len(names) > 1
        else []
    )
    splits = [
        Split(train, part)
        for part in parts
        if len(train := plain.of(sorted(set(names) - set(part))))
    ]
    if splits:
        _choose_strengths(scorer, plain, splits, report)
    scorer.prior_precision = torch.tensor(report.precision)

    def base_of(train: Table) -> None:
        fit_base(scorer, train, report.ridge, report.evidence_ridge)

    if isinstance(scorer.bank, KernelBank):
        learn_kernel(scorer, plain, splits, base_of)
    if splits:
        judge(scorer, _held_out(scorer, plain, splits, base_of, Table.split_steps), report)
        judged = _held_out(scorer, table, splits, base_of, Table.split_voted)
        calibrate(scorer, judged, report)
        weigh_picks(scorer, judged, report)
    base_of(plain)
    _ready(scorer, plain)
    fit_heads(scorer, plain, names)
    if not isinstance(scorer.bank, KernelBank):
        measure_curvature(scorer, plain)
    return report


@torch.no_grad()
def measure_curvature(scorer: Scorer, table: Table) -> None:
    """How much one group says about a head, where the users' own heads stand: what moves a head
    with feedback (online.py).
    """
    assert table.groups.target is not None
    telling = table.take((table.groups.target.sum(-1) > 0).nonzero()[:, 0])
    if len(telling):
        own = scorer.core(telling.groups, scorer.rows(telling.users))
        scorer.curvature.measure(
            scorer.interaction, scorer.bank, telling.groups, own, binary=scorer.loss == "binary"
        )


def _choose_strengths(
    scorer: Scorer, plain: Table, splits: Sequence[Split], report: FitReport
) -> None:
    """First the ridges, by the loss of users whom the base has not seen; then the prior's
    precision, by the loss on their later groups with heads from their earlier ones. The report
    keeps the winners.
    """
    of_ridges = {
        (ridge, own): sum(
            _unseen_loss(scorer, train, plain.of(part), ridge, own) for train, part in splits
        )
        for ridge in RIDGES
        for own in (SIDE_RIDGES if len(plain) <= SMALL_TABLE else SIDE_RIDGES[:1])
    }
    report.ridge, report.evidence_ridge = min(of_ridges, key=lambda key: of_ridges[key])
    if isinstance(scorer.bank, KernelBank):
        return  # has no precision: its three numbers are learned
    totals = dict.fromkeys(PRECISIONS, 0.0)
    for train, part in splits:
        fit_base(scorer, train, report.ridge, report.evidence_ridge)
        for early, late in plain.of(part).split_steps():
            for precision in PRECISIONS:
                totals[precision] += _late_loss(
                    scorer, late, solve_deltas(scorer, early, part, precision) if len(early) else {}
                )
    report.precision = min(totals, key=lambda key: totals[key])


def _unseen_loss(
    scorer: Scorer, train: Table, unseen: Table, ridge: float, evidence_ridge: float
) -> float:
    fit_base(scorer, train, ridge, evidence_ridge)
    return _late_loss(scorer, unseen, {})


def _late_scores(scorer: Scorer, late: Table, deltas: dict[str, Tensor]) -> Tensor:
    """[G, C] core scores of groups with the given δ; users without one get the shared head."""
    x = scorer.interaction(late.groups)
    nobody = torch.full((len(late),), -1)
    scores: Tensor = scorer.bank(scorer.interaction, x, nobody) + scorer.side_score(late.groups)
    if not deltas:
        return scores
    size = scorer.interaction.size
    zero = torch.zeros_like(next(iter(deltas.values())))
    v = torch.stack([deltas.get(user, zero) for user in late.users])
    bias = v[:, size:].sum(-1, keepdim=True)
    return scores + scorer.interaction.dot(x[:, None], v[:, :size])[:, 0] + bias


@torch.no_grad()
def _late_loss(scorer: Scorer, late: Table, deltas: dict[str, Tensor]) -> float:
    return loss_of(scorer, late, _late_scores(scorer, late, deltas))


def loss_of(scorer: Scorer, table: Table, scores: Tensor) -> float:
    """The summed loss of scores [G, C]."""
    assert table.groups.target is not None
    return float(losses(scores, table.groups.target, table.groups.mask, scorer.loss).sum())


def tells(table: Table) -> int:
    """How many groups have a candidate that is better than another."""
    assert table.groups.target is not None
    return int((table.groups.target.sum(-1) > 0).sum())


def _ready(scorer: Scorer, train: Table) -> None:
    """What a bank shares beside the base."""
    if isinstance(scorer.bank, LowRankBank):
        _learn_basis(scorer, train, train.names(), float(scorer.prior_precision))


@torch.no_grad()
def _held_out(
    scorer: Scorer,
    table: Table,
    splits: Sequence[Split],
    base_of: Callable[[Table], None],
    cut: Callable[[Table], list[Cut]],
) -> list[HeldOut]:
    """Each part's later groups, as `cut` parts them."""
    found = []
    for train, part in splits:
        base_of(train)
        _ready(scorer, train)
        for early, late in cut(table.of(part)):
            if len(late):
                fit_heads(scorer, early, part)
                nobody = torch.full((len(late),), -1)
                found.append(
                    HeldOut(
                        late,
                        scorer.core(late.groups, nobody),
                        scorer.core(late.groups, scorer.rows(late.users)),
                    )
                )
    return found


def judge(scorer: Scorer, held_out: Sequence[HeldOut], report: FitReport) -> None:
    """The report's losses on held-out groups: of equal shares, of the shared head, of the users'
    own.
    """
    report.held_out_groups = sum(tells(held.late) for held in held_out)
    told = max(1, report.held_out_groups)
    report.loss_uniform = (
        sum(loss_of(scorer, held.late, torch.zeros_like(held.own)) for held in held_out) / told
    )
    report.loss_shared = sum(loss_of(scorer, held.late, held.shared) for held in held_out) / told
    report.loss_user = sum(loss_of(scorer, held.late, held.own) for held in held_out) / told


@torch.no_grad()
def _learn_basis(scorer: Scorer, plain: Table, names: Sequence[str], precision: float) -> None:
    """The directions in which the training users' own linear heads differ most: the top right
    singular vectors.
    """
    bank = scorer.bank
    assert isinstance(bank, LowRankBank)
    deltas = torch.stack(list(solve_deltas(scorer, plain, names, precision).values()))[
        :, : scorer.interaction.size
    ]
    _, _, directions = torch.linalg.svd(deltas, full_matrices=False)
    bank.basis.zero_()
    top = min(len(bank.basis), len(directions))
    bank.basis[:top] = directions[:top]
