"""A bundle: all that was learned, in one folder, as plain content. Safetensors, JSON and gzipped
JSON lines; never pickle.

    BUNDLE/config.json              format, settings, LLM, encoder, users, scorers; sha256 and size
                                    of every content file
    BUNDLE/README.md                the model card, for people (who may edit it: it is a copy and
                                    not checked)
    BUNDLE/content-1f3a9c22/        weights.safetensors, history.jsonl.gz, README.md, and encoder/
                                    where it was fine-tuned

A write makes a new content folder and then replaces config.json, one rename: whoever is killed at
any moment leaves the old bundle or the new one. It works where the folder itself cannot be renamed
(a mounted volume). Knows no heads and no scorers.
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
from hydra_llm.types import ALWAYS, Record

FORMAT = 2
CONFIG, CARD, WEIGHTS, HISTORY, ENCODER, LOCK = (
    "config.json",
    "README.md",
    "weights.safetensors",
    "history.jsonl.gz",
    "encoder",
    ".lock",
)
CONTENT = re.compile(r"content-[0-9a-f]{8}")
FILE_NAME = re.compile(
    r"(encoder/)?[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*\.(safetensors|json|txt|model|jinja|md|jsonl\.gz)"
)
"""What a content file may be called: no way out of the folder, and nothing that is loaded by
pickle.
"""
ENCODER_KEYS = ("name", "digest", "pooling", "max_length", "width")
READ_AGAIN = 5  # how often a reader starts anew because the bundle was replaced under it


@dataclass
class BundleFiles:
    """The content of a bundle. `config` may hold any JSON; keys that `write_bundle` sets itself are
    replaced.
    """

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    records: Mapping[str, Sequence[Record]] = field(default_factory=dict)
    """By user, so that `ask` can retrieve; users without records are left out."""
    card: str = ""  # the model card, in Markdown
    encoder: Encoder | None = None
    """Only where it was fine-tuned; else `config["encoder"]` names it."""


def encoder_config(encoder: Encoder) -> dict[str, Any]:
    """What `config["encoder"]` says of an encoder."""
    return {key: getattr(encoder, key) for key in ENCODER_KEYS}


def encoder_of(files: BundleFiles, device: str = "cpu") -> Encoder:
    """The bundle's own encoder, or the one that it names.

    Raises:
        BundleError: the encoder of that name is another one than the bundle was made with.
        SettingsError: there is no encoder of that name here.
    """
    if files.encoder is not None:
        return files.encoder.to(device)
    name = files.config["encoder"]["name"]
    return _open_said(files.config["encoder"], name, f"encoder '{name}' here", device)


def write_bundle(folder: Path, files: BundleFiles, *, replaces: str | None = None) -> str:
    """Write a bundle, or replace an older one once the new one is complete; returns
    `config["sha256"]` of what was written.

    `replaces` is the `config["sha256"]` that this one was made from: nothing that came in between
    may be lost. None replaces any.

    Raises:
        BundleError: another process is writing there, or has changed the bundle; the folder holds
            something else; the disk fails.
    """
    check_place(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _only_writer(folder):
            check_place(folder)
            _check_unchanged(folder, replaces)
            return _replace(folder, files)
    except OSError as error:
        raise BundleError(
            f"{folder}: cannot be written ({error}); a bundle that stood there is still whole"
        ) from error


def check_place(folder: Path) -> None:
    """See before long work whether a bundle may be written there: never into a folder that is
    somebody's for something else.

    Raises:
        BundleError: it is a file, or a folder that holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise BundleError(f"{folder}: is a file: a bundle is a folder, choose another name")
    if not folder.is_dir() or _config_or_none(folder) is not None:
        return
    ours = (LOCK, CONFIG + ".new")
    foreign = sorted(
        path.name
        for path in folder.iterdir()
        if path.name not in ours and not CONTENT.fullmatch(path.name)
    )
    if foreign:
        raise BundleError(f"{folder}: holds '{foreign[0]}' and is no bundle: choose another folder")


def read_bundle(folder: Path) -> BundleFiles:
    """Read a bundle and check every file of it.

    Raises:
        BundleError: it is not there, damaged, or made by a newer version; names the file.
    """
    for _ in range(READ_AGAIN):
        text = _read_config_text(folder)
        try:
            return _read(folder, _parse_config(folder, text))
        except BundleError:
            if text == _read_config_text(folder):
                raise
    raise BundleError(f"{folder}: the bundle is replaced faster than it can be read")


