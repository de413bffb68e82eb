"""The fake upstream of `tools/try_clients.py`: an OpenAI-compatible ASGI application that gives
every client an answer of the form that it asks for, and notes the bodies of the requests.
"""

import base64
import json
import struct
from collections.abc import Iterator
from typing import Any

TEXT = "peppermint"
DSPY_FIELD = "[[ ## answer ## ]]"
USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}


def example(schema: dict[str, Any], root: dict[str, Any] | None = None) -> Any:
    """A value that a JSON schema allows."""
    root = root or schema
    if "$ref" in schema:
        place: Any = root
        for part in schema["$ref"].removeprefix("#/").split("/"):
            place = place[part]
        return example(place, root)
    for options in ("anyOf", "oneOf", "allOf"):
        if options in schema:
            return example(schema[options][0], root)
    if "enum" in schema:
        return schema["enum"][0]
    match schema.get("type", "object"):
        case "object":
            return {name: example(own, root) for name, own in schema.get("properties", {}).items()}
        case "array":
            return []
        case "integer" | "number":
            return 1
        case "boolean":
            return True
        case "null":
            return None
    return TEXT


def message(body: dict[str, Any]) -> dict[str, Any]:
    """The assistant's message: a tool call, JSON, DSPy's fields, or a text."""
    said = {"role": "assistant", "content": TEXT}
    tools, messages = body.get("tools") or [], body["messages"]
    if tools and not any(entry.get("role") == "tool" for entry in messages):
        function = tools[0]["function"]
        arguments = json.dumps(example(function.get("parameters") or {}))
        call = {"name": function["name"], "arguments": arguments}
        return said | {
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": call}],
        }
    match body.get("response_format") or {}:
        case {"type": "json_schema", "json_schema": {"schema": schema}}:
            return said | {"content": json.dumps(example(schema))}
        case {"type": "json_object"}:
            return said | {"content": json.dumps({"name": TEXT, "memory": [], "facts": []})}
    if DSPY_FIELD in json.dumps(messages):
        return said | {"content": f"{DSPY_FIELD}\n{TEXT}\n\n[[ ## completed ## ]]"}
    return said


def completion(body: dict[str, Any]) -> dict[str, Any]:
    said = message(body)
    end = "tool_calls" if "tool_calls" in said else "stop"
    choices = [
        {"index": i, "message": said, "finish_reason": end} for i in range(body.get("n") or 1)
    ]
    head = {"id": "chatcmpl-fake", "object": "chat.completion", "created": 1}
    return {**head, "model": body["model"], "choices": choices, "usage": USAGE}


def chunks(body: dict[str, Any]) -> Iterator[bytes]:
    """The completion as a stream."""
    whole = completion(body)
    choice = whole["choices"][0]
    delta = dict(choice["message"])
    if "tool_calls" in delta:
        delta["tool_calls"] = [{"index": 0, **delta["tool_calls"][0]}]
    for part, end in ((delta, None), ({}, choice["finish_reason"])):
        entry = {"index": 0, "delta": part, "finish_reason": end}
        chunk = {**whole, "object": "chat.completion.chunk", "choices": [entry], "usage": None}
        yield b"data: " + json.dumps(chunk).encode() + b"\n\n"
    if (body.get("stream_options") or {}).get("include_usage"):
        chunk = {**whole, "object": "chat.completion.chunk", "choices": []}
        yield b"data: " + json.dumps(chunk).encode() + b"\n\n"
    yield b"data: [DONE]\n\n"


class Upstream:
    """The application; `asked` are the bodies of the chat requests so far."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        raw, more = b"", True
        while more:
            event = await receive()
            raw, more = raw + event.get("body", b""), event.get("more_body", False)
        kind, answer = "application/json", b""
        if scope["path"].endswith("/embeddings"):
            body = json.loads(raw)
            texts, vector = body["input"], [0.1] * 1536
            encoded = base64.b64encode(struct.pack("<1536f", *vector)).decode()
            own = encoded if body.get("encoding_format") == "base64" else vector
            data = [
                {"object": "embedding", "index": i, "embedding": own}
                for i in range(1 if isinstance(texts, str) else len(texts))
            ]
            answer = json.dumps(
                {"object": "list", "data": data, "model": "e", "usage": USAGE}
            ).encode()
        elif scope["path"].endswith("/chat/completions"):
            body = json.loads(raw)
            self.asked.append(body)
            if body.get("stream"):
                kind, answer = "text/event-stream", b"".join(chunks(body))
            else:
                answer = json.dumps(completion(body)).encode()
        else:
            answer = json.dumps(
                {"object": "list", "data": [{"id": "m", "object": "model"}]}
            ).encode()
        headers = [(b"content-type", kind.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})
