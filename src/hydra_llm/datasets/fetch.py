"""Download LaMP's official files: resumed where they broke off, checked before they get their
names.

Addresses as published at lamp-benchmark.github.io/download:
`LaMP_N/{part}/{part}_{questions,outputs}.json`, movies under
`LaMP_2/new/`, the time split under `time/`. That server answers a wrong address with 200 and an
HTML page, so a file counts only when it is whole JSON and its ids fit its partner's. Knows nothing
of what the files mean beyond that.
"""

import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx2

from hydra_llm.datasets.dataset import DataSet
from hydra_llm.datasets.lamp import read_gold_ids, stream_questions
from hydra_llm.datasets.native import load
from hydra_llm.errors import DataError, SettingsError, UserFault

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
PARTS = ("train", "dev")
ATTEMPTS = 5

Progress = Callable[[str, int, int | None], None]
"""Told a file's name, the bytes that are here, and all its bytes (None if the server does not say).
"""


def addresses(task: str, split: str, base_url: str = BASE_URL) -> dict[str, str]:
    """File name to address of the four files of a task.

    Raises:
        SettingsError: an unknown task or split.
    """
    if task not in FOLDERS:
        raise SettingsError(f"unknown data set '{task}': take one of {', '.join(FOLDERS)}")
    if split not in ("user", "time"):
        raise SettingsError(f"unknown split '{split}': take user or time")
    root = f"{base_url.rstrip('/')}/{'time/' if split == 'time' else ''}{FOLDERS[task]}"
    return {
        f"{part}_{what}.json": f"{root}/{part}/{part}_{what}.json"
        for part in PARTS
        for what in ("questions", "outputs")
    }


def fetch(
    task: str,
    split: str,
    folder: Path,
    *,
    base_url: str = BASE_URL,
    progress: Progress = lambda name, done, size: None,
    client: httpx2.Client | None = None,
    pause: float = 1.0,
) -> list[Path]:
    """Bring a task's files into `folder` and return them; files that are there already are kept as
    they are.

    After a broken transfer it waits `pause` seconds, a little longer each time, and goes on where
    it was.

    Raises:
        UserFault: the server cannot be reached; what has arrived is kept for the next call.
        DataError: what arrived is not what was asked for.
    """
    wanted = addresses(task, split, base_url)
    with client or httpx2.Client(timeout=30.0, follow_redirects=True) as session:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, address in wanted.items():
                if not (folder / name).is_file() and not (folder / f"{name}.whole").is_file():
                    _download(session, address, folder / f"{name}.part", progress, pause)
        except OSError as error:
            raise UserFault(
                f"{folder}: cannot be written: {error.strerror}; what has arrived is kept"
            ) from None
    for part in PARTS:
        _accept(folder / f"{part}_questions.json", folder / f"{part}_outputs.json", wanted)
    return [folder / name for name in wanted]


def load_named(
    name: str,
    folder: Path,
    *,
    base_url: str = BASE_URL,
    progress: Progress = lambda name, done, size: None,
) -> DataSet:
    """Load a data set by path, or by the name of one of LaMP's, whose files are downloaded into
    `folder` once.

    Raises:
        DataError: it is broken, or not there.
        UserFault: the server cannot be reached.
    """
    place = Path(name)
    if name.lower() in FOLDERS and not place.exists():
        place = folder / name.lower()
        fetch(name.lower(), "user", place, base_url=base_url, progress=progress)
    return load(place)


