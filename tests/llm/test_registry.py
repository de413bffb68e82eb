"""From a name to an LLM: built-in ones, plug-ins, unknown ones, and what is wrapped around them."""

import sys
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import anyio
import pytest

from hydra_llm import plugins
from hydra_llm.config import Settings
from hydra_llm.errors import BudgetExceeded, LLMRefused, SettingsError
from hydra_llm.llm.base import Sampling
from hydra_llm.llm.endpoint import endpoint_of
from hydra_llm.llm.fake import RuleLLM
from hydra_llm.llm.meter import Meter
from hydra_llm.llm.registry import bare_llm, open_llm, wrap

pytestmark = pytest.mark.anyio
MESSAGES = [{"role": "user", "content": "one two"}]


@pytest.mark.parametrize("name", ["", "nope", "nope:x", "smollm3", "gpt-4o"])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(
        SettingsError,
        match=r"openai:MODEL\[@URL\], gguf:PATH, openvino:PATH, smollm2, replay:RECORDING, fake:",
    ):
        bare_llm(name, Settings())


@pytest.mark.parametrize(
    ("rest", "parts"),
    [
        ("gpt", ("gpt", None)),
        ("org/model@v2", ("org/model@v2", None)),
        ("@cf/model@https://host/v1", ("@cf/model", "https://host/v1")),
        ("m@http://user:pass@127.0.0.1:1/v1", ("m", "http://user:pass@127.0.0.1:1/v1")),
    ],
)
def test_a_models_name_may_hold_an_at(rest: str, parts: tuple[str, str | None]) -> None:
    assert endpoint_of(rest) == parts


@pytest.mark.parametrize(
    "rest",
    [
        "",
        "@https://host/v1",
        "m@localhost:8000/v1",
        "m@htps://u:secret@host/v1",
        "m@u:secret@host:80/v1",
        "m@ftp://secret@host",
        "m@http://[::1",
        "m@http://h:x/v1",
    ],
)
def test_an_invalid_url_is_refused_without_its_password(rest: str) -> None:
    for refuse in (lambda: endpoint_of(rest), lambda: bare_llm(f"opnai:{rest}", Settings())):
        with pytest.raises(SettingsError) as error:
            refuse()
        assert "secret" not in str(error.value)
        assert "openai:MODEL" in str(error.value)


async def test_cache_wraps_meter_with_the_settings_prices_and_budget(tmp_path: Path) -> None:
    settings = Settings(cache=tmp_path, price_prompt=1e6, price_completion=10e6, max_calls=1)
    llm = open_llm("fake:echo", settings)
    assert isinstance(llm.inner, Meter)
    assert (await llm.generate(MESSAGES, Sampling())).usage.cost == 22.0
    assert (await llm.generate(MESSAGES, Sampling())).usage.cached == 1
    with pytest.raises(BudgetExceeded):
        await llm.generate([{"role": "user", "content": "other"}], Sampling())
    assert (llm.usage.calls, llm.usage.cached, llm.usage.cost) == (1, 1, 22.0)
    assert (tmp_path / "llm.sqlite").is_file()
    await llm.aclose()


async def test_a_serial_engine_gets_its_calls_in_order(tmp_path: Path) -> None:
    """A greedy call and the samples on the same prompt stay neighbours, however many questions are
    asked at once.
    """
    order: list[str] = []
    running = most = 0

    class Engine(RuleLLM):
        parallel = 1

        async def generate(self, messages: Any, sampling: Sampling) -> Any:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await anyio.sleep(0.001)
            order.append(messages[0]["content"])
            running -= 1
            return await super().generate(messages, sampling)

    llm = wrap(Engine(lambda *_: "said"), Settings(cache=tmp_path, concurrency=8))

    async def ask(text: str) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(partial(llm.generate, [{"role": "user", "content": text}], Sampling()))
            group.start_soon(
                partial(
                    llm.generate,
                    [{"role": "user", "content": text}],
                    Sampling(n=3, temperature=1.0, seed=0),
                )
            )

    async with anyio.create_task_group() as group:
        for text in "abcdef":
            group.start_soon(ask, text)
    assert (order, most) == (list("aabbccddeeff"), 1)
    await llm.aclose()


def test_a_plug_in_is_an_entry_point_and_its_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = ModuleType("plugin")
    plugin.make = lambda rest, settings: RuleLLM(lambda *_: "plugged", name=rest)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "plugin", plugin)
    monkeypatch.setattr(
        plugins, "entry_points", lambda group: [EntryPoint("mine", "plugin:make", group)]
    )
    assert bare_llm("mine:a:b", Settings()).identity["model"] == "fake:a:b"
    with pytest.raises(SettingsError, match="mine:"):
        bare_llm("other", Settings())


def test_a_file_that_is_no_model_is_one_line(tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"MZ")
    for rest, fault in [
        ("", "needs the path"),
        ("/no/such.gguf", "No such file"),
        (str(other), "not a GGUF file"),
    ]:
        with pytest.raises(SettingsError, match=fault):
            bare_llm(f"gguf:{rest}", Settings())


async def test_a_damaged_model_is_refused_when_it_is_asked(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF" + b"\x03\x00\x00\x00" + b"\xff" * 200)
    with pytest.raises(LLMRefused, match="cannot load"):
        await bare_llm(f"gguf:{damaged}", Settings()).generate(MESSAGES, Sampling())
