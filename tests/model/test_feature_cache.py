"""Kept features are the encoder's own, survive processes and faults, and are gone when they are to
be forgotten.
"""

import hashlib
import logging
import resource
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hydra_llm.errors import UserFault
from hydra_llm.model import feature_cache as module
from hydra_llm.model.encoder import Encoder, open_encoder
from hydra_llm.model.feature_cache import FeatureCache

TEXTS = ["night rain", "", "old war film", "night rain", "\x00\ud800🙂"]


@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    calls=st.lists(
        st.lists(st.sampled_from(["a film", "a", "film", "", "🙂", "old war film"]), max_size=6),
        max_size=5,
    )
)
def test_features_are_the_encoders_and_each_text_is_encoded_once(
    tiny: Encoder, calls: list[list[str]]
) -> None:
    store, seen = FeatureCache(tiny), set[str]()
    for texts in calls:
        seen |= set(texts)
        rows = store.texts(texts)
        assert rows.dtype == np.float32
        assert np.allclose(rows, tiny.encode(texts), atol=1e-5)
    assert store.misses == len(seen)
    assert store.hits == sum(len(set(texts)) for texts in calls) - len(seen)


def test_a_pair_is_neither_its_texts_nor_the_other_way_round(tiny: Encoder, tmp_path: Path) -> None:
    store = FeatureCache(tiny, tmp_path / "features.sqlite")
    store.texts(["night", "rain", "nightrain"])
    left, right = ["night", "rain", "nightrain", ""], ["rain", "night", "", "nightrain"]
    assert np.allclose(store.pairs(left, right), tiny.encode_pairs(left, right), atol=1e-5)
    assert (store.hits, store.misses) == (0, 7)


