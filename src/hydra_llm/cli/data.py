"""`hydra-llm data`: look at a data set, make one of a user's own file, download LaMP's."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hydra_llm.cli import console
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.errors import DataError
from hydra_llm.tasks.base import KINDS

app = typer.Typer(add_completion=False, no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Split(StrEnum):
    """LaMP's two ways to separate training from evaluation."""

    user = "user"
    time = "time"


@app.command()
def check(
    data: Annotated[Path, typer.Argument(help="A data set: native folder, or LaMP's files.")],
    as_json: AsJson = False,
) -> None:
    """Print what is in a data set: users, records, spans, label shares, duplicates, leaks; or what
    is broken in it.
    """
    from hydra_llm.datasets.check import find_problems, rows, summarize

    dataset, problems = find_problems(data)
    if dataset is None:
        _tell_problems(problems, as_json)
        raise typer.Exit(DataError.exit_code)
    summary = summarize(dataset)
    console.emit(
        (
            summary
            if as_json
            else [{"data set": name, summary["name"]: value} for name, value in rows(summary)]
        ),
        as_json,
    )


@app.command(name="import")
def import_(
    file: Annotated[
        Path,
        typer.Argument(
            help="JSONL or CSV, one record a line; '-' reads standard input.", allow_dash=True
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the new data set.")],
    kind: Annotated[
        str | None, typer.Option(help=f"{', '.join(KINDS.names())}; guessed if not given.")
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the task; the file's if not given.")] = "",
    prompt: Annotated[
        str | None, typer.Option(help="The instruction, with {input} where the text goes.")
    ] = None,
    user_field: Annotated[str, typer.Option(help="Field of the user's name.")] = "user",
    input_field: Annotated[str, typer.Option(help="Field of the text.")] = "input",
    output_field: Annotated[str, typer.Option(help="Field of the user's answer.")] = "output",
    time_field: Annotated[
        str, typer.Option(help="Field of the time; may be missing unless named.")
    ] = "time",
    id_field: Annotated[
        str, typer.Option(help="Field of the record's id; may be missing unless named.")
    ] = "id",
    test_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of users who are new users.")
    ] = 0.33,
    query_share: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Share of a user's records, the last ones, that become queries."
        ),
    ] = 0.2,
    seed: Annotated[int, typer.Option(help="Which users are new users.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Make a data set of a file of your own: columns user, input, output, and if you have them time
    and id.
    """
    from hydra_llm.datasets.native import save
    from hydra_llm.datasets.tabular import Columns, read_table

    columns = Columns(user_field, input_field, output_field, time_field, id_field)
    dataset = read_table(
        Path("/dev/stdin") if str(file) == "-" else file,
        columns,
        kind=_kind(kind),
        prompt=prompt,
        name=name,
        test_share=test_share,
        query_share=query_share,
        seed=seed,
    )
    save(dataset, out)
    _tell_made(dataset, out, as_json)


@app.command()
def get(
    dataset: Annotated[
        str,
        typer.Argument(
            help="lamp-1, lamp-2n (news), lamp-2m (movies), lamp-3, lamp-4, lamp-5 or lamp-7."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the files.")],
    split: Annotated[
        Split, typer.Option(help="New users (user) or later questions of the same users (time).")
    ] = Split.user,
    base_url: Annotated[
        str | None, typer.Option(help="A mirror of LaMP's download folder.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Download LaMP's official train and dev files; a broken download goes on where it was."""
    from hydra_llm.datasets.fetch import BASE_URL, fetch

    with console.progress(quiet=as_json) as report:
        files = fetch(dataset, split.value, out, base_url=base_url or BASE_URL, progress=report)
    sizes = [{"file": str(file), "bytes": file.stat().st_size} for file in files]
    console.emit({"files": sizes} if as_json else sizes, as_json)


def _kind(given: str | None) -> str | None:
    if given is not None:
        KINDS.load(given)
    return given


def _tell_problems(problems: Sequence[DataError], as_json: bool) -> None:
    if as_json:
        rows = [
            {
                "file": str(p.file) if p.file else None,
                "line": p.line,
                "field": p.field,
                "message": str(p),
            }
            for p in problems
        ]
        console.emit({"problems": rows}, as_json)
    for problem in problems:
        console.say(f"hydra-llm: {problem}")


def _tell_made(dataset: DataSet, out: Path, as_json: bool) -> None:
    made = {
        "folder": str(out),
        "kind": dataset.task.kind,
        "labels": list(dataset.task.labels),
        "users": {split: len(dataset.users(split)) for split in ("train", "test")},
        "records": sum(1 for _ in dataset.stream_history()),
        "queries": sum(1 for _ in dataset.stream_queries()),
        "digest": dataset.digest,
        "notes": list(dataset.notes),
    }
    if as_json:
        console.emit(made, as_json)
        return
    for note in dataset.notes:
        console.say(note)
    console.emit(
        f"{made['records']} records and {made['queries']} queries of {len(dataset.users())} users"
        f" written to {out}"
    )
