"""`hydra-llm bench`: compare methods on the same users and queries."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hydra_llm.cli import console
from hydra_llm.cli.former_options import (
    Config,
    MaybeLLM,
    Preset,
    Record,
    Replay,
    Seed,
    Set,
    given,
    llm_or_replay,
    open_bundle,
    opened_llm,
    settings_of,
)
from hydra_llm.cli.options import AsJson, Limit

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    from hydra_llm.bench.experiment import Experiment, Outcome
    from hydra_llm.bench.report.tables import Report
    from hydra_llm.bundle import Bundle
    from hydra_llm.config import Settings
    from hydra_llm.datasets.dataset import DataSet
    from hydra_llm.llm.cache import CachedLLM
    from hydra_llm.tasks.base import Task

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the methods."""
    from hydra_llm.bench.method import METHODS, load_method

    rows = [
        {
            "method": "@".join(filter(None, (m.name, ",".join(m.takes)))),
            "group": m.group,
            "what": m.what,
            "source": m.source,
        }
        for m in map(load_method, METHODS.names())
    ]
    console.emit(rows, as_json)


@app.command()
def run(
    data: Annotated[
        str,
        typer.Argument(
            help=(
                "A data set: native folder, LaMP's files, or lamp-1, -2n, -2m, -3, -4, -5, -7"
                " (downloaded)."
            )
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder of the run; the same command continues a stopped one.")
    ],
    llm: MaybeLLM = None,
    replay: Replay = None,
    bundle: Annotated[
        Path | None,
        typer.Option(help="A learned bundle; without it one is learned in the run's folder."),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            help="Names with commas (rag, hydra@4,8 as k,b), or all; see `bench methods`."
        ),
    ] = "all",
    k: Annotated[
        str, typer.Option(help="Records in the prompt, for each of which `all` takes a method.")
    ] = "1,2,4",
    b: Annotated[str, typer.Option("--b", help="Candidates, likewise.")] = "8",
    seeds: Annotated[
        str | None,
        typer.Option(help="Seeds of the learned parts, with commas: 0,1,2. They share labels."),
    ] = None,
    users: Annotated[int | None, typer.Option(min=1, help="At most so many new users.")] = None,
    limit: Limit = None,
    seed: Seed = None,
    preset: Preset = None,
    config: Config = None,
    set_: Set = None,
    record: Record = None,
    base_url: Annotated[
        str | None,
        typer.Option(help="A mirror of LaMP's download folder, for those that are downloaded."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Say what the run will cost, from a few calls; answer nothing."
        ),
    ] = False,
    lamp: Annotated[
        bool,
        typer.Option(
            "--export-lamp",
            help="Also write the answers in LaMP's outputs layout, a file a method.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Answer new users' queries by each method and print the table; `--limit` takes each user's
    first queries.

    Without `--bundle` it learns from the training users and fits the new ones first, with the same
    settings.
    """
    from hydra_llm.bench.experiment import Experiment, run_experiment
    from hydra_llm.bench.method import find_methods, per_sample, split_names
    from hydra_llm.bench.runlog import export_lamp
    from hydra_llm.datasets.fetch import BASE_URL, load_named
    from hydra_llm.errors import SettingsError

    spec = llm_or_replay(llm, replay)
    wanted = split_names(methods)
    records, budget = whole_numbers("--k", k), whole_numbers("--b", b)
    find_methods(
        wanted, records=records, budget=budget
    )  # a wrong name is told before anything is read
    if bundle and seeds:
        raise SettingsError("--seeds learns a bundle for each: leave --bundle out")
    learned = of_seeds = None
    settings = settings_of(preset, config, set_, seed=seed)
    if bundle:
        learned, settings = open_bundle(bundle, preset, config, set_, seed=seed)
    if seeds:
        of_seeds = whole_numbers("--seeds", seeds, least=0)
    with console.progress() as report:
        dataset = load_named(
            data, settings.cache / "lamp", base_url=base_url or BASE_URL, progress=report
        )
    if learned:
        learned.check_task(dataset.task)
        _tell_unfitted(dataset, learned, data)
    chosen = find_methods(wanted, dataset.task.kind, records=records, budget=budget)
    with opened_llm(spec, settings, record) as model:
        experiment = Experiment(dataset, model, settings, chosen, out, users, limit, of_seeds or ())
        if dry_run:
            _print_estimate(experiment, learned, as_json)
            return
        with console.progress() as report:
            outcome = run_experiment(experiment, report, console.say, learned)
    if lamp:
        name = dataset.task.like or dataset.task.name
        answered = [sample for sample in outcome.samples if not per_sample(sample.method)]
        console.say(f"wrote {export_lamp(out, name, answered)}")
    _tell(outcome, dataset.task, settings, as_json)


def whole_numbers(option: str, text: str, least: int = 1) -> tuple[int, ...]:
    """`1,2,4` → (1, 2, 4).

    Raises:
        SettingsError: something else stands there.
    """
    from hydra_llm.errors import SettingsError

    values = [part.strip() for part in text.split(",")]
    if not all(value.isdecimal() and int(value) >= least for value in values):
        raise SettingsError(
            f"{option} {text}: write whole numbers from {least} with commas, as 1,2,4"
        )
    return tuple(dict.fromkeys(map(int, values)))


def _tell(outcome: "Outcome", task: "Task", settings: "Settings", as_json: bool) -> None:
    """Write the results and print the table."""
    from hydra_llm.bench.report.cells import results_table
    from hydra_llm.bench.runner import tabulate
    from hydra_llm.llm.meter import Prices

    samples = outcome.samples
    rows = tabulate(task, samples, Prices(settings.price_prompt, settings.price_completion))
    if failed := [sample for sample in samples if sample.error]:
        first = f"{failed[0].method} on {failed[0].user}'s {failed[0].query}: {failed[0].error}"
        console.say(
            f"{len(failed)} of {len(samples)} answers failed, the first {first}; the same command"
            " asks for them again"
        )
    console.say(f"wrote {outcome.log.finish([row.to_json() for row in rows], outcome.learning)}")
    console.emit([row.to_json() for row in rows] if as_json else results_table(rows), as_json)


def _print_estimate(experiment: "Experiment", bundle: "Bundle | None", as_json: bool) -> None:
    """Print what a run will cost."""
    from hydra_llm.bench.estimate import estimate_cost, estimate_rows

    with console.progress() as report:
        found = estimate_cost(experiment, report, bundle)
    console.emit(found.to_json() if as_json else estimate_rows(found), as_json)


def _tell_unfitted(dataset: "DataSet", bundle: "Bundle", data: str) -> None:
    """That some new users have no head in the given bundle; none at all is an error.

    Raises:
        DataError: nobody has one.
    """
    from hydra_llm.errors import DataError

    new = dataset.users("test")
    missing = [user for user in new if user not in bundle.records]
    if new and len(missing) == len(new):
        raise DataError(
            f"{data}: no new user with a head has a query: run `hydra-llm fit {data} --bundle"
            " BUNDLE` first"
        )
    if missing:
        console.say(
            f"{len(missing)} of {len(new)} new users have no head and are left out: run `hydra-llm"
            f" fit {data}` for them"
        )


@app.command()
def show(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or of sweeps.")],
    against: Annotated[
        str | None, typer.Option(help="The baseline; the best prompt-based method otherwise.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables to this file.")] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Write tables, plots and sampled answers to this file, which needs no network."
        ),
    ] = None,
    answers: Annotated[
        bool,
        typer.Option(
            "--answers/--no-answers", help="Sampled answers in the HTML file; they quote the data."
        ),
    ] = True,
    plots: Annotated[
        Path | None, typer.Option(help="Write the plots to this folder, as SVG.")
    ] = None,
    costs: Annotated[
        bool, typer.Option("--costs", help="Also print what a query and what learning cost.")
    ] = False,
    price_prompt: Annotated[
        float, typer.Option(min=0, help="Money per million prompt tokens.")
    ] = 0.0,
    price_completion: Annotated[
        float, typer.Option(min=0, help="Money per million tokens of answers.")
    ] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Print runs as tables: figures with intervals, paired differences from a baseline, and what
    they say of HYDRA.
    """
    from hydra_llm.bench.report import sweeps, tables
    from hydra_llm.llm.meter import Prices

    found = [sweeps.open_sweep(folder) for folder in runs if sweeps.is_sweep(folder)]
    opened = [tables.open_run(folder) for folder in runs if not sweeps.is_sweep(folder)]
    prices = Prices(price_prompt, price_completion)
    reports = [tables.make_report(run, against, prices) for run in opened]
    if markdown is not None:
        from hydra_llm.bench.report import markdown as text

        texts = [text.markdown(report) for report in reports]
        texts.append(text.overall_markdown(tables.overall(reports)))
        _write(markdown, "\n".join(filter(None, [*texts, *map(text.sweep_markdown, found)])))
        console.say(f"wrote {markdown}")
    if html is not None:
        from hydra_llm.bench.report.html import page

        _write(html, page(reports, answers, found))
        quotes = ": it quotes the data, --no-answers leaves that out" if answers else ""
        console.say(f"wrote {html}{quotes}")
    if plots is not None:
        from hydra_llm.bench.report.plots import write

        for place, report in enumerate(reports, 1):
            several = len(reports) > 1
            folder = plots / f"{place}-{report.run.folder.name}" if several else plots
            console.say(f"wrote {write(report, folder)}")
    if as_json:
        _print_json(reports, found)
        return
    for report in reports:
        _print_report(report, costs)
    if over := tables.overall(reports):
        console.print_table(tables.overall_rows(over), tables.OVERALL)
    for each in found:
        console.print_table(sweeps.sweep_rows(each), each["question"])


def _print_json(reports: "list[Report]", sweeps: "list[Mapping[str, Any]]") -> None:
    from hydra_llm.bench.report import tables
    from hydra_llm.bench.report.findings import findings

    runs = [
        {
            **tables.to_json(report),
            "findings": findings(report),
            "learning": list(report.run.learning),
        }
        for report in reports
    ]
    shares = {
        method: {what: tables.share_json(share) for what, share in each.items()}
        for method, each in tables.overall(reports).items()
    }
    console.emit({"runs": runs, "over_tasks": shares, "sweeps": sweeps}, True)


def _print_report(report: "Report", costs: bool) -> None:
    from hydra_llm.bench.report import tables
    from hydra_llm.bench.report.costs import cost_rows, learning_rows
    from hydra_llm.bench.report.findings import findings
    from hydra_llm.bench.report.summary import summary_line

    run = report.run
    title = f"{run.folder}: {run.task.name}; * best, ' second best of what is ranked"
    console.print_table(tables.method_rows(report), title)
    print(summary_line(run))
    if report.comparisons:
        title = f"Paired differences from {report.baseline}, 95 % intervals over users"
        console.print_table(tables.comparison_rows(report.comparisons), title)
    if costs:
        console.print_table(cost_rows(report), "What a query costs")
        if learning := learning_rows(report):
            console.print_table(learning, "What learning cost")
    for sentence in findings(report):
        print(f"- {sentence}")


def _write(file: Path, text: str) -> None:
    """Write a report, in a new folder if need be."""
    from hydra_llm.errors import SettingsError

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SettingsError(
            f"{file}: cannot be written ({error.strerror}): name another file"
        ) from None


@app.command()
def sweep(
    file: Annotated[
        Path, typer.Argument(help="A sweep file: benchmarks/sweeps/*.toml, or one of your own.")
    ],
    data: Annotated[str, typer.Argument(help="A data set, as `bench run` takes it.")],
    out: Annotated[
        Path,
        typer.Option(
            help=(
                "Folder of the sweep, with one run per point; the same command continues a stopped"
                " one."
            )
        ),
    ],
    llm: MaybeLLM = None,
    replay: Replay = None,
    users: Annotated[int | None, typer.Option(min=1, help="At most so many new users.")] = None,
    limit: Limit = None,
    seed: Seed = None,
    preset: Preset = None,
    config: Config = None,
    set_: Set = None,
    record: Record = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Write the plot to this file; the default is sweep.svg in the sweep's folder."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run the methods of a sweep file at each of its points, print and draw the results.

    Precedence of settings: point > `--set` > sweep file. `--record` records the LLM of `--llm`
    alone.
    """
    from hydra_llm.bench.report import charts, sweeps
    from hydra_llm.bench.sweep import SweepContext, load_sweep, run_sweep
    from hydra_llm.config import load_settings
    from hydra_llm.datasets.fetch import load_named

    main = llm_or_replay(llm, replay)
    chosen = load_sweep(file)
    if plot is not None:
        charts.require()
    asked = given(set_, seed=seed)
    for name in sorted(asked.keys() & {name for point in chosen.points for name in point.settings}):
        console.say(f"{name} is set by points of the sweep: --set counts only for the others")

    def settings(own: "Mapping[str, Any]") -> "Settings":
        return load_settings(preset or "default", config, **{**chosen.settings, **asked, **own})

    def opened(spec: str | None) -> "AbstractContextManager[CachedLLM]":
        return opened_llm(spec or main, settings({}), None if spec else record)

    with console.progress() as report:
        dataset = load_named(data, settings({}).cache / "lamp", progress=report)
        context = SweepContext(dataset, out, settings, opened, users, limit, report, console.say)
        found = run_sweep(chosen, context).to_json()
    console.say(f"wrote {sweeps.write_sweep(found, out)}")
    if plot is not None or _can_draw():
        _write(plot or out / "sweep.svg", sweeps.sweep_svg(found))
        console.say(f"wrote {plot or out / 'sweep.svg'}")
    console.emit(found if as_json else sweeps.sweep_rows(found), as_json)


app.command("study", hidden=True)(sweep)  # the name in earlier versions


def _can_draw() -> bool:
    """Whether the extra `report` is installed; says how to install it otherwise."""
    from hydra_llm.bench.report import charts
    from hydra_llm.errors import SettingsError

    try:
        charts.require()
    except SettingsError as error:
        console.say(str(error))
        return False
    return True


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="Folder of a run.")],
    second: Annotated[Path, typer.Argument(help="Folder of another run on the same data.")],
    as_json: AsJson = False,
) -> None:
    """Print how two runs differ, method by method, second minus first: two versions of the code, or
    of the settings.
    """
    from hydra_llm.bench.report import tables as report

    found = report.compare_runs(report.open_run(first), report.open_run(second))
    if as_json:
        console.emit({method: each.to_json() for method, each in found.items()}, True)
        return
    console.print_table(
        report.comparison_rows(found), f"{second} minus {first}, 95 % intervals over users"
    )
