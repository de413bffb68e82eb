"""Each setting of the gateway is told in the documentation, and counts."""

import ast
import socket
from pathlib import Path
from typing import Any

import pytest
import settings_md
import uvicorn

from hydra_llm.cli.main import run
from hydra_llm.gateway.settings import ServeSettings
from hydra_llm.store.store import Store

from .conftest import records_of, running

pytestmark = pytest.mark.anyio
QUESTION = "the battle for the bridge"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def test_every_setting_is_in_the_documentation_with_what_it_does() -> None:
    source = (settings_md.PACKAGE / "gateway" / "settings.py").read_text(encoding="utf-8")
    told = {name: what for name, _, what in settings_md.fields(ast.parse(source), "ServeSettings")}
    assert list(told) == list(ServeSettings.model_fields)
    assert all(told.values())
    assert settings_md.TARGET.read_text(encoding="utf-8") == settings_md.text()


@pytest.mark.parametrize("name", [None, "tags"])
async def test_as_many_records_are_retrieved_and_shown_as_was_said(
    store: Store, bundles: dict[str, Path], name: str | None
) -> None:
    """By the request, else the gateway's setting, else as the bundle was learned, or 10 and 4."""
    store.add_records("ada", records_of("ada"))
    bundle = bundles[name] if name else None

    async def shown(asked: int | None, **settings: Any) -> int:
        async with running(store, bundle, **{"k": 20, "candidates": 1, **settings}) as world:
            answer = await world.ask(QUESTION, personalization={"k": asked})
            return len(answer.json()["personalization"]["records"])

    assert await shown(None) == (4 if name else 10)
    assert await shown(None, retrieved=7) == 7
    assert await shown(15, retrieved=7) == 15
    assert await shown(3, retrieved=7) == 3
    assert await shown(None, k=None) == (2 if name else 4)
    assert await shown(3, k=None) == 3


def served(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> uvicorn.Config:
    """What `hydra-llm serve` would run."""
    found: list[uvicorn.Config] = []

    def noted(server: uvicorn.Server, sockets: list[socket.socket]) -> None:
        found.append(server.config)
        sockets[0].close()

    monkeypatch.setenv("OPENAI_API_KEY", "x")
    monkeypatch.setattr(uvicorn.Server, "run", noted)
    assert run(["serve", "--llm", "openai:m@http://127.0.0.1:9/v1", "--port", "0", *arguments]) == 0
    return found[0]


@pytest.mark.parametrize("name", [None, "tags"])
def test_the_settings_file_counts_for_the_llm_and_the_bundle(
    tmp_path: Path, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    file = tmp_path / "other.toml"
    file.write_text(f'cache = "{tmp_path / "there"}"\ntimeout = 7\nretries = 1\n[serve]\nk = 3\n')
    bundle = ["--bundle", str(bundles[name])] if name else []
    state = served(
        monkeypatch, "--store", f"sqlite:///{tmp_path / 's.db'}", "--config", str(file), *bundle
    ).app.state
    assert state.gateway.settings.k == 3
    assert state.gateway.deployment.settings.cache == tmp_path / "there"
    if name:
        assert state.gateway.deployment.bundle.store.path == tmp_path / "there" / "features.sqlite"
    client = state.worker._llm._client
    assert (client.timeout, client.max_retries) == (7, 1)


@pytest.mark.parametrize(("said", "given"), [("0.5", 1), ("0", 0), ("3", 3), (None, None)])
def test_half_a_second_is_time_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str | None, given: int | None
) -> None:
    drain = [] if said is None else ["--set", f"drain={said}"]
    config = served(monkeypatch, "--store", f"sqlite:///{tmp_path / 's.db'}", *drain)
    assert config.timeout_graceful_shutdown == given
