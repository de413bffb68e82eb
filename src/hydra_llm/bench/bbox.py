"""The personalized BBox-Adapter, a baseline of HYDRA's (section 4.1): one energy for all users,
learned against its own samples.

Sun et al. 2024, "BBox-Adapter: Lightweight Adapting for Black-Box Large Language Models" (arXiv
2402.08219), by its sections:
    3.1  p(y|x) ∝ p_LLM(y|x) · exp g(x, y). The black box gives no p_LLM: the shares of its samples
    stand for it, the query's pool
    3.2  the loss, see `nce_loss`
    3.4  rounds: what is wrong of draws from p as it is now are the negatives, update g (algorithm
    1), see `adapted`. A pool is small: each
         candidate counts for as many draws as are expected of it, with less noise, and with none
         that falls otherwise on another processor
    4.1  the ground-truth setting: the positive is the user's own answer in every round
    4.4  single-step inference: the LLM writes b whole answers, and the one with the highest g is
    the answer (p_LLM has done its part
         in proposing them: 3.3 ranks by g alone)
Personalized: the prompts carry the user's records, in HYDRA's own order, so that both choose among
the same candidates; g learns from the training users' histories, and further rounds on the new
user's own history adapt a copy of it. There are no heads and no evidence columns: those are what
HYDRA adds. g reads the frozen encoder's features, where the paper tunes a whole encoder. Knows no
metrics; answers nothing that needs a record later than the query.
"""

from collections.abc import Awaitable, Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING

import anyio
import numpy as np
import torch
from torch import Tensor, nn

from hydra_llm.bundle import Bundle
from hydra_llm.context import Context
from hydra_llm.errors import LLMError
from hydra_llm.llm.concurrency import map_calls
from hydra_llm.model.grouping import make_groups
from hydra_llm.model.interactions import Cross, Groups, Interaction, LabelBilinear, Tower
from hydra_llm.pipeline import Personalizer
from hydra_llm.select import Selection, all_labels, candidate_text, first_best
from hydra_llm.training.labelling import reads_labels, training_queries
from hydra_llm.types import Answer, Candidate, Proposal, Query, Record, StageCost, Usage

if TYPE_CHECKING:
    from hydra_llm.bench.methods import Parts

ROUNDS = 3
"""T: how often negatives are taken anew, for the shared energy and again for each user's copy
(paper 4.6; the authors' settings).
"""
STEPS = 50
"""Updates in a round, each on all pools: frozen features make them cheap."""
RATE = 0.01
"""η of AdamW. The paper's 5e-6 is for tuning a whole encoder."""
ALPHA = 0.25
"""α of the squared energies: none gains from growing beyond 1 / 2α = 2, which is a factor of e² on
the share of the LLM's samples.
"""


class Energy(nn.Module):
    """g(x, y) = v · φ(x, y): linear, or one hidden layer where φ is a tower's; the same numbers for
    every user.
    """

    def __init__(self, interaction: Interaction, weights: Tensor):
        super().__init__()
        self.interaction, self.weights = interaction, nn.Parameter(weights)

    def forward(self, groups: Groups) -> Tensor:
        """[G, C]; what stands where there is no candidate means nothing."""
        return self.interaction.dot(self.interaction(groups)[None], self.weights[None])[0]


@dataclass(frozen=True)
class Pools:
    """G queries whose gold answers are known, with what the LLM said to each."""

    groups: Groups
    shares: Tensor
    """[G, C] of the LLM's samples; 0 for a gold answer that it never gave."""
    gold: Tensor
    """[G] the place of the gold answer."""


# ---- learning: plain tensors, no users, no texts


def nce_loss(energies: Tensor, gold: Tensor, negatives: Tensor, alpha: float = ALPHA) -> Tensor:
    """The ranking-based noise-contrastive loss by its gradient, with the energies kept small (paper
    3.2, equation 3):

        −E₊[g] + E₋[g] + α·E₊[g²] + α·E₋[g²]

    E₊ is the mean over the gold answers, E₋ the mean over the negatives: `negatives` [G, C] says
    how many draws each stands for.
    """
    positive = energies.gather(1, gold[:, None])
    weights = negatives / negatives.sum().clamp_min(1)
    rise, fall = (
        (alpha * positive**2 - positive).mean(),
        (weights * (alpha * energies**2 + energies)).sum(),
    )
    return rise + fall


def distribution(energies: Tensor, shares: Tensor) -> Tensor:
    """p(y|x) ∝ share · exp g over the pool, [G, C] (paper 3.1)."""
    return (shares.log() + energies).softmax(-1)


def expected_negatives(energies: Tensor, pools: Pools, draws: int) -> Tensor:
    """[G, C] how often each candidate comes up, on average, in draws from the adapted distribution;
    the gold answer is no negative (3.4, 4 to 6).
    """
    return (draws * distribution(energies, pools.shares)).scatter(1, pools.gold[:, None], 0.0)


