"""Deleted bytes are in no SQLite file, also where rows had moved between pages before."""

import math
import random
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from hydra_llm import erasure
from hydra_llm.erasure import VERSION
from hydra_llm.model.encoder import Encoder
from hydra_llm.model.feature_cache import FeatureCache, erase_features, forget_features
from hydra_llm.store.store import Store
from hydra_llm.store.values import Request
from hydra_llm.types import Record

MARKER = "marmalade"
SIZES = (1, 2, 4, 8, 20, 60, 100, 300)  # words: some rows share a page, others fill several


def copies(folder: Path, marker: bytes) -> int:
    """How often the bytes are in any file of a folder, logs among them."""
    return sum(file.read_bytes().count(marker) for file in folder.iterdir())


def text(draw: random.Random, word: str) -> str:
    """Begins at random, so that an index has it amid others."""
    start = "".join(draw.choice("abcdefgh") for _ in range(4))
    return " ".join([start, *[word] * draw.choice(SIZES)])


def churn(store: Store, seed: int) -> None:
    """Four users whose records come, grow, shrink and go; one of them has the marker."""
    draw = random.Random(seed)
    for _ in range(80):
        for user, word in {"ada": MARKER, "bob": "tea", "eve": "jam", "joe": "rye"}.items():
            some = [
                Record(user, f"{word}{draw.randrange(200)}", text(draw, word), text(draw, word))
                for _ in range(draw.randrange(1, 8))
            ]
            store.add_records(user, some)
            if draw.random() < 0.4:
                with store.change(user) as change:
                    for _ in range(4):
                        change.remove(f"{word}{draw.randrange(200)}")


@pytest.fixture
def made(tmp_path: Path) -> Store:
    made = Store(f"sqlite:///{tmp_path / 'store.db'}")
    churn(made, seed=2)
    return made


def value_of(store: Store, statement: str = VERSION) -> int:
    return int(store.run_outside_transaction(statement))


@pytest.mark.slow
def test_a_deletion_leaves_no_copy_where_rows_had_moved(made: Store, tmp_path: Path) -> None:
    others = made.export_user("bob")
    assert made.delete_user("ada")
    assert made.truncate_log()
    assert copies(tmp_path, MARKER.encode()), "what secure_delete alone leaves: else no test"
    assert made.erase()
    assert not copies(tmp_path, MARKER.encode())
    assert value_of(made) == 0
    assert made.export_user("bob") == others
    assert made.check() == []
    made.close()


def test_a_large_file_is_rewritten_within_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(f"sqlite:///{tmp_path / 'store.db'}")
    rows = [Record("ada", str(i), f"{MARKER} {i}", "dry") for i in range(500)]
    store.add_records("ada", rows)
    store.delete_user("ada")
    size, marked = value_of(store, "PRAGMA page_count"), value_of(store)
    assert marked > 0
    assert store.erase(at_once=0)
    assert (value_of(store, "PRAGMA page_count"), value_of(store)) == (size, marked)
    store.add_records("bob", rows[:1])
    store.delete_user("bob")
    assert value_of(store) == marked, "it is as old as the first deletion"
    monkeypatch.setattr(erasure, "_minute", lambda: marked + erasure.MINUTES)
    assert store.erase(at_once=0)
    assert value_of(store, "PRAGMA page_count") < size
    assert value_of(store) == 0
    store.close()


def _retention(store: Store) -> None:
    store.add_request(Request("r", "ada", 1.0, "", "a question", {}))
    store.prune(2.0)


def _other_text(store: Store) -> None:
    store.add_records("ada", [Record("ada", "1", "another", "dry")])


def _record(store: Store) -> None:
    with store.change("ada") as change:
        change.remove("1")


@pytest.mark.parametrize("delete", [_retention, _other_text, _record])
def test_what_deletes_marks_the_file(delete: Callable[[Store], None], tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'store.db'}")
    store.add_records("ada", [Record("ada", "1", "wine", "dry")])
    assert value_of(store) == 0
    store.prune(2.0)
    assert value_of(store) == 0, "nothing was deleted"
    delete(store)
    assert value_of(store) > 0
    store.close()


def test_a_deletion_while_the_file_is_rewritten_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pages are of before; so are those of a process that was killed then."""
    store = Store(f"sqlite:///{tmp_path / 'store.db'}")
    store.add_records("ada", [Record("ada", "1", "wine", "dry")])
    store.delete_user("ada")
    plain = Store.run_outside_transaction

    def then_delete(self: Store, statement: str) -> object:
        done = plain(self, statement)
        if statement == "VACUUM":
            assert value_of(store) < 0
            store.add_records("bob", [Record("bob", "1", "wine", "dry")])
            store.delete_user("bob")
        return done

    with monkeypatch.context() as patched:
        patched.setattr(Store, "run_outside_transaction", then_delete)
        store.erase()
    assert value_of(store) > 0
    store.run_outside_transaction(f"{VERSION} = -5")
    store.erase(at_once=0)
    assert value_of(store) == 0
    store.close()


class Marked(Encoder):
    """Vectors that hold their text's first bytes, and are of random sizes' worth of pages."""

    name, width, precision, digest = "marked", 24, "fp32", "0"

    def __init__(self) -> None:
        pass

    def encode(self, texts: list[str], **_: object) -> np.ndarray:
        rows = [own.encode()[:96].ljust(96, b".") for own in texts]
        return np.stack([np.frombuffer(row, "<f4") for row in rows])


@pytest.mark.slow
def test_deleted_features_leave_no_copy(tmp_path: Path) -> None:
    """Of the vectors, and of the texts' hashes, by which a text could be guessed."""
    path, draw = tmp_path / "features.sqlite", random.Random(0)
    whose = {f"{draw.choice([MARKER, 'other'])} {i}": i for i in range(4000)}
    cache = FeatureCache(Marked(), path)
    names = list(whose)
    for start in range(0, len(names), 40):
        cache.texts(names[start : start + 40])
        forget_features(path, draw.sample(names[:start], min(start, 10)))
    gone = [name for name in names if name.startswith(MARKER)]
    cache.forget(gone)
    assert not copies(tmp_path, MARKER.encode())
    from hydra_llm.model.feature_cache import _hash

    content = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert not [name for name in gone if _hash(name) in content]
    assert cache.missing([name for name in names if name not in gone]) < len(names) // 2
    cache.close()


def test_a_large_file_of_features_waits_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "features.sqlite"
    monkeypatch.setattr("hydra_llm.kv.AT_ONCE", 0)
    with closing(FeatureCache(Marked(), path)) as cache:
        cache.texts([f"{MARKER} {i}" for i in range(2000)])
        cache.forget([f"{MARKER} {i}" for i in range(1000)])
        before = path.stat().st_size
        erase_features(path, at_once=0)
        assert path.stat().st_size == before
        erase_features(path, at_once=math.inf)
        assert path.stat().st_size < 0.7 * before
        assert cache.missing([f"{MARKER} {i}" for i in range(2000)]) == 1000
