"""The personalized BBox-Adapter, a baseline of HYDRA (section 4.1): one energy for all users,
learned against its own samples.

Sun et al. 2024, "BBox-Adapter: Lightweight Adapting for Black-Box Large Language Models" (arXiv
2402.08219), by its sections:
    3.1  p(y|x) ∝ p_LLM(y|x) · exp g(x, y), with the vote shares of the samples as p_LLM, which a
         black box does not give
    3.2  the loss, see `nce_loss`
    3.4  rounds (algorithm 1), see `adapted`: wrong answers drawn from the present p are the
         negatives; each counts for its expected number of draws, which has less noise
    4.1  the ground-truth setting: the positive is the user's own answer in every round
    4.4  single-step inference: of b whole answers of the LLM the one with the highest g
Personalized: prompts carry the user's records in HYDRA's order, so that both methods select among
the same candidates; further rounds on the new user's own history adapt a copy of g. There are no
heads and no side features, which HYDRA adds. g reads the frozen encoder, where the paper tunes one.
"""

from collections import defaultdict
from collections.abc import Awaitable, Callable, Hashable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter

import anyio
import numpy as np
import torch
from torch import Tensor, nn

from hydra_llm.bench.method import NotAsked, Parts
from hydra_llm.bundle import Bundle
from hydra_llm.context import Context
from hydra_llm.errors import LLMError
from hydra_llm.llm.concurrency import at_once, map_calls
from hydra_llm.model.interactions import Groups, Interaction, make_groups
from hydra_llm.pipeline import Records
from hydra_llm.rerank import KeepOrder
from hydra_llm.select import Selection, Selector, all_labels, candidate_text, first_best
from hydra_llm.tasks.base import Task
from hydra_llm.training.labelling import Asked, reads_labels, training_queries
from hydra_llm.training.train_scorer import make_features
from hydra_llm.types import Answer, Candidate, Overlaid, Proposal, Query, StageCost, Usage

ROUNDS = 3  # T, for the shared energy, then for each user's copy (paper 4.6; the authors' value)
STEPS = 50  # updates in a round, each on all pools, as frozen features make them cheap
RATE = 0.01  # η of AdamW; the paper's 5e-6 is for tuning a whole encoder
ALPHA = 0.25  # α of squared energies: none exceeds 1 / 2α = 2, a factor of e² on the vote share


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
    shares: Tensor  # [G, C] vote shares; 0 for a gold answer that the LLM never gave
    gold: Tensor  # [G] index of the gold answer


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


@dataclass(frozen=True)
class ByEnergy(Selector):
    """Selects the candidate with the highest energy, the earlier one of equals."""

    bundle: Bundle
    energy: Energy

    def choose(self, context: Context, candidates: Sequence[Candidate]) -> Selection:
        scored = list(candidates)
        places = [i for i, candidate in enumerate(candidates) if candidate.answer is not None]
        if not places:
            return Selection(scored, 0)
        offered = _offered(self.bundle.task, [candidates[i] for i in places])
        groups, shares = _read(self.bundle, self.energy.interaction, [(context.query, offered)])
        with torch.no_grad():
            energies = self.energy(groups)
        probabilities = distribution(energies, shares)[0].tolist()
        row_of = {candidate.answer: row for row, candidate in enumerate(offered)}
        for i in places:
            row = row_of[candidates[i].answer]
            score, probability = float(energies[0, row]), probabilities[row]
            scored[i] = replace(candidates[i], score=score, probability=probability)
        best = first_best(np.array([scored[i].score for i in places]))
        return Selection(scored, places[best])


def _offered(
    task: Task, readable: Sequence[Candidate], gold: str | None = None
) -> Sequence[Candidate]:
    """Labels, or the LLM's answers with the gold one, which may have no votes."""
    if task.labels:
        return all_labels(task, readable)
    if gold is None or any(candidate.answer == gold for candidate in readable):
        return readable
    return [*readable, Candidate(gold, gold)]


Offer = tuple[Query, Sequence[Candidate]]


def _read(
    bundle: Bundle, interaction: Interaction, offers: Sequence[Offer]
) -> tuple[Groups, Tensor]:
    """Queries and candidates as the energy reads them, and vote shares [G, C], 0 for padding."""
    texts = [[candidate_text(bundle.task, candidate) for candidate in row] for _, row in offers]
    inputs, blank = [query.input for query, _ in offers], [[()] * len(row) for row in texts]
    votes = [torch.tensor([float(candidate.votes) for candidate in row]) for _, row in offers]
    padded = nn.utils.rnn.pad_sequence(votes, batch_first=True)
    groups = make_groups(bundle.features, interaction, inputs, texts, blank)
    return groups, padded / padded.sum(-1, keepdim=True)


