"""OpenAI's Responses API in terms of chat completions: a request for a response → a chat request,
chunks of a completion → the response and its stream's events. Pure: knows no users and no store.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hydra_llm.gateway.pieces import ChunkReader, Kind, Piece, named_event
from hydra_llm.gateway.schemas import ApiError

Body = Mapping[str, Any]
Item = dict[str, Any]
PREFIX = "resp_"
# Fields that chat completions have not, or in another form; all others go to the upstream.
OWN = (
    *("input", "instructions", "previous_response_id", "store", "stream_options", "metadata"),
    *("text", "tools", "tool_choice", "reasoning", "max_output_tokens", "top_logprobs"),
    *("include", "truncation", "max_tool_calls", "context_management", "n"),
)
REFUSED = ("conversation", "prompt", "background")
ECHOED: Body = {
    "instructions": None,
    "max_output_tokens": None,
    "previous_response_id": None,
    "temperature": None,
    "top_p": None,
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
    "metadata": {},
    "text": {"format": {"type": "text"}},
    "reasoning": {"effort": None, "summary": None},
}
"""Fields of a request that its response repeats, with their defaults."""
FORMATS = "json_object or json_schema"
LOGPROBS = "message.output_text.logprobs"
ENDS = {"length": "max_output_tokens", "content_filter": "content_filter"}
"""Finish reasons of answers that are not whole, as the Responses API names them."""


# ---- request


def to_chat(body: Body, items: Sequence[Body]) -> dict[str, Any]:
    """The chat request of a request for a response; `items` are the conversation's. `ApiError` 400:
    it has what no chat completion can do.
    """
    for name in REFUSED:
        if body.get(name):
            message = f"{name} is not supported here: send the conversation in 'input'"
            raise ApiError(400, message, param=name, code="unsupported_parameter")
    chat = {name: value for name, value in body.items() if name not in OWN and value is not None}
    instructions = body.get("instructions")
    first = [{"role": "system", "content": instructions}] if instructions else []
    chat["messages"] = first + messages_of(items)
    tools, choice = _tools(body.get("tools") or ()), body.get("tool_choice")
    match choice:
        case {"type": "allowed_tools", "tools": list(allowed), "mode": mode}:
            names = [tool.get("name") for tool in allowed if isinstance(tool, Mapping)]
            tools = [tool for tool in tools if tool["function"]["name"] in names]
            choice = mode
    if tools:
        chat |= {"tools": tools} | ({"tool_choice": _choice(choice)} if choice else {})
    else:
        chat.pop("parallel_tool_calls", None)  # refused where there are no tools
    text, reasoning = body.get("text") or {}, body.get("reasoning") or {}
    fields = {
        "response_format": response_format(text.get("format")),
        "verbosity": text.get("verbosity"),
        "reasoning_effort": reasoning.get("effort"),
        "max_tokens": body.get("max_output_tokens"),
        "top_logprobs": body.get("top_logprobs"),
        "logprobs": bool(body.get("top_logprobs") or LOGPROBS in (body.get("include") or ())),
        "stream_options": {"include_usage": True} if body.get("stream") else None,
    }
    return chat | {name: value for name, value in fields.items() if value}


def response_format(form: Any) -> Any:
    """A chat request's `response_format` of `text.format`; None for plain text."""
    if not isinstance(form, Mapping) or form.get("type") in (None, "text"):
        return None
    if form["type"] == "json_object":
        return dict(form)
    if form["type"] != "json_schema":
        raise ApiError(
            400, f"the format '{form['type']}' is not known: text, {FORMATS}", param="text"
        )
    names = ("name", "description", "schema", "strict")
    schema = {name: form[name] for name in names if form.get(name) is not None}
    return {"type": "json_schema", "json_schema": {"name": "answer", **schema}}


def messages_of(items: Sequence[Body]) -> list[dict[str, Any]]:
    """The messages of a chat that items of a conversation are."""
    messages: list[dict[str, Any]] = []
    for place, item in enumerate(items):
        where = f"input[{place}]"
        match item.get("type") or "message":
            case "message":
                content = _content(where, item.get("content"))
                messages.append({"role": _role(where, item.get("role")), "content": content})
            case "function_call":
                _add_call(messages, where, item)
            case "function_call_output":
                content = _content(where, item.get("output"))
                id = _text(where, item, "call_id")
                if not isinstance(content, str | list):
                    fault = f"{where}.output: must be a text or a list of parts"
                    raise ApiError(400, fault, param=f"{where}.output")
                messages.append({"role": "tool", "tool_call_id": id, "content": content})
            case "reasoning":  # the model's own: chat completions do not take it back
                pass
            case other:
                raise _untranslatable(where, f"an item of the type '{other}'")
    return messages


