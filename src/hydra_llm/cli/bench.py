"""`hydra-llm bench`: compare methods on the same users and queries."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hydra_llm.cli import console
from hydra_llm.cli.options import LLM, AsJson, Config, Limit, Preset, Record, Seed, Set, open_bundle, opened_llm, settings_of

if TYPE_CHECKING:
    from hydra_llm.bench.methods import Parts
    from hydra_llm.bench.runlog import RunLog, Sample
    from hydra_llm.bundle import Bundle
    from hydra_llm.config import Settings
    from hydra_llm.datasets.dataset import DataSet
    from hydra_llm.llm.cache import CachedLLM
    from hydra_llm.tasks.task import Task
    from hydra_llm.types import Query

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the methods."""
    from hydra_llm.bench.methods import METHODS

    rows = [
        {"method": "@".join(filter(None, (m.name, ",".join(m.takes)))), "group": m.group, "what": m.what, "source": m.source}
        for m in METHODS.values()
    ]
    console.emit(rows, as_json)


@app.command()
def run(
    data: Annotated[Path, typer.Argument(help="A data set: native folder, or LaMP's files.")],
    llm: LLM,
    out: Annotated[Path, typer.Option(help="Folder of the run; the same command continues a stopped one.")],
    bundle: Annotated[Path | None, typer.Option(help="A learned bundle; without it one is learned in the run's folder.")] = None,
    methods: Annotated[str, typer.Option(help="Names with commas (rag, hydra@4,8 as k,b), or all; see `bench methods`.")] = "all",
    users: Annotated[int | None, typer.Option(min=1, help="At most so many new users.")] = None,
    limit: Limit = None,
    seed: Seed = None,
    preset: Preset = None,
    config: Config = None,
    set_: Set = None,
    record: Record = None,
    lamp: Annotated[bool, typer.Option("--export-lamp", help="Also write the answers in LaMP's outputs layout, a file a method.")] = False,
    as_json: AsJson = False,
) -> None:
    """Answer new users' queries by each method and print the table; `--limit` takes each user's first queries.

    Without `--bundle` it learns from the training users and fits the new ones first, with the same settings.
    """
    from hydra_llm.bench.methods import Parts, find_methods, split_names
    from hydra_llm.bench.run import chosen_queries, run_methods
    from hydra_llm.bench.runlog import RunLog, export_lamp
    from hydra_llm.datasets.native import load
    from hydra_llm.errors import DataError
    from hydra_llm.llm.calls import run_sync

    wanted, folder = split_names(methods), bundle or out / "bundle"
    find_methods(wanted)  # a wrong name is told before anything is read
    opened = partial(open_bundle, folder, preset, config, set_, seed=seed)
    settings = opened()[1] if bundle else settings_of(preset, config, set_, seed=seed)
    dataset = load(data)
    chosen = find_methods(wanted, dataset.task.kind)
    with opened_llm(llm, settings, record) as model:
        if not bundle:
            _learn_here(folder, dataset, model, settings, users)
        loaded, settings = opened()
        loaded.check_task(dataset.task)
        names = _fitted(dataset, loaded, data)[:users]
        parts = Parts(loaded, model, settings, {**loaded.records, **{name: dataset.history(name) for name in names}})
        if not (queries := chosen_queries(dataset, names, limit)):
            raise DataError(f"{data}: no new user with a head has a query: run `hydra-llm fit {data} --bundle {folder}` first")
        _tell_of_time(parts, queries)
        log = RunLog(out, _manifest(dataset, parts, queries))
        with console.progress() as report:
            samples = run_sync(partial(run_methods, chosen, parts, queries, log, report))
    if lamp:
        console.say(f"wrote {export_lamp(out, dataset.task.like or dataset.task.name, samples)}")
    _tell(log, parts.bundle.task, samples, as_json)


def _tell(log: "RunLog", task: "Task", samples: Sequence["Sample"], as_json: bool) -> None:
    """Write the results and print the table."""
    from hydra_llm.bench.run import as_table, tabulate

    rows = tabulate(task, samples)
    if errors := [sample.error for sample in samples if sample.error]:
        console.say(f"{len(errors)} of {len(samples)} answers failed, the first with: {errors[0]}; the same command asks for them again")
    console.say(f"wrote {log.finish([row.to_json() for row in rows])}")
    console.emit([row.to_json() for row in rows] if as_json else as_table(rows), as_json)


