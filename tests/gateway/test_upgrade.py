"""An upgrade without a failed request: a server of the code before the latest migration and one of
this code on one PostgreSQL, asked all the time.
"""

import io
import itertools
import os
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from pathlib import Path

import httpx2
import pytest
import sqlalchemy as sa

from hydra_llm.cli.main import run
from hydra_llm.store.database import Database
from hydra_llm.store.migrate import FOLDER, LATEST, upgrade, version_of
from tests.waiting import FOREVER, until

from .test_processes import served

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
CLIENTS, PAUSE = 3, 0.05


def git(*arguments: str) -> bytes:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True)
    if done.returncode:
        pytest.skip(f"no history of the code: git {arguments[0]}: {done.stderr.decode().strip()}")
    return done.stdout


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """The sources as they were before the commit that added the latest migration."""
    (migration,) = (FOLDER / "versions").glob(f"{LATEST}_*.py")
    added = git("log", "--diff-filter=A", "--format=%H", "--", str(migration)).split()
    if not added:
        pytest.skip(f"no commit adds {migration.name}: this is no whole history")
    archive = git("archive", f"{added[-1].decode()}^", "src")
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(tmp_path / "before", filter="data")
    return tmp_path / "before" / "src"


class Load:
    """Clients that ask the servers of a list in turns, as a balancer would, and count answers."""

    def __init__(self, *servers: str):
        self._servers, self.counts = servers, Counter[tuple[str, object]]()
        self._asking: dict[int, str] = {}  # client → the server that it asks
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(CLIENTS)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, client: int) -> None:
        once = httpx2.Limits(max_keepalive_connections=0)  # each request may go elsewhere
        with httpx2.Client(timeout=FOREVER, limits=once) as http:
            for turn in itertools.count(client):
                with self._lock:
                    server = self._servers[turn % len(self._servers)]
                    self._asking[client] = server
                try:
                    answers = self._turn(http, server, turn)
                except httpx2.TransportError as error:
                    answers = [type(error).__name__]
                with self._lock:
                    self.counts.update((server, answer) for answer in answers)
                if self._ended.wait(PAUSE):
                    return

    def _turn(self, http: httpx2.Client, server: str, turn: int) -> list[object]:
        user = f"u{turn % 5}"
        record = {"id": str(turn % 50), "input": "wine", "output": f"dry {turn}"}
        message = {"role": "user", "content": f"wine number {turn}"}
        body = {"model": "fake:echo", "user": user, "messages": [message]}
        records = http.post(f"{server}/v1/users/{user}/records", json={"records": [record]})
        answer = http.post(f"{server}/v1/chat/completions", json=body)
        return [records.status_code, answer.headers["x-hydra-personalized"]]

    def turn_to(self, *servers: str) -> None:
        """Ask these from now on, and wait until no request is under way to another."""
        with self._lock:
            self._servers = servers
        until(lambda: set(self._asking.values()) <= set(servers))

    def asked(self, server: str) -> None:
        """Wait until a server has answered some more."""

        def count() -> int:
            with self._lock:
                return sum(n for (at, _), n in self.counts.items() if at == server)

        goal = count() + 4 * CLIENTS
        until(lambda: count() >= goal)


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_writers_do_not_wait_behind_a_migration(url: str) -> None:
    """It waits for a long transaction, and others write meanwhile."""
    database = Database(url)
    upgrade(database.engine, "0003")
    insert = "INSERT INTO users (name, version, created) VALUES (%s, 0, 0)"
    record = "INSERT INTO records SELECT key, 'r', 0, 'in', 'out', '' FROM users WHERE name = %s"
    migration = threading.Thread(target=upgrade, args=(database.engine,))
    with database.writing() as connection:
        for name in ("ada", "bob"):
            connection.exec_driver_sql(insert, (name,))
    with database.writing() as long:
        long.exec_driver_sql(record, ("ada",))
        migration.start()
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
        until(lambda: database.rows(sa.text(waiting))[0][0] > 0)
        with database.writing() as other:
            other.exec_driver_sql(record, ("bob",))
        assert migration.is_alive()
        assert version_of(database.engine) == "0003"
    migration.join(FOREVER)
    assert version_of(database.engine) == LATEST
    database.close()


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_no_request_fails_across_a_migration(
    url: str, before: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Migrate while the old server is asked, start the new one, ask both, stop the old one. Every
    write is kept, and every answer is from the user's records.
    """
    where = ["--llm", "fake:echo", "--store", url]
    own = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", str(before))
    make = [sys.executable, "-m", "hydra_llm", "store", "migrate", "--store", url]
    subprocess.run(make, check=True, cwd=before)
    database = Database(url)
    assert version_of(database.engine) != LATEST
    with served(*where) as (old_process, old, _):
        monkeypatch.setenv("PYTHONPATH", own)
        with Load(old) as load:
            load.asked(old)
            assert run(["store", "migrate", "--store", url]) == 0
            assert version_of(database.engine) == LATEST
            load.asked(old)
            with served(*where) as (_, new, _):
                load.turn_to(old, new)
                load.asked(old)
                load.asked(new)
                load.turn_to(new)
                old_process.terminate()
                assert old_process.wait(FOREVER) == 0
                load.asked(new)
                load.__exit__()
    database.close()
    expected = {(server, what) for server in (old, new) for what in (200, "true")}
    assert set(load.counts) == expected
