"""A hook of hatchling: the README of the package, whose links must lead to the repository, because
PyPI shows the page without it. Links are those of the tag of the version.
"""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(?P<image>!?)(?P<text>\[[^\]]*\])\((?!https?:|#)(?P<target>[^)\s]+)\)")
COMMENT = re.compile(r"^<!-- .*? -->\n", re.MULTILINE)  # marks for tools and tests
RAW = ("https://github.com/", "https://raw.githubusercontent.com/")


def published(text: str, repository: str, tag: str) -> str:
    """README as a package page can show it."""
    raw = repository.replace(*RAW)

    def absolute(link: re.Match[str]) -> str:
        base = f"{raw}/{tag}" if link["image"] else f"{repository}/blob/{tag}"
        return f"{link['image']}{link['text']}({base}/{link['target']})"

    return LINK.sub(absolute, COMMENT.sub("", text))


class Readme(MetadataHookInterface):
    """Sets `readme`."""

    def update(self, metadata: dict[str, Any]) -> None:
        source = Path(self.root, "src", "hydra_llm", "__init__.py").read_text(encoding="utf-8")
        version = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
        assert version is not None
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        own = published(text, metadata["urls"]["Homepage"], f"v{version[1]}")
        metadata["readme"] = {"content-type": "text/markdown", "text": own}
