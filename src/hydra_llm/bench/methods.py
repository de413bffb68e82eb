"""Methods to compare: each is a name with parameters and a `Personalizer` with other parts (STYLE:
a baseline is a null part).

Knows neither data sets nor metrics. Sources: HYDRA, sections 4.1 and 4.2; LaMP; DESIGN 5.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Protocol, runtime_checkable

import anyio

from hydra_llm.bench.baselines import ByVoteShare, NthSample, Oracle, ScorerOnly, WithoutLLM
from hydra_llm.bench.bbox import bbox_adapter
from hydra_llm.bundle import Bundle
from hydra_llm.config import Settings
from hydra_llm.errors import SettingsError
from hydra_llm.llm.base import ChatLLM, Sampling
from hydra_llm.pipeline import Personalizer
from hydra_llm.retrieve import Nothing, make_retriever
from hydra_llm.select import Selector
from hydra_llm.tasks.base import KINDS
from hydra_llm.types import Answer, Message, Query, Record, StageCost, Usage


class Answerer(Protocol):
    """What a method is when it runs."""

    async def aanswer(self, query: Query) -> Answer:
        """The method's answer. Raises LLMError where the LLM gave none."""
        ...


@runtime_checkable
class Learner(Protocol):
    """An answerer that learns as it answers."""

    def taken(self) -> dict[str, StageCost]:
        """What it spent on that since this was last asked, by number of records and user; for all
        of them under an empty name.
        """
        ...


@dataclass(frozen=True)
class Parts:
    """What methods are built from."""

    bundle: Bundle
    llm: ChatLLM
    settings: Settings
    records: Mapping[str, Sequence[Record]]
    seed: int = 0
    """Of the learned parts; of a method whose samples take turns, whose turn it is."""

    def personalizer(
        self, *, rerank: bool = False, adapt: bool = False, **settings: object
    ) -> Personalizer:
        """The main path with the chosen parts; the others are null parts. Records are those of the
        run's users.
        """
        chosen = self.settings.model_copy(update=settings)
        return replace(
            self.bundle.personalizer(self.llm, chosen, rerank=rerank, adapt=adapt),
            records=self.records,
        )


@dataclass(frozen=True)
class Method:
    """A line of the table."""

    name: str
    """`NAME`, or with its parameters `NAME@k`, `NAME@b`, `NAME@k,b`; without them the settings' k
    and samples hold.
    """
    what: str
    """One line for people."""
    group: str
    """prompt, hydra, adapter, sampling, control or bound."""
    build: Callable[[Parts], Answerer]
    takes: tuple[str, ...] = ()
    """Which parameters the name may carry: k records, b candidates."""
    source: str = ""
    labels_only: bool = False
    """Whether it can answer tasks with a closed set of labels only."""
    needs: tuple[str, ...] = ("reranker", "adapter")
    """What must have been learned. Seeds share the reranker, and with it the candidates: answers
    that need the adapter differ by seed.
    """
    shows: tuple[str, ...] = ()
    """Parts without which it would be another method under this name, and is left out. `hydra` is
    what is left of it, as in use.
    """
    in_turn: bool = False
    """Whether each of the b samples answers once, as if it were a seed: the mean over them is an
    expectation.
    """
    given: Mapping[str, int] = field(default_factory=dict)
    """Its parameters, where the name has some."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of task that it can answer."""
        names = KINDS.names()
        return tuple(name for name in names if not self.labels_only or KINDS.load(name).closed)

    def of(self, seeds: Sequence[Parts]) -> Sequence[Parts]:
        """What it is built from, once for each answer that it gives to a query: `seeds` are those
        of the learned parts.
        """
        if self.in_turn:
            return [
                replace(seeds[0], seed=place)
                for place in range(self.given.get("b", seeds[0].settings.samples))
            ]
        return seeds if "adapter" in self.needs else seeds[:1]

    def at(self, given: Mapping[str, int]) -> "Method":
        """The method with parameters in place of the settings' own."""
        build, numbers = self.build, ",".join(str(number) for number in given.values())
        chosen = {PARAMETERS[name]: number for name, number in given.items()}

        def bound(parts: Parts) -> Answerer:
            enough = {"retrieved": max(parts.settings.retrieved, given.get("k", 0))}
            return build(replace(parts, settings=parts.settings.model_copy(update=chosen | enough)))

        return replace(self, name=f"{self.name}@{numbers}", build=bound, given=dict(given))


