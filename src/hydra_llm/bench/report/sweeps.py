"""The results of a sweep, read from its folder: a table and a curve. Knows no LLM and no runs."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra_llm.bench.report.cells import axis_title, cell, difference, require
from hydra_llm.bench.runlog import as_read
from hydra_llm.bench.stats import Paired
from hydra_llm.errors import SettingsError

FILE = "sweep.json"
OLD_FILE = "study.json"  # its name in earlier versions
SweepResult = Mapping[str, Any]  # the content of `sweep.json`: no text of the data, and no path


def _file(folder: Path) -> Path:
    new, old = folder / FILE, folder / OLD_FILE
    return old if old.exists() and not new.exists() else new


def is_sweep(folder: Path) -> bool:
    """Whether a sweep has left its results there."""
    return _file(folder).exists()


def open_sweep(folder: Path) -> SweepResult:
    """Read the results of a sweep; SettingsError if they are damaged, or of another version."""
    file = _file(folder)
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        sweep_rows(result)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        fix = "run the same `bench sweep` again, it writes it anew"
        raise SettingsError(f"{file} cannot be read ({error}): {fix}") from None
    return dict(result)


def write_sweep(result: SweepResult, folder: Path) -> Path:
    """Write `sweep.json`, in which NaN is null."""
    file = folder / FILE
    text = json.dumps(as_read(result), indent=2, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")
    return file


def sweep_rows(result: SweepResult) -> list[dict[str, Any]]:
    """A row per point and method, for people."""
    metric, series = result["metric"], any(point.get("series") for point in result["points"])
    return [
        {
            result["x"]: point["x"],
            **({"series": point.get("series", "")} if series else {}),
            "method": row["method"],
            **{name: cell(*_numbers(figures)) for name, figures in row["metrics"].items()},
            f"{metric} minus first point's": _difference(row["against"], metric),
            "queries": row["queries"],
            "LLM calls": round(row["calls"], 1),
            "failed": row["failed"],
        }
        for point, row in _rows(result)
    ]


def sweep_svg(result: SweepResult) -> str:
    """The first metric over what varied, as SVG; needs the extra `report`."""
    require()
    from hydra_llm.bench.report import plots

    metric, points = result["metric"], []
    for point, row in _rows(result):
        name = ", ".join(filter(None, (row["method"], point.get("series"))))
        points.append(plots.Point(name, point["x"], *_numbers(row["metrics"][metric])))
    y = axis_title(metric, result["higher_is_better"])
    return plots.svg(plots.curve(points, result["x"], y, result["question"], result["log"]))


def _rows(result: SweepResult) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    return ((point, row) for point in result["points"] for row in point["methods"])


def _numbers(figures: Sequence[float | None]) -> list[float]:
    return [math.nan if figure is None else figure for figure in figures]


def _difference(against: Mapping[str, Any] | None, metric: str) -> str:
    if against is None:
        return ""
    own = against["metrics"][metric]
    value, low, high, p = _numbers([own[name] for name in ("difference", "low", "high", "p")])
    return difference(Paired(value, low, high, p, own["samples"], own["users"]))
