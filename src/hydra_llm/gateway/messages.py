"""Anthropic's Messages API in terms of chat completions: a request for a message → a chat request,
chunks of a completion → the message and its stream's events, errors in its shape. Pure.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hydra_llm.gateway.pieces import ChunkReader, Kind, Piece, named_event
from hydra_llm.gateway.responses import response_format
from hydra_llm.gateway.schemas import ApiError
from hydra_llm.prompt import estimate, message_tokens

Body = Mapping[str, Any]
Message = dict[str, Any]
PREFIX = "msg_"
SAME = ("model", "stream", "max_tokens", "temperature", "top_p", "personalization", "user")
"""Fields that chat completions have too; those that only Claude understands are left out."""
REFUSED = ("container", "mcp_servers")
FAILED = "Error"
ERRORS = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}
ENDS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "content_filter": "refusal",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
}


# ---- request


def to_chat(body: Body) -> dict[str, Any]:
    """The chat request of a request for a message. `ApiError` 400: it has what no chat completion
    can do.
    """
    for name in REFUSED:
        if body.get(name):
            raise _untranslatable(name, "this")
    chat = {name: body[name] for name in SAME if body.get(name) is not None}
    chat["messages"] = _system(body.get("system")) + [
        message
        for place, sent in enumerate(body["messages"])
        for message in _messages(f"messages[{place}]", sent)
    ]
    if tools := [_tool(f"tools[{i}]", tool) for i, tool in enumerate(body.get("tools") or ())]:
        chat |= {"tools": tools, **_choice(body.get("tool_choice"))}
    form = (body.get("output_config") or {}).get("format") or body.get("output_format")
    fields = {
        "stop": body.get("stop_sequences"),
        "response_format": response_format(form),
        "stream_options": {"include_usage": True} if body.get("stream") else None,
    }
    return chat | {name: value for name, value in fields.items() if value}


def count_tokens(chat: Body) -> int:
    """The tokens of a chat request by rule of thumb: the tokenizer is the upstream's own."""
    tools = chat.get("tools")
    return sum(map(message_tokens, chat["messages"])) + (
        estimate(json.dumps(tools)) if tools else 0
    )


def _system(system: Any) -> list[Message]:
    content = _content("system", system) if system else None
    return [{"role": "system", "content": content}] if content else []


def _messages(where: str, message: Body) -> list[Message]:
    """The chat messages of one message: results of tools are messages of their own."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise ApiError(400, f"{where}.role: must be user or assistant", param=f"{where}.role")
    if not isinstance(content, list):
        return [{"role": role, "content": content}]
    messages, others, calls = list[Message](), list[Any](), list[Any]()
    for place, block in enumerate(content):
        match block:
            case {"type": "tool_result", "tool_use_id": str(id)}:
                said = _content(f"{where}.content[{place}]", block.get("content") or "")
                if block.get("is_error"):  # chat completions have no field for it
                    said = _failed(said)
                messages.append({"role": "tool", "tool_call_id": id, "content": said})
            case {"type": "tool_use", "id": str(id), "name": str(name)}:
                function = {"name": name, "arguments": json.dumps(block.get("input") or {})}
                calls.append({"id": id, "type": "function", "function": function})
            case _:
                others.append(block)
    said = _content(f"{where}.content", others)
    if said or calls or not messages:
        called = {"tool_calls": calls} if calls else {}
        messages.append({"role": role, "content": said or (None if calls else ""), **called})
    return messages


def _failed(said: Any) -> Any:
    """The content of a result that says that the tool has failed."""
    if isinstance(said, list):
        return [{"type": "text", "text": FAILED}, *said]
    return f"{FAILED}: {said}" if said else FAILED


def _content(where: str, content: Any) -> Any:
    """Blocks as a text, or as parts where there are others than text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(400, f"{where}: must be a text or a list of blocks", param=where)
    parts = [part for place, block in enumerate(content) for part in _parts(where, place, block)]
    if all(part["type"] == "text" for part in parts):  # some endpoints take a text alone
        return "\n".join(part["text"] for part in parts)
    return parts


def _parts(where: str, place: int, block: Any) -> list[dict[str, Any]]:
    match block:
        case {"type": "text", "text": str(text)}:
            return [{"type": "text", "text": text}]
        case {"type": "thinking" | "redacted_thinking"}:  # chat completions do not take it back
            return []
        case {"type": "image", "source": {"type": "url", "url": str(url)}}:
            return [{"type": "image_url", "image_url": {"url": url}}]
        case {"type": "image", "source": {"type": "base64", "data": str(data)}}:
            url = f"data:{block['source'].get('media_type')};base64,{data}"
            return [{"type": "image_url", "image_url": {"url": url}}]
        case {"type": "document", "source": {"type": "text", "data": str(text)}}:
            return [{"type": "text", "text": text}]
        case {"type": "document", "source": {"type": "base64", "data": str(data)}}:
            url = f"data:{block['source'].get('media_type')};base64,{data}"
            name = str(block.get("title") or "document")
            return [{"type": "file", "file": {"filename": name, "file_data": url}}]
    kind = block.get("type") if isinstance(block, Mapping) else block
    raise _untranslatable(f"{where}[{place}]", f"a block of the type '{kind}'")


def _tool(where: str, tool: Any) -> dict[str, Any]:
    kind = tool.get("type") if isinstance(tool, Mapping) else tool
    if kind not in (None, "custom"):
        raise _untranslatable(where, f"the tool '{kind}'")
    if not isinstance(tool.get("name"), str):
        raise ApiError(400, f"{where}.name: must be a text", param=f"{where}.name")
    given = {"description": tool.get("description"), "parameters": tool.get("input_schema")}
    told = {name: value for name, value in given.items() if value is not None}
    return {"type": "function", "function": {"name": tool.get("name"), **told}}


