"""`hydra-llm learn` and `hydra-llm fit`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from hydra_llm.cli import console
from hydra_llm.cli import options as opt
from hydra_llm.config import Settings
from hydra_llm.errors import SettingsError

if TYPE_CHECKING:
    from hydra_llm.training.api import Learned

SHOWN_FAILURES = 5


@opt.with_option_sets
def learn(
    llm: opt.LLM,
    out: Annotated[Path, Option(help="Folder of the new bundle; an older one is replaced.")],
    options: opt.RunSettings,
    selection: opt.Selection,
    recording: opt.Recording,
    data: Annotated[Path | None, Argument(help="A native folder, or LaMP's files.")] = None,
    store: Annotated[str | None, Option(help="Learn from the gateway's database.")] = None,
    task: Annotated[Path | None, Option(help="task.json for --store; default: free text.")] = None,
    limit: opt.Limit = None,
    as_json: opt.AsJson = False,
) -> None:
    """Learn a bundle from the training users of a data set, or from all users of a store; `--limit`
    takes the first. A stopped command continues where it was.
    """
    from hydra_llm.training.api import learn as run

    settings = options.settings(users=limit, **vars(selection))
    if (data is None) == (store is None):
        raise SettingsError("give one of a data set and --store")
    if store is not None:
        learned = _learn_from_store(store, llm, settings, out, task)
    elif data is not None:
        with recording.opened(llm, settings) as model, console.progress() as report:
            learned = run(data, model, settings, out=out, progress=report)
    _print_learned(learned, out, as_json)


def _learn_from_store(
    store: str, llm: str, settings: Settings, out: Path, task: Path | None
) -> "Learned":
    """Learn with a temporary cache of LLM answers: they quote users, who may be deleted later."""
    from hydra_llm.gateway.store_training import learn_from_store
    from hydra_llm.llm.concurrency import run_sync
    from hydra_llm.llm.registry import bare_llm, wrap

    answers = out.with_name(f"{out.name}.answers.sqlite")
    model = wrap(bare_llm(llm, settings), settings, answers)
    with console.progress() as report:
        learned = learn_from_store(store, model, settings, out, task=task, progress=report)
    run_sync(model.aclose)
    for end in ("", "-wal", "-shm"):
        answers.with_name(f"{answers.name}{end}").unlink(missing_ok=True)
    return learned


@opt.with_option_sets
def fit(
    data: Annotated[Path, Argument(help="A data set with the users' histories.")],
    bundle: opt.BundleFolder,
    llm: opt.LLM,
    options: opt.RunSettings,
    recording: opt.Recording,
    user: Annotated[list[str] | None, Option(help="Id; repeatable; default: split 'test'.")] = None,
    limit: opt.Limit = None,
    as_json: opt.AsJson = False,
) -> None:
    """Fit heads of new users; shared weights stay as they are. `--limit` takes the first users."""
    from hydra_llm.datasets.native import load
    from hydra_llm.training.api import fit as run

    loaded, settings = options.open_bundle(bundle)
    dataset = load(data)
    users = (user or dataset.users("test"))[:limit]
    with recording.opened(llm, settings) as model, console.progress() as report:
        learned = run(dataset, loaded, model, users=users, settings=settings, progress=report)
    learned.bundle.save(bundle)
    _print_learned(learned, bundle, as_json)


def _print_learned(learned: "Learned", folder: Path, as_json: bool) -> None:
    for note in learned.notes:
        console.say(note)
    for failure in learned.failures[:SHOWN_FAILURES]:
        console.say(f"left out: {failure}")
    if (more := len(learned.failures) - SHOWN_FAILURES) > 0:
        console.say(f"left out: {more} more")
    summary: dict[str, Any] = {
        "bundle": str(folder),
        "users": len(learned.users),
        "llm_calls": learned.usage.calls,
        "llm_calls_cached": learned.usage.cached,
        "failed": len(learned.failures),
        "seconds": {stage: round(seconds, 3) for stage, seconds in learned.seconds.items()},
    }
    if as_json:
        summary["report"] = learned.bundle.report
        summary |= {"failures": learned.failures, "notes": learned.notes}
    console.emit(summary, as_json)