# ---- writing


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    try:
        with FileLock(folder / LOCK, timeout=0):
            yield
    except Timeout:
        raise BundleError(
            f"{folder}: another process is writing this bundle: wait for it, or choose another"
            " folder"
        ) from None


def _config_or_none(folder: Path) -> dict[str, Any] | None:
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return config if isinstance(config, dict) and {"format", "hydra_llm"} <= config.keys() else None


def _check_unchanged(folder: Path, replaces: str | None) -> None:
    there = _config_or_none(folder)
    if replaces is not None and there is not None and there.get("sha256") != replaces:
        raise BundleError(
            f"{folder}: was changed by another process since it was read, and would lose that: the"
            " same command again continues, the LLM's answers are in the cache"
        )


def _replace(folder: Path, files: BundleFiles) -> str:
    _remove_stale(folder)
    content = folder / f"content-{token_hex(4)}"
    try:
        _write_content(content, files)
        config = _complete(content, files)
        _write_new(
            folder / CONFIG, json.dumps(config, indent=1, allow_nan=False).encode()
        )  # from here on the new bundle counts
        _write_new(folder / CARD, files.card.encode())
        return str(config["sha256"])
    finally:
        _remove_stale(folder)


def _remove_stale(folder: Path) -> None:
    """Remove every content that the config does not name: an older one, or that of a writer that
    failed or was killed.
    """
    keep = (_config_or_none(folder) or {}).get("content")
    for path in folder.iterdir():
        if CONTENT.fullmatch(path.name) and path.name != keep:
            shutil.rmtree(path, ignore_errors=True)


def _write_content(content: Path, files: BundleFiles) -> None:
    content.mkdir()
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in files.tensors.items()
    }
    (content / WEIGHTS).write_bytes(save(tensors))
    (content / HISTORY).write_bytes(_pack_records(files.records))
    (content / CARD).write_text(files.card, encoding="utf-8")
    if files.encoder is not None:
        files.encoder.save(content / ENCODER)
    for path in [*content.rglob("*"), content]:
        _sync(path)


def _complete(content: Path, files: BundleFiles) -> dict[str, Any]:
    """The config with all that only the writer knows."""
    paths = sorted(path for path in content.rglob("*") if path.is_file())
    said = {"encoder": encoder_config(files.encoder)} if files.encoder is not None else {}
    config = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **files.config,
        **said,
        "format": FORMAT,
        "hydra_llm": __version__,
        "content": content.name,
        "files": {
            path.relative_to(content).as_posix(): {
                "sha256": _sha256(path),
                "bytes": path.stat().st_size,
            }
            for path in paths
        },
    }
    config = json.loads(
        json.dumps(config), parse_constant=lambda _: None
    )  # as it will be read: JSON has neither tuples nor NaN
    return {**config, "sha256": _config_sha256(config)}


