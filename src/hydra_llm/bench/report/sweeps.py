"""A study that has been run, read from its folder: a table and a curve. Knows no LLM and no run
folders.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra_llm.bench.metrics import title
from hydra_llm.bench.report import plots
from hydra_llm.bench.runner import cell
from hydra_llm.errors import SettingsError

FILE = "study.json"
Studied = Mapping[str, Any]
"""What `study.json` holds: no text of the data, and no path."""


def is_study(folder: Path) -> bool:
    """Whether a study has left its results there."""
    return (folder / FILE).exists()


def open_studied(folder: Path) -> Studied:
    """Read what a study has found.

    Raises:
        SettingsError: it is damaged, or of another version.
    """
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
        as_table(found)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise SettingsError(
            f"{folder / FILE} cannot be read ({error}): run the same `bench study` again, it writes"
            " it anew"
        ) from None
    return dict(found)


def write_studied(found: Studied, folder: Path) -> Path:
    """Write `study.json`, in which what is no number is null."""
    file = folder / FILE
    file.write_text(
        json.dumps(_without_nan(found), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return file


def as_table(found: Studied) -> list[dict[str, Any]]:
    """A row per point and method, for people."""
    metric, series = found["metric"], any(point.get("series") for point in found["points"])
    out = []
    for point, row in _rows(found):
        cells: dict[str, Any] = {found["x"]: point["x"]} | (
            {"series": point.get("series", "")} if series else {}
        )
        cells |= {
            "method": row["method"],
            **{name: cell(*_numbers(figures)) for name, figures in row["metrics"].items()},
        }
        cells[f"{metric} minus first point's"] = _difference(row["against"], metric)
        cells |= {
            "queries": row["queries"],
            "LLM calls": round(row["calls"], 1),
            "failed": row["failed"],
        }
        out.append(cells)
    return out


def drawn(found: Studied) -> str:
    """The first metric over what varied, as SVG.

    Raises:
        SettingsError: the extra `report` is not installed.
    """
    plots.require()
    metric = found["metric"]
    points = [
        plots.Point(
            ", ".join(filter(None, (row["method"], point.get("series")))),
            point["x"],
            *_numbers(row["metrics"][metric]),
        )
        for point, row in _rows(found)
    ]
    better = "more" if found["higher_is_better"] else "less"
    return plots.svg(
        plots.curve(
            points,
            found["x"],
            f"{title(metric)} ({better} is better)",
            found["question"],
            found["log"],
        )
    )


def _rows(found: Studied) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    return ((point, row) for point in found["points"] for row in point["methods"])


def _numbers(figures: list[float | None]) -> list[float]:
    return [math.nan if each is None else each for each in figures]


def _difference(against: Mapping[str, Any] | None, metric: str) -> str:
    if against is None:
        return ""
    found = against["metrics"][metric]
    difference, low, high, p = _numbers(
        [found[name] for name in ("difference", "low", "high", "p")]
    )
    return f"{difference:+.3f} [{low:+.3f}, {high:+.3f}] p {p:.3f}"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _without_nan(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and value != value else value
