"""What learning and the gateway know of an endpoint: URL and key, refusals, capabilities."""

import base64
import json
from urllib.parse import quote

import pytest

from hydra_llm.errors import SettingsError
from hydra_llm.llm.endpoint import (
    CAPABILITY_SECONDS,
    OPENAI_URL,
    Capabilities,
    CapabilityCache,
    Endpoint,
    Refusal,
    without_userinfo,
)

SENT = {"messages": [], "temperature": 0.7, "max_tokens": 9, "n": 3, "seed": 1}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def test_a_given_url_and_key_come_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    assert Endpoint.of("x") == Endpoint(OPENAI_URL, "k")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://other/v1")
    assert Endpoint.of("x") == Endpoint("http://other/v1", "k")
    assert Endpoint.of("x", "http://own/v1", "own") == Endpoint("http://own/v1", "own")


def test_only_openais_own_endpoint_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="OPENAI_API_KEY"):
        Endpoint.of("openai:m")
    assert Endpoint.of("openai:m", "http://own/v1").key == ""
    monkeypatch.setenv("OPENAI_BASE_URL", "http://other/v1")
    assert Endpoint.of("openai:m").key == ""
    monkeypatch.setenv("OPENAI_BASE_URL", "other/v1")
    with pytest.raises(SettingsError, match="OPENAI_BASE_URL"):
        Endpoint.of("openai:m")


@pytest.mark.parametrize(
    ("message", "known"),
    [
        ("Unsupported parameter: 'max_tokens'", Capabilities(limit_name="max_completion_tokens")),
        ("'temperature' is not supported", Capabilities(refused=frozenset({"temperature"}))),
        ("unknown field: seed", Capabilities(refused=frozenset({"seed"}))),
        ("n must be 1", Capabilities(native_n=False)),
        ("temperature must be at most 2", Capabilities()),  # a value out of range
        ("no such model", Capabilities()),
    ],
)
def test_a_refusal_teaches_the_parameter_that_it_names(message: str, known: Capabilities) -> None:
    refusal = Refusal.of(400, {"error": {"message": message}})
    assert Capabilities().after(refusal, SENT) == known
    # Nothing is learned of what was not sent: so a second refusal ends the attempts.
    assert known.after(refusal, known.applied(SENT)) == known


@pytest.mark.parametrize(
    ("message", "param", "known"),
    [
        ("Invalid value: must be less than or equal to 5.", "top_logprobs", 5),
        ("Requested sample logprobs of 20, which is greater than max allowed: 5", "", 5),
        ("gpt-4 does not support 20 top_logprobs: a value from 0 to 5", "", 5),
        ("Requested sample logprobs of 20, which is greater than max allowed: 0", "", None),
        ("'logprobs' is not supported with gpt-5", "logprobs", None),
        ("You are not allowed to request logprobs from this model", "", None),
    ],
)
def test_a_limit_of_logprobs_is_kept_to(message: str, param: str, known: int | None) -> None:
    body = {"logprobs": True, "top_logprobs": 20}
    refusal = Refusal(400, message, param=param)
    learned = Capabilities().after(refusal, body)
    sent = {} if known is None else {"logprobs": True, "top_logprobs": known}
    assert learned.applied(body) == sent
    assert learned.applied({"top_logprobs": 1}) == ({"top_logprobs": 1} if sent else {})
    assert Capabilities().after(Refusal(400, "at most 5 messages"), body) == Capabilities()


def test_a_body_is_sent_as_the_model_takes_it() -> None:
    assert Capabilities().applied(SENT) == SENT
    known = Capabilities(False, frozenset({"temperature"}), "max_completion_tokens")
    assert known.applied(SENT) == {"messages": [], "max_completion_tokens": 9, "seed": 1}


@pytest.mark.parametrize(
    ("body", "refusal"),
    [
        ({"error": {"message": "m", "code": "c", "param": "n"}}, Refusal(400, "m", "c", "n")),
        (
            {"error": {"message": None, "code": 7}},
            Refusal(400, "{'message': None, 'code': 7}", "7"),
        ),
        ({"error": "text"}, Refusal(400, "text")),
        ({"message": "m"}, Refusal(400, "m")),
        ("text", Refusal(400, "text")),
    ],
)
def test_a_refusal_is_read_from_any_body(body: object, refusal: Refusal) -> None:
    assert Refusal.of(400, body) == refusal