def _role(where: str, role: Any) -> str:
    if role not in ("user", "assistant", "system", "developer"):
        known = "user, assistant, system or developer"
        raise ApiError(400, f"{where}.role: must be {known}", param=f"{where}.role")
    return "system" if role == "developer" else str(role)  # as every endpoint knows it


def _text(where: str, item: Body, name: str) -> str:
    """A field that must be a text; else `ApiError` 400."""
    value = item.get(name)
    if not isinstance(value, str) or not value:
        raise ApiError(400, f"{where}.{name}: must be a text", param=f"{where}.{name}")
    return value


def _add_call(messages: list[dict[str, Any]], where: str, item: Body) -> None:
    """Add a call to the assistant's message: all calls before a result are one message's."""
    given = {"arguments": "{}", **{name: own for name, own in item.items() if own}}
    function = {name: _text(where, given, name) for name in ("name", "arguments")}
    call = {"id": _text(where, item, "call_id"), "type": "function", "function": function}
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    messages[-1].setdefault("tool_calls", []).append(call)


def _content(where: str, content: Any) -> Any:
    """A message's content: a text, or parts."""
    if not isinstance(content, list):
        return content
    parts = [_part(f"{where}.content[{place}]", part) for place, part in enumerate(content)]
    if all(part["type"] == "text" for part in parts):  # some endpoints take a text alone
        return "\n".join(part["text"] for part in parts)
    return parts


