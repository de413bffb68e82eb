"""`hydra-llm ask`."""

import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from hydra_llm.cli import console
from hydra_llm.cli.options import (
    LLM,
    AsJson,
    BundleFolder,
    RunSettings,
    Selection,
    with_option_sets,
)

if TYPE_CHECKING:
    from hydra_llm.types import Answer


@with_option_sets
def ask(
    text: Annotated[str, Argument(help="The text to answer; '-' reads standard input.")],
    bundle: BundleFolder,
    llm: LLM,
    user: Annotated[str, Option(help="Id of the user.")],
    options: RunSettings,
    selection: Selection,
    k: Annotated[int | None, Option(min=0, help="Number of records in the prompt.")] = None,
    limit: Annotated[
        int | None, Option(min=1, help="Use only this many of the user's latest records.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Answer one text for one user. `--json` prints records, their order, prompt, candidates,
    scores, usage and seconds per stage.
    """
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


def as_dict(answer: "Answer") -> dict[str, Any]:
    """All that is known of an answer."""
    proposal = answer.proposal
    return {
        "answer": answer.text,
        "user": proposal.query.user,
        "retrieved": [{"id": item.record.id, "score": item.score} for item in proposal.retrieved],
        "records": [
            {
                "id": i.record.id,
                "input": i.record.input,
                "output": i.record.output,
                "rank": i.rank,
                "score": i.score,
                "usefulness": i.usefulness,
            }
            for i in proposal.records
        ],
        "prompt": [dict(message) for message in proposal.messages],
        "candidates": [asdict(candidate) for candidate in answer.candidates],
        "chosen": answer.chosen,
        "usage": asdict(answer.usage),
        "seconds": dict(answer.seconds),
        "notes": list(proposal.notes),
    }
