"""The tables of benchmark runs in the documents, as Markdown; results_md.py puts them there.

A report is the content of `benchmarks/results/NAME/report.json`.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

BASELINE = "rag@4"
TYPICAL = {"accuracy": "most frequent label", "mae": "median", "rouge1": "latest text"}
"""First metric of a task → the answer of `user-majority`."""
METRICS = {
    "choice_accuracy": "accuracy",
    "mae": "MAE",
    "macro_f1": "macro-F1",
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
    "zero-shot",
    "user-majority",
    "copy-nearest",
    "mismatched@4,8",
)
"""Methods in the table over all tasks; the best prompt-based one is added."""
HYDRA = "hydra@4,8"
SCORER = "scorer-only"
STRICT = "_strict"  # ends the name of a result with samples in place of the labels' probabilities
ONE_CALL = "_one_call"  # that of a run whose candidates are samples of one call
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
    names = dict.fromkeys([*(name for name in OVERALL if name in changes), top])
    columns = {
        "without BLEU": "over the best prompt, chosen on training users",
        "all metrics": "with BLEU",
        "without BLEU, with hindsight": "over the best prompt in hindsight",
    }
    lines = [f"| method | {' | '.join(columns.values())} |", "|---|---|---|---|"]
    for name in sorted(names, key=lambda name: -changes[name]["without BLEU"][0]):
        title = short(name) + (BEST if name == top else "")
        shares = [percent(changes[name][metrics]) for metrics in columns]
        lines.append(f"| {' | '.join([title, *shares])} |")
    return "\n".join(lines)


def sets_table(reports: dict[str, dict[str, Any]]) -> str:
    """HYDRA and its baseline on each set, in the first metric: the best prompt, or without an LLM
    the run's own baseline.
    """
    lines = [
        "| data | queries, users | metric | HYDRA | baseline | difference | relative |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, own in reports.items():
        rows = {row["method"]: row for row in own["methods"]}
        method = next(name for name in (HYDRA, SCORER, "hydra") if name in rows)
        against = next(row["method"] for row in own["methods"] if row["against"] is None)
        row, baseline = rows[method], HONEST if HONEST in rows else against
        metric = next(iter(row["metrics"]))
        if baseline == HONEST:
            change = own["differences"][method][HONEST]
        else:
            change = row["against"]["metrics"][metric]
        values = [number(rows[which]["metrics"][metric][0]) for which in (method, baseline)]
        relative = row["over_prompts_without_bleu"]
        cells = [
            set_of(name) + ("" if baseline == HONEST else " (no LLM)"),
            f"{change['samples']:,}, {change['users']}",
            METRICS.get(metric, metric),
            f"**{values[0]}**" if apart(change) else values[0],
            f"{values[1]} ({short(baseline).partition(' (')[0]})",
            interval(change, "difference"),
            percent(relative) if relative else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def apart(change: dict[str, float]) -> bool:
    """Whether the interval of a difference excludes 0."""
    return change["low"] > 0 or change["high"] < 0


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
    runs = [(own, reports[name.removesuffix(STRICT)]) for name, own in strict.items()]
    return beside_table(("8 samples", "probabilities of the labels"), list(strict), runs)


def one_call_table(reports: dict[str, dict[str, Any]], single: dict[str, dict[str, Any]]) -> str:
    """HYDRA with a greedy answer and 7 samples beside 7 samples of one call."""
    runs = [(reports[name.removesuffix(ONE_CALL)], own) for name, own in single.items()]
    return beside_table(("greedy answer, 7 samples", "7 samples"), list(single), runs)


Pair = tuple[dict[str, Any], dict[str, Any]]


def beside_table(titles: tuple[str, str], names: list[str], runs: list[Pair]) -> str:
    """HYDRA in two runs of each set: two metrics, calls, and the share above the best prompt."""
    heads = [f"{title} | calls | over the best prompt" for title in titles]
    lines = [f"| set | metrics | {' | '.join(heads)} |", "|---|---|---|---|---|---|---|---|"]
    for name, pair in zip(names, runs, strict=True):
        rows = [next(row for row in own["methods"] if is_hydra(row["method"])) for own in pair]
        metrics = list(rows[0]["metrics"])[:2]
        cells = [set_of(name), ", ".join(METRICS.get(metric, metric) for metric in metrics)]
        for row in rows:
            values = [number(row["metrics"][metric][0]) for metric in metrics]
            above = percent(row["over_prompts_without_bleu"])
            cells += [", ".join(values), f"{row['calls']:.1f}", above]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def is_hydra(method: str) -> bool:
    return method.startswith("hydra@4,")


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
    return re.sub(rf"_\d+({STRICT}|{ONE_CALL})?$", "", name).replace("_", " ")


def percent(shares: list[float]) -> str:
    """`+6.9 % [−6.0, +19.7]` of a share and its interval."""
    value, low, high = (f"{100 * share:+.1f}".replace("-", "−") for share in shares)
    return f"{value} % [{low}, {high}]"