class BBoxAdapter:
    """Learns at its first query, adapts at each user's first; see `pop_spent` for that cost."""

    def __init__(self, parts: Parts):
        self.bundle, self.seed = parts.bundle, parts.seed
        records = Overlaid(parts.records, parts.bundle.records)
        proposing = parts.personalizer(rerank=True, candidates="sampled")
        self.pipeline = replace(proposing, records=records, beside=())
        self.asked = parts.asked
        self._kept: dict[Hashable, Energy | LLMError] = {}
        self._locks: defaultdict[Hashable, anyio.Lock] = defaultdict(anyio.Lock)
        self._spent: dict[str, StageCost] = {}

    def pop_spent(self) -> dict[str, StageCost]:
        spent, self._spent = self._spent, {}
        return spent

    async def aanswer(self, query: Query) -> Answer:
        context = self.pipeline.context_of(query)
        # a training user's later records must not have taught the energy that answers the user
        without = query.user if query.user in self.bundle.trained_on else ""
        shared = await self._once(("shared", without), partial(self._learn, without))
        visible = context.visible
        seen = ("own", query.user, *(record.id for record in visible))
        history, key = {query.user: visible}, f"{len(visible)}:{query.user}"
        own = await self._once(seen, partial(self._adapt, shared, self._asked(history), key))
        proposal = await self.pipeline.apropose(context)
        chosen = replace(self.pipeline, selector=ByEnergy(self.bundle, own))
        return chosen.decide(context, proposal)

    async def _once(self, key: Hashable, make: Callable[[], Awaitable[Energy]]) -> Energy:
        """The first result or error of `make`, so that a dead LLM is not called again."""
        async with self._locks[key]:
            if key not in self._kept:
                try:
                    self._kept[key] = await make()
                except LLMError as error:
                    self._kept[key] = error
        result = self._kept[key]
        if isinstance(result, LLMError):
            raise result
        return result

    async def _learn(self, without: str) -> Energy:
        """The shared energy from a random start (algorithm 1), by `labelled_users` users."""
        nothing, pipeline = "bbox-adapter has nothing to learn from", self.pipeline
        users = self.bundle.trained_on[: pipeline.settings.labelled_users]
        records = {user: pipeline.records.get(user, ()) for user in users if user != without}
        asked = self._asked(records) if self.asked is None else self.asked
        if not asked.all:
            reason = "it asks the LLM about training users' records, see `labelled_users`"
            raise NotAsked(f"{nothing}: {reason}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            by_label = reads_labels(self.bundle.task, self.bundle.settings)
            interaction = make_features(self.bundle, by_label=by_label)
            energy = Energy(interaction, torch.randn(interaction.size) / interaction.size**0.5)
        learned = await self._adapt(energy, asked)
        if learned is energy:
            reason = "no answer to the training users' own records could be read"
            raise LLMError(f"{nothing}: {reason}")
        return learned

    def _asked(self, records: Records) -> Asked:
        """The users' latest records."""
        task, count = self.bundle.task, self.pipeline.settings.queries_per_user
        latest = {user: training_queries(task, own, count) for user, own in records.items()}
        return Asked(latest, records)

    async def _adapt(self, energy: Energy, asked: Asked, key: str = "") -> Energy:
        """Rounds on the LLM's answers to these queries; the energy as it was if none can be read.
        Failed calls are left out, LLMError if all failed. The cost is noted under `key`, empty for
        the shared energy.
        """
        settings, pipeline = self.pipeline.settings, replace(self.pipeline, records=asked.records)
        if settings.label_order == "retriever":
            pipeline = replace(pipeline, reranker=KeepOrder())
        queries, learned = asked.all, energy
        limit = at_once(pipeline.llm, settings.concurrency)
        answers = await map_calls(pipeline.apropose, queries, limit=limit)
        proposals = [answer for answer in answers if isinstance(answer, Proposal)]
        for error in answers:
            if isinstance(error, LLMError) and not proposals:
                raise error
        started = perf_counter()  # the LLM has answered
        offers: list[Offer] = []
        for proposal in proposals:
            readable = [c for c in proposal.candidates if c.answer is not None]
            if readable:
                offered = _offered(self.bundle.task, readable, proposal.query.gold)
                offers.append((proposal.query, offered))
        if offers:
            gold = [[c.answer for c in offered].index(query.gold) for query, offered in offers]
            groups, shares = _read(self.bundle, energy.interaction, offers)
            pools = Pools(groups, shares, torch.tensor(gold))
            if not key:
                energy.interaction.prepare(pools.groups)
            draws, decay = settings.samples, settings.weight_decay
            learned = adapted(energy, pools, draws=draws, weight_decay=decay)
        usage = sum((proposal.usage for proposal in proposals), Usage())
        self._spent[key] = StageCost(
            len(asked.queries), usage.seconds + perf_counter() - started, usage
        )
        return learned
