"""What people would notice of a method, beside the task's metrics: how often its answer is better
than a baseline's, how often it is what another user would get, how often answers change although
nothing personal is asked. No LLM is needed but for the last one, and no judge.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np

from hydra_llm.bench.judge import Case, mean
from hydra_llm.bench.method import base_name
from hydra_llm.bench.report.cells import cell
from hydra_llm.bench.report.tables import Run
from hydra_llm.bench.results import Pair, pair, rounded, worth
from hydra_llm.bench.runlog import Sample
from hydra_llm.bench.stats import Interval, interval
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.errors import LLMError, SettingsError
from hydra_llm.gate import forms
from hydra_llm.history import before
from hydra_llm.llm.base import Sampling
from hydra_llm.llm.concurrency import at_once, map_calls
from hydra_llm.llm.none import is_none
from hydra_llm.pipeline import UserPipeline, answer_text
from hydra_llm.tasks.base import Floats, Task
from hydra_llm.types import Message

AS_ANOTHER = ("mismatched", "shuffled-heads")  # methods that answer as another user
LATEST = 100  # records that a user's answers are known by
BASELINES = ("rag", "zero-shot", "no-history", "hydra-shared")  # in the order of preference


@dataclass(frozen=True)
class Rate:
    """A mean over queries with its 95 % interval over users; NaN without a query."""

    value: float
    interval: Interval
    queries: int

    @classmethod
    def of(cls, values: Sequence[float], users: Sequence[str]) -> "Rate":
        known = [value for value in values if not math.isnan(value)]
        return cls(mean(known), interval(values, users), len(known))

    def __str__(self) -> str:
        return cell(self.value, *self.interval)

    def to_json(self) -> dict[str, Any]:
        low, high = rounded(self.interval)
        return {"rate": rounded([self.value])[0], "interval": [low, high], "queries": self.queries}


def chosen_methods(run: Run, method: str | None, against: str | None) -> tuple[str, str]:
    """The named methods of a run; by default HYDRA, and RAG with as many records, or the first of
    `BASELINES` that is there. SettingsError: the run has none of that name, or nothing to compare.
    """
    names = list(run.by_method)
    for option, name in (("--method", method), ("--against", against)):
        if name is not None and name not in names:
            fault = f"{run.folder} has no method '{name}': {', '.join(names)}"
            raise SettingsError(f"{option} {name}: {fault}")
    own = method or next((name for name in names if base_name(name) == "hydra"), names[0])
    same = f"rag@{own.partition('@')[2].partition(',')[0]}"
    others = [name for base in BASELINES for name in names if base_name(name) == base != own]
    other = against or (same if same in names else next(iter(others), None))
    if other is None or other == own:
        raise SettingsError(f"{run.folder}: nothing to compare {own} with: give --against METHOD")
    return own, other


def answered_pairs(run: Run, method: str, against: str) -> list[Pair]:
    """The samples of both methods that answered a query, of the first seed that they share."""
    found: dict[tuple[str, str], Pair] = {}
    for own, other in pair(run.of(method), run.of(against)):
        if not own.error and not other.error:
            found.setdefault((own.user, own.query), (own, other))
    return list(found.values())


def cases_of(pairs: Sequence[Pair], data: DataSet) -> list[Case]:
    """The answers of both methods as a judge reads them; an unparsable one is empty."""
    users = {own.user for own, _ in pairs}
    queries = {(user, query.id): query for user in users for query in data.queries(user)}
    asked = [(queries[own.user, own.query], own, other) for own, other in pairs]
    return [
        Case(
            query,
            tuple(before(data.history(query.user), query)),
            own.answer or "",
            other.answer or "",
        )
        for query, own, other in asked
    ]


def win_rate(task: Task, pairs: Sequence[Pair]) -> Rate:
    """How often the first method's answer is worth more to the person; equal ones count half."""
    changes = [round(worth(task, own) - worth(task, other), 12) for own, other in pairs]
    return Rate.of([0.5 + 0.5 * np.sign(own) for own in changes], [own.user for own, _ in pairs])


def as_another(run: Run, method: str) -> dict[str, Rate]:
    """Control → how often the method gives the answer that the user would get as another user."""
    suffix = method.removeprefix(base_name(method))
    found = {}
    for name in (f"{base}{suffix}" for base in AS_ANOTHER):
        if name in run.by_method and name != method:
            pairs = answered_pairs(run, method, name)
            same = [float(own.answer == other.answer) for own, other in pairs]
            found[name] = Rate.of(same, [own.user for own, _ in pairs])
    return found


# ---- nearer to another user


