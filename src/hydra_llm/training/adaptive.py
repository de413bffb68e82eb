"""Adaptive labelling (`labelling = adaptive`): the LLM labels queries in rounds, until one more
round no longer helps users whom the scorer has not seen.

    order   users take turns, in an order drawn by the seed, as are a user's queries
    rounds  `FIRST` queries, then each time as many as there are
    stop    after the first round whose labels lower the loss of held-out training users by no more
            than its standard error over users

Both losses of a round are of the same labelled groups, each by a fit without its own user: to the
earlier rounds, and to all. Where the history labels too (labels and ratings), what is fitted is the
calibration, which is all that learns from the LLM then; else it is the shared head. Knows training
users alone. Nothing but the labels decides, and the cache keeps them: a stopped run continues.
"""

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hydra_llm.bundle import Bundle
from hydra_llm.llm.concurrency import Progress, StageProgress
from hydra_llm.model.scorer import Scorer
from hydra_llm.pipeline import UserPipeline
from hydra_llm.side_features import Featurizer
from hydra_llm.training.calibration import HeldOut, VoteTable, error_by_users
from hydra_llm.training.choosing import some_of_each
from hydra_llm.training.dataset import LabelledGroup, in_set_order
from hydra_llm.training.labelling import Collected, merged
from hydra_llm.training.strengths import Strengths
from hydra_llm.training.train_scorer import LabelledData, refitted_losses, train_scorer
from hydra_llm.types import Query

FIRST = 32  # queries of the first round
JUDGE_STAGE = "judge labels"
Label = Callable[[UserPipeline, Sequence[Query], Progress | None], Awaitable[Collected]]
Key = tuple[str, str]  # user and query


class Losses(NamedTuple):
    """What labelled groups [G] cost, by fits that have not seen their users."""

    before: Tensor  # [G] fitted to the labels of the earlier rounds
    after: Tensor  # [G] fitted to all
    users: Sequence[str]  # [G] whose group


UNJUDGED = Losses(torch.full((1,), torch.nan), torch.zeros(1), [""])  # no user is held out
# (earlier rounds, all rounds) → the losses of all rounds' groups
Judge = Callable[[Collected, Collected], Losses]


@dataclass
class Rounds:
    """Asks for labels in rounds; `report` says what was asked, and what each round gained."""

    judge: Judge
    seed: int
    report: dict[str, Any] = field(default_factory=dict)

    async def label(
        self,
        label: Label,
        pipeline: UserPipeline,
        queries: Sequence[Query],
        progress: Progress | None = None,
    ) -> Collected:
        """What `label` gives for as many of the queries as help."""
        ordered, done = in_turns(queries, self.seed), 0
        known, rounds = Collected(lambda featurizer: []), list[dict[str, Any]]()
        while done < len(ordered):
            end = min(len(ordered), max(FIRST, 2 * done))
            own = None if progress is None else _from(progress, done, len(ordered))
            before, more = known, await label(pipeline, ordered[done:end], own)
            known, done = merged([before, more]), end
            rounds.append({"queries": end})
            if len(known.failures) == known.calls:
                break
            if end > FIRST:
                losses = self.judge(before, known)
                saved = losses.before - losses.after
                gained, error = float(saved.mean()), float(error_by_users(saved, losses.users))
                rounds[-1] |= {"gained": gained, "error": error}
                if gained <= error:  # NaN, where no user is held out, stops nothing
                    break
        if progress is not None:
            progress(done, done)
        left, calls = len(ordered) - done, known.usage.calls + known.usage.cached
        of_left = round(left * calls / max(1, done))
        self.report = {"queries": done, "left": left, "rounds": rounds, "saved_calls": of_left}
        return known

    def __str__(self) -> str:
        asked, left, calls = (self.report[name] for name in ("queries", "left", "saved_calls"))
        if not left:
            return f"all {asked} queries were labelled"
        last = self.report["rounds"][-1]
        gained = f"{last['gained']:.4f} ± {last['error']:.4f}"
        why = f"the last labels lowered the loss of held-out users by {gained}"
        return f"{asked} of {asked + left} queries were labelled ({calls} calls saved): {why}"


def in_turns(queries: Sequence[Query], seed: int) -> list[Query]:
    """The queries in the order in which they are labelled, of whatever seed the scorer is."""
    order = np.random.default_rng(seed).permutation(len(queries))
    return some_of_each([queries[i] for i in order], len(queries))


def _from(progress: Progress, before: int, total: int) -> Progress:
    return lambda done, _: progress(before + done, total)


def judge_by_refit(
    bundle: Bundle, data_of: Callable[[Collected], LabelledData], strengths: Strengths
) -> Judge:
    """What labels are worth to the shared head."""

    def judge(before: Collected, known: Collected) -> Losses:
        data, earlier = data_of(known), data_of(before).groups(bundle.featurizer)
        groups = in_set_order(data.groups(bundle.featurizer))
        if len({group.user for group in groups}) < 2:
            return UNJUDGED
        of_llm = torch.tensor([not group.exact for group in groups])

        def losses(used: Sequence[LabelledGroup]) -> Tensor:
            return refitted_losses(bundle, data, set(map(_key, used)), strengths)[of_llm]

        users = [group.user for group in groups if not group.exact]
        return Losses(losses(earlier), losses(groups), users)

    return judge


def judge_by_votes(
    bundle: Bundle, unasked: LabelledData, strengths: Strengths, progress: StageProgress
) -> tuple[Judge, Strengths]:
    """What the LLM's votes are worth to the calibration of a scorer that learns from histories;
    `unasked` has the groups of all queries, without votes. And the strengths that were chosen.
    """
    parts: list[HeldOut] = []

    def told(stage: str, done: int, total: int) -> None:
        progress(JUDGE_STAGE, done, total)

    trained = train_scorer(bundle, unasked, progress=told, strengths=strengths, keep=parts.extend)
    groups = unasked.groups(bundle.featurizer)
    judge = judge_of_votes(trained.scorers[unasked.name], parts, groups, bundle.featurizer)
    return judge, strengths.chosen(trained.report[unasked.name])


def judge_of_votes(
    scorer: Scorer,
    held_out: Sequence[HeldOut],
    groups: Sequence[LabelledGroup],
    featurizer: Featurizer,
) -> Judge:
    """What votes are worth to the calibration of a scorer's held-out groups, made of `groups`."""
    if not held_out:  # there is one user alone
        return lambda before, known: UNJUDGED
    table = VoteTable(scorer, held_out)
    ordered = in_set_order([group for group in groups if group.voted])
    place_of = _places(ordered, table.users)

    def judge(before: Collected, known: Collected) -> Losses:
        votes = {
            place_of[_key(group)]: torch.from_numpy(group.side_features[:, table.columns]).float()
            for group in known.groups(featurizer)
        }
        used = {place_of[_key(group)] for group in before.groups(featurizer)}
        users = [table.users[place] for place in votes]
        return Losses(table.losses(votes, used), table.losses(votes, set(votes)), users)

    return judge


def _places(groups: Sequence[LabelledGroup], users: Sequence[str]) -> dict[Key, int]:
    """Where each group stands among those of `users` [G], which have each user's in this order."""
    places: dict[str, list[int]] = {}
    for place, user in enumerate(users):
        places.setdefault(user, []).append(place)
    seen: Counter[str] = Counter()
    found = {}
    for group in groups:
        found[_key(group)] = places[group.user][seen[group.user]]
        seen[group.user] += 1
    return found


def _key(group: LabelledGroup) -> Key:
    return group.user, group.query
