"""README's tables of results, from benchmarks/results/NAME/report.json to between `<!-- NAME -->` and `<!-- /NAME -->`.

    python tools/results_md.py [--check]

With --check it changes nothing and leaves with 1 where a table is not what the report says.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BASELINE = "rag@4"
TYPICAL = {"accuracy": "most frequent label", "mae": "median", "rouge1": "latest text"}
"""First metric → what `user-majority` answers."""
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
    "hydra-shared@4,8": "control: shared heads@4,8",
    "hydra-shared@1,8": "control: shared heads@1,8",
    "scorer-only": "control: scorer without LLM",
    "copy-nearest": "control: copy the nearest record",
    "user-majority": "control: the user's {typical}",
    "random@8": "bound: one sample by lot",
    "oracle@8": "bound: the best sample",
}
"""Method → its name in the table. The best prompt by the first metric is shown too."""


def number(value: float, *, signed: bool = False) -> str:
    """`.810`, `−.063`; without the 0 before the point, as tables have it."""
    text = f"{abs(value):.3f}"
    sign = "−" if value < 0 and float(text) else "+" if signed else ""
    return sign + (text.removeprefix("0") if abs(value) < 1 else text)


def table(report: dict[str, Any]) -> str:
    rows = {row["method"]: row for row in report["methods"]}
    first, second = list(next(iter(rows.values()))["metrics"])[:2]
    return "\n".join([*head(first, second), *(line(name, row, first, second) for name, row in chosen(rows, first))])


def head(first: str, second: str) -> Iterator[str]:
    yield f"| method | {named(first)} | {named(second)} | against {BASELINE} ({named(first)}) | users |"
    yield "|---|---|---|---|---|"


def named(metric: str) -> str:
    return {"macro_f1": "macro-F1", "mae": "MAE", "rmse": "RMSE", "rouge1": "ROUGE-1", "rougeL": "ROUGE-L"}.get(metric, metric)


def chosen(rows: dict[str, Any], first: str) -> Iterator[tuple[str, dict[str, Any]]]:
    prompts = [row for row in rows.values() if row["group"] == "prompt"]
    sign = -1 if first in ("mae", "rmse") else 1
    best = max(prompts, key=lambda row: sign * row["metrics"][first][0])["method"]
    for method, title in SHOWN.items():
        if method in rows:
            yield title.format(typical=TYPICAL[first]) + (" (the best prompt)" if method == best else ""), rows[method]
        if method == "rag-dense@4" and best not in SHOWN:
            yield f"{best} (the best prompt)", rows[best]


def line(name: str, row: dict[str, Any], first: str, second: str) -> str:
    value, low, high = row["metrics"][first]
    cells = [name, f"{number(value)} [{number(low)}, {number(high)}]", number(row["metrics"][second][0])]
    against = row["against"]
    if against is None:
        return f"| {' | '.join([*cells, '', ''])} |"
    found = against["metrics"][first]
    low, high, users = found["low"], found["high"], [str(against[which]) for which in ("wins", "ties", "losses")]
    difference = f"{number(found['difference'], signed=True)} [{number(low, signed=True)}, {number(high, signed=True)}]"
    return f"| {' | '.join([*cells, difference, ', '.join(users)])} |"


def main() -> None:
    before = text = README.read_text(encoding="utf-8")
    for file in sorted(RESULTS.glob("*/report.json")):
        name = file.parent.name
        made = f"<!-- {name} -->\n{table(json.loads(file.read_text(encoding='utf-8')))}\n<!-- /{name} -->"
        text = re.sub(rf"<!-- {name} -->\n.*?<!-- /{name} -->", lambda _, made=made: made, text, flags=re.S)  # type: ignore[misc]
    marked = set(re.findall(r"<!-- (\w+_60) -->", before))
    reports = {file.parent.name for file in RESULTS.glob("*_60/report.json")}
    if marked != reports:
        sys.exit(f"README.md: markers and results differ in {', '.join(sorted(marked ^ reports))}: add <!-- NAME --> and <!-- /NAME -->")
    if "--check" in sys.argv:
        sys.exit("README.md: its tables are not what benchmarks/results says: python tools/results_md.py" if text != before else 0)
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
