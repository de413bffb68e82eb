"""How far an LLM judge agrees with people: recorded choices, each in both orders.

    python benchmarks/judge.py DATA/suggestion [--limit 40] [--seed 0] [--json] [--out FILE]
        [--llm gguf:MODEL --record FILE | --llm replay:FILE]

Of each of `--limit` choices of new users the judge reads what was taken and one of the candidates
that were left, with a rubric that it has written from the person's earlier choices
(bench/judge.py). Users take turns. A choice costs two calls, a user one more; a stopped run
continues. Beside it, on the same choices and on all choices against each candidate that was left,
what rules reach that read no taste: the longer text, the one shown first. Without `--llm` the rules
alone are measured.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from measure import finish, options

from hydra_llm.bench.judge import Case, Judge, choice_cases, judged, mean, score
from hydra_llm.bench.stats import interval
from hydra_llm.cli.options import Recording
from hydra_llm.config import load_settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.datasets.native import load
from hydra_llm.llm.concurrency import run_sync
from hydra_llm.text import length

Rule = Callable[[Case, str], float]
"""A case and one of its texts → how much the rule prefers it."""
RULES: dict[str, Rule] = {
    "the longer one": lambda case, text: length(text),
    "the one shown first": lambda case, text: -case.query.offered.index(text),
}


def main() -> None:
    parser = options(__doc__, runs=1)
    parser.add_argument("data", type=Path)
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--llm")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--cache", type=Path, help="folder of the LLM's cached answers")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    data = load(args.data)
    few = choice_cases(data, args.limit, args.seed)
    rows = {"all choices": rules(every_pair(data)), "the judged choices": rules(few)}
    result: dict[str, Any] = {"rules": rows, "judge": None}
    if args.llm:
        result["judge"] = by_llm(few, data, args)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    finish(args, result, list(lines(result)), [])


def every_pair(data: DataSet) -> list[Case]:
    """New users' choices, each against every candidate that was left."""
    cases = []
    for user in data.users("test"):
        for query in data.queries(user):
            taken = query.gold or ""
            left = [text for text in query.offered if text != taken]
            cases += [Case(query, (), taken, text) for text in left]
    return cases


def rules(cases: Sequence[Case]) -> dict[str, Any]:
    """How often each rule prefers what was taken, with its interval over users."""
    users = [case.query.user for case in cases]
    counts: dict[str, Any] = {"pairs": len(cases), "users": len(set(users))}
    for name, rule in RULES.items():
        pairs = [(rule(case, case.own), rule(case, case.other)) for case in cases]
        values = [0.5 if own == other else float(own > other) for own, other in pairs]
        counts[name] = [round(own, 4) for own in (mean(values), *interval(values, users))]
    return counts


def by_llm(cases: Sequence[Case], data: DataSet, args: Any) -> dict[str, Any]:
    given = {"cache": args.cache} if args.cache else {}
    settings = load_settings(seed=args.seed, **given)
    with Recording(record=args.record).opened(args.llm, settings) as llm:
        judge = Judge(llm, settings, data.task.prompt)
        verdicts = run_sync(partial(judged, judge, cases, print_progress))
        return {"llm": dict(llm.identity), **score(verdicts).to_json()}


def print_progress(stage: str, done: int, total: int) -> None:
    if done % 10 == 0:
        print(f"{stage} {done}/{total}", flush=True)


def lines(result: dict[str, Any]) -> list[str]:
    out = []
    for name, row in result["rules"].items():
        for rule in RULES:
            value, low, high = row[rule]
            out.append(f"{name}, {row['pairs']} pairs: {rule} {value:.3f} [{low:.3f}, {high:.3f}]")
    if own := result["judge"]:
        low, high = own["rate_interval"]
        agrees = f"{own['rate']:.3f} [{low:.3f}, {high:.3f}]"
        out.append(
            f"judge {own['llm']['model']}, {own['cases']} choices of {own['users']} users: agrees"
            f" with people {agrees}; took the first shown {own['shown_first']:.3f}, same in both"
            f" orders {own['consistent']:.3f}, {own['failed']} failed, {own['unread']} unread"
        )
    return out


if __name__ == "__main__":
    main()
