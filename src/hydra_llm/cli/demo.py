"""`hydra-llm demo`: learn from real users and personalize a real LLM, offline."""

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hydra_llm.cli import console
from hydra_llm.cli.options import AsJson

if TYPE_CHECKING:
    from hydra_llm.types import Answer

TRAINING_USERS, NEW_USERS, QUERIES = 100, 12, 4
SETTINGS: dict[str, Any] = {
    "constrain": True,
    "max_tokens": 4,
    "k": 4,
    "retrieved": 5,
    "queries_per_user": 2,
    "labelled_users": 10,
    "samples": 8,
}


def demo(
    users: Annotated[
        int, typer.Option(min=2, help="New users; films that they rated later are the queries.")
    ] = NEW_USERS,
    seed: Annotated[int, typer.Option(help="Which users, and the seed of sampling.")] = 0,
    llm: Annotated[
        str, typer.Option("--llm", help="Any LLM; the default runs inside this process.")
    ] = "smollm2",
    as_json: AsJson = False,
) -> None:
    """What score, 1 to 5, would this person give this film? Learns from MovieLens users, then
    answers for new ones.
    """
    from hydra_llm.bench.method import DEMO, Parts, find_methods
    from hydra_llm.bench.report.cells import results_table
    from hydra_llm.bench.runner import chosen_queries, run_methods, tabulate
    from hydra_llm.config import load_settings
    from hydra_llm.datasets.demo import movielens
    from hydra_llm.llm.concurrency import run_sync
    from hydra_llm.llm.registry import open_llm
    from hydra_llm.training.api import afit, alearn

    settings = load_settings(seed=seed, **SETTINGS)
    dataset = movielens(TRAINING_USERS, users, seed)
    model = open_llm(llm, settings)

    async def everything(report: console.Report) -> tuple[Any, Any]:
        learned = await alearn(dataset, model, settings, progress=report)
        fitted = await afit(dataset, learned.bundle, model, settings=settings, progress=report)
        bundle = fitted.bundle
        parts = Parts(bundle, model, settings, bundle.records)
        queries = chosen_queries(dataset, fitted.users, QUERIES)
        samples = await run_methods(find_methods(DEMO), parts, queries, None, report)
        example = await bundle.personalizer(model).aanswer(queries[0])
        return tabulate(dataset.task, samples), example

    with console.progress() as report:
        rows, example = run_sync(partial(everything, report))
    if as_json:
        from hydra_llm.cli.ask import as_dict

        console.emit({"rows": [row.to_json() for row in rows], "example": as_dict(example)}, True)
        return
    counts = f"{TRAINING_USERS} training users, {users} new users, seed {seed}, {llm}"
    console.print_table(
        results_table(rows),
        f"MovieLens-100K, what score would this person give? {counts}; lower MAE is better",
    )
    _show(example)


def _show(answer: "Answer") -> None:
    """One worked answer: records, order, candidates, pick."""
    query = answer.proposal.query
    print(f"One answer: user {query.user}, film {query.input}; the true score is {query.gold}.")
    rows = [
        {
            "place": place,
            "record": item.record.input,
            "score": item.record.output,
            "retrieved as": item.rank + 1,
            "usefulness": item.usefulness,
        }
        for place, item in enumerate(answer.proposal.records, 1)
    ]
    console.print_table(rows, "Records as the reranker put them (the first k stand in the prompt)")
    ordered = sorted(answer.candidates, key=lambda candidate: -(candidate.score or 0.0))
    console.print_table(
        [
            {
                "candidate": c.text,
                "LLM votes": c.votes,
                "score": c.score,
                "probability": c.probability,
            }
            for c in ordered
        ],
        "Candidates",
    )
    print(f"The pick: {answer.text}")