def test_another_process_finds_what_was_kept(
    tiny: Encoder, tiny_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "features.sqlite"
    store = FeatureCache(tiny, path)
    texts, pairs = store.texts(TEXTS), store.pairs(TEXTS, TEXTS[::-1])
    store.close()
    again = FeatureCache(open_encoder(str(tiny_folder), max_length=32), path)
    assert np.array_equal(again.texts(TEXTS), texts)
    assert np.array_equal(again.pairs(TEXTS, TEXTS[::-1]), pairs)
    assert again.misses == 0
    other = FeatureCache(open_encoder(str(tiny_folder), max_length=20), path)
    other.texts(TEXTS)
    assert other.hits == 0


def test_fine_tuning_makes_features_anew(tiny_folder: Path, tmp_path: Path) -> None:
    encoder = open_encoder(str(tiny_folder))
    store = FeatureCache(encoder, tmp_path / "features.sqlite")
    before = store.texts(TEXTS)
    for parameter in encoder.parameters():
        parameter.detach().add_(0.1)
    after = store.texts(TEXTS)
    assert not np.allclose(before, after)
    assert np.allclose(after, encoder.encode(TEXTS), atol=1e-5)


def test_unkept_features_evict_nothing_and_are_forgotten_too(
    tiny: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hydra_llm.model.feature_cache.PASSING", 2)
    store = FeatureCache(tiny, tmp_path / "features.sqlite")
    store.keep = False
    kept = store.texts(["a record"], keep=True)
    for text in ("one", "two", "three"):
        store.texts([text])
    assert (len(store._memory), len(store._passing)) == (1, 2)
    assert store.missing(["a record", "one", "two", "three"]) == 1
    store.texts(["three"], keep=True)
    assert store.forget(["two"]) == 1, "that was in memory alone"
    assert store.missing(["two"]) == 1
    again = FeatureCache(tiny, tmp_path / "features.sqlite")
    assert again.missing(["a record", "one", "two", "three"]) == 2, (
        "one was never written, two was forgotten"
    )
    assert np.array_equal(again.texts(["a record"]), kept)
    for cache in (store, again):
        cache.close()


def test_memory_is_bounded_and_the_file_is_not(
    tiny: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MEMORY_BYTES", 3 * 4 * tiny.width)
    monkeypatch.setattr(module, "KEYS_PER_QUERY", 2)
    store = FeatureCache(tiny, tmp_path / "features.sqlite")
    texts = [f"{word} {word}" for word in ("rain", "star", "love", "war", "old", "new", "dull")]
    rows = store.texts(texts)
    assert len(store._memory) == 3
    assert np.array_equal(store.texts(texts), rows)
    assert (store.hits, store.misses) == (7, 7)


def test_what_is_forgotten_is_gone_from_the_file_too(tiny: Encoder, tmp_path: Path) -> None:
    path = tmp_path / "features.sqlite"
    store = FeatureCache(tiny, path)
    vector = store.texts(["a secret", "a film"])[0].tobytes()
    pair = store.pairs(["a film", "a secret", "a film"], ["a secret", "a film", "a song"])[
        0
    ].tobytes()
    assert any(vector in file.read_bytes() for file in tmp_path.iterdir())
    assert store.forget(["a secret", "never seen"]) == 3
    assert not any(
        data in file.read_bytes() for file in tmp_path.iterdir() for data in (vector, pair)
    )
    fresh = FeatureCache(tiny, path)
    fresh.texts(["a film"])
    fresh.pairs(["a film"], ["a song"])
    assert (fresh.hits, fresh.misses) == (2, 0)
    for again in (store, fresh):
        misses = again.misses
        again.texts(["a secret"])
        assert again.misses == misses + (
            again is store
        )  # the other one finds what the first encoded again


def test_what_others_still_have_is_not_encoded_again(tiny: Encoder, tmp_path: Path) -> None:
    """Bit by bit the same: an encoder's last bits depend on what else is in the batch."""
    for path in (None, tmp_path / "features.sqlite"):
        store = FeatureCache(tiny, path)
        kept = store.texts(["rain", "a long old star of war", "love"])[0]
        store.forget(["love"])
        misses = store.misses
        assert np.array_equal(store.texts(["rain"])[0], kept)
        assert store.misses == misses
        store.texts(["love"])
        assert store.misses == misses + 1


def test_pairs_of_others_stay_in_memory(tiny: Encoder) -> None:
    """A pair without the forgotten text is not encoded again, in another batch."""
    store = FeatureCache(tiny)
    for keep in (True, False):
        store.keep = keep
        store.pairs(
            ["a film", "a secret", "a film", "a song"],
            ["a song", "a film", "a secret", f"a song {keep}"],
        )
    misses = store.misses
    store.forget(["a secret"])
    store.pairs(["a film", "a song", "a song"], ["a song", "a song True", "a song False"])
    assert store.misses == misses
    store.pairs(["a secret", "a film"], ["a film", "a secret"])
    assert store.misses == misses + 2


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk that is full: no file may grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_warning_and_the_run_goes_on(
    tiny: Encoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "features.sqlite"
    store = FeatureCache(tiny, path)
    kept = store.texts(["night rain"])
    many = [f"film {number}" for number in range(600)]
    with files_of_at_most(40_000), caplog.at_level(logging.WARNING):
        rows = store.texts(many)
        store.texts(["one more"])
        with pytest.raises(UserFault, match="could not be deleted"):
            store.forget(["night rain"])
    assert np.allclose(rows, tiny.encode(many), atol=1e-5)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert str(path) in messages[0]
    assert np.array_equal(FeatureCache(tiny, path).texts(["night rain"]), kept)


def test_an_unwritable_place_is_warned_of_and_the_run_goes_on(
    tiny: Encoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    store = FeatureCache(tiny, tmp_path / "file" / "features.sqlite")
    store.texts(TEXTS)
    store.texts(TEXTS)
    assert (store.hits, store.misses) == (4, 4)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("how", ["not a database", "overwritten", "cut", "short vector"])
def test_a_damaged_file_is_one_line_with_the_fix(how: str, tiny: Encoder, tmp_path: Path) -> None:
    path = tmp_path / "features.sqlite"
    texts = [f"film {number}" for number in range(400)]
    store = FeatureCache(tiny, path)
    store.texts(texts)
    store.close()
    data = path.read_bytes()
    if how == "not a database":
        path.write_bytes(b"something else entirely, but long enough to look at " * 100)
    elif how == "overwritten":
        path.write_bytes(data[:4096] + b"\xff" * (len(data) - 4096))
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        with sqlite3.connect(path) as file:
            file.execute("UPDATE features SET value = substr(value, 1, 60)")
        file.close()
    with pytest.raises(UserFault) as caught:
        FeatureCache(tiny, path).texts(texts)
    message = str(caught.value)
    assert message.startswith(f"{path}: the cache of features is damaged")
    assert "delete or move it" in message
    assert "\n" not in message


WRITER = """
import sys
from pathlib import Path
from hydra_llm.model.encoder import open_encoder
from hydra_llm.model.feature_cache import FeatureCache
store = FeatureCache(open_encoder(sys.argv[1], max_length=32), Path(sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
for number in range(60):
    store.texts([f"film {number} {part}" for part in range(5)])
"""


@pytest.mark.slow
def test_two_processes_and_four_threads_write_one_file(
    tiny: Encoder, tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "features.sqlite"
    command = [sys.executable, "-c", WRITER, str(tiny_folder), str(path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout
        assert other.stdout.readline() == "ready\n"
        store = FeatureCache(tiny, path)

        def work_on(numbers: range) -> None:
            for number in numbers:
                store.texts([f"film {number} {part}" for part in range(5)])

        work = [threading.Thread(target=work_on, args=(range(start, 60, 4),)) for start in range(4)]
        for thread in work:
            thread.start()
        other.communicate("go\n")
        for thread in work:
            thread.join()
    assert other.returncode == 0
    assert not caplog.records
    fresh = FeatureCache(tiny, path)
    texts = [f"film {number} {part}" for number in range(60) for part in range(5)]
    assert np.allclose(fresh.texts(texts), tiny.encode(texts), atol=1e-5)
    assert (fresh.hits, fresh.misses) == (300, 0)


OLD_FILE = """
CREATE TABLE features (
    key BLOB PRIMARY KEY, first BLOB NOT NULL, second BLOB, value BLOB NOT NULL
);
CREATE INDEX features_first ON features (first);
CREATE INDEX features_second ON features (second) WHERE second IS NOT NULL;
"""
"""The schema of version 0.1."""


def test_a_file_of_version_0_1_is_read(tiny: Encoder, tmp_path: Path) -> None:
    vector = np.linspace(0, 1, tiny.width, dtype="<f4")
    first = hashlib.sha256(b"night").digest()
    key = hashlib.sha256(tiny.digest.encode() + first).digest()
    with sqlite3.connect(tmp_path / "features.sqlite") as database:
        database.executescript(OLD_FILE)
        row = (key, first, None, vector.tobytes())
        database.execute("INSERT INTO features VALUES (?, ?, ?, ?)", row)
    database.close()
    store = FeatureCache(tiny, tmp_path / "features.sqlite")
    assert np.array_equal(store.texts(["night"])[0], vector)
    assert (store.hits, store.forget(["night"])) == (1, 1)
