"""The OpenAI client against real HTTP endpoints that refuse, limit, fail, hang, hang up and talk
nonsense.
"""

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from hydra_llm.config import Settings
from hydra_llm.errors import LLMError, LLMRefused, SettingsError
from hydra_llm.llm.base import PartlyFailed, Sampling
from hydra_llm.llm.cache import CachedLLM
from hydra_llm.llm.meter import Meter, Prices
from hydra_llm.llm.openai import OpenAILLM, from_spec
from hydra_llm.llm.registry import wrap
from hydra_llm.pipeline import UserPipeline
from hydra_llm.retrieve import Nothing
from hydra_llm.tasks.base import Task
from hydra_llm.types import Query, Usage
from tests.waiting import FOREVER

from .conftest import stored_rows

pytestmark = pytest.mark.anyio
MESSAGES = [{"role": "user", "content": "Hi"}]
KEY = "sk-secret-key"


def texts_of(body: dict[str, Any]) -> list[str]:
    return [f"text {body.get('seed', 0)}.{i}" for i in range(body.get("n", 1))]


def client(endpoint: Any, **options: Any) -> OpenAILLM:
    return OpenAILLM(
        "m", base_url=endpoint.url, api_key=KEY, **{"timeout": 5.0, "retries": 0, **options}
    )


async def test_sends_what_was_asked_and_reads_texts_and_tokens(serve: Any, wire: Any) -> None:
    endpoint = serve(lambda body, count: wire.completion(*texts_of(body)))
    generation = await client(endpoint).generate(
        MESSAGES, Sampling(n=3, temperature=0.5, max_tokens=9, stop=("\n",), seed=4)
    )
    assert generation.texts == ("text 4.0", "text 4.1", "text 4.2")
    assert generation.usage == Usage(calls=1, prompt_tokens=7, completion_tokens=6)
    assert endpoint.bodies == [
        {
            "model": "m",
            "messages": MESSAGES,
            "n": 3,
            "temperature": 0.5,
            "max_tokens": 9,
            "stop": ["\n"],
            "seed": 4,
        }
    ]
    assert endpoint.keys == [f"Bearer {KEY}"]


async def test_an_endpoint_that_ignores_n_gets_n_requests(serve: Any, wire: Any) -> None:
    endpoint = serve(lambda body, count: wire.completion(texts_of(body)[0]))
    llm = client(endpoint)
    generation = await llm.generate(MESSAGES, Sampling(n=4, temperature=1.0, seed=10))
    assert generation.texts == ("text 10.0", "text 11.0", "text 12.0", "text 13.0")
    assert generation.usage == Usage(calls=4, prompt_tokens=28, completion_tokens=8)
    assert not llm.capabilities.native_n
    await llm.generate(MESSAGES, Sampling(n=2, temperature=1.0, seed=20))
    assert ["n" in body for body in endpoint.bodies] == [True] + [False] * 5


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ("Value not allowed", {"param": "n"}),
        ("'n' must be 1 for this model", {}),
        ("n > 1 is not supported", {}),
        ("Unsupported parameter: n", {}),
    ],
)
async def test_an_endpoint_that_refuses_n_gets_n_requests(
    serve: Any, wire: Any, message: str, fields: dict[str, str]
) -> None:
    endpoint = serve(
        lambda body, count: (
            wire.refusal(400, message, **fields)
            if "n" in body
            else wire.completion(texts_of(body)[0])
        )
    )
    llm = client(endpoint)
    generation = await llm.generate(MESSAGES, Sampling(n=3, temperature=1.0, seed=1))
    assert generation.texts == ("text 1.0", "text 2.0", "text 3.0")
    assert (llm.capabilities.native_n, generation.usage.calls) == (False, 3)


