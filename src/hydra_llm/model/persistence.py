"""A bundle: all that was learned, in one folder, as safetensors and JSON; never pickle.

    BUNDLE/config.json          format, settings, LLM, encoder, users, scorers; sha256 and size of
                                every content file
    BUNDLE/README.md            a copy of the model card, for people: not checked
    BUNDLE/content-1f3a9c22/    weights.safetensors, history.jsonl.gz, README.md; encoder/ if tuned

A write makes a new content folder and then replaces config.json by one rename: a process that is
killed leaves the old bundle or the new one, also where the folder itself cannot be renamed (a
mounted volume). Knows no heads and no scorers.
"""

import gzip
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from hydra_llm import __version__
from hydra_llm.errors import BundleError
from hydra_llm.model.encoder import Encoder, open_encoder
from hydra_llm.rows import Rows
from hydra_llm.types import ALWAYS, Choice, Record

FORMAT = 4
CONFIG, CARD, ENCODER, LOCK = "config.json", "README.md", "encoder", ".lock"
WEIGHTS, HISTORY = "weights.safetensors", "history.jsonl.gz"
CONTENT = re.compile(r"content-[0-9a-f]{8}")
# what a content file may be called: no way out of the folder, and nothing that is loaded by pickle
FILE_NAME = re.compile(
    r"(encoder/)?[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*\.(safetensors|json|txt|model|jinja|md|jsonl\.gz)"
)
ENCODER_KEYS = ("name", "digest", "pooling", "max_length", "width")
RETRIES = 5  # of a reader, because the bundle was replaced under it


@dataclass
class BundleFiles:
    """The content of a bundle."""

    config: dict[str, Any]  # any JSON; keys that `write_bundle` sets itself are replaced
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    records: Mapping[str, Sequence[Record]] = field(default_factory=dict)  # of users who have some
    card: str = ""  # the model card, in Markdown
    encoder: Encoder | None = None  # if it was fine-tuned; else `config["encoder"]` names it


def encoder_config(encoder: Encoder) -> dict[str, Any]:
    """What `config["encoder"]` holds of an encoder."""
    return {key: getattr(encoder, key) for key in ENCODER_KEYS}


def encoder_of(files: BundleFiles) -> Encoder:
    """The bundle's own encoder, or the one that it names. Raises SettingsError: there is none of
    that name here. BundleError: it is another one than the bundle was made with.
    """
    name = files.config["encoder"]["name"]
    named = f"encoder '{name}' here"
    return files.encoder or _open_encoder(files.config["encoder"], name, named)


def write_bundle(folder: Path, files: BundleFiles, *, replaces: str | None = None) -> str:
    """Write a bundle, or replace an older one once the new one is complete; returns its
    `config["sha256"]`. `replaces` is that of the bundle that this one was made from; None is any.
    Raises BundleError: another process writes or has changed it; another folder; a full disk.
    """
    check_place(folder)
    with _reported(folder, "cannot be written", "; a bundle that stood there is still whole"):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(folder / LOCK).acquire(timeout=0)
        except Timeout:
            fault = "another process is writing this bundle: wait for it, or choose another folder"
            raise BundleError(f"{folder}: {fault}") from None
        with lock:
            check_place(folder)
            present = _config_or_none(folder)
            if replaces and present and present.get("sha256") != replaces:
                raise BundleError(
                    f"{folder}: was changed by another process since it was read, and would lose"
                    " that: the same command again continues, the LLM's answers are in the cache"
                )
            return _replace(folder, files)


def check_place(folder: Path) -> None:
    """Raise BundleError if no bundle may be written there: a file, or a folder of other things."""
    if folder.exists() and not folder.is_dir():
        raise BundleError(f"{folder}: is a file: a bundle is a folder, choose another name")
    if not folder.is_dir() or _config_or_none(folder) is not None:
        return
    names = {path.name for path in folder.iterdir() if not CONTENT.fullmatch(path.name)}
    if foreign := sorted(names - {LOCK, CONFIG + ".new"}):
        raise BundleError(f"{folder}: holds '{foreign[0]}' and is no bundle: choose another folder")


