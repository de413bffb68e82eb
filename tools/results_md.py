"""Write the tables of the committed results into README.md, docs/results.md and
benchmarks/results/README.md, between the markers `<!-- NAME -->` and `<!-- /NAME -->`.

    python tools/results_md.py [--check]

    NAME                           main rows of benchmarks/results/NAME/report.json
    controls                       the paired differences in the reports of the runs by folds
    full_size                      the runs of `scorer-only` without an LLM
    grey_box                       the runs whose names end in `_strict`, beside the others
    overall, growth, few_groups, install,
    reranker_labels, gateway_tower,
    gateway_cross                  benchmarks/results/NAME.json

`--check` writes nothing and exits with 1 if a table is stale.
"""

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md", RESULTS / "README.md")
BASELINE = "rag@4"
TYPICAL = {"accuracy": "most frequent label", "mae": "median", "rouge1": "latest text"}
"""First metric of a task → the answer of `user-majority`."""
EXTRAS = {
    "base": "importing and checking data sets; the base of all others",
    "server": "the gateway with users' records alone, in front of any endpoint; no torch",
    "openai": "the client of hosted LLMs and of any OpenAI-compatible endpoint",
    "embedded": "an LLM inside the process: a GGUF file, or SmolLM2",
    "learn": "reranker and adapter: `learn`, `fit`, `ask`; with `server`: a gateway with a bundle",
    "bench": "`learn`, and the benchmark's methods and metrics",
    "report": "`bench`, and its pages and plots",
    "demo": "all that `hydra-llm demo` needs: `bench` and `embedded`",
    "all": "everything",
}
"""Extra of the package → what it is for."""
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
    "expected-rouge@4,8": "expected ROUGE alone, no adapter@4,8",
    "bbox-adapter@8": "bbox-adapter@8",
    "self-consistency@8": "self-consistency@8",
    "mbr@8": "mbr@8",
    "hydra-shared@4,8": "baseline: shared heads@4,8",
    "hydra-shared@1,8": "baseline: shared heads@1,8",
    "scorer-only": "baseline: scorer without LLM",
    "copy-nearest": "baseline: 1-NN (nearest record)",
    "user-majority": "baseline: the user's {typical}",
    "mismatched@4,8": "control: another user's history and heads@4,8",
    "scorer-mismatched": "control: scorer without LLM, another user's history and heads",
    "user-offset": "control: shared model and one number a user",
    "item-offset": "control: mean answer to the input and one number a user",
    "random@8": "lower bound: expected random sample",
    "oracle@8": "upper bound: best sample",
}
"""Method → its name in the table. The best prompt by the first metric has a row too."""
OVERALL = (
    "hydra@4,8",
    "hydra@1,8",
    "hydra-shared@4,8",
    "hydra-adapter@8",
    "bbox-adapter@8",
    "mbr@8",
    "self-consistency@8",
    "user-majority",
    "copy-nearest",
)
"""Methods in the table over all tasks; the best prompt-based one is added."""
HYDRA = "hydra@4,8"
SCORER = "scorer-only"
STRICT = "_strict"  # ends the name of a result with samples in place of the labels' probabilities
CONTROLS = (
    *("rag@4", "self-consistency@8", "mbr@8", "expected-rouge@4,8", "user-majority"),
    *("copy-nearest", "mismatched@4,8", "scorer-mismatched", "user-offset", "item-offset"),
    *("hydra-shared@4,8", "scorer-only"),
)
"""Methods in the table of HYDRA's differences; the best prompt stands first."""
HONEST, BEST = "best prompt (chosen on training users)", " (the best prompt)"
PROMPTS = ("zero-shot", "icl-random", "recent", "rag", "rag-dense", "pag")


def number(value: float, *, signed: bool = False) -> str:
    """`.810` or `−.063`, without a leading zero."""
    text = f"{abs(value):.3f}"
    sign = "−" if value < 0 and float(text) else "+" if signed else ""
    return sign + (text.removeprefix("0") if abs(value) < 1 else text)


