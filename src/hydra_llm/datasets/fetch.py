"""Download LaMP's official files: resumed where a transfer broke off, checked before they get their
final names. Addresses as published at lamp-benchmark.github.io/download.

The server answers a wrong address with 200 and an HTML page, so a file counts only when it is
complete JSON and its ids are those of its partner.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import httpx2

from hydra_llm.datasets.dataset import DataSet
from hydra_llm.datasets.lamp import read_golds, stream_questions
from hydra_llm.datasets.native import load
from hydra_llm.environment import http_client_faults
from hydra_llm.errors import DataError, SettingsError, UserFault, did_you_mean
from hydra_llm.text import fold

BASE_URL = "https://ciir.cs.umass.edu/downloads/LaMP/"
FOLDERS: Mapping[str, str] = {
    "lamp-1": "LaMP_1",
    "lamp-2n": "LaMP_2",
    "lamp-2m": "LaMP_2/new",
    "lamp-3": "LaMP_3",
    "lamp-4": "LaMP_4",
    "lamp-5": "LaMP_5",
    "lamp-7": "LaMP_7",
}
FILES = ("train_questions.json", "train_outputs.json", "dev_questions.json", "dev_outputs.json")
ATTEMPTS = 5

Progress = Callable[[str, int, int | None], None]
"""Called with a file's name, the bytes that have arrived, and all its bytes (None if unknown)."""


def addresses(task: str, split: str, base_url: str | None = None) -> dict[str, str]:
    """File name to address of a task's four files; SettingsError for an unknown task or split."""
    if task not in FOLDERS:
        near = did_you_mean(task, FOLDERS)
        raise SettingsError(f"unknown data set '{task}'{near}: take one of {', '.join(FOLDERS)}")
    if split not in ("user", "time"):
        raise SettingsError(f"unknown split '{split}': take user or time")
    time_split = "time/" if split == "time" else ""
    root = f"{(base_url or BASE_URL).rstrip('/')}/{time_split}{FOLDERS[task]}"
    return {name: f"{root}/{name.partition('_')[0]}/{name}" for name in FILES}


def fetch(
    task: str,
    split: str,
    folder: Path,
    *,
    base_url: str | None = None,
    progress: Progress | None = None,
    pause: float = 1.0,
) -> list[Path]:
    """Download a task's files into `folder` and return them; existing files are kept as they are.
    After a broken transfer it waits `pause` seconds, longer each time, and resumes.

    Raises UserFault if the server cannot be reached (what has arrived is kept for the next call),
    DataError if what arrived is not what was asked for.
    """
    wanted = addresses(task, split, base_url)
    with http_client_faults():
        http = httpx2.Client(timeout=30.0, follow_redirects=True)
    with http as client:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, address in wanted.items():
                if not any((folder / f"{name}{end}").is_file() for end in ("", ".whole")):
                    _Download(client, address, folder / f"{name}.part", progress).run(pause)
        except OSError as error:
            message = f"{folder}: cannot be written: {error.strerror}; what has arrived is kept"
            raise UserFault(message) from None
    files = [folder / name for name in wanted]
    for pair in (files[:2], files[2:]):
        _accept(pair, wanted)
    return files


def load_named(
    name: str, folder: Path, *, base_url: str | None = None, progress: Progress | None = None
) -> DataSet:
    """Load a data set by its path, or one of LaMP's by its name: downloaded into `folder` once."""
    place = Path(name)
    if name.lower() in FOLDERS and not place.exists():
        place = folder / name.lower()
        fetch(name.lower(), "user", place, base_url=base_url, progress=progress)
    return load(place)


