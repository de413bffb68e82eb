"""What surrounds the process: variables, home folder, proxies, streams, and Python's log."""

import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

import hydra_llm
from hydra_llm.cli.main import COMMANDS, load, run
from hydra_llm.config import Settings, load_settings
from hydra_llm.datasets.fetch import fetch
from hydra_llm.environment import expanded, http_client_faults, variables
from hydra_llm.errors import SettingsError
from hydra_llm.gateway.upstream import HttpUpstream
from hydra_llm.llm.endpoint import Endpoint
from hydra_llm.llm.openai import OpenAILLM
from hydra_llm.llm.registry import bare_llm
from hydra_llm.store.database import create_engine
from hydra_llm.store.store import Store
from hydra_llm.tasks.base import Task
from hydra_llm.types import Record
from tests.waiting import FOREVER

LINK = "tcp://10.0.0.1:8000"


@pytest.mark.parametrize("value", ["", "  ", "\n", LINK])
def test_what_is_no_value_counts_as_unset(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HYDRA_K", value)
    monkeypatch.setenv("HYDRA_LLM_CHECK_LLM", value)
    assert load_settings().k == Settings().k
    assert run(["llm", "check", "fake:echo", "--json"]) == 0
    assert "HYDRA_K" not in variables()


def test_a_service_of_kubernetes_is_no_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)  # where the store is made
    for name in ("HYDRA_SERVE_PORT", "HYDRA_LLM_SERVE_PORT", "HYDRA_LLM_PORT"):
        monkeypatch.setenv(name, LINK)
    assert run(["serve", "--llm", "nothing:x", "--port", "0"]) == 2
    for name in ("HYDRA_SERVE_PORT", "HYDRA_LLM_SERVE_PORT", "HYDRA_LLM_PORT"):
        assert f"{name}={LINK} is ignored" in caplog.text


def test_blanks_around_a_value_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_ENCODER", " minilm\r\n")
    assert load_settings().encoder == "minilm"


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HYDRA_CACHE", "~/cache")
    monkeypatch.chdir(tmp_path)
    assert load_settings().cache == tmp_path / "home" / "cache"
    assert create_engine("sqlite:///~/s.db").url.database == str(tmp_path / "home" / "s.db")
    with pytest.raises(SettingsError, match=re.escape(f"{tmp_path}/home/m.gguf")):
        bare_llm("gguf:~/m.gguf", Settings())
    monkeypatch.setenv("HYDRA_DATA_IMPORT_OUT", "~/set")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"user": "a", "id": "1", "input": "x", "output": "y"}\n')
    assert run(["data", "import", str(rows)]) == 0
    assert (tmp_path / "home" / "set").is_dir()
    assert not (tmp_path / "~").exists()


def test_without_a_home_folder_it_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nowhere(*_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    monkeypatch.setattr(Path, "expanduser", nowhere)
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert run(["llm", "check", "fake:echo"]) == 2
    line = "hydra-llm: there is no home folder: set HYDRA_CACHE to a folder for caches\n"
    assert capsys.readouterr().err == line
    with pytest.raises(SettingsError, match="write the whole path"):
        expanded(Path("~/x"))


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("ALL_PROXY", "socks://u:secret@127.0.0.1:9", "ALL_PROXY in the environment"),
        ("all_proxy", "socks5://127.0.0.1:9", "pip install socksio"),
        ("HTTPS_PROXY", "ftp://127.0.0.1:9", "HTTPS_PROXY in the environment"),
        ("HTTP_PROXY", "http://127.0.0.1:notaport", "HTTP_PROXY in the environment"),
        ("http_proxy", "127.0.0.1:99999", "http_proxy in the environment"),
        ("SSL_CERT_FILE", "/nonexistent/ca.pem", "SSL_CERT_FILE in the environment"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_one_line(
    name: str, value: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))  # there, and so not named
    monkeypatch.setenv(name, value)
    url = "http://127.0.0.1:9/v1"
    for make in (
        lambda: HttpUpstream(Endpoint(url), timeout=1),
        lambda: OpenAILLM("m", base_url=url, api_key="k"),
        lambda: fetch("lamp-3", "user", tmp_path, base_url=url),
    ):
        with pytest.raises(SettingsError, match=line) as error:
            make()
        assert "secret" not in str(error.value)


def test_another_error_of_a_client_stays() -> None:
    with pytest.raises(ValueError, match="a bug"), http_client_faults():
        raise ValueError("a bug")


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_closed_streams_do_not_matter(closed: str, tmp_path: Path) -> None:
    command = f'"$0" -m hydra_llm bench methods {closed}'
    done = subprocess.run(["sh", "-c", command, sys.executable], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0
    assert b"Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_json_is_whole_in_every_encoding(encoding: str) -> None:
    code = (
        "from hydra_llm.environment import open_standard_streams; open_standard_streams();"
        "from hydra_llm.cli.console import emit, say;"
        "emit({'a': '茶\\U0001f375'}, True); emit('茶'); say('茶')"
    )
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, timeout=FOREVER
    )
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode(encoding)
    decoded, end = json.JSONDecoder().raw_decode(text)
    assert decoded == {"a": "茶\U0001f375"}
    assert text[end:].strip() in ("茶", "\\u8336")


def test_libraries_do_not_write_to_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[Any] = []

    def handle(_: logging.Logger, record: logging.LogRecord) -> None:
        lines.append(record.getMessage())

    monkeypatch.setattr(logging.Logger, "handle", handle)
    monkeypatch.setattr(logging.root, "handlers", [])
    level = logging.root.level
    Task("t", "generation", "{input}").strategy.metric_rows("rouge1", [("one", "one")])
    assert (lines, logging.root.handlers, logging.root.level) == ([], [], level)


def test_messages_name_options_that_there_are() -> None:
    """Every `--option` in a message of the program is an option of some command."""
    options = {"--help", "--version"}
    commands = [load(name) for name in COMMANDS]
    while commands:
        command = commands.pop()
        for option in command.params:
            options |= {*option.opts, *option.secondary_opts}
        commands += getattr(command, "commands", {}).values()
    of_pip = {"--constraint", "--index-url", "--extra-index-url", "--no-deps", "--dest"}
    of_pip |= {"--retries", "--quiet", "--disable-pip-version-check", "--only-binary"}
    of_others = of_pip | {"--always", "--dirty", "--abbrev", "--exclude"}  # git describe
    of_others |= {"--head", "--address"}  # ray start
    of_others |= {"--multi", "--num"}  # accelerate launch --multi_gpu --num_processes
    folder = Path(hydra_llm.__file__).parent
    for file in folder.rglob("*.py"):
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", file.read_text("utf-8")))
        assert named <= options | of_others, file


def test_no_folder_for_temporary_files_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(url := f"sqlite:///{tmp_path / 's.db'}")
    store.add_records("ada", [Record("ada", "r", "question", "yes")])
    store.close()
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "gone")])
    out = str(tmp_path / "b")
    assert run(["learn", "--store", url, "--llm", "fake:echo", "--out", out]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "No usable temporary directory" in line
