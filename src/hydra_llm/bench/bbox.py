"""The personalized BBox-Adapter, a baseline of HYDRA (section 4.1): one energy for all users,
learned against its own samples.

Sun et al. 2024, "BBox-Adapter: Lightweight Adapting for Black-Box Large Language Models" (arXiv
2402.08219), by its sections:
    3.1  p(y|x) ∝ p_LLM(y|x) · exp g(x, y). The vote shares of the LLM's samples stand for p_LLM,
         which a black box does not give
    3.2  the loss, see `nce_loss`
    3.4  rounds (algorithm 1), see `adapted`: wrong answers drawn from the present p are the
         negatives. As the candidates are few, each counts for its expected number of draws, which
         has less noise and is the same on every processor
    4.1  the ground-truth setting: the positive is the user's own answer in every round
    4.4  single-step inference: the LLM writes b whole answers, and the one with the highest g is
         the answer (3.3 ranks by g alone, as p_LLM has proposed them)
Personalized: the prompts carry the user's records in HYDRA's order, so that both methods select
among the same candidates; g learns from the training users' histories, and further rounds on the
new user's own history adapt a copy of it. There are no heads and no side features, which are what
HYDRA adds. g reads the frozen encoder's features, where the paper tunes an encoder. Knows no
metrics; reads no record later than the query.
"""

from collections.abc import Awaitable, Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter

import anyio
import numpy as np
import torch
from torch import Tensor, nn

from hydra_llm.bench.method import Parts
from hydra_llm.bundle import Bundle
from hydra_llm.context import Context
from hydra_llm.errors import LLMError
from hydra_llm.llm.concurrency import map_calls
from hydra_llm.model.grouping import make_groups
from hydra_llm.model.interactions import Groups, Interaction
from hydra_llm.pipeline import Personalizer
from hydra_llm.select import Selection, Selector, all_labels, candidate_text, first_best
from hydra_llm.training.labelling import reads_labels, training_queries
from hydra_llm.training.train_scorer import make_features
from hydra_llm.types import Answer, Candidate, Proposal, Query, Record, StageCost, Usage

ROUNDS = 3
"""T: rounds for the shared energy, then for each user's copy (paper 4.6; the authors' value)."""
STEPS = 50
"""Updates in a round, each on all pools, as frozen features make them cheap."""
RATE = 0.01
"""η of AdamW. The paper's 5e-6 is for tuning a whole encoder."""
ALPHA = 0.25
"""α of the squared energies: none grows beyond 1 / 2α = 2, a factor of e² on the vote share."""


class Energy(nn.Module):
    """g(x, y) = v · φ(x, y): linear, or with one hidden layer if φ is a bi-encoder's."""

    def __init__(self, interaction: Interaction, weights: Tensor):
        super().__init__()
        self.interaction, self.weights = interaction, nn.Parameter(weights)

    def forward(self, groups: Groups) -> Tensor:
        """[G, C]; undefined where there is no candidate."""
        return self.interaction.dot(self.interaction(groups)[None], self.weights[None])[0]


@dataclass(frozen=True)
class Pools:
    """G queries with known gold answers, and the LLM's answers to each."""

    groups: Groups
    shares: Tensor
    """[G, C] vote shares; 0 for a gold answer that the LLM never gave."""
    gold: Tensor
    """[G] index of the gold answer."""


# ---- learning: plain tensors, no users, no texts


def nce_loss(energies: Tensor, gold: Tensor, negatives: Tensor, alpha: float = ALPHA) -> Tensor:
    """The ranking-based noise-contrastive loss with a penalty on large energies (paper 3.2,
    equation 3):

        −E₊[g] + E₋[g] + α·E₊[g²] + α·E₋[g²]

    E₊ is the mean over the gold answers, E₋ the mean over the negatives; `negatives` [G, C] is how
    many draws each stands for.
    """
    positive = energies.gather(1, gold[:, None])
    weights = negatives / negatives.sum().clamp_min(1)
    rise = (alpha * positive**2 - positive).mean()
    return rise + (weights * (alpha * energies**2 + energies)).sum()


def distribution(energies: Tensor, shares: Tensor) -> Tensor:
    """p(y|x) ∝ share · exp g over the pool, [G, C] (paper 3.1)."""
    return (shares.log() + energies).softmax(-1)