def _part(where: str, part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else part
    match part:
        case {"type": "input_text" | "output_text" | "text", "text": str(text)}:
            return {"type": "text", "text": text}
        case {"type": "refusal", "refusal": str(text)}:
            return {"type": "text", "text": text}
        case {"type": "input_image", "image_url": str(url)}:
            detail = {"detail": part["detail"]} if part.get("detail") else {}
            return {"type": "image_url", "image_url": {"url": url, **detail}}
        case {"type": "input_file"} if part.get("file_id") or part.get("file_data"):
            names = ("file_id", "file_data", "filename")
            file = {name: part[name] for name in names if part.get(name)}
            return {"type": "file", "file": file}
        case {"type": "input_audio"}:
            return dict(part)
    raise _untranslatable(where, f"this part of the type '{kind}'")


def _tools(tools: Sequence[Any]) -> list[dict[str, Any]]:
    translated = []
    for place, tool in enumerate(tools):
        kind = tool.get("type") if isinstance(tool, Mapping) else tool
        if kind != "function":
            raise _untranslatable(f"tools[{place}]", f"the tool '{kind}'")
        names = ("name", "description", "parameters", "strict")
        function = {name: tool[name] for name in names if tool.get(name) is not None}
        translated.append({"type": "function", "function": {"name": "", **function}})
    return translated


def _choice(choice: Any) -> Any:
    match choice:
        case str():
            return choice
        case {"type": "function", "name": str(name)}:
            return {"type": "function", "function": {"name": name}}
    raise _untranslatable("tool_choice", "this choice")


def _untranslatable(where: str, what: str) -> ApiError:
    message = f"{where}: {what} is not supported: the gateway asks its LLM by chat completions"
    return ApiError(400, f"{message}, which have none", param=where, code="unsupported_parameter")


# ---- response


class Form(NamedTuple):
    """How an item of the output is written."""

    prefix: str  # of its id
    item: Body
    part: Body | None  # of its content; None: the text is a field of the item itself
    field: str  # that holds the text
    event: str


FORMS: Mapping[Kind, Form] = {
    "text": Form(
        "msg",
        {"type": "message", "role": "assistant", "content": []},
        {"type": "output_text", "text": "", "annotations": [], "logprobs": []},
        "text",
        "response.output_text",
    ),
    "refusal": Form(
        "msg",
        {"type": "message", "role": "assistant", "content": []},
        {"type": "refusal", "refusal": ""},
        "refusal",
        "response.refusal",
    ),
    "reasoning": Form(
        "rs",
        {"type": "reasoning", "summary": [], "content": []},
        {"type": "reasoning_text", "text": ""},
        "text",
        "response.reasoning_text",
    ),
    "call": Form(
        "fc",
        {"type": "function_call", "arguments": ""},
        None,
        "arguments",
        "response.function_call_arguments",
    ),
}


class ResponseWriter:
    """Writes a response from the chunks of a completion, and the events on the way to it."""

    def __init__(self, id: str, asked: Body):
        given = {name: asked[name] for name in ECHOED if asked.get(name) is not None}
        state: Item = {
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "output": [],
        }
        head: Item = {"id": id, "object": "response", "created_at": int(time.time()), "usage": None}
        fixed: Item = {"background": False, "truncation": "disabled", "store": False}
        fixed["model"] = asked["model"]
        self.response: Item = {**head, **state, **ECHOED, **given, **fixed}
        self._output: list[Item] = self.response["output"]
        self._reader = ChunkReader()
        self._last: Piece | None = None  # of the item that is open
        self._number = 0

    def begin(self) -> bytes:
        """The first events."""
        kinds = ("response.created", "response.in_progress")
        return b"".join(self._event(kind, response=self.response) for kind in kinds)

    def take(self, chunk: Body) -> bytes:
        """The events of the next chunk."""
        return b"".join(map(self._write, self._reader.take(chunk)))

    def read(self, completion: Body) -> None:
        """Take a whole completion."""
        for piece in self._reader.read(completion):
            self._write(piece)
        self.close()

    def close(self) -> bytes:
        """The answer is over: `response` is whole. The events before the last one."""
        reader, reason = self._reader, ENDS.get(self._reader.end)
        status = "incomplete" if reason else "completed"
        events = self._close(status)
        self.response |= {"status": status, "usage": _usage(reader)}
        self.response["model"] = reader.model or self.response["model"]
        if reason:
            self.response["incomplete_details"] = {"reason": reason}
        if reader.personalization is not None:
            self.response["personalization"] = reader.personalization
        return events

    def fail(self, error: Body) -> None:
        """The upstream has failed within the stream."""
        code = "rate_limit_exceeded" if error.get("type") == "rate_limit_error" else "server_error"
        self.response |= {"status": "failed"}
        self.response["error"] = {"code": code, "message": str(error.get("message"))}

    def last(self) -> bytes:
        """The last event, by the response's status."""
        return self._event(f"response.{self.response['status']}", response=self.response)

    def _event(self, kind: str, **content: Any) -> bytes:
        self._number += 1
        return named_event({"type": kind, "sequence_number": self._number - 1, **content})

    def _write(self, piece: Piece) -> bytes:
        last, events = self._last, b""
        if last is None or (piece.kind, piece.call) != (last.kind, last.call):
            events = self._close("completed") + self._open(piece)
        form, item = FORMS[piece.kind], self._output[-1]
        holder = item["content"][0] if form.part else item
        holder[form.field] += piece.text
        told = {"logprobs": list(piece.logprobs)} if piece.kind == "text" else {}
        if told:
            holder["logprobs"] += piece.logprobs
        delta = self._event(f"{form.event}.delta", **self._place(), delta=piece.text, **told)
        return events + delta

    def _open(self, piece: Piece) -> bytes:
        self._last, form, place = piece, FORMS[piece.kind], len(self._output)
        id = f"{form.prefix}_{self.response['id'].removeprefix(PREFIX)}_{place}"
        call = {"call_id": piece.call, "name": piece.name} if piece.kind == "call" else {}
        item: Item = {"id": id, "status": "in_progress", **form.item, **call}
        if form.part:
            item["content"] = []
        self._output.append(item)
        events = self._event("response.output_item.added", output_index=place, item=item)
        if form.part:
            part = {name: list(v) if isinstance(v, list) else v for name, v in form.part.items()}
            events += self._event("response.content_part.added", **self._place(), part=part)
            item["content"].append(part)
        return events

    def _close(self, status: str) -> bytes:
        """End the item that is open."""
        if self._last is None:
            return b""
        form, item, place = FORMS[self._last.kind], self._output[-1], self._place()
        part = item["content"][0] if form.part else None
        holder = part or item
        told = {name: holder[name] for name in (form.field, "logprobs", "name") if name in holder}
        self._last, item["status"] = None, status
        events = self._event(f"{form.event}.done", **place, **told)
        if part:
            events += self._event("response.content_part.done", **place, part=part)
        index = place["output_index"]
        return events + self._event("response.output_item.done", output_index=index, item=item)

    def _place(self) -> dict[str, Any]:
        item, index = self._output[-1], len(self._output) - 1
        in_content = {"content_index": 0} if "content" in item else {}
        return {"item_id": item["id"], "output_index": index, **in_content}


def _usage(reader: ChunkReader) -> dict[str, Any] | None:
    """Tokens as the Responses API counts them; None where the upstream does not tell them."""
    if reader.tokens is None:
        return None
    read, written = reader.tokens

    def detail(kind: str, name: str) -> int:
        details = reader.usage.get(f"{kind}_tokens_details")
        count = details.get(name) if isinstance(details, Mapping) else 0
        return count if isinstance(count, int) else 0

    cached = {"cached_tokens": detail("prompt", "cached_tokens"), "cache_write_tokens": 0}
    thought = {"reasoning_tokens": detail("completion", "reasoning_tokens")}
    return {
        "input_tokens": read,
        "input_tokens_details": cached,
        "output_tokens": written,
        "output_tokens_details": thought,
        "total_tokens": read + written,
    }
