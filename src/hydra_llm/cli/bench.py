"""`hydra-llm bench`: compare methods on the same users and queries."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hydra_llm.cli import console
from hydra_llm.cli.options import LLM, AsJson, BundleFolder, Limit, Seed, Set, given

if TYPE_CHECKING:
    from hydra_llm.bench.methods import Parts
    from hydra_llm.types import Query

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the methods."""
    from hydra_llm.bench.methods import METHODS

    console.emit([{"method": m.name, "group": m.group, "what": m.what} for m in METHODS.values()], as_json)


@app.command()
def run(
    data: Annotated[Path, typer.Argument(help="A data set: native folder, or LaMP's files.")],
    llm: LLM,
    bundle: BundleFolder,
    out: Annotated[Path, typer.Option(help="Folder of the run; the same command continues a stopped one.")],
    methods: Annotated[str, typer.Option(help="Names with commas, or all.")] = "all",
    users: Annotated[int | None, typer.Option(min=1, help="At most so many new users; all who have a head otherwise.")] = None,
    limit: Limit = None,
    seed: Seed = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Answer new users' queries by each method and print the table; `--limit` takes each user's first queries."""
    from hydra_llm.bench.methods import find_methods
    from hydra_llm.bench.run import as_table, run_methods, tabulate
    from hydra_llm.bench.runlog import RunLog
    from hydra_llm.llm.calls import run_sync

    chosen = find_methods([name.strip() for name in methods.split(",") if name.strip()])
    parts, queries, manifest = _planned(data, llm, bundle, users, limit, given(set_, seed=seed))
    log = RunLog(out, manifest)
    with console.progress() as report:
        samples = run_sync(partial(run_methods, chosen, parts, queries, log, report))
    rows = tabulate(parts.bundle.task, samples)
    if errors := [sample.error for sample in samples if sample.error]:
        console.say(f"{len(errors)} of {len(samples)} answers failed, the first with: {errors[0]}; the same command asks for them again")
    console.say(f"wrote {log.finish([row.to_json() for row in rows])}")
    console.emit([row.to_json() for row in rows] if as_json else as_table(rows), as_json)


def _planned(
    data: Path, llm: str, bundle: Path, users: int | None, limit: int | None, settings: dict[str, Any]
) -> "tuple[Parts, list[Query], dict[str, Any]]":
    """What the methods are built from, the queries, and the manifest that names the run."""
    from hydra_llm.bench.methods import Parts
    from hydra_llm.bench.run import chosen_queries
    from hydra_llm.bundle import OF_THIS_MACHINE, Bundle
    from hydra_llm.datasets.native import load
    from hydra_llm.errors import DataError
    from hydra_llm.llm.spec import open_llm

    dataset, loaded = load(data), Bundle.load(bundle)
    loaded.check_task(dataset.task)
    new = dataset.users("test")
    fitted = [user for user in new if user in loaded.records]
    if fitted and len(fitted) < len(new):
        console.say(f"{len(new) - len(fitted)} of {len(new)} new users have no head and are left out: run `hydra-llm fit {data}` for them")
    names = fitted[:users]
    queries = chosen_queries(dataset, names, limit)
    if not queries:
        raise DataError(f"{data}: no new user with a head has a query: run `hydra-llm fit {data} --bundle {bundle}` first")
    chosen = loaded.settings_with(**settings)
    model = open_llm(llm, chosen)
    manifest = {
        "data": dataset.digest,
        "task": dataset.task.name,
        "llm": dict(model.identity),
        "weights": loaded.weights,
        "trained_on": len(loaded.trained_on),
        "users": len(names),
        "queries": len(queries),
        "settings": chosen.model_dump(mode="json", exclude=set(OF_THIS_MACHINE)),
    }
    return Parts(loaded, model, chosen, {**loaded.records, **{name: dataset.history(name) for name in names}}), queries, manifest