def expected_negatives(energies: Tensor, pools: Pools, draws: int) -> Tensor:
    """[G, C] expected draws of each wrong candidate (3.4, lines 4 to 6); 0 for the gold."""
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
class ByEnergy(Selector):
    """Selects the candidate with the highest energy, the earlier one of equals."""

    bundle: Bundle
    energy: Energy

    def choose(self, context: Context, candidates: Sequence[Candidate]) -> Selection:
        places = [place for place, each in enumerate(candidates) if each.answer is not None]
        if not places:
            return Selection(list(candidates), 0)
        offered = _offered(self.bundle, [candidates[place] for place in places])
        with torch.no_grad():
            energies = self.energy(
                _groups(self.bundle, self.energy.interaction, [context.query], [offered])
            )
        shares = distribution(energies, _shares([offered]))[0].tolist()
        found = {
            each.answer: replace(each, score=score, probability=share)
            for each, score, share in zip(offered, energies[0].tolist(), shares, strict=True)
        }
        scored = list(candidates)
        for place in places:
            own = found[candidates[place].answer]
            scored[place] = replace(candidates[place], score=own.score, probability=own.probability)
        best = first_best(np.array([scored[place].score for place in places]))
        return Selection(scored, places[best])


def _offered(
    bundle: Bundle, readable: Sequence[Candidate], gold: str | None = None
) -> list[Candidate]:
    """Labels, or the LLM's answers with the gold one, which may have no votes."""
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
    texts = [[candidate_text(bundle.task, each) for each in candidates] for candidates in offered]
    inputs = [query.input for query in queries]
    side_features: list[list[list[float]]] = [[[]] * len(row) for row in texts]
    return make_groups(bundle.store, interaction, inputs, texts, side_features)


def _shares(offered: Sequence[Sequence[Candidate]]) -> Tensor:
    """[G, C] vote shares, 0 where there is no candidate."""
    rows = [torch.tensor([float(each.votes) for each in candidates]) for candidates in offered]
    votes = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return votes / votes.sum(-1, keepdim=True)


def _pools(bundle: Bundle, interaction: Interaction, proposals: Sequence[Proposal]) -> Pools | None:
    """Proposals with an answer that could be parsed, as pools; None if there is none."""
    queries, offered, gold = [], [], []
    for proposal in proposals:
        query = proposal.query
        readable = [each for each in proposal.candidates if each.answer is not None]
        if readable:
            candidates = _offered(bundle, readable, query.gold)
            queries.append(query)
            offered.append(candidates)
            gold.append([each.answer for each in candidates].index(query.gold))
    if not queries:
        return None
    groups = _groups(bundle, interaction, queries, offered)
    return Pools(groups, _shares(offered), torch.tensor(gold))


def _interaction(bundle: Bundle) -> Interaction:
    """Of the kind that the bundle's own adapter has."""
    return make_features(bundle, by_label=reads_labels(bundle.task, bundle.settings))


# ---- the method


@dataclass(frozen=True)
class BBoxAdapter:
    """Learns at its first query, adapts at each user's first; see `pop_spent` for that cost."""

    bundle: Bundle
    personalizer: Personalizer
    """Proposes the candidates, with the records of the training users and of the run's users."""
    seed: int = 0
    """Of the energy's random start."""
    kept: dict[tuple[str, ...], Energy | LLMError] = field(default_factory=dict)
    locks: dict[tuple[str, ...], anyio.Lock] = field(default_factory=dict)
    spent: dict[str, StageCost] = field(default_factory=dict)

    @classmethod
    def of(cls, parts: Parts) -> "BBoxAdapter":
        """The answerer of the method; makes no LLM call yet."""
        proposing = parts.personalizer(rerank=True, candidates="sampled")
        records = {**parts.bundle.records, **parts.records}
        return cls(parts.bundle, replace(proposing, records=records), parts.seed)

    def pop_spent(self) -> dict[str, StageCost]:
        spent = dict(self.spent)
        self.spent.clear()
        return spent

    async def aanswer(self, query: Query) -> Answer:
        context = self.personalizer.context_of(query)
        visible = context.visible
        # a training user's later records must not have taught the energy that answers the user
        without = query.user if query.user in self.bundle.trained_on else ""
        shared = await self._once(("shared", without), partial(self._learn, without))
        seen = ("own", query.user, *(record.id for record in visible))
        own = await self._once(seen, partial(self._adapt, shared, query.user, visible))
        proposal = await self.personalizer.apropose(context)
        adapted_to = replace(self.personalizer, selector=ByEnergy(self.bundle, own))
        return adapted_to.decide(context, proposal)

    async def _once(self, key: tuple[str, ...], make: Callable[[], Awaitable[Energy]]) -> Energy:
        """The first result or error of `make`, so that a dead LLM is not called again."""
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
        """The shared energy from a random start (algorithm 1), by `labelled_users` users."""
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
            interaction = _interaction(self.bundle)
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
        """Further rounds on the part of the user's history that the query may see."""
        only = replace(self.personalizer, records={user: visible})
        proposals = await _proposals(only, self._queries(visible))
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
    """The LLM's answers to each query; failed ones are left out.

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
    """The LLM's seconds, and those since `started`, when the LLM had answered."""
    usage = sum((proposal.usage for proposal in proposals), Usage())
    return StageCost(users, usage.seconds + perf_counter() - started, usage)
