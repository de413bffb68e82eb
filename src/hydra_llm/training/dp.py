"""User-level differential privacy of what users share (`learn --dp-epsilon`).

All that a bundle shares is a function of three releases, each a sum of clipped vectors of the users
with Gaussian noise (Dwork and Roth 2014, appendix A), so that a user's records move no sum by more
than the clipping norm:

    labels   each user's shares of the labels: the population's label shares
    base     θ₀ and the weights of side features, by gradient descent; a user's gradient is clipped
             (DP-SGD with one batch of all users: Abadi et al. 2016, McMahan et al. 2018)
    prior    Σ = SᵀS of users' heads: the second moments of their clipped vectors with a symmetric
             matrix of noise (Analyze Gauss: Dwork et al. 2014)

What else is learned from training users without privacy is fixed, from public texts, or left out:
docs/differential-privacy.md lists it. Neighbouring sets differ in all records of one user, which
are replaced by none; the names of all training users are public. A user's own head is made of the
user's own records and of what is shared (joint differential privacy: Kearns et al. 2014).

Letters: U users, G groups, L labels, J columns of their coding, D dimensions of a release, K rank,
V length of θ₀, E side features.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hydra_llm.bundle import Bundle
from hydra_llm.config import Settings
from hydra_llm.errors import SettingsError
from hydra_llm.extras import require
from hydra_llm.gate import generic_requests
from hydra_llm.model.heads import make_head
from hydra_llm.model.heads.linear import LinearHead
from hydra_llm.model.heads.lowrank import LowRankHead
from hydra_llm.model.interactions import Groups, LabelBilinear
from hydra_llm.model.scorer import Scorer
from hydra_llm.tasks.base import CohortStats, Task
from hydra_llm.tasks.classification import LabelKind
from hydra_llm.training.convex import UserHeads, fit_heads
from hydra_llm.training.dataset import TrainingSet

HEAD_NAMES = ("linear", "lowrank")
SHARES: Mapping[str, float] = {"labels": 0.04, "base": 0.56, "prior": 0.4}  # of 1/σ²
DIRECTIONS, OWN_DIRECTIONS = 128, 8  # of public texts: those of θ₀, and those of users' heads
CLIP, STEPS, RATE, RIDGE = 0.35, 30, 1.0, 0.003  # of gradient descent
# of the heads of which second moments are taken, and of what heads have beside the learned prior
HEAD_CLIP, HEAD_PRECISION, PRECISION = 0.5, 10.0, 300.0
Draw = Callable[[int], Tensor]
"""So many independent standard normal numbers."""


def secret_normals(count: int) -> Tensor:
    """Noise from the system's random bytes: that of a seed could be subtracted by who knows it."""
    bits = torch.frombuffer(bytearray(os.urandom(8 * count)), dtype=torch.int64)
    # 52 bits: with 53 the largest would be rounded to 1, of which the quantile is infinite
    uniform = ((bits >> 12) & (2**52 - 1)).double().add(0.5) / 2**52
    normals: Tensor = torch.special.ndtri(uniform)
    return normals


# ---- the budget


@dataclass(frozen=True)
class Budget:
    """ε and δ of all releases together, and the noise of each by its share."""

    epsilon: float
    delta: float
    noise: float
    """σ of one release of all: standard deviation of the noise by the sensitivity."""

    @classmethod
    def of(cls, settings: Settings, users: int) -> "Budget":
        """That of the settings; δ is by default 1 / users^1.1."""
        assert settings.dp_epsilon is not None
        delta = settings.dp_delta or min(0.5, max(2, users) ** -1.1)
        import dp_accounting

        noise = float(dp_accounting.get_sigma_gaussian(settings.dp_epsilon, delta))
        return cls(settings.dp_epsilon, delta, noise)

    def noise_of(self, release: str, times: int = 1) -> float:
        """σ of each of `times` sums of a release: Gaussian mechanisms compose as 1/σ² add up."""
        return self.noise * math.sqrt(times / SHARES[release])

    def spent(self) -> dict[str, Any]:
        """ε and δ by the accountant, from the noise of all sums that were released: Gaussian
        mechanisms together are one whose 1/σ² is the sum of theirs (Dong, Roth and Su 2022).
        """
        import dp_accounting

        times = {"labels": 1, "base": STEPS, "prior": 1}
        noise = {name: self.noise_of(name, count) for name, count in times.items()}
        whole = sum(times[name] / own**2 for name, own in noise.items()) ** -0.5
        epsilon = dp_accounting.get_epsilon_gaussian(whole, self.delta)
        return {
            "epsilon": round(float(epsilon), 6),
            "delta": self.delta,
            "unit": "user",
            "noise": {name: round(own, 4) for name, own in noise.items()},
            "steps": STEPS,
            "accountant": "dp-accounting, Gaussian mechanisms (Balle and Wang 2018)",
        }


