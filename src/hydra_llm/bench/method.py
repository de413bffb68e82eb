"""What a benchmarked method is, and how a name such as `hydra@4,8` is found.

A method is the pipeline with other parts. Built-in methods are in `methods.py`; a package adds its
own as a `Method` in the entry-point group `hydra_llm.methods`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from hydra_llm.bundle import Bundle
from hydra_llm.config import Settings
from hydra_llm.errors import LLMError, SettingsError
from hydra_llm.llm.base import ChatLLM
from hydra_llm.pipeline import Records, UserPipeline
from hydra_llm.plugins import Registry
from hydra_llm.select import needs_votes_only
from hydra_llm.tasks.base import KINDS, Task
from hydra_llm.training.labelling import Asked
from hydra_llm.types import Answer, Query, Record, StageCost


class NotAsked(LLMError):
    """A method cannot answer a query, and asked no LLM: this says nothing of an endpoint."""

    lasting = True


class Answerer(Protocol):
    """A method when it runs."""

    async def aanswer(self, query: Query) -> Answer:
        """Raises LLMError if the LLM gave no answer, NotAsked if it was not asked for one."""
        ...


@runtime_checkable
class Learner(Protocol):
    """An answerer that learns while it answers."""

    def pop_spent(self) -> dict[str, StageCost]:
        """Costs since the last call by `records:user` (`8:ada`); an empty key is for all users."""
        ...


@dataclass(frozen=True)
class Parts:
    """What methods are built from."""

    bundle: Bundle
    llm: ChatLLM
    settings: Settings
    records: Mapping[str, Sequence[Record]]
    seed: int = 0  # of the learned parts; the index for a method that answers once per sample
    fold: int | None = None  # which users are new, in a run with folds
    training: Records = field(default_factory=dict)  # training users' records and known queries
    partners: Mapping[str, str] = field(default_factory=dict)  # user → another evaluated one
    asked: Asked | None = None  # what the LLM labels of training users, in a run with folds

    def personalizer(
        self, *, rerank: bool = False, adapt: bool = False, **settings: object
    ) -> UserPipeline:
        """The pipeline with the chosen parts and the run's records; other parts are null parts."""
        chosen = self.settings.model_copy(update=settings)
        pipeline = self.bundle.personalizer(self.llm, chosen, rerank=rerank, adapt=adapt)
        return replace(pipeline, records=self.records)

    def with_settings(self, **settings: object) -> "Parts":
        """The same parts with other settings."""
        return replace(self, settings=self.settings.model_copy(update=settings))


def partners(users: Sequence[str], having: Callable[[str], bool], seed: int) -> dict[str, str]:
    """Each user's next one in a shuffled circle of those who have records; of a circle of one user
    that one has none.
    """
    order = [user for user in users if having(user)]
    order = [order[i] for i in np.random.default_rng(seed).permutation(len(order))]
    next_one = dict(zip(order, order[1:] + order[:1], strict=True))
    given = {user: next_one.get(user, order[0]) for user in users} if order else {}
    return {user: other for user, other in given.items() if user != other}


Build = Callable[[Parts], Answerer]
PARAMETERS = {"k": "k", "b": "samples"}  # parameter of a method → the setting it overrides


