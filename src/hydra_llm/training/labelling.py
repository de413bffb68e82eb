"""From histories to labelled groups: what reranker and adapter learn from (paper, 3.2 and 3.3).

A user's own later records are queries for the earlier ones (`history.before`: what each may see).
    reranker  each retrieved record alone in the prompt; its gain is the gain of the LLM's answer
    adapter   the candidates of `UserPipeline.apropose`, each with its gain
and weak labels, which cost no LLM call:
    reranker  the same records, each worth what its own answer would be for the query (1-NN)
    adapter   for tasks with labels, the record's own answer against the other labels;
              recorded choices: the candidate that was taken against the others
Knows no scorer but those inside the personalizer. A failed call is reported and its pair left out.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

from hydra_llm.config import Settings
from hydra_llm.context import Context
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.errors import LLMError
from hydra_llm.history import as_query, before, in_order, precedes, with_pasts
from hydra_llm.llm.concurrency import Progress
from hydra_llm.pipeline import Records, UserPipeline
from hydra_llm.plugins import HEADS
from hydra_llm.rerank import record_text
from hydra_llm.select import all_labels, candidate_text, offered_candidates
from hydra_llm.side_features import Featurizer
from hydra_llm.tasks.base import Task
from hydra_llm.training.dataset import LabelledGroup
from hydra_llm.training.engine import open_engine
from hydra_llm.types import Candidate, Choice, Proposal, Query, Ranked, Record, Usage


@dataclass
class Collected:
    """What the LLM did, ready to be made into groups."""

    # makes the labelled groups, with side features of the encoder as it is now: tuning changes them
    groups: Callable[[Featurizer], list[LabelledGroup]]
    calls: int = 0  # questions that the LLM was asked
    failures: list[str] = field(default_factory=list)  # a line for each call that failed
    notes: list[str] = field(default_factory=list)  # cuts of prompts, answers that cannot be read
    usage: Usage = Usage()


def merged(parts: Sequence[Collected]) -> Collected:
    """What several requests for labels gave, in their order."""

    def groups(featurizer: Featurizer) -> list[LabelledGroup]:
        return [group for part in parts for group in part.groups(featurizer)]

    out = Collected(groups)
    for part in parts:
        out.calls += part.calls
        out.failures += part.failures
        out.notes += part.notes
        out.usage += part.usage
    return out


@dataclass(frozen=True)
class Asked:
    """What the LLM labels: users' queries, and the records that these may see."""

    queries: Mapping[str, Sequence[Query]]
    records: Records

    @property
    def all(self) -> list[Query]:
        """The queries, user by user."""
        return [query for own in self.queries.values() for query in own]


def asked_about(data: DataSet, settings: Settings, users: Sequence[str]) -> Asked:
    """What the LLM labels of these training users, up to `queries_per_user` of each: their latest
    records, known queries included (`label_queries=history`, and `auto`); or their first known
    queries, which see the history alone, as a benchmark asks them (`queries`, and in private mode);
    or these, and then the latest records before them (`both`).
    """
    task, most = data.task, settings.queries_per_user
    how = "queries" if settings.private else settings.label_queries
    if how in ("auto", "history"):
        answered = {user: data.answered(user) for user in users}
        return Asked(
            {u: training_queries(task, own, most) for u, own in answered.items()}, answered
        )
    records = {user: data.history(user) for user in users}
    known = {user: known_queries(data, user) for user in users}
    queries = {
        user: [query for query in own if task.labels or not query.offered][:most]
        for user, own in known.items()
    }
    if how == "both":
        for user, own in queries.items():
            earlier = before(records[user], own[0]) if own else records[user]
            more = most - len(own)
            queries[user] = [*(training_queries(task, earlier, more) if more else ()), *own]
    return Asked(queries, records)


def known_queries(data: DataSet, user: str, most: int | None = None) -> list[Query]:
    """The user's first queries whose gold answer is known, all or at most so many."""
    return [query for query in data.queries(user) if query.gold is not None][:most]


