"""Around everything else: counts each request and writes one line about it, as text or JSON. Never
a content, never a user's id: a route is the path's pattern.
"""

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from secrets import token_hex
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hydra_llm.gateway.telemetry import Telemetry, noting

requests = logging.getLogger("hydra_llm.gateway.requests")
CLIENT_GONE = 499  # the status of a request whose client hung up, as nginx has it
FIELDS = (
    *("tool", "tool_error", "reason", "candidates"),
    *("prompt_tokens", "completion_tokens", "cost", "upstream", "seconds"),
)


class RequestLog:
    """The outermost middleware. Answers HEAD as GET without the content."""

    def __init__(self, app: ASGIApp, *, telemetry: Telemetry):
        self._app, self._telemetry = app, telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, method = time.perf_counter(), scope["method"]
        status, ended = 0, False
        facts: dict[str, Any] = {"id": f"req_{token_hex(12)}"}
        noting.set(facts)

        async def sent(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                ended = not message.get("more_body", False)
                if method == "HEAD":
                    message = {**message, "body": b""}
            await send(message)

        state = scope.setdefault("state", {})
        if method == "HEAD":
            scope = {**scope, "method": "GET"}
        self._telemetry.in_flight.inc()
        try:
            await self._app(scope, receive, sent)
        except BaseException:
            status, ended = status or 500, True
            raise
        finally:
            self._telemetry.in_flight.dec()
            status = status if ended else CLIENT_GONE
            route = state.get("route", "unknown")
            self._telemetry.requests.labels(route, str(status)).inc()
            self._write(method, route, status, time.perf_counter() - started, facts)

    def _write(
        self, method: str, route: str, status: int, total: float, facts: Mapping[str, Any]
    ) -> None:
        if requests.isEnabledFor(logging.INFO):
            line = {"id": facts["id"], "method": method, "route": route, "status": status}
            line |= {name: facts[name] for name in FIELDS if name in facts}
            stages = {name: round(spent, 4) for name, spent in facts.get("seconds", {}).items()}
            line["seconds"] = {**stages, "total": round(total, 4)}
            requests.info("", extra={"request": line})


class Lines(logging.Formatter):
    """A log record as one line: the time, then a request's fields or a message."""

    def __init__(self, as_json: bool):
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = getattr(record, "request", None)
        if self._as_json:
            message = {"level": record.levelname.lower(), "message": record.getMessage()}
            return json.dumps({"time": moment, **(line or message)})
        if line is None:
            return f"{moment} {record.levelname.lower()}: {record.getMessage()}"
        head = [str(line[name]) for name in ("method", "route", "status", "id")]
        told = [f"{name}={line[name]}" for name in FIELDS[:-1] if name in line]
        spent = [f"{name}={seconds:g}s" for name, seconds in line["seconds"].items()]
        return " ".join([moment, *head, *told, *spent])


@contextmanager
def logging_to_stderr(style: str) -> Iterator[None]:
    """Write the lines of this package and of the server to stderr: text, json, or off (failures
    only). For the time of a server: a library leaves the log alone.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(Lines(style == "json"))
    loggers = [logging.getLogger(name) for name in ("hydra_llm", "mcp", "uvicorn")]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    raises, level = logging.raiseExceptions, requests.level
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
    requests.setLevel(logging.WARNING if style == "off" else logging.INFO)
    logging.raiseExceptions = False  # a full disk under the log costs lines, not answers
    try:
        yield
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
        requests.setLevel(level)
        logging.raiseExceptions = raises