def test_capabilities_are_a_models_own_and_expire() -> None:
    now = 0.0
    cache = CapabilityCache(lambda: now)
    less = Capabilities(native_n=False)
    assert cache.learn("a", less)
    assert not cache.learn("a", less)
    assert (cache.of("a"), cache.of("b")) == (less, Capabilities())
    now = CAPABILITY_SECONDS + 1
    assert cache.of("a") == Capabilities()


MADE_UP = "sk-made-up/0123+456=789"


@pytest.mark.parametrize(
    "key", [f"{MADE_UP}\n", f" {MADE_UP}", "sk made up", "sk-\x1b", "sk-é", "\n"]
)
def test_a_key_that_no_header_can_carry_is_told_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(SettingsError, match="OPENAI_API_KEY holds a line break") as raised:
        Endpoint.of("openai:m", "http://own/v1")
    assert "sk" not in str(raised.value)
    with pytest.raises(SettingsError, match="api_key"):
        Endpoint.of("openai:m", "http://own/v1", key)


@pytest.mark.parametrize(
    "quoted",
    [
        MADE_UP,
        repr(MADE_UP),
        f"{MADE_UP[:9]}\n  {MADE_UP[9:12]}\u200b{MADE_UP[12:]}",
        json.dumps(f"{MADE_UP[:9]}\n{MADE_UP[9:]}"),
        MADE_UP.replace("/", "&#x2F;").replace("+", "&#43;"),
        json.dumps({"key": MADE_UP}),
        quote(MADE_UP),
        quote(MADE_UP, safe=""),
        base64.b64encode(MADE_UP.encode()).decode(),
        base64.b64encode(f"name:{MADE_UP}".encode()).decode(),
        base64.b64encode(f"me:{MADE_UP}:more".encode()).decode(),
        base64.urlsafe_b64encode(f"a:{MADE_UP}".encode()).decode(),
    ],
)
def test_a_secret_is_hidden_however_it_is_quoted(quoted: str) -> None:
    endpoint = Endpoint("http://me:hunter2secret@own/v1", MADE_UP, "api-version=1&key=of-the-query")
    for text in (quoted, f"before {quoted} behind", quoted * 2):
        shown = endpoint.redact(text)
        assert "***" in shown
        for form in (MADE_UP, quote(MADE_UP, safe=""), "0123", "MDEyM", "AxMj", "wMTIz"):
            assert form not in shown
    assert endpoint.redact("hunter2secret of-the-query 1") == "*** *** 1"
    assert "***" in str(endpoint.redacted({"a": [{"b": quoted}, 3]}))
    assert MADE_UP not in repr(endpoint)


def test_a_short_key_is_hidden_only_where_it_stands_alone() -> None:
    assert Endpoint("http://own/v1", "k").redact("key 'k', like k.") == "key '***', like ***."


def test_what_stands_behind_the_path_is_kept_apart() -> None:
    endpoint = Endpoint.of("x", "https://own/deployments/m?api-version=2024-06-01&x=%20#here")
    assert endpoint.url == "https://own/deployments/m"
    assert endpoint.query == "api-version=2024-06-01&x=%20"


@pytest.mark.parametrize("end", ["", "/", "//", "/chat/completions", "/chat/completions/"])
def test_a_url_may_be_the_whole_one_of_chat_completions(end: str) -> None:
    assert Endpoint.of("x", f"HTTPS://own/v1{end}?v=1").url == "https://own/v1"


@pytest.mark.parametrize("url", ["http://[::1/v1", "http://own:port/v1", "http:///v1", "ftp://own"])
def test_an_invalid_url_names_its_place(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    with pytest.raises(SettingsError, match="the URL of the LLM is no URL"):
        Endpoint.of("x", url)
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    with pytest.raises(SettingsError, match="OPENAI_BASE_URL is no URL"):
        Endpoint.of("x")


def test_a_secret_of_the_query_is_hidden_as_it_was_written() -> None:
    endpoint = Endpoint("http://own/v1", "", "api-key=of+the/query9")
    for form in ("of+the/query9", "of the/query9", "of%2Bthe%2Fquery9"):
        assert endpoint.redact(f"bad key {form}") == "bad key ***"
    shown = without_userinfo("openai:m@https://u:p@own/v1?api-version=1&api_key=abc&y=2")
    assert shown == "openai:m@https://own/v1?api-version=1&api_key=***&y=2"
    with pytest.raises(SettingsError, match="no blanks"):
        Endpoint.of("x", "https://own/v1\n")
