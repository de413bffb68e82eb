"""What tests of the dashboard share: somebody who signs in, and a store in which something is."""

import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import httpx2

from hydra_llm.gateway.activity import HOUR
from hydra_llm.gateway.auth import make_key
from hydra_llm.store.store import Store
from hydra_llm.store.values import Request, Spend, Spender
from hydra_llm.types import Record

from .conftest import World

NOW = time.time()

ADMIN_ENDPOINTS: list[tuple[str, str, Any]] = [
    ("GET", "/v1/keys", None),
    ("GET", "/v1/keys?user=bob", None),
    ("POST", "/v1/keys", {"users": ["bob"]}),
    ("DELETE", "/v1/keys/{key}", None),
    ("GET", "/v1/jobs", None),
    ("GET", "/v1/activity", None),
    ("GET", "/v1/audit", None),
]


def token_in(page: str) -> str:
    """The token of a page's forms."""
    found = re.search(r'name="token" value="(\w+)"', page)
    assert found is not None, page
    return found[1]


class Visitor:
    """A browser without a window: it keeps cookies, and sends the token of its last page."""

    def __init__(self, http: httpx2.AsyncClient):
        self.http, self.token = http, ""

    async def get(self, path: str, **query: str) -> httpx2.Response:
        answer = await self.http.get(f"/ui{path}", params=query or None)
        if 'name="token"' in answer.text:
            self.token = token_in(answer.text)
        return answer

    async def post(self, path: str, **fields: str) -> httpx2.Response:
        return await self.http.post(f"/ui{path}", data={"token": self.token, **fields})

    async def sign_in(self, key: str) -> httpx2.Response:
        await self.get("/sign-in")
        answer = await self.post("/sign-in", key=key)
        if answer.status_code == 303:
            await self.get("/records/new", user="ada")
        return answer

    @property
    def cookie(self) -> str:
        (value,) = [cookie.value for cookie in self.http.cookies.jar]
        assert value is not None
        return value


@asynccontextmanager
async def visiting(
    world: World, key: str | None = None, url: str = "http://localhost"
) -> AsyncIterator[Visitor]:
    """Somebody at the dashboard, signed in if there is a key."""
    transport = httpx2.ASGITransport(world.app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url=url) as http:
        visitor = Visitor(http)
        if key is not None:
            assert (await visitor.sign_in(key)).status_code == 303
        yield visitor


def candidate(text: str, score: float | None, probability: float | None, **more: Any) -> Any:
    same = {"said": text, "text": text, "answer": text, "votes": 1, "greedy": False}
    return {**same, "score": score, "probability": probability, **more}


def answered(id: str, user: str, ago: float = 60.0, question: str = "") -> Request:
    """An answer with three candidates, of records 0 and 3."""
    candidates = [
        candidate("calm", 1.25, 0.61),
        candidate("loud", 0.5, 0.29, greedy=True, votes=2),
        candidate("odd", -0.1, 0.1),
    ]
    content = {"candidates": candidates, "repeats": [], "visible": 20, "records": ["r0", "r3"]}
    parts = {
        "head": 0.61,
        "share_0.15": 0.3,
        "llm_votes": -0.25,
        "share_0.5": 0.12,
        "shared": -0.03,
    }
    content |= {"abstained": False, "unscored": None, "why": {"parts": parts}}
    return Request(id, user, NOW - ago, "", question or "the storm at the harbour", content)


def fill(store: Store, users: int = 3, records: int = 45) -> dict[str, str]:
    """Users `ada`, `bob` and others with records, answers, jobs and keys; the keys' secrets
    by name.
    """
    for user in ("ada", "bob", *(f"user-{n:03}@example.org" for n in range(users - 2))):
        texts = ("whales under the waves", "a general and his army", "letters to a sweetheart")
        own = []
        for n in range(records):
            answer, month = ("calm", "loud")[n % 2], f"2026-{n % 9 + 1:02}"
            own.append(Record(user, f"r{n}", f"{texts[n % 3]} {n}", answer, month))
        store.add_records(user, own)
        for n in range(3):
            store.add_request(answered(f"req_{user[:8]}{n}", user, 3600.0 * n + 60))
        store.add_job(f"job-{user}", user, "fit")
        store.update_job(f"job-{user}", 45, 45, state="done")  # else a server would do it
    store.update_job("job-bob", 3, 45, state="failed", error="the LLM does not answer")
    return {
        "ada": make_key(store, users=["ada"], label="ada's phone")[1],
        "two": make_key(store, users=["ada", "user-000@example.org"], label="notebook")[1],
        "admin": make_key(store, admin=True, label="operations")[1],
    }


def add_figures(store: Store) -> None:
    """Figures of eight days, with more answers in the afternoons."""
    hour, counts = int(NOW) // HOUR * HOUR, dict[tuple[int, str, str], int]()
    for ago in range(24 * 8):
        many = 40 + 25 * (ago % 24 > 12) + ago % 7
        own = {("answer", "personal"): many, ("answer", "off-task"): many // 4}
        own |= {("answer", "not-relevant"): many // 9, ("answer", "no-user"): many // 8}
        own |= {("answer", "overloaded"): int(ago % 11 == 0), ("pick", "first"): many // 3}
        own |= {("pick", "other"): many // 2, ("upstream", "1"): many // 2}
        own |= {("upstream", ("2.5", "5")[ago % 5 == 0]): many // 3, ("own", "0.025"): many}
        own |= {("own", ("0.05", "0.1")[ago % 6 == 0]): many // 9}
        own |= {("feedback", "wanted"): many // 12, ("feedback", "unwanted"): many // 30}
        counts |= {(hour - ago * HOUR, *kind): count for kind, count in own.items() if count}
    store.add_activity(counts)
    spent = dict[Spender, Spend]()
    for ago in range(8):
        day = datetime.fromtimestamp(NOW - ago * 24 * HOUR, UTC).strftime("%Y-%m-%d")
        for user, model, many in (("ada", "gpt-5-mini", 9), ("bob", "gpt-5", 4), ("", "gpt-5", 1)):
            calls = many * (3 + ago % 3)
            amount = Spend(calls, calls * 900, calls * 60, cost=calls * 10**7)
            spent[Spender(day, "", user, model)] = amount
    store.add_spend(spent)
