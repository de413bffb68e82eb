"""`hydra-llm ask`."""

import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hydra_llm.cli import console
from hydra_llm.cli.options import (
    LLM,
    AsJson,
    BundleFolder,
    Candidates,
    Config,
    Preset,
    Seed,
    Select,
    Set,
    open_bundle,
)

if TYPE_CHECKING:
    from hydra_llm.types import Answer


def ask(
    text: Annotated[str, typer.Argument(help="What to answer; '-' reads standard input.")],
    bundle: BundleFolder,
    llm: LLM,
    user: Annotated[str, typer.Option(help="For whom.")],
    k: Annotated[int | None, typer.Option(min=0, help="Records in the prompt.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the user's latest so many records are seen.")
    ] = None,
    seed: Seed = None,
    preset: Preset = None,
    config: Config = None,
    candidates: Candidates = None,
    select: Select = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Answer one text for one user. `--json` gives records, order, prompt, candidates, scores,
    usage and seconds per stage.
    """
    from hydra_llm.llm.registry import open_llm

    loaded, settings = open_bundle(
        bundle, preset, config, set_, k=k, seed=seed, candidates=candidates, select=select
    )
    personalizer = loaded.personalizer(open_llm(llm, settings), settings)
    if limit is not None and user in loaded.records:
        personalizer = replace(
            personalizer, records={**loaded.records, user: loaded.records[user][-limit:]}
        )
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
