"""The factorized scorer: one class, used by the reranker and by the adapter (DESIGN 4, paper
sections 3.2 and 3.3).

    score(u, pair) = β · [ g(φ; θ₀ + δᵤ) + w · evidence ] + v · votes

φ comes from a interaction, g and δᵤ from a head bank. The prior mean of a user's score is a
function of the history: it enters through `evidence` (DESIGN 4: `Prior.mean(history)`), so that a
user is served before any head is fitted. β and v calibrate the scores so that their softmax over a
group may be read as a distribution; v holds what only the LLM's samples tell.

Letters: G groups, C candidates, E evidence width. Knows no texts, no tasks and no files.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hydra_llm.errors import UnknownUser
from hydra_llm.model.heads import HeadBank, KernelBank, LinearBank, LowRankBank, make_bank
from hydra_llm.model.interactions import Groups, Interaction, make_interaction
from hydra_llm.model.laplace import LaplacePosterior

Loss = Literal["listwise", "binary"]
NOBODY = -1
RENAMED = {"combiner.": "interaction.", "evidence_": "side_"}
"""How tensors began in bundles of before, and how now."""
_RENAMED = re.compile("|".join(f"^{re.escape(old)}" for old in RENAMED))
FORGOTTEN = "\0forgotten-"
"""What stands in place of the name of a user who was forgotten, before the row's number."""


