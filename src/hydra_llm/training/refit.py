"""A user's fit that goes on: after one more record that record alone is labelled and encoded, and
the head starts from where it was. The minimum is that of a fit from scratch: labels and features
of a record depend on the records before it alone.

Letters: G groups, C candidates, P numbers of a head.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from hydra_llm.bundle import Bundle
from hydra_llm.history import in_order, rising
from hydra_llm.model.head import Head
from hydra_llm.model.heads import HeadProblem
from hydra_llm.training.dataset import LabelledGroup, TrainingSet, in_set_order
from hydra_llm.training.learned import Learned
from hydra_llm.training.train_scorer import head_data, sgd_config, with_times
from hydra_llm.types import Query, Record


@dataclass(frozen=True, slots=True)
class Kept:
    """What one user's head of one scorer was fitted on."""

    records: tuple[Record, ...]  # oldest first
    positions: Tensor  # [G] of the groups' queries
    asked: Mapping[str, int]  # query that the LLM has labelled → place of its group
    problem: HeadProblem  # U = 1
    numbers: np.ndarray  # [P]

    @property
    def bytes(self) -> int:
        """About how many it takes."""
        own = self.problem
        tensors = (own.x, own.offset, own.target, own.mask)
        return sum(tensor.nbytes for tensor in tensors) + self.numbers.nbytes

    def unasked(self, queries: Sequence[Query]) -> list[Query]:
        """Those that the LLM has not labelled."""
        return [query for query in queries if query.id not in self.asked]


KeptFit = dict[str, Kept]  # by scorer


def continued(
    kept: Mapping[str, KeptFit] | None, bundle: Bundle, name: str, users: Sequence[str]
) -> Kept | None:
    """What was kept of the one user, where the history has grown at its end alone, under the same
    scorer.
    """
    user = users[0] if kept and users else ""
    before, records = (kept or {}).get(user, {}).get(name), in_order(bundle.records.get(user, ()))
    if before is None or before.problem.interaction is not bundle.scorers[name].interaction:
        return None
    grown = before.records == tuple(records[: len(before.records)])
    return before if grown and rising(records) else None


@dataclass(frozen=True, slots=True)
class Groups:
    """One user's groups that are new since the fit before."""

    user: str
    weak: Sequence[LabelledGroup]
    of_llm: Sequence[LabelledGroup]
    queries: Sequence[Query]  # of which the LLM's labels count, earlier ones too


def refit(learned: Learned, name: str, new: Groups, before: Kept | None) -> None:
    """Add a user's head of a scorer, and what the next fit of the user goes on from."""
    started, bundle, wanted = perf_counter(), learned.bundle, {own.id for own in new.queries}
    labelled, encoded = head_data(bundle, name, [*new.weak, *new.of_llm]), perf_counter()
    changed = learned.changed.get(new.user)
    taken = New(new.user, labelled, places_of(new.weak, new.of_llm), changed)
    head, kept = solve(bundle, name, taken, before, wanted)
    ended = perf_counter()
    if kept is not None:
        learned.kept.setdefault(new.user, {})[name] = kept
    learned.add_heads(name, {new.user: head}, ended - started, ended - encoded)


@dataclass(frozen=True, slots=True)
class New:
    """The same as the scorer reads them."""

    user: str
    labelled: TrainingSet
    asked: Mapping[str, int]  # query that the LLM has labelled → place of its group
    changed: int | None = None  # how many records came before a change of taste


def places_of(weak: Sequence[LabelledGroup], of_llm: Sequence[LabelledGroup]) -> dict[str, int]:
    """The places in one training set of those that the LLM has labelled, by query."""
    asked, ordered = set(map(id, of_llm)), in_set_order([*weak, *of_llm])
    return {own.query: place for place, own in enumerate(ordered) if id(own) in asked}


def solve(
    bundle: Bundle, name: str, new: New, before: Kept | None, wanted: Collection[str]
) -> tuple[Head, Kept | None]:
    """The user's head on the kept groups and the new ones; of those that the LLM has labelled, on
    the `wanted` queries. Nothing is kept where there is no group.
    """
    scorer, user, count = bundle.scorers[name], new.user, len(new.labelled)
    problems, positions, asked = list[HeadProblem](), list[Tensor](), dict[str, int]()
    if before is not None:
        stays = torch.ones(len(before.positions), dtype=torch.bool)
        stays[[at for query, at in before.asked.items() if query not in wanted]] = False
        place = stays.cumsum(0) - 1
        asked = {query: int(place[at]) for query, at in before.asked.items() if query in wanted}
        problems, positions = [_taken(before.problem, stays)], [before.positions[stays]]
    kept = sum(map(len, positions))
    asked |= {query: kept + at for query, at in new.asked.items()}
    if count:
        index = torch.arange(count)[None]
        problems.append(scorer.head_problem(new.labelled.groups, [user], index))
        positions.append(new.labelled.positions)
    if not kept + count:
        return Head.of(scorer.head.empty()), None
    start = torch.zeros(1, scorer.head.numbers_per_user or 0)
    if before is not None:
        start = torch.from_numpy(before.numbers)[None]
    problem, every = _joined(problems), torch.cat(positions)
    taken, sgd = problem.discounted(every[None], new.changed), sgd_config(bundle.settings)
    (numbers,) = scorer.head.fit(replace(taken, start=start, sgd=sgd))
    head = with_times({user: Head.of(numbers, int(every.max()) + 1)}, bundle.records)[user]
    records = tuple(in_order(bundle.records.get(user, ())))
    return head, Kept(records, every, asked, problem, numbers)


def _taken(problem: HeadProblem, groups: Tensor) -> HeadProblem:
    own = problem
    x, offset, target, mask = (t[:, groups] for t in (own.x, own.offset, own.target, own.mask))
    return replace(problem, x=x, offset=offset, target=target, mask=mask)


def _joined(problems: Sequence[HeadProblem]) -> HeadProblem:
    """One user's problems as one; groups of fewer candidates are padded."""
    most = max(problem.mask.shape[2] for problem in problems)

    def padded(value: Tensor) -> Tensor:
        return pad(value, [0, 0] * (value.dim() - 3) + [0, most - value.shape[2]])

    def joined(values: Iterable[Tensor], *, of_candidates: bool = True) -> Tensor:
        return torch.cat([padded(own) if of_candidates else own for own in values], 1)

    return replace(
        problems[0],
        x=joined((own.x for own in problems), of_candidates=not problems[0].interaction.by_label),
        offset=joined(own.offset for own in problems),
        target=joined(own.target for own in problems),
        mask=joined(own.mask for own in problems),
    )