def _download(
    client: httpx2.Client, address: str, part: Path, progress: Progress, pause: float
) -> None:
    """Fetch one file, resuming after each break."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _transfer(client, address, part, progress)
            part.replace(
                part.with_suffix(".whole")
            )  # not yet its name: its content is checked together with its partner's
            return
        except httpx2.HTTPError as error:
            have = part.stat().st_size if part.exists() else 0
            unreachable = (
                isinstance(error, httpx2.ConnectError | httpx2.UnsupportedProtocol) and attempt == 1
            )
            if attempt == ATTEMPTS or unreachable:
                kept = (
                    f"; {have} bytes are kept, the same command goes on from there" if have else ""
                )
                raise UserFault(f"{address}: {_reason(error)}{kept}") from None
        except httpx2.InvalidURL as error:
            raise UserFault(f"{address}: {error}") from None
        time.sleep(pause * attempt)
    raise AssertionError("the last attempt returns or raises")


def _reason(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__


def _transfer(client: httpx2.Client, address: str, part: Path, progress: Progress) -> None:
    """One request. The rest of a file is asked for only if it is still the same file (If-Range)."""
    tag_file = part.with_suffix(".tag")
    have = part.stat().st_size if part.exists() and tag_file.exists() else 0
    headers = {"Accept-Encoding": "identity"}  # sizes and ranges must be those of the file
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": tag_file.read_text(encoding="utf-8")}
    with client.stream("GET", address, headers=headers) as response:
        if (
            response.status_code == 416
        ):  # the part is as long as the file, or longer: nothing can be trusted
            part.unlink()
            raise httpx2.ReadError("the server has no such range; starting over")
        if response.status_code == 429 or response.status_code >= 500:
            raise httpx2.ReadError(f"HTTP {response.status_code} {response.reason_phrase}".rstrip())
        if response.status_code not in (200, 206):
            raise UserFault(
                f"{address}: HTTP {response.status_code} {response.reason_phrase}".rstrip()
            )
        start = _start(response, have)
        size = (
            start + int(response.headers["content-length"])
            if "content-length" in response.headers
            else None
        )
        tag = response.headers.get("etag") or response.headers.get("last-modified")
        if tag and not tag.startswith("W/"):
            tag_file.write_text(tag, encoding="utf-8")
        else:
            tag_file.unlink(
                missing_ok=True
            )  # without a name for this version nothing can be resumed
        _write(response, part, start, size, progress)
    tag_file.unlink(missing_ok=True)


def _start(response: httpx2.Response, have: int) -> int:
    """The byte at which this answer begins: 0 where the server ignored the range."""
    if response.status_code == 200:
        return 0
    found = re.match(r"bytes (\d+)-", response.headers.get("content-range", ""))
    if not found or int(found[1]) != have:
        raise httpx2.ReadError(
            f"the server sent another range than asked for: {response.headers.get('content-range')}"
        )
    return have


def _write(
    response: httpx2.Response, part: Path, start: int, size: int | None, progress: Progress
) -> None:
    done = start
    with part.open("r+b" if start else "wb") as stream:
        stream.seek(start)
        for chunk in response.iter_raw():
            stream.write(chunk)
            done += len(chunk)
            progress(part.stem, done, size)
    if size is not None and done != size:
        raise httpx2.ReadError(f"{done} of {size} bytes arrived")


# ---- what arrived


def _accept(questions: Path, outputs: Path, wanted: Mapping[str, str]) -> None:
    """Give a pair of files its names if both are whole and belong together; what is unusable is
    removed.
    """
    places = [
        file if file.is_file() else file.with_name(f"{file.name}.whole")
        for file in (questions, outputs)
    ]
    asked = _checked(
        places[0],
        wanted[questions.name],
        lambda: {str(key) for key in stream_questions(places[0], "item.id")},
    )
    golds = _checked(places[1], wanted[outputs.name], lambda: read_gold_ids(places[1])[1])
    if not asked or asked != golds:
        differing = sorted(asked ^ golds)[:1]
        _discard(places)
        raise DataError(
            f"{len(asked)} questions and {len(golds)} outputs do not fit each other {differing};"
            " removed",
            file=questions,
        )
    for place, file in zip(places, (questions, outputs), strict=True):
        place.replace(file)


def _checked(place: Path, address: str, read: Callable[[], set[str]]) -> set[str]:
    try:
        return read()
    except DataError as fault:
        _discard([place])
        raise DataError(
            f"what arrived is no LaMP file and was removed ({fault})", file=address
        ) from None


def _discard(places: list[Path]) -> None:
    for place in places:
        if place.suffix == ".whole":
            place.unlink()
