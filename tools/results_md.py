"""Write the tables of the committed results into README.md, docs/results.md and
benchmarks/results/README.md, between the markers `<!-- NAME -->` and `<!-- /NAME -->`.

    python tools/results_md.py [--check]

    NAME                           main rows of benchmarks/results/NAME/report.json
    sets                           HYDRA and its baseline in every run but those of `_60`
    controls                       the paired differences in the reports of the runs by folds
    full_size                      the runs of `scorer-only` without an LLM
    grey_box, one_call             the runs whose names end in `_strict` and `_one_call`, beside the
                                   others
    overall, growth, few_groups, install,
    reranker_labels, gateway_tower,
    gateway_cross                  benchmarks/results/NAME.json

`--check` writes nothing and exits with 1 if a table is stale.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from run_tables import (
    HONEST,
    ONE_CALL,
    SCORER,
    STRICT,
    controls_table,
    full_size_table,
    grey_box_table,
    interval,
    method_table,
    methods_of,
    number,
    one_call_table,
    overall_table,
    prompts_of,
    sets_table,
)

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md", RESULTS / "README.md")
EXTRAS = {
    "base": "importing and checking data sets; the base of all others",
    "server": "the gateway with users' records alone, in front of any endpoint; no torch",
    "mcp": "`hydra-llm mcp`; with `server`: the gateway's `/mcp` for assistants",
    "otel": "spans of the gateway's stages to an OpenTelemetry collector; with `server`",
    "openai": "the client of hosted LLMs and of any OpenAI-compatible endpoint",
    "embedded": "an LLM inside the process: a GGUF file, or SmolLM2",
    "learn": "reranker and adapter: `learn`, `fit`, `ask`; with `server`: a gateway with a bundle",
    "bench": "`learn`, and the benchmark's methods and metrics",
    "report": "`bench`, and its pages and plots",
    "demo": "all that `hydra-llm demo` needs: `bench` and `embedded`",
    "all": "everything",
}
"""Extra of the package → what it is for."""


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
    single = {name: reports.pop(name) for name in list(reports) if name.endswith(ONE_CALL)}
    tables = {name: method_table(own) for name, own in reports.items() if prompts_of(own)}
    by_folds = {name: own for name, own in reports.items() if HONEST in methods_of(own)}
    tables["controls"] = controls_table(by_folds)
    without_llm = {
        name: own
        for name, own in reports.items()
        if SCORER in methods_of(own) and not prompts_of(own)
    }
    choices = {"suggestion": reports["suggestion"]}
    tables["sets"] = sets_table(by_folds | without_llm | choices)
    tables["full_size"] = full_size_table(without_llm)
    tables["grey_box"] = grey_box_table(reports, strict)
    tables["one_call"] = one_call_table(reports, single)
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
