"""One question to one answer: retrieve → rerank → render → sample → select (paper, figure 2).

Labelling, the benchmark and the gateway call these same stages, so that learning and answering
cannot drift apart. A baseline has null parts: `Nothing`, `KeepOrder`, `FirstCandidate`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter
from typing import Any, Self

from hydra_llm.config import Settings
from hydra_llm.context import Context, Vectorize
from hydra_llm.errors import BudgetExceeded, LLMError, LLMRefused, UnknownUser, UserFault
from hydra_llm.gate import NOT_RELEVANT, OFF_TASK, Gate, OpenGate
from hydra_llm.history import before
from hydra_llm.llm.base import ChatLLM, PartlyFailed, Sampling
from hydra_llm.llm.concurrency import gathered, run_sync
from hydra_llm.llm.masked import masked
from hydra_llm.model.head import Head, usable_head
from hydra_llm.prompt import Prompt, render
from hydra_llm.rerank import KeepOrder, Reranker
from hydra_llm.retrieve import PromptRecords, Retriever
from hydra_llm.select import FirstCandidate, Selection, Selector, all_labels, offered_candidates
from hydra_llm.tasks.base import Task
from hydra_llm.text import repair, text_fault, without_reasoning
from hydra_llm.types import Answer, Candidate, Generation, Proposal, Query, Ranked, Record, Usage

Result = Generation | LLMError
Heads = Mapping[str, Mapping[str, Head]]  # scorer ("reranker", "adapter") → user → head
Records = Mapping[str, Sequence[Record]]  # user → records
Question = Query | Context | str
NOT_ASKED = "the LLM is not asked: its answers did not help the adapter on held-out users"
UNTOLD = "the LLM told no probabilities of labels, one vote counts: set label_probabilities=false"
MAX_CUTS = 3  # how often a prompt is shortened because the LLM finds it too long
CUT_MARGIN = 0.9  # per cut, of what should fit: estimated tokens are not the LLM's


@dataclass(frozen=True, slots=True)
class Sampled:
    """The LLM's candidates for a prompt."""

    prompt: Prompt  # as sent last: shorter than given where the LLM's window is smaller
    candidates: tuple[Candidate, ...]
    usage: Usage
    notes: tuple[str, ...]  # failed calls, and answers that could not be parsed