PARAMETERS = {"k": "k", "b": "samples"}
"""Parameter of a method → the setting that it stands for."""
ONE: Mapping[str, Any] = {"samples": 1, "greedy_first": True}
"""The LLM's greedy answer alone."""


# ---- prompts without learning


def _zero_shot(parts: Parts) -> Answerer:
    return replace(parts.personalizer(**ONE, k=0), retriever=Nothing())


def _rag(parts: Parts) -> Answerer:
    return parts.personalizer(**ONE)


def _retrieving(name: str) -> Callable[[Parts], Answerer]:
    """As `rag`, with another retriever."""

    def build(parts: Parts) -> Answerer:
        retriever = make_retriever(name, embed=parts.bundle.store.texts, seed=parts.settings.seed)
        return replace(parts.personalizer(**ONE), retriever=retriever)

    return build


PROFILE_RECORDS, PROFILE_TOKENS = 20, 96
"""Latest records that a profile is written from, and its longest text."""
PROFILE = (
    "Below are earlier texts of one person, each with what this person answered.\n\n{records}\n\n"
    "In at most three sentences, say what is characteristic of this person's answers."
)


@dataclass(frozen=True)
class Profiled:
    """A profile that the LLM writes from the history stands before the records: once per user, as
    long as the history is the same.
    """

    inner: Personalizer
    profiles: dict[tuple[str, int], str] = field(default_factory=dict)
    locks: dict[tuple[str, int], anyio.Lock] = field(default_factory=dict)

    async def aanswer(self, query: Query) -> Answer:
        context = self.inner.context_of(query)
        visible = context.visible
        if not visible:
            return await self.inner.aanswer(context)
        key, usage = (query.user, len(visible)), Usage()
        async with self.locks.setdefault(key, anyio.Lock()):
            if key not in self.profiles:
                made = await self.inner.llm.generate(
                    self._question(visible), Sampling(max_tokens=PROFILE_TOKENS)
                )
                self.profiles[key], usage = made.texts[0].strip(), made.usage
        answer = await replace(self.inner, profile=self.profiles[key]).aanswer(context)
        return replace(
            answer, proposal=replace(answer.proposal, usage=answer.proposal.usage + usage)
        )

    def _question(self, visible: Sequence[Record]) -> list[Message]:
        """The latest records, each cut to its share of the prompt."""
        latest = list(visible)[-PROFILE_RECORDS:]
        room = int(self.inner.settings.max_prompt_tokens * 3 / len(latest)) // 2
        lines = [
            f"{' '.join(record.input.split())[:room]} → {' '.join(record.output.split())[:room]}"
            for record in latest
        ]
        return [{"role": "user", "content": PROFILE.replace("{records}", "\n".join(lines))}]


def _profiled(parts: Parts) -> Answerer:
    return Profiled(parts.personalizer(**ONE))


# ---- hydra


def _as_learned(parts: Parts) -> Parts:
    """The paper's methods show the reranker as it is, also where `hydra` would keep the retriever's
    order.
    """
    return replace(parts, settings=parts.settings.model_copy(update={"rerank": "always"}))


def _reranker(parts: Parts) -> Answerer:
    return _as_learned(parts).personalizer(rerank=True, **ONE)


def _adapter(parts: Parts) -> Answerer:
    return replace(parts.personalizer(adapt=True, k=0), retriever=Nothing())


def _published(parts: Parts) -> Answerer:
    sampled = {"candidates": "sampled", "select": "best", "temperature": 1.0, "greedy_first": False}
    return _as_learned(parts).personalizer(rerank=True, adapt=True, **sampled)


