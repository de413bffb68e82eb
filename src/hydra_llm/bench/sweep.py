"""A study: the same methods on the same queries while one thing varies, from a settings file
(`benchmarks/sweeps/`).

    name, question, x, methods, log    what it asks, the axis, who answers, whether the axis is
    logarithmic
    [settings]                         common to all points
    [run]                              users, limit, seeds, k and b, as `bench run` takes them
    [[points]]                         x; and what is special: settings, series, methods, llm,
                                       history, fit
    vary = {NAME = [...], ...}         a grid of points: the first name is x, the others name the
    series

Each point is an `Experiment` in a folder of its own, so that a stopped study goes on; what points
ask alike is asked once. Knows no terminal and no LLM.
"""

import hashlib
import json
import re
import shutil
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from hydra_llm.bench.experiment import Experiment, Say, learned_bundles, run_experiment
from hydra_llm.bench.methods import BUDGET, RECORDS, find_methods
from hydra_llm.bench.report.tables import Against, compare
from hydra_llm.bench.runlog import Sample
from hydra_llm.bench.runner import Row, tabulate
from hydra_llm.config import Settings, checked
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.errors import HydraError, SettingsError
from hydra_llm.history import precedes
from hydra_llm.llm.cache import CachedLLM
from hydra_llm.llm.concurrency import StageProgress
from hydra_llm.llm.meter import Prices
from hydra_llm.tasks.base import Task

# ---- the file


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class StudyPoint(_Part):
    """One value of what varies."""

    x: int | float | str
    series: str = ""
    """Points of a series are one line of the plot."""
    settings: dict[str, Any] = {}
    """Above the common ones, and above `--set`."""
    methods: tuple[str, ...] = ()
    """In place of the study's."""
    llm: str | None = None
    """In place of `--llm`."""
    history: NonNegativeInt | Literal["all"] = "all"
    """How many records each new user has: the latest that all of the user's queries may see."""
    fit: bool = True
    """Without it new users have no heads: the shared ones answer them."""

    @property
    def slug(self) -> str:
        """The name of its folder."""
        return re.sub(r"[^a-z0-9.]+", "-", f"{self.x} {self.series}".lower()).strip("-.") or "point"


class RunPart(_Part):
    """As `bench run` takes them."""

    users: PositiveInt | None = None
    """At most so many new users."""
    limit: PositiveInt | None = None
    """Each one's first queries."""
    seeds: tuple[NonNegativeInt, ...] = ()
    """Of the learned parts."""
    k: tuple[PositiveInt, ...] = RECORDS
    """Records in the prompt, for each of which `all` takes a method."""
    b: tuple[PositiveInt, ...] = BUDGET
    """Candidates, likewise."""


class Study(_Part):
    """A study file; after `open_study` all of its points stand in `points`."""

    name: str
    question: str
    """One line."""
    x: str
    """What varies, as the title of an axis."""
    methods: tuple[str, ...] = Field(min_length=1)
    settings: dict[str, Any] = {}
    run: RunPart = RunPart()
    points: tuple[StudyPoint, ...] = ()
    vary: dict[str, tuple[Any, ...]] = {}
    log: bool = False
    """The axis is logarithmic."""


def open_study(file: Path) -> Study:
    """Read a study file.

    Raises:
        SettingsError: not there, not TOML, an unknown key, setting or method, or points that cannot
            be told apart.
    """
    try:
        study = Study.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
        study = study.model_copy(update={"points": (*study.points, *_grid(study.vary))})
    except OSError as error:
        raise SettingsError(
            f"{file}: no such study file ({error.strerror}): see benchmarks/sweeps"
        ) from None
    except ValidationError as error:
        raise SettingsError(f"{file}: {_told(error)}") from None
    except ValueError as error:
        raise SettingsError(f"{file}: not TOML: {error}") from None
    try:
        _check(study)
    except SettingsError as error:
        raise SettingsError(f"{file}: {error}") from None
    return study