class Scorer(nn.Module):
    """Shared base, shared head, one row per user."""

    side_mean: Tensor
    side_scale: Tensor
    scale: Tensor
    gain_spread: Tensor
    vote_weight: Tensor
    prior_precision: Tensor

    def __init__(
        self,
        interaction: Interaction,
        bank: HeadBank,
        evidence: Sequence[str],
        *,
        loss: Loss = "listwise",
    ):
        super().__init__()
        self.interaction, self.bank, self.loss = interaction, bank, loss
        self.curvature = LaplacePosterior()
        self.side_names = tuple(evidence)
        self.users: dict[str, int] = {}
        self.known: dict[str, int] = {}
        self.empty: list[int] = []
        self.side_weight = nn.Parameter(torch.zeros(len(self.side_names)))
        self.register_buffer("side_mean", torch.zeros(len(self.side_names)))
        self.register_buffer("side_scale", torch.ones(len(self.side_names)))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer(
            "gain_spread", torch.ones(())
        )  # how far gains lie apart within a training group
        self.register_buffer("vote_weight", torch.zeros(len(self.side_names)))
        self.register_buffer("prior_precision", torch.tensor(10.0))

    def row(self, user: str) -> int:
        """The user's row, or `NOBODY`: an unknown user gets the shared head."""
        return self.users.get(user, NOBODY)

    def rows(self, users: Sequence[str]) -> Tensor:
        return torch.tensor([self.row(user) for user in users], dtype=torch.long)

    def learned_from(self, user: str, records: int) -> None:
        """Note how many of a user's records, oldest first, the head was fitted on: it may only
        answer where all of them may be seen.
        """
        self.known[user] = records

    def serving_row(self, user: str, visible: int | None = None) -> int:
        """The user's row, or `NOBODY` for a query that may see fewer records than the head was
        fitted on: time never leaks.
        """
        return (
            NOBODY if visible is not None and visible < self.known.get(user, 0) else self.row(user)
        )

    def enrol(self, users: Sequence[str]) -> None:
        """Give each user a row whose δ is 0; users who have one keep it."""
        for user in users:
            if user not in self.users:
                self.users[user] = self._empty_row()
        self.bank.grow(len(self.users))

    def _empty_row(self) -> int:
        """The row of somebody who was forgotten, or a new one."""
        if not self.empty:
            return len(self.users)
        row = self.empty.pop()
        del self.users[f"{FORGOTTEN}{row}"]
        return row

    def head_of(self, user: str) -> Tensor:
        """The user's δ as a flat vector: what is kept of a user outside of this scorer.

        Raises:
            UnknownUser: no such user.
        """
        if user not in self.users:
            raise UnknownUser(f"no head for user '{user}'")
        return self.bank.take(self.row(user))

    def put_head(self, user: str, numbers: Tensor, known: int) -> None:
        """Give the user, who may be new, a δ that `head_of` gave, fitted on `known` records.

        Raises:
            ValueError: it is of another kind of head.
        """
        self.enrol([user])
        self.bank.put(self.row(user), numbers)
        self.learned_from(user, known)

    def forget(self, user: str) -> None:
        """Set the user's δ to 0 and drop the name; the row stays empty, for whoever is enrolled
        next, so that no other row moves.

        Raises:
            UnknownUser: no such user.
        """
        if user not in self.users:
            raise UnknownUser(f"no head for user '{user}'")
        row = self.users.pop(user)
        self.known.pop(user, None)
        self.bank.clear(row)
        self.users[f"{FORGOTTEN}{row}"] = row
        self.empty.append(row)

    def side_score(self, groups: Groups) -> Tensor:
        """[G, C]: what the evidence alone says, standardised as in training."""
        standard = (groups.evidence - self.side_mean) / self.side_scale
        return standard @ self.side_weight

    def core(self, groups: Groups, rows: Tensor) -> Tensor:
        """[G, C] scores before calibration: what heads are fitted on."""
        own: Tensor = self.bank(self.interaction, self.interaction(groups), rows)
        return own + self.side_score(groups)

    def forward(self, groups: Groups, rows: Tensor) -> Tensor:
        """[G, C] calibrated scores; −inf where there is no candidate."""
        scores = self.scale * self.core(groups, rows) + groups.evidence @ self.vote_weight
        return scores.masked_fill(~groups.mask, -torch.inf)

    @torch.inference_mode()
    def score(
        self, groups: Groups, users: Sequence[str], visible: Sequence[int] | None = None
    ) -> Tensor:
        """[G, C] calibrated scores of G groups, one user each; `visible`: how many records each
        query may see, see `serving_row`.
        """
        seen = [None] * len(users) if visible is None else visible
        rows = [self.serving_row(user, count) for user, count in zip(users, seen, strict=True)]
        scores: Tensor = self(groups, torch.tensor(rows, dtype=torch.long))
        return scores

    @torch.inference_mode()
    def distribution(self, groups: Groups, users: Sequence[str]) -> Tensor:
        """[G, C] each group's scores as a distribution: softmax, or normalised probabilities for
        the binary loss.
        """
        return self.shares(self.score(groups, users))

    def shares(self, scores: Tensor) -> Tensor:
        """Calibrated scores [..., C] as a distribution over C."""
        if self.loss == "listwise":
            return scores.softmax(-1)
        odds = torch.sigmoid(scores)
        return odds / odds.sum(-1, keepdim=True).clamp_min(1e-12)

    @torch.inference_mode()
    def covariance(self, groups: Groups, user: str, visible: int | None = None) -> Tensor | None:
        """[C, C] how uncertain the scores of one group (G = 1) are, as far as the user's head is:
        β² φ (λ + N·F)⁻¹ φᵀ after N records.

        None where that is not known: `kernel` and `mlp` heads, and bundles without curvature.
        """
        if not self.curvature.known or not isinstance(self.bank, LinearBank | LowRankBank):
            return None
        count = groups.mask.shape[1]
        x = self.interaction(groups)
        rows = self.interaction.outer(x[None].expand(count, *x.shape), torch.eye(count)[:, None])
        rows = rows @ self.bank.basis.T if isinstance(self.bank, LowRankBank) else rows
        known = 0 if self.serving_row(user, visible) == NOBODY else self.known.get(user, 0)
        turned = (
            self.curvature.back(rows)
            * (self.prior_precision + known * self.curvature.values).rsqrt()
        )
        spread: Tensor = self.scale.square() * turned @ turned.T
        return spread

    def without_users(self) -> "Scorer":
        """A copy of what is shared, with nobody in it."""
        own = ("bank.keys.", "bank.residuals.")
        tensors = {
            name: value.clone()
            for name, value in self.tensors().items()
            if not name.startswith(own)
        }
        for name in ("bank.weight", "bank.bias"):
            if name in tensors:
                tensors[name] = tensors[name][:0]
        return Scorer.restore({**self.config(), "users": [], "known": []}, tensors)

    # ---- on disk: plain values and tensors, no pickle

    def config(self) -> dict[str, Any]:
        """All that is needed to build an empty scorer of the same shape."""
        return {
            "interaction": self.interaction.config(),
            "head": self.bank.kind,
            "rank": getattr(self.bank, "basis", torch.zeros(0)).shape[0],
            "evidence": list(self.side_names),
            "loss": self.loss,
            "users": (
                users := sorted(self.users, key=self.row)
            ),  # by row: a forgotten user's name stands last in the dict
            "known": [self.known.get(user, 0) for user in users],
        }

    def tensors(self) -> dict[str, Tensor]:
        """Every number of the scorer under a name."""
        out = {
            name: value.detach()
            for name, value in self.state_dict().items()
            if isinstance(value, Tensor)
        }
        if isinstance(self.bank, KernelBank):
            for row, (keys, residuals) in enumerate(
                zip(self.bank.keys, self.bank.residuals, strict=True)
            ):
                if len(keys):
                    out[f"bank.keys.{row}"], out[f"bank.residuals.{row}"] = keys, residuals
        return out

    @classmethod
    def restore(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Scorer":
        """The inverse of `config` and `tensors`.

        Raises:
            KeyError, RuntimeError: the tensors do not fit the configuration.
        """
        interaction = make_interaction(config.get("interaction") or config["combiner"])
        tensors = {
            _RENAMED.sub(lambda old: RENAMED[old[0]], name): value
            for name, value in tensors.items()
        }
        users = {user: row for row, user in enumerate(config["users"])}
        bank = make_bank(config["head"], interaction, rank=config["rank"] or 16, users=len(users))
        scorer = cls(interaction, bank, config["evidence"], loss=config["loss"])
        scorer.users = users
        scorer.empty = [row for user, row in users.items() if user.startswith(FORGOTTEN)]
        scorer.curvature = LaplacePosterior(
            *(len(tensors.get(f"curvature.{part}", ())) for part in ("left", "right"))
        )
        plain = {
            name: value
            for name, value in tensors.items()
            if not name.startswith(("bank.keys.", "bank.residuals."))
        }
        if isinstance(bank, KernelBank):
            for name in tensors:
                if name.startswith("bank.keys."):
                    row = int(name.removeprefix("bank.keys."))
                    bank.remember(row, tensors[name], tensors[f"bank.residuals.{row}"])
            plain["bank._extra_state"] = bank.get_extra_state()  # type: ignore[assignment]
        empty = {
            f"curvature.{name}": value for name, value in LaplacePosterior().state_dict().items()
        }
        scorer.load_state_dict({**empty, **plain})  # bundles of before have no curvature
        scorer.known = dict(zip(config["users"], config["known"], strict=True))
        return scorer.eval()
