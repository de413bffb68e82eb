"""How long each page of the dashboard takes with many users and records in PostgreSQL.

    python tools/with_postgres.py --required python benchmarks/dashboard.py [--users 10000]
        [--records 100] [--runs 7] [--limit 0.2] [--out FILE.json]

Fills a database of its own by COPY: users with records, ten answers, a correction, a job and a key
each, and figures of 90 days. A server as a process of its own is asked over HTTP for every page, as
a browser asks: by an administrator who is signed in, and for a user in the middle and a last page
of each list. `seconds` are from the request to the last byte, the median of the runs after one that
is not counted; `cpu` is what the server and PostgreSQL computed for it, which does not depend on
what else the machine does. Exits with 1 if the median of a page is above `--limit`.
"""

import argparse
import json
import os
import re
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import sqlalchemy as sa

from hydra_llm.gateway.activity import ACTIVITY_DAYS, BOUNDS, HOUR
from hydra_llm.gateway.auth import make_key
from hydra_llm.store.store import Store

WORDS = ("senate", "votes", "late", "on", "the", "budget", "as", "rain", "ends", "dry", "summers")
ANSWERS = 10  # of each user
NOW = time.time()
TICK = os.sysconf("SC_CLK_TCK")


def text(*numbers: int) -> str:
    """About sixty characters, which differ for all users and records."""
    return " ".join(
        [*(WORDS[(n * 7 + i) % 11] for n in numbers for i in range(5)), str(numbers[0])]
    )


def name(user: int) -> str:
    return f"user{user:05}@example.org"


def records(users: int, each: int) -> Iterator[tuple[Any, ...]]:
    for user in range(1, users + 1):
        for n in range(each):
            yield user, f"r{n}", n, text(user * each + n, n), WORDS[n % 11], f"2026-{n % 12 + 1:02}"


def requests(users: int) -> Iterator[tuple[Any, ...]]:
    candidates = [
        {"said": word, "text": word, "answer": word, "votes": 1, "greedy": False}
        | {"score": 0.5, "probability": 0.25}
        for word in WORDS[:4]
    ]
    content = json.dumps(
        {"candidates": candidates, "repeats": [], "visible": 9, "records": ["r1", "r2", "r3"]}
    )
    for user in range(1, users + 1):
        for n in range(ANSWERS):
            yield user, f"req_{user}_{n}", NOW - 60 * n - user, "", text(user, n), content


def figures() -> Iterator[tuple[Any, ...]]:
    kinds = [("answer", reason) for reason in ("personal", "off-task", "not-relevant", "no-user")]
    kinds += [(kind, f"{bound:g}") for kind in ("own", "upstream") for bound in BOUNDS]
    for ago in range(24 * ACTIVITY_DAYS):
        for kind, what in kinds:
            yield int(NOW) // HOUR * HOUR - ago * HOUR, kind, what, 100


def spend(users: int) -> Iterator[tuple[Any, ...]]:
    """Of each user on ten days."""
    today = datetime.now(UTC).date()
    for user in range(1, users + 1):
        for n in range(10):
            day = (today - timedelta(days=(user + 9 * n) % 90)).isoformat()
            key, model = f"{user:012x}", f"model-{user % 5}"
            yield day, key, name(user), model, "request", 5, 4000, 300, 0, 0, 1_000_000 * user


def fill(url: str, users: int, each: int) -> None:
    """Tables by the program's own migrations, rows by COPY."""
    said = json.dumps({"said": {"rejected": True}})
    numbers = range(1, users + 1)
    tables: dict[str, Iterable[tuple[Any, ...]]] = {
        "users (key, name, version, created)": ((n, name(n), n * 2**32, NOW - n) for n in numbers),
        'records ("user", id, position, input, output, time)': records(users, each),
        'requests ("user", id, created, bundle, question, content)': requests(users),
        'feedback ("user", request, created, content, folded)': (
            (n, f"req_{n}_0", NOW, said, False) for n in numbers
        ),
        'jobs ("user", id, kind, state, done, total, error, created, updated)': (
            (n, f"job_{n}", "fit", "done", each, each, "", NOW - n, NOW) for n in numbers
        ),
        "keys (id, hash, label, admin, created, bound)": (
            (f"{n:012x}", f"{n:064x}", "of a user", False, NOW - n, True) for n in numbers
        ),
        "key_users (key, name)": ((f"{n:012x}", name(n)) for n in numbers),
        "spend (day, key, name, model, kind, calls, prompt_tokens, completion_tokens,"
        " estimated_tokens, unpriced_tokens, cost)": spend(users),
        "activity (hour, kind, name, count)": figures(),
    }
    with psycopg.connect(url.replace("+psycopg", "")) as connection, connection.cursor() as cursor:
        for table, rows in tables.items():
            with cursor.copy(f"COPY {table} FROM STDIN") as copy:
                for row in rows:
                    copy.write_row(row)
        connection.commit()
        connection.autocommit = True
        cursor.execute("VACUUM ANALYZE")


