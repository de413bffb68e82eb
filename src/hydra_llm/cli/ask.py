"""`hydra-llm ask`."""

import sys
from dataclasses import asdict, replace
from typing import Annotated, Any

from typer import Argument, Option

from hydra_llm.cli import console
from hydra_llm.cli import options as opt
from hydra_llm.types import Answer


@opt.with_option_sets
def ask(
    text: Annotated[str, Argument(help="The text to answer; '-' reads standard input.")],
    bundle: opt.BundleFolder,
    llm: opt.LLM,
    user: Annotated[str, Option(help="Id of the user.")],
    options: opt.RunSettings,
    selection: opt.Selection,
    k: Annotated[int | None, Option(min=0, help="Number of records in the prompt.")] = None,
    limit: Annotated[int | None, Option(min=1, help="Max number of latest records.")] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Answer one text for one user. `--json` adds records, prompt, candidates, scores and costs."""
    from hydra_llm.llm.registry import open_llm

    loaded, settings = options.open_bundle(bundle, k=k, **vars(selection))
    personalizer = loaded.personalizer(open_llm(llm, settings), settings)
    if limit is not None and user in loaded.records:
        latest = {**loaded.records, user: loaded.records[user][-limit:]}
        personalizer = replace(personalizer, records=latest)
    answer = personalizer.answer(sys.stdin.read().strip() if text == "-" else text, user=user)
    for note in answer.proposal.notes:
        console.say(note)
    console.emit(as_dict(answer) if as_json else answer.text, as_json)


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
        "usage": asdict(answer.usage),
        "seconds": dict(answer.seconds),
        "notes": list(proposal.notes),
    }
