"""A real HTTP endpoint on loopback whose behaviour each test writes as a function."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from hydra_llm.llm.cache import CachedLLM

Reply = tuple[int, dict[str, str], bytes] | None
"""Status, headers, body; None cuts the connection without an answer."""
Behaviour = Callable[[dict[str, Any], int], Reply]
"""(the request's body, how many requests came before it) -> reply."""


def reply(status: int, body: Any, **headers: str) -> Reply:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return (
        status,
        {
            "Content-Type": "application/json",
            **{name.replace("_", "-"): value for name, value in headers.items()},
        },
        content,
    )


def completion(*texts: str | None) -> Reply:
    choices = [
        {"index": i, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        for i, text in enumerate(texts)
    ]
    usage = {
        "prompt_tokens": 7,
        "completion_tokens": 2 * len(texts),
        "total_tokens": 7 + 2 * len(texts),
    }
    return reply(
        200,
        {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": choices,
            "usage": usage,
        },
    )


def refusal(status: int, message: str, **fields: Any) -> Reply:
    return reply(
        status,
        {
            "error": {
                "message": message,
                "type": "invalid_request_error",
                "param": None,
                "code": None,
                **fields,
            }
        },
    )


class Endpoint:
    """The bodies and keys of its requests, and where it listens."""

    def __init__(self, behaviour: Behaviour):
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.targets: list[str] = []
        self.release = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                count = len(outer.bodies)
                outer.bodies.append(body)
                outer.targets.append(self.path)
                outer.keys.append(self.headers.get("Authorization", ""))
                answer = behaviour(body, count)
                if answer is None:
                    self.close_connection = True
                    return
                status, headers, content = answer
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[[Behaviour], Endpoint]]:
    """Start endpoints; they stop with the test."""
    started: list[Endpoint] = []

    def start(behaviour: Behaviour) -> Endpoint:
        started.append(Endpoint(behaviour))
        return started[-1]

    yield start
    for endpoint in started:
        endpoint.close()


class Wire:
    """The replies that tests compose."""

    reply, completion, refusal = (
        staticmethod(reply),
        staticmethod(completion),
        staticmethod(refusal),
    )


@pytest.fixture
def wire() -> type[Wire]:
    return Wire


def stored_rows(llm: CachedLLM) -> list[tuple[dict[str, Any], int, dict[str, Any]]]:
    """Every text in a cache's file: request, index, row."""
    query = (
        "SELECT r.payload, candidate, a.payload FROM answers a JOIN requests r ON r.id = request"
        " WHERE candidate >= 0 ORDER BY r.id, candidate"
    )
    stored = llm.file.read(query)
    return [(json.loads(request), index, json.loads(row)) for request, index, row in stored]