def method_table(report: dict[str, Any]) -> str:
    """The main methods of one run, each against `BASELINE`."""
    rows = {row["method"]: row for row in report["methods"]}
    first, second = list(next(iter(rows.values()))["metrics"])[:2]
    titles = [METRICS.get(metric, metric) for metric in (first, second)]
    head = f"| method | {titles[0]} | {titles[1]} | against {BASELINE} ({titles[0]}) | users |"
    lines = [method_line(name, row, first, second) for name, row in main_rows(rows, first)]
    return "\n".join([head, "|---|---|---|---|---|", *lines])


def prompts_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of prompt-based methods; a run on recorded choices has none, and no table here."""
    rows: list[dict[str, Any]] = report["methods"]
    return [row for row in rows if row["group"] == "prompt" and row["method"] != HONEST]


def methods_of(report: dict[str, Any]) -> set[str]:
    return {row["method"] for row in report["methods"]}


def main_rows(rows: dict[str, Any], first: str) -> Iterator[tuple[str, dict[str, Any]]]:
    prompts = prompts_of({"methods": list(rows.values())})
    sign = -1 if first in ("mae", "rmse") else 1
    best = max(prompts, key=lambda row: sign * row["metrics"][first][0])["method"]
    if HONEST in rows:
        yield HONEST, rows[HONEST]
    for method, title in SHOWN.items():
        if method in rows:
            note = BEST if method == best else ""
            yield title.format(typical=TYPICAL[first]) + note, rows[method]
        if method == "rag-dense@4" and best not in SHOWN:
            yield f"{best}{BEST}", rows[best]


def method_line(name: str, row: dict[str, Any], first: str, second: str) -> str:
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


def interval(row: dict[str, float], key: str) -> str:
    """`+.031 [−.002, +.064]` of the values `key`, low and high."""
    value, low, high = (number(row[name], signed=True) for name in (key, "low", "high"))
    return f"{value} [{low}, {high}]"


def overall_table(changes: dict[str, Any]) -> str:
    """Mean relative change over the best prompts and over tasks, best method first."""
    prompts = [name for name in changes if name.partition("@")[0] in PROMPTS]
    top = max(prompts, key=lambda name: changes[name]["without BLEU"][0])
    names = [*(name for name in OVERALL if name in changes), top]
    columns = {
        "without BLEU": "over the best prompt, chosen on training users",
        "all metrics": "with BLEU",
        "without BLEU, with hindsight": "over the best prompt in hindsight",
    }
    lines = [f"| method | {' | '.join(columns.values())} |", "|---|---|---|---|"]
    for name in sorted(names, key=lambda name: -changes[name]["without BLEU"][0]):
        title = short(name) + (BEST if name in prompts else "")
        shares = [percent(changes[name][metrics]) for metrics in columns]
        lines.append(f"| {' | '.join([title, *shares])} |")
    return "\n".join(lines)


def controls_table(reports: dict[str, dict[str, Any]]) -> str:
    """HYDRA minus each control in each set's first metric, so that more is better; the controls
    above which it is by the interval are bold.
    """
    found = {name: own["differences"][HYDRA] for name, own in reports.items()}
    lines = [f"| {HYDRA} minus | {' | '.join(map(set_of, found))} |", "|---|" + "---|" * len(found)]
    for method in (HONEST, *CONTROLS):
        signs = [-1 if "mae" in own["methods"][0]["metrics"] else 1 for own in reports.values()]
        pairs = zip(found.values(), signs, strict=True)
        cells = [better(own[method], sign) if method in own else "" for own, sign in pairs]
        lines.append(f"| {short(method)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def short(method: str) -> str:
    """A method's name without its part of the table."""
    title = SHOWN.get(method, method).format(typical="typical answer")
    return title.removeprefix("baseline: ").removeprefix("control: ")


