"""What learning and the gateway know of an endpoint: URL and key, refusals, capabilities."""

import pytest

from hydra_llm.errors import SettingsError
from hydra_llm.llm.endpoint import (
    CAPABILITY_SECONDS,
    OPENAI_URL,
    Capabilities,
    CapabilityCache,
    Endpoint,
    Refusal,
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
