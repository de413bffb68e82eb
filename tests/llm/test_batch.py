"""Calls by the Batch API, against a real HTTP endpoint that speaks it and fails as endpoints do."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from hydra_llm.config import Settings
from hydra_llm.errors import (
    BatchPending,
    BatchRefused,
    BudgetExceeded,
    LLMError,
    LLMRefused,
    SettingsError,
)
from hydra_llm.llm.base import Batch, Sampling
from hydra_llm.llm.batch import BatchLLM
from hydra_llm.llm.cache import CachedLLM
from hydra_llm.llm.concurrency import at_once, map_calls
from hydra_llm.llm.registry import open_llm
from tests.batch_server import Answer, BatchServer, completion

from .conftest import stored_rows

pytestmark = pytest.mark.anyio
SAMPLING = Sampling(n=3, temperature=1.0, max_tokens=9, seed=4)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[BatchServer]:
    monkeypatch.setattr("hydra_llm.llm.batch.QUIET", 0.05)
    monkeypatch.setattr("hydra_llm.llm.batch.POLL", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-any")
    server = BatchServer()
    yield server
    server.close()


def opened(server: BatchServer, cache: Path, mode: Batch = "wait", **options: Any) -> CachedLLM:
    settings = Settings(cache=cache, **{"retries": 2, **options})
    return open_llm(f"openai:m@{server.url}", settings, batch=mode)


def bare(llm: CachedLLM) -> BatchLLM:
    return llm.inner.inner  # type: ignore[attr-defined, no-any-return]


async def asked(llm: CachedLLM, count: int, sampling: Sampling = SAMPLING) -> list[Any]:
    """The texts of prompts 0 to `count` - 1, or errors."""

    async def one(number: int) -> tuple[str, ...]:
        return (await ask(llm, str(number), sampling)).texts

    return await map_calls(one, range(count), limit=at_once(llm))


async def ask(llm: CachedLLM, prompt: str, sampling: Sampling = SAMPLING) -> Any:
    return await llm.generate([{"role": "user", "content": prompt}], sampling)


async def directly(server: BatchServer, cache: Path, count: int) -> list[Any]:
    llm = open_llm(f"openai:m@{server.url}", Settings(cache=cache))
    results = await asked(llm, count)
    assert len(server.direct) == count
    server.direct.clear()
    return results


async def test_answers_and_cache_are_those_of_direct_calls(
    server: BatchServer, tmp_path: Path
) -> None:
    wanted = await directly(server, tmp_path / "direct", 20)
    llm = opened(server, tmp_path)
    assert await asked(llm, 20) == wanted
    assert len(server.direct) == 1, "the first call is made directly"
    (batch,) = server.batches.values()
    assert batch["request_counts"]["total"] == 19
    assert batch["endpoint"] == "/v1/chat/completions"
    assert llm.usage.calls == 20
    assert (llm.usage.prompt_tokens, llm.usage.completion_tokens) == (140, 120)
    again = open_llm(f"openai:m@{server.url}", Settings(cache=tmp_path))
    assert await asked(again, 20) == wanted
    assert (again.usage.calls, again.usage.cached) == (0, 20)
    assert len(server.direct) == 1

    def without_seconds(llm: CachedLLM) -> list[Any]:
        rows = stored_rows(llm)
        return [(request, index, {**row, "seconds": 0}) for request, index, row in rows]

    direct = open_llm(f"openai:m@{server.url}", Settings(cache=tmp_path / "direct"))
    assert without_seconds(again) == without_seconds(direct)
    share = [row["seconds"] for _, _, row in stored_rows(again) if row["seconds"] > 1]
    assert max(share) < 100 / 19 + 1, "a share of the batch's 100 seconds, not hours of waiting"


async def test_what_depends_on_answers_is_a_further_batch(
    server: BatchServer, tmp_path: Path
) -> None:
    llm = opened(server, tmp_path)
    once = Sampling(max_tokens=9)

    async def chain(number: int) -> str:
        text = str(number)
        for _ in range(3):
            text = (await ask(llm, text, once)).texts[0]
        return str(text)

    results = await map_calls(chain, range(6), limit=at_once(llm))
    assert results == [f"{n} 0.0 0 0.0 0 0.0 0" for n in range(6)]
    assert [b["request_counts"]["total"] for b in server.batches.values()] == [6, 6, 5]
    assert set(server.executed.values()) == {1}


@pytest.mark.parametrize("mode", ["wait", "submit"])
async def test_a_stopped_run_takes_its_batch_up(
    server: BatchServer, tmp_path: Path, mode: Batch
) -> None:
    server.polls = 10**9
    if mode == "submit":
        with pytest.raises(BatchPending, match="run the same command again"):
            await asked(opened(server, tmp_path, mode), 8)
    else:
        with anyio.move_on_after(3):
            await asked(opened(server, tmp_path), 8)
    assert len(server.batches) == 1
    for _ in range(2):  # it is not done yet
        with pytest.raises(BatchPending, match="0 of 7 requests"):
            await asked(opened(server, tmp_path, "submit"), 8)
    server.polls = 1
    results = await asked(opened(server, tmp_path, mode), 8)
    assert results == await directly_of(server, 8)
    assert (len(server.batches), len(server.files)) == (1, 2)
    assert set(server.executed.values()) == {1}
    assert len(server.direct) == 1, "what the model takes is known from the first run"


async def directly_of(server: BatchServer, count: int) -> list[Any]:
    """What direct calls give, without counting them."""
    before = list(server.direct)
    with tempfile.TemporaryDirectory() as folder:
        llm = open_llm(f"openai:m@{server.url}", Settings(cache=Path(folder)))
        results = await asked(llm, count)
        await llm.aclose()
    server.direct[:] = before
    return results


async def test_expired_requests_are_sent_again_and_paid_once(
    server: BatchServer, tmp_path: Path
) -> None:
    wanted = await directly(server, tmp_path / "direct", 12)
    server.expires = 4
    assert await asked(opened(server, tmp_path), 12) == wanted
    assert [b["request_counts"]["total"] for b in server.batches.values()] == [11, 4]
    assert set(server.executed.values()) == {1}


async def test_lost_and_cut_lines_are_asked_again(server: BatchServer, tmp_path: Path) -> None:
    wanted = await directly(server, tmp_path / "direct", 12)
    server.loses = 3
    assert await asked(opened(server, tmp_path), 12) == wanted
    assert [b["request_counts"]["total"] for b in server.batches.values()] == [11, 3]


async def test_it_gives_up_on_what_always_expires(server: BatchServer, tmp_path: Path) -> None:
    work = server.work

    def expiring(id: str) -> None:
        server.expires = 1
        work(id)

    server.work = expiring  # type: ignore[method-assign]
    llm = opened(server, tmp_path)
    results = await asked(llm, 3)
    errors = [result for result in results if isinstance(result, LLMError)]
    assert len(errors) == 1
    assert "expired without its answer" in str(errors[0])


async def test_failed_lines_are_errors_of_their_calls(server: BatchServer, tmp_path: Path) -> None:
    def picky(body: dict[str, Any]) -> Answer:
        if body["messages"][0]["content"] == "5":
            return 400, {"error": {"message": "I will not", "code": "content_policy"}}
        return completion(body)

    server.answer = picky
    results = await asked(opened(server, tmp_path), 9)
    assert isinstance(results[5], LLMRefused)
    assert "HTTP 400: I will not" in str(results[5])
    assert sum(isinstance(result, LLMError) for result in results) == 1
    server.answer = completion
    results = await asked(opened(server, tmp_path), 9)
    assert not any(isinstance(result, LLMError) for result in results)
    assert server.executed.most_common(1)[0][1] == 2, "the refused one alone was asked again"


async def test_requests_that_were_too_many_are_sent_again(
    server: BatchServer, tmp_path: Path
) -> None:
    failures = iter([429, 500])

    def busy(body: dict[str, Any]) -> Answer:
        if body["messages"][0]["content"] == "5" and (status := next(failures, 0)):
            return status, {"error": {"message": "busy"}}
        return completion(body)

    server.answer = busy
    results = await asked(opened(server, tmp_path), 9)
    assert not any(isinstance(result, LLMError) for result in results)
    assert [b["request_counts"]["total"] for b in server.batches.values()] == [8, 1, 1]


@pytest.mark.parametrize("size", ["requests", "bytes"])
async def test_large_batches_are_split(server: BatchServer, tmp_path: Path, size: str) -> None:
    llm = opened(server, tmp_path)
    if size == "requests":
        bare(llm).most_requests = server.most = 4
    else:
        bare(llm).most_bytes = 1000
    results = await asked(llm, 12)
    assert results == await directly_of(server, 12)
    assert len(server.batches) >= 3
    for batch in server.batches.values():
        content = server.files[batch["input_file_id"]]
        assert len(content) <= 1000 if size == "bytes" else len(content.splitlines()) <= 4


async def test_too_many_waiting_tokens_halve_the_batch(server: BatchServer, tmp_path: Path) -> None:
    def refuse(lines: list[Any]) -> list[Any]:
        others = [b for b in server.batches.values() if b["status"] == "in_progress"]
        waiting = len(lines) + sum(b["request_counts"]["total"] for b in others)
        fault = {"code": "token_limit_exceeded", "message": "Enqueued token limit reached"}
        return [fault] if waiting > 5 else []

    server.refuse = refuse
    results = await asked(opened(server, tmp_path), 15)
    assert results == await directly_of(server, 15)
    assert set(server.executed.values()) == {1}


async def test_a_refused_batch_is_an_error_of_its_calls(
    server: BatchServer, tmp_path: Path
) -> None:
    server.refuse = lambda lines: [{"code": "model_not_found", "message": "no batches of m"}]
    with pytest.raises(BatchRefused, match="no batches of m"):
        await asked(opened(server, tmp_path), 5)
    server.refuse = lambda lines: []
    results = await asked(opened(server, tmp_path), 5)
    assert not any(isinstance(result, LLMError) for result in results)


async def test_an_endpoint_without_batches_stops_the_run(
    server: BatchServer, tmp_path: Path
) -> None:
    server.fail["POST /files"] = (404, {"error": {"message": "no such page"}})
    with pytest.raises(BatchRefused, match="no such page"):
        await asked(opened(server, tmp_path), 5)
    assert len(server.direct) == 1


async def test_a_wrong_key_shows_before_anything_is_sent(
    server: BatchServer, tmp_path: Path
) -> None:
    server.answer = lambda body: (401, {"error": {"message": "wrong key"}})
    with pytest.raises(LLMRefused, match="wrong key"):
        await asked(opened(server, tmp_path), 5)
    assert (server.files, len(server.direct)) == ({}, 1)


async def test_parameters_are_learned_by_the_first_call(
    server: BatchServer, tmp_path: Path
) -> None:
    def picky(body: dict[str, Any]) -> Answer:
        for name in ("max_tokens", "seed", "n"):
            if name in body:
                message = f"Unsupported parameter: '{name}' is not supported with this model."
                return 400, {"error": {"message": message, "param": name}}
        return completion(body)

    server.answer, server.polls = picky, 10**9
    with pytest.raises(BatchPending):
        await asked(opened(server, tmp_path, "submit"), 4)
    (batch,) = server.batches.values()
    assert batch["request_counts"]["total"] == 3
    server.polls = 1
    results = await asked(opened(server, tmp_path), 4)
    assert [len(result) for result in results] == [3, 3, 3, 3]
    bodies = [line["body"] for file in batches(server) for line in server.lines(file)]
    assert {frozenset(body) for body in bodies} == {
        frozenset(("model", "messages", "temperature", "max_completion_tokens"))
    }
    assert len(bodies) == 9, "a request for each text, equal ones too"


def batches(server: BatchServer) -> list[str]:
    return [batch["input_file_id"] for batch in server.batches.values()]


@pytest.mark.parametrize("cut", ["POST /files", "POST /batches", "GET /batches/ID"])
@pytest.mark.parametrize("when", ["cut_before", "cut_after"])
async def test_a_cut_connection_makes_no_second_batch(
    server: BatchServer, tmp_path: Path, cut: str, when: str
) -> None:
    getattr(server, when).add(cut)
    results = await asked(opened(server, tmp_path), 8)
    assert results == await directly_of(server, 8)
    assert len(server.batches) == 1
    assert set(server.executed.values()) == {1}
    assert not getattr(server, when)


@pytest.mark.parametrize("cut", ["POST /files", "POST /batches", "GET /batches/ID"])
async def test_an_endpoint_that_fails_stops_the_run_to_go_on(
    server: BatchServer, tmp_path: Path, cut: str
) -> None:
    server.fail[cut] = (503, {"error": {"message": "down"}})
    with pytest.raises(BatchPending, match="down"):
        await asked(opened(server, tmp_path, retries=0), 8)
    server.fail.clear()
    results = await asked(opened(server, tmp_path, retries=0), 8)
    assert results == await directly_of(server, 8)
    assert len(server.batches) == 1
    assert set(server.executed.values()) == {1}


async def test_a_cancelled_batch_stops_the_run(server: BatchServer, tmp_path: Path) -> None:
    server.polls = 10**9
    with pytest.raises(BatchPending):
        await asked(opened(server, tmp_path, "submit"), 8)
    llm = bare(opened(server, tmp_path))
    (kept,) = llm.state.batches()
    assert (await llm.status(kept))["status"] == "in_progress"
    assert await llm.cancel(str(kept.batch)) == "cancelled"
    with pytest.raises(BatchPending, match="cancelled"):
        await asked(opened(server, tmp_path), 8)
    server.polls = 1
    assert await asked(opened(server, tmp_path), 8) == await directly_of(server, 8)
    assert set(server.executed.values()) == {1}


async def test_a_batch_that_the_endpoint_has_lost_is_sent_anew(
    server: BatchServer, tmp_path: Path
) -> None:
    server.polls = 10**9
    with pytest.raises(BatchPending):
        await asked(opened(server, tmp_path, "submit"), 8)
    server.batches.clear()
    server.polls = 1
    assert await asked(opened(server, tmp_path), 8) == await directly_of(server, 8)


async def test_a_budget_of_calls_bounds_a_batch(server: BatchServer, tmp_path: Path) -> None:
    with pytest.raises(BudgetExceeded, match="max_calls=6"):
        await asked(opened(server, tmp_path, max_calls=6), 20)
    assert len(server.direct) + server.executed.total() == 6


async def test_what_cannot_be_sent_in_batches_says_so(server: BatchServer, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="max_calls"):
        opened(server, tmp_path, max_cost=3.0)
    with pytest.raises(SettingsError, match="has no Batch API"):
        open_llm("fake:echo", Settings(cache=tmp_path), batch="wait")


async def test_the_state_on_disk_holds_no_texts(server: BatchServer, tmp_path: Path) -> None:
    llm = opened(server, tmp_path)
    for _ in range(2):
        await map_calls(partial(ask, llm), ["a secret of Ada", "another"], limit=at_once(llm))
    await llm.aclose()
    stored = (tmp_path / "batches.sqlite").read_bytes()
    assert b"secret" not in stored
    assert b"sk-any" not in stored


KILLED = """
import sys, anyio
from pathlib import Path
from hydra_llm.llm import batch
from tests.llm.test_batch import asked, opened
batch.QUIET, batch.POLL = 0.05, 0.01
class Place:
    url = sys.argv[1]