def _grid(vary: Mapping[str, Sequence[Any]]) -> list[StudyPoint]:
    """A point for each combination of values; a name is a setting or a key of a point."""
    points = []
    for values in product(*vary.values()) if vary else ():
        first, *others = (_written(value) for value in values)
        given = dict(zip(vary, values, strict=True))
        own = {name: value for name, value in given.items() if name in ("llm", "history", "fit")}
        settings = {name: value for name, value in given.items() if name not in own}
        series = ", ".join(
            f"{name}={other}" for name, other in zip(list(vary)[1:], others, strict=True)
        )
        points.append(
            StudyPoint.model_validate({"x": first, "series": series, "settings": settings, **own})
        )
    return points


def _written(value: Any) -> float | str:
    """A value as TOML writes it; a number stays one."""
    return (
        str(value).lower()
        if isinstance(value, bool)
        else value
        if isinstance(value, int | float)
        else str(value)
    )


def _told(error: ValidationError) -> str:
    """The first fault: the key, counted from 1 as a reader does, and what is wrong."""
    first = error.errors()[0]
    parts = [str(part + 1) if isinstance(part, int) else part for part in first["loc"]]
    place = ".".join(
        part for part in parts if re.fullmatch(r"\w+", part) and part not in ("int", "float", "str")
    )  # no names of types
    return (
        f"{place}: unknown key"
        if first["type"] == "extra_forbidden"
        else f"{place}: {first['msg']}"
    )


def _check(study: Study) -> None:
    if not study.points:
        raise SettingsError("has no points: write [[points]], or vary = {SETTING = [...]}")
    _check_settings("settings", study.settings)
    find_methods(study.methods)
    slugs: dict[str, int] = {}
    for number, point in enumerate(study.points, 1):
        _check_settings(f"points.{number}", {**study.settings, **point.settings})
        find_methods(point.methods or study.methods)
        if slugs.setdefault(point.slug, number) != number:
            raise SettingsError(
                f"points.{number}: is called '{point.slug}' as points.{slugs[point.slug]} is: give"
                " it another x or series"
            )


def _check_settings(place: str, values: Mapping[str, Any]) -> None:
    try:
        checked(values)
    except SettingsError as error:
        raise SettingsError(f"{place}: {error}") from None


# ---- the run


@dataclass(frozen=True)
class Bench:
    """What a study is run on."""

    data: DataSet
    out: Path
    settings: Callable[[Mapping[str, Any]], Settings]
    """All settings of a point, by its own ones."""
    opened: Callable[[str | None], AbstractContextManager[CachedLLM]]
    """Opens an LLM; None is the command's."""
    users: int | None = None
    """In place of the study's."""
    limit: int | None = None
    """In place of the study's."""


@dataclass(frozen=True)
class Line:
    """A method at a point."""

    point: StudyPoint
    row: Row
    against: Against | None
    """This point minus the first one, by the same method on the same queries; None for the first
    itself.
    """


@dataclass(frozen=True)
class Findings:
    """What came of it."""

    study: Study
    task: Task
    lines: tuple[Line, ...]
    failed: Mapping[str, str]
    """Slug of a point → why there is nothing."""

    @property
    def metric(self) -> str:
        """The task's first."""
        return next(iter(self.task.metric_specs))


def run_study(study: Study, bench: Bench, progress: StageProgress, say: Say) -> Findings:
    """Run every point; one that fails is told, and the others go on. Writes `study.json`.

    Raises:
        HydraError: every point failed (the first one's error).
    """
    answered: dict[str, list[Sample]] = {}
    faults: dict[str, HydraError] = {}
    prices = bench.settings({})
    with ExitStack() as stack:
        llms: dict[str | None, CachedLLM] = {}
        for number, point in enumerate(study.points, 1):
            say(f"point {number} of {len(study.points)}: {point.slug}")
            try:
                if point.llm not in llms:
                    llms[point.llm] = stack.enter_context(bench.opened(point.llm))
                answered[point.slug] = _run_point(
                    study, point, bench, llms[point.llm], progress, say
                )
            except HydraError as error:
                faults[point.slug] = error
                say(f"point {point.slug} failed: {error}; the same command tries it again")
    if not answered:
        raise next(iter(faults.values()))
    lines = lines_of(
        study, bench.data.task, answered, Prices(prices.price_prompt, prices.price_completion)
    )
    return Findings(
        study, bench.data.task, tuple(lines), {slug: str(error) for slug, error in faults.items()}
    )