def _hydra(parts: Parts) -> Answerer:
    return parts.personalizer(rerank=True, adapt=True)


def _shared(parts: Parts) -> Answerer:
    return _hydra(replace(parts, bundle=parts.bundle.without_heads()))


# ---- choosing without learning, and bounds: the candidates are those of `hydra`


def _choosing(adapter: Callable[[Parts], Selector]) -> Callable[[Parts], Answerer]:
    return lambda parts: replace(parts.personalizer(rerank=True), selector=adapter(parts))


# ---- controls without any LLM


def _user_majority(parts: Parts) -> Answerer:
    return WithoutLLM(
        parts.personalizer(),
        lambda query, visible: parts.bundle.task.strategy.typical(
            [record.output for record in visible]
        ),
    )


def _copy_nearest(parts: Parts) -> Answerer:
    nearest = make_retriever("dense", embed=parts.bundle.store.texts)

    def copied(query: Query, visible: Sequence[Record]) -> str:
        found = nearest.retrieve(query, visible, 1)
        return found[0].record.output if found else parts.bundle.task.strategy.typical([])

    return WithoutLLM(parts.personalizer(), copied)


def _scorer_only(parts: Parts) -> Answerer:
    return ScorerOnly(parts.personalizer(adapt=True))


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(
            "zero-shot",
            "the LLM without any record",
            "prompt",
            _zero_shot,
            source="HYDRA 4.1",
            needs=(),
        ),
        Method(
            "icl-random",
            "k records by lot in the prompt",
            "prompt",
            _retrieving("random"),
            ("k",),
            "HYDRA 4.1",
            needs=(),
        ),
        Method(
            "recent",
            "the k latest records in the prompt",
            "prompt",
            _retrieving("recent"),
            ("k",),
            "LaMP",
            needs=(),
        ),
        Method(
            "rag",
            "the retriever's first k records in the prompt",
            "prompt",
            _rag,
            ("k",),
            "LaMP; HYDRA 4.1",
            needs=(),
        ),
        Method(
            "rag-dense",
            "the k nearest records by the encoder",
            "prompt",
            _retrieving("dense"),
            ("k",),
            "LaMP",
            needs=(),
        ),
        Method(
            "pag",
            "a profile written by the LLM, and k records",
            "prompt",
            _profiled,
            ("k",),
            "Richardson et al. 2023; HYDRA 4.1",
            needs=(),
        ),
        Method(
            "hydra-reranker",
            "reranked records, first answer",
            "hydra",
            _reranker,
            ("k",),
            "HYDRA 4.2",
            needs=("reranker",),
            shows=("reranker",),
        ),
        Method(
            "hydra-adapter",
            "answers without records, the adapter picks",
            "hydra",
            _adapter,
            ("b",),
            "HYDRA 4.2",
            needs=("adapter",),
            shows=("adapter",),
        ),
        Method(
            "hydra-published",
            "reranker and adapter: sampled candidates at temperature 1, best score",
            "hydra",
            _published,
            ("k", "b"),
            "HYDRA 4.2",
            shows=("reranker", "adapter"),
        ),
        Method(
            "hydra",
            "reranker and adapter with this project's choosing",
            "hydra",
            _hydra,
            ("k", "b"),
            "HYDRA 4.2; DESIGN 5",
        ),
        Method(
            "hydra-shared",
            "hydra with the shared heads for everybody",
            "control",
            _shared,
            ("k", "b"),
            "DESIGN 4",
        ),
        Method(
            "bbox-adapter",
            "one energy for all users, adapted to each in online rounds, picks",
            "adapter",
            bbox_adapter,
            ("b",),
            "Sun et al. 2024; HYDRA 4.1",
        ),
        Method(
            "self-consistency",
            "the answer with most votes among hydra's samples",
            "sampling",
            _choosing(lambda parts: ByVoteShare(parts.bundle.task, "best")),
            ("b",),
            "Wang et al. 2023",
            needs=("reranker",),
        ),
        Method(
            "mbr",
            "the sample that is closest to the others",
            "sampling",
            _choosing(lambda parts: ByVoteShare(parts.bundle.task, "expected-gain")),
            ("b",),
            "Kumar and Byrne 2004",
            needs=("reranker",),
        ),
        Method(
            "random",
            "one of hydra's samples by lot: the mean over all of them",
            "bound",
            _choosing(lambda parts: NthSample(parts.seed)),
            ("b",),
            needs=("reranker",),
            in_turn=True,
        ),
        Method(
            "oracle",
            "the best of hydra's samples",
            "bound",
            _choosing(lambda parts: Oracle(parts.bundle.task)),
            ("b",),
            needs=("reranker",),
        ),
        Method(
            "user-majority",
            "the user's own median or majority, no LLM",
            "control",
            _user_majority,
            needs=(),
        ),
        Method(
            "copy-nearest",
            "the answer of the user's most similar record, no LLM",
            "control",
            _copy_nearest,
            needs=(),
        ),
        Method(
            "scorer-only",
            "all labels by the adapter, no LLM",
            "control",
            _scorer_only,
            labels_only=True,
            needs=("adapter",),
            shows=("adapter",),
        ),
    )
}
DEMO = (
    "zero-shot",
    "rag",
    "hydra-reranker",
    "hydra-adapter",
    "hydra-published",
    "hydra",
    "random",
    "user-majority",
)
"""The methods of the demo's table."""


