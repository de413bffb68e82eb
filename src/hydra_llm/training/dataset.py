"""Labelled groups as tensors: whose they are, and in which order they came.

Knows no files and no LLM. Letters: G groups, C candidates, U users.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hydra_llm.model.feature_cache import FeatureCache
from hydra_llm.model.interactions import Groups, Interaction, make_groups
from hydra_llm.model.newton import Loss

FEW_GROUPS = 6  # of a user; up to so many, each is predicted from those before it
# groups that heads are fitted on, and later ones of the same users on which they are evaluated
Split = tuple["TrainingSet", "TrainingSet"]


@dataclass(frozen=True, slots=True, eq=False)
class LabelledGroup:
    """The pairs of one query, which compete with each other, and the gain of each."""

    user: str
    query: str  # the query's id
    left: str  # the query's text
    rights: Sequence[str]  # [C] records with answers (reranker), candidates' texts (adapter)
    gains: Sequence[float]  # [C] 0 to 1, from the task's gain
    side_features: NDArray[np.floating]  # [C, E]; the scorer names the columns
    position: int = 0  # of the query in the user's order: how many records it may see
    voted: bool = False  # whether the side features include vote shares of the LLM's samples
    exact: bool = False  # a recorded choice: the target is the candidate with gain 1


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """G labelled groups in each user's order."""

    groups: Groups  # with targets
    users: tuple[str, ...]  # whose group: G names; a user's groups stand together, oldest first
    positions: Tensor  # [G] the query's place in its user's order
    voted: Tensor  # [G] True where the side features or the gains come from calls of the LLM
    gains: Tensor  # [G, C] what each candidate is worth, 0 to 1
    index: dict[str, list[int]] = field(init=False, repr=False, compare=False)  # user → places

    def __post_init__(self) -> None:
        index: dict[str, list[int]] = {}
        for i, user in enumerate(self.users):
            index.setdefault(user, []).append(i)
        object.__setattr__(self, "index", index)

    def __len__(self) -> int:
        return len(self.users)

    @property
    def target(self) -> Tensor:
        """[G, C]."""
        assert self.groups.target is not None
        return self.groups.target

    @property
    def informative(self) -> Tensor:
        """[G] True where a candidate is better than another."""
        return self.target.sum(-1) > 0

    def names(self) -> list[str]:
        """Each user once."""
        return list(self.index)

    def take(self, index: Sequence[int] | Tensor) -> "TrainingSet":
        """The groups at these places."""
        index = torch.as_tensor(index, dtype=torch.long)
        users = tuple(self.users[i] for i in index.tolist())
        positions, voted, gains = self.positions[index], self.voted[index], self.gains[index]
        return TrainingSet(self.groups[index], users, positions, voted, gains)

    def of(self, names: Sequence[str]) -> "TrainingSet":
        """The groups of these users."""
        wanted = set(names)
        return self.take([i for i, user in enumerate(self.users) if user in wanted])

    def split_late(self, share: float = 0.3) -> Split:
        """Each user's earlier and later groups."""
        early: list[int] = []
        late: list[int] = []
        for index in self.index.values():
            cut = len(index) - max(1, round(len(index) * share)) if len(index) > 1 else 0
            early, late = early + index[:cut], late + index[cut:]
        return self.take(early), self.take(late)

    def prequential_splits(self) -> list[Split]:
        """The users' nth groups with those before them, for each n; `split_late` where a user has
        more than `FEW_GROUPS`.
        """
        own = list(self.index.values())
        most = max(map(len, own), default=0)
        if most > FEW_GROUPS:
            return [self.split_late()]
        splits = []
        for step in range(most):
            early = [i for index in own for i in index[:step]]
            late = [i for index in own for i in index[step : step + 1]]
            splits.append((self.take(early), self.take(late)))
        return splits

    def block_splits(self) -> list[Split]:
        """Blocks of the users' groups with those before them: the first two, then up to as many as
        there are before, so that every group counts; each alone where no user has more than
        `FEW_GROUPS`.
        """
        own = list(self.index.values())
        most = max(map(len, own), default=0)
        if most <= FEW_GROUPS:
            return self.prequential_splits()
        splits, start = [], 0
        while start < most:
            end = max(2, 2 * start)
            early = [i for index in own for i in index[:start]]
            late = [i for index in own for i in index[start:end]]
            splits.append((self.take(early), self.take(late)))
            start = end
        return splits

    @property
    def partly_voted(self) -> bool:
        """Whether the LLM's calls made some of the groups, but not all."""
        return 0 < int(self.voted.sum()) < len(self)

    def calibration_splits(self) -> list[Split]:
        """The groups before each user's first voted one, and the voted groups, of a set that is
        partly voted; else `prequential_splits`.
        """
        if not self.partly_voted:
            return self.prequential_splits()
        places = torch.where(self.voted, self.positions, torch.iinfo(torch.long).max)
        before: list[int] = []
        for index in self.index.values():
            first = int(places[index].min())
            before += [i for i in index if not self.voted[i] and self.positions[i] < first]
        return [(self.take(before), self.take(self.voted.nonzero()[:, 0]))]

    def records_seen(self) -> dict[str, int]:
        """User → how many records a head learns from here; the last query's answer is the last."""
        return {user: int(self.positions[index].max()) + 1 for user, index in self.index.items()}


