"""`hydra-llm learn`, `fit` and `ask`: learn a bundle, add users to it, answer with it."""

import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from hydra_llm import ranks
from hydra_llm.cli import console
from hydra_llm.cli import options as opt
from hydra_llm.errors import SettingsError
from hydra_llm.extras import require
from hydra_llm.llm.concurrency import run_sync
from hydra_llm.llm.none import NONE
from hydra_llm.llm.registry import bare_llm, check_spec, open_llm, wrap
from hydra_llm.types import Answer, Candidate, Overlaid, as_one_text

if TYPE_CHECKING:
    from hydra_llm.config import Settings
    from hydra_llm.reasons import Reasons
    from hydra_llm.training.learned import Learned

SHOWN_FAILURES = 5
SHOWN_REASONS, REASON_WIDTH = 8, 70  # parts and records for people, and characters of a record


@opt.with_option_sets
def learn(
    out: Annotated[Path, Option(help="Folder of the new bundle; an older one is replaced.")],
    options: opt.LearnSettings,
    selection: opt.Selection,
    recording: opt.Recording,
    llm: opt.LearnLLM = NONE,
    data: Annotated[Path | None, Argument(help="A native folder, or LaMP's files.")] = None,
    store: Annotated[str | None, Option(help="Learn from the gateway's database.")] = None,
    task: Annotated[Path | None, Option(help="task.json for --store; default: free text.")] = None,
    dp_epsilon: Annotated[float | None, Option(help="Differential privacy per user: ε.")] = None,
    dp_delta: Annotated[float | None, Option(help="δ of it; default: 1 / users^1.1.")] = None,
    limit: opt.Limit = None,
    as_json: opt.AsJson = False,
) -> None:
    """Learn a bundle from the training users of a data set, or from all users of a store; `--limit`
    takes the first. A stopped command continues where it was. Recorded choices need no `--llm`.
    `accelerate launch --multi_gpu --num_processes N -m hydra_llm learn ...` shares gradient steps.
    """
    if ranks.follows():
        return
    check_spec(llm)
    if dp_epsilon is not None:
        require("privacy", "--dp-epsilon")
    from hydra_llm.training.api import learn as run
    from hydra_llm.training.train_scorer import sgd_config

    privacy = {"dp_epsilon": dp_epsilon, "dp_delta": dp_delta}
    settings = options.settings(users=limit, **privacy, **vars(selection))
    steps = sgd_config(settings).epochs > 0
    with ranks.leading(settings.engine, steps=steps, say=console.say):
        if data is not None and store is None:
            with recording.opened(llm, settings) as model, console.progress() as report:
                learned = run(data, model, settings, out=out, progress=report, warn=console.say)
        elif store is not None and data is None:
            learned = _from_store(store, settings, out, llm, task, recording)
        else:
            raise SettingsError("give one of a data set and --store")
    _print_learned(learned, out, as_json)


def _from_store(
    store: str,
    settings: "Settings",
    out: Path,
    llm: str,
    task: Path | None,
    recording: opt.Recording,
) -> "Learned":
    """Learn from all users of a store."""
    from hydra_llm.gateway.spend import count_learning
    from hydra_llm.gateway.store_training import learn_from_store

    if recording.batch:
        raise SettingsError("--store asks directly: leave --batch out")
    with opt.open_store(store):
        pass  # it is there: before a file is made
    # A temporary cache of LLM answers: they quote users, who may be deleted later.
    answers = out.with_name(f"{out.name}.answers.sqlite")
    model = wrap(bare_llm(llm, settings), settings, answers)
    try:
        with console.progress() as report:
            learned = learn_from_store(store, model, settings, out, task, report, console.say)
    finally:
        with opt.open_store(store) as opened:
            count_learning(opened, model, settings)
    run_sync(model.aclose)
    for end in ("", "-wal", "-shm"):
        answers.with_name(f"{answers.name}{end}").unlink(missing_ok=True)
    return learned


@opt.with_option_sets
def fit(
    data: Annotated[Path, Argument(help="A data set with the users' histories.")],
    bundle: opt.BundleFolder,
    options: opt.LearnSettings,
    recording: opt.Recording,
    llm: opt.LearnLLM = NONE,
    user: Annotated[list[str] | None, Option(help="Id; repeatable; default: split 'test'.")] = None,
    limit: opt.Limit = None,
    as_json: opt.AsJson = False,
) -> None:
    """Fit heads of new users; shared weights stay as they are. `--limit` takes the first users."""
    check_spec(llm)
    from hydra_llm.datasets.native import load
    from hydra_llm.training.api import fit as run

    loaded, settings = options.open_bundle(bundle)
    dataset = load(data)
    users = (user or dataset.users("test"))[:limit]
    with recording.opened(llm, settings) as model, console.progress() as report:
        learned = run(dataset, loaded, model, users=users, settings=settings, progress=report)
    learned.bundle.save_users(bundle, learned.users)
    _print_learned(learned, bundle, as_json)


