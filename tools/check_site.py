"""Check the built site: it loads nothing from elsewhere, and every page has what it must.

    python tools/check_site.py [FOLDER]

MkDocs has checked links and anchors between pages (`strict`). Here every page and style sheet is
read for what a browser would load by itself: scripts, styles, images, fonts, frames.
"""

import json
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "embed": "src"}
LINKS = ("stylesheet", "icon", "preload", "prefetch", "preconnect", "modulepreload", "manifest")
"""The `rel` of links that a browser follows by itself."""
IN_STYLE = re.compile(r"(?:url\(\s*|@import\s+)[\"']?(?!data:)((?:https?:)?//[^)\"'\s]+)")
MOST = 12  # MB of the whole site


class Loads(HTMLParser):
    """What a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag in LOADED and LOADED[tag] in given:
            self.found.append(given[LOADED[tag]])
        elif tag == "link" and set(given.get("rel", "").split()) & set(LINKS):
            self.found.append(given.get("href", ""))
        elif given.get("data-md-component") == "source":
            self.found.append("https://api.github.com")  # of the theme's script


def faults(site: Path) -> Iterator[str]:
    """What is wrong with the site, a line each."""
    pages = sorted(site.rglob("*.html"))
    if len(pages) < 20:
        yield f"{site} has {len(pages)} pages: build it first"
    for page in pages:
        text, name = page.read_text(encoding="utf-8"), page.relative_to(site)
        loads = Loads()
        loads.feed(text)
        for target in loads.found:
            if re.match(r"(https?:)?//", target):
                yield f"{name} loads {target}"
            elif target and not target.startswith("data:") and name.name != "404.html":
                file = page.parent / target.partition("?")[0].partition("#")[0]
                if not file.exists():
                    yield f"{name} loads {target}, which is not there"
        if re.search(r"<p>\s*```|<p>:::|\$\$", text):
            yield f"{name} shows Markdown that was not understood"
    for style in site.rglob("*.css"):
        for target in IN_STYLE.findall(style.read_text(encoding="utf-8")):
            yield f"{style.relative_to(site)} loads {target}"
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    found = {entry["location"].partition("#")[0] for entry in index["docs"]}
    missing = {page.relative_to(site).as_posix() for page in pages} - found - {"404.html"}
    yield from (f"{name} is not in the search" for name in sorted(missing))
    size = sum(file.stat().st_size for file in site.rglob("*") if file.is_file()) / 2**20
    if size > MOST:
        yield f"the site has {size:.0f} MB: more than {MOST}"


def main() -> None:
    site = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "site"
    found = list(faults(site))
    print(*found, sep="\n")
    print(f"{site.name}: {len(list(site.rglob('*.html')))} pages, {len(found)} faults")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