def chunks_of_users(
    data: TrainingSet, names: Sequence[str], *, numbers: int = 30_000_000, per_group: int = 1
) -> Iterator[tuple[list[str], Tensor]]:
    """Users of like length, few enough for memory, with places of their groups [U, G], −1: none."""
    index = data.index
    ordered = sorted((name for name in names if name in index), key=lambda name: len(index[name]))
    while ordered:
        count = max(1, numbers // max(1, len(index[ordered[-1]]) * per_group))
        chunk, ordered = ordered[-count:], ordered[:-count]
        places = [torch.tensor(index[name]) for name in chunk]
        yield chunk, pad_sequence(places, batch_first=True, padding_value=-1)


def folds(names: Sequence[str], count: int, seed: int) -> list[list[str]]:
    """The users in `count` shuffled parts (fewer where there are too few users)."""
    order = np.random.default_rng(seed).permutation(len(names))
    return [[names[i] for i in order[k::count]] for k in range(min(count, len(names)))]


def targets(
    gains: Tensor, mask: Tensor, *, rule: str, loss: Loss, spread: float | None = None
) -> Tensor:
    """What each candidate should get, from its gain [G, C].

    Listwise: a distribution over the group. `exact`: equal shares for those with gain 1 (labels:
    the right one); `above-mean`: for those above the group's mean; `graded`: softmax of the gains,
    centred in the group and divided by `spread`. All zeros where all gains are equal.
    Binary: `exact` and `above-mean` 0 or 1, `graded` the gain itself; where all gains are 0 or 1,
    right and wrong are absolute and need no mean.
    """
    masked, centred = gains * mask, _centred(gains, mask)
    right = (masked >= 1 - 1e-9).float()
    above = right if rule == "exact" else (centred > 1e-9).float() * mask
    if loss == "binary":
        absolute = ((gains == 0) | (gains == 1) | ~mask).all(-1, keepdim=True)
        return masked if rule == "graded" else torch.where(absolute, right, above)
    differs = (centred.abs() > 1e-9).any(-1, keepdim=True) & (above.sum(-1, keepdim=True) > 0)
    share = above / above.sum(-1, keepdim=True).clamp_min(1)
    if rule == "graded":
        scale = spread if spread else within_group_spread(gains, mask)
        share = (centred / scale).masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.where(differs, share, 0.0).nan_to_num(0.0)


def _centred(gains: Tensor, mask: Tensor) -> Tensor:
    count = mask.sum(-1, keepdim=True).clamp_min(1)
    return (gains - (gains * mask).sum(-1, keepdim=True) / count) * mask


def within_group_spread(gains: Tensor, mask: Tensor) -> float:
    """The root mean square of gains around their group's mean, where they differ."""
    centred = _centred(gains, mask)
    differs = (centred.abs() > 1e-9).any(-1)
    if not differs.any():
        return 1.0
    return float((centred[differs].square().sum() / mask[differs].sum()).sqrt().clamp_min(1e-6))


def gain_spread(groups: Sequence[LabelledGroup]) -> float:
    """The training groups' spread, kept: so no user's targets depend on another user's."""
    rows = [torch.tensor(group.gains) for group in groups if not group.exact]
    if not rows:
        return 1.0
    gains = pad_sequence(rows, batch_first=True, padding_value=torch.nan)
    return within_group_spread(gains.nan_to_num(0.0), ~gains.isnan())


def in_set_order(groups: Sequence[LabelledGroup]) -> list[LabelledGroup]:
    """The groups that have candidates, each user's together, oldest first."""
    some = (group for group in groups if group.rights)
    return sorted(some, key=lambda group: (group.user, group.position, group.voted))


def make_training_set(
    store: FeatureCache,
    interaction: Interaction,
    groups: Sequence[LabelledGroup],
    *,
    rule: str,
    loss: Loss,
    spread: float | None = None,
) -> TrainingSet:
    """Labelled groups as tensors, each user's oldest first; `rule`, `spread` as in `targets`."""
    groups = in_set_order(groups)
    lefts, rights = [group.left for group in groups], [group.rights for group in groups]
    side_features = [group.side_features for group in groups]
    plain = make_groups(store, interaction, lefts, rights, side_features)
    gains = torch.zeros(plain.mask.shape)
    gains[plain.mask] = torch.tensor([gain for group in groups for gain in group.gains])
    target = targets(gains, plain.mask, rule=rule, loss=loss, spread=spread)
    exact = torch.tensor([group.exact for group in groups], dtype=torch.bool)
    if bool(exact.any()):
        chosen = targets(gains[exact], plain.mask[exact], rule="exact", loss=loss)
        target[exact] = chosen
    positions = torch.tensor([group.position for group in groups], dtype=torch.long)
    voted = torch.tensor([group.voted for group in groups], dtype=torch.bool)
    users = tuple(group.user for group in groups)
    return TrainingSet(replace(plain, target=target), users, positions, voted, gains)
