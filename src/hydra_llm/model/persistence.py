"""A bundle: all that was learned, in one folder, as safetensors and JSON; never pickle.

    BUNDLE/config.json          format, settings, LLM, encoder, scorers; sha256 and size of every
                                content file but users.sqlite
    BUNDLE/README.md            a copy of the model card, for people: not checked
    BUNDLE/content-1f3a9c22/    weights.safetensors, users.sqlite, README.md; encoder/ if tuned

A write makes a new content folder and then replaces config.json by one rename: a process that is
killed leaves the old bundle or the new one, also where the folder itself cannot be renamed (a
mounted volume). Users alone are written in place (users_file.py). Until format 4 records were in
history.jsonl.gz, and heads in config.json and weights.safetensors (upgrade.py).
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
from dataclasses import dataclass, field
from datetime import UTC, datetime
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
from hydra_llm.model.head import Head
from hydra_llm.model.precision import Precision
from hydra_llm.model.users_file import UsersFile, change_counter, record_of
from hydra_llm.types import Record

FORMAT = 5
USERS_FORMAT = 5  # the first with a file of users
CONFIG, CARD, ENCODER, LOCK = "config.json", "README.md", "encoder", ".lock"
WEIGHTS, HISTORY, USERS = "weights.safetensors", "history.jsonl.gz", "users.sqlite"
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
    records: Mapping[str, Sequence[Record]] = field(default_factory=dict)  # by user
    card: str = ""  # the model card, in Markdown
    encoder: Encoder | None = None  # if it was fine-tuned; else `config["encoder"]` names it
    heads: Mapping[str, Mapping[str, Head]] = field(default_factory=dict)  # by scorer and user
    version: str = ""  # another one after every change of what was read


def encoder_config(encoder: Encoder) -> dict[str, Any]:
    """What `config["encoder"]` holds of an encoder."""
    return {key: getattr(encoder, key) for key in (*ENCODER_KEYS, "precision")}


def encoder_of(files: BundleFiles, precision: Precision | None = None) -> Encoder:
    """The bundle's own encoder, or the one that it names, in the precision that it was learned with
    or another one. Raises SettingsError: there is none of that name here. BundleError: it is
    another one than the bundle was made with.
    """
    entry = files.config["encoder"]
    named = f"encoder '{entry['name']}' here"
    encoder = files.encoder or _open_encoder(entry, entry["name"], named)
    if precision in (None, encoder.precision):
        return encoder
    if encoder.precision != "fp32":
        encoder = _opened(entry, entry["name"], "fp32")
    return encoder.at(precision)


def precision_of(config: Mapping[str, Any]) -> Precision:
    """What a bundle was learned with; those of older versions do not name it."""
    precision: Precision = config["encoder"].get("precision", "fp32")
    return precision


def write_bundle(folder: Path, files: BundleFiles, *, replaces: str | None = None) -> str:
    """Write a bundle, or replace an older one once the new one is complete; returns its version.
    `replaces` is that of the bundle that this one was made from; None is any.
    Raises BundleError: another process writes or has changed it; another folder; a full disk.
    """
    check_place(folder)
    with _reported(folder, "cannot be written", "; a bundle that stood there is still whole"):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, seconds=0):
            check_place(folder)
            present = _config_or_none(folder)
            if replaces and present and version_of(folder, present) != replaces:
                raise changed(folder)
            return _replace(folder, files)


@contextmanager
def locked(folder: Path, seconds: float = 30.0) -> Iterator[None]:
    """No other process writes the bundle meanwhile."""
    try:
        with FileLock(folder / LOCK).acquire(timeout=seconds):
            yield
    except Timeout:
        fault = "another process is writing this bundle: wait for it, or choose another folder"
        raise BundleError(f"{folder}: {fault}") from None


def changed(folder: Path) -> BundleError:
    """What is raised where another process has changed the bundle."""
    return BundleError(
        f"{folder}: was changed by another process since it was read, and would lose that:"
        " the same command again continues, the LLM's answers are in the cache"
    )


def version_of(folder: Path, config: Mapping[str, Any]) -> str:
    """Of all but the users, and of these."""
    users = folder / str(config.get("content")) / USERS
    return f"{config.get('sha256')}:{change_counter(users) if users.is_file() else 0}"


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
        UsersFile.create(content / USERS, files.heads, files.records)
        (content / CARD).write_text(files.card, encoding="utf-8")
        if files.encoder is not None:
            files.encoder.save(content / ENCODER)
        for path in [*content.rglob("*"), content]:
            _sync(path)
        config = _complete(content, files)
        write_config(folder, config)  # from here on the new bundle counts
        _write_new(folder / CARD, files.card.encode())
        return version_of(folder, config)
    finally:
        _remove_stale(folder)


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
        if path.name == USERS:  # it changes in place, and checks itself
            continue
        entry = {"sha256": _sha256(path), "bytes": path.stat().st_size}
        config["files"][path.relative_to(content).as_posix()] = entry
    # as it will be read: JSON has neither tuples nor NaN
    return dict(json.loads(json.dumps(config), parse_constant=lambda _: None))


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Replace the config by one rename; it gets its `sha256`."""
    config["sha256"] = _config_sha256(config)
    _write_new(folder / CONFIG, json.dumps(config, indent=1, allow_nan=False).encode())


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
    needed = (WEIGHTS, CARD, *((HISTORY,) if version < USERS_FORMAT else ()))
    if lacking := [name for name in needed if name not in files]:
        return f"damaged, '{lacking[0]}' is not listed"
    described = isinstance(encoder, dict) and set(ENCODER_KEYS) <= encoder.keys()
    if _encoder_files(config) and not described:
        return "damaged, no description of its encoder"
    return ""