@dataclass(frozen=True)
class Pipeline:
    """The stages for one task; knows no users and holds no LLM."""

    task: Task
    retriever: Retriever
    settings: Settings = field(default_factory=Settings)
    reranker: Reranker = field(default_factory=KeepOrder)
    selector: Selector = field(default_factory=FirstCandidate)
    gate: Gate = field(default_factory=OpenGate)
    beside: tuple[PromptRecords, ...] = ()  # of other prompts, whose greedy answers are candidates
    vectorize: Vectorize | None = None  # makes a context's vectors, where a stage is learned
    profile: str = ""  # what is known of the user, for the system message

    def context(
        self, query: Query, visible: Sequence[Record], heads: Mapping[str, Head] | None = None
    ) -> Context:
        """What the stages may know of a question; `visible` are the records of `history.before`.
        Heads that know more than the query may see are left out: time never leaks.
        """
        own = heads or {}
        checked = {name: usable_head(head, query, len(visible)) for name, head in own.items()}
        usable = {name: head for name, (head, _) in checked.items() if head is not None}
        notes = tuple(f"{name}: {reason}" for name, (_, reason) in checked.items() if reason)
        return Context(query, tuple(visible), usable, notes, self.vectorize)

    @property
    def prompt_style(self) -> str:
        """The setting's, or the one that suits the task's kind."""
        style = self.settings.prompt_style
        return self.task.strategy.prompt_style if style == "auto" else style

    def retrieve(self, context: Context, most: int = 0) -> list[Ranked]:
        """The records that may help, best first: as many as the settings say, or `most`."""
        count = max(self.settings.retrieved, most)
        return self.retriever.retrieve(context.query, context.visible, count)

    def rerank(self, context: Context, retrieved: Sequence[Ranked]) -> list[Ranked]:
        """The same records, most useful first."""
        return self.reranker.order(context, retrieved)

    def belongs(self, context: Context, *, in_task_words: bool = True) -> bool:
        """Whether the question may see records; always if the task's own instruction asks it."""
        return self.gate_for(in_task_words).belongs(context)

    def relevant(
        self, context: Context, ranked: Sequence[Ranked], *, in_task_words: bool = True
    ) -> list[Ranked]:
        """The records that are worth more than none; all if the task's own instruction asks."""
        return self.gate_for(in_task_words).relevant(context, ranked)

    def gate_for(self, in_task_words: bool) -> Gate:
        mode = self.settings.gate
        return OpenGate() if mode == "off" or (mode == "auto" and in_task_words) else self.gate

    def render(
        self,
        query: Query,
        records: Sequence[Ranked],
        *,
        conversation: Sequence[Mapping[str, Any]] | None = None,
        window: int | None = None,
        style: str | None = None,
    ) -> Prompt:
        """The question with these records. `conversation` is as in `prompt.render`; `window` is how
        many tokens the LLM can take, where known (else `sample` asks with less where it refuses).
        `style`: one of `prompt.STYLES` instead of the setting's.
        """
        limit = self.settings.max_prompt_tokens
        return render(
            self.task,
            query,
            () if self.settings.private else records,  # they enter prompts here alone
            max_tokens=min(limit, window or limit),
            style=style or self.prompt_style,
            profile="" if self.settings.private else self.profile,
            conversation=conversation,
        )

    def shown_beside(self, context: Context, *, in_task_words: bool = True) -> list[list[Ranked]]:
        """The records of each other prompt; none where the LLM is asked for one answer."""
        settings, gate = self.settings, self.gate_for(in_task_words)
        others = self.beside if settings.samples > 1 else ()
        seen, most = (context.query, context.visible), settings.retrieved
        found = [(own.k, own.retriever.retrieve(*seen, max(most, own.k))) for own in others]
        return [gate.relevant(context, records)[:k] for k, records in found]

    def render_all(
        self, query: Query, shown: Sequence[Sequence[Ranked]], **how: Any
    ) -> list[Prompt]:
        """`render` with each of these records; of equal prompts the first alone."""
        distinct: dict[str, Prompt] = {}
        for records in shown:
            prompt = self.render(query, records, **how)
            distinct.setdefault(str(prompt.messages), prompt)
        return list(distinct.values())

    async def sample(self, llm: ChatLLM, prompt: Prompt, beside: Sequence[Prompt] = ()) -> Sampled:
        """Ask the LLM; the prompts `beside` at temperature 0, each in place of a sample. A prompt
        that it finds too long is shortened for all its samples alike. LLMError if it gave no answer
        at all.
        """
        greedy = self._greedy_calls
        others = beside[: self.settings.samples - 1]
        more = self.settings.samples - greedy - len(others)
        counts = [(greedy, 0.0), (more, self.settings.temperature)]
        asks = [partial(self._ask, llm, prompt, counts)]
        asks += [partial(self._ask, llm, other, [(1, 0.0)]) for other in others]
        (sent, first, spent), *rest = await gathered(asks)
        results = first[:greedy] + [result for _, own, _ in rest for result in own]
        at_zero = sum(len(own.texts) for own in results if isinstance(own, Generation))
        results += first[greedy:]
        errors = [result for result in results if isinstance(result, LLMError)]
        fatal = [error for error in errors if isinstance(error, BudgetExceeded | LLMRefused)]
        if fatal or len(errors) == len(results):
            raise (fatal or errors)[0]
        answered = [result for result in results if isinstance(result, Generation)]
        texts = [answer_text(text) for result in answered for text in result.texts]
        if not texts:
            raise LLMError("the LLM gave no text")
        told = getattr(results[0], "probabilities", {})
        candidates, unread = self.read(texts, at_zero, told)
        failures = [f"a call failed: {error}" for error in errors]
        wanted = self._reads_probabilities and self.settings.candidates == "labels"
        if wanted and not told and isinstance(results[0], Generation):
            failures.append(UNTOLD)
        usage = sum((own for _, _, own in rest), spent)
        return Sampled(sent, candidates, usage, (*failures, *unread))

    async def _ask(
        self, llm: ChatLLM, prompt: Prompt, counts: Sequence[tuple[int, float]]
    ) -> tuple[Prompt, list[Result], Usage]:
        """The prompt as sent last, the result of each call, and what all of them cost."""
        spent = Usage()
        for cut in range(1, MAX_CUTS + 2):
            results = await self._generate(llm, prompt, counts)
            spent += sum(map(_usage, results), Usage())
            refused = [result for result in results if isinstance(result, LLMRefused)]
            shares = [error.fits for error in refused if error.fits is not None]
            if not shares or cut > MAX_CUTS:
                break
            # The last margin was too small for this LLM's tokens: each cut has a larger one.
            shorter = prompt.shorter(min(shares) * CUT_MARGIN**cut)
            if shorter is None:
                break
            prompt = shorter
        return prompt, results, spent

    def read(
        self, texts: Sequence[str], greedy: int, probabilities: Mapping[str, float] | None = None
    ) -> tuple[tuple[Candidate, ...], list[str]]:
        """Texts of the LLM as candidates, and a note for what could not be parsed.

        Equal answers are one candidate with several votes, in order of appearance; the first
        `greedy` texts are of temperature 0. With `candidates = labels` every label is a candidate,
        the greedy one first. A text that cannot be parsed is a candidate without an answer.
        """
        distinct: dict[str, Candidate] = {}
        unread = 0
        for place, text in enumerate(texts):
            answer = self.task.read(text, self.settings.parsing)
            if answer is None:
                unread += 1
            wording = text if self.task.labels else answer or text
            key = candidate_key(text, answer)
            old = distinct.get(key) or Candidate(wording, answer)
            distinct[key] = replace(old, votes=old.votes + 1, greedy=old.greedy or place < greedy)
        notes = [f"{unread} of {len(texts)} answers could not be parsed"] if unread else []
        candidates = list(distinct.values())
        if self.task.labels and self.settings.candidates == "labels":
            # Those without an answer stay: else a baseline would answer the first label.
            unreadable = [candidate for candidate in candidates if candidate.answer is None]
            candidates = [*all_labels(self.task, candidates), *unreadable]
            if probabilities:
                told = [probabilities.get(own.answer or "") for own in candidates]
                pairs = zip(candidates, told, strict=True)
                candidates = [replace(own, llm_probability=share) for own, share in pairs]
            candidates.sort(key=lambda candidate: (not candidate.greedy, -candidate.votes))
        return tuple(candidates), notes

    def select(self, context: Context, candidates: Sequence[Candidate]) -> Selection:
        """The candidates with their scores, and the pick; makes no LLM call."""
        return self.selector.choose(context, candidates)

    @property
    def _reads_probabilities(self) -> bool:
        return bool(self.task.labels) and self.settings.label_probabilities

    @property
    def _greedy_calls(self) -> int:
        first = self.settings.greedy_first or self.settings.samples == 1
        return 1 if first or self._reads_probabilities else 0

    async def _generate(
        self, llm: ChatLLM, prompt: Prompt, counts: Sequence[tuple[int, float]]
    ) -> list[Result]:
        """A call for each number and temperature, at the same time; a failed one is its error."""
        settings, needed = self.settings, llm.identity.get("needs_choices", False)
        held = needed or settings.constrain or self._reads_probabilities
        choices = self.task.labels if held else ()
        shared = Sampling(max_tokens=settings.max_tokens, seed=settings.seed, choices=choices)
        if self._reads_probabilities:
            shared, counts = replace(shared, probabilities=True), [(1, 0.0)]

        async def call(sampling: Sampling) -> Result:
            try:
                return await masked(llm, settings.mask).generate(prompt.messages, sampling)
            except LLMError as error:
                return error

        calls = [replace(shared, n=n, temperature=heat) for n, heat in counts if n > 0]
        return await gathered([partial(call, sampling) for sampling in calls])


