"""A bundle's users in one file, changed in place: it is a dict that survives kill -9, forgets what
was deleted, and says in one line what is wrong with it.
"""

import math
import random
import re
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hydra_llm.errors import BundleError
from hydra_llm.model import users_file as module
from hydra_llm.model.head import Head
from hydra_llm.model.heads import make_head
from hydra_llm.model.heads.kernel import pack
from hydra_llm.model.interactions import Cross, Groups
from hydra_llm.model.scorer import Scorer
from hydra_llm.model.users_file import UsersFile, change_counter, head_of, pack_head
from hydra_llm.types import Choice, Record
from tests.waiting import FOREVER

NAMES = ("ada", "bob", "", "\x00", "שלום", "\ud800", "x" * 300)


def head_like(draw: random.Random, size: int) -> Head:
    numbers = np.frombuffer(draw.randbytes(4 * size), "<f4")
    return Head(numbers, draw.randrange(2**40), draw.choice([-math.inf, 1.5e9, 0.1]))


def same(one: Head, other: Head) -> bool:
    equal = one.numbers.tobytes() == other.numbers.tobytes()  # NaN too
    return equal and (one.records, one.until) == (other.records, other.until)


def history(user: str, count: int, word: str = "text") -> list[Record]:
    return [Record(user, str(i), f"{word} {i}", "an answer", position=i) for i in range(count)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "users.sqlite"
    UsersFile.create(file, {}, {})
    return file


@pytest.fixture
def file(path: Path) -> Iterator[UsersFile]:
    opened = UsersFile(path)
    yield opened
    opened.close()


# ---- it is a dict


class AsDict(RuleBasedStateMachine):
    """Any changes give what the same changes of a dict give, also after opening it again."""

    def __init__(self) -> None:
        super().__init__()
        self.draw = random.Random(0)
        self.heads: dict[str, dict[str, Head]] = {"reranker": {}, "adapter": {}}
        self.records: dict[str, list[Record]] = {}
        self.start()

    def start(self) -> None:
        raise NotImplementedError

    @rule(
        users=st.lists(st.sampled_from(NAMES), unique=True, max_size=3),
        size=st.sampled_from([0, 1, 16, 300, 5_000]),
        scorers=st.sets(st.sampled_from(["reranker", "adapter"])),
        count=st.none() | st.integers(0, 20),
    )
    def put(self, users: list[str], size: int, scorers: set[str], count: int | None) -> None:
        new = {name: {user: head_like(self.draw, size) for user in users} for name in scorers}
        records = {user: history(user, count) for user in users if count is not None}
        self.file.put(users, new, records)
        for user in users:
            self.forget(user)
            self.records |= {user: records[user]} if user in records else {}
            for name in scorers:
                self.heads[name][user] = new[name][user]

    @rule(user=st.sampled_from(NAMES))
    def delete(self, user: str) -> None:
        there = sum(user in kept for kept in (*self.heads.values(), self.records))
        assert self.file.delete(user) == there
        self.forget(user)

    @rule()
    def reopen(self) -> None:
        self.file.close()
        self.open(self.file.path)

    def open(self, path: Path) -> None:
        self.file = UsersFile(path)
        self.file._connection.execute("PRAGMA synchronous = OFF")

    def forget(self, user: str) -> None:
        for kept in (*self.heads.values(), self.records):
            kept.pop(user, None)

    @invariant()
    def equals_the_dict(self) -> None:
        assert dict(self.file.records()) == self.records
        for name, expected in self.heads.items():
            stored = self.file.heads(name)
            assert len(stored) == len(expected)
            assert set(stored) == set(expected)
            for user in NAMES:
                assert (user in stored) == (user in expected)
                assert user not in expected or same(stored[user], expected[user])
            together = stored.many([*NAMES, "ada", "nobody"])
            for user, head in zip([*NAMES, "ada", "nobody"], together, strict=True):
                assert (head is None) == (user not in expected)
                assert head is None or same(head, expected[user])


def test_any_changes_are_those_of_a_dict(tmp_path: Path) -> None:
    numbers = iter(range(10**9))

    class InFolder(AsDict):
        def start(self) -> None:
            path = tmp_path / f"{next(numbers)}.sqlite"
            UsersFile.create(path, {}, {})
            self.open(path)

        def teardown(self) -> None:
            self.file.close()
            self.file.path.unlink()

    from hypothesis.stateful import run_state_machine_as_test

    few = hypothesis_settings(max_examples=12, stateful_step_count=15, deadline=None)
    run_state_machine_as_test(InFolder, settings=few)


@given(
    numbers=st.lists(st.floats(width=32)),
    records=st.integers(0, 2**62),
    until=st.floats(allow_nan=False),
)
def test_a_head_is_the_same_after_it_was_kept(
    numbers: list[float], records: int, until: float
) -> None:
    head = Head.of(np.array(numbers, dtype=np.float32), records, until)
    assert same(head_of(pack_head(head)), head)


def test_records_and_choices_come_back(file: UsersFile) -> None:
    kept = [
        Record("ada", "1", "a\nb \ud800 🙂", "5", "2020", (1.0, 2.0), 2**60),
        Choice("ada", "2", "which?", "b", candidates=("a", "b"), chosen=1),
    ]
    file.put(["ada", "bob"], {}, {"ada": kept, "bob": []})
    assert file.records()["ada"] == kept
    assert file.records()["bob"] == []
    assert "eve" not in file.records()


def test_iteration_is_lazy_and_bears_changes(path: Path, file: UsersFile) -> None:
    users = [f"u{i}" for i in range(3 * module.MOST + 7)]
    file.put(users, {"adapter": {user: Head.of(np.ones(3)) for user in users}}, {})
    assert sorted(file.heads("adapter")) == sorted(users)
    names = iter(file.heads("adapter"))
    first = next(names)
    last = list(file.heads("adapter"))[-1]
    file.delete(last)
    rest = list(names)
    assert last not in rest
    assert len({first, *rest}) == len(users) - 1


@pytest.mark.parametrize("kind", ["linear", "lowrank", "kernel", "bias"])
def test_a_batch_of_mixed_users_is_each_of_them_alone(kind: str, file: UsersFile) -> None:
    torch.manual_seed(0)
    interaction, count = Cross(8), 40
    scorer = Scorer(interaction, make_head(kind, interaction, rank=3), ()).eval()
    size = scorer.head.numbers_per_user

    def numbers(i: int) -> np.ndarray:
        grown = pack(torch.randn(i % 4, 8), torch.randn(i % 4, 1))  # kernel heads differ in length
        return np.random.default_rng(i).standard_normal(size) if size else grown

    users = [f"user {i}" for i in range(30)]
    heads = {user: Head.of(numbers(i)) for i, user in enumerate(users)}
    file.put(users, {"adapter": heads}, {})
    batch = [random.Random(i).choice([*users, "nobody"]) for i in range(count)]
    groups = Groups(
        torch.zeros(count, 0),
        torch.randn(count, 5, 8),
        torch.zeros(count, 5, 0),
        torch.ones(count, 5, dtype=torch.bool),
    )
    stored = file.heads("adapter")
    together = scorer.score(groups, stored.many(batch))
    for i, user in enumerate(batch):
        alone = scorer.score(groups[torch.tensor([i])], [stored.get(user)])
        kept = scorer.score(groups[torch.tensor([i])], [heads.get(user)])
        assert torch.equal(alone, kept)
        assert torch.allclose(together[i], alone[0], atol=1e-5)


# ---- deleted means gone


@pytest.mark.parametrize(("low", "high"), [(4, 9), (25, 750), (25, 2300), (1200, 5000)])
def test_deleted_and_replaced_bytes_are_gone(low: int, high: int, file: UsersFile) -> None:
    """Random changes of random sizes: SQLite's own `secure_delete` leaves some of such bytes."""
    file._connection.execute("PRAGMA synchronous = OFF")
    draw, alive = random.Random(low), dict[str, bytes]()
    dead: list[bytes] = []
    for _ in range(400):
        user = f"user-{draw.randrange(150):09d}"
        if user in alive:
            dead.append(alive[user])
        if user in alive and draw.random() < 0.5:
            file.delete(user)
            del alive[user]
            continue
        head = head_like(draw, draw.randrange(low, high))
        word = draw.randbytes(9).hex()
        file.put([user], {"adapter": {user: head}}, {user: history(user, 3, word)})
        alive[user] = head.numbers.tobytes()
    data = file.path.read_bytes()
    assert dead
    for numbers in dead:
        for at in {0, len(numbers) // 2, len(numbers) - 12}:
            assert numbers[at : at + 12] not in data
    for i in range(150):
        user = f"user-{i:09d}"
        assert (user.encode() in data) == (user in alive)
    assert all(numbers in data for numbers in alive.values() if len(numbers) < 8_000)
    (free,) = file._rows("SELECT count(*) FROM free JOIN slots ON slot = id")[0]
    zeros = "SELECT count(*) FROM free JOIN slots ON slot = id WHERE value = zeroblob(capacity)"
    assert file._rows(zeros)[0][0] == free > 0


def test_a_change_rewrites_a_little_of_the_file(path: Path) -> None:
    users = [f"user {i}" for i in range(4_000)]
    heads = {user: Head.of(np.random.default_rng(0).standard_normal(769)) for user in users}
    UsersFile.create(path.with_name("many"), {"adapter": heads}, {})
    many = path.with_name("many")
    before, opened = many.read_bytes(), UsersFile(many)
    opened.put(["user 77"], {"adapter": {"user 77": Head.of(np.ones(769))}}, {})
    opened.delete("user 99")
    opened.close()
    after = many.read_bytes()
    assert len(after) == len(before) > 10_000_000
    pages = range(0, len(before), 4096)
    changed = sum(before[at : at + 4096] != after[at : at + 4096] for at in pages)
    assert changed < 40


def test_a_deleted_user_s_place_is_used_again(file: UsersFile) -> None:
    def put(user: str) -> None:
        file.put([user], {"adapter": {user: Head.of(np.ones(800))}}, {user: history(user, 5)})

    put("first")
    size = file.path.stat().st_size
    for i in range(50):
        file.delete("first" if i == 0 else f"user {i - 1}")
        put(f"user {i}")
    assert file.path.stat().st_size <= size + 16_384


# ---- crashes


KILLED = """
import os, random, shutil, signal, sys, time
from pathlib import Path
import numpy as np
from hydra_llm.model.head import Head
from hydra_llm.model.users_file import UsersFile
from hydra_llm.types import Record

path, draw = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
USERS = [f"user {i}" for i in range(6)]
SIZES = (16, 769, 5000)

def value(tag):
    "Both heads and the records of a user carry the tag."
    size = SIZES[tag % 3]
    heads = {s: Head(np.full(size, tag, dtype=np.float32), tag) for s in ("reranker", "adapter")}
    return heads, [Record("u", str(i), f"text {tag}", "x") for i in range(tag % 7)]

def state():
    "User to tag, or None; fails where a user is half of one and half of another."
    file, found = UsersFile(path), {}
    for user in USERS:
        heads = [file.heads(s).get(user) for s in ("reranker", "adapter")]
        records = file.records().get(user)
        if records is None:
            assert heads == [None, None], "half a deletion"
            found[user] = None
            continue
        tags = {head.records for head in heads}
        assert len(tags) == 1, "heads of two writes"
        (tag,) = tags
        assert all(len(h.numbers) == SIZES[tag % 3] and (h.numbers == tag).all() for h in heads)
        assert len(records) == tag % 7 and {r.input for r in records} <= {f"text {tag}"}
        found[user] = tag
    assert file._rows("PRAGMA integrity_check") == [("ok",)]
    file.close()
    return found

def change(user, tag, die=None, path=path, started=lambda: None):
    file = UsersFile(path)
    started()
    events = 0
    def step(*_):
        nonlocal events
        events += 1
        if events == die:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0
    file._connection.set_progress_handler(step, 1)  # each instruction of SQLite's machine
    if tag is None:
        file.delete(user)
    else:
        heads, records = value(tag)
        file.put([user], {s: {user: head} for s, head in heads.items()}, {user: records})
    file.close()
    return events

UsersFile.create(path, {}, {})
tag, outcomes = 1, {"old": 0, "new": 0}
for round in range(120):
    before, user = state(), draw.choice(USERS)
    new = None if before[user] is not None and draw.random() < 0.4 else tag
    tag += 1
    copy = path.with_name("copy")
    shutil.copy(path, copy)
    begin = time.perf_counter()
    steps = change(user, new, path=copy)
    seconds = time.perf_counter() - begin
    reader, writer = os.pipe()
    by_step = round % 2  # killed at an instruction of SQLite's, or from outside at any moment
    child = os.fork()
    if child == 0:
        die = draw.randrange(1, int(steps * 1.3)) if by_step else None
        change(user, new, die, started=lambda: os.write(writer, b"."))
        os._exit(0)
    os.read(reader, 1)
    if not by_step:
        time.sleep(draw.uniform(0, 1.2 * seconds))
        os.kill(child, signal.SIGKILL)
    os.close(reader), os.close(writer)
    _, status = os.waitpid(child, 0)
    after = state()
    others = {name: kept for name, kept in after.items() if name != user}
    assert others == {name: kept for name, kept in before.items() if name != user}
    assert after[user] in (before[user], new), "neither old nor new"
    if os.WIFSIGNALED(status):
        outcomes["old" if after[user] == before[user] else "new"] += 1
    else:
        assert after[user] == new, "a finished write was lost"
data = path.read_bytes()
print(outcomes["old"], outcomes["new"], sum(kept is not None for kept in state().values()))
"""


@pytest.mark.slow
def test_kill_9_leaves_the_old_or_the_new_user(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "users.sqlite"), "1"],
        capture_output=True,
        text=True,
        timeout=FOREVER,
    )
    assert run.returncode == 0, run.stderr
    old, _new, present = map(int, run.stdout.split())
    assert old > 10  # many were hit in the middle of a write
    assert present  # and others came to their end


