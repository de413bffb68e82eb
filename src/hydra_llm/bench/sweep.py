"""A sweep: the same methods on the same queries while one thing varies, from a settings file
(`benchmarks/sweeps/`).

    name, question, x, methods, log    the question, the axis, the methods, a logarithmic axis
    [settings]                         common to all points
    [run]                              users, limit, folds, seeds, k, b, as `bench run` takes them
    [[points]]                         x; and settings, series, methods, llm, history, fit
    vary = {NAME = [...], ...}         a grid of points: x is the first name, others name the series

Each point is an `Experiment` in its own folder, so that a stopped sweep continues; equal LLM calls
of several points are made once.
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

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError

from hydra_llm.bench.experiment import Experiment, Say, learned_bundles, run_experiment
from hydra_llm.bench.method import BUDGET, RECORDS, Method, check_methods, find_methods
from hydra_llm.bench.results import compare, tabulate
from hydra_llm.bench.runlog import Sample, by_method
from hydra_llm.config import Group, Settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.errors import HydraError, SettingsError
from hydra_llm.llm.cache import CachedLLM
from hydra_llm.llm.concurrency import StageProgress
from hydra_llm.llm.meter import Prices
from hydra_llm.llm.none import NONE
from hydra_llm.training.train_scorer import silent

MAX_SLUG = 200  # bytes


class SweepPoint(Group):
    """One value of what varies."""

    x: int | float | str
    series: str = ""  # points of a series are one line of the plot
    settings: dict[str, Any] = Field(default_factory=dict)  # override the common ones and `--set`
    methods: tuple[str, ...] = ()  # in place of the sweep's
    llm: str | None = None  # in place of `--llm`
    history: NonNegativeInt | Literal["all"] = (
        "all"  # each new user's records, `DataSet.with_history`
    )
    fit: bool = True  # without it new users have no heads: the shared ones answer for them

    @property
    def slug(self) -> str:
        """The name of its folder."""
        name = re.sub(r"(?:[^\w.]|_)+", "-", f"{self.x} {self.series}".lower()).strip("-.")
        if len(name.encode()) > MAX_SLUG:  # of what a file system takes
            name = f"{name[:40]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
        return name or "point"


class RunOptions(Group):
    """Options as `bench run` takes them."""

    users: PositiveInt | None = None
    limit: PositiveInt | None = None
    seeds: tuple[NonNegativeInt, ...] = ()
    folds: int | None = Field(default=None, ge=2)
    k: tuple[PositiveInt, ...] = RECORDS
    b: tuple[PositiveInt, ...] = BUDGET


class Sweep(Group):
    """A sweep file; `load_sweep` puts all of its points into `points`."""

    name: str
    question: str  # one line
    x: str  # what varies, as the title of an axis
    methods: tuple[str, ...] = Field(min_length=1)
    settings: dict[str, Any] = Field(default_factory=dict)
    run: RunOptions = RunOptions()
    points: tuple[SweepPoint, ...] = ()
    vary: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    log: bool = False  # the axis is logarithmic


def load_sweep(file: Path) -> Sweep:
    """Read a sweep file; SettingsError names the first fault."""
    try:
        sweep = Sweep.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
        sweep = sweep.model_copy(update={"points": (*sweep.points, *_grid(sweep.vary))})
        _check(sweep)
        return sweep
    except OSError as error:
        fault = f"no such sweep file ({error.strerror}): see benchmarks/sweeps"
    except ValidationError as error:
        first, types = error.errors()[0], ("int", "float", "str")
        parts = [str(part + 1) if isinstance(part, int) else part for part in first["loc"]]
        place = ".".join(part for part in parts if re.fullmatch(r"\w+", part) and part not in types)
        fault = "unknown key" if first["type"] == "extra_forbidden" else first["msg"]
        fault = f"{place}: {fault}"
    except SettingsError as error:
        fault = str(error)
    except ValueError as error:
        fault = f"not TOML: {error}"
    raise SettingsError(f"{file}: {fault}")


def _grid(vary: Mapping[str, Sequence[Any]]) -> list[SweepPoint]:
    """A point for each combination of values; a name is a setting or a key of a point."""
    points = []
    for values in product(*vary.values()) if vary else ():
        settings = dict(zip(vary, values, strict=True))
        x, *others = (str(value).lower() if isinstance(value, bool) else value for value in values)
        series = ", ".join(f"{n}={v}" for n, v in zip(list(vary)[1:], others, strict=True))
        fields = {name: settings.pop(name) for name in vary if name in ("llm", "history", "fit")}
        x = x if isinstance(x, int | float) else str(x)
        points.append(SweepPoint(x=x, series=series, settings=settings, **fields))
    return points


def _check(sweep: Sweep) -> None:
    if not sweep.points:
        raise SettingsError("has no points: write [[points]], or vary = {SETTING = [...]}")
    _check_settings("settings", sweep.settings)
    find_methods(sweep.methods)
    slugs: dict[str, int] = {}
    for number, point in enumerate(sweep.points, 1):
        _check_settings(f"points.{number}", {**sweep.settings, **point.settings})
        find_methods(point.methods or sweep.methods)
        if (first := slugs.setdefault(point.slug, number)) != number:
            fault = f"is called '{point.slug}' as points.{first} is: give it another x or series"
            raise SettingsError(f"points.{number}: {fault}")


def _check_settings(place: str, values: Mapping[str, Any]) -> None:
    try:
        Settings.checked(values)
    except SettingsError as error:
        raise SettingsError(f"{place}: {error}") from None


@dataclass(frozen=True)
class SweepContext:
    """What a sweep is run on."""

    data: DataSet
    out: Path
    settings: Callable[[Mapping[str, Any]], Settings]  # a point's own settings → all of them
    open_llm: Callable[[str | None], AbstractContextManager[CachedLLM]]  # None: the command's
    llm: str = ""  # the spec of the command's
    users: int | None = None  # in place of the sweep's
    limit: int | None = None  # in place of the sweep's
    progress: StageProgress = silent
    say: Say = print


def run_sweep(sweep: Sweep, context: SweepContext) -> dict[str, Any]:
    """Run every point; an error of a point is reported, and raised only if all points fail. Returns
    the content of `sweep.json`: no text of the data, and no path.
    """
    _check_llms(sweep, context)
    answered: dict[str, list[Sample]] = {}
    faults: dict[str, HydraError] = {}
    with ExitStack() as stack:
        llms: dict[str | None, CachedLLM] = {}
        for number, point in enumerate(sweep.points, 1):
            context.say(f"point {number} of {len(sweep.points)}: {point.slug}")
            try:
                if point.llm not in llms:
                    llms[point.llm] = stack.enter_context(context.open_llm(point.llm))
                answered[point.slug] = _run_point(sweep, point, context, llms[point.llm])
            except HydraError as error:
                faults[point.slug] = error
                context.say(f"point {point.slug} failed: {error}; the same command tries it again")
    if not answered:
        raise next(iter(faults.values()))
    metric, spec = next(iter(context.data.task.metric_specs.items()))
    rows = _rows(context, answered)
    points = [
        {
            **point.model_dump(exclude_defaults=True),
            "folder": point.slug,
            "error": str(faults[point.slug]) if point.slug in faults else None,
            "methods": rows.get(point.slug, []),
        }
        for point in sweep.points
    ]
    return {
        **sweep.model_dump(include={"name", "question", "x", "log", "settings"}),
        "task": context.data.task.name,
        "metric": metric,
        "higher_is_better": spec.higher_is_better,
        "points": points,
    }


def _check_llms(sweep: Sweep, context: SweepContext) -> None:
    """SettingsError: a point has a method that its LLM, or none, cannot answer."""
    for point in sweep.points:
        methods, settings = _methods(sweep, point, context), context.settings(point.settings)
        without = (point.llm or context.llm) == NONE
        check_methods(methods, context.data.task, settings, without_llm=without)


def _methods(sweep: Sweep, point: SweepPoint, context: SweepContext) -> list[Method]:
    names, run, choices = point.methods or sweep.methods, sweep.run, _asks_choices(context)
    kind = context.data.task.kind
    return find_methods(names, kind, records=run.k, budget=run.b, choices=choices)


def _asks_choices(context: SweepContext) -> bool:
    return context.data.asks_choices(prefer=context.llm == NONE)


def _run_point(
    sweep: Sweep, point: SweepPoint, context: SweepContext, llm: CachedLLM
) -> list[Sample]:
    run, data = sweep.run, context.data
    experiment = Experiment(
        data,
        llm,
        context.settings(point.settings),
        _methods(sweep, point, context),
        context.out / point.slug,
        users=context.users or run.users,
        limit=context.limit or run.limit,
        seeds=run.seeds,
        folds=run.folds,
        choices=_asks_choices(context),
        history=point.history,
        fit=point.fit,
        progress=context.progress,
        say=context.say,
    )
    alike = [(other.llm, other.settings) == (point.llm, point.settings) for other in sweep.points]
    if sum(alike) > 1 and run.folds is None:
        (whole,) = replace(experiment, history="all").turns()
        _copy_base(whole, experiment.out, context.out / "bases")
    outcome = run_experiment(experiment)
    results = [result.to_json() for result in tabulate(data.task, outcome.samples)]
    outcome.log.finish(results, outcome.learning)
    return outcome.samples


def _copy_base(experiment: Experiment, out: Path, bases: Path) -> None:
    """Points that differ in their new users alone share a base, which is learned once."""
    settings = experiment.settings.stored()
    identity = [experiment.data.digest, dict(experiment.llm.identity), settings, experiment.seeds]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    base = bases / digest[:12]
    learned_bundles(replace(experiment, out=base, users=0))
    for bundle in base.glob("bundle*"):
        own, part = out / bundle.name, out / f"{bundle.name}.part"
        if not own.exists():
            shutil.copytree(bundle, part, dirs_exist_ok=True)
            part.replace(own)  # a kill leaves no half bundle


def _rows(
    context: SweepContext, answered: Mapping[str, Sequence[Sample]]
) -> dict[str, list[dict[str, Any]]]:
    """Slug of a point → its methods as JSON, against the first point that has the method."""
    settings, task = context.settings({}), context.data.task
    prices = Prices(settings.price_prompt, settings.price_completion)
    firsts: dict[str, list[Sample]] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    for slug, samples in answered.items():
        own = by_method(samples)
        for result in tabulate(task, samples, prices):
            mine = own[result.method]
            first = firsts.setdefault(result.method, mine)
            against = None if first is mine else compare(task, mine, first).to_json()
            rows.setdefault(slug, []).append({**result.to_json(), "against": against})
    return rows
