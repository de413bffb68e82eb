"""`hydra-llm data`: check a data set, import one from a file, download LaMP's."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option

from hydra_llm.cli import console
from hydra_llm.cli.options import AsJson
from hydra_llm.datasets.check import find_problems, rows, summarize
from hydra_llm.datasets.native import save
from hydra_llm.datasets.tabular import CHOICES, ChoiceColumns, Columns, read_table
from hydra_llm.datasets.verdicts import doubts, verdicts
from hydra_llm.errors import DataError
from hydra_llm.tasks.base import KINDS
from hydra_llm.text import counted

app = typer.Typer(add_completion=False, no_args_is_help=True)
KIND_HELP = f"{', '.join(KINDS.names())}; default: guessed."
OUTPUT_HELP = "Field of the user's answer; default: output, or chosen."
CHOICES_HELP = "Lines are recorded choices: one of several candidates was taken."
Split = Literal["user", "time"]
LAMP_NAMES = "lamp-1, lamp-2n (news), lamp-2m (movies), lamp-3, lamp-4, lamp-5 or lamp-7."


@app.command()
def check(
    data: Annotated[Path, Argument(help="A data set: native folder, or LaMP's files.")],
    as_json: AsJson = False,
) -> None:
    """Summarize a data set: users, records, times, labels, duplicates, leaks; or list errors."""
    dataset, problems = find_problems(data)
    if dataset is None:
        if as_json:
            described = [{**vars(problem), "message": str(problem)} for problem in problems]
            console.emit({"problems": described}, as_json)
        for problem in problems:
            console.say(f"hydra-llm: {problem}")
        raise typer.Exit(DataError.exit_code)
    summary = summarize(dataset)
    table = [{"data set": name, summary["name"]: value} for name, value in rows(summary)]
    console.emit(summary if as_json else table, as_json)


@app.command(name="import")
def import_(
    file: Annotated[Path, Argument(help="JSONL or CSV; '-' reads stdin.", allow_dash=True)],
    out: Annotated[Path, Option(help="Folder of the new data set.")],
    choices: Annotated[bool, Option("--choices", help=CHOICES_HELP)] = False,
    kind: Annotated[str | None, Option(help=KIND_HELP)] = None,
    name: Annotated[str, Option(help="Name of the task; default: the file's.")] = "",
    prompt: Annotated[str | None, Option(help="Instruction with {input} for the text.")] = None,
    user_field: Annotated[str, Option(help="Field of the user's id.")] = "user",
    input_field: Annotated[str, Option(help="Field of the text.")] = "input",
    output_field: Annotated[str | None, Option(help=OUTPUT_HELP)] = None,
    time_field: Annotated[str, Option(help="Field of the time; optional by default.")] = "time",
    id_field: Annotated[str, Option(help="Field of the record's id; optional by default.")] = "id",
    test_share: Annotated[
        float, Option(min=0, max=1, help="Each user's chance to be a new one.")
    ] = 0.33,
    query_share: Annotated[float, Option(min=0, max=1, help="Latest records as queries.")] = 0.2,
    seed: Annotated[int, Option(help="Seed of the split into training and new users.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Import a file with the columns user, input, output and, optionally, time and id; `--choices`:
    with user, input, candidates and chosen.
    """
    source = Path("/dev/stdin") if str(file) == "-" else file
    output = output_field or (CHOICES.output if choices else Columns().output)
    of = ChoiceColumns if choices else Columns
    columns = of(user_field, input_field, output, time_field, id_field)
    task: dict[str, Any] = {"kind": kind, "prompt": prompt, "name": name}
    shares: dict[str, Any] = {"test_share": test_share, "query_share": query_share}
    dataset = read_table(source, columns, **task, **shares, seed=seed)
    save(dataset, out)
    streams = (dataset.stream_history(), dataset.stream_queries())
    records, queries = (sum(1 for _ in own) for own in streams)
    summary = {
        "folder": str(out),
        "kind": dataset.task.kind,
        "labels": list(dataset.task.labels),
        "users": {split: len(dataset.users(split)) for split in ("train", "test")},
        "records": records,
        "queries": queries,
        "digest": dataset.digest,
        "notes": list(dataset.notes),
        "verdicts": [asdict(verdict) for verdict in verdicts(dataset)],
    }
    if as_json:
        console.emit(summary, as_json)
        return
    for note in dataset.notes:
        console.say(note)
    for doubt in doubts(dataset):
        console.say(f"data {doubt.severity}: {doubt}")
    entries = f"{counted(records, 'record')} and {counted(queries, 'query', 'queries')}"
    console.emit(f"wrote {entries} of {counted(len(dataset.users()), 'user')} to {out}")


@app.command()
def get(
    dataset: Annotated[str, Argument(help=LAMP_NAMES)],
    out: Annotated[Path, Option(help="Folder for the files.")],
    split: Annotated[Split, Option(help="user: new users; time: later queries.")] = "user",
    base_url: Annotated[str | None, Option(help="A mirror of LaMP's download folder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Download LaMP's official train and dev files; a stopped download is resumed."""
    from hydra_llm.datasets.fetch import fetch

    with console.progress(quiet=as_json) as report:
        files = fetch(dataset, split, out, base_url=base_url, progress=report)
    sizes = [{"file": str(file), "bytes": file.stat().st_size} for file in files]
    console.emit({"files": sizes} if as_json else sizes, as_json)