@dataclass(frozen=True)
class UserPipeline(Pipeline):
    """A pipeline with an LLM and users: it answers as each of them would want."""

    llm: ChatLLM = field(kw_only=True)
    records: Records = field(default_factory=dict, kw_only=True)
    """Each known user's records; answers for other users see none."""
    heads: Heads = field(default_factory=dict, kw_only=True)

    @classmethod
    def of(cls, stages: Pipeline, llm: ChatLLM, records: Records, heads: Heads) -> Self:
        """These stages with an LLM and users."""
        return cls(**vars(stages), llm=llm, records=records, heads=heads)

    def context_of(self, question: Question, user: str | None = None) -> Context:
        """The context of a query, or of a text of `user`; a context is returned as it is."""
        if isinstance(question, Context):
            return question
        query = self.query(question, user) if isinstance(question, str) else question
        owner = query.user
        if user not in (None, owner):
            raise UserFault(f"the query is of user '{owner}', not of '{user}': leave `user` out")
        heads = {scorer: own[owner] for scorer, own in self.heads.items() if owner in own}
        return self.context(query, before(self.records.get(owner, ()), query), heads)

    async def apropose(self, question: Question, *, user: str | None = None) -> Proposal:
        """Everything up to the candidates; arguments and errors as of `aanswer`."""
        seconds: dict[str, float] = {}
        context = self.context_of(question, user)
        if context.query.offered:  # its candidates are given: no LLM is asked
            return Proposal(
                context.query, (), (), (), offered_candidates(context.query), notes=context.notes
            )
        with _timed(seconds, "retrieve"):
            retrieved = self.retrieve(context)
        with _timed(seconds, "rerank"):
            ranked, refused = self.admitted(context, retrieved)
        if not (refused or self.selector.needs_llm or self.settings.ask == "always"):
            candidates, notes = tuple(all_labels(self.task, [])), (*context.notes, NOT_ASKED)
            shown = tuple(retrieved), tuple(ranked)
            return Proposal(context.query, *shown, (), candidates, seconds=seconds, notes=notes)
        with _timed(seconds, "prompt"):
            others = () if refused else self.shown_beside(context)
            prompt, *beside = self.render_all(context.query, [ranked[: self.settings.k], *others])
        with _timed(seconds, "llm"):
            plain = self._without_samples() if refused else self
            sampled = await plain.sample(self.llm, prompt, beside)
        return Proposal(
            query=context.query,
            retrieved=tuple(retrieved),
            records=tuple(ranked),
            messages=sampled.prompt.messages,
            candidates=sampled.candidates,
            usage=sampled.usage,
            seconds=seconds,
            notes=(*context.notes, *refused, *sampled.prompt.notes, *sampled.notes),
            shown=len(sampled.prompt.records),
        )

    def admitted(
        self, context: Context, retrieved: Sequence[Ranked]
    ) -> tuple[list[Ranked], tuple[str, ...]]:
        """The records that pass the gate, reranked, and a note where it lets none pass."""
        if not self.belongs(context):
            return [], (f"gate: {OFF_TASK}",)
        ranked = self.rerank(context, retrieved)
        passed = self.relevant(context, ranked)
        return passed, (f"gate: {NOT_RELEVANT}",) if ranked and not passed else ()

    def _without_samples(self) -> Self:
        """The same, but the LLM's own answer stands: nobody's records speak for another one."""
        once = {"samples": 1, "greedy_first": True, "candidates": "sampled"}
        return replace(self, settings=self.settings.model_copy(update=once))

    async def aanswer(self, question: Question, *, user: str | None = None) -> Answer:
        """`apropose`, then the selector's pick; a plain text is asked for `user` as of now.

        Raises:
            UnknownUser: a plain text for a user without records.
            LLMError: the LLM gave no answer at all.
        """
        context = self.context_of(question, user)
        return self.decide(context, await self.apropose(context))

    def decide(self, context: Context, proposal: Proposal) -> Answer:
        """The selector's pick among a proposal's candidates; makes no LLM call."""
        seconds = {**proposal.seconds}
        with _timed(seconds, "adapt"):
            candidates, chosen, abstained, _ = self.select(context, proposal.candidates)
        timed = replace(proposal, seconds=seconds)
        pick = candidates[chosen]
        text = pick.answer if pick.answer is not None else pick.text
        return Answer(text, timed, tuple(candidates), chosen, abstained)

    # ---- the same from sync code

    def propose(self, question: Question, *, user: str | None = None) -> Proposal:
        """`apropose` from sync code."""
        return run_sync(partial(self.apropose, question, user=user))

    def answer(self, question: Question, *, user: str | None = None) -> Answer:
        """`aanswer` from sync code."""
        return run_sync(partial(self.aanswer, question, user=user))

    def query(self, text: str, user: str | None) -> Query:
        """A text as a query after all of the user's records; UnknownUser without records, UserFault
        for an empty text or one that cannot be encoded.
        """
        if user is None or user not in self.records:
            some = f" ({', '.join(list(self.records)[:3])}, …)" if self.records else ""
            raise UnknownUser(f"unknown user '{user}': {len(self.records)} users are known{some}")
        if fault := text_fault(text):
            raise UserFault(f"the text to answer {fault}")
        return Query(user, "asked", text)


def answer_text(text: str) -> str:
    """An LLM's text as every stage and file takes it, without its reasoning."""
    return without_reasoning(repair(text))


def candidate_key(text: str, answer: str | None) -> str:
    """What makes two texts the same candidate."""
    return answer if answer is not None else f"\0{text}"


def _usage(result: Result) -> Usage:
    generation = result.partial if isinstance(result, PartlyFailed) else result
    return generation.usage if isinstance(generation, Generation) else Usage(failed=1)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = perf_counter()
    yield
    seconds[stage] = perf_counter() - started
