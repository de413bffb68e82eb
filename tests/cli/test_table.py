"""Tables on terminals of several widths: no name is cut, no line is longer than the terminal."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from hydra_llm.cli.table import print_table, print_text

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
Rows = list[dict[str, str]]


def committed() -> Iterator[tuple[str, Rows]]:
    """Every table of the committed reports, with its heading."""
    for file in sorted(RESULTS.rglob("report.md")):
        heading, names, rows = "", list[str](), Rows()
        for line in [*file.read_text(encoding="utf-8").splitlines(), ""]:
            if line.startswith("|"):
                cells = [cell.strip().replace("\\|", "|") for cell in line[2:-2].split(" | ")]
                if not names:
                    names = cells
                elif set(line) - set("|-: "):
                    rows.append(dict(zip(names, cells, strict=True)))
                continue
            if rows:
                yield f"{file.parent.name} {heading}", rows
            names, rows = [], Rows()
            heading = line.lstrip("# ") if line.startswith("#") else heading


TABLES = dict(committed())


def printed(
    capsys: pytest.CaptureFixture[str], rows: Rows, title: str | None = None, wide: bool = False
) -> list[str]:
    print_table(rows, title, wide)
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def names(rows: Rows) -> set[str]:
    """What a table must not break: words of the column that names its rows."""
    column = "method" if "method" in rows[0] else next(iter(rows[0]))
    return {word for row in rows for word in row[column].split()}


def test_the_committed_tables_are_found() -> None:
    assert len(TABLES) >= 12
    assert any("hydra@4,8" in names(rows) for rows in TABLES.values())


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("which", TABLES)
def test_committed_tables_fit(
    which: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = printed(capsys, TABLES[which], which)
    assert max(map(len, lines)) <= columns, lines
    assert names(TABLES[which]) <= {word for line in lines for word in line.split()}
    assert "…" not in "".join(lines)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("which", TABLES)
def test_a_pipe_and_wide_get_everything(
    which: str, wide: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if wide:
        monkeypatch.setenv("COLUMNS", "80")
    else:
        monkeypatch.delenv("COLUMNS", raising=False)
    rows = TABLES[which]
    head, _, *lines = printed(capsys, rows, wide=wide)
    assert all(name in head for name in rows[0])
    for row, line in zip(rows, lines, strict=True):
        assert all(cell in line for cell in row.values())


def test_what_does_not_fit_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    figures = {"accuracy": "0.810 [0.672, 0.936] *", "over": "+3.1% [-2.0%, +8.2%]"}
    rows = [{"part": "HYDRA", "method": "hydra@4,8", **figures, "queries": "60"}]
    assert printed(capsys, rows) == [
        "method     accuracy        over",
        "─" * 38,
        "HYDRA:",
        "hydra@4,8  0.810 ±0.132 *  +3.1% ±5.1%",
        "± is half of the interval. Not shown:",
        "queries. --wide shows all.",
    ]


def test_prose_is_wrapped_between_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    name = "a-name-of-more-than-forty-characters-in-one-word"
    (heading, rule, first), *rest = [printed(capsys, [{"method": name}])]
    assert first == name
    assert len(rule) >= len(name)
    assert heading == "method"
    assert not rest
    lines = printed(capsys, [{"method": "hydra@4,8", "what": "one two three four five " * 4}])
    assert max(map(len, lines)) <= 40
    words = [word for line in lines[2:] for word in line.split()]
    assert sorted(words) == sorted(["hydra@4,8", *["one", "two", "three", "four", "five"] * 4])
    print_text("better than rag@4 (+0.069 [-0.026, +0.180]), icl-random@4", indent="  ")
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 40