def grey_box_table(reports: dict[str, dict[str, Any]], strict: dict[str, dict[str, Any]]) -> str:
    """HYDRA with 8 samples beside one call's probabilities of the labels: quality and calls."""
    lines = [
        "| set | metrics | 8 samples | calls | probabilities of the labels | calls |",
        "|---|---|---|---|---|---|",
    ]
    for name, own in strict.items():
        pair = [
            next(row for row in report["methods"] if row["method"] == HYDRA)
            for report in (own, reports[name.removesuffix(STRICT)])
        ]
        names = list(pair[0]["metrics"])[:2]
        cells = [set_of(name.removesuffix(STRICT)), ", ".join(METRICS.get(n, n) for n in names)]
        for row in pair:
            values = [number(row["metrics"][metric][0]) for metric in names]
            cells += [", ".join(values), f"{row['calls']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def full_size_table(reports: dict[str, dict[str, Any]]) -> str:
    """Every method of the runs without an LLM: both metrics, and the difference from a control."""
    heads, rules, rows = [], [], defaultdict[str, list[str]](list)
    known = {method for own in reports.values() for method in methods_of(own)}
    for name, own in reports.items():
        first, second = list(own["methods"][0]["metrics"])[:2]
        against = next(row["method"] for row in own["methods"] if row["against"] is None)
        titles = [METRICS.get(metric, metric) for metric in (first, second)]
        heads += [f"{set_of(name)}: {titles[0]}", titles[1], f"against {against}"]
        rules += ["---"] * 3
        by_method = {row["method"]: row for row in own["methods"]}
        for method in filter(known.__contains__, SHOWN):
            row = by_method.get(method)
            cells = method_line("", row, first, second).split(" | ")[1:4] if row else [""] * 3
            rows[method] += cells
    lines = [f"| method | {' | '.join(heads)} |", f"|---|{'|'.join(rules)}|"]
    for method, cells in rows.items():
        lines.append(f"| {short(method)} | {' | '.join(cell.strip(' |') for cell in cells)} |")
    return "\n".join(lines)


def better(change: dict[str, float], sign: int) -> str:
    """A difference of which more is better."""
    low, high = sorted((sign * change["low"], sign * change["high"]))
    text = interval(
        {"difference": sign * change["difference"], "low": low, "high": high}, "difference"
    )
    return f"**{text}**" if low > 0 else text


def set_of(name: str) -> str:
    """The data set of a result: `movie_rating` of `movie_rating_300`."""
    return name.rpartition("_")[0].replace("_", " ")


def percent(shares: list[float]) -> str:
    """`+6.9 % [−6.0, +19.7]` of a share and its interval."""
    value, low, high = (f"{100 * share:+.1f}".replace("-", "−") for share in shares)
    return f"{value} % [{low}, {high}]"


def growth_table(result: dict[str, Any]) -> str:
    """Each series with its exponent, the expected one, and why they differ."""
    lines = [
        "| stage | in | exponent | expected | at the largest | why |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        law, last = row["law"] or {}, row["points"][-1]
        exponent = f"{law['exponent']:.1f} [{law['low']:.1f}, {law['high']:.1f}]" if law else "none"
        value = (
            f"{last['median']:.3g} {row['unit']}" if row["unit"] == "s" else f"{last['median']:.0f}"
        )
        lines.append(
            f"| {row['stage']} | {row['variable']} | {exponent} | {row['expected_exponent']} |"
            f" {last['size']}: {value} | {row['why'] or ''} |"
        )
    return "\n".join(lines)


def few_groups_table(results: dict[str, Any]) -> str:
    """Cross-entropy and gain of the picks, by data set."""
    names = [name for name in next(iter(results.values()))["rows"] if "less" not in name]
    lines = [
        "| | " + " | ".join(f"{data}: cross-entropy | pick" for data in results) + " |",
        "|---|" + "---|---|" * len(results),
    ]
    for name in names:
        cells = [
            number(value) if (value := result["rows"][name].get(key)) else ""
            for result in results.values()
            for key in ("loss", "gain")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def reranker_labels_table(results: dict[str, Any]) -> str:
    """Mean gain of the LLM's answer with the first record of each order."""
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
    for name, result in results.items():
        rows, correlation = result["found"]["rows"], result["found"]["correlation"]
        cells = [number(rows[order]["gain"]) for order in orders]
        cells += [interval(rows["history"], "over_retriever"), f"{correlation:.2f}"]
        lines.append(f"| {name.removesuffix('_60')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def gateway_table(result: dict[str, Any]) -> str:
    """Milliseconds of each series of requests (`added`: minus the mock's own), and the limits."""
    lines = ["| series | p50 | p99 | worst | |", "|---|---|---|---|---|"]
    for name, row in result["series"].items():
        added = "added_" if "added_p50" in row else ""
        if "p50" in row:
            cells = [f"{row[f'{added}{which}']:.1f}" for which in ("p50", "p99", "max")]
            rate = f"{row['per_s']:.0f} a second, 64 in flight" if "per_s" in row else ""
            lines.append(f"| {name} | {' | '.join(cells)} | {'added' if added else rate} |")
        else:
            counts = f"{row['answered']:.0f} answered, {row['failed']:.0f} failed"
            lines.append(f"| {name} | | | | {counts} |")
    lines += ["", "| limit | measured | required |", "|---|---|---|"]
    for limit in result["limits"]:
        missed = "" if limit["holds"] else ", **missed**"
        bound = f"at {'least' if limit['at_least'] else 'most'} {limit['limit']:g}{missed}"
        lines.append(f"| {limit['name']} | {limit['value']:.3g} | {bound} |")
    return "\n".join(lines)


def install_table(rows: dict[str, Any]) -> str:
    """What each extra is for, and what its installation took (tools/try_install.py)."""
    lines = ["| extra | for | MB | seconds |", "|---|---|---|---|"]
    for extra, purpose in EXTRAS.items():
        if extra in rows:
            name = "(none)" if extra == "base" else f"`{extra}`"
            row = rows[extra]
            lines.append(f"| {name} | {purpose} | {row['MB']:,} | {row['seconds']} |")
    return "\n".join(lines)


TABLES = {
    "install": install_table,
    "overall": overall_table,
    "growth": growth_table,
    "few_groups": few_groups_table,
    "reranker_labels": reranker_labels_table,
    "gateway_tower": gateway_table,
    "gateway_cross": gateway_table,
}
"""File in benchmarks/results → the function that makes its table."""


def all_tables() -> dict[str, str]:
    """Every table by its marker."""
    reports = {
        file.parent.name: json.loads(file.read_text(encoding="utf-8"))
        for file in sorted(RESULTS.glob("*/report.json"))
    }
    strict = {name: reports.pop(name) for name in list(reports) if name.endswith(STRICT)}
    tables = {name: method_table(own) for name, own in reports.items() if prompts_of(own)}
    by_folds = {name: own for name, own in reports.items() if HONEST in methods_of(own)}
    tables["controls"] = controls_table(by_folds)
    without_llm = {
        name: own
        for name, own in reports.items()
        if SCORER in methods_of(own) and not prompts_of(own)
    }
    tables["full_size"] = full_size_table(without_llm)
    tables["grey_box"] = grey_box_table(reports, strict)
    for name, to_table in TABLES.items():
        if (file := RESULTS / f"{name}.json").exists():
            tables[name] = to_table(json.loads(file.read_text(encoding="utf-8")))
    return tables


def main() -> None:
    tables, stale, marked = all_tables(), [], set[str]()
    for page in PAGES:
        before = text = page.read_text(encoding="utf-8")
        for name, content in tables.items():
            block = f"<!-- {name} -->\n{content}\n<!-- /{name} -->"
            stored = re.search(rf"<!-- {name} -->\n.*?<!-- /{name} -->", text, re.S)
            text = text.replace(stored[0], block) if stored else text
        marked |= set(re.findall(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", before, re.S))
        if text != before:
            stale.append(page)
            if "--check" not in sys.argv:
                page.write_text(text, encoding="utf-8")
    if marked != tables.keys():
        names = ", ".join(sorted(marked ^ tables.keys()))
        sys.exit(f"markers and results differ in {names}: add <!-- NAME --> and <!-- /NAME -->")
    if stale and "--check" in sys.argv:
        names = ", ".join(str(page.relative_to(ROOT)) for page in stale)
        sys.exit(f"{names}: differs from benchmarks/results: run `make docs`")


if __name__ == "__main__":
    main()