@dataclass(frozen=True)
class Method:
    """One method of the benchmark."""

    name: str  # `NAME`, or with parameters in place of the settings' values, as `NAME@k,b`
    what: str  # one line for people
    group: str  # prompt, hydra, adapter, sampling, control or bound: its part of the table
    build: Build
    takes: tuple[str, ...] = ()  # parameters that the name may carry: k records, b candidates
    source: str = ""
    labels_only: bool = False  # it can answer tasks with a closed set of labels only
    texts_only: bool = False  # it can answer tasks of free texts only
    uses: tuple[str, ...] = ("reranker", "adapter")  # learned parts; with the adapter seeds count
    requires: tuple[str, ...] = ()  # learned parts without which it is left out of the run
    picks: Build | None = None  # in place of `build` for recorded choices, which ask no LLM
    only_choices: bool = False  # it answers recorded choices only, by `build`
    asks: Literal["always", "votes", "never"] = "always"  # an LLM; for an adapter's votes
    per_sample: bool = False  # it answers once per sample, with the sample's index as the seed
    private: bool = True  # False: without records in prompts it is another method, or none
    given: Mapping[str, int] = field(default_factory=dict)  # its parameters, if the name has any

    def answers(self, kind: str | None) -> bool:
        """Whether it can answer tasks of the kind; None is any kind."""
        if kind is None or not (self.labels_only or self.texts_only):
            return True
        return self.labels_only == KINDS.load(kind).closed

    def asks_llm(self, task: Task, settings: Settings, bundle: Bundle | None = None) -> bool:
        """Whether it asks an LLM; without a bundle one is learned that hears no LLM."""
        if self.asks != "votes":
            return self.asks == "always"
        if settings.ask == "always" or settings.gate == "always":
            return True  # what the gate refuses is asked without records
        adapter = None if bundle is None else bundle.adapter
        hears = bundle is not None and (adapter is None or adapter.hears_llm)
        return (hears and settings.vote_share) or not needs_votes_only(task, settings)

    def on_choices(self) -> "Method | None":
        """The method as it answers recorded choices; None if it cannot."""
        if self.only_choices:
            return self
        if self.picks is None:
            return None
        uses = tuple(part for part in self.uses if part == "adapter")
        plain = replace(self, build=self.picks, uses=uses, requires=uses)
        return replace(plain, takes=(), per_sample=False, asks="never")

    def instances(self, seeds: Sequence[Parts]) -> Sequence[Parts]:
        """The parts for each answer that it gives to a query; `seeds` has one entry per seed."""
        if self.per_sample:
            count = self.given.get("b", seeds[0].settings.samples)
            return [replace(seeds[0], seed=index) for index in range(count)]
        return seeds if "adapter" in self.uses else seeds[:1]

    def with_parameters(self, values: Sequence[int]) -> "Method":
        """The method with these values of `takes` in place of the settings' own."""
        if not values:
            return self
        given = dict(zip(self.takes, values, strict=True))
        chosen = {PARAMETERS[name]: value for name, value in given.items()}

        def build(parts: Parts) -> Answerer:
            retrieved = max(parts.settings.retrieved, given.get("k", 0))
            return self.build(parts.with_settings(retrieved=retrieved, **chosen))

        name = f"{self.name}@{','.join(map(str, values))}"
        return replace(self, name=name, build=build, given=given)


def method(group: str, **fields: Any) -> Callable[[Build], Method]:
    """Make a `Method` with a function's name and docstring; `fields` are the `Method`'s."""

    def make(build: Build) -> Method:
        name, what = build.__name__.replace("_", "-"), (build.__doc__ or "").strip().rstrip(".")
        return Method(name, what, group, build, **fields)

    return make


METHODS_OF = (
    *("zero-shot", "icl-random", "recent", "rag", "rag-dense", "pag"),
    *("hydra-reranker", "hydra-adapter", "hydra-published", "hydra", "hydra-shared"),
    *("bbox-adapter", "self-consistency", "mbr", "random", "oracle"),
    *("user-majority", "copy-nearest", "scorer-only", "expected-rouge"),
)
CONTROLS = ("mismatched", "scorer-mismatched", "user-offset", "item-offset")
OF_CHOICES = ("shuffled-heads", "no-history", "first", "longest")
BUILTIN = (*METHODS_OF, *OF_CHOICES, *CONTROLS)
"""In the order of the table."""
METHODS: Registry[Method] = Registry(
    "hydra_llm.methods",
    {
        name: f"hydra_llm.bench.{module}:{name.replace('-', '_')}"
        for module, names in (
            ("methods", METHODS_OF),
            ("choices", OF_CHOICES),
            ("controls", CONTROLS),
        )
        for name in names
    },
)
LEARNED = ("hydra-reranker", "hydra-adapter", "hydra-published", "hydra")
DEMO = ("zero-shot", "rag", *LEARNED, "random", "user-majority")
RECORDS, BUDGET = (1, 2, 4), (8,)  # values of k and b for `all`, which takes a method for each


def base_name(name: str) -> str:
    """`hydra@4,8` → hydra."""
    return name.partition("@")[0]


def load_method(name: str) -> Method:
    """The method registered under a name without parameters; SettingsError if it is no `Method`."""
    loaded = METHODS.load(name)
    if not isinstance(loaded, Method):
        raise SettingsError(f"method '{name}' is a {type(loaded).__name__}, not a bench Method")
    return replace(loaded, name=name)


