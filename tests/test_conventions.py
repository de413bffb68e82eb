"""What holds for the whole repository: short files, short functions with few parameters, short
names of tests, and no reference to a document that is not in it.
"""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAX_NAME = 60
MAX_FUNCTION = 40
MAX_FILE = 400
MAX_PARAMETERS = 8
MAX_SOURCE = 44_874  # lines; raised by hand, with a feature that is worth it

Function = ast.FunctionDef | ast.AsyncFunctionDef


def source_files() -> list[Path]:
    return sorted((ROOT / "src").rglob("*.py"))


def listed() -> list[str]:
    """The files of the checkout, or of an unpacked source distribution."""
    command = ["git", "ls-files", "-z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    names = [name for name in done.stdout.split("\0") if name]
    return names or [
        file.relative_to(ROOT).as_posix()
        for file in ROOT.rglob("*")
        if file.is_file() and not {"__pycache__", ".venv"} & set(file.parts)
    ]


def functions(files: list[Path]) -> Iterator[tuple[str, Function]]:
    """Every function, and where it stands."""
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, Function):
                yield f"{file.relative_to(ROOT)}:{node.lineno} {node.name}", node


def parameters(function: Function) -> int:
    """How many parameters it takes, without `self` and `cls`."""
    arguments = function.args
    names = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return len([argument for argument in names if argument.arg not in ("self", "cls")])


def test_test_names_are_short() -> None:
    tests = functions(sorted((ROOT / "tests").rglob("test_*.py")))
    long = [
        at
        for at, function in tests
        if function.name.startswith("test_") and len(function.name) > MAX_NAME
    ]
    assert not long


def test_functions_outside_the_cli_are_short() -> None:
    long = [
        f"{at}: {length} lines"
        for at, function in functions(source_files())
        if "/cli/" not in at
        and (length := (function.end_lineno or function.lineno) - function.lineno + 1)
        > MAX_FUNCTION
    ]
    assert not long


def test_the_source_does_not_grow() -> None:
    assert sum(len(file.read_text("utf-8").splitlines()) for file in source_files()) <= MAX_SOURCE


def test_source_files_are_short() -> None:
    lines = {file: len(file.read_text("utf-8").splitlines()) for file in source_files()}
    assert not {str(file): count for file, count in lines.items() if count > MAX_FILE}


def test_functions_outside_the_cli_take_few_parameters() -> None:
    many = [
        f"{at}: {count} parameters"
        for at, function in functions(source_files())
        if "/cli/" not in at and (count := parameters(function)) > MAX_PARAMETERS
    ]
    assert not many


def test_no_file_refers_to_a_document_outside() -> None:
    """The design and style notes of the developers are not part of the repository."""
    references = []
    for name in listed():
        file = ROOT / name
        if name == Path(__file__).relative_to(ROOT).as_posix() or file.suffix in (".gz", ".png"):
            continue
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        references += [f"{name}: {match[0]}" for match in re.finditer(r"\b(DESIGN|STYLE)\b", text)]
    assert not references


def test_no_file_of_a_run_that_quotes_data_is_committed() -> None:
    names = [Path(name).name for name in listed()]
    assert names
    assert not {"samples.jsonl", "details.jsonl", "view.html"} & set(names)