def check(settings: Settings, task: Task) -> None:
    """Raise SettingsError where the base of these settings cannot be learned privately."""
    if settings.dp_epsilon is None:
        if settings.dp_delta is not None:
            raise SettingsError("setting 'dp_delta' has no effect without dp_epsilon: give both")
        return
    require("privacy", "setting 'dp_epsilon'")
    faults = {
        f"head={settings.head}: take {' or '.join(HEAD_NAMES)}": settings.head not in HEAD_NAMES,
        f"a task of kind {task.kind}: its labels come from an LLM": not task.labels,
        "loss=binary: take listwise": settings.loss != "listwise",
        "features=cross: take tower": settings.features != "tower",
        "label_features=false: leave it on": not settings.label_features,
        "tune_encoder: leave it off": settings.tune_encoder,
        "choose=auto: take given": settings.choose != "given",
        "labelling=adaptive: take all": settings.labelling != "all",
        "discount: leave it at none": settings.discount != "none",
        "head_prior=isotropic: take learned": settings.head_prior != "learned",
        "label_rank: leave it out": settings.label_rank is not None,
    }
    for fault, holds in faults.items():
        if holds:
            raise SettingsError(f"dp_epsilon does not go with {fault}")


# ---- releases


def clipped(rows: Tensor, norm: float) -> Tensor:
    """Rows [U, D], those longer than `norm` shortened to it; 0 for one that is not finite."""
    length = rows.norm(dim=-1, keepdim=True)
    short: Tensor = rows * (norm / length.clamp_min(1e-12)).clamp_max(1.0)
    return short.where(length.isfinite(), 0.0)


def noisy_sum(rows: Tensor, norm: float, noise: float, draw: Draw) -> Tensor:
    """[D] the sum of clipped rows [U, D], one of each user, with noise of deviation noise · norm:
    without one user it moves by at most `norm`.
    """
    total = clipped(rows.double(), norm).sum(0)
    return total + noise * norm * draw(total.numel()).view_as(total)


def noisy_moments(rows: Tensor, norm: float, noise: float, draw: Draw) -> Tensor:
    """[D, D] Σ rowᵀ row of clipped rows [U, D] with symmetric noise: without one user it moves by
    at most norm² in Frobenius norm, in which the noise is alike in all directions.
    """
    own = clipped(rows.double(), norm)
    size = own.shape[1]
    random = draw(size * size).view(size, size)
    return own.T @ own + noise * norm**2 * (random + random.T) / 2


def budget_of(bundle: Bundle) -> Budget:
    """That of a bundle's settings and number of training users."""
    return Budget.of(bundle.settings, len(bundle.trained_on))


def begun(bundle: Bundle) -> Bundle:
    """A blank bundle whose statistics of the training users are private, where that is asked."""
    if bundle.settings.dp_epsilon is None:
        return bundle
    return replace(bundle, population=private_stats(bundle, budget_of(bundle), secret_normals))


def private_stats(bundle: Bundle, budget: Budget, draw: Draw) -> CohortStats:
    """The population's label shares; the usual cosine is that of the code, not of the users."""
    places = {label: at for at, label in enumerate(bundle.task.labels)}
    rows = torch.zeros(len(bundle.trained_on), len(places))
    for row, user in zip(rows, bundle.trained_on, strict=True):
        for record in bundle.records.get(user, ()):
            if record.output in places:
                row[places[record.output]] += 1
    shares = rows / rows.sum(-1, keepdim=True).clamp_min(1)
    total = noisy_sum(shares, 1.0, budget.noise_of("labels"), draw).clamp_min(1.0)
    return CohortStats(label_shares=tuple((total / total.sum()).tolist()))


# ---- the scorer


def public_features(bundle: Bundle) -> LabelBilinear:
    """Features whose directions are those of public texts; no effects of texts."""
    strategy, width = bundle.task.strategy, bundle.features.encoder.width
    assert isinstance(strategy, LabelKind)
    codes = torch.from_numpy(strategy.label_codes()).float()
    rank = min(DIRECTIONS, width)
    own = min(OWN_DIRECTIONS, rank)
    interaction = LabelBilinear(width, len(codes), rank, codes.shape[1], own_rank=own)
    interaction.coding = codes
    left = torch.from_numpy(bundle.features.texts(generic_requests()))
    interaction.prepare(Groups(left, None, torch.zeros(len(left), 1, 0), torch.ones(len(left), 1)))
    return interaction


def private_scorer(bundle: Bundle, side_names: Sequence[str]) -> Scorer:
    """A scorer that has learned nothing, of public features and fixed strengths."""
    interaction = public_features(bundle)
    head = make_head(bundle.settings.head, interaction, rank=bundle.settings.rank)
    scorer = Scorer(interaction, head, side_names)
    scorer.prior_precision = torch.tensor(PRECISION)
    return scorer


