"""`hydra-llm demo`: learn from real users and personalize a real LLM, offline."""

from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from hydra_llm.cli import console
from hydra_llm.cli.options import AsJson
from hydra_llm.cli.table import print_table
from hydra_llm.extras import require
from hydra_llm.llm.registry import check_spec
from hydra_llm.types import Answer

if TYPE_CHECKING:
    from hydra_llm.bench.results import MethodResult

TRAINING_USERS, NEW_USERS, QUERIES = 100, 12, 4
SETTINGS: dict[str, Any] = {"constrain": True, "max_tokens": 4, "samples": 8}
SETTINGS |= {"k": 4, "retrieved": 5, "queries_per_user": 2, "labelled_users": 10}


def demo(
    users: Annotated[int, Option(min=2, help="Number of new users.")] = NEW_USERS,
    seed: Annotated[int, Option(help="Seed of the choice of users and of sampling.")] = 0,
    llm: Annotated[str, Option("--llm", help="Any LLM; the default is embedded.")] = "smollm2",
    as_json: AsJson = False,
) -> None:
    """Predict ratings of films, 1 to 5: learn from MovieLens users, then answer for new ones."""
    check_spec(llm)
    if llm == "smollm2":
        require("demo", "the demo")  # all that it needs at once
    from hydra_llm.bench.report.tables import results_table
    from hydra_llm.llm.concurrency import run_sync

    with console.progress() as report:
        rows, example = run_sync(lambda: _run(users, seed, llm, report))
    if as_json:
        from hydra_llm.cli.learn import as_dict

        console.emit({"rows": [row.to_json() for row in rows], "example": as_dict(example)}, True)
        return
    counts = f"{TRAINING_USERS} training users, {users} new users, seed {seed}, {llm}"
    title = f"MovieLens-100K, what score would this person give? {counts}; lower MAE is better"
    print_table(results_table(rows), title)
    query = example.proposal.query
    print(f"One answer: user {query.user}, film {query.input}; the true score is {query.gold}.")
    records: list[dict[str, Any]] = []
    for rank, item in enumerate(example.proposal.records, 1):
        record = {"rank": rank, "record": item.record.input, "score": item.record.output}
        records.append({**record, "retrieved as": item.rank + 1, "usefulness": item.usefulness})
    print_table(records, "Records in the reranker's order (the first k are in the prompt)")
    candidates = [
        {"candidate": c.text, "LLM votes": c.votes, "score": c.score, "probability": c.probability}
        for c in sorted(example.candidates, key=lambda candidate: -(candidate.score or 0.0))
    ]
    print_table(candidates, "Candidates")
    print(f"The pick: {example.text}")
    right = "right" if example.text == query.gold else "wrong"
    why = "it has the least expected error by these probabilities, whichever is the likeliest"
    print(f"({right}; {why}. The table counts all {rows[0].queries} answers of each method.)")


async def _run(
    users: int, seed: int, llm: str, report: console.Report
) -> "tuple[list[MethodResult], Answer]":
    """The result of each method, and one worked answer."""
    from hydra_llm.bench.experiment import chosen_queries, run_methods
    from hydra_llm.bench.method import DEMO, Parts, find_methods
    from hydra_llm.bench.results import tabulate
    from hydra_llm.config import load_settings
    from hydra_llm.datasets.demo import movielens
    from hydra_llm.llm.registry import open_llm
    from hydra_llm.training.api import afit, alearn

    settings = load_settings(seed=seed, **SETTINGS)
    dataset, model = movielens(TRAINING_USERS, users, seed), open_llm(llm, settings)
    learned = await alearn(dataset, model, settings, progress=report)
    fitted = await afit(dataset, learned.bundle, model, settings=settings, progress=report)
    parts = Parts(fitted.bundle, model, settings, fitted.bundle.records)
    queries = chosen_queries(dataset, fitted.users, QUERIES)
    samples = await run_methods(find_methods(DEMO), parts, queries, None, report)
    example = await fitted.bundle.personalizer(model).aanswer(queries[0])
    return tabulate(dataset.task, samples), example
