"""k, temperature and number of samples, chosen by training users' queries (`choose = auto`).

A setting is worth the mean gain of the picks that it leads to before anything is learned from
labels: for free texts by the word model that has not seen the user, else by the LLM's votes. k is
tried first, then the temperature, then the number of samples. A value takes the place of the given
one if it is better by a standard error. Fewer samples are drawn from those that there are, without
a call.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, zip_longest
from typing import Any

import numpy as np

from hydra_llm.bundle import Bundle
from hydra_llm.config import Settings
from hydra_llm.context import Context
from hydra_llm.errors import LLMError
from hydra_llm.llm.concurrency import Progress, at_once, map_calls
from hydra_llm.pipeline import UserPipeline
from hydra_llm.select import ByVotes, ByWords, Selector
from hydra_llm.types import Candidate, Proposal, Query, Usage

Floats = np.ndarray

QUERIES = 40  # of training users, one of each in turns
RECORDS, TEMPERATURES, SAMPLES = (0, 1, 4), (0.5, 1.0), (4, 8, 16)
DRAWS = 20  # of fewer samples from those that there are
CHOSEN = ("k", "retrieved", "temperature", "samples")


@dataclass
class Choice:
    """The settings that were chosen, and why."""

    settings: Settings
    queries: int = 0
    tried: list[dict[str, Any]] = field(default_factory=list)  # what was `CHOSEN`, mean gain
    usage: Usage = Usage()

    def __str__(self) -> str:
        if not self.queries:
            why = "every call failed" if self.usage.failed else "no query of theirs asks the LLM"
            return f"nothing, as {why}: the settings stay as given"
        values = (f"{name} {getattr(self.settings, name)}" for name in CHOSEN)
        return f"{', '.join(values)} (on {self.queries} queries)"

    def to_json(self) -> dict[str, Any]:
        """The entry of a bundle's report."""
        chosen = {name: getattr(self.settings, name) for name in CHOSEN}
        return {**chosen, "queries": self.queries, "tried": self.tried}


def chosen_over(settings: Settings, chosen: Settings) -> Settings:
    """The settings with what was `CHOSEN` for others."""
    return settings.model_copy(update={name: getattr(chosen, name) for name in CHOSEN})


def some_of_each(queries: Sequence[Query], most: int = QUERIES) -> list[Query]:
    """At most so many queries: one of each user, then a second one, and so on."""
    own: dict[str, list[Query]] = defaultdict(list)
    for query in queries:
        own[query.user].append(query)
    turns = chain.from_iterable(zip_longest(*own.values()))
    return [query for query in turns if query is not None][:most]


def judged(plain: UserPipeline, bundle: Bundle) -> UserPipeline:
    """The pipeline with picks that need no labels."""
    by_words = bundle.word_model is not None and not bundle.task.labels
    selector: Selector = ByVotes(bundle.task, "expected-gain")
    return replace(plain, selector=ByWords(bundle.featurizer) if by_words else selector)


async def choose_sampling(
    plain: UserPipeline, queries: Sequence[Query], progress: Progress | None = None
) -> Choice:
    """Try settings on these queries, whose picks are those of `plain`."""
    if not queries:
        return Choice(plain.settings)
    trial = _Trial(plain, [plain.context_of(query) for query in queries], Choice(plain.settings))
    given = plain.settings
    others: dict[str, tuple[float, ...]] = {"k": RECORDS}
    if given.samples > 1 and not (plain.task.labels and given.label_probabilities):
        others |= {"temperature": TEMPERATURES, "samples": SAMPLES}
    tries = [(n, value) for n, values in others.items() for value in values]
    tries = [(name, value) for name, value in tries if value != getattr(given, name)]
    total = sum(name != "samples" or value > given.samples for name, value in tries) + 1
    proposals = await trial.proposals(given, progress, total)
    best = trial.worth(given, proposals)
    for name, value in tries:
        settings = trial.choice.settings
        more = {name: value, "retrieved": max(settings.retrieved, value if name == "k" else 0)}
        changed = settings.model_copy(update=more)
        drawn_from = proposals
        if name != "samples" or value > settings.samples:
            drawn_from = await trial.proposals(changed, progress, total)
        worth = trial.worth(changed, drawn_from)
        if _better(worth, best):
            trial.choice.settings, best, proposals = changed, worth, drawn_from
    return trial.choice


@dataclass
class _Trial:
    plain: UserPipeline
    contexts: list[Context]
    choice: Choice
    calls: int = 0

    async def proposals(
        self, settings: Settings, progress: Progress | None, tries: int
    ) -> list[Proposal | LLMError]:
        """What the LLM proposes for each query under these settings."""
        own = replace(self.plain, settings=settings)
        made, count = self.calls, len(self.contexts)
        self.calls += count

        def told(done: int, _: int) -> None:
            if progress is not None:
                progress(made + done, tries * count)

        async def propose(context: Context) -> Proposal:
            return await own.apropose(context.without_vectors())

        limit = at_once(own.llm, settings.concurrency)
        results = await map_calls(propose, self.contexts, limit=limit, progress=told)
        spent = (r.usage if isinstance(r, Proposal) else Usage(failed=1) for r in results)
        self.choice.usage += sum(spent, Usage())
        return results

    def worth(self, settings: Settings, proposals: Sequence[Proposal | LLMError]) -> Floats:
        """[Q] the gain of each query's pick with so many samples; NaN where calls failed."""
        worth = np.full(len(proposals), np.nan)
        for row, (context, proposal) in enumerate(zip(self.contexts, proposals, strict=True)):
            if isinstance(proposal, Proposal):
                worth[row] = self._gain(context, proposal.candidates, settings.samples)
        known = int((~np.isnan(worth)).sum())
        self.choice.queries = max(self.choice.queries, known)
        tried = {name: getattr(settings, name) for name in CHOSEN}
        self.choice.tried.append({**tried, "gain": float(np.nanmean(worth)) if known else None})
        return worth

    def _gain(self, context: Context, candidates: Sequence[Candidate], samples: int) -> float:
        """Of the pick among so many samples: the mean over draws, where there are more."""
        gold, draw, gains = context.query.gold or "", np.random.default_rng(samples), []
        for _ in range(DRAWS if samples < sum(own.votes for own in candidates) else 1):
            some = drawn(candidates, samples, draw)
            pick = self.plain.selector.choose(context, some).chosen
            gains.append(self.plain.task.gain(some[pick].answer, gold))
        return float(np.mean(gains))


def _better(worth: Floats, best: Floats) -> bool:
    """Whether the mean of the paired difference is more than its standard error."""
    difference = worth - best
    difference = difference[~np.isnan(difference)]
    if len(difference) < 2:
        return False
    error = difference.std(ddof=1) / len(difference) ** 0.5
    return bool(difference.mean() > error)


def drawn(candidates: Sequence[Candidate], size: int, draw: np.random.Generator) -> list[Candidate]:
    """The candidates with the votes of `size` samples, the greedy one among them. A label's
    candidate stays without votes; a text's does not.
    """
    places = [i for i, own in enumerate(candidates) for _ in range(own.votes)]
    if size >= len(places):
        return list(candidates)
    first = [i for i, own in enumerate(candidates) if own.greedy][:1]
    rest = list(places)
    for place in first:
        rest.remove(place)
    kept = [*first, *draw.permutation(rest)[: size - len(first)]]
    counts = np.bincount(kept, minlength=len(candidates))
    some = [replace(own, votes=int(n)) for own, n in zip(candidates, counts, strict=True)]
    return [own for own, old in zip(some, candidates, strict=True) if own.votes or not old.votes]
