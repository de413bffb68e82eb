"""The source distribution holds what its tests need; the wheel that is built from it is whole, and
its page on PyPI can be read.
"""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from links import links

from hydra_llm import __version__

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


def build(kind: str, source: Path, out: Path) -> Path:
    """The one file that hatchling builds; without git, as from an archive."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(out)]
    env = {**os.environ, "GIT_DIR": str(out / "none")}
    subprocess.run(command, cwd=source, env=env, check=True, capture_output=True)
    (file,) = out.iterdir()
    return file


def test_a_source_distribution_is_whole(tmp_path: Path) -> None:
    """It has every file of the checkout but those of git; the wheel has every file of src, and the
    version is that of the sources.
    """
    sdist = build("sdist", ROOT, tmp_path / "sdist")
    with tarfile.open(sdist) as files:
        files.extractall(tmp_path / "unpacked", filter="data")
    (folder,) = (tmp_path / "unpacked").iterdir()
    assert folder.name == f"hydra_llm-{__version__}"
    has = {
        file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir()
    } - {"PKG-INFO", ".gitignore"}

    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True)
    names = {name for name in done.stdout.split("\0") if name and (ROOT / name).exists()}
    if names:  # else this is no checkout, such as an unpacked source distribution
        assert has == {name for name in names if not name.startswith(".git")}

    wheel = build("wheel", folder, tmp_path / "wheel")
    assert wheel.name == f"hydra_llm-{__version__}-py3-none-any.whl"
    source = {name.removeprefix("src/") for name in has if name.startswith("src/")}
    with zipfile.ZipFile(wheel) as files:
        assert {name for name in files.namelist() if ".dist-info/" not in name} == source


def test_a_release_asks_for_the_tag_of_this_version() -> None:
    """What release.yml compares with the tag."""
    told = subprocess.run(
        [sys.executable, "-m", "hatchling", "version"], cwd=ROOT, capture_output=True, text=True
    )
    assert told.stdout.strip() == __version__
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", __version__)


def test_the_package_page_has_absolute_links(tmp_path: Path) -> None:
    """PyPI shows README without the repository; links are those of the version's tag."""
    wheel = build("wheel", ROOT, tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as files:
        (name,) = [name for name in files.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(files.read(name).decode("utf-8"))
    page = metadata.get_payload()
    assert isinstance(page, str)
    repository = "https://github.com/hydra-llm/hydra-llm"
    urls = dict(url.split(", ") for url in metadata.get_all("Project-URL") or ())
    assert urls["Homepage"] == repository
    assert all(url.startswith(repository) for url in urls.values())
    targets = list(links(page))
    assert len(targets) > 20
    assert all(re.match(r"https://|#", target) for target in targets)
    own = f"{repository}/blob/v{__version__}/"
    files_named = [target.removeprefix(own) for target in targets if target.startswith(own)]
    assert len(files_named) > 15
    assert all((ROOT / file.partition("#")[0]).exists() for file in files_named)
    raw = f"https://raw.githubusercontent.com/hydra-llm/hydra-llm/v{__version__}"
    assert f"({raw}/docs/images/overview.svg)" in page
    assert "<!--" not in page
