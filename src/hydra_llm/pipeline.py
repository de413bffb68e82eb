"""THE MAIN PATH: history → retrieve → rerank → prompt → LLM → adapt → Answer (DESIGN 1; paper,
figure 2).

A baseline is a `Personalizer` with null parts: no records (`Nothing`), the retriever's order
(`KeepOrder`), the first candidate (`FirstCandidate`). Learning makes its candidates by `apropose`
too, so that training and serving cannot drift apart. Knows no files; which records there are is the
caller's business, which of them a query may see is `history.before`'s.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING

import anyio

from hydra_llm.config import Settings
from hydra_llm.errors import BudgetExceeded, LLMError, LLMRefused, UnknownUser, UserFault
from hydra_llm.history import before
from hydra_llm.llm.base import ChatLLM, PartlyFailed, Sampling
from hydra_llm.llm.concurrency import run_sync
from hydra_llm.prompt import Prompt, build
from hydra_llm.rerank import KeepOrder, Reranker
from hydra_llm.retrieve import Retriever
from hydra_llm.select import FirstCandidate, Selector, all_labels
from hydra_llm.tasks.base import Task
from hydra_llm.text import repair, text_fault
from hydra_llm.types import (
    Answer,
    Candidate,
    Generation,
    Message,
    Proposal,
    Query,
    Ranked,
    Record,
    Usage,
)

if TYPE_CHECKING:
    from hydra_llm.bundle import Bundle

MOST_CUTS = 3
"""How often a prompt is made shorter because the LLM finds it too long."""
CUT_MARGIN = 0.9
"""Of what should fit, as estimated tokens are not the LLM's; to the power of the number of cuts."""


@dataclass(frozen=True)
class Personalizer:
    """Answers each user as that user would want, through any black-box LLM."""

    task: Task
    llm: ChatLLM
    retriever: Retriever
    settings: Settings = field(default_factory=Settings)
    reranker: Reranker = field(default_factory=KeepOrder)
    adapter: Selector = field(default_factory=FirstCandidate)
    records: Mapping[str, Sequence[Record]] = field(default_factory=dict)
    """Each known user's records; answers for other users see none."""
    about: str = ""
    """What is known of the person, for the system message; nothing by default."""

    # ---- the pipeline

    async def apropose(self, query: Query) -> Proposal:
        """Everything up to the candidates.

        Raises:
            LLMError: the LLM gave no answer at all.
        """
        clock = _Clock()
        visible = before(self.records.get(query.user, ()), query)
        retrieved = self.retriever.retrieve(query, visible, self.settings.retrieved)
        clock.lap("retrieve")
        ranked = self.reranker.order(query, retrieved, visible)
        clock.lap("rerank")
        prompt = self.prompt(query, ranked[: self.settings.k])
        clock.lap("prompt")
        prompt, candidates, usage, notes = await self._ask(prompt)
        clock.lap("llm")
        return Proposal(
            query,
            tuple(retrieved),
            tuple(ranked),
            prompt.messages,
            candidates,
            usage,
            clock.seconds,
            (*prompt.notes, *notes),
        )

    def prompt(self, query: Query, records: Sequence[Ranked]) -> Prompt:
        """What the LLM is asked when it sees these records."""
        style = self.settings.prompt_style
        if style == "auto":
            style = self.task.strategy.prompt_style
        return build(
            self.task,
            query,
            records,
            max_tokens=self.settings.max_prompt_tokens,
            style=style,
            about=self.about,
        )

    async def aanswer(self, query: Query) -> Answer:
        """`apropose`, then the adapter's pick."""
        return self.decide(await self.apropose(query))

    def decide(self, proposal: Proposal) -> Answer:
        """The adapter's pick among a proposal's candidates; makes no LLM call."""
        clock = _Clock()
        visible = before(self.records.get(proposal.query.user, ()), proposal.query)
        candidates, chosen, abstained = self.adapter.choose(
            proposal.query, proposal.candidates, visible
        )
        clock.lap("adapt")
        pick = candidates[chosen]
        timed = replace(proposal, seconds={**proposal.seconds, **clock.seconds})
        return Answer(
            pick.answer if pick.answer is not None else pick.text,
            timed,
            tuple(candidates),
            chosen,
            abstained,
        )

    async def aask(self, prompt: Prompt) -> tuple[tuple[Candidate, ...], Usage, list[str]]:
        """The LLM's candidates for a prompt, what they cost, and a line for each call that failed
        or answer that was unreadable.

        Raises:
            LLMError: the LLM gave no answer at all.
        """
        return (await self._ask(prompt))[1:]

    async def _ask(self, prompt: Prompt) -> tuple[Prompt, tuple[Candidate, ...], Usage, list[str]]:
        """`aask`, and the prompt that was asked in the end: a shorter one, for all samples, where
        the LLM's window is smaller.
        """
        spent = Usage()
        for cut in range(1, MOST_CUTS + 2):
            results = await self._results(prompt.messages)
            fits = [
                result.fits
                for result in results
                if isinstance(result, LLMRefused) and result.fits is not None
            ]
            shorter = (
                prompt.shorter(min(fits) * CUT_MARGIN**cut) if fits and cut <= MOST_CUTS else None
            )
            if shorter is None:
                break
            prompt, spent = shorter, spent + _spent(results)
        greedy = self.settings.greedy_first or self.settings.samples == 1
        texts, certain, failures = _merge(results, greedy)
        candidates, unread = gather(self.task, texts, certain, self.settings)
        return prompt, candidates, spent + _spent(results), failures + unread

    async def _results(self, messages: Sequence[Message]) -> list[Generation | LLMError]:
        """The greedy call and the one for samples, at the same time; an error stands where its
        texts would be.
        """
        settings = self.settings
        greedy = int(settings.greedy_first or settings.samples == 1)
        wanted = [(greedy, 0.0)] if greedy else []
        if settings.samples > greedy:
            wanted.append((settings.samples - greedy, settings.temperature))
        results: list[Generation | LLMError] = [LLMError("not asked")] * len(wanted)

        async def call(slot: int, n: int, temperature: float) -> None:
            try:
                results[slot] = await self._generate(messages, n, temperature)
            except LLMError as error:
                results[slot] = error

        async with anyio.create_task_group() as group:
            for slot, (n, temperature) in enumerate(wanted):
                group.start_soon(call, slot, n, temperature)
        return results

    async def _generate(
        self, messages: Sequence[Message], n: int, temperature: float
    ) -> Generation:
        settings = self.settings
        return await self.llm.generate(
            messages,
            Sampling(
                n=n,
                temperature=temperature,
                max_tokens=settings.max_tokens,
                seed=settings.seed,
                choices=self.task.labels if settings.constrain else (),
            ),
        )

    # ---- the same from sync code, and for a plain text

    def propose(self, query: Query) -> Proposal:
        """`apropose` from sync code."""
        return run_sync(partial(self.apropose, query))

    def answer(self, query: Query | str, *, user: str | None = None) -> Answer:
        """`aanswer` from sync code; a plain text is asked for `user` as of now.

        Raises:
            UnknownUser: a plain text for a user without records.
            LLMError: the LLM gave no answer at all.
        """
        return run_sync(
            partial(self.aanswer, self.query(query, user) if isinstance(query, str) else query)
        )

    def query(self, text: str, user: str | None) -> Query:
        """A text as a query that comes after all of the user's records."""
        if user is None or user not in self.records:
            known = ", ".join(list(self.records)[:3])
            raise UnknownUser(
                f"unknown user '{user}': {len(self.records)} users are"
                f" known{f' ({known}, …)' if known else ''}"
            )
        if fault := text_fault(text):
            raise UserFault(f"the text to answer {fault}")
        return Query(user, "asked", text)

    @classmethod
    def load(cls, bundle: "Bundle | str", llm: ChatLLM | str, **settings: object) -> "Personalizer":
        """The personalizer of a learned bundle; `settings` change how it answers.

        Raises:
            BundleError: the bundle is damaged, newer, or not there.
        """
        from hydra_llm.bundle import Bundle
        from hydra_llm.llm.registry import open_llm

        loaded = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
        chosen = loaded.settings_with(**settings)
        return loaded.personalizer(open_llm(llm, chosen) if isinstance(llm, str) else llm, chosen)


