"""Hooks of MkDocs for the site of docs/ (mkdocs.yml): what differs from the pages as they stand in
the repository.

- A link to a file outside docs/ goes to the page made of it (PAGES), else to the repository.
- A block below `<!-- file: NAME -->` has the name as its title.
- A block of `math` (LaTeX) becomes MathML, which browsers show without a script.
- The plots of results.md are drawn from benchmarks/results.
- api.md, which tools/api_md.py writes for readers of the repository, has mkdocstrings' form.
"""

import ast
import logging
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import api_md  # noqa: E402
import site_plots  # noqa: E402

LOG = logging.getLogger("mkdocs.hooks")  # a warning ends a strict build
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""File of the repository → page of the site that is made of it."""
HOME = "index.md"  # stands for README.md
LINK = re.compile(r"(?P<start>\]\()(?P<target>[^)\s]+)(?P<end>\))")
CODE = re.compile(r"(^```.*?^```[^\n]*$|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
MATH = re.compile(r"^( *)```math\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)

FILE = re.compile(r"^<!-- file: (\S+) -->\n```(\w+)\n", re.MULTILINE)
NAMED = re.compile(r"(?<=<code>)[^<\n]{12,}(?=</code>)")
BREAKS = re.compile(r"([._=,/])(?=\w)")
NOTHING = re.compile(r"–\s*<div class=\"doc-md-description\">\s*</div>")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made of files outside docs/."""
    for name, page in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """The page's text as the site has it."""
    source = page.file.src_uri
    if source == HOME:
        page.meta["hide"] = ["navigation", "toc"]
    if source == "api.md":
        return reference()
    if source == "results.md":
        markdown = site_plots.insert(markdown)
    repository = config["extra"]["repository"]
    text = FILE.sub(r'```\2 title="\1"\n', markdown)
    text = MATH.sub(lambda block: 2 * block[1] + formula(block[2], source), text)
    parts = CODE.split(text)
    parts[::2] = [
        LINK.sub(lambda link: with_target(link, source, repository), part) for part in parts[::2]
    ]
    return "".join(parts)


def with_target(link: re.Match[str], source: str, repository: str) -> str:
    """The link as it must be on the page `source` of the site."""
    return f"{link['start']}{target_of(link['target'], source, repository)}{link['end']}"


def target_of(target: str, source: str, repository: str) -> str:
    """Where a link of a page leads on the site; unchanged if nowhere, for MkDocs to say."""
    path, hash_, anchor = target.partition("#")
    if not path or re.match(r"[a-z]+:", target):
        return target
    origin = next((name for name, page in PAGES.items() if page == source), f"docs/{source}")
    file = posixpath.normpath(posixpath.join(posixpath.dirname(origin), path))
    if file == "README.md" and not anchor:
        page = HOME
    elif file in PAGES:
        page = PAGES[file]
    elif file.startswith("docs/") and not file.startswith("docs/dev/PLAN"):
        page = file.removeprefix("docs/")
    elif (ROOT / file).exists():
        kind = "tree" if (ROOT / file).is_dir() else "blob"
        return f"{repository}/{kind}/main/{file}{hash_}{anchor}"
    else:
        return target
    return posixpath.relpath(page, posixpath.dirname(source) or ".") + hash_ + anchor


def formula(latex: str, source: str) -> str:
    """A displayed formula as MathML, in one line, so that Markdown leaves it alone."""
    mathml = convert(" ".join(latex.split()), display="block")
    if "\\" in mathml:
        LOG.warning("%s: a formula is not understood: %s", source, latex)
    return f'<div class="formula" markdown="0">{mathml}</div>'


def on_page_content(html: str, **_: Any) -> str:
    """The page's HTML: long names in code may be broken after a mark, and only there; a field of
    which nothing is said has no dash.
    """
    html = NOTHING.sub("", html)
    return NAMED.sub(lambda code: BREAKS.sub(r"\1<wbr>", code[0]), html)


def reference() -> str:
    """api.md's sections as directives of mkdocstrings; modules and names are the same."""
    homes = api_md.exported()
    lines = [api_md.HEAD.replace(api_md.WRITTEN, ""), "## `hydra_llm`\n"]
    for name, home in homes.items():
        lines.append(directive(home, name, name))
    for module in api_md.MODULES:
        lines += [f"## `hydra_llm.{module}`\n", api_md.docstring(api_md.parsed(module)) + "\n"]
        for name, node in api_md.definitions(module).items():
            if isinstance(node, api_md.Definition) and homes.get(name) != module:
                lines.append(directive(module, name, f"{module}.{name}"))
    return "\n".join(lines)


def directive(module: str, name: str, title: str) -> str:
    """What mkdocstrings replaces by the documentation of a name. Of a sync form of an async
    function, which is no function in the source, the text that api.md has.
    """
    if isinstance(api_md.definitions(module)[name], ast.Assign):
        return f"### `{title}`\n\n{api_md.SYNC.format(name=name)}\n"
    options = f"    options:\n      heading: {title}\n      toc_label: {title}\n"
    return f"::: hydra_llm.{module}.{name}\n{options}"