async def test_a_refusal_of_something_else_is_not_taken_for_one_of_n(serve: Any, wire: Any) -> None:
    endpoint = serve(
        lambda body, count: wire.refusal(400, "messages: invalid role in a conversation")
    )
    with pytest.raises(LLMRefused, match="invalid role"):
        await client(endpoint).generate(MESSAGES, Sampling(n=3, temperature=1.0))
    assert len(endpoint.bodies) == 1


def breaking(wire: Any, seed: int) -> Callable[[dict[str, Any], int], Any]:
    """Draws one text a request, and fails at one seed."""
    return lambda body, count: (
        wire.refusal(500, "broken")
        if body.get("seed") == seed
        else wire.completion(texts_of(body)[0])
    )


async def test_a_failed_single_request_keeps_the_texts_that_came(serve: Any, wire: Any) -> None:
    endpoint = serve(breaking(wire, seed=12))
    with pytest.raises(PartlyFailed, match="HTTP 500") as caught:
        await client(endpoint).generate(MESSAGES, Sampling(n=5, temperature=1.0, seed=10))
    assert caught.value.partial.texts == (
        "text 10.0",
        "text 11.0",
    )  # those behind the gap have no place of their own
    assert caught.value.partial.usage == Usage(
        calls=5, failed=1, prompt_tokens=4 * 7, completion_tokens=4 * 2
    )
    assert len(endpoint.bodies) == 5


