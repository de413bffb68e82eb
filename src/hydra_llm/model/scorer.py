"""The factorized scorer: one class, for the reranker and for the adapter (paper, 3.2 and 3.3).

    score(user, pair) = β · [ g(φ; θ₀ + δ) + w · side features ] + v · votes

φ comes from an interaction, g and δ from a kind of head. A scorer holds shared weights alone; a
user is a `Head` that comes with the call. β and v calibrate the scores, so that their softmax over
a group may be read as a distribution; v weighs what only the LLM's samples tell.
Letters: G groups, C candidates, E side features. Knows no users, texts, tasks or files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hydra_llm.model.forgetting import STAYS, counted
from hydra_llm.model.head import FEEDBACK_WINDOW, Head
from hydra_llm.model.heads import HeadKind, HeadProblem, make_head
from hydra_llm.model.heads.linear import LinearHead
from hydra_llm.model.interactions import Groups, Interaction, make_interaction
from hydra_llm.model.laplace import LaplacePosterior
from hydra_llm.model.newton import Loss

GroupHeads = Sequence[Head | None]  # one for each group; None is the shared head


class Scorer(nn.Module):
    """What all users share: features, shared head, weights of side features, calibration."""

    side_mean: Tensor
    side_scale: Tensor
    scale: Tensor
    scale_alone: Tensor
    gain_spread: Tensor
    vote_weight: Tensor
    prior_precision: Tensor
    side_prior: Tensor
    discount: Tensor | None

    def __init__(
        self,
        interaction: Interaction,
        head: HeadKind,
        side_names: Sequence[str],
        *,
        loss: Loss = "listwise",
    ):
        super().__init__()
        self.interaction, self.head, self.loss = interaction, head, loss
        self.posterior = LaplacePosterior()
        self.side_names = tuple(side_names)
        count = len(self.side_names)
        self.side_weight = nn.Parameter(torch.zeros(count))
        self.register_buffer("side_mean", torch.zeros(count))
        self.register_buffer("side_scale", torch.ones(count))
        self.register_buffer("scale", torch.ones(()))  # β
        self.register_buffer("scale_alone", torch.ones(()))  # β of groups without votes
        self.register_buffer("gain_spread", torch.ones(()))  # of gains within a training group
        self.register_buffer("vote_weight", torch.zeros(count))
        # the mean of the prior of the side weights, by plain units of the columns; used in learning
        self.register_buffer("side_prior", torch.zeros(count), persistent=False)
        self.register_buffer("prior_precision", torch.tensor(10.0))
        self.register_buffer("discount", None)  # by age, of what heads learn from; None: none

    def standardised(self, groups: Groups) -> Tensor:
        """[G, C, E] the side features by mean and deviation of the training set."""
        return (groups.side_features - self.side_mean) / self.side_scale

    @property
    def hears_llm(self) -> bool:
        """Whether a column of the LLM's samples or probabilities has a weight."""
        weights = self.side_weight.abs() + self.vote_weight.abs()
        return bool((weights[self.llm_columns] > 0).any())

    @property
    def llm_columns(self) -> list[int]:
        """The side features that the LLM's samples or probabilities fill; else they are 0."""
        return [i for i, name in enumerate(self.side_names) if name.startswith("llm_")]

    def side_score(self, groups: Groups) -> Tensor:
        """[G, C] the score of the side features alone."""
        return self.standardised(groups) @ self.side_weight

    def core(self, groups: Groups, heads: GroupHeads | None = None) -> Tensor:
        """[G, C] scores before calibration, on which heads are fitted; None: the shared ones."""
        x = self.interaction(groups)
        if heads is None:
            return self.head.shared_score(self.interaction, x) + self.side_score(groups)
        return self.head.score(self.interaction, x, heads) + self.side_score(groups)

    def calibrated(self, core: Tensor, groups: Groups) -> Tensor:
        """[G, C] core scores with β and the votes; −inf where there is no candidate."""
        scores = self._scales(groups) * core + groups.side_features @ self.vote_weight
        return scores.masked_fill(~groups.mask, -torch.inf)

    def _scales(self, groups: Groups) -> Tensor:
        """[G, 1] β, which is another one where the LLM's votes do not add to the score."""
        voted = groups.side_features[..., self.llm_columns].abs().sum((-2, -1)) > 0
        return torch.where(voted, self.scale, self.scale_alone)[:, None]

    @torch.inference_mode()
    def score(self, groups: Groups, heads: GroupHeads) -> Tensor:
        """[G, C] calibrated, a head for each group (None: shared); ValueError for a wrong head."""
        return self.calibrated(self.core(groups, heads), groups)

    @torch.inference_mode()
    def parts(self, groups: Groups, head: Head | None) -> dict[str, Tensor]:
        """What adds up to the calibrated scores [C] of one group (G = 1): the `shared` head, what
        the user's `head` adds to it, and each side feature by name.
        """
        x, scale = self.interaction(groups), self._scales(groups)
        shared = self.head.shared_score(self.interaction, x)
        own = self.head.score(self.interaction, x, [head]) - shared
        sides = scale[..., None] * self.standardised(groups) * self.side_weight
        sides += groups.side_features * self.vote_weight
        named = zip(self.side_names, sides[0].unbind(-1), strict=True)
        return {"shared": (scale * shared)[0], "head": (scale * own)[0], **dict(named)}

    def shares(self, scores: Tensor) -> Tensor:
        """Calibrated scores [..., C] as a distribution (binary: normalised probabilities)."""
        if self.loss == "listwise":
            return scores.softmax(-1)
        odds = torch.sigmoid(scores)
        return odds / odds.sum(-1, keepdim=True).clamp_min(1e-12)

    @torch.inference_mode()
    def covariance(self, groups: Groups, head: Head | None) -> Tensor | None:
        """[C, C] how uncertain one group's scores (G = 1) are by the head's posterior:
        β² φ (λ + n·F)⁻¹ φᵀ after n records. None where that is not known.
        """
        if not self.updates_online:
            return None
        x, records = self.interaction(groups), 0 if head is None else head.records
        prior = self.head.precisions(float(self.prior_precision))
        precision = prior + counted(records, self.rate) * self.posterior.values
        covariance = self.head.covariance(self.interaction, x, self.posterior, precision)
        return None if covariance is None else self._scales(groups).square() * covariance

    # ---- learning heads

    @property
    def rate(self) -> float | None:
        """What a record counts less than the one after it; None without a discount."""
        return None if self.discount is None else float(self.discount)

    @torch.no_grad()
    def head_problem(self, groups: Groups, users: Sequence[str], index: Tensor) -> HeadProblem:
        """The heads of U users from labelled groups; `index` [U, G] names theirs, −1 is padding."""
        flat = groups[index.clamp_min(0).flatten()]
        assert flat.target is not None
        x = self.interaction(flat)
        shape = (*index.shape, groups.mask.shape[1])
        mask = flat.mask.view(shape) & (index >= 0)[..., None]
        return HeadProblem(
            users=tuple(users),
            interaction=self.interaction,
            x=x.view(*index.shape, *x.shape[1:]),
            offset=self.side_score(flat).view(shape),
            target=flat.target.view(shape) * mask,
            mask=mask,
            loss=self.loss,
            precision=float(self.prior_precision),
            discount=self.rate,
        )

    @property
    def updates_online(self) -> bool:
        """Whether feedback can change a head without a new fit."""
        return self.head.updates_online and self.posterior.known

    def online_update(self, head: Head | None, judged: Groups, changed: int | None = None) -> Head:
        """The head after feedback on one user's groups with targets, oldest first, of which the
        last `FEEDBACK_WINDOW` count; `head` is as it was fitted. `changed`: how many of the judged
        groups came before a change of taste; None: there was none.
        """
        groups = judged[-FEEDBACK_WINDOW:]
        if not len(groups):
            return Head.of(self.head.empty()) if head is None else head
        places = torch.arange(len(judged))[-FEEDBACK_WINDOW:][None]
        problem = self.head_problem(judged, [""], places).discounted(places, changed)
        keep = (self.rate or 1.0) ** len(groups) * (1.0 if changed is None else STAYS)
        problem = replace(problem, keep=keep)
        return self.head.online_update(problem, self.posterior, head)

    # ---- on disk: plain values and tensors, no pickle

    def config(self) -> dict[str, Any]:
        """All that is needed to build an empty scorer of the same shape."""
        return {
            "interaction": self.interaction.config(),
            "head": self.head.name,
            "rank": self.head.rank,
            "evidence": list(self.side_names),
            "loss": self.loss,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Every number of the scorer under a name."""
        return {name: value.detach() for name, value in self.state_dict().items()}

    @classmethod
    def restore(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Scorer":
        """The inverse of `config` and `tensors`; KeyError or RuntimeError if they do not fit."""
        interaction = make_interaction(config["interaction"])
        head = make_head(config["head"], interaction, rank=config["rank"])
        scorer = cls(interaction, head, config["evidence"], loss=config["loss"])
        left, right = tensors["posterior.left"], tensors["posterior.right"]
        top = len(tensors.get("posterior.top", ()))
        scorer.posterior = LaplacePosterior(len(left), len(right), top)
        if isinstance(head, LinearHead) and "head.basis" in tensors:
            head.set_basis(torch.zeros_like(tensors["head.basis"]))
        shared = dict(tensors)
        shared.setdefault("scale_alone", shared["scale"])  # until format 3 there was one β
        if "discount" in shared:
            scorer.discount = torch.zeros(())
        scorer.load_state_dict(shared)
        return scorer.eval()