def adapted(energy: Energy, pools: Pools, *, draws: int, weight_decay: float) -> Energy:
    """A copy of the energy after `ROUNDS` online rounds on these pools (paper 3.4, algorithm 1)."""
    energy = deepcopy(energy)
    optimizer = torch.optim.AdamW(energy.parameters(), lr=RATE, weight_decay=weight_decay)
    for _ in range(ROUNDS):
        with torch.no_grad():
            negatives = expected_negatives(energy(pools.groups), pools, draws)
        for _ in range(STEPS):
            optimizer.zero_grad()
            nce_loss(energy(pools.groups), pools.gold, negatives).backward()
            optimizer.step()
    return energy


# ---- from the LLM's answers to pools, and to a pick


@dataclass(frozen=True)
class ByEnergy:
    """An adapter: the candidate with the highest energy, the earlier one of equals."""

    bundle: Bundle
    energy: Energy

    def choose(self, context: Context, candidates: Sequence[Candidate]) -> Selection:
        places = [
            place for place, candidate in enumerate(candidates) if candidate.answer is not None
        ]
        if not places:
            return Selection(list(candidates), 0)
        offered = _offered(self.bundle, [candidates[place] for place in places])
        with torch.no_grad():
            energies = self.energy(
                _groups(self.bundle, self.energy.interaction, [context.query], [offered])
            )
        shares = distribution(energies, _shares([offered]))[0].tolist()
        found = {
            c.answer: (score, share)
            for c, score, share in zip(offered, energies[0].tolist(), shares, strict=True)
        }
        scored = list(candidates)
        for place in places:
            score, share = found[candidates[place].answer]
            scored[place] = replace(candidates[place], score=score, probability=share)
        return Selection(
            scored,
            places[first_best(np.array([found[candidates[place].answer][0] for place in places]))],
        )


def _offered(
    bundle: Bundle, readable: Sequence[Candidate], gold: str | None = None
) -> list[Candidate]:
    """What the LLM said and the gold answer; every label where there are labels, as label features
    want it. No votes are no chance.
    """
    if bundle.task.labels:
        return all_labels(bundle.task, readable)
    missing = gold is not None and all(candidate.answer != gold for candidate in readable)
    return [*readable, Candidate(gold, gold)] if missing and gold is not None else list(readable)


def _groups(
    bundle: Bundle,
    interaction: Interaction,
    queries: Sequence[Query],
    offered: Sequence[Sequence[Candidate]],
) -> Groups:
    texts = [
        [candidate_text(bundle.task, candidate) for candidate in candidates]
        for candidates in offered
    ]
    return make_groups(
        bundle.store,
        interaction,
        [query.input for query in queries],
        texts,
        [[[]] * len(row) for row in texts],
    )


def _shares(offered: Sequence[Sequence[Candidate]]) -> Tensor:
    """[G, C] votes as shares, 0 where there is no candidate."""
    rows = [
        torch.tensor([float(candidate.votes) for candidate in candidates]) for candidates in offered
    ]
    votes = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return votes / votes.sum(-1, keepdim=True)


def _pools(bundle: Bundle, interaction: Interaction, proposals: Sequence[Proposal]) -> Pools | None:
    """Proposals with an answer that can be read, as pools; None where there is none."""
    readable = [
        (p.query, [candidate for candidate in p.candidates if candidate.answer is not None])
        for p in proposals
    ]
    cases = [
        (query, _offered(bundle, candidates, query.gold))
        for query, candidates in readable
        if candidates
    ]
    if not cases:
        return None
    queries, offered = [query for query, _ in cases], [candidates for _, candidates in cases]
    gold = [
        [candidate.answer for candidate in candidates].index(query.gold)
        for query, candidates in cases
    ]
    return Pools(
        _groups(bundle, interaction, queries, offered), _shares(offered), torch.tensor(gold)
    )


def _combiner(bundle: Bundle) -> Interaction:
    """Of the kind that the bundle's own adapter has."""
    task, settings, width = bundle.task, bundle.settings, bundle.store.encoder.width
    if settings.features == "cross":
        return Cross(width)
    return (
        LabelBilinear(width, len(task.labels), settings.label_rank)
        if reads_labels(task, settings)
        else Tower(width, settings.width)
    )


# ---- the method


