"""The links of Markdown pages: what they name, and what is wrong with them (tests/test_links.py).

A link within the repository must lead to a file that is there, its anchor to a heading of it, as
GitHub names headings. Of a link to elsewhere the form alone is checked.
"""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

CODE = re.compile(r"^```.*?^```[^\n]*$|`[^`\n]+`", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]*)(?: \"[^\"]*\")?\)")
HEADING = re.compile(r"^#{1,6} (.+?)#*$", re.MULTILINE)
FENCE = re.compile(r"^```.*?^```[^\n]*$", re.DOTALL | re.MULTILINE)


class Fault(NamedTuple):
    """A link that is wrong."""

    page: str
    target: str
    what: str


def links(text: str) -> Iterator[str]:
    """The targets of a page's links and images, in order; not those within code. The text of a link
    may be code.
    """
    bare = CODE.sub(lambda code: "\n" if code[0].startswith("```") else "code", text)
    for link in INLINE.finditer(bare):
        yield link[1]


@cache
def anchors(page: Path) -> frozenset[str]:
    """The anchors that GitHub gives the headings of a page."""
    found: dict[str, int] = {}
    names = set()
    for heading in HEADING.finditer(FENCE.sub("", page.read_text(encoding="utf-8"))):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).replace("`", "").strip()
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        number = found.get(slug, 0)
        names.add(f"{slug}-{number}" if number else slug)
        found[slug] = number + 1
    return frozenset(names)


def form_fault(target: str) -> str:
    """What is wrong with the form of a link to elsewhere."""
    parts = urlsplit(target)
    if parts.scheme == "mailto":
        return ""
    if parts.scheme != "https":
        return f"is {parts.scheme}, not https"
    if "." not in (parts.hostname or "") or parts.username or parts.port:
        return "names no public host"
    return "ends with a mark" if target[-1] in ".,;:" else ""


def faults(page: Path, root: Path) -> Iterator[Fault]:
    """What is wrong with the links of a page of the repository `root`."""
    name = page.relative_to(root).as_posix()
    for target in links(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            if what := form_fault(target):
                yield Fault(name, target, what)
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not target or path.startswith("/"):
            yield Fault(name, target, "is not relative")
        elif not file.exists() or root not in [file, *file.parents]:
            yield Fault(name, target, "leads to no file")
        elif anchor and file.suffix == ".md" and anchor not in anchors(file):
            yield Fault(name, target, "leads to no heading")