def _print_learned(learned: "Learned", folder: Path, as_json: bool) -> None:
    for note in learned.notes:
        console.say(note)
    for failure in learned.failures[:SHOWN_FAILURES]:
        console.say(f"left out: {failure}")
    if (more := len(learned.failures) - SHOWN_FAILURES) > 0:
        console.say(f"left out: {more} more")
    solved = {stage: round(seconds, 4) for stage, seconds in learned.solved.items()}
    summary: dict[str, Any] = {
        "bundle": str(folder),
        "users": len(learned.users),
        "llm_calls": learned.usage.calls,
        "llm_calls_cached": learned.usage.cached,
        "failed": len(learned.failures),
        "seconds": {stage: round(seconds, 3) for stage, seconds in learned.seconds.items()},
        **({"seconds_of_the_solver": solved} if solved else {}),
    }
    if privacy := learned.bundle.report.get("privacy"):
        summary["privacy"] = privacy
    if as_json:
        summary["report"] = learned.bundle.report
        summary |= {"failures": learned.failures, "notes": learned.notes}
    console.emit(summary, as_json)


@opt.with_option_sets
def ask(
    text: Annotated[str, Argument(help="The text to answer; '-' reads standard input.")],
    bundle: opt.BundleFolder,
    llm: opt.LLM,
    user: Annotated[str, Option(help="Id of the user.")],
    options: opt.RunSettings,
    selection: opt.Selection,
    private: opt.Private = False,
    k: Annotated[int | None, Option(min=0, help="Number of records in the prompt.")] = None,
    limit: Annotated[int | None, Option(min=1, help="Max number of latest records.")] = None,
    why: Annotated[bool, Option("--why", help="Say why the adapter picked the answer.")] = False,
    as_json: opt.AsJson = False,
) -> None:
    """Answer one text for one user. `--json` adds records, prompt, candidates, scores and costs."""
    check_spec(llm)
    from hydra_llm.reasons import why as reasons_of
    from hydra_llm.training.encode import encode_histories
    from hydra_llm.training.leave_out import refit_of

    if private and k:
        raise SettingsError("--private: no record is in the prompt: leave -k out")
    given = {"k": k, "private": private or None, **vars(selection)}
    loaded, settings = options.open_bundle(bundle, **given)
    with console.progress(quiet=as_json) as report:
        records = loaded.records.get(user, ())[-(limit or 0) :]
        encode_histories(loaded, records, report, ranks=loaded.reranker is not None)
    personalizer = loaded.personalizer(open_llm(llm, settings), settings)
    if limit is not None and user in loaded.records:
        latest = Overlaid({user: loaded.records[user][-limit:]}, loaded.records)
        personalizer = replace(personalizer, records=latest)
    answer = personalizer.answer(sys.stdin.read().strip() if text == "-" else text, user=user)
    for note in answer.proposal.notes:
        console.say(note)
    reasons = reasons_of(personalizer, answer, refit_of(loaded)) if why else None
    if as_json:
        told = {"why": reasons and reasons.to_json()} if why else {}
        console.emit({**as_dict(answer), **told}, as_json)
        return
    console.emit(answer.text)
    if why:
        console.emit("\n".join(reason_lines(reasons)))


def as_dict(answer: Answer) -> dict[str, Any]:
    """All that is known of an answer."""
    proposal = answer.proposal
    return {
        "answer": answer.text,
        "user": proposal.query.user,
        "retrieved": [{"id": item.record.id, "score": item.score} for item in proposal.retrieved],
        "records": [
            {name: getattr(item.record, name) for name in ("id", "input", "output")}
            | {name: getattr(item, name) for name in ("rank", "score", "usefulness")}
            for item in proposal.records
        ],
        "prompt": [dict(message) for message in proposal.messages],
        "candidates": [asdict(candidate) for candidate in answer.candidates],
        "chosen": answer.chosen,
        "usage": answer.usage.to_json(),
        "seconds": dict(answer.seconds),
        "notes": list(proposal.notes),
    }


def reason_lines(reasons: "Reasons | None") -> Iterator[str]:
    """The same for people: what weighs most."""
    from hydra_llm.reasons import in_words

    if reasons is None:
        yield "why: no adapter decided between two answers"
        return
    yield f"why: {_short(reasons.pick)} leads {_short(reasons.runner_up)} by {reasons.lead:.2f}"
    for name, value in in_words(reasons.parts).items():
        yield f"{value:+9.2f}  {name}"
    for weight in [own for own in reasons.records if own.lead > 0][:SHOWN_REASONS]:
        text = as_one_text(weight.record.input, weight.record.output)
        yield f"{weight.lead:+9.2f}  record {weight.record.id}: {shorten(text, REASON_WIDTH)}"
    if reasons.needed:
        named = ", ".join(record.id for record in reasons.needed)
        yield f"without these records another answer is picked: {named}"


def _short(candidate: Candidate) -> str:
    return repr(shorten(candidate.answer or candidate.text, 30))
