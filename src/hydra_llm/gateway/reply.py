"""What a reply says of how it was personalized. Knows no protocol."""

from typing import TYPE_CHECKING, Any

from hydra_llm.gateway.scoring import RankedChoices, choice_texts

if TYPE_CHECKING:
    from hydra_llm.gateway.gateway import PersonalRequest


def personalization_of(
    request: "PersonalRequest", ranked: RankedChoices, kept: bool
) -> dict[str, Any]:
    """The object `personalization` of a reply."""
    scores = [candidate.score for candidate in ranked.candidates]
    unread = "no-label" if all(score is None for score in scores) else None
    answer: dict[str, Any] = {
        "request_id": request.id if kept else None,
        "records": [record.id for record in request.prompt_records],
        "warm": request.search.warm,
        "candidates": len(ranked.candidates),
        "abstained": ranked.abstained,
        "scores": scores,
        "scores_reason": ranked.unscored or unread,
        "seconds": {stage: round(seconds, 4) for stage, seconds in request.seconds.items()},
    }
    if request.options.explain:
        answer["texts"] = choice_texts(ranked.choices[: len(ranked.candidates)])
        answer["probabilities"] = [candidate.probability for candidate in ranked.candidates]
        records = request.prompt_records
        answer["shown"] = [{"id": r.id, "input": r.input, "output": r.output} for r in records]
    return answer
