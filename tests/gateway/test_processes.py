"""Servers as processes of their own, `hydra-llm serve`: how they start, what two of them have in
common, and how they end.
"""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai
import pytest

from hydra_llm.cli.main import run
from tests.waiting import FOREVER, async_until, until

from .conftest import records_of
from .test_chaos import GOOD, MESSAGES, event, framed, stream_that, upstream_of, whole

pytestmark = [pytest.mark.anyio, pytest.mark.slow]
SERVE = [sys.executable, "-m", "hydra_llm", "serve", "--port", "0"]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@contextmanager
def served(*arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], str, list[str]]]:
    """A server process, its URL, and the lines that it printed up to that one."""
    process = subprocess.Popen(
        [*SERVE, "--set", "gate=off", *arguments],
        env={**os.environ, "OPENAI_API_KEY": "x"},
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        lines = [process.stderr.readline().decode()]
        while not lines[-1].startswith("serving on "):
            assert lines[-1], f"it does not start: {lines}"
            lines.append(process.stderr.readline().decode())
        yield process, lines[-1].removeprefix("serving on ").partition("/v1;")[0], lines
    finally:
        process.terminate()
        assert process.wait(FOREVER) == 0


def connects(url: str) -> bool:
    """Whether a server listens there."""
    at = urlsplit(url)
    with socket.socket() as probe:
        return probe.connect_ex((at.hostname, at.port)) == 0


def test_a_server_prints_its_port_and_the_bundle_it_ignores(
    tmp_path: Path, bundles: dict[str, Path]
) -> None:
    for name in ("one", "other"):
        shutil.copytree(bundles["tags"], tmp_path / name)
    where = ["--llm", "fake:echo", "--store", f"sqlite:///{tmp_path / 's.db'}"]
    assert run(["store", "migrate", *where[2:]]) == 0
    assert run(["bundles", "use", str(tmp_path / "one"), *where[2:]]) == 0
    with served(*where, "--bundle", str(tmp_path / "other")) as (_, url, lines):
        assert (
            f"--bundle {tmp_path / 'other'} is ignored: `hydra-llm bundles use` set"
            f" {tmp_path / 'one'} for this store" in lines[1]
        )
        assert httpx2.get(f"{url}/health/readiness", timeout=FOREVER).status_code == 200
        port = url.rpartition(":")[2]
        second = subprocess.run([*SERVE, *where, "--port", port], capture_output=True, text=True)
        assert (second.returncode, second.stdout) == (2, "")
        assert second.stderr.count("\n") == 1
        taken = f"--host 127.0.0.1 --port {port}: Address already in use: choose another"
        assert taken in second.stderr


def test_the_first_start_elsewhere_makes_a_key(tmp_path: Path) -> None:
    """One line at the start and one per request, as JSON. SIGHUP ends it as SIGTERM does."""
    where = ["--llm", "fake:echo", "--store", f"sqlite:///{tmp_path / 's.db'}"]
    everywhere = [*SERVE, *where, "--host", "0.0.0.0", "--log", "json"]
    with subprocess.Popen(everywhere, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        created, made, line = (process.stderr.readline() for _ in range(3))
        assert created == f"store sqlite:///{tmp_path / 's.db'}: created\n"
        key = made.removeprefix("admin key, which is not shown again: ").strip()
        start = json.loads(line)
        assert start.keys() == {
            "time",
            "message",
            "address",
            "bundle",
            "gate",
            "store",
            "upstream",
            "extras",
        }
        url = start["address"].replace("0.0.0.0", "127.0.0.1")
        for headers, status in (({}, 401), ({"authorization": f"Bearer {key}"}, 200)):
            answer = httpx2.get(f"{url}/models", headers=headers, timeout=FOREVER)
            assert answer.status_code == status
        process.send_signal(signal.SIGHUP)
        rest = process.stderr.read().splitlines()
        assert process.wait(FOREVER) == 0
    assert [json.loads(line)["status"] for line in rest[:2]] == [401, 200]
    assert rest[2:] == ["stopped; requests in flight have ended"]
    assert key not in "".join(rest)


def test_an_embedded_model_has_the_name_of_its_spec_too(tmp_path: Path) -> None:
    """Who starts it knows the spec alone; the start tells the model's own name."""
    script = tmp_path / "script.json"
    script.write_text('["one", "two"]')
    spec = f"fake:script={script}"
    with served("--llm", spec, "--store", f"sqlite:///{tmp_path}/s.db") as (_, url, lines):
        told = re.search(r"; upstream (\S+) \(model (\S+)\);", lines[-1])
        assert told is not None
        assert told[1] == spec
        with httpx2.Client(base_url=f"{url}/v1", timeout=FOREVER) as http:
            body: dict[str, Any] = {"messages": [{"role": "user", "content": "?"}]}
            for name, text in ((spec, "one"), (told[2], "two")):
                reply = http.post("/chat/completions", json={**body, "model": name}).json()
                assert reply["choices"][0]["message"]["content"] == text
                assert reply["model"] == told[2]
            wrong = http.post("/chat/completions", json={**body, "model": "gpt-4o-mini"})
            assert wrong.status_code == 404
            assert told[2] in wrong.json()["error"]["message"]


def test_a_change_on_one_server_is_seen_by_the_other_at_once(url: str) -> None:
    """Two processes on one database, the second asked by the official SDK as most programs use it:
    not async.
    """
    where = ["--llm", "fake:echo", "--store", url, "--set", "gate=off"]
    with served(*where) as (_, one, _), served(*where) as (_, other, _):
        http = httpx2.Client(base_url=f"{one}/v1", timeout=FOREVER)
        client = openai.OpenAI(
            api_key="any", base_url=f"{other}/v1", timeout=FOREVER, max_retries=0
        )

        def ask(**more: Any) -> tuple[str, Any]:
            raw = client.chat.completions.with_raw_response.create(
                model="fake:echo", messages=MESSAGES, user="ada", **more
            )
            return raw.headers["x-hydra-personalized"], raw.parse()

        assert ask()[0] == "false; reason=unknown-user"
        sent = [{"id": r.id, "input": r.input, "output": r.output} for r in records_of("ada")]
        assert http.post("/users/ada/records", json={"records": sent}).json()["added"] == 20
        how, completion = ask()
        assert how == "true"
        how, stream = ask(stream=True)
        chunks = list(stream)
        assert how == "true"
        assert (
            "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            == completion.choices[0].message.content
        )
        assert [
            chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason
        ] == ["stop"]
        assert "personalization" in chunks[-1].model_extra

        reply = http.post(
            "/feedback",
            json={"request_id": completion.personalization["request_id"], "edited": "mine"},
        ).json()
        assert reply["record"] in ask()[1].personalization["records"]
        assert http.delete("/users/ada").json()["deleted"]["records"] == 21
        assert ask()[0] == "false; reason=unknown-user"
        assert httpx2.get(f"{other}/v1/users/ada/records", timeout=FOREVER).status_code == 404


@pytest.mark.parametrize("workers", ["1", "3"])
async def test_a_stopping_server_finishes_the_requests_in_flight(
    tmp_path: Path, workers: str
) -> None:
    """Answers, and a stream; new connections are refused at once."""
    arrived, release = 0, asyncio.Event()

    async def slow(out: asyncio.StreamWriter) -> None:
        nonlocal arrived
        arrived += 1
        await release.wait()
        await whole(200, GOOD)(out)

    async def wait(_: asyncio.StreamWriter) -> None:
        await release.wait()

    streamed = stream_that(wait, framed(event("whole", "stop"), b"data: [DONE]\n\n", b""))
    body = {"model": "m", "messages": MESSAGES}
    async with upstream_of(streamed, slow) as upstream:
        spec = f"openai:m@{upstream.endpoint.url}"
        where = ["--llm", spec, "--store", f"sqlite:///{tmp_path / 's.db'}", "--workers", workers]
        with served(*where) as (process, url, _):
            async with (
                httpx2.AsyncClient(base_url=url, timeout=FOREVER) as http,
                http.stream(
                    "POST", "/v1/chat/completions", json={**body, "stream": True}
                ) as stream,
            ):
                lines = stream.aiter_lines()
                assert "half " in await anext(lines)
                requests = [
                    asyncio.create_task(http.post("/v1/chat/completions", json=body))
                    for _ in range(8)
                ]
                await async_until(lambda: arrived == len(requests))
                process.send_signal(signal.SIGTERM)
                await asyncio.to_thread(until, lambda: not connects(url))
                release.set()
                answers = await asyncio.gather(*requests)
                assert [answer.status_code for answer in answers] == [200] * 8
                rest = [line async for line in lines if line]
                assert "whole" in rest[0]
                assert rest[-1] == "data: [DONE]"
            assert await asyncio.to_thread(process.wait, FOREVER) == 0
            assert process.stderr is not None
            log = process.stderr.read().decode()
            assert "requests in flight have ended" in log
            assert "Traceback" not in log