@app.command()
def show(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    against: Annotated[str | None, typer.Option(help="The baseline; the best prompt-based method otherwise.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print runs as tables: figures with intervals, and paired differences from a baseline."""
    from hydra_llm.bench import report

    read = [report.open_run(folder) for folder in runs]
    tables = [(run, report.lines_of(run, against)) for run in read]
    named = [next((line.row.method for line in lines if line.against is None), "nothing") for _, lines in tables]
    if markdown is not None:
        markdown.write_text("\n".join(report.markdown(run, lines, name) for (run, lines), name in zip(tables, named, strict=True)))
        console.say(f"wrote {markdown}")
    if as_json:
        console.emit([report.to_json(run, lines) for run, lines in tables], True)
        return
    for (run, lines), name in zip(tables, named, strict=True):
        console.print_table(report.as_rows(run, lines), f"{run.folder}: {run.task.name}; * best, ' second best of what is ranked")
        differences = {line.row.method: line.against for line in lines if line.against is not None}
        if differences:
            console.print_table(report.as_differences(differences), f"Paired differences from {name}, 95 % intervals over users")


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="Folder of a run.")],
    second: Annotated[Path, typer.Argument(help="Folder of another run on the same data.")],
    as_json: AsJson = False,
) -> None:
    """Print how two runs differ, method by method, second minus first: two versions of the code, or of the settings."""
    from hydra_llm.bench import report

    found = report.compare_runs(report.open_run(first), report.open_run(second))
    if as_json:
        console.emit({method: each.to_json() for method, each in found.items()}, True)
        return
    console.print_table(report.as_differences(found), f"{second} minus {first}, 95 % intervals over users")


def _learn_here(folder: Path, dataset: "DataSet", llm: "CachedLLM", settings: "Settings", users: int | None) -> None:
    """Learn the run's own bundle, and fit the new users whom it lacks; what is there already stays."""
    from hydra_llm.bundle import Bundle
    from hydra_llm.learning.api import fit, learn

    with console.progress() as report:
        if not (folder / "config.json").exists():
            told = learn(dataset, llm, settings, out=folder, progress=report)
            for line in [*told.notes, *told.failures[:3]]:
                console.say(line)
        bundle = Bundle.load(folder)
        missing = [user for user in dataset.users("test")[:users] if user not in bundle.records]
        if missing:
            fit(dataset, bundle, llm, users=missing, progress=report).bundle.save(folder)


def _fitted(dataset: "DataSet", bundle: "Bundle", data: Path) -> list[str]:
    """The new users who have a head; that others have none is told."""
    new = dataset.users("test")
    fitted = [user for user in new if user in bundle.records]
    if fitted and len(fitted) < len(new):
        console.say(f"{len(new) - len(fitted)} of {len(new)} new users have no head and are left out: run `hydra-llm fit {data}` for them")
    return fitted


def _tell_of_time(parts: "Parts", queries: Sequence["Query"]) -> None:
    """Say how many queries their users' own heads may not answer."""
    from hydra_llm.history import before

    scorers = [scorer for scorer in (parts.bundle.reranker, parts.bundle.adapter) if scorer is not None]
    seen = [(query.user, len(before(parts.records[query.user], query))) for query in queries]
    amid = sum(any(scorer.serving_row(*case) != scorer.row(case[0]) for scorer in scorers) for case in seen)
    if amid:
        console.say(f"{amid} of {len(queries)} queries may not see all that their user's head was fitted on: the shared head answers them")


def _manifest(dataset: "DataSet", parts: "Parts", queries: Sequence["Query"]) -> dict[str, Any]:
    """What names the run: samples of another one are not mixed with its own."""
    from hydra_llm.config import OF_THIS_MACHINE

    return {
        "data": dataset.digest,
        "task": dataset.task.to_json(),
        "llm": dict(parts.llm.identity),
        "weights": parts.bundle.weights,
        "trained_on": len(parts.bundle.trained_on),
        "users": len({query.user for query in queries}),
        "queries": len(queries),
        "settings": parts.settings.model_dump(mode="json", exclude=set(OF_THIS_MACHINE)),
    }
