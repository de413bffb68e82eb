"""Write docs/settings.md from the settings' own docstrings; `--check` fails where the file is not
up to date.
"""

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from hydra_llm.config import FIXED

ROOT = Path(__file__).parents[1]
PACKAGE, TARGET = ROOT / "src" / "hydra_llm", ROOT / "docs" / "settings.md"
HEAD = """# Settings

Written by `make docs` from `config.py` and `gateway/settings.py`; `make check` holds it up to date.
What `hydra-llm serve` takes is in a
[table of its own](#the-gateway).

Every setting can be given as `--set NAME=VALUE` (some have a flag of their own, see
[commands](commands.md)), as the environment
variable `HYDRA_NAME`, or as a line of `hydra-llm.toml` (another file: `--config`); the order is
flag, environment, file, `--preset`,
default. `--preset paper` takes the authors' settings.

A bundle carries the settings that it was learned with, and `fit`, `ask` and `bench run` take them
in place of the defaults. What is
marked *fixed* belongs to the learned scorers: preset, file and environment leave it as it is, and a
flag for another value is refused.

| setting | default | paper | fixed | what it does |
|---|---|---|---|---|
"""
GATEWAY = """
## The gateway

Of `hydra-llm serve`: `--set NAME=VALUE`, the environment variable `HYDRA_SERVE_NAME`, or a line of
the table `[serve]` in
`hydra-llm.toml`, in this order. Of the table above `cache`, `timeout`, `retries` and `concurrency`
hold here too, by environment or file.
What the gateway does is told [elsewhere](gateway.md).

| setting | default | what it does |
|---|---|---|
"""


def fields(tree: ast.Module, name: str) -> Iterator[tuple[str, str, str]]:
    """Name, default and docstring of each setting of a class, in the order of the file."""
    settings = next(
        node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name
    )
    for node, after in zip(settings.body, [*settings.body[1:], None], strict=True):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and node.value is not None
        ):
            told = (
                after.value.value
                if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                else ""
            )
            yield (
                node.target.id,
                default_of(node.value),
                " ".join(str(told).split()).replace("|", "&#124;"),
            )


def default_of(value: ast.expr) -> str:
    """The default as it is written; of a Field its `default`."""
    if not isinstance(value, ast.Call):
        return ast.unparse(value)
    given = {keyword.arg: keyword.value for keyword in value.keywords}
    return ast.unparse(given["default"]) if "default" in given else "~/.cache/hydra-llm"


def text() -> str:
    """The whole file."""
    tree = ast.parse((PACKAGE / "config.py").read_text(encoding="utf-8"))
    assigned = (
        node
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    )
    paper = ast.literal_eval(next(node.value for node in assigned if node.target.id == "PAPER"))  # type: ignore[union-attr,arg-type]
    rows = [
        f"| `{name}` | `{default}` | {f'`{paper[name]!r}`' if name in paper else ''} |"
        f" {'fixed' * (name in FIXED)} | {told} |"
        for name, default, told in fields(tree, "Settings")
    ]
    of_gateway = ast.parse((PACKAGE / "gateway" / "settings.py").read_text(encoding="utf-8"))
    others = [
        f"| `{name}` | `{default}` | {told} |"
        for name, default, told in fields(of_gateway, "ServeSettings")
    ]
    return HEAD + "\n".join(rows) + "\n" + GATEWAY + "\n".join(others) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if the file is not up to date"
    )
    check, new = parser.parse_args().check, text()
    if check and (not TARGET.exists() or TARGET.read_text(encoding="utf-8") != new):
        sys.exit(f"{TARGET.name} is not up to date with the code: run `make docs`")
    if not check:
        TARGET.write_text(new, encoding="utf-8")
        print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