@torch.no_grad()
def learn_privately(
    scorer: Scorer, data: TrainingSet, users: int, budget: Budget, draw: Draw = secret_normals
) -> UserHeads:
    """Set the scorer's base and the prior of heads by private releases; gives the users' heads.
    `users`: how many there are, with those who have no groups.
    """
    fit_base_privately(scorer, data, users, budget, draw)
    fit_prior_privately(scorer, data, users, budget, draw)
    return fit_heads(scorer, data, data.names())


def fit_base_privately(
    scorer: Scorer, data: TrainingSet, users: int, budget: Budget, draw: Draw
) -> None:
    """θ₀ and the side weights: the mean of the later half of the steps of descent."""
    gradients, size = UserGradients.of(scorer, data), scorer.interaction.size
    v = torch.zeros(size + len(scorer.side_names))
    mean = torch.zeros_like(v)
    noise = budget.noise_of("base", STEPS)
    for step in range(STEPS):
        total = noisy_sum(gradients.at(v), CLIP, noise, draw).float()
        v = v - RATE * (total / users + RIDGE * v)
        v[size:][scorer.llm_columns] = 0.0  # no LLM is asked: there is nothing to weigh
        if 2 * step >= STEPS:
            mean += v * 2 / STEPS
    scorer.head.set_shared(mean[:size], torch.zeros(()))
    scorer.side_weight.data.copy_(mean[size:])


@dataclass(frozen=True)
class UserGradients:
    """The mean gradient of each user's losses by θ₀ and the side weights."""

    scorer: Scorer
    data: TrainingSet
    x: Tensor  # [G, ...]
    side: Tensor  # [G, L, E] centred in the group: what all labels have in common counts nothing
    user: Tensor  # [G] the number of each group's user
    count: Tensor  # [U] groups

    @classmethod
    def of(cls, scorer: Scorer, data: TrainingSet) -> "UserGradients":
        """Of these groups."""
        number = {name: at for at, name in enumerate(data.names())}
        user = torch.tensor([number[name] for name in data.users])
        side = data.groups.side_features
        side = side - side.mean(1, keepdim=True)
        count = torch.bincount(user, minlength=len(number)).float()
        return cls(scorer, data, scorer.interaction(data.groups), side, user, count)

    def at(self, v: Tensor) -> Tensor:
        """[U, V + E] at v [V + E]."""
        interaction = self.scorer.interaction
        assert isinstance(interaction, LabelBilinear)
        assert interaction.coding is not None
        own, weights = v[: interaction.size], v[interaction.size :]
        scores = interaction.dot(self.x[None], own[None])[0] + self.side @ weights
        target = self.data.target
        residual = target.sum(-1, keepdim=True) * scores.softmax(-1) - target
        by_head = torch.einsum("gd,gj->gjd", self.x, residual @ interaction.coding).flatten(1)
        by_side = torch.einsum("gle,gl->ge", self.side, residual)
        rows = torch.cat([by_head, by_side], 1)
        out = rows.new_zeros(len(self.count), rows.shape[1]).index_add_(0, self.user, rows)
        return out / self.count[:, None]


def fit_prior_privately(
    scorer: Scorer, data: TrainingSet, users: int, budget: Budget, draw: Draw
) -> None:
    """S: the directions in which users' heads differ by more than the noise does."""
    head, interaction = scorer.head, scorer.interaction
    assert isinstance(head, LinearHead | LowRankHead)
    assert isinstance(interaction, LabelBilinear)
    probe, size = LinearHead(interaction.size, interaction.own_size), interaction.own_size
    probe.shared, probe.shared_bias = head.shared, head.shared_bias
    fitted = fit_heads(scorer, data, data.names(), kind=probe, precision=HEAD_PRECISION)
    rows = torch.from_numpy(np.stack([own.numbers[:size] for own in fitted.values()]))
    noise = budget.noise_of("prior")
    moments = noisy_moments(rows, HEAD_CLIP, noise, draw) / users
    values, vectors = torch.linalg.eigh(moments)
    edge = noise * HEAD_CLIP**2 * math.sqrt(2 * size) / users  # the largest value of noise alone
    most = head.most if isinstance(head, LowRankHead) else size
    kept = (values - edge).clamp_min(0).flip(0)[:most]
    kept = kept[kept > 0]
    own = (kept.sqrt()[:, None] * vectors.T.flip(0)[: len(kept)]).float()
    own = own.view(len(kept), interaction.columns, interaction.own_rank + 1)
    basis = own.new_zeros(len(kept), interaction.columns, interaction.rank + 1)
    basis[..., -interaction.own_rank - 1 :] = own
    head.set_basis(basis.flatten(1) if len(kept) else None)