print(anyio.run(asked, opened(Place, Path(sys.argv[2])), 10), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("at", ["POST /files", "POST /batches", "GET /batches/ID", "content"])
async def test_kill_9_at_any_moment_sends_no_batch_twice(
    server: BatchServer, tmp_path: Path, at: str
) -> None:
    """The process dies while its request is carried out, and does not hear the answer."""
    kind = "GET /files/ID/content" if at == "content" else at
    processes: list[subprocess.Popen[str]] = []
    reply: Callable[..., Answer] = server.reply

    def killing(this: str, *arguments: Any) -> Answer:
        answer = reply(this, *arguments)
        if this == kind and len(processes) == 1:
            os.kill(processes[0].pid, signal.SIGKILL)
            processes[0].wait()
            processes.append(processes[0])
        return answer

    server.reply = killing  # type: ignore[method-assign]
    command = [sys.executable, "-c", KILLED, server.url, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def run() -> subprocess.Popen[str]:
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    processes.append(run())
    assert await anyio.to_thread.run_sync(processes[0].wait) == -signal.SIGKILL
    second = run()
    output, _ = await anyio.to_thread.run_sync(second.communicate)
    assert second.returncode == 0
    assert output.strip() == str(await directly_of(server, 10))
    assert len(server.batches) == 1
    assert set(server.executed.values()) == {1}