def read_bundle(folder: Path) -> BundleFiles:
    """Read a bundle and check every file; BundleError if it is missing, damaged or newer."""
    for _ in range(RETRIES):
        text = _read_config_text(folder)
        try:
            return _read(folder, text)
        except BundleError:
            if text == _read_config_text(folder):
                raise
    raise BundleError(f"{folder}: the bundle is replaced faster than it can be read")


@contextmanager
def _reported(
    place: Path, fault: str, advice: str = "", errors: tuple[type[Exception], ...] = (OSError,)
) -> Iterator[None]:
    """Report these errors as a `BundleError` at a file or folder."""
    try:
        yield
    except errors as error:
        raise BundleError(f"{place}: {fault} ({error}){advice}") from error


# ---- writing


def _config_or_none(folder: Path) -> dict[str, Any] | None:
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return config if isinstance(config, dict) and {"format", "hydra_llm"} <= config.keys() else None


def _replace(folder: Path, files: BundleFiles) -> str:
    _remove_stale(folder)
    content = folder / f"content-{token_hex(4)}"
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in files.tensors.items()
    }
    try:
        content.mkdir()
        (content / WEIGHTS).write_bytes(save(tensors))
        _write_history(content / HISTORY, files.records)
        (content / CARD).write_text(files.card, encoding="utf-8")
        if files.encoder is not None:
            files.encoder.save(content / ENCODER)
        for path in [*content.rglob("*"), content]:
            _sync(path)
        config = _complete(content, files)
        text = json.dumps(config, indent=1, allow_nan=False)
        _write_new(folder / CONFIG, text.encode())  # from here on the new bundle counts
        _write_new(folder / CARD, files.card.encode())
        return str(config["sha256"])
    finally:
        _remove_stale(folder)


def _write_history(path: Path, records: Mapping[str, Sequence[Record]]) -> None:
    """A record a line, user by user. Equal records are equal files: no name and no time inside."""
    zipped = partial(gzip.GzipFile, "", "wb", 6, mtime=0)
    with path.open("wb") as raw, zipped(fileobj=raw) as stream:
        for own in records.values():
            for record in own:
                values = asdict(record)
                values["span"] = None if record.span == ALWAYS else record.span
                stream.write(json.dumps(values).encode() + b"\n")


def _remove_stale(folder: Path) -> None:
    """Remove every content that the config does not name: an older one, or an incomplete one."""
    keep = (_config_or_none(folder) or {}).get("content")
    for path in folder.iterdir():
        if CONTENT.fullmatch(path.name) and path.name != keep:
            shutil.rmtree(path, ignore_errors=True)


def _complete(content: Path, files: BundleFiles) -> dict[str, Any]:
    """The config with all that only the writer knows."""
    config = {"created": datetime.now(UTC).isoformat(timespec="seconds"), **files.config}
    if files.encoder is not None:
        config["encoder"] = encoder_config(files.encoder)
    config |= {"format": FORMAT, "hydra_llm": __version__, "content": content.name, "files": {}}
    for path in sorted(path for path in content.rglob("*") if path.is_file()):
        entry = {"sha256": _sha256(path), "bytes": path.stat().st_size}
        config["files"][path.relative_to(content).as_posix()] = entry
    # as it will be read: JSON has neither tuples nor NaN
    config = json.loads(json.dumps(config), parse_constant=lambda _: None)
    return {**config, "sha256": _config_sha256(config)}