def training_queries(task: Task, records: Sequence[Record], count: int) -> list[Query]:
    """A user's last records as queries, if they see a record and have an answer of the task. A
    recorded choice among texts needs no labels by an LLM.
    """
    ordered = [record for record in in_order(records) if _can_be_asked(task, record)]
    return [as_query(record) for record in ordered[-count:] if _sees_one(record, records)]


def _can_be_asked(task: Task, record: Record) -> bool:
    return task.is_answer(record.output) and (bool(task.labels) or not isinstance(record, Choice))


def _sees_one(record: Record, records: Iterable[Record]) -> bool:
    return any(own.user == record.user and precedes(own, record) for own in records)


async def reranker_groups(
    personalizer: UserPipeline, queries: Sequence[Query], progress: Progress | None = None
) -> Collected:
    """Ask the LLM each query once per retrieved record, at temperature 0. With labels and
    `labelling=adaptive` one record of each answer is asked for, the first one, and the others are
    worth the same: an LLM that is shown one record leans on that record's answer.
    """
    settings = personalizer.settings
    contexts = [personalizer.context_of(query) for query in queries]
    cases = [(context, item) for context in contexts for item in personalizer.retrieve(context)]
    alike = settings.labelling == "adaptive" and bool(personalizer.task.labels)
    asked_as = [(own.query, item.record.output if alike else item.record) for own, item in cases]
    first = dict(zip(reversed(asked_as), reversed(cases), strict=True))  # the last one stays
    asked = {key: first[key] for key in dict.fromkeys(asked_as)}
    results = await _in_order_of_prompts(personalizer, asked, progress)
    useful: dict[Query, list[tuple[Ranked, float]]] = {}
    for (context, item), key in zip(cases, asked_as, strict=True):
        if not isinstance(result := results[key], LLMError):
            useful.setdefault(context.query, []).append((item, result[0]))

    def groups(featurizer: Featurizer) -> list[LabelledGroup]:
        judged = [own for own in contexts if own.query in useful]
        group = partial(_reranker_group, personalizer, featurizer, voted=True)
        return [group(_seen(featurizer, own), useful[own.query]) for own in judged]

    out = Collected(groups, calls=len(asked))
    for key, (context, item) in asked.items():
        if isinstance(result := results[key], LLMError):
            out.failures.append(f"query {context.query.id}, record {item.record.id}: {result}")
            out.usage += Usage(failed=1)
        else:
            out.usage += result[1]
            out.notes += result[2]
    return out


async def _in_order_of_prompts(
    personalizer: UserPipeline,
    asked: Mapping[Any, tuple[Context, Ranked]],
    progress: Progress | None,
) -> dict[Any, tuple[float, Usage, list[str]] | LLMError]:
    """What each record is worth. Prompts that begin alike follow each other: engines keep those."""
    greedy = {"samples": 1, "greedy_first": True, "candidates": "sampled"}
    once = replace(personalizer, settings=personalizer.settings.model_copy(update=greedy))

    def beginning(key: Any) -> list[str]:
        context, item = asked[key]
        return [part["content"] for part in once.render(context.query, [item]).messages]

    order = sorted(asked, key=beginning)
    todo = [(asked[key][0].query, asked[key][1]) for key in order]
    found = await open_engine(once.settings.engine).ask(_usefulness, once, todo, progress)
    return dict(zip(order, found, strict=True))


async def _usefulness(
    once: UserPipeline, case: tuple[Query, Ranked]
) -> tuple[float, Usage, list[str]]:
    """The gain of the LLM's answer with this record alone, what it cost, and notes."""
    query, item = case
    prompt = once.render(query, [item])
    sampled = await once.sample(once.llm, prompt)
    gain = once.task.gain(sampled.candidates[0].answer, query.gold or "")
    return gain, sampled.usage, [*prompt.notes, *sampled.notes]


