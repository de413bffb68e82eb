"""`hydra-llm bench`: compare methods on the same users and queries."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from hydra_llm.cli import console
from hydra_llm.cli import options as opt
from hydra_llm.cli.judge import judge
from hydra_llm.cli.table import print_table, print_text
from hydra_llm.config import NAMES, Settings, load_settings
from hydra_llm.errors import DataError, SettingsError
from hydra_llm.extras import require
from hydra_llm.llm.cache import CachedLLM
from hydra_llm.llm.meter import Prices
from hydra_llm.llm.none import NONE
from hydra_llm.llm.registry import check_spec
from hydra_llm.setting_names import log_renamed

if TYPE_CHECKING:
    from hydra_llm.bench.report.tables import Report
    from hydra_llm.bundle import Bundle
    from hydra_llm.datasets.dataset import DataSet

app = typer.Typer(add_completion=False, no_args_is_help=True)

DATA_HELP = "A native folder, LaMP's files, or lamp-1, -2n, -2m, -3, -4, -5, -7 (downloaded)."
Data = Annotated[str, Argument(help=DATA_HELP)]
BY = "Also gain and harm by groups of users: history, activity, or a column of users.jsonl."
Users = Annotated[int | None, Option(min=1, help="Max number of new users.")]
Format = Literal["inspect", "lamp"]
Price = Annotated[float, Option(min=0, help="Price per million tokens.")]


def whole_numbers(option: str, text: str, least: int = 1) -> tuple[int, ...]:
    """`1,2,4` → (1, 2, 4); anything but whole numbers from `least` is an error."""
    values = [part.strip() for part in text.split(",")]
    if not all(value.isdecimal() and int(value) >= least for value in values):
        message = f"{option} {text}: write whole numbers from {least} with commas, as 1,2,4"
        raise SettingsError(message)
    return tuple(dict.fromkeys(map(int, values)))


@app.command()
def methods(as_json: opt.AsJson = False) -> None:
    """List the methods."""
    from hydra_llm.bench.method import METHODS, load_method

    rows = []
    for m in map(load_method, METHODS.names()):
        name = "@".join(filter(None, (m.name, ",".join(m.takes))))
        rows.append({"method": name, "group": m.group, "what": m.what, "source": m.source})
    console.emit(rows, as_json)


@app.command()
@opt.with_option_sets
def run(
    *,
    data: Data,
    out: Annotated[Path, Option(help="Folder of the run; a stopped run continues there.")],
    source: opt.RecordedLLM,
    methods: Annotated[str, Option(help="As rag,hydra@4,8, or all; see `bench methods`.")] = "all",
    k: Annotated[str, Option(help="Records in the prompt, comma-separated, for all.")] = "1,2,4",
    b: Annotated[str, Option("--b", help="Candidates, comma-separated, for all.")] = "8",
    seeds: Annotated[str | None, Option(help="Seeds of training, comma-separated.")] = None,
    options: opt.LearnSettings,
    bundle: Annotated[Path | None, Option(help="A bundle; default: one is learned.")] = None,
    users: Users = None,
    limit: opt.Limit = None,
    folds: Annotated[int | None, Option(min=2, help="Users take turns as new users.")] = None,
    base_url: Annotated[str | None, Option(help="A mirror of LaMP's download folder.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Estimate costs by 5 calls.")] = False,
    lamp: Annotated[bool, Option("--export-lamp", help="Also write LaMP's format.")] = False,
    wide: opt.Wide = False,
    as_json: opt.AsJson = False,
) -> None:
    """Answer new users' queries (of each, the first `--limit`) by each method; print the table.

    Without `--bundle`, first learn from the training users and fit the new users' heads. Methods
    that ask no LLM need no `--llm`.
    """
    spec = source.spec(NONE)
    check_spec(spec)
    from hydra_llm.bench.estimate import CostEstimate, estimate_cost, estimate_rows
    from hydra_llm.bench.experiment import Experiment, run_experiment
    from hydra_llm.bench.method import check_methods, find_methods, per_sample, split_names
    from hydra_llm.bench.report.summary import compared_words
    from hydra_llm.bench.report.tables import results_table
    from hydra_llm.bench.results import tabulate
    from hydra_llm.bench.runlog import export_lamp

    repeats = whole_numbers("--seeds", seeds, least=0) if seeds else ()
    records, budget = whole_numbers("--k", k), whole_numbers("--b", b)
    find = partial(find_methods, split_names(methods), records=records, budget=budget)
    find()  # fails before anything is read
    if bundle and repeats:
        raise SettingsError("--seeds learns a bundle for each: leave --bundle out")
    if bundle and folds:
        raise SettingsError("--folds learns a bundle for each: leave --bundle out")
    learned, settings = options.open_bundle(bundle) if bundle else (None, options.settings())
    dataset = _load(data, settings, base_url, learned)
    choices = dataset.asks_choices(prefer=spec == NONE)
    task, chosen = dataset.task, find(dataset.task.kind, choices=choices)
    check_methods(chosen, task, settings, learned, without_llm=spec == NONE)
    with source.opened(spec, settings, direct=dry_run) as model, console.progress() as report:
        plan = Experiment(dataset, model, settings, chosen, out, users, limit, repeats)
        plan = replace(plan, bundle=learned, folds=folds, choices=choices)
        experiment = replace(plan, progress=report, say=console.say)
        result = estimate_cost(experiment, source.batch) if dry_run else run_experiment(experiment)
    if isinstance(result, CostEstimate):
        console.emit(result.to_json() if as_json else estimate_rows(result), as_json)
        return
    if lamp:
        answered = [sample for sample in result.samples if not per_sample(sample.method)]
        console.say(f"wrote {export_lamp(out, task.like or task.name, answered)}")
    if result.failures:
        console.say(result.failures)
    if compared := compared_words(task):
        console.say(f"ROUGE and BLEU compare {compared}")
    prices = Prices(settings.price_prompt, settings.price_completion)
    rows = tabulate(task, result.samples, prices)
    figures = [row.to_json() for row in rows]
    console.say(f"wrote {result.log.finish(figures, result.learning)}")
    if as_json:
        console.emit(figures, True)
    else:
        print_table(results_table(rows), wide=wide)


def _load(
    data: str, settings: Settings, base_url: str | None = None, bundle: "Bundle | None" = None
) -> "DataSet":
    """The data set; with a bundle an error if none of the new users has a head in it."""
    from hydra_llm.datasets.fetch import load_named

    with console.progress() as report:
        dataset = load_named(data, settings.cache / "lamp", base_url=base_url, progress=report)
    if bundle:
        bundle.check_task(dataset.task)
        new = dataset.users("test")
        missing = [user for user in new if user not in bundle.records]
        if new and missing == new:
            command = f"hydra-llm fit {data} --bundle BUNDLE"
            raise DataError(f"{data}: no new user with a head has a query: run `{command}` first")
        if missing:
            counts = f"{len(missing)} of {len(new)} new users have no head and are left out"
            console.say(f"{counts}: run `hydra-llm fit {data}` for them")
    return dataset


@dataclass(frozen=True)
class ReportFiles:
    """Files that `bench show` writes."""

    markdown: Annotated[Path | None, Option(help="Write the tables to this file.")] = None
    html: Annotated[Path | None, Option(help="Write an offline page to this file.")] = None
    answers: Annotated[bool, Option(help="Quote sampled answers in the HTML page.")] = True
    plots: Annotated[Path | None, Option(help="Write the plots (SVG) to this folder.")] = None
    slides: Annotated[Path | None, Option(help="Write figures for a talk (SVG, PNG) there.")] = None

    def write(self, reports: "list[Report]", sweeps: list[Mapping[str, Any]]) -> None:
        """Write the files whose options are given."""
        if self.markdown is not None:
            from hydra_llm.bench.report.markdown import markdown

            _write(self.markdown, markdown(reports, sweeps))
        if self.html is not None:
            from hydra_llm.bench.report.html import page

            quotes = ": it quotes the data, --no-answers leaves that out" if self.answers else ""
            _write(self.html, page(reports, self.answers, sweeps), quotes)
        if self.plots is not None:
            from hydra_llm.bench.report.plots import write

            for number, report in enumerate(reports, 1):
                below = f"{number}-{report.run.folder.name}" if len(reports) > 1 else ""
                console.say(f"wrote {write(report, self.plots / below)}")
        if self.slides is not None:
            from hydra_llm.bench.report import slides

            for file in (files := slides.write(reports, self.slides)):
                console.say(f"wrote {file}")
            if not files:
                console.say("no slide: there is no method to compare with, and no cost")


@app.command()
@opt.with_option_sets
def show(
    runs: Annotated[list[Path], Argument(help="Folders of runs, or of sweeps.")],
    files: ReportFiles,
    against: Annotated[str | None, Option(help="Baseline; default: the best prompt.")] = None,
    costs: Annotated[bool, Option("--costs", help="Also print costs.")] = False,
    by: Annotated[str | None, Option(metavar="FIELD", help=BY)] = None,
    data: Annotated[Path | None, Option(help="The data set of the runs, for --by.")] = None,
    price_prompt: Price = 0.0,
    price_completion: Price = 0.0,
    wide: opt.Wide = False,
    as_json: opt.AsJson = False,
) -> None:
    """Print runs: metrics with intervals, paired differences from a baseline, and findings."""
    from hydra_llm.bench.report import findings, groups, sweeps, tables
    from hydra_llm.bench.report.cells import share_json
    from hydra_llm.bench.report.summary import cost_rows, family_line, learning_rows, summary_line

    results = [sweeps.open_sweep(file) for file in map(sweeps.sweep_file, runs) if file]
    opened = [tables.open_run(folder) for folder in runs if not sweeps.sweep_file(folder)]
    prices = Prices(price_prompt, price_completion)
    reports = [tables.make_report(run, against, prices) for run in opened]
    over_tasks = tables.overall(reports)
    files.write(reports, results)
    of_groups = groups.of_reports(reports, by, data)
    if as_json:
        rows = [tables.to_json(report) | findings.to_json(report) for report in reports]
        for row, found in zip(rows, of_groups, strict=True):
            row |= {"by": [own.to_json() for own in found]} if by else {}
        shares = {
            method: {what: share_json(share) for what, share in of_method.items()}
            for method, of_method in over_tasks.items()
        }
        console.emit({"runs": rows, "over_tasks": shares, "sweeps": results}, True)
        return
    show_table = partial(print_table, wide=wide)
    for report, found in zip(reports, of_groups, strict=True):
        measured = report.run
        title = f"{measured.folder}: {measured.task.name}"
        if report.too_few:
            print_text(report.too_few, wide=wide)
        else:
            title += "; * best, ' second best of what is ranked"
        show_table(tables.method_rows(report), title)
        print_text(summary_line(measured), wide=wide)
        if report.comparisons:
            title = f"Paired differences from {report.baseline}"
            title += "" if report.too_few else ", 95 % intervals over users"
            show_table(tables.comparison_rows(report.comparisons, report.holm), title)
        if line := family_line(report):
            print_text(line, wide=wide)
        if costs:
            show_table(cost_rows(report), "What a query costs")
            if learning := learning_rows(report):
                show_table(learning, "What learning cost")
        for sentence in findings.findings(report):
            if sentence == report.too_few:  # said above
                continue
            print_text(f"- {sentence}", indent="  ", wide=wide)
        for own in found:
            title = f"{own.method} minus {own.baseline} by {own.field}, the worst group first"
            show_table(groups.group_rows(own), title)
            print_text(groups.gap_line(own), wide=wide)
    if over_tasks:
        show_table(tables.overall_rows(over_tasks), tables.OVERALL)
    for result in results:
        show_table(sweeps.sweep_rows(result), result["question"])


app.command()(judge)


@app.command()
def view(
    runs: Annotated[list[Path], Argument(help="Folder of a run, or of two to compare.")],
    out: Annotated[Path, Option(help="The page.")] = Path("view.html"),
    methods: Annotated[str, Option(help="Of these only, as rag@4,hydra@4,8.")] = "",
    limit: opt.Limit = None,
) -> None:
    """Write a page to look through the samples of runs; it needs no server and no network.

    It shows prompts, candidates, scores and gold, of the first `--limit` queries. It quotes the
    data.
    """
    from hydra_llm.bench.method import split_names
    from hydra_llm.bench.report import tables, viewer

    opened = [tables.open_run(folder) for folder in runs]
    text = viewer.page(opened, split_names(methods), limit)
    size = f"{len(text) / 1e6:.1f} MB"
    _write(out, text, f" ({size}): it quotes the data, do not commit or publish it")


@app.command()
def export(
    folder: Annotated[Path, Argument(metavar="RUN", help="Folder of a run.")],
    to: Annotated[Format, Option(help="The format: inspect_ai's eval logs, or LaMP's answers.")],
    out: Annotated[Path | None, Option(help="Folder of the files; default: below RUN.")] = None,
) -> None:
    """Write a run as others read it, a file per method; it quotes the data."""
    from hydra_llm.bench.export import write_inspect, write_lamp
    from hydra_llm.bench.report import tables

    write = {"inspect": write_inspect, "lamp": write_lamp}[to]
    files = write(tables.open_run(folder), out or folder / to)
    console.say(f"wrote {len(files)} files to {files[0].parent}")


def _write(file: Path, text: str, note: str = "") -> None:
    """Write a report, creating its folder, and say so."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        message = f"{file}: cannot be written ({error.strerror}): name another file"
        raise SettingsError(message) from None
    console.say(f"wrote {file}{note}")