def _run_point(
    study: Study, point: StudyPoint, bench: Bench, llm: CachedLLM, progress: StageProgress, say: Say
) -> list[Sample]:
    run, data = study.run, with_history(bench.data, point.history)
    experiment = Experiment(
        data,
        llm,
        bench.settings(point.settings),
        find_methods(point.methods or study.methods, data.task.kind, records=run.k, budget=run.b),
        bench.out / point.slug,
        bench.users or run.users,
        bench.limit or run.limit,
        run.seeds,
        point.fit,
    )
    if sum((each.llm, each.settings) == (point.llm, point.settings) for each in study.points) > 1:
        _copy_base(replace(experiment, data=bench.data), bench.out / "bases", progress, say)
    outcome = run_experiment(experiment, progress, say)
    outcome.log.finish(
        [row.to_json() for row in tabulate(data.task, outcome.samples)], outcome.learning
    )
    return outcome.samples


def _copy_base(experiment: Experiment, bases: Path, progress: StageProgress, say: Say) -> None:
    """Points that differ in their new users alone learn from the same training users: once, and
    each has a copy to fit its heads in.
    """
    settings = experiment.settings.stored()
    told = [experiment.data.digest, dict(experiment.llm.identity), settings, experiment.seeds]
    base = bases / hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]
    learned_bundles(replace(experiment, out=base, users=0), progress, say)
    for bundle in base.glob("bundle*"):
        own, part = experiment.out / bundle.name, experiment.out / f"{bundle.name}.part"
        if not own.exists():
            shutil.copytree(bundle, part, dirs_exist_ok=True)
            part.replace(own)  # a kill leaves no half bundle


def with_history(data: DataSet, count: int | Literal["all"]) -> DataSet:
    """The data set in which each new user has just come, with `count` records: the latest that all
    of the user's queries may see.
    """
    if count == "all":
        return data
    new = set(data.users("test"))
    records = {user: data.history(user) for user in data.users()}
    queries = {user: data.queries(user) for user in data.users()}
    for user in new:
        early = [
            record
            for record in records[user]
            if all(precedes(record, query) for query in queries[user])
        ]
        records[user] = early[max(0, len(early) - count) :]
    return DataSet(data.task, data.splits, records, queries, data.notes)


# ---- what it shows


def lines_of(
    study: Study, task: Task, answered: Mapping[str, Sequence[Sample]], prices: Prices
) -> list[Line]:
    """Every method at every point that was answered."""
    firsts: dict[str, list[Sample]] = {}
    lines = []
    for point in (point for point in study.points if point.slug in answered):
        samples = answered[point.slug]
        for row in tabulate(task, samples, prices):
            own = [sample for sample in samples if sample.method == row.method]
            first = firsts.setdefault(row.method, own)
            lines.append(Line(point, row, None if first is own else compare(task, own, first)))
    return lines


def to_json(found: Findings) -> dict[str, Any]:
    """All of it for machines: no text of the data, and no path."""
    study = found.study
    points = [
        {
            **point.model_dump(exclude_defaults=True),
            "folder": point.slug,
            "error": found.failed.get(point.slug),
            "methods": [
                {**line.row.to_json(), "against": line.against and line.against.to_json()}
                for line in found.lines
                if line.point is point
            ],
        }
        for point in study.points
    ]
    about = study.model_dump(include={"name", "question", "x", "log", "settings"})
    return {
        **about,
        "task": found.task.name,
        "metric": found.metric,
        "higher_is_better": found.task.metric_specs[found.metric].higher_is_better,
        "points": points,
    }