RECORDS, BUDGET = (1, 2, 4), (8,)
"""k and b of `all`: a method that takes k stands in the table once for each."""


def find_methods(
    names: Sequence[str],
    kind: str | None = None,
    *,
    records: Sequence[int] = RECORDS,
    budget: Sequence[int] = BUDGET,
) -> list[Method]:
    """The methods of these names, with their parameters; `all` is every one that can answer tasks
    of the kind, at each k and b.

    Raises:
        SettingsError: no name, an unknown one, a parameter that it does not take, or a kind that it
            cannot answer.
    """
    if not names:
        raise SettingsError(f"no method is named: take some of {', '.join(METHODS)}, or all")
    found = []
    for name in names:
        if name == "all":
            found += [
                each
                for method in METHODS.values()
                if kind is None or kind in method.kinds
                for each in _at_each(method, records, budget)
            ]
        else:
            found.append(_find(name))
    for method in found:
        if kind is not None and kind not in method.kinds:
            raise SettingsError(
                f"method '{method.name}' answers {' and '.join(method.kinds)} tasks only, this one"
                f" is {kind}"
            )
    return list({method.name: method for method in found}.values())


def _at_each(method: Method, records: Sequence[int], budget: Sequence[int]) -> list[Method]:
    values = [{"k": records, "b": budget}[name] for name in method.takes]
    return [
        method.at(dict(zip(method.takes, chosen, strict=True))) if chosen else method
        for chosen in product(*values)
    ]


def _find(name: str) -> Method:
    plain, at, numbers = name.partition("@")
    if plain not in METHODS:
        raise SettingsError(f"unknown method '{name}': take some of {', '.join(METHODS)}, or all")
    method = METHODS[plain]
    if not at:
        return method
    values = numbers.split(",")
    if len(values) != len(method.takes) or not all(
        value.isdecimal() and int(value) > 0 for value in values
    ):
        form = (
            f"{plain}@{','.join(method.takes)}" if method.takes else f"{plain}, without parameters"
        )
        raise SettingsError(f"method '{name}': write it as {form}, with whole numbers from 1")
    return method.at(dict(zip(method.takes, map(int, values), strict=True)))


def split_names(text: str) -> list[str]:
    """`rag@1,hydra@4,8,mbr` → rag@1, hydra@4,8, mbr: a number after a comma belongs to the name
    before it.
    """
    names: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if names and "@" in names[-1] and part.isdecimal():
            names[-1] += f",{part}"
        else:
            names.append(part)
    return names