@app.command()
@opt.with_option_sets
def sweep(
    file: Annotated[Path, Argument(help="A sweep file, as benchmarks/sweeps/*.toml.")],
    data: Data,
    out: Annotated[Path, Option(help="Folder of the sweep, one run per point; continued there.")],
    source: opt.RecordedLLM,
    options: opt.RunSettings,
    users: Users = None,
    limit: opt.Limit = None,
    plot: Annotated[Path | None, Option(help="Plot; default: OUT/sweep.svg.")] = None,
    wide: opt.Wide = False,
    as_json: opt.AsJson = False,
) -> None:
    """Run the methods of a sweep file at each of its points, print and draw the results.

    Precedence of settings: point > `--set` > sweep file. `--record` records only the LLM of
    `--llm`, not those of points. Methods that ask no LLM need no `--llm`.
    """
    if plot is not None:
        require("report", "a report")
    from hydra_llm.bench.report import sweeps
    from hydra_llm.bench.sweep import SweepContext, load_sweep, run_sweep

    main, chosen, flags = source.spec(NONE), load_sweep(file), options.given()
    varied = {name for point in chosen.points for name in NAMES.flat(point.settings)}
    for name in sorted(flags.keys() & varied):
        console.say(f"{name} is set by points of the sweep: --set counts only for the others")

    def settings(own: Mapping[str, Any]) -> Settings:
        merged = {**NAMES.flat(chosen.settings), **flags, **NAMES.flat(own)}
        return load_settings(options.preset, options.config, **merged)

    def opened(spec: str | None) -> AbstractContextManager[CachedLLM]:
        recorded = source if spec is None else opt.RecordedLLM()
        return recorded.opened(spec or main, settings({}))

    dataset = _load(data, settings({}))
    with console.progress() as report:
        context = SweepContext(
            dataset, out, settings, opened, main, users, limit, report, console.say
        )
        result = run_sweep(chosen, context)
    console.say(f"wrote {sweeps.write_sweep(result, out)}")
    try:
        drawing = sweeps.sweep_svg(result)
    except SettingsError as error:  # the extra `report` is not installed
        console.say(str(error))
    else:
        _write(plot or out / "sweep.svg", drawing)
    if as_json:
        console.emit(result, True)
    else:
        print_table(sweeps.sweep_rows(result), wide=wide)


@app.command("study", hidden=True)
@wraps(sweep)
def study(**values: Any) -> None:
    """`bench sweep` by its former name."""
    log_renamed("bench study", "bench sweep")
    sweep(**values)


@app.command()
def compare(
    first: Annotated[Path, Argument(help="Folder of a run.")],
    second: Annotated[Path, Argument(help="Folder of another run on the same data.")],
    wide: opt.Wide = False,
    as_json: opt.AsJson = False,
) -> None:
    """Print the differences of two runs per method, second minus first."""
    from hydra_llm.bench.report import tables

    comparisons = tables.compare_runs(tables.open_run(first), tables.open_run(second))
    if as_json:
        console.emit({method: own.to_json() for method, own in comparisons.items()}, True)
        return
    title = f"{second} minus {first}, 95 % intervals over users"
    print_table(tables.comparison_rows(comparisons), title, wide)