def _spent(results: Sequence[Generation | LLMError]) -> Usage:
    """What calls cost, those that failed among them."""

    def cost(result: Generation | LLMError) -> Usage:
        made = result.made if isinstance(result, PartlyFailed) else result
        return made.usage if isinstance(made, Generation) else Usage(failed=1)

    return sum(map(cost, results), Usage())


def _merge(
    results: Sequence[Generation | LLMError], greedy: bool
) -> tuple[list[str], int, list[str]]:
    """Put the calls' texts together; fail only where none gave a text, or where going on makes no
    sense.
    """
    errors = [result for result in results if isinstance(result, LLMError)]
    fatal = [error for error in errors if isinstance(error, BudgetExceeded | LLMRefused)]
    if fatal or len(errors) == len(results):
        raise (fatal or errors)[0]
    texts = [
        repair(text)
        for result in results
        if isinstance(result, Generation)
        for text in result.texts
    ]
    if not texts:
        raise LLMError("the LLM gave no text")
    first = results[0]
    return (
        texts,
        len(first.texts) if greedy and isinstance(first, Generation) else 0,
        [f"a call failed: {e}" for e in errors],
    )


def gather(
    task: Task, texts: Sequence[str], greedy: int, settings: Settings
) -> tuple[tuple[Candidate, ...], list[str]]:
    """Texts of the LLM as candidates: equal answers are one with several votes, in order of
    appearance; the first `greedy` texts are the temperature-0 answer. With `candidates = labels`
    every label is a candidate, the greedy one first.

    A text that cannot be parsed stays a candidate of its own, without an answer, and is told in a
    note.
    """
    found: dict[str, Candidate] = {}
    unread = 0
    for place, text in enumerate(texts):
        answer = task.read(text, settings.parsing)
        unread += answer is None
        key = answer if answer is not None else f"\0{text}"
        old = found.get(key) or Candidate(text if task.labels else answer or text, answer)
        found[key] = replace(old, votes=old.votes + 1, greedy=old.greedy or place < greedy)
    notes = [f"{unread} of {len(texts)} answers could not be parsed"] if unread else []
    if task.labels and settings.candidates == "labels":
        labels = all_labels(
            task, [candidate for candidate in found.values() if candidate.answer is not None]
        )
        unreadable = [
            candidate for candidate in found.values() if candidate.answer is None
        ]  # else a baseline would answer the first label
        return (
            tuple(
                sorted(
                    [*labels, *unreadable],
                    key=lambda candidate: (not candidate.greedy, -candidate.votes),
                )
            ),
            notes,
        )
    return tuple(found.values()), notes


class _Clock:
    """Seconds per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = perf_counter()

    def lap(self, stage: str) -> None:
        now = perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


__all__ = ["Personalizer", "gather"]
