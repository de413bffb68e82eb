"""Write the tables of results into the pages that have their markers, `<!-- NAME -->` and
`<!-- /NAME -->`: README.md, docs/results.md and benchmarks/results/README.md.

    python tools/results_md.py [--check]

    NAME_60    the main rows of benchmarks/results/NAME_60/report.json
    overall    benchmarks/results/overall.json, over all tasks
    growth     benchmarks/results/growth.json
    small_lessons, reranker_labels    of the same name
    gateway_tower, gateway_cross    of the same name, each series with the limits of the benchmark

`--check` writes nothing and exits with 1 if a table is stale.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PLACES = (ROOT / "README.md", ROOT / "docs" / "results.md", RESULTS / "README.md")
PAGES = tuple(page for page in PLACES if page.exists())
BASELINE = "rag@4"
TYPICAL = {"accuracy": "most frequent label", "mae": "median", "rouge1": "latest text"}
"""First metric → what `user-majority` answers."""
METRICS = {
    "macro_f1": "macro-F1",
    "mae": "MAE",
    "rmse": "RMSE",
    "rouge1": "ROUGE-1",
    "rougeL": "ROUGE-L",
}
SHOWN = {
    "zero-shot": "zero-shot",
    "rag@1": "rag@1",
    "pag@4": "pag@4 (profile)",
    "rag@4": "rag@4",
    "rag-dense@4": "rag-dense@4",
    "hydra-reranker@4": "hydra-reranker@4",
    "hydra-adapter@8": "hydra-adapter@8 (no records)",
    "hydra@4,8": "**hydra@4,8**",
    "hydra@1,8": "**hydra@1,8**",
    "hydra-published@4,8": "hydra-published@4,8",
    "bbox-adapter@8": "bbox-adapter@8",
    "self-consistency@8": "self-consistency@8",
    "mbr@8": "mbr@8",
    "hydra-shared@4,8": "baseline: shared heads@4,8",
    "hydra-shared@1,8": "baseline: shared heads@1,8",
    "scorer-only": "baseline: scorer without LLM",
    "copy-nearest": "baseline: 1-NN (nearest record)",
    "user-majority": "baseline: the user's {typical}",
    "random@8": "lower bound: expected random sample",
    "oracle@8": "upper bound: best sample",
}
"""Method → its name in the table. The best prompt by the first metric is also shown."""
OVERALL = (
    "hydra@4,8",
    "hydra@1,8",
    "hydra-shared@4,8",
    "hydra-adapter@8",
    "bbox-adapter@8",
    "mbr@8",
    "self-consistency@8",
)
"""Methods in the table over all tasks, beside the best prompt-based one."""


def number(value: float, *, signed: bool = False) -> str:
    """`.810`, `−.063`; without the 0 before the point, as tables have it."""
    text = f"{abs(value):.3f}"
    sign = "−" if value < 0 and float(text) else "+" if signed else ""
    return sign + (text.removeprefix("0") if abs(value) < 1 else text)


def table(report: dict[str, Any]) -> str:
    rows = {row["method"]: row for row in report["methods"]}
    first, second = list(next(iter(rows.values()))["metrics"])[:2]
    titles = [METRICS.get(metric, metric) for metric in (first, second)]
    head = f"| method | {titles[0]} | {titles[1]} | against {BASELINE} ({titles[0]}) | users |"
    lines = [line(name, row, first, second) for name, row in chosen(rows, first)]
    return "\n".join([head, "|---|---|---|---|---|", *lines])


def chosen(rows: dict[str, Any], first: str) -> Iterator[tuple[str, dict[str, Any]]]:
    prompts = [row for row in rows.values() if row["group"] == "prompt"]
    sign = -1 if first in ("mae", "rmse") else 1
    best = max(prompts, key=lambda row: sign * row["metrics"][first][0])["method"]
    for method, title in SHOWN.items():
        if method in rows:
            note = " (the best prompt)" if method == best else ""
            yield title.format(typical=TYPICAL[first]) + note, rows[method]
        if method == "rag-dense@4" and best not in SHOWN:
            yield f"{best} (the best prompt)", rows[best]


def line(name: str, row: dict[str, Any], first: str, second: str) -> str:
    value, low, high = row["metrics"][first]
    cells = [
        name,
        f"{number(value)} [{number(low)}, {number(high)}]",
        number(row["metrics"][second][0]),
    ]
    against = row["against"]
    if against is None:
        return f"| {' | '.join([*cells, '', ''])} |"
    users = ", ".join(str(against[which]) for which in ("wins", "ties", "losses"))
    difference = interval(against["metrics"][first], "difference")
    return f"| {' | '.join([*cells, difference, users])} |"


def interval(found: dict[str, float], key: str) -> str:
    """`+.031 [−.002, +.064]`, of the values `key`, low and high."""
    value, low, high = (number(found[name], signed=True) for name in (key, "low", "high"))
    return f"{value} [{low}, {high}]"


def overall(found: dict[str, Any]) -> str:
    """Over the best prompts, mean over tasks, the best first."""
    prompts = [
        name
        for name in found
        if name.partition("@")[0]
        in ("zero-shot", "icl-random", "recent", "rag", "rag-dense", "pag")
    ]
    shown = [
        *(name for name in OVERALL if name in found),
        max(prompts, key=lambda name: found[name]["all metrics"][0]),
    ]
    lines = ["| method | all metrics | without BLEU |", "|---|---|---|"]
    for name in sorted(shown, key=lambda name: -found[name]["all metrics"][0]):
        title = SHOWN.get(name, name).removeprefix("baseline: ")
        title += " (the best prompt)" if name in prompts else ""
        shares = [percent(found[name][metrics]) for metrics in ("all metrics", "without BLEU")]
        lines.append(f"| {' | '.join([title, *shares])} |")
    return "\n".join(lines)


def percent(share: list[float]) -> str:
    """`+6.9 % [−6.0, +19.7]`."""
    value, low, high = (f"{100 * each:+.1f}".replace("-", "−") for each in share)
    return f"{value} % [{low}, {high}]"


def growth(found: dict[str, Any]) -> str:
    """Each series' exponent beside the one that is expected, and why they differ."""
    lines = [
        "| stage | in | exponent | expected | at the largest | why |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        law, last = row["law"] or {}, row["points"][-1]
        sure = f"{law['exponent']:.1f} [{law['low']:.1f}, {law['high']:.1f}]" if law else "none"
        value = (
            f"{last['median']:.3g} {row['unit']}" if row["unit"] == "s" else f"{last['median']:.0f}"
        )
        lines.append(
            f"| {row['stage']} | {row['variable']} | {sure} | {row['expected_exponent']} |"
            f" {last['size']}: {value} | {row['why'] or ''} |"
        )
    return "\n".join(lines)


def small_lessons(found: dict[str, Any]) -> str:
    """Cross-entropy and gain of the picks, by data set."""
    names = [name for name in next(iter(found.values()))["rows"] if "less" not in name]
    lines = [
        "| | " + " | ".join(f"{data}: cross-entropy | pick" for data in found) + " |",
        "|---|" + "---|---|" * len(found),
    ]
    for name in names:
        cells = [
            number(value) if (value := each["rows"][name].get(key)) else ""
            for each in found.values()
            for key in ("loss", "gain")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def reranker_labels(found: dict[str, Any]) -> str:
    """The gain of the LLM's answer with the first record of each order."""
    orders = {
        "retriever": "retriever",
        "llm": "learned from the LLM",
        "history": "learned from histories",
        "best": "best record",
    }
    lines = [
        f"| data | {' | '.join(orders.values())} | histories over the retriever | correlation |",
        "|---|" + "---|" * (len(orders) + 2),
    ]
    for name, each in found.items():
        rows, correlation = each["found"]["rows"], each["found"]["correlation"]
        cells = [number(rows[order]["gain"]) for order in orders]
        cells += [interval(rows["history"], "over_retriever"), f"{correlation:.2f}"]
        lines.append(f"| {name.removesuffix('_60')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def gateway(found: dict[str, Any]) -> str:
    """What each series of requests took, in milliseconds (`added`: less the mock's own), and the
    limits.
    """
    lines = ["| series | p50 | p99 | worst | |", "|---|---|---|---|---|"]
    for name, row in found["series"].items():
        added = "added_" if "added_p50" in row else ""
        if "p50" in row:
            cells = [f"{row[f'{added}{which}']:.1f}" for which in ("p50", "p99", "max")]
            rate = f"{row['per_s']:.0f} a second, 64 in flight" if "per_s" in row else ""
            lines.append(f"| {name} | {' | '.join(cells)} | {'added' if added else rate} |")
        else:
            counts = f"{row['answered']:.0f} answered, {row['failed']:.0f} failed"
            lines.append(f"| {name} | | | | {counts} |")
    lines += ["", "| limit | reached | asked |", "|---|---|---|"]
    for limit in found["limits"]:
        missed = "" if limit["holds"] else ", **missed**"
        bound = f"at {'least' if limit['at_least'] else 'most'} {limit['limit']:g}{missed}"
        lines.append(f"| {limit['name']} | {limit['value']:.3g} | {bound} |")
    return "\n".join(lines)


MAKERS = {
    "overall": overall,
    "growth": growth,
    "small_lessons": small_lessons,
    "reranker_labels": reranker_labels,
    "gateway_tower": gateway,
    "gateway_cross": gateway,
}
"""What makes a table of which file."""


def tables() -> dict[str, str]:
    """Every table by its marker."""
    made = {
        file.parent.name: table(json.loads(file.read_text(encoding="utf-8")))
        for file in sorted(RESULTS.glob("*_60/report.json"))
    }
    for name, shown in MAKERS.items():
        if (RESULTS / f"{name}.json").exists():
            made[name] = shown(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")))
    return made


def main() -> None:
    made, stale, marked = tables(), [], set[str]()
    for page in PAGES:
        before = text = page.read_text(encoding="utf-8")
        for name, content in made.items():
            whole = f"<!-- {name} -->\n{content}\n<!-- /{name} -->"
            text = re.sub(
                rf"<!-- {name} -->\n.*?<!-- /{name} -->",
                lambda _, whole=whole: whole,
                text,
                flags=re.S,
            )  # type: ignore[misc]
        marked |= set(re.findall(rf"<!-- (\w+_60|{'|'.join(MAKERS)}) -->", before))
        if text != before:
            stale.append(page)
            if "--check" not in sys.argv:
                page.write_text(text, encoding="utf-8")
    if marked != made.keys():
        sys.exit(
            f"markers and results differ in {', '.join(sorted(marked ^ made.keys()))}: add <!--"
            " NAME --> and <!-- /NAME -->"
        )
    if stale and "--check" in sys.argv:
        sys.exit(
            f"{', '.join(str(page.relative_to(ROOT)) for page in stale)}: not what"
            " benchmarks/results says: python tools/results_md.py"
        )


if __name__ == "__main__":
    main()
