"""Requests whose answer has a form. Their records stand in a system message, as turns would be
examples without the form, and nothing is sampled where no adapter, which reads texts, can score it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from hydra_llm.llm.wire import answer_of, text_of

Message = Mapping[str, Any]
Form = Literal["text", "tools", "fixed"]
TOOL_ROLES = ("tool", "function")
FORM_TYPES = ("text", "json_object", "json_schema")
UNREAD = (
    *("not", "if", "then", "else", "contains", "uniqueItems", "multipleOf", "patternProperties"),
    *("propertyNames", "minProperties", "maxProperties", "dependentRequired", "dependentSchemas"),
)
PATTERN = re.compile(r"\^(?!.*\(\?).*\$")
FORMS = (  # fields that give every answer a form too: OpenAI's, vLLM's, llama.cpp's, SGLang's
    *("logprobs", "top_logprobs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
    *("structured_outputs", "grammar", "json_schema", "regex", "ebnf"),
)


def form_of(body: Mapping[str, Any]) -> Form:
    """`fixed`: every answer has a form (a schema, token probabilities, sound); `tools`: an answer
    is a call of a tool or a text; `text`: any other.
    """
    asked = body.get("response_format")
    kind = asked.get("type") if isinstance(asked, Mapping) else asked
    sound = any(name != "text" for name in body.get("modalities") or ())
    if kind not in (None, "text") or sound or any(map(body.get, FORMS)):
        return "fixed"
    with_tools = body.get("tools") or body.get("functions")
    return "tools" if with_tools or any(map(_is_of_tools, body["messages"])) else "text"


def form_fault(form: Any) -> str:
    """What an engine with grammars would not keep to in a `response_format`, or ''."""
    if not isinstance(form, Mapping) or form.get("type") not in FORM_TYPES:
        return f"must be an object whose type is one of {', '.join(FORM_TYPES)}"
    named = form.get("json_schema")
    schema = named.get("schema") if isinstance(named, Mapping) else None
    if form["type"] == "json_schema" and not isinstance(schema, Mapping):
        return "json_schema.schema must be an object"
    unread = ", ".join(sorted(set(_unread(schema))))
    return unread and f"these keywords of the schema are not supported: {unread}"


def _unread(schema: Any) -> Iterator[str]:
    """The keywords of a schema that no grammar is made of."""
    for item in schema if isinstance(schema, list) else []:
        yield from _unread(item)
    for name, value in schema.items() if isinstance(schema, Mapping) else []:
        if name in UNREAD or (name == "pattern" and not PATTERN.fullmatch(str(value))):
            yield name
        elif name in ("properties", "$defs", "definitions") and isinstance(value, Mapping):
            yield from _unread(list(value.values()))
        elif name not in ("enum", "const", "default", "examples"):
            yield from _unread(value)


def question_of(messages: Sequence[Message]) -> str:
    """What the user asked last, before calls of tools and their results; '' where none waits."""
    return text_of(asking_message(messages))


def asking_message(messages: Sequence[Message]) -> Message:
    """The message with the question; empty where none waits."""
    last = next((own for own in reversed(messages) if not _is_of_tools(own)), {})
    return last if last.get("role") == "user" else {}


def is_text(choice: Mapping[str, Any]) -> bool:
    """Whether a choice answers in words, and calls no tool."""
    message = choice["message"]
    return bool(answer_of(message).strip()) and not _is_of_tools(message)


def _is_of_tools(message: Message) -> bool:
    called = message.get("tool_calls") or message.get("function_call")
    return message.get("role") in TOOL_ROLES or bool(called)