@dataclass(frozen=True, slots=True)
class _Download:
    client: httpx2.Client
    address: str
    part: Path  # `NAME.part`; becomes `NAME.whole`, and `NAME` when its content is checked
    progress: Progress | None

    def run(self, pause: float) -> None:
        """Download the file, resuming after each broken transfer."""
        for attempt in count(1):
            try:
                self._transfer()
                self.part.replace(self.part.with_suffix(".whole"))
                return
            except httpx2.HTTPError as error:
                never_reached = isinstance(error, httpx2.ConnectError | httpx2.UnsupportedProtocol)
                if attempt == ATTEMPTS or (never_reached and attempt == 1):
                    reason, have = fold(str(error)) or type(error).__name__, self._size()
                    kept = f"; {have} bytes are kept, the same command goes on from there"
                    raise UserFault(f"{self.address}: {reason}{kept if have else ''}") from None
            except httpx2.InvalidURL as error:
                raise UserFault(f"{self.address}: {error}") from None
            time.sleep(pause * attempt)

    def _size(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _transfer(self) -> None:
        """One request. If-Range: the rest of a file only if it is still the same file."""
        tag_file = self.part.with_suffix(".tag")  # the ETag of the version that `part` belongs to
        have = self._size() if tag_file.exists() else 0
        headers = {"Accept-Encoding": "identity"}  # sizes and ranges must be those of the file
        if have:
            tag = tag_file.read_text(encoding="utf-8")
            headers |= {"Range": f"bytes={have}-", "If-Range": tag}
        with self.client.stream("GET", self.address, headers=headers) as response:
            code, sent = response.status_code, response.headers.get("content-range")
            if code == 416:  # the part is longer than the file: it is of another one
                self.part.unlink()
                raise httpx2.ReadError("the server has no such range; starting over")
            if code not in (200, 206):
                status = f"HTTP {code} {response.reason_phrase}".rstrip()
                if code == 429 or code >= 500:
                    raise httpx2.ReadError(status)
                raise UserFault(f"{self.address}: {status}")
            if code == 206 and not str(sent).startswith(f"bytes {have}-"):
                raise httpx2.ReadError(f"the server sent another range than asked for: {sent}")
            tag = response.headers.get("etag") or response.headers.get("last-modified") or "W/"
            if tag.startswith("W/"):  # without a name for this version it cannot be resumed
                tag_file.unlink(missing_ok=True)
            else:
                tag_file.write_text(tag, encoding="utf-8")
            self._write(response, have if code == 206 else 0)
        tag_file.unlink(missing_ok=True)

    def _write(self, response: httpx2.Response, done: int) -> None:
        """Write the body behind the `done` bytes that are there; 0 overwrites the file."""
        length = response.headers.get("content-length")
        size = None if length is None else done + int(length)
        with self.part.open("r+b" if done else "wb") as stream:
            stream.seek(done)
            for chunk in response.iter_raw():
                stream.write(chunk)
                done += len(chunk)
                if self.progress:
                    self.progress(self.part.stem, done, size)
        if size is not None and done != size:
            raise httpx2.ReadError(f"{done} of {size} bytes arrived")


def _accept(files: Sequence[Path], wanted: Mapping[str, str]) -> None:
    """Give questions and outputs their names if both are complete and belong together; else remove
    what arrived of them.
    """
    places = [file if file.is_file() else file.with_name(f"{file.name}.whole") for file in files]
    try:
        ids = {str(id) for id in stream_questions(places[0], "item.id")}
        golds = read_golds(places[1])[1].keys()
    except DataError as fault:
        broken = Path(fault.file or "")
        if broken.suffix == ".whole":
            broken.unlink()
        address = wanted[broken.name.removesuffix(".whole")]
        message = f"what arrived is no LaMP file and was removed ({fault})"
        raise DataError(message, file=address) from None
    if not ids or ids != golds:
        for place in places:
            if place.suffix == ".whole":
                place.unlink()
        counts = f"{len(ids)} questions and {len(golds)} outputs"
        differing = sorted(ids ^ golds)[:1]
        raise DataError(f"{counts} do not fit each other {differing}; removed", file=files[0])
    for place, file in zip(places, files, strict=True):
        place.replace(file)