async def test_only_texts_that_are_missing_are_asked_for_again(
    serve: Any, wire: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Seeds that say which text it is, for an endpoint that fails at the third; that prompts differ
    # in them is test_cache.py's.
    monkeypatch.setattr("hydra_llm.llm.cache._sample_seed", lambda key, seed, first: seed + first)
    endpoint = serve(breaking(wire, seed=12))
    meter = Meter(client(endpoint), prices=Prices(prompt=1e6))
    llm = CachedLLM(meter, tmp_path / "c.sqlite")
    with pytest.raises(PartlyFailed):
        await llm.generate(MESSAGES, Sampling(n=5, temperature=1.0, seed=10))
    assert meter.usage.calls == len(endpoint.bodies) == 5
    assert (meter.usage.failed, meter.usage.prompt_tokens, meter.usage.cost) == (1, 28, 28.0)
    assert [row["text"] for _, _, row in stored_rows(llm)] == ["text 10.0", "text 11.0"]
    with pytest.raises(LLMError, match="HTTP 500"):
        await llm.generate(MESSAGES, Sampling(n=5, temperature=1.0, seed=10))
    assert [body["seed"] for body in endpoint.bodies[5:]] == [12]
    asker = UserPipeline(
        Task("t", "generation", "{input}"), Nothing(), Settings(samples=6, seed=8), llm=llm
    )
    proposal = await asker.apropose(Query("u", "q", "Hi"))
    assert (proposal.usage.calls, proposal.usage.failed, proposal.usage.prompt_tokens) == (
        6,
        1,
        5 * 7,
    )  # the last sample fails
    assert meter.usage.calls == len(endpoint.bodies)
    await llm.aclose()


@pytest.mark.parametrize("limit", [pytest.param(1, marks=pytest.mark.slow), 2])
async def test_single_requests_obey_the_limit_of_calls_in_flight(
    serve: Any, wire: Any, limit: int, tmp_path: Path
) -> None:
    now, most, lock, full = 0, 0, threading.Lock(), threading.Barrier(limit)

    def crowded(body: dict[str, Any], count: int) -> Any:
        nonlocal now, most
        with lock:
            now, most = now + 1, max(most, now + 1)
        full.wait(FOREVER)  # until as many are in flight as may be
        time.sleep(0.002)  # for one too many, were there any
        with lock:
            now -= 1
        return wire.completion(texts_of(body)[0])

    settings = Settings(concurrency=limit, cache=tmp_path)
    llm = wrap(from_spec(f"m@{serve(crowded).url}", settings), settings)
    async with anyio.create_task_group() as group:
        for i in range(4):
            group.start_soon(
                partial(
                    llm.generate,
                    [{"role": "user", "content": str(i)}],
                    Sampling(n=8, temperature=1.0, seed=1),
                )
            )
    assert (most, llm.usage.calls) == (limit, 32)
    await llm.aclose()


WINDOW = 600
"""Of the endpoint below, whose tokens are characters."""
LENGTHY = {
    "openai": (
        400,
        (
            "This model's maximum context length is {window} tokens. However, your messages"
            " resulted in {asked} tokens."
        ),
        {},
    ),
    "openai, total": (
        400,
        (
            "This model's maximum context length is {window} tokens. However, you requested {total}"
            " tokens ({asked} in the messages, 48 in the completion). Please reduce the length of"
            " the messages or completion."
        ),
        {"code": "context_length_exceeded"},
    ),
    "vllm": (
        400,
        (
            "This model's maximum context length is {window} tokens. However, your request has"
            " {asked} input tokens."
        ),
        {},
    ),
    "llama.cpp": (
        400,
        (
            "request ({asked} tokens) exceeds the available context size ({window} tokens), try"
            " increasing it"
        ),
        {},
    ),
    "llama.cpp, numbers": (
        400,
        (
            "the request exceeds the available context size. try increasing the context size or"
            " enable context shift"
        ),
        {"type": "exceed_context_size_error", "n_prompt_tokens": "{asked}", "n_ctx": "{window}"},
    ),
    "claude": (400, "prompt is too long: {asked} tokens > {window} maximum", {}),
    "no numbers": (413, "the input is too long", {}),
    "code alone": (400, "no", {"code": "context_length_exceeded"}),
}


@pytest.mark.parametrize("wording", LENGTHY)
async def test_a_prompt_beyond_the_context_window_is_cut(
    serve: Any, wire: Any, wording: str
) -> None:
    status, message, fields = LENGTHY[wording]

    def narrow(body: dict[str, Any], count: int) -> Any:
        asked = len(body["messages"][0]["content"])
        if asked + body["max_tokens"] <= WINDOW:
            return wire.completion(*["odd"] * body.get("n", 1))
        numbers = {"window": WINDOW, "asked": asked, "total": asked + body["max_tokens"]}
        filled: dict[str, Any] = {name: value.format(**numbers) for name, value in fields.items()}
        filled |= {name: int(value) for name, value in filled.items() if value.isdigit()}
        return wire.refusal(status, message.format(**numbers), **filled)

    endpoint = serve(narrow)
    task = Task("parity", "classification", "Even or odd? {input}", ("even", "odd"))
    proposal = await UserPipeline(
        task, Nothing(), Settings(samples=4), llm=client(endpoint)
    ).apropose(Query("u", "q", "0123456789" * 150))
    assert proposal.candidates[0].votes == 4
    assert {body["messages"][0]["content"] for body in endpoint.bodies[-2:]} == {
        proposal.messages[0]["content"]
    }
    assert len(proposal.messages[0]["content"]) > WINDOW // 3
    assert sum("cut again" in note for note in proposal.notes) == 1


@pytest.mark.parametrize(
    ("status", "message"),
    [(400, "messages: invalid role"), (401, "no context length for you"), (404, "too long a name")],
)
async def test_other_refusals_say_nothing_about_the_window(
    serve: Any, wire: Any, status: int, message: str
) -> None:
    with pytest.raises(LLMRefused) as caught:
        await client(serve(lambda body, count: wire.refusal(status, message))).generate(
            MESSAGES, Sampling()
        )
    assert caught.value.fits is None


async def test_parameters_that_a_model_refuses_are_remembered(serve: Any, wire: Any) -> None:
    def picky(body: dict[str, Any], count: int) -> Any:
        if "max_tokens" in body:
            refusal = (
                "Unsupported parameter: 'max_tokens' is not supported with this model. Use"
                " 'max_completion_tokens' instead."
            )
            return wire.refusal(400, refusal, param="max_tokens", code="unsupported_parameter")
        if "temperature" in body:
            refusal = (
                "Unsupported value: 'temperature' does not support 0 with this model. Only the"
                " default (1) value is supported."
            )
            return wire.refusal(400, refusal, param="temperature", code="unsupported_value")
        return wire.completion("fine")

    endpoint = serve(picky)
    llm = client(endpoint)
    assert (await llm.generate(MESSAGES, Sampling(max_tokens=9))).texts == ("fine",)
    assert endpoint.bodies[-1] == {"model": "m", "messages": MESSAGES, "max_completion_tokens": 9}
    await llm.generate(MESSAGES, Sampling(max_tokens=9))
    assert len(endpoint.bodies) == 4


async def test_a_value_out_of_range_is_refused_and_not_left_out(serve: Any, wire: Any) -> None:
    endpoint = serve(
        lambda body, count: wire.refusal(400, "temperature must be at most 2", param="temperature")
    )
    with pytest.raises(LLMRefused, match="at most 2"):
        await client(endpoint).generate(MESSAGES, Sampling(temperature=3.0))
    assert len(endpoint.bodies) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
async def test_refusals_are_not_tried_again(serve: Any, wire: Any, status: int) -> None:
    endpoint = serve(lambda body, count: wire.refusal(status, f"no:\n{KEY} will not do"))
    with pytest.raises(LLMRefused) as caught:
        await client(endpoint, retries=3).generate(MESSAGES, Sampling())
    assert len(endpoint.bodies) == 1
    assert f"HTTP {status}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert KEY not in str(caught.value)


async def test_429_waits_as_long_as_it_says_and_goes_on(
    serve: Any, wire: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    def limited(body: dict[str, Any], count: int) -> Any:
        return (
            wire.reply(429, {"error": {"message": "slow down"}}, Retry_After="7")
            if count == 0
            else wire.completion("fine")
        )

    monkeypatch.setattr("anyio.sleep", sleep)
    monkeypatch.setattr("hydra_llm.llm.limiter.clock", lambda: sum(waits))
    generation = await client(serve(limited), retries=1).generate(MESSAGES, Sampling())
    assert generation.texts == ("fine",)
    assert waits == [7]


async def test_500_is_tried_again_and_then_an_error(serve: Any, wire: Any) -> None:
    endpoint = serve(
        lambda body, count: wire.reply(500, {"error": {"message": "broken"}}, Retry_After_Ms="1")
    )
    with pytest.raises(LLMError, match="HTTP 500: .*broken") as caught:
        await client(endpoint, retries=2).generate(MESSAGES, Sampling())
    assert not isinstance(caught.value, LLMRefused)
    assert len(endpoint.bodies) == 3


async def test_a_hang_ends_at_the_timeout(serve: Any, wire: Any) -> None:
    endpoint: Any = None

    def hang(body: dict[str, Any], count: int) -> Any:
        endpoint.release.wait(FOREVER)

    endpoint = serve(hang)
    with pytest.raises(LLMError, match="no answer within 0.2 s"):
        await client(endpoint, timeout=0.2).generate(MESSAGES, Sampling())


async def test_a_cut_connection_is_an_error(serve: Any) -> None:
    with pytest.raises(LLMError, match="no connection"):
        await client(serve(lambda body, count: None)).generate(MESSAGES, Sampling())


@pytest.mark.parametrize(
    "content",
    [
        b"<html>",
        b"{}",
        b"[]",
        b'{"choices": []}',
        b'{"choices": [{"index": 0}]}',
        b'{"choices": 3}',
        b"",
    ],
)
async def test_nonsense_is_an_error(serve: Any, wire: Any, content: bytes) -> None:
    with pytest.raises(LLMError, match="an answer"):
        await client(serve(lambda body, count: wire.reply(200, content))).generate(
            MESSAGES, Sampling()
        )


async def test_no_content_is_an_empty_text(serve: Any, wire: Any) -> None:
    generation = await client(serve(lambda body, count: wire.completion(None, ""))).generate(
        MESSAGES, Sampling(n=2, temperature=1.0)
    )
    assert generation.texts == ("", "")


@pytest.mark.parametrize("key", ["none", "keep"])
async def test_a_short_key_may_be_an_answer(serve: Any, wire: Any, key: str) -> None:
    url = serve(lambda body, count: wire.completion(key)).url
    llm = OpenAILLM("m", base_url=url, api_key=key)
    assert (await llm.generate(MESSAGES, Sampling())).texts == (key,)


def test_the_client_serves_one_event_loop_after_another(serve: Any, wire: Any) -> None:
    llm = client(serve(lambda body, count: wire.completion("fine")))
    ask: Callable[[], Any] = lambda: llm.generate(MESSAGES, Sampling())  # noqa: E731
    assert [anyio.run(ask).texts for _ in range(3)] == [("fine",)] * 3


def test_key_and_url_come_from_spec_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="OPENAI_API_KEY"):
        from_spec("gpt", Settings())
    with pytest.raises(SettingsError, match="names no model and endpoint"):
        from_spec("", Settings())
    own = from_spec("org/model@v2@http://user:pass@127.0.0.1:1/v1", Settings())
    assert (own.model, own.base_url) == ("org/model@v2", "http://127.0.0.1:1/v1/")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:2/v1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert from_spec("gpt", Settings()).identity == {
        "kind": "openai",
        "model": "gpt",
        "base_url": "http://127.0.0.1:2/v1/",
        "constrains": False,
    }


async def test_an_error_in_a_200_is_told_and_tried_again(serve: Any, wire: Any) -> None:
    error = {"error": {"message": "Provider says: too many requests", "code": 429}}

    def behaviour(body: dict[str, Any], count: int) -> Any:
        busy = wire.reply(200, error, retry_after_ms="1")
        return busy if count < 2 else wire.completion("fine")

    endpoint = serve(behaviour)
    assert (await client(endpoint, retries=2).generate(MESSAGES, Sampling())).texts == ("fine",)
    with pytest.raises(LLMError, match="HTTP 429: Provider says: too many requests"):
        await client(serve(lambda body, count: wire.reply(200, error))).generate(
            MESSAGES, Sampling()
        )


async def test_the_text_is_the_answer_and_untold_tokens_are_unknown(serve: Any, wire: Any) -> None:
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
    contents = [[thinking, {"type": "text", "text": "keep"}], "<think>toss</think>keep", None]
    choices = [
        {"index": i, "message": {"content": content, "reasoning_content": "toss"}}
        for i, content in enumerate(contents)
    ]
    endpoint = serve(lambda body, count: wire.reply(200, {"id": "x", "choices": choices}))
    generation = await client(endpoint).generate(MESSAGES, Sampling(n=3, temperature=1.0))
    assert generation.texts == ("keep", "keep", "")
    assert generation.usage == Usage(calls=1, untold=1)


async def test_a_query_stands_behind_the_path(serve: Any, wire: Any) -> None:
    endpoint = serve(lambda body, count: wire.completion("fine"))
    query = "api-version=2024-06-01&tag=a&tag=b"
    own = OpenAILLM("m", base_url=f"{endpoint.url}?{query}", api_key=KEY, retries=0)
    await own.generate(MESSAGES, Sampling())
    assert endpoint.targets == [f"/v1/chat/completions?{query}"]
    assert own.base_url == f"{endpoint.url}/"
    assert own.identity["query"] != client(endpoint).identity.get("query")


async def test_a_key_that_an_endpoint_quotes_is_not_shown(serve: Any, wire: Any) -> None:
    quoted = f"no such key: {KEY}, {KEY!r}, {' ' * 450}{KEY}"
    endpoint = serve(lambda body, count: wire.refusal(401, quoted))
    with pytest.raises(LLMRefused) as raised:
        await client(endpoint).generate(MESSAGES, Sampling())
    assert "sk-" not in str(raised.value)