@dataclass(frozen=True)
class BBoxAdapter:
    """Learns at its first question, and adapts to a user at the user's first one; what that costs
    is no part of an answer, see `taken`.
    """

    bundle: Bundle
    personalizer: Personalizer
    """Proposes the candidates; its records are those of the training users and of the users at
    hand.
    """
    seed: int = 0
    """Of the start."""
    kept: dict[tuple[str, ...], Energy | LLMError] = field(default_factory=dict)
    locks: dict[tuple[str, ...], anyio.Lock] = field(default_factory=dict)
    spent: dict[str, StageCost] = field(default_factory=dict)

    def taken(self) -> dict[str, StageCost]:
        taken = dict(self.spent)
        self.spent.clear()
        return taken

    async def aanswer(self, query: Query) -> Answer:
        context = self.personalizer.context_of(query)
        visible = context.visible
        itself = (
            query.user if query.user in self.bundle.trained_on else ""
        )  # whose later records must not have taught the energy
        shared = await self._once(("shared", itself), partial(self._learn, itself))
        seen = ("own", query.user, *(record.id for record in visible))
        own = await self._once(seen, partial(self._adapt, shared, query.user, visible))
        proposal = await self.personalizer.apropose(context)
        choosing = replace(self.personalizer, selector=ByEnergy(self.bundle, own))
        return choosing.decide(context, proposal)

    async def _once(self, key: tuple[str, ...], make: Callable[[], Awaitable[Energy]]) -> Energy:
        """What `make` made the first time, or why it could not: a dead LLM is not asked for all
        pools again at every query.
        """
        async with self.locks.setdefault(key, anyio.Lock()):
            if key not in self.kept:
                try:
                    self.kept[key] = await make()
                except LLMError as error:
                    self.kept[key] = error
        found = self.kept[key]
        if isinstance(found, LLMError):
            raise found
        return found

    async def _learn(self, without: str) -> Energy:
        """The shared energy, from a random start (algorithm 1), by the training users whose pairs
        may cost LLM calls.
        """
        settings, records = self.personalizer.settings, self.personalizer.records
        users = [
            user for user in self.bundle.trained_on[: settings.labelled_users] if user != without
        ]
        queries = [query for user in users for query in self._queries(records.get(user, ()))]
        if not queries:
            raise LLMError(
                "bbox-adapter has nothing to learn from: it asks the LLM about training users'"
                " records, see `labelled_users`"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            interaction = _combiner(self.bundle)
            energy = Energy(interaction, torch.randn(interaction.size) / interaction.size**0.5)
        proposals = await _proposals(self.personalizer, queries)
        started = perf_counter()
        pools = _pools(self.bundle, interaction, proposals)
        if pools is None:
            raise LLMError(
                "bbox-adapter has nothing to learn from: no answer to the training users' own"
                " records could be read"
            )
        interaction.prepare(pools.groups)
        found = self._adapted(energy, pools)
        self.spent[""] = _spent(len(users), proposals, started)
        return found

    async def _adapt(self, shared: Energy, user: str, visible: Sequence[Record]) -> Energy:
        """Further rounds on the user's own history, as far as the query may see it."""
        only = replace(self.personalizer, records={user: visible})
        proposals = await _proposals(
            only, self._queries(visible)
        )  # of another history of the same user's: another adaptation
        started = perf_counter()
        pools = _pools(self.bundle, shared.interaction, proposals)
        found = shared if pools is None else self._adapted(shared, pools)
        self.spent[f"{len(visible)}:{user}"] = _spent(1, proposals, started)
        return found

    def _queries(self, records: Sequence[Record]) -> list[Query]:
        return training_queries(
            self.bundle.task, records, self.personalizer.settings.queries_per_user
        )

    def _adapted(self, energy: Energy, pools: Pools) -> Energy:
        settings = self.personalizer.settings
        return adapted(energy, pools, draws=settings.samples, weight_decay=settings.weight_decay)


async def _proposals(personalizer: Personalizer, queries: Sequence[Query]) -> list[Proposal]:
    """What the LLM says to each query; those that failed are left out.

    Raises:
        LLMError: every call failed.
    """
    found = await map_calls(personalizer.apropose, queries, limit=personalizer.settings.concurrency)
    good = [proposal for proposal in found if isinstance(proposal, Proposal)]
    for error in found:
        if isinstance(error, LLMError) and not good:
            raise error
    return good


def _spent(users: int, proposals: Sequence[Proposal], started: float) -> StageCost:
    """Own seconds are those since `started`, when the LLM had answered."""
    usage = sum((proposal.usage for proposal in proposals), Usage())
    return StageCost(users, usage.seconds + perf_counter() - started, usage)


def bbox_adapter(parts: "Parts") -> BBoxAdapter:
    """The method's answerer; asks nothing yet."""
    proposing = parts.personalizer(rerank=True, candidates="sampled")
    return BBoxAdapter(
        parts.bundle,
        replace(proposing, records={**parts.bundle.records, **parts.records}),
        parts.seed,
    )


__all__ = ["BBoxAdapter", "bbox_adapter"]
