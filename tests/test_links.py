"""Every link of every Markdown page leads somewhere; the site's navigation has every page."""

import re
import subprocess
from pathlib import Path

import pytest
from links import Fault, anchors, faults, form_fault, links

ROOT = Path(__file__).parents[1]


def pages() -> list[Path]:
    """The Markdown pages of the checkout, or of an unpacked source distribution."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    names = [name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]
    if not names:
        places = [*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/**/*.md")]
        return sorted(page for page in places if "site-packages" not in page.parts)
    return [ROOT / name for name in names]


def test_every_link_leads_somewhere() -> None:
    found = pages()
    assert len(found) > 30
    assert [fault for page in found for fault in faults(page, ROOT)] == []


def test_the_navigation_of_the_site_has_every_page() -> None:
    """As the strict build says too, which needs MkDocs."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"^ +- .*: ([\w/-]+\.md)$", text, re.MULTILINE))
    docs = ROOT / "docs"
    there = {page.relative_to(docs).as_posix() for page in docs.rglob("*.md")}
    assert named - {"contributing.md", "changelog.md"} == there - {"dev/PLAN.md"}


def test_what_is_wrong_with_a_link_is_said(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# A `b`: c\n\n## Same\n\n## Same\n\n```\n# no\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[x](other.md#a-b-c) [`y`](other.md#same-1) `[z](gone.md)`\n\n```sh\n[q](gone.md)\n```\n\n"
        "[1](gone.md) [2](other.md#no) [3](/other.md) ![4](../outside.png) [5](http://a.org)\n"
    )
    assert anchors(tmp_path / "other.md") == {"a-b-c", "same", "same-1"}
    assert list(links("[a [b] c](d) ![e](f)")) == ["d", "f"]
    assert list(faults(page, tmp_path)) == [
        Fault("page.md", "gone.md", "leads to no file"),
        Fault("page.md", "other.md#no", "leads to no heading"),
        Fault("page.md", "/other.md", "is not relative"),
        Fault("page.md", "../outside.png", "leads to no file"),
        Fault("page.md", "http://a.org", "is http, not https"),
    ]


@pytest.mark.parametrize(
    ("target", "what"),
    [
        ("https://example.org/a#b", ""),
        ("https://example.org/a.", "ends with a mark"),
        ("https://localhost/a", "names no public host"),
        ("https://example.org:8080/a", "names no public host"),
        ("ftp://example.org", "is ftp, not https"),
    ],
)
def test_form_of_a_link_to_elsewhere(target: str, what: str) -> None:
    assert form_fault(target) == what