@dataclass(frozen=True)
class Manners:
    """How users answer, by words and form. Letters: U users, D numbers of a form."""

    users: Mapping[str, int]  # user → row
    rows: Floats  # [U, D] the mean form of a user's answers, less the mean over users
    centre: Floats  # [D]

    @classmethod
    def of(cls, data: DataSet, users: Sequence[str]) -> "Manners":
        texts = {user: [own.output for own in data.history(user)[-LATEST:]] for user in users}
        known = [user for user in dict.fromkeys(users) if texts[user]]
        means = np.stack([forms(texts[user]).mean(0) for user in known])
        places = {user: place for place, user in enumerate(known)}
        return cls(places, means - means.mean(0), means.mean(0))

    def nearer_to_others(self, user: str, answer: str) -> float:
        """The share of other users whose answers are more like this one, by cosine; equal ones
        count half. 0.5 by lot; NaN without a record of the user, or without others.
        """
        if user not in self.users or len(self.users) < 2:
            return math.nan
        row, form = self.users[user], forms([answer])[0] - self.centre
        near = self.rows @ form / np.maximum(np.linalg.norm(self.rows, axis=1), 1e-12)
        others = np.delete(near, row)
        return float((others > near[row]).mean() + 0.5 * (others == near[row]).mean())


def nearer_to_others(data: DataSet, sides: Mapping[str, Sequence[Sample]]) -> dict[str, Rate]:
    """Name → mean share of other users whose answers are nearer to its answer than the user's own;
    `people` are the gold answers: what the persons themselves reach.
    """
    users = [sample.user for own in sides.values() for sample in own]
    if not any(data.history(user) for user in users):
        return {}
    manners = Manners.of(data, users)

    def rate(samples: Sequence[Sample], *, gold: bool = False) -> Rate:
        texts = [sample.gold if gold else sample.answer or "" for sample in samples]
        own = [sample.user for sample in samples]
        return Rate.of(list(map(manners.nearer_to_others, own, texts)), own)

    found = {name: rate(samples) for name, samples in sides.items()}
    return found | {"people": rate(next(iter(sides.values())), gold=True)}


# ---- where nothing personal is asked


@dataclass(frozen=True)
class Impersonal:
    """What becomes of requests in which nothing personal is at stake."""

    passed: Rate  # how often records would be shown: at most so many answers can change
    changed: Rate | None  # how often the LLM's greedy answer is another one; None without an LLM
    failed: int = 0  # calls; not scored

    def to_json(self) -> dict[str, Any]:
        changed = None if self.changed is None else self.changed.to_json()
        return {"passed": self.passed.to_json(), "changed": changed, "failed": self.failed}


async def impersonal(
    stages: UserPipeline, users: Sequence[str], requests: Sequence[str]
) -> Impersonal:
    """Ask the requests as the gateway would, for the users in turn; `stages` holds their records.
    The LLM is asked only where the gate lets records pass: else its answer is the plain one.
    """
    asked = list(zip(cycle(users), requests, strict=False))
    shown = [_messages(stages, user, text) for user, text in asked]
    owners = [user for user, _ in asked]
    passed = Rate.of([float(own is not None) for own in shown], owners)
    if is_none(stages.llm):
        return Impersonal(passed, None)
    pairs = list(zip(shown, (text for _, text in asked), strict=True))
    limit = at_once(stages.llm, stages.settings.concurrency)
    found = await map_calls(partial(_changed, stages), pairs, limit)
    values = [math.nan if isinstance(own, LLMError) else own for own in found]
    return Impersonal(passed, Rate.of(values, owners), sum(map(math.isnan, values)))


def _messages(stages: UserPipeline, user: str, text: str) -> Sequence[Message] | None:
    """The request with the records that the gate lets pass; None if it lets none pass."""
    context = stages.context_of(stages.query(text, user))
    if not stages.belongs(context, in_task_words=False):
        return None
    ranked = stages.rerank(context, stages.retrieve(context))
    kept = stages.relevant(context, ranked, in_task_words=False)[: stages.settings.k]
    plain = [{"role": "user", "content": text}]
    return stages.render(context.query, kept, conversation=plain).messages if kept else None


async def _changed(stages: UserPipeline, case: tuple[Sequence[Message] | None, str]) -> float:
    """1 if the answer with records is not the one without, else 0."""
    messages, text = case
    if messages is None:
        return 0.0
    sampling = Sampling(max_tokens=stages.settings.max_tokens)
    plain: list[Message] = [{"role": "user", "content": text}]
    texts = [(await stages.llm.generate(own, sampling)).texts[0] for own in (messages, plain)]
    with_records, without = (answer_text(own).strip() for own in texts)
    return float(with_records != without)
