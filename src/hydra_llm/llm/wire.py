"""OpenAI's wire format, read in one place: what a message says, what an answer cost, and what went
wrong in it, in any of the shapes that endpoints give their errors. Sends nothing.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hydra_llm.text import fold, without_reasoning

THOUGHT = re.compile(r"think|thought|chain|reason|redacted|summary")
"""Beginnings of the types of content parts that are no part of what is said."""
TEXT_KEYS = (
    *("message", "Message", "msg", "detail", "error_message", "error_msg", "faultstring"),
    *("error", "reason", "description", "title"),
)
ERROR_KEYS = ("error", "errors", "fault", *TEXT_KEYS)
STATUS_KEYS = ("status_code", "statusCode", "http_status", "code", "status")
STATUS_WORDS = (
    (429, re.compile(r"(?i)rate.?limit|too.?many|quota|exhausted|throttl")),
    (503, re.compile(r"(?i)overload|unavailable|capacity")),
    (504, re.compile(r"(?i)time.?out|deadline")),
    (401, re.compile(r"(?i)authentication|unauthori[sz]ed|api.?key|permission|forbidden")),
    (404, re.compile(r"(?i)not.?found")),
    (400, re.compile(r"(?i)invalid.?(?:request|argument|prompt)|bad.?request|context.?length")),
)
TITLE = re.compile(r"(?is)<title[^>]*>(.*?)</title>")


def text_of(message: Mapping[str, Any]) -> str:
    """What a message says: its content, or the text parts of it, a line each."""
    return _content_text(message.get("content"), "\n")


def answer_of(message: Mapping[str, Any]) -> str:
    """What an LLM's message answers: its text without reasoning; '' for refusals and calls."""
    return without_reasoning(piece_of(message))


def piece_of(delta: Mapping[str, Any]) -> str:
    """The text in a stream's delta as it is: reasoning is told apart in the whole text."""
    return _content_text(delta.get("content"), "")


def content_fault(content: object) -> str:
    """What is wrong with a message's content, or ''."""
    parts = content if isinstance(content, list) else [content or ""]
    known = isinstance(content, str | list | None)
    fault = "must be a text, null, or a list of parts such as {'type': 'text', 'text': '...'}"
    return "" if known and all(isinstance(part, str | Mapping) for part in parts) else fault


def _content_text(content: object, between: str) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    return between.join(text for part in parts if (text := _part_text(part)) is not None)


def _part_text(part: object) -> str | None:
    if isinstance(part, Mapping):  # "thought" is Gemini's mark
        thought = part.get("thought") or THOUGHT.match(str(part.get("type", "")))
        part = None if thought else part.get("text")
        part = part.get("value") if isinstance(part, Mapping) else part
    return part if isinstance(part, str) else None


def place_of(choice: Mapping[str, Any]) -> int:
    """The index of a choice; 0 where it is none."""
    index = str(choice.get("index"))
    return int(index) if index.isdecimal() else 0


def tokens_of(usage: object) -> tuple[int, int] | None:
    """Tokens of prompt and answer; None where the endpoint does not tell them."""
    if not isinstance(usage, Mapping):
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if type(prompt) is not int or type(completion) is not int or min(prompt, completion) < 0:
        return None
    return prompt, completion


@dataclass(frozen=True, slots=True)
class WireError:
    """What an endpoint says went wrong."""

    message: str
    status: int | None = None  # as the body names it; None where it names none
    kind: str = ""
    code: str = ""
    param: str = ""


