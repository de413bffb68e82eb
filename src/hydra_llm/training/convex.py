"""The fits on frozen features (paper, 3.1): convex and deterministic.

    base    shared head and weights of side features, by ridge regression
    heads   δ of all users at once under the Gaussian prior (model/heads)

`strengths.py` chooses how strong ridges and prior are; `sgd.py` has what is not convex (the shared
layer of `tower`, a tuned encoder, `mlp` heads). Nothing but the scorer that is being learned is
changed. Knows no texts and no LLM.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hydra_llm.model.heads import Head, HeadKind, HeadProblem, SGDConfig
from hydra_llm.model.interactions import Interaction, LabelBilinear
from hydra_llm.model.laplace import LaplacePosterior
from hydra_llm.model.newton import Problem, newton_cg, with_bias
from hydra_llm.model.scorer import Scorer
from hydra_llm.training.calibration import HeldOut
from hydra_llm.training.dataset import Split, TrainingSet, chunks_of_users

TEXT_RIDGE = 3.0  # on the shared effects of known texts
AT_ONCE = 1_500_000  # numbers of the users fitted together: more would leave the processor's cache
FISHER_GROUPS = 2000  # a mean over so many groups is good enough
UserHeads = dict[str, Head]


def held_out_scores(
    scorer: Scorer, splits: Sequence[Split], names: Sequence[str], sgd: SGDConfig | None = None
) -> list[HeldOut]:
    """Later groups with the scores of the shared head and of heads of the earlier groups."""
    parts = []
    for early, late in splits:
        if len(late):
            heads = heads_for(late, fit_heads(scorer, early, names, sgd=sgd))
            with torch.no_grad():
                own, shared = scorer.core(late.groups, heads), scorer.core(late.groups)
            parts.append(HeldOut(late, shared, own))
    return parts


def heads_for(data: TrainingSet, heads: Mapping[str, Head]) -> list[Head | None]:
    """[G] the head of each group's user."""
    return [heads.get(user) for user in data.users]


@torch.no_grad()
def fit_base(scorer: Scorer, data: TrainingSet, ridge: float, side_ridge: float = 1.0) -> None:
    """Set the shared head and the side weights to the minimiser of the ridge-penalised loss; the
    side weights are drawn towards `side_prior`.
    """
    interaction, size = scorer.interaction, scorer.interaction.size
    standardise(scorer, data)
    side = scorer.standardised(data.groups)[None]
    target, mask = data.target[None], data.groups.mask[None]
    distinct, text = data.groups.distinct()
    x = interaction(distinct)[None]

    def of_pairs(v: Tensor) -> Tensor:
        return interaction.dot(x, v)[:, text]

    def of_scores(r: Tensor) -> Tensor:
        by_text = r.new_zeros(1, x.shape[1], r.shape[2]).index_add_(1, text, r)
        return interaction.outer(x, by_text)

    believed = scorer.side_prior * scorer.side_scale
    offset = side @ believed
    head = with_bias(Problem(of_pairs, of_scores, size, offset, target, mask, scorer.loss))

    def dot(v: Tensor) -> Tensor:
        own, weights = v[:, : head.size], v[:, head.size :]
        return head.dot(own) + torch.einsum("ugce,ue->ugc", side, weights)

    def outer(r: Tensor) -> Tensor:
        return torch.cat([head.outer(r), torch.einsum("ugce,ugc->ue", side, r)], 1)

    problem = replace(head, dot=dot, outer=outer, size=head.size + side.shape[-1])
    precision = torch.full((problem.size,), ridge)
    precision[:size] = shared_precision(interaction, ridge)
    precision[size : head.size] = 1e-3  # the bias, if there is one
    precision[head.size :] = side_ridge
    v = newton_cg(problem, precision)[0]
    scorer.head.set_shared(v[:size], v[size] if head.size > size else torch.zeros(()))
    scorer.side_weight.copy_(believed + v[head.size :])


def shared_precision(interaction: Interaction, ridge: float) -> Tensor:
    """[V] the ridge on each number of the shared head; effects of known texts have their own."""
    precision = torch.full((interaction.size,), ridge)
    if isinstance(interaction, LabelBilinear):
        precision[interaction.dense :] = min(ridge, TEXT_RIDGE)
    return precision


def standardise(scorer: Scorer, data: TrainingSet) -> None:
    """From here on side features count in deviations from their mean in this training set."""
    rows = data.groups.side_features[data.groups.mask]
    scorer.side_mean = rows.mean(0)
    spread = (rows - scorer.side_mean).square().mean(0).sqrt()
    scorer.side_scale = torch.where(spread > 1e-6, spread, torch.ones_like(spread))


def head_problems(scorer: Scorer, data: TrainingSet, names: Sequence[str]) -> Iterator[HeadProblem]:
    """What fitting these users' heads needs, as many of them at once as have few numbers."""
    per_group = scorer.interaction.numbers(data.groups)
    for users, index in chunks_of_users(data, names, numbers=AT_ONCE, per_group=per_group):
        problem = scorer.head_problem(data.groups, users, index)
        yield problem.discounted(data.positions[index.clamp_min(0)])


def fit_heads(
    scorer: Scorer,
    data: TrainingSet,
    names: Sequence[str],
    *,
    kind: HeadKind | None = None,
    precision: float | None = None,
    sgd: SGDConfig | None = None,
) -> UserHeads:
    """These users' heads on all their groups, all else frozen; without groups the shared head."""
    kind, seen = kind or scorer.head, data.records_seen()
    heads = dict.fromkeys(names, Head.of(kind.empty()))
    for problem in head_problems(scorer, data, names):
        problem = replace(problem, precision=precision or problem.precision, sgd=sgd or problem.sgd)
        for user, numbers in zip(problem.users, kind.fit(problem), strict=True):
            heads[user] = Head.of(numbers, seen[user])
    return heads


@torch.no_grad()
def measure_posterior(scorer: Scorer, data: TrainingSet, heads: Mapping[str, Head]) -> None:
    """The mean Fisher information of a group, where the users' own heads stand."""
    informative = data.take(data.informative.nonzero()[:, 0])
    if not len(informative):
        return
    draw = torch.Generator().manual_seed(0)
    sample = informative.take(torch.randperm(len(informative), generator=draw)[:FISHER_GROUPS])
    groups, binary = sample.groups, scorer.loss == "binary"
    scores = scorer.core(groups, heads_for(sample, heads)).masked_fill(~groups.mask, -1e30)
    share: Tensor = scores.sigmoid() * (1 - scores.sigmoid()) if binary else scores.softmax(-1)
    factors = scorer.head.fisher(scorer.interaction, scorer.interaction(groups), share, binary)
    if factors is not None:
        scorer.posterior = LaplacePosterior.of(*factors)
