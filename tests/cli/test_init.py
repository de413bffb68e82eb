"""`hydra-llm init`: the example of the settings file is true."""

import re
import tomllib
from pathlib import Path

import pytest

from hydra_llm.cli.init import EXAMPLE
from hydra_llm.cli.main import run
from hydra_llm.config import SERVE_TABLE, Settings, load_settings
from hydra_llm.gateway.settings import ServeSettings, load_serve_settings

SET = re.sub(r"(?m)^# (?=\w+ = )", "", EXAMPLE)  # every line in force


def test_the_example_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["init"]) == 0
    assert Path("hydra-llm.toml").read_text() == EXAMPLE
    assert load_settings() == Settings()
    assert load_serve_settings() == ServeSettings()
    Path("hydra-llm.toml").write_text("k = 2")
    assert run(["init"]) == 2
    assert Path("hydra-llm.toml").read_text() == "k = 2"
    assert run(["init", "--out", "no/such/folder.toml"]) == 2


def test_every_line_of_the_example_is_a_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "all.toml"
    file.write_text(SET)
    settings, serve = load_settings(file=file), load_serve_settings(file)
    serve_limits = ("samples", "requests_per_minute", "cors_origins", "drain")
    limits = {"llm.max_calls", *(f"serve.{name}" for name in serve_limits)}
    for group, table in tomllib.loads(SET).items():
        defaults = ServeSettings() if group == SERVE_TABLE else Settings()
        loaded = serve if group == SERVE_TABLE else settings
        for name, value in table.items():
            if name == "cache":
                assert loaded.cache == Path(value).expanduser()
            elif f"{group}.{name}" in limits:
                assert not getattr(defaults, name)
            else:
                assert getattr(loaded, name) == value == getattr(defaults, name), name
