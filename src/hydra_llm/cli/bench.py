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
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from hydra_llm.bench.experiment import Experiment, Outcome
    from hydra_llm.bench.report.tables import Line, Run
    from hydra_llm.bundle import Bundle
    from hydra_llm.config import Settings
    from hydra_llm.datasets.dataset import DataSet
    from hydra_llm.llm.cache import CachedLLM
    from hydra_llm.llm.meter import Prices
    from hydra_llm.tasks.base import Task

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the methods."""
    from hydra_llm.bench.methods import METHODS

    rows = [
        {
            "method": "@".join(filter(None, (m.name, ",".join(m.takes)))),
            "group": m.group,
            "what": m.what,
            "source": m.source,
        }
        for m in METHODS.values()
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
    from hydra_llm.bench.methods import find_methods, split_names
    from hydra_llm.bench.report.tables import in_turn
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
            _tell_plan(experiment, learned, as_json)
            return
        with console.progress() as report:
            outcome = run_experiment(experiment, report, console.say, learned)
    if lamp:
        name = dataset.task.like or dataset.task.name
        answered = [sample for sample in outcome.samples if not in_turn(sample.method)]
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
    from hydra_llm.bench.runner import as_table, tabulate
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
    console.emit([row.to_json() for row in rows] if as_json else as_table(rows), as_json)


def _tell_plan(experiment: "Experiment", bundle: "Bundle | None", as_json: bool) -> None:
    """Print what a run will need."""
    from hydra_llm.bench.estimate import as_rows, plan

    with console.progress() as report:
        found = plan(experiment, report, bundle)
    console.emit(found.to_json() if as_json else as_rows(found), as_json)


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
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or of studies.")],
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
    from hydra_llm.bench.report import sweeps as studied
    from hydra_llm.bench.report import tables as report
    from hydra_llm.bench.report.findings import findings
    from hydra_llm.bench.report.summary import sentence
    from hydra_llm.llm.meter import Prices

    studies = [studied.open_studied(folder) for folder in runs if studied.is_study(folder)]
    read = [report.open_run(folder) for folder in runs if not studied.is_study(folder)]
    prices = Prices(price_prompt, price_completion)
    tables = [(run, report.lines_of(run, against, prices)) for run in read]
    over = report.overall(tables)
    named = [
        next((line.row.method for line in lines if line.against is None), "nothing")
        for _, lines in tables
    ]
    if markdown is not None:
        from hydra_llm.bench.report.markdown import markdown as text_of
        from hydra_llm.bench.report.markdown import of_study, overall_of

        texts = [
            text_of(run, lines, name, prices)
            for (run, lines), name in zip(tables, named, strict=True)
        ]
        _write(
            markdown, "\n".join(filter(None, [*texts, overall_of(over), *map(of_study, studies)]))
        )
        console.say(f"wrote {markdown}")
    if html is not None:
        from hydra_llm.bench.report.html import page

        _write(html, page(tables, answers, prices, studies))
        console.say(
            f"wrote {html}"
            + (": it quotes the data, --no-answers leaves that out" if answers else "")
        )
    if plots is not None:
        from hydra_llm.bench.report.plots import write

        for place, (run, lines) in enumerate(tables, 1):
            folder = plots / f"{place}-{run.folder.name}" if len(tables) > 1 else plots
            console.say(f"wrote {write(run, lines, folder)}")
    if as_json:
        more = [
            {"findings": findings(run, lines), "learning": list(run.learning)}
            for run, lines in tables
        ]
        found = [
            report.to_json(run, lines) | each
            for (run, lines), each in zip(tables, more, strict=True)
        ]
        shares = {
            method: {what: report.share_json(share) for what, share in each.items()}
            for method, each in over.items()
        }
        console.emit({"runs": found, "over_tasks": shares, "sweeps": studies}, True)
        return
    for (run, lines), name in zip(tables, named, strict=True):
        console.print_table(
            report.as_rows(run, lines),
            f"{run.folder}: {run.task.name}; * best, ' second best of what is ranked",
        )
        print(sentence(run))
        differences = {line.row.method: line.against for line in lines if line.against is not None}
        if differences:
            console.print_table(
                report.as_differences(differences),
                f"Paired differences from {name}, 95 % intervals over users",
            )
        if costs:
            _print_costs(run, lines, prices)
        for said in findings(run, lines):
            print(f"- {said}")
    if over:
        console.print_table(report.as_overall(over), report.OVERALL)
    for each in studies:
        console.print_table(studied.as_table(each), each["question"])


def _print_costs(run: "Run", lines: "Sequence[Line]", prices: "Prices") -> None:
    from hydra_llm.bench.report.costs import as_costs, as_learning

    console.print_table(as_costs(lines), "What a query costs")
    if learning := as_learning(run, prices):
        console.print_table(learning, "What learning cost")


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
def study(
    file: Annotated[
        Path, typer.Argument(help="A study: benchmarks/sweeps/*.toml, or one of your own.")
    ],
    data: Annotated[str, typer.Argument(help="A data set, as `bench run` takes it.")],
    out: Annotated[
        Path,
        typer.Option(
            help=(
                "Folder of the study, a run in it for each point; the same command continues a"
                " stopped one."
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
            help="Write the plot to this file; without it to study.svg in the study's folder."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run the methods of a study file at each of its points, print what came out and draw it.

    `--set` stands above the file's settings, and its points above `--set`. `--record` takes down
    the LLM of `--llm` alone.
    """
    from hydra_llm.bench import sweep as studies
    from hydra_llm.bench.report import plots
    from hydra_llm.bench.report import sweeps as studied
    from hydra_llm.config import load_settings
    from hydra_llm.datasets.fetch import load_named

    main = llm_or_replay(llm, replay)
    chosen = studies.open_study(file)
    if plot is not None:
        plots.require()
    asked = given(set_, seed=seed)
    for name in sorted(asked.keys() & {name for point in chosen.points for name in point.settings}):
        console.say(f"{name} is what the study's points set: yours counts only where they do not")

    def settings(own: "Mapping[str, Any]") -> "Settings":
        return load_settings(preset or "default", config, **{**chosen.settings, **asked, **own})

    def opened(spec: str | None) -> "AbstractContextManager[CachedLLM]":
        return opened_llm(spec or main, settings({}), None if spec else record)

    with console.progress() as report:
        dataset = load_named(data, settings({}).cache / "lamp", progress=report)
        bench = studies.Bench(dataset, out, settings, opened, users, limit)
        found = studies.to_json(studies.run_study(chosen, bench, report, console.say))
    console.say(f"wrote {studied.write_studied(found, out)}")
    if plot is not None or _can_draw():
        _write(plot or out / "study.svg", studied.drawn(found))
        console.say(f"wrote {plot or out / 'study.svg'}")
    console.emit(found if as_json else studied.as_table(found), as_json)


def _can_draw() -> bool:
    """Whether the extra `report` is installed; what to do is told where it is not."""
    from hydra_llm.bench.report import plots
    from hydra_llm.errors import SettingsError

    try:
        plots.require()
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
        report.as_differences(found), f"{second} minus {first}, 95 % intervals over users"
    )
