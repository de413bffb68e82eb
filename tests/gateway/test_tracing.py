"""Spans: their tree, what they say of an answer and why, that they end, and that nothing of a user
is in them. Nothing is made, and nothing imported, without a tracer.
"""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from hydra_llm.errors import MissingExtra
from hydra_llm.gateway.tracing import Tracing, open_tracing
from hydra_llm.gateway.upstream import HttpUpstream, UpstreamError
from hydra_llm.llm.endpoint import Endpoint
from hydra_llm.store.store import Store

from .conftest import records_of, running
from .test_operation import STREAM, hang_up, silent_upstream

pytestmark = pytest.mark.anyio
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = {"traceparent": f"00-{TRACE}-{CALLER}-01", "tracestate": "vendor=1"}
SECRET = "a storm, my secret"


@pytest.fixture
def exported() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(exported: InMemorySpanExporter) -> Tracing:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exported))
    return Tracing(provider.get_tracer("hydra_llm"), provider)


def tree(exported: InMemorySpanExporter) -> dict[str, list[ReadableSpan]]:
    """Spans by name, all ended: those that are not are not exported. Nobody's text is in them."""
    spans: dict[str, list[ReadableSpan]] = {}
    for span in exported.get_finished_spans():
        spans.setdefault(span.name, []).append(span)
        said = f"{span.name} {dict(span.attributes or {})}"
        assert "ada" not in said
        assert "secret" not in said
        assert span.events == (), "an exception's message may quote a user"
    return spans


def parents(spans: list[ReadableSpan]) -> set[int]:
    return {span.parent.span_id if span.parent else 0 for span in spans}


async def test_a_personal_answer_is_a_tree_of_stages(
    store: Store, bundles: dict[str, Path], tracing: Tracing, exported: InMemorySpanExporter
) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store, bundles["tags"], samples=3, tracing=tracing) as world:
        world.http.headers.update(PARENT)
        answer = (await world.ask(SECRET, model="gpt-4o")).json()
    spans = tree(exported)
    assert set(spans) == {"chat gpt-4o", "retrieve", "rerank", "sample", "select"}
    (root,) = [span for span in spans["chat gpt-4o"] if span.kind.name == "SERVER"]
    calls = [span for span in spans["chat gpt-4o"] if span.kind.name == "CLIENT"]
    assert f"{root.context.trace_id:032x}" == TRACE
    assert parents([root]) == {int(CALLER, 16)}
    stages = ("retrieve", "rerank", "sample", "select")
    for name in stages:
        assert parents(spans[name]) == {root.context.span_id}, name
    assert len(calls) == 2
    assert parents(calls) == {spans["sample"][0].context.span_id}
    said: dict[str, Any] = {name: dict(spans[name][0].attributes or {}) for name in stages}
    assert said["retrieve"] == {"hydra.records": 20, "hydra.retrieved": 4}
    assert said["rerank"] == {"hydra.relevant": 4, "hydra.warm": True, "hydra.reason": "relevant"}
    assert said["sample"] == {"hydra.asked": 3, "hydra.answers": 3}
    assert said["select"]["hydra.reason"] == "scored"
    assert said["select"]["hydra.candidates"] == 3
    attributes = dict(root.attributes or {})
    assert attributes["hydra.reason"] == "personal"
    assert attributes["gen_ai.usage.output_tokens"] == answer["usage"]["completion_tokens"]
    assert {(c.attributes or {})["hydra.kind"] for c in calls} == {"request", "samples"}
    assert all((c.attributes or {})["hydra.cost"] > 0 for c in calls)


async def test_the_reason_of_what_is_not_personal(
    store: Store, bundles: dict[str, Path], tracing: Tracing, exported: InMemorySpanExporter
) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store, bundles["tags"], tracing=tracing, gate="always") as world:
        await world.ask("secret: what is the capital of France?")
        await world.ask(SECRET, "nobody")
    spans = tree(exported)
    assert "select" not in spans
    gated = (spans["rerank"][0].attributes or {})["hydra.reason"]
    assert gated in ("off-task", "not-relevant")
    roots = [span for span in spans["chat m"] if span.kind.name == "SERVER"]
    reasons = [(span.attributes or {}).get("hydra.reason") for span in roots]
    assert reasons == [gated, "unknown-user"]