def installed(name: str) -> Method | None:
    """The method of a name with or without parameters; None if it is not installed."""
    plain = base_name(name)
    return load_method(plain) if plain in BUILTIN or plain in METHODS.names() else None


def per_sample(name: str) -> bool:
    """Whether the method answers once per sample, so that its seeds are indices of samples."""
    method = installed(name)
    return method is not None and method.per_sample


def find_methods(
    names: Sequence[str],
    kind: str | None = None,
    *,
    records: Sequence[int] = RECORDS,
    budget: Sequence[int] = BUDGET,
    choices: bool | None = None,
) -> list[Method]:
    """The methods of these names; `all` is every method that can answer tasks of the kind, at each
    k of `records` and b of `budget`; with `choices`, recorded choices; None: either. SettingsError:
    no name, an unknown one, a wrong parameter, or a kind that it cannot answer.
    """
    known = ", ".join(METHODS.names())
    if not names:
        raise SettingsError(f"no method is named: take some of {known}, or all")
    values, methods = {"k": records, "b": budget}, list[Method]()
    for name in names:
        if name != "all":
            methods.append(_find(name, known))
            continue
        for method in map(load_method, METHODS.names()):
            if choices:
                methods += filter(None, [method.on_choices()])
            elif method.answers(kind) and not method.only_choices:
                grid = product(*(values[parameter] for parameter in method.takes))
                methods += [method.with_parameters(point) for point in grid]
    if choices:
        methods = [_on_choices(method) for method in methods]
    for method in methods:
        if choices is False and method.only_choices:
            fault = "answers recorded choices only, and this data set has none to ask"
            raise SettingsError(f"method '{method.name}' {fault}")
        if not choices and not method.answers(kind):
            able = " and ".join(name for name in KINDS.names() if method.answers(name))
            fault = f"answers {able} tasks only, this one is {kind}"
            raise SettingsError(f"method '{method.name}' {fault}")
    return list({method.name: method for method in methods}.values())


def check_methods(
    methods: Sequence[Method],
    task: Task,
    settings: Settings,
    bundle: Bundle | None = None,
    *,
    without_llm: bool,
) -> None:
    """SettingsError: one of the methods asks an LLM where there is none, or shows it records in
    private mode.
    """
    if showing := [method.name for method in methods if settings.private and not method.private]:
        fault = "shows the LLM records, which the setting 'private' forbids"
        raise SettingsError(f"method '{showing[0]}' {fault}: leave out {', '.join(showing)}")
    asking = [method for method in methods if method.asks_llm(task, settings, bundle)]
    if asking and without_llm:
        every = (m for m in map(load_method, METHODS.names()) if not m.only_choices)
        others = (method for method in every if method.answers(task.kind))
        able = [m.name for m in others if not m.asks_llm(task, settings, bundle)]
        fix = f"give one of --llm SPEC and --replay FILE, or take only {', '.join(able)}"
        raise SettingsError(f"method '{asking[0].name}' asks an LLM: {fix}")


def _on_choices(method: Method) -> Method:
    able = method.on_choices()
    if able is None:
        names = [name for name in METHODS.names() if load_method(name).on_choices()]
        fault = "cannot answer recorded choices: take some of"
        raise SettingsError(f"method '{method.name}' {fault} {', '.join(names)}, all")
    return able


def _find(name: str, known: str) -> Method:
    plain, at, numbers = name.partition("@")
    if plain not in METHODS.names():
        raise SettingsError(METHODS.unknown(name, f"take some of {known}, all"))
    base, values = load_method(plain), numbers.split(",") if at else []
    whole = all(value.isdecimal() and int(value) > 0 for value in values)
    if at and (len(values) != len(base.takes) or not whole):
        form = f"{plain}@{','.join(base.takes)}" if base.takes else f"{plain}, without parameters"
        raise SettingsError(f"method '{name}': write it as {form}, with whole numbers from 1")
    return base.with_parameters([int(value) for value in values])


def split_names(text: str) -> list[str]:
    """`rag@1,hydra@4,8,mbr` → rag@1, hydra@4,8, mbr."""
    names: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if names and "@" in names[-1] and part.isdecimal():
            names[-1] += f",{part}"  # a number after a comma belongs to the name before it
        else:
            names.append(part)
    return names
