"""From histories to labelled groups: what the reranker and the adapter learn from (paper, 3.2 and
3.3).

A user's own later records serve as queries for the earlier ones; `history.before` decides what each
may see.
    reranker  each retrieved record alone in the prompt; its gain is the gain of the LLM's answer
    adapter   the candidates of `Personalizer.apropose`, each with its gain
and weak labels, which cost no LLM call:
    reranker  the same records, each worth what its own answer would be for the query (1-NN)
    adapter   for tasks with labels, the record's own answer against the other labels
Knows no scorer but those inside the personalizer. A failed call leaves its pair out and is told.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from hydra_llm.config import Settings
from hydra_llm.context import Context
from hydra_llm.errors import LLMError
from hydra_llm.history import as_query, before, in_order
from hydra_llm.llm.concurrency import Progress, map_calls
from hydra_llm.pipeline import Personalizer
from hydra_llm.plugins import HEADS
from hydra_llm.rerank import record_text
from hydra_llm.select import all_labels, candidate_text
from hydra_llm.side_features import Featurizer
from hydra_llm.tasks.base import Task
from hydra_llm.types import Candidate, LabelledGroup, Proposal, Query, Ranked, Record, Usage


@dataclass
class Collected:
    """What the LLM did, ready to be made into groups."""

    groups: Callable[[Featurizer], list[LabelledGroup]]
    """Makes the labelled groups, with side features of the encoder as it is now: tuning changes
    them.
    """
    calls: int = 0  # questions that the LLM was asked
    failures: list[str] = field(default_factory=list)
    """One line for each that failed; its pair is left out."""
    notes: list[str] = field(default_factory=list)
    """What was cut from prompts, and answers that could not be read."""
    usage: Usage = Usage()


def training_queries(task: Task, records: Sequence[Record], count: int) -> list[Query]:
    """A user's last records as queries, if they see a record and have an answer of the task."""
    ordered = [record for record in in_order(records) if task.is_answer(record.output)]
    return [as_query(record) for record in ordered[-count:] if before(records, record)]


async def reranker_groups(
    personalizer: Personalizer, queries: Sequence[Query], progress: Progress | None = None
) -> Collected:
    """Ask the LLM each query once per retrieved record, at temperature 0."""
    settings = personalizer.settings
    contexts = [personalizer.context_of(query) for query in queries]
    cases = [(context, item) for context in contexts for item in personalizer.retrieve(context)]

    greedy = {"samples": 1, "greedy_first": True, "candidates": "sampled"}
    once = replace(personalizer, settings=settings.model_copy(update=greedy))

    async def usefulness(case: tuple[Context, Ranked]) -> tuple[float, Usage, list[str]]:
        query, item = case[0].query, case[1]
        prompt = once.render(query, [item])
        made = await once.sample(once.llm, prompt)
        gain = once.task.gain(made.candidates[0].answer, query.gold or "")
        return gain, made.usage, [*prompt.notes, *made.notes]

    results = await map_calls(usefulness, cases, limit=settings.concurrency, progress=progress)
    useful: dict[tuple[str, str], list[tuple[Ranked, float]]] = {}

    def groups(featurizer: Featurizer) -> list[LabelledGroup]:
        return [
            _reranker_group(personalizer, featurizer, context, useful[key], voted=True)
            for context in contexts
            if (key := (context.query.user, context.query.id)) in useful
        ]

    out = Collected(groups, calls=len(cases))
    for (context, item), result in zip(cases, results, strict=True):
        query = context.query
        if isinstance(result, LLMError):
            out.failures.append(f"query {query.id}, record {item.record.id}: {result}")
            out.usage += Usage(failed=1)
        else:
            useful.setdefault((query.user, query.id), []).append((item, result[0]))
            out.usage += result[1]
            out.notes += result[2]
    return out


def weak_reranker_groups(
    personalizer: Personalizer, featurizer: Featurizer, user: str
) -> list[LabelledGroup]:
    """Each of a user's records as a query for those before it; a record is worth what its own
    answer would be there.

    An LLM that is shown one record leans on that record's answer, so that the two gains go together
    (measured on training users: benchmarks/reranker_labels.py), and histories give many more such
    groups than an LLM can be asked for.
    """
    task, records, found = personalizer.task, personalizer.records[user], []
    for query in training_queries(task, records, len(records)):
        context = personalizer.context_of(query)
        rows = [
            (item, task.gain(_own_answer(task, item.record), query.gold or ""))
            for item in personalizer.retrieve(context)
        ]
        if len(rows) > 1:
            found.append(_reranker_group(personalizer, featurizer, context, rows, voted=False))
    return found