@pytest.mark.parametrize("traced", [True, False])
async def test_the_upstream_gets_the_trace(
    store: Store, tracing: Tracing, exported: InMemorySpanExporter, traced: bool
) -> None:
    """Without spans of its own the gateway passes on what the caller says, if it is well formed."""
    seen: list[httpx2.Headers] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        seen.append(request.headers)
        return httpx2.Response(200, text=STREAM, headers={"content-type": "text/event-stream"})

    async with running(store, tracing=tracing if traced else None, passthrough="all") as world:
        transport = httpx2.MockTransport(answer)
        world.app.state.gateway.upstream = HttpUpstream(
            Endpoint("http://upstream/v1"), timeout=5, transport=transport
        )
        world.http.headers.update(PARENT)
        await world.ask(SECRET, stream=True)
        await world.http.post("/v1/other", json={"model": "m"})
        world.http.headers["traceparent"] = "00-secret"
        await world.ask(SECRET, stream=True)
    first, passed, malformed = (headers.get("traceparent", "") for headers in seen)
    if not traced:
        assert (first, passed, malformed) == (PARENT["traceparent"],) * 2 + ("",)
        return
    spans = tree(exported)
    calls = [span for span in spans["chat m"] if span.kind.name == "CLIENT"] + spans["upstream"]
    by_id = {f"{span.context.span_id:016x}": span for span in calls}
    for header, trace in ((first, TRACE), (passed, TRACE), (malformed, None)):
        _, of, id, _ = header.split("-")
        assert trace in (None, of)
        assert by_id[id].context.trace_id == int(of, 16)
    assert seen[0]["tracestate"] == "vendor=1"
    assert malformed.split("-")[1] != TRACE


async def test_spans_end_whatever_happens(
    store: Store, tracing: Tracing, exported: InMemorySpanExporter
) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store, tracing=tracing) as world:
        world.upstream.faults = [UpstreamError(500, SECRET)]
        await world.ask(SECRET)
        _, begun = silent_upstream(world)
        body = {"model": "m", "messages": [{"role": "user", "content": SECRET}], "user": "ada"}
        await hang_up(world.app, body, begun)
        await asyncio.sleep(0)
    spans = tree(exported)
    chats = spans["chat m"]
    assert [span.kind.name for span in chats] == ["CLIENT", "SERVER"] * 2
    assert [(span.attributes or {})["error.type"] for span in chats] == [
        *("500", "UpstreamError"),
        *("CancelledError", "ClientGone"),
    ]
    assert all(span.status.status_code.name == "ERROR" for span in chats)


async def test_a_callers_mistake_is_no_error_of_the_servers_span(
    store: Store, tracing: Tracing, exported: InMemorySpanExporter
) -> None:
    async with running(store, tracing=tracing) as world:
        world.upstream.faults = [UpstreamError(404, SECRET)]
        await world.ask(SECRET)
    states = {span.kind.name: span.status.status_code.name for span in tree(exported)["chat m"]}
    assert states == {"CLIENT": "ERROR", "SERVER": "UNSET"}


def test_off_imports_nothing(tmp_path: Path) -> None:
    code = "import sys; import hydra_llm.gateway.app; from hydra_llm.gateway.tracing import *;"
    code += "t = open_tracing('off'); s = t.stage('a').__enter__(); s.set(a=1); s.end();"
    code += "parts = ('opentelemetry.sdk', 'opentelemetry.exporter');"  # FastAPI imports the API
    code += "print([name for name in sys.modules if name.startswith(parts)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.startswith("opentelemetry.exporter"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter", None)
    with pytest.raises(MissingExtra, match=r"traces=otlp needs the extra 'otel'.*\[otel\]"):
        open_tracing("otlp")


@pytest.mark.slow
async def test_spans_reach_a_collector(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the extra's exporter, to a collector on loopback, at the latest when the server ends."""
    got: list[tuple[str, bytes]] = []

    async def collect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.lower().partition("content-length:")[2].split()[0])
        got.append((head.split()[1], await reader.readexactly(length)))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(collect, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    async with running(store, traces="otlp") as world:
        await world.ask("hello", user=None)
    server.close()
    assert {path for path, _ in got} == {"/v1/traces"}
    sent = b"".join(body for _, body in got)
    assert b"chat m" in sent
    assert b"hydra-llm" in sent