def _choice(choice: Any) -> dict[str, Any]:
    match choice:
        case {"type": "auto"}:
            chosen: dict[str, Any] = {"tool_choice": "auto"}
        case {"type": "any"}:
            chosen = {"tool_choice": "required"}
        case {"type": "none"}:
            chosen = {"tool_choice": "none"}
        case {"type": "tool", "name": str(name)}:
            chosen = {"tool_choice": {"type": "function", "function": {"name": name}}}
        case None:
            return {}
        case _:
            raise _untranslatable("tool_choice", "this choice")
    one = {"parallel_tool_calls": False} if choice.get("disable_parallel_tool_use") else {}
    return chosen | one


def _untranslatable(where: str, what: str) -> ApiError:
    message = f"{where}: {what} is not supported: the gateway asks its LLM by chat completions"
    return ApiError(400, f"{message}, which have none", param=where)


# ---- message

BLOCKS: Mapping[Kind, tuple[Body, str, str]] = {
    "text": ({"type": "text", "text": ""}, "text", "text_delta"),
    "refusal": ({"type": "text", "text": ""}, "text", "text_delta"),
    "reasoning": ({"type": "thinking", "thinking": "", "signature": ""}, "thinking", ""),
    "call": ({"type": "tool_use", "input": {}}, "partial_json", "input_json_delta"),
}
"""Kind of a piece → an empty block of it, the field of its deltas and their type."""


class MessageWriter:
    """Writes a message from the chunks of a completion, and the events on the way to it."""

    def __init__(self, id: str, model: str):
        head = {"id": id, "type": "message", "role": "assistant", "model": model}
        # The SDK needs numbers: 0 where the upstream does not tell its tokens.
        usage = {"input_tokens": 0, "output_tokens": 0}
        end = {"stop_reason": None, "stop_sequence": None, "usage": usage}
        self.message: dict[str, Any] = {**head, "content": [], **end}
        self._reader = ChunkReader()
        self._texts: list[str] = []  # of the blocks
        self._last: Piece | None = None

    def begin(self) -> bytes:
        """The first event."""
        return named_event({"type": "message_start", "message": self.message})

    def take(self, chunk: Body) -> bytes:
        """The events of the next chunk."""
        return b"".join(map(self._write, self._reader.take(chunk)))

    def read(self, completion: Body) -> None:
        """Take a whole completion. `ApiError` 502: a call's arguments are no JSON object."""
        for piece in self._reader.read(completion):
            self._write(piece)
        self.close()
        self.message["model"] = self._reader.model or self.message["model"]
        for block, text in zip(self.message["content"], self._texts, strict=True):
            if block["type"] == "tool_use":
                block["input"] = _arguments(text)
            else:
                block["thinking" if block["type"] == "thinking" else "text"] = text

    def close(self) -> bytes:
        """The answer is over: its last events."""
        reader, called = self._reader, [b["type"] for b in self.message["content"]]
        end = ENDS.get(reader.end, "end_turn")
        end = "tool_use" if "tool_use" in called and end == "end_turn" else end
        self.message["stop_reason"] = end
        if reader.tokens is not None:
            read, written = reader.tokens
            self.message["usage"] = {"input_tokens": read, "output_tokens": written}
        extra = reader.personalization
        told = {} if extra is None else {"personalization": extra}
        self.message |= told
        events = self._close()
        delta = {"stop_reason": end, "stop_sequence": None}
        usage = self.message["usage"]
        events += named_event({"type": "message_delta", "delta": delta, "usage": usage, **told})
        return events + named_event({"type": "message_stop"})

    def _write(self, piece: Piece) -> bytes:
        last, events = self._last, b""
        empty, field, kind = BLOCKS[piece.kind]
        if last is None or (piece.kind, piece.call) != (last.kind, last.call):
            events, index = self._close(), len(self._texts)
            call = {"id": piece.call, "name": piece.name} if piece.kind == "call" else {}
            block = {**empty, **call}
            self._last = piece
            self._texts.append("")
            self.message["content"].append(block)
            start = {"type": "content_block_start", "index": index, "content_block": block}
            events += named_event(start)
        self._texts[-1] += piece.text
        delta = {"type": kind or f"{field}_delta", field: piece.text}
        return events + self._event("content_block_delta", delta=delta)

    def _close(self) -> bytes:
        """End the block that is open."""
        if self._last is None:
            return b""
        self._last = None
        return self._event("content_block_stop")

    def _event(self, kind: str, **content: Any) -> bytes:
        return named_event({"type": kind, "index": len(self._texts) - 1, **content})


def _arguments(text: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise ApiError(502, "the upstream called a tool with arguments that are no JSON object")
    return arguments


# ---- errors


def error_body(status: int, body: Body) -> dict[str, Any]:
    """An error in Anthropic's shape; `body` has OpenAI's."""
    kind = ERRORS.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": str(body["error"]["message"])}}


def error_event(error: Body) -> bytes:
    """The event of an error within a stream; `error` has OpenAI's fields."""
    known: Sequence[str] = (*ERRORS.values(), "invalid_request_error")
    kind = error.get("type") if error.get("type") in known else "api_error"
    told = {"type": kind, "message": str(error.get("message"))}
    return named_event({"type": "error", "error": told})
