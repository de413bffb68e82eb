"""Requests whose answer has a form. Their records stand in a system message, as turns would be
examples without the form, and nothing is sampled where no adapter, which reads texts, can score it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from hydra_llm.llm.wire import answer_of, text_of

Message = Mapping[str, Any]
Form = Literal["text", "tools", "fixed"]
TOOL_ROLES = ("tool", "function")
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


def question_of(messages: Sequence[Message]) -> str:
    """What the user asked last, before calls of tools and their results; '' where none waits."""
    for message in reversed(messages):
        if not _is_of_tools(message):
            return text_of(message) if message.get("role") == "user" else ""
    return ""


def is_text(choice: Mapping[str, Any]) -> bool:
    """Whether a choice answers in words, and calls no tool."""
    message = choice["message"]
    return bool(answer_of(message).strip()) and not _is_of_tools(message)


def _is_of_tools(message: Message) -> bool:
    called = message.get("tool_calls") or message.get("function_call")
    return message.get("role") in TOOL_ROLES or bool(called)