def _own_answer(task: Task, record: Record) -> str | None:
    """A record's output as an answer; None where it is none of the labels (LaMP-1's papers)."""
    return record.output if task.is_answer(record.output) else None


def _reranker_group(
    personalizer: Personalizer,
    featurizer: Featurizer,
    context: Context,
    rows: Sequence[tuple[Ranked, float]],
    *,
    voted: bool,
) -> LabelledGroup:
    query, items = context.query, [item for item, _ in rows]
    texts = tuple(
        record_text(item.record, with_answer=personalizer.settings.record_answer) for item in items
    )
    table = _frozen(
        featurizer.reranker(query, items, featurizer.vectorize(context.visible)).tolist()
    )
    return LabelledGroup(
        query.user,
        query.id,
        query.input,
        texts,
        tuple(gain for _, gain in rows),
        table,
        len(context.visible),
        voted=voted,
    )


async def adapter_groups(
    personalizer: Personalizer, queries: Sequence[Query], progress: Progress | None = None
) -> Collected:
    """Let the LLM propose candidates for each query and say what each is worth."""
    contexts = [personalizer.context_of(query) for query in queries]

    async def propose(context: Context) -> Proposal:
        return await personalizer.apropose(context.at_rest())

    proposals = await map_calls(
        propose, contexts, limit=personalizer.settings.concurrency, progress=progress
    )

    def groups(featurizer: Featurizer) -> list[LabelledGroup]:
        made = (
            _adapter_group(personalizer, featurizer, context, proposal)
            for context, proposal in zip(contexts, proposals, strict=True)
            if isinstance(proposal, Proposal)
        )
        return [group for group in made if group]

    out = Collected(groups, calls=len(queries))
    for context, proposal in zip(contexts, proposals, strict=True):
        if isinstance(proposal, LLMError):
            out.failures.append(f"query {context.query.id}: {proposal}")
            out.usage += Usage(failed=1)
        else:
            out.usage += proposal.usage
            out.notes += [note for note in proposal.notes if note not in context.notes]
    return out


def _adapter_group(
    personalizer: Personalizer, featurizer: Featurizer, context: Context, proposal: Proposal
) -> LabelledGroup | None:
    query, settings = proposal.query, personalizer.settings
    candidates = [candidate for candidate in proposal.candidates if candidate.answer is not None]
    if offers_all(personalizer.task, settings):
        candidates = all_labels(personalizer.task, candidates)
    wants_gold = settings.label_rule == "gold-positive" and not personalizer.task.labels
    if (
        wants_gold
        and query.gold is not None
        and all(candidate.answer != query.gold for candidate in candidates)
    ):
        candidates = [*candidates, Candidate(query.gold, query.gold)]
    if not candidates:
        return None
    return _labelled(featurizer, context, candidates, voted=True)


def offers_all(task: Task, settings: Settings) -> bool:
    """Whether the adapter learns from every label, not from the sampled ones alone."""
    return bool(task.labels) and (settings.candidates == "labels" or reads_labels(task, settings))


def reads_labels(task: Task, settings: Settings) -> bool:
    """Whether the adapter's features are label features."""
    wanted = settings.label_features and settings.features == "tower"
    return bool(task.labels) and wanted and bool(HEADS.load(settings.head).on_labels)


def weak_adapter_groups(featurizer: Featurizer, records: Sequence[Record]) -> list[LabelledGroup]:
    """A user's records, each a query over all labels whose answer the record itself gives; the
    first sees nothing.
    """
    task = featurizer.task
    blank = all_labels(task, [])
    queries = [as_query(record) for record in in_order(records) if record.output in task.labels]
    contexts = (Context(query, tuple(before(records, query))) for query in queries)
    return [_labelled(featurizer, context, blank, voted=False) for context in contexts]


def _labelled(
    featurizer: Featurizer, context: Context, candidates: Sequence[Candidate], *, voted: bool
) -> LabelledGroup:
    task, query, count = featurizer.task, context.query, len(context.visible)
    gains = tuple(task.gain(candidate.answer, query.gold or "") for candidate in candidates)
    vectors = featurizer.vectorize(context.visible)
    table = _frozen(featurizer.adapter(query, candidates, vectors).tolist())
    texts = tuple(candidate_text(task, candidate) for candidate in candidates)
    return LabelledGroup(query.user, query.id, query.input, texts, gains, table, count, voted=voted)


def _frozen(rows: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in rows)