FULL = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from hydra_llm.errors import BundleError
from hydra_llm.model.head import Head
from hydra_llm.model.users_file import UsersFile

path = Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
file = UsersFile(path)
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20_000,) * 2)
try:
    for i in range(100):
        file.put([f"new {i}"], {"adapter": {f"new {i}": Head.of(np.full(2000, i))}}, {})
except BundleError as error:
    print(error)
"""


def test_a_full_disk_is_one_line_and_loses_nothing(path: Path) -> None:
    with UsersFile(path)._connection:
        pass
    first = UsersFile(path)
    first.put(["ada"], {"adapter": {"ada": Head.of(np.ones(2000))}}, {"ada": history("ada", 9)})
    first.close()
    run = subprocess.run(
        [sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, timeout=FOREVER
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("\n") == 1
    assert f"{path}: cannot be written" in run.stdout
    again = UsersFile(path)
    assert (again.heads("adapter")["ada"].numbers == 1).all()
    for user in again.heads("adapter"):
        assert len(set(again.heads("adapter")[user].numbers.tolist())) == 1
    again.put(["bob"], {"adapter": {"bob": Head.of(np.ones(5))}}, {})
    assert again._rows("PRAGMA integrity_check") == [("ok",)]
    again.close()


def test_many_threads_and_connections_read_and_write(path: Path) -> None:
    shared, faults = UsersFile(path), list[BaseException]()

    def work(number: int) -> None:
        try:
            own = UsersFile(path) if number % 2 else shared
            for i in range(8):
                user = f"user {number} {i}"
                own.put([user], {"adapter": {user: Head.of(np.full(9, number))}}, {})
                assert (shared.heads("adapter")[user].numbers == number).all()
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(FOREVER)
    assert not faults
    assert len(shared.heads("adapter")) == 32


# ---- damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def another_database(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE users (name TEXT)")


def with_a_trigger(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute(
            "CREATE TRIGGER keep BEFORE DELETE ON parts BEGIN SELECT raise(IGNORE); END"
        )


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        another_database,
        with_a_trigger,
        lambda path: path.write_bytes(b"not SQLite at all" * 100),
        lambda path: path.write_bytes(b""),
    ],
)
def test_a_foreign_or_truncated_file_is_one_line(
    damage: Callable[[Path], None], path: Path
) -> None:
    users = [f"user {i}" for i in range(300)]
    file = UsersFile(path)
    file.put(users, {"adapter": {user: Head.of(np.ones(300)) for user in users}}, {})
    file.close()
    damage(path)
    with pytest.raises(BundleError, match="damaged, or no file of a bundle's users") as caught:
        dict(UsersFile(path).heads("adapter"))
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="missing from the bundle"):
        UsersFile(tmp_path / "users.sqlite")
    assert not (tmp_path / "users.sqlite").exists()


def test_a_flipped_bit_of_a_user_is_noticed(path: Path) -> None:
    file = UsersFile(path)
    file.put(["ada"], {"adapter": {"ada": Head.of(np.full(50, 7.25))}}, {})
    file.close()
    good = path.read_bytes()
    at = good.index(np.full(50, 7.25, dtype="<f4").tobytes())
    for position in range(at - 40, at + 200, 11):
        bad = bytearray(good)
        bad[position] ^= 4
        path.write_bytes(bad)
        found = None
        with suppress(BundleError):
            found = UsersFile(path).heads("adapter").get("ada")
        assert found is None or (found.numbers == 7.25).all()


def test_a_user_s_slot_is_no_other_user_s(path: Path) -> None:
    """An index that names another slot is damage, not another user's head."""
    file = UsersFile(path)
    file.put(["ada", "bob"], {"adapter": {u: Head.of(np.ones(5)) for u in ("ada", "bob")}}, {})
    with sqlite3.connect(path) as database:
        database.execute("UPDATE parts SET slot = (SELECT min(slot) FROM parts)")
    fault = "damaged.*the index names another user"
    readers = [lambda user=user: file.heads("adapter")[user] for user in ("ada", "bob")]
    right = [reader for reader in readers if not raises(reader, fault)]
    assert len(right) == 1
    file.close()


def raises(job: Callable[[], object], match: str) -> bool:
    try:
        job()
    except BundleError as error:
        return bool(re.search(match, str(error)))
    return False


def test_a_read_only_folder_is_read_and_not_written(path: Path) -> None:
    file = UsersFile(path)
    file.put(["ada"], {"adapter": {"ada": Head.of(np.ones(5))}}, {})
    file.close()
    read_only = f"{path.absolute().as_uri()}?mode=ro"
    file._connection = sqlite3.connect(read_only, uri=True, isolation_level=None)
    assert "ada" in file.heads("adapter")
    with pytest.raises(BundleError, match="cannot be written"):
        file.delete("ada")


def test_every_write_has_a_change_counter_of_its_own(path: Path, file: UsersFile) -> None:
    seen = [change_counter(path)]
    for i in range(3):
        file.put([str(i)], {}, {str(i): []})
        seen.append(change_counter(path))
    file.delete("nobody")
    assert len(set(seen)) == 4