def _config_sha256(config: Mapping[str, Any]) -> str:
    hashed = {key: value for key, value in config.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()


def _write_new(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_bytes(data)
    _sync(new)
    new.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- reading


def _read_config_text(folder: Path) -> bytes:
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such bundle")
    with _reported(folder / CONFIG, "cannot be read"):
        if not (folder / CONFIG).exists():
            raise BundleError(f"{folder}: no {CONFIG} in it, so it is no bundle")
        return (folder / CONFIG).read_bytes()


def _config_fault(config: Any) -> str:
    version = config.get("format") if isinstance(config, dict) else None
    if not isinstance(version, int):
        return "no format version, so it is no bundle of hydra-llm"
    if version > FORMAT:
        writer = f"a newer hydra-llm ({config.get('hydra_llm')})"
        return f"format {version} is made by {writer}; upgrade to read it"
    if config.get("sha256") != _config_sha256(config):
        return "damaged or edited, its sha256 does not match: copy it again, or learn anew"
    files, content, encoder = (config.get(key) for key in ("files", "content", "encoder"))
    names_content = isinstance(content, str) and CONTENT.fullmatch(content)
    if not isinstance(files, dict) or not names_content:
        return "damaged, no list of files"
    for name, entry in files.items():
        if not FILE_NAME.fullmatch(name):
            return f"{name!r} is no file that a bundle may hold"
        if not isinstance(entry, dict) or {"sha256", "bytes"} - entry.keys():
            return f"damaged, no sha256 and size of '{name}'"
    if lacking := [name for name in (WEIGHTS, HISTORY, CARD) if name not in files]:
        return f"damaged, '{lacking[0]}' is not listed"
    described = isinstance(encoder, dict) and set(ENCODER_KEYS) <= encoder.keys()
    if _encoder_files(config) and not described:
        return "damaged, no description of its encoder"
    return ""


def _encoder_files(config: Mapping[str, Any]) -> set[str]:
    return {name for name in config["files"] if name.startswith(ENCODER + "/")}


def _read(folder: Path, text: bytes) -> BundleFiles:
    with _reported(folder / CONFIG, "damaged, not JSON", errors=(ValueError,)):
        config: dict[str, Any] = json.loads(text)
    if fault := _config_fault(config):
        raise BundleError(f"{folder / CONFIG}: {fault}")
    content = folder / config["content"]
    with _reported(content, "cannot be read", errors=(OSError, UnicodeDecodeError)):
        for name, entry in config["files"].items():
            _check_file(content / name, entry)
        card = (content / CARD).read_text(encoding="utf-8")
        with _reported(content / WEIGHTS, "damaged", errors=(SafetensorError,)):
            tensors = load_file(content / WEIGHTS)
        records = Rows(_records)
        errors = (EOFError, ValueError, TypeError, KeyError, gzip.BadGzipFile, zlib.error)
        with (
            _reported(content / HISTORY, "damaged", errors=errors),
            gzip.open(content / HISTORY) as lines,
        ):
            for line in lines:
                records.add_line(_record(json.loads(line)).user, line.rstrip())
        return BundleFiles(config, tensors, records, card, _load_encoder(content, config))


def _records(user: str, rows: list[dict[str, Any]]) -> list[Record]:
    return [_record(values) for values in rows]


def _record(values: dict[str, Any]) -> Record:
    start, end = values.pop("span") or ALWAYS
    if "candidates" not in values:
        return Record(**values, span=(start, end))
    candidates = tuple(values.pop("candidates"))
    return Choice(**values, span=(start, end), candidates=candidates)


def _check_file(path: Path, entry: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise BundleError(f"{path}: missing from the bundle: copy it again")
    size, expected = path.stat().st_size, entry["bytes"]
    if size != expected:
        raise BundleError(f"{path}: damaged, {size} bytes instead of {expected}: copy it again")
    if _sha256(path) != entry["sha256"]:
        raise BundleError(f"{path}: damaged, its content is not what was written: copy it again")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load_encoder(content: Path, config: dict[str, Any]) -> Encoder | None:
    listed, folder = _encoder_files(config), content / ENCODER
    if not listed:
        return None
    for path in folder.iterdir():
        if f"{ENCODER}/{path.name}" not in listed:  # transformers would read it unchecked
            raise BundleError(f"{path}: a file that the bundle does not list: remove it")
    encoder = _open_encoder(config["encoder"], str(folder), str(folder))
    encoder.name = config["encoder"]["name"]
    return encoder


def _open_encoder(entry: Mapping[str, Any], source: str, place: str) -> Encoder:
    encoder = open_encoder(source, pooling=entry["pooling"], max_length=entry["max_length"])
    if encoder.digest != entry["digest"]:
        fault = "is not the encoder that the bundle was made with"
        raise BundleError(f"{place} {fault}: install that version, or learn anew")
    return encoder