@contextmanager
def database(server: str) -> Iterator[str]:
    """A new database, deleted in the end."""
    new = f"dashboard_{secrets.token_hex(4)}"
    engine = sa.create_engine(server, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {new}")
    try:
        yield sa.make_url(server).set(database=new).render_as_string(hide_password=False)
    finally:
        with engine.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {new} WITH (FORCE)")


@contextmanager
def serving(url: str) -> Iterator[tuple[int, str]]:
    """A server with the dashboard: its process and its address."""
    command = [sys.executable, "-m", "hydra_llm", "serve", "--llm", "fake:echo", "--port", "0"]
    command += ["--store", url, "--set", "dashboard=true", "--log", "off"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        while not (line := process.stderr.readline()).startswith("serving on "):
            if not line:
                sys.exit("the server does not start")
        yield process.pid, line.removeprefix("serving on ").partition("/v1;")[0]
    finally:
        process.terminate()
        process.wait()


def computed(pids: Iterable[int]) -> float:
    """Seconds of processor time that processes and their children have used."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        ticks += sum(map(int, fields[11:15]))
    return ticks / TICK


def backends(url: str) -> list[int]:
    """The processes of PostgreSQL that serve this database."""
    with psycopg.connect(url.replace("+psycopg", "")) as connection:
        own = "datname = current_database() AND pid <> pg_backend_pid()"
        of_clients = f"{own} AND backend_type = 'client backend'"  # no vacuum, which may end
        rows = connection.execute(f"SELECT pid FROM pg_stat_activity WHERE {of_clients}")
        return [row[0] for row in rows]


def pages(users: int, each: int) -> dict[str, str]:
    """Page → address, of one user in the middle."""
    of = f"user={name(users // 2)}"
    last = f"{NOW - users + 5!r}_x"
    return {
        "activity, 24 hours": "/activity",
        "activity, 30 days": "/activity?span=month",
        "users": "/users",
        "users, in the middle": f"/users?after={name(users // 2)}",
        "users, found": f"/users?q={users - 1}@EXAMPLE",
        "users, none found": "/users?q=nobody",
        "a user": f"/user?{of}",
        "records": f"/records?{of}",
        "records, last page": f"/records?{of}&before=10",
        "records, found": f"/records?{of}&q=rain+on+the+budget",
        "a record": f"/records/edit?{of}&id=r{each // 2}",
        "a record, to delete": f"/records/delete?{of}&id=r{each // 2}",
        "a new record": f"/records/new?{of}",
        "answers": f"/answers?{of}",
        "an answer": f"/answer?{of}&id=req_{users // 2}_3",
        "everything, to delete": f"/delete?{of}",
        "export": f"/export?{of}",
        "spend, 7 days": "/spend",
        "spend, 30 days": "/spend?days=30",
        "spend, 90 days": "/spend?days=90",
        "keys": "/keys",
        "keys, last page": f"/keys?after={last}",
        "a key, to revoke": "/keys/revoke?id=000000000001",
        "jobs": "/jobs",
        "jobs, last page": f"/jobs?after={last}",
        "model": "/bundle",
    }


def measure(url: str, asked: dict[str, str], runs: int) -> dict[str, dict[str, float]]:
    store = Store(url)
    key = make_key(store, admin=True)[1]
    store.close()
    out = {}
    with serving(url) as (pid, at), httpx2.Client(base_url=f"{at}/ui", timeout=600) as http:
        token = re.findall(r'name="token" value="(\w+)"', http.get("/sign-in").text)[0]
        http.post("/sign-in", data={"token": token, "key": key})
        for page, path in asked.items():
            seconds, spent = [], []
            for _ in range(runs + 1):
                processes = [pid, *backends(url)]
                before, started = computed(processes), time.perf_counter()
                answer = http.get(path)
                seconds.append(time.perf_counter() - started)
                spent.append(computed(processes) - before)
                assert answer.status_code == 200, (page, answer.status_code)
            out[page] = {
                "seconds": round(statistics.median(seconds[1:]), 4),
                "slowest": round(max(seconds[1:]), 4),
                "cpu": round(statistics.mean(spent[1:]), 4),
                "bytes": len(answer.content),
            }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=10_000)
    parser.add_argument("--records", type=int, default=100, help="of each user")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--limit", type=float, default=0.2, help="seconds")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    server = os.environ.get("TEST_POSTGRES_URL")
    if not server:
        sys.exit("no PostgreSQL: run it by tools/with_postgres.py --required")
    with database(server) as url:
        Store(url).close()
        fill(url, args.users, args.records)
        found = measure(url, pages(args.users, args.records), args.runs)
    result = {
        "users": args.users,
        "records": args.users * args.records,
        "load_average": round(os.getloadavg()[0], 1),
        "processors": os.cpu_count(),
        "pages": found,
    }
    for page, figure in found.items():
        print(f"{page:24} {figure['seconds']:7.3f} s  cpu {figure['cpu']:.3f} s")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(max(figure["seconds"] for figure in found.values()) > args.limit)


if __name__ == "__main__":
    main()
