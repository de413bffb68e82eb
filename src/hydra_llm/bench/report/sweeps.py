"""The results of a sweep, read from its folder: a table and a curve. Knows no LLM and no runs."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra_llm.bench.report.cells import any_answer, axis_title, cell, difference
from hydra_llm.bench.runlog import as_read, write_json
from hydra_llm.bench.stats import Paired
from hydra_llm.errors import SettingsError

FILES = ("sweep.json", "study.json")  # its name, and that in earlier versions
SweepResult = Mapping[str, Any]  # the content of `sweep.json`: no text of the data, and no path


def sweep_file(folder: Path) -> Path | None:
    """The file in which a sweep has left its results; None if there is none."""
    return next((folder / name for name in FILES if (folder / name).exists()), None)


def open_sweep(file: Path) -> SweepResult:
    """Read the results of a sweep; SettingsError if they are damaged, or of another version."""
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        sweep_rows(result)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        fix = "run the same `bench sweep` again, it writes it anew"
        raise SettingsError(f"{file} cannot be read ({error}): {fix}") from None
    return dict(result)


def write_sweep(result: SweepResult, folder: Path) -> Path:
    """Write `sweep.json`, in which NaN is null."""
    file = folder / FILES[0]
    write_json(file, as_read(result))
    return file


def sweep_rows(result: SweepResult) -> list[dict[str, Any]]:
    """A row per point and method, for people."""
    metric, series = result["metric"], any(point.get("series") for point in result["points"])
    rows = []
    for point, of_method in _by_method(result):
        change, against = "", of_method["against"]
        if against is not None:
            own = against["metrics"][metric]
            value, low, high, p = _numbers([own[n] for n in ("difference", "low", "high", "p")])
            users = against["wins"] + against["ties"] + against["losses"]
            paired = Paired(value, low, high, p, own["samples"], own["users"])
            change = difference(paired, answered=users > 0)
        metrics = {name: _numbers(figures) for name, figures in of_method["metrics"].items()}
        answered = any_answer(of_method["failed"], metrics)
        row = {
            result["x"]: point["x"],
            **({"series": point.get("series", "")} if series else {}),
            "method": of_method["method"],
            **{name: _cell(figures, answered) for name, figures in metrics.items()},
            f"{metric} minus first point's": change,
            "queries": of_method["queries"],
            "LLM calls": round(of_method["calls"], 1),
            "failed": of_method["failed"],
        }
        rows.append(row)
    return rows


def _cell(figures: Sequence[float], answered: bool) -> str:
    value, low, high = figures
    return cell(value, low, high, answered=answered)


def sweep_svg(result: SweepResult) -> str:
    """The first metric over what varied, as SVG; MissingExtra without the extra `report`."""
    from hydra_llm.bench.report import plots

    metric, points = result["metric"], []
    for point, row in _by_method(result):
        name = ", ".join(filter(None, (row["method"], point.get("series"))))
        points.append(plots.Point(name, point["x"], *_numbers(row["metrics"][metric])))
    y = axis_title(metric, result["higher_is_better"])
    return plots.svg(plots.curve(points, result["x"], y, result["question"], result["log"]))


def _by_method(result: SweepResult) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    return ((point, row) for point in result["points"] for row in point["methods"])


def _numbers(figures: Sequence[float | None]) -> list[float]:
    return [math.nan if figure is None else figure for figure in figures]
