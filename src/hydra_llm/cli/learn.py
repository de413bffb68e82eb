"""`hydra-llm learn` and `hydra-llm fit`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hydra_llm.cli import console
from hydra_llm.cli.options import (
    LLM,
    AsJson,
    BundleFolder,
    Candidates,
    Config,
    Limit,
    Preset,
    Record,
    Seed,
    Select,
    Set,
    open_bundle,
    opened_llm,
    settings_of,
)

if TYPE_CHECKING:
    from hydra_llm.config import Settings
    from hydra_llm.training.api import Learned


def learn(
    llm: LLM,
    out: Annotated[
        Path,
        typer.Option(
            help=(
                "Folder of the new bundle; an older one there is replaced when this one is"
                " complete."
            )
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Argument(help="A data set: native folder, or LaMP's files; or give --store."),
    ] = None,
    store: Annotated[
        str | None, typer.Option(help="The gateway's database: learn from all users that it holds.")
    ] = None,
    task: Annotated[
        Path | None,
        typer.Option(
            help="With --store: a task.json that says what is answered; else texts of any kind."
        ),
    ] = None,
    limit: Limit = None,
    seed: Seed = None,
    preset: Preset = None,
    config: Config = None,
    set_: Set = None,
    candidates: Candidates = None,
    select: Select = None,
    record: Record = None,
    as_json: AsJson = False,
) -> None:
    """Learn a bundle from a data set's training users, or from a store's users; `--limit` takes the
    first. A repeat continues.
    """
    from hydra_llm.errors import SettingsError
    from hydra_llm.training.api import learn as run

    settings = settings_of(
        preset, config, set_, seed=seed, users=limit, candidates=candidates, select=select
    )
    if (data is None) == (store is None):
        raise SettingsError("give one of a data set and --store")
    if store is not None:
        learned = _learn_from_store(store, llm, settings, out, task)
    elif data is not None:
        with opened_llm(llm, settings, record) as model, console.progress() as report:
            learned = run(data, model, settings, out=out, progress=report)
    _tell(learned, out, as_json)


def _learn_from_store(
    store: str, llm: str, settings: "Settings", out: Path, task: Path | None
) -> "Learned":
    """The LLM's answers are kept in a file of their own until the bundle is there: they quote
    users, who may be deleted later.
    """
    from hydra_llm.gateway.store_training import learn_from_store
    from hydra_llm.llm.concurrency import run_sync
    from hydra_llm.llm.registry import bare_llm, wrap

    answers = out.with_name(f"{out.name}.answers.sqlite")
    model = wrap(bare_llm(llm, settings), settings, answers)
    with console.progress() as report:
        learned = learn_from_store(store, model, settings, out, task=task, progress=report)
    run_sync(model.aclose)
    for file in (answers, *(answers.with_name(f"{answers.name}{end}") for end in ("-wal", "-shm"))):
        file.unlink(missing_ok=True)
    return learned


def fit(
    data: Annotated[Path, typer.Argument(help="A data set that has the users' histories.")],
    bundle: BundleFolder,
    llm: LLM,
    user: Annotated[
        list[str] | None,
        typer.Option(help="A user to fit; may be repeated. Without it all users of split 'test'."),
    ] = None,
    limit: Limit = None,
    seed: Seed = None,
    preset: Preset = None,
    config: Config = None,
    set_: Set = None,
    record: Record = None,
    as_json: AsJson = False,
) -> None:
    """Fit the heads of new users; nothing shared changes. `--limit` takes the first users."""
    from hydra_llm.datasets.native import load
    from hydra_llm.training.api import fit as run

    loaded, settings = open_bundle(bundle, preset, config, set_, seed=seed)
    dataset = load(data)
    users = (user or dataset.users("test"))[:limit]
    with opened_llm(llm, settings, record) as model, console.progress() as report:
        learned = run(dataset, loaded, model, users=users, settings=settings, progress=report)
    learned.bundle.save(bundle)
    _tell(learned, bundle, as_json)


def _tell(learned: "Learned", folder: Path, as_json: bool) -> None:
    for note in learned.notes:
        console.say(note)
    for failure in learned.failures[:5]:
        console.say(f"left out: {failure}")
    if len(learned.failures) > 5:
        console.say(f"left out: {len(learned.failures) - 5} more")
    summary: dict[str, Any] = {
        "bundle": str(folder),
        "users": len(learned.users),
        "llm_calls": learned.usage.calls,
        "llm_calls_cached": learned.usage.cached,
        "failed": len(learned.failures),
        "seconds": {stage: round(seconds, 3) for stage, seconds in learned.seconds.items()},
    }
    if as_json:
        summary |= {
            "report": learned.bundle.report,
            "failures": learned.failures,
            "notes": learned.notes,
        }
    console.emit(summary, as_json)