def _config_sha256(config: Mapping[str, Any]) -> str:
    said = {key: value for key, value in config.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


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


def _pack_records(records: Mapping[str, Sequence[Record]]) -> bytes:
    lines = (json.dumps(_record_json(record)) for user in records.values() for record in user)
    return gzip.compress("".join(line + "\n" for line in lines).encode(), compresslevel=6, mtime=0)


def _record_json(record: Record) -> dict[str, Any]:
    span = None if record.span == ALWAYS else record.span
    texts = {key: getattr(record, key) for key in ("user", "id", "input", "output", "time")}
    return {**texts, "span": span, "position": record.position}


# ---- reading


def _read_config_text(folder: Path) -> bytes:
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such bundle")
    try:
        return (folder / CONFIG).read_bytes()
    except FileNotFoundError:
        raise BundleError(f"{folder}: no {CONFIG} in it, so it is no bundle") from None
    except OSError as error:
        raise BundleError(f"{folder / CONFIG}: cannot be read ({error})") from error


def _parse_config(folder: Path, text: bytes) -> dict[str, Any]:
    place = folder / CONFIG
    try:
        config = json.loads(text)
    except ValueError as error:
        raise BundleError(f"{place}: damaged, not JSON ({error})") from error
    version = config.get("format") if isinstance(config, dict) else None
    if not isinstance(version, int):
        raise BundleError(f"{place}: no format version, so it is no bundle of hydra-llm")
    if version > FORMAT:
        raise BundleError(
            f"{place}: format {version} is made by a newer hydra-llm ({config.get('hydra_llm')});"
            " upgrade to read it"
        )
    if config.get("sha256") != _config_sha256(config):
        raise BundleError(
            f"{place}: damaged or edited, its sha256 does not match: copy it again, or learn anew"
        )
    _check_names(place, config)
    return dict(config)


def _check_names(place: Path, config: Mapping[str, Any]) -> None:
    files, content = config.get("files"), config.get("content")
    if (
        not isinstance(content, str)
        or not CONTENT.fullmatch(content)
        or not isinstance(files, dict)
    ):
        raise BundleError(f"{place}: damaged, no list of files")
    for name, said in files.items():
        if not FILE_NAME.fullmatch(name):
            raise BundleError(f"{place}: {name!r} is no file that a bundle may hold")
        if not isinstance(said, dict) or {"sha256", "bytes"} - said.keys():
            raise BundleError(f"{place}: damaged, no sha256 and size of '{name}'")
    for name in (WEIGHTS, HISTORY, CARD):
        if name not in files:
            raise BundleError(f"{place}: damaged, '{name}' is not listed")
    said = config.get("encoder")
    described = isinstance(said, dict) and set(ENCODER_KEYS) <= said.keys()
    if not described and any(name.startswith(ENCODER + "/") for name in files):
        raise BundleError(f"{place}: damaged, no description of its encoder")


def _read(folder: Path, config: dict[str, Any]) -> BundleFiles:
    content = folder / config["content"]
    try:
        for name, said in config["files"].items():
            _check_file(content / name, said)
        card = (content / CARD).read_text(encoding="utf-8")
        return BundleFiles(
            config,
            _load_tensors(content),
            _unpack_records(content / HISTORY),
            card,
            _load_encoder(content, config),
        )
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{content}: cannot be read ({error})") from error


def _check_file(path: Path, said: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise BundleError(f"{path}: missing from the bundle: copy it again")
    if path.stat().st_size != said["bytes"]:
        raise BundleError(
            f"{path}: damaged, {path.stat().st_size} bytes instead of {said['bytes']}: copy it"
            " again"
        )
    if _sha256(path) != said["sha256"]:
        raise BundleError(f"{path}: damaged, its content is not what was written: copy it again")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load_tensors(content: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(content / WEIGHTS)
    except SafetensorError as error:
        raise BundleError(f"{content / WEIGHTS}: damaged ({error})") from error


def _unpack_records(path: Path) -> dict[str, list[Record]]:
    records: dict[str, list[Record]] = {}
    try:
        for line in gzip.decompress(path.read_bytes()).splitlines():
            record = json.loads(line)
            span = record.pop("span")
            records.setdefault(record["user"], []).append(
                Record(**record, span=ALWAYS if span is None else (span[0], span[1]))
            )
    except (EOFError, ValueError, TypeError, KeyError, gzip.BadGzipFile, zlib.error) as error:
        raise BundleError(f"{path}: damaged ({error})") from error
    return records


def _load_encoder(content: Path, config: dict[str, Any]) -> Encoder | None:
    listed = {name for name in config["files"] if name.startswith(ENCODER + "/")}
    if not listed:
        return None
    for path in (content / ENCODER).iterdir():
        if f"{ENCODER}/{path.name}" not in listed:  # transformers would read it unchecked
            raise BundleError(f"{path}: a file that the bundle does not list: remove it")
    said = config["encoder"]
    encoder = _open_said(said, str(content / ENCODER), f"{content / ENCODER}")
    encoder.name = said["name"]
    return encoder


def _open_said(said: Mapping[str, Any], source: str, place: str, device: str = "cpu") -> Encoder:
    encoder = open_encoder(
        source, pooling=said["pooling"], max_length=said["max_length"], device=device
    )
    if encoder.digest != said["digest"]:
        raise BundleError(
            f"{place} is not the encoder that the bundle was made with: install that version, or"
            " learn anew"
        )
    return encoder