def weak_reranker_groups(
    personalizer: UserPipeline, featurizer: Featurizer, user: str, since: int = 0
) -> list[LabelledGroup]:
    """Each of a user's records as a query for those before it, which are worth their own answers:
    an LLM that is shown one record leans on that record's answer (measured on training users:
    benchmarks/reranker_labels.py), and histories give many more groups than an LLM can label.
    """
    task, groups = personalizer.task, list[LabelledGroup]()
    for record, context in _with_contexts(featurizer, personalizer.records[user], since):
        if not context.visible or not _can_be_asked(task, record):
            continue
        rows = []
        for item in personalizer.retrieve(context):
            answer = item.record.output  # in LaMP-1's papers none of the labels
            own = answer if task.is_answer(answer) else None
            rows.append((item, task.gain(own, record.output)))
        if len(rows) > 1:
            groups.append(_reranker_group(personalizer, featurizer, context, rows, voted=False))
    return groups


def _with_contexts(
    featurizer: Featurizer, records: Sequence[Record], since: int
) -> Iterator[tuple[Record, Context]]:
    """A user's records, oldest first, each with itself as a query for those before it; without the
    first ones.
    """
    own = in_order(records)
    vectorize = featurizer.of_pasts(own[:-1])  # the last one is in no past
    for record, past in islice(with_pasts(own), since, None):
        yield record, Context(as_query(record), tuple(past), vectorize=vectorize)


def _reranker_group(
    personalizer: UserPipeline,
    featurizer: Featurizer,
    context: Context,
    rows: Sequence[tuple[Ranked, float]],
    *,
    voted: bool,
) -> LabelledGroup:
    items, gains = zip(*rows, strict=True)
    with_answer = personalizer.settings.record_answer
    texts = [record_text(item.record, with_answer=with_answer) for item in items]
    side = featurizer.reranker(context.query, items, context.vectors)
    query, position = context.query, len(context.visible)
    return LabelledGroup(query.user, query.id, query.input, texts, gains, side, position, voted)


async def adapter_groups(
    personalizer: UserPipeline, queries: Sequence[Query], progress: Progress | None = None
) -> Collected:
    """Let the LLM propose candidates for each query, each with its gain."""
    contexts = [personalizer.context_of(query) for query in queries]
    sent = [replace(context, vectorize=None) for context in contexts]
    engine = open_engine(personalizer.settings.engine)
    proposals = await engine.ask(_propose, personalizer, sent, progress)
    offers: list[tuple[Context, list[Candidate]]] = []

    def groups(featurizer: Featurizer) -> list[LabelledGroup]:
        seen = ((_seen(featurizer, context), own) for context, own in offers)
        return [_labelled(featurizer, context, own, voted=True) for context, own in seen]

    out = Collected(groups, calls=len(queries))
    for context, proposal in zip(contexts, proposals, strict=True):
        if isinstance(proposal, LLMError):
            out.failures.append(f"query {context.query.id}: {proposal}")
            out.usage += Usage(failed=1)
        else:
            out.usage += proposal.usage
            out.notes += [note for note in proposal.notes if note not in context.notes]
            if candidates := _offered(personalizer, proposal):
                offers.append((context, candidates))
    return out


async def _propose(personalizer: UserPipeline, context: Context) -> Proposal:
    """The candidates for a context, which is a copy: one to keep would keep its vectors."""
    return await personalizer.apropose(replace(context, vectorize=personalizer.vectorize))


def unasked_groups(
    personalizer: UserPipeline, featurizer: Featurizer, queries: Sequence[Query]
) -> list[LabelledGroup]:
    """The groups of all labels that `adapter_groups` makes, before the LLM votes on them."""
    candidates = all_labels(personalizer.task, [])
    contexts = map(personalizer.context_of, queries)
    return [
        _labelled(featurizer, _seen(featurizer, own), candidates, voted=True) for own in contexts
    ]


def _seen(featurizer: Featurizer, context: Context) -> Context:
    """The context with vectors of the encoder as it is now."""
    return replace(context, vectorize=featurizer.vectorize)


def _offered(personalizer: UserPipeline, proposal: Proposal) -> list[Candidate]:
    """The candidates that the adapter learns from."""
    task, settings, gold = personalizer.task, personalizer.settings, proposal.query.gold
    candidates = [candidate for candidate in proposal.candidates if candidate.answer is not None]
    if offers_all(task, settings):
        return all_labels(task, candidates)
    wants_gold = settings.label_rule == "gold-positive" and not task.labels
    if wants_gold and gold is not None and all(gold != own.answer for own in candidates):
        candidates.append(Candidate(gold, gold))
    return candidates


