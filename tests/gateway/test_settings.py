"""Each setting of the gateway is documented and has an effect."""

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


def test_every_setting_is_documented() -> None:
    source = (settings_md.PACKAGE / "gateway" / "settings.py").read_text(encoding="utf-8")
    documented = {
        name: what for name, _, what in settings_md.fields(ast.parse(source), "ServeSettings")
    }
    assert list(documented) == list(ServeSettings.model_fields)
    assert all(documented.values())
    assert settings_md.TARGET.read_text(encoding="utf-8") == settings_md.text()


@pytest.mark.parametrize("name", [None, "tags"])
async def test_numbers_of_retrieved_and_prompted_records(
    store: Store, bundles: dict[str, Path], name: str | None
) -> None:
    """By the request, else the gateway's setting, else as the bundle was learned, or 10 and 4."""
    store.add_records("ada", records_of("ada"))
    bundle = bundles[name] if name else None

    async def record_count(wanted: int | None, **settings: Any) -> int:
        async with running(store, bundle, **{"k": 20, "candidates": 1, **settings}) as world:
            answer = await world.ask(QUESTION, personalization={"k": wanted})
            return len(answer.json()["personalization"]["records"])

    assert await record_count(None) == (4 if name else 10)
    assert await record_count(None, retrieved=7) == 7
    assert await record_count(15, retrieved=7) == 15
    assert await record_count(3, retrieved=7) == 3
    assert await record_count(None, k=None) == (2 if name else 4)
    assert await record_count(3, k=None) == 3


def served(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> uvicorn.Config:
    """What `hydra-llm serve` would run."""
    configs: list[uvicorn.Config] = []

    def noted(server: uvicorn.Server, sockets: list[socket.socket]) -> None:
        configs.append(server.config)
        sockets[0].close()

    monkeypatch.setenv("OPENAI_API_KEY", "x")
    monkeypatch.setattr(uvicorn.Server, "run", noted)
    assert run(["serve", "--llm", "openai:m@http://127.0.0.1:9/v1", "--port", "0", *arguments]) == 0
    return configs[0]


@pytest.mark.parametrize("name", [None, "tags"])
def test_the_settings_file_applies_to_the_llm_and_the_bundle(
    tmp_path: Path, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    file = tmp_path / "other.toml"
    file.write_text(f'cache = "{tmp_path / "there"}"\ntimeout = 7\nretries = 1\n[serve]\nk = 3\n')
    bundle = ["--bundle", str(bundles[name])] if name else []
    state = served(
        monkeypatch, "--store", f"sqlite:///{tmp_path / 's.db'}", "--config", str(file), *bundle
    ).app.state
    assert state.gateway.settings.k == 3
    assert state.gateway.deployment.pipeline.settings.cache == tmp_path / "there"
    if name:
        assert (
            state.gateway.deployment.bundle.features.path == tmp_path / "there" / "features.sqlite"
        )
    client = state.worker._llm._client
    assert (client.timeout, client.max_retries) == (7, 1)


@pytest.mark.parametrize(("drain", "timeout"), [("0.5", 1), ("0", 0), ("3", 3), (None, None)])
def test_drain_is_rounded_up_to_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drain: str | None, timeout: int | None
) -> None:
    option = [] if drain is None else ["--set", f"drain={drain}"]
    config = served(monkeypatch, "--store", f"sqlite:///{tmp_path / 's.db'}", *option)
    assert config.timeout_graceful_shutdown == timeout


@pytest.mark.parametrize(
    "refused",
    [
        ["--llm", "fake:nonsense"],
        ["--llm", "gguf:nowhere.gguf"],
        ["--llm", "openai:m@http://127.0.0.1:99999/v1"],
        ["--llm", "fake:echo", "--bundle", "nowhere"],
        ["--llm", "fake:echo", "--set", "user_headers=x user"],
        ["--llm", "fake:echo", "--set", "user_fields=metadata..id"],
    ],
)
def test_a_server_that_cannot_start_makes_no_store(
    refused: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["serve", *refused, "--port", "0"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