def _encoder_files(config: Mapping[str, Any]) -> set[str]:
    return {name for name in config["files"] if name.startswith(ENCODER + "/")}


def read_config(folder: Path, text: bytes | None = None) -> dict[str, Any]:
    """A bundle's config alone; BundleError if it is missing, damaged or newer."""
    text = _read_config_text(folder) if text is None else text
    with _reported(folder / CONFIG, "damaged, not JSON", errors=(ValueError,)):
        config: dict[str, Any] = json.loads(text)
    if fault := _config_fault(config):
        raise BundleError(f"{folder / CONFIG}: {fault}")
    return config


def _read(folder: Path, text: bytes) -> BundleFiles:
    config = read_config(folder, text)
    content = folder / config["content"]
    with _reported(content, "cannot be read", errors=(OSError, UnicodeDecodeError)):
        for name, entry in config["files"].items():
            _check_file(content / name, entry)
        card = (content / CARD).read_text(encoding="utf-8")
        with _reported(content / WEIGHTS, "damaged", errors=(SafetensorError,)):
            tensors = load_file(content / WEIGHTS)
        encoder, version = _load_encoder(content, config), version_of(folder, config)
        if config["format"] < USERS_FORMAT:
            records = _read_history(content / HISTORY)
            return BundleFiles(config, tensors, records, card, encoder, {}, version)
        users = UsersFile(content / USERS)
        heads = {scorer: users.heads(scorer) for scorer in config.get("scorers", ())}
        return BundleFiles(config, tensors, users.records(), card, encoder, heads, version)


def _read_history(path: Path) -> dict[str, list[Record]]:
    """The records of a bundle until format 4, by user."""
    records: dict[str, list[Record]] = {}
    errors = (EOFError, ValueError, TypeError, KeyError, gzip.BadGzipFile, zlib.error)
    with _reported(path, "damaged", errors=errors):
        for line in gzip.decompress(path.read_bytes()).splitlines():
            record = record_of(json.loads(line))
            records.setdefault(record.user, []).append(record)
    return records


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
    encoder = _opened(entry, source, entry.get("precision", "fp32"))
    if encoder.digest != entry["digest"]:
        fault = "is not the encoder that the bundle was made with"
        raise BundleError(f"{place} {fault}: install that version, or learn anew")
    return encoder


def _opened(entry: Mapping[str, Any], source: str, precision: Precision) -> Encoder:
    pooling, length = entry["pooling"], entry["max_length"]
    return open_encoder(source, pooling=pooling, max_length=length, precision=precision)