def offers_all(task: Task, settings: Settings) -> bool:
    """Whether the adapter learns from every label, not from the sampled ones alone."""
    return bool(task.labels) and (settings.candidates == "labels" or reads_labels(task, settings))


def asks_of_records(settings: Settings) -> bool:
    """Whether the LLM is asked what single records are worth: to learn from it, or to check."""
    return settings.reranker_labels == "llm" or settings.reranker_check == "llm"


def asks_in_fit(task: Task, settings: Settings) -> bool:
    """Whether new users' adapter heads are fitted to the LLM's samples (also where there was too
    little to learn a word model from).
    """
    by_words = not task.labels and settings.word_model and settings.fit_labels == "history"
    return not (settings.private or offers_all(task, settings) or by_words)


def reads_labels(task: Task, settings: Settings) -> bool:
    """Whether the adapter's features are label features."""
    wanted = settings.label_features and settings.features == "tower"
    return bool(task.labels) and wanted and bool(HEADS.load(settings.head).on_labels)


def weak_adapter_groups(
    featurizer: Featurizer, records: Sequence[Record], since: int = 0
) -> list[LabelledGroup]:
    """A user's records as queries over all labels, each labelled by its own answer."""
    labels, candidates = featurizer.task.labels, all_labels(featurizer.task, [])
    return [
        _labelled(featurizer, context, candidates, voted=False)
        for record, context in _with_contexts(featurizer, records, since)
        if record.output in labels
    ]


def choice_groups(
    featurizer: Featurizer, records: Sequence[Record], since: int = 0
) -> list[LabelledGroup]:
    """A user's recorded choices, each with what is known of the records before it."""
    return [
        _choice_group(featurizer, context, offered_candidates(context.query))
        for record, context in _with_contexts(featurizer, records, since)
        if isinstance(record, Choice)
    ]


def choice_group(
    featurizer: Featurizer,
    query: Query,
    visible: Sequence[Record],
    candidates: Sequence[Candidate] = (),
) -> LabelledGroup:
    """A choice of which the query's `gold` was taken, whether it was imported or is the gateway's
    feedback; `candidates`: what is known of those offered beside their texts.
    """
    context = Context(query, tuple(visible), vectorize=featurizer.vectorize)
    return _choice_group(featurizer, context, candidates or offered_candidates(query))


def _choice_group(
    featurizer: Featurizer, context: Context, offered: Sequence[Candidate]
) -> LabelledGroup:
    query, position = context.query, len(context.visible)
    side = featurizer.adapter(query, offered, context.vectors)
    texts = [candidate_text(featurizer.task, candidate) for candidate in offered]
    gains = [float(text == query.gold) for text in texts]
    plain = LabelledGroup(query.user, query.id, query.input, texts, gains, side, position)
    # as the LLM's candidates, whose groups learn from choices too where there are both
    return replace(plain, voted=True, exact=True)


def _labelled(
    featurizer: Featurizer, context: Context, candidates: Sequence[Candidate], *, voted: bool
) -> LabelledGroup:
    task, query = featurizer.task, context.query
    gains = [task.gain(candidate.answer, query.gold or "") for candidate in candidates]
    side = featurizer.adapter(query, candidates, context.vectors)
    texts = [candidate_text(task, candidate) for candidate in candidates]
    position = len(context.visible)
    return LabelledGroup(query.user, query.id, query.input, texts, gains, side, position, voted)


def made_once(
    made: Callable[[Featurizer], list[LabelledGroup]],
) -> Callable[[Featurizer], list[LabelledGroup]]:
    """The same groups for the same featurizer, made once."""
    known: list[tuple[Featurizer, list[LabelledGroup]]] = []

    def groups(featurizer: Featurizer) -> list[LabelledGroup]:
        if not known or known[0][0] is not featurizer:
            known[:] = [(featurizer, made(featurizer))]
        return known[0][1]

    return groups
