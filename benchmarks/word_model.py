"""How well the word model ranks an LLM's samples of a text task, beside other ways to choose.

    python benchmarks/word_model.py DATA --llm SPEC [--new 12] [--limit 6] [--histories] [--set
    NAME=VALUE] [--json]

Learns a bundle from training users, fits new users, and ranks the samples of `hydra@4,8` for their
queries (`--llm replay:FILE` makes no calls). The word model comes from all training users' records,
also of those whom `--set users=N` leaves out of the rest. Prints the mean gain of each way's pick,
its correlation with the gain within a query (mean over queries), and how well the model tells the
words that the answer has (AUC over the samples' words of a query, mean over queries). `--histories`
takes training users' latest records as queries in place of new users': to choose by. The models are
then of other users.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from measure import finish, options

from hydra_llm.bench.method import Parts
from hydra_llm.bench.methods import rag
from hydra_llm.cli.options import GivenSettings
from hydra_llm.config import Settings, load_settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.datasets.native import load
from hydra_llm.history import in_order
from hydra_llm.llm.base import ChatLLM
from hydra_llm.llm.concurrency import run_sync
from hydra_llm.llm.registry import open_llm
from hydra_llm.side_features import Featurizer
from hydra_llm.text import words
from hydra_llm.training.api import fit, learn
from hydra_llm.training.labelling import training_queries
from hydra_llm.training.word_model import learn_word_model
from hydra_llm.types import Query

Scores = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """A query's samples, what each is worth, and how each way scores them."""

    gains: np.ndarray  # [C]
    votes: np.ndarray  # [C]
    scores: Scores  # of each way, [C]
    rag: float
    auc: float  # of the word model; NaN where all words, or none, are in the answer


def main() -> None:
    parser = options(__doc__, runs=1)
    parser.add_argument("data", type=Path)
    parser.add_argument("--llm", required=True)
    parser.add_argument("--new", type=int, default=12, help="new users")
    parser.add_argument("--limit", type=int, default=6, help="queries of each, the first")
    parser.add_argument("--histories", action="store_true")
    parser.add_argument("--set", action="append", metavar="NAME=VALUE")
    args = parser.parse_args()
    settings = load_settings(**GivenSettings(set_=args.set).given(seed=args.seed))
    data = load(args.data)
    llm = open_llm(args.llm, settings)
    parts, queries = learned(args, data, llm, settings)
    cases = run_sync(lambda: all_cases(parts, queries))
    report(args, cases)


def learned(
    args: argparse.Namespace, data: DataSet, llm: ChatLLM, settings: Settings
) -> tuple[Parts, list[Query]]:
    """An adapter with a word model, new users' reranker heads, and the queries. The reranker is
    learned without a word model, as that of older recordings was: the prompts are theirs.
    """
    plain = learn(data, llm, settings.model_copy(update={"word_model": False})).bundle
    reranker = {"reranker": plain.scorers["reranker"]} if plain.reranker else {}
    new = data.users("test")[: args.new]
    first = fit(data, replace(plain, scorers=reranker), llm, users=new).bundle
    models = learn_word_model({user: data.history(user) for user in data.users("train")})
    assert models is not None
    first = replace(first, word_model=models.model, word_models=models.without)
    bundle = learn(data, llm, settings, first=first).bundle
    users = bundle.trained_on[: settings.labelled_users] if args.histories else new
    records = {user: in_order(data.history(user)) for user in users}
    parts = Parts(bundle, llm, bundle.settings, records)
    if args.histories:
        most = settings.queries_per_user
        own = (training_queries(data.task, records[user], most) for user in users)
        return parts, [query for queries in own for query in queries]
    return parts, [query for user in users for query in data.queries(user)[: args.limit]]


async def all_cases(parts: Parts, queries: Sequence[Query]) -> list[Case]:
    hydra, plain = parts.personalizer(rerank=True, adapt=True, k=4), parts.with_settings(k=4)
    featurizer, cases = parts.bundle.featurizer, []
    for query in queries:
        context = hydra.context_of(query)
        proposal = await hydra.apropose(query)
        offered = [own for own in proposal.candidates if own.answer is not None]
        if not offered:
            continue
        task, gold = parts.bundle.task, query.gold or ""
        votes = np.array([own.votes for own in offered], dtype=np.float64)
        columns = featurizer.adapter(query, offered, context.vectors)
        expected = columns[:, featurizer.adapter_names.index("expected_rouge")]
        agreement = task.gain_matrix([own.text for own in offered]) @ votes / votes.sum()
        chosen, *_ = parts.bundle.pipeline().select(context, offered)
        scores = {
            "mbr": agreement,
            "expected rouge": expected,
            **{f"expected rouge + {w} mbr": expected + w * agreement for w in (0.1, 0.2, 0.5)},
            "hydra": np.array([own.score for own in chosen]),
        }
        answer = await rag.build(plain).aanswer(query)
        cases.append(
            Case(
                np.array([task.gain(own.answer, gold) for own in offered]),
                votes,
                scores,
                task.gain(answer.text, gold),
                auc_of(featurizer, query, context.vectors, [own.text for own in offered]),
            )
        )
    return cases


def auc_of(featurizer: Featurizer, query: Query, history: Any, texts: Sequence[str]) -> float:
    """Of the samples' words, how well their shares tell those of the answer."""
    from sklearn.metrics import roc_auc_score

    asked = sorted({word for text in texts for word in words(text)})
    gold = set(words(query.gold or ""))
    right = [word in gold for word in asked]
    if len(set(right)) < 2:
        return float("nan")
    shares = featurizer.word_shares(query, history)
    assert shares is not None
    return float(roc_auc_score(right, shares(asked)))


def within(case: Case, scores: np.ndarray) -> float:
    """Correlation of scores and gains; NaN where either does not differ."""
    if len(scores) < 2 or min(scores.std(), case.gains.std()) < 1e-9:
        return float("nan")
    return float(np.corrcoef(scores, case.gains)[0, 1])


def picked(case: Case, scores: np.ndarray) -> float:
    return float(case.gains[int(np.argmax(scores >= scores.max() - 1e-9))])


def report(args: argparse.Namespace, cases: Sequence[Case]) -> None:
    def mean(values: list[float]) -> float:
        return float(np.mean(values))

    rows: dict[str, dict[str, float]] = {
        "by lot": {"gain": mean([float(np.average(c.gains, weights=c.votes)) for c in cases])},
        "rag@4": {"gain": mean([case.rag for case in cases])},
        "oracle": {"gain": mean([float(case.gains.max()) for case in cases])},
    }
    for name in cases[0].scores:
        correlations = [within(case, case.scores[name]) for case in cases]
        gains = [picked(case, case.scores[name]) for case in cases]
        rows[name] = {"gain": mean(gains), "correlation": float(np.nanmean(correlations))}
    auc = float(np.nanmean([case.auc for case in cases]))
    found = {"queries": len(cases), "rows": rows, "word_auc": auc}
    lines = [f"{len(cases)} queries; AUC of words {auc:.3f}", f"{'way':<26}  gain   correlation"]
    for name, row in rows.items():
        last = f"{row['correlation']:.3f}" if "correlation" in row else "-"
        lines.append(f"{name:<26}  {row['gain']:.4f}  {last}")
    finish(args, found, lines, [])


if __name__ == "__main__":
    main()