def error_in(body: object) -> WireError | None:
    """The error in a JSON body of any shape; None where it tells none, or still holds an answer."""
    if isinstance(body, list) and len(body) == 1:  # as Gemini sends them
        body = body[0]
    if not isinstance(body, Mapping) or any(map(_says, _choices(body))):
        return None
    of_choices = [choice["error"] for choice in _choices(body) if choice.get("error")]
    errors = [*(body.get(key) for key in ERROR_KEYS), *of_choices]
    error = next((error for error in errors if error and error is not True), None)
    if error is None or ("choices" in body and not body.get("error") and not of_choices):
        return None
    error = error[0] if isinstance(error, list) else error
    inner = error if isinstance(error, Mapping) else {}
    while isinstance(inner.get("error"), Mapping):
        inner = inner["error"]
    where = inner.get("loc")  # FastAPI's
    places = [str(part) for part in where if part != "body"] if isinstance(where, list) else []
    message = _message(inner) if inner else str(error)
    fields = [inner, body]
    kind, code = _first(fields, "type"), _first(fields, "code")
    status = _status(fields, f"{kind} {code} {_first(fields, 'status')}")
    says = (status for status, words in STATUS_WORDS[:2] if words.search(message))
    return WireError(
        f"{'.'.join(places)}: {message}" if places else message,
        status or next(says, None),
        "" if places else kind,
        code,
        _first(fields, "param") or ".".join(places),
    )


def json_of(content: bytes) -> Any:
    """The JSON of an answer, None where it is none; what is not UTF-8 in it becomes U+FFFD."""
    try:
        return json.loads(content.decode("utf-8-sig", "replace"))
    except (ValueError, RecursionError):
        return None


def failure(
    status: int, content: bytes, *, needs: str = "choices", body: Any = None
) -> WireError | None:
    """What went wrong in an answer that should be a JSON object with `needs`; None if nothing. Its
    `status` is the one that tells it best: 502 where a 200 holds nonsense. `body`: `json_of` the
    content, if that is known.
    """
    body = json_of(content) if body is None else body
    is_other = status < 400 and not needs and isinstance(body, Mapping)  # a model has any fields
    error = error_in({"error": body.get("error")} if is_other else body)
    if error is None and status < 400 and _holds(body, needs):
        return None
    text = content.decode("utf-8-sig", "replace").strip()
    title = TITLE.search(text)
    if error is None:
        message = "an answer without content"
        if body is not None:
            message = f"an answer without {needs or 'an object'}: {fold(text)}"
        elif text.startswith("<"):
            name = f", '{fold(title[1])}'" if title else ""
            message = f"an answer that is a web page{name}"
        elif text:
            message = f"an answer that is not JSON: {fold(text)}"
        error = WireError(message)
    told = status if status >= 400 else error.status or 502
    return WireError(error.message, told, error.kind, error.code, error.param)


def _holds(body: object, needs: str) -> bool:
    if not isinstance(body, Mapping) or needs != "choices":
        return isinstance(body, Mapping)
    whole = [c for c in _choices(body) if isinstance(c.get("message"), Mapping)]
    return bool(whole) and len(whole) == len(body["choices"])


def _choices(body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    choices = body.get("choices")
    items = choices if isinstance(choices, list) else []
    return [choice for choice in items if isinstance(choice, Mapping)]


def _says(choice: Mapping[str, Any]) -> bool:
    """Whether a choice holds anything for the caller."""
    message = choice.get("message") or choice.get("delta")
    return isinstance(message, Mapping) and any(
        message.get(name) for name in ("content", "tool_calls", "refusal", "function_call")
    )


def _message(error: Mapping[str, Any]) -> str:
    return next((t for t in map(error.get, TEXT_KEYS) if t and isinstance(t, str)), str(error))


def _first(fields: list[Mapping[str, Any]], key: str) -> str:
    return str(next((f[key] for f in fields if isinstance(f.get(key), str | int)), ""))


def _status(fields: list[Mapping[str, Any]], words: str) -> int | None:
    for source in fields:
        for key in STATUS_KEYS:
            value = str(source.get(key))
            if value.isascii() and value.isdigit() and 400 <= int(value[:9]) <= 599:
                return int(value)
    return next((status for status, pattern in STATUS_WORDS if pattern.search(words)), None)
