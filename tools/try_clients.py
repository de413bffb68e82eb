"""Run the code of docs/clients.md against a gateway on a fake upstream: `make clients`.

Prints a table of clients and features. `--write` writes it into the page and into
benchmarks/results/clients.json; clients that `--only` leaves out keep what is there. Then
examples/typescript is type-checked and run. Exits with 1 if a tick of that file is lost. The
clients are installed once, into `.clients` (about 600 MB); JavaScript and TypeScript are skipped
where there is no npm.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import uvicorn
from client_upstream import Upstream

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "clients.md"
RESULTS = ROOT / "benchmarks" / "results" / "clients.json"
PINS = Path(__file__).with_name("clients.txt")
CACHE = ROOT / ".clients"
EXAMPLE = ROOT / "examples" / "typescript"
PACKAGE = json.loads((EXAMPLE / "package.json").read_text(encoding="utf-8"))
JAVASCRIPT = {**PACKAGE["dependencies"], **PACKAGE["devDependencies"]}
JAVASCRIPT |= {"openai": "6.49.0", "@ai-sdk/openai-compatible": "2.0.92"}
SENT = {"stream": "stream", "tools": "tools", "schema": "response_format"}  # by the chat requests
SERVED = {"responses": "/v1/responses", "embeddings": "/v1/embeddings", "MCP": "/mcp"}
FEATURES = ("user", "seen", "feedback", *SENT, *SERVED)
ADDRESS = "http://127.0.0.1:8000"  # of the gateway, as the page writes it
MARK = "harvest-7"  # in the user's records, in no question
WORD = "Monday"  # in the page's questions; a client's other calls are its own affair
DAYS = ("Tuesday", "Wednesday", "Thursday", "Friday", "Sunday")
SECONDS = 900  # that a block, or the gateway's start, may take on a busy machine
QUIET = {
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
    "MEM0_TELEMETRY": "False",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "OPENAI_API_KEY": "any",
}


@dataclass
class Client:
    """A section of the page, and what its code has shown."""

    name: str
    blocks: list[tuple[str, str]]  # language, code
    shown: dict[str, bool] = field(default_factory=dict)  # by feature; missing: not tried
    error: str = ""


def sections(page: str) -> list[Client]:
    """The page's sections that have code."""
    parts = re.split(r"^## (.+)$", page, flags=re.M)[1:]
    found = [
        Client(name, re.findall(r"^```(?!text)(\w+)\n(.*?)^```$", text, flags=re.M | re.S))
        for name, text in zip(parts[::2], parts[1::2], strict=True)
    ]
    return [client for client in found if client.blocks]


# ---- set-up


def installed(stamp: Path, content: str) -> bool:
    """Whether exactly this was installed before."""
    return stamp.is_file() and stamp.read_text(encoding="utf-8") == digest(content)


def digest(content: str) -> str:
    return hashlib.sha256(f"{sys.version_info[:2]} {content}".encode()).hexdigest()


def install() -> bool:
    """Install the clients where that is needed; returns whether JavaScript can be run."""
    CACHE.mkdir(exist_ok=True)
    pins, stamp = PINS.read_text(encoding="utf-8"), CACHE / "python.stamp"
    if not installed(stamp, pins):
        print(f"installing the Python clients into {CACHE.name} (once, some minutes)", flush=True)
        if not (CACHE / "venv" / "bin" / "pip").exists():
            venv.create(CACHE / "venv", with_pip=True)
        pip = [CACHE / "venv" / "bin" / "pip", "install", "--quiet", "--no-deps", "--no-compile"]
        subprocess.run([*pip, "--requirement", PINS], check=True)
        stamp.write_text(digest(pins), encoding="utf-8")
    if not (shutil.which("npm") and shutil.which("node")):
        return False
    package = json.dumps({"private": True, "dependencies": JAVASCRIPT})
    folder, stamp = CACHE / "node", CACHE / "node.stamp"
    if not installed(stamp, package):
        folder.mkdir(exist_ok=True)
        (folder / "package.json").write_text(package, encoding="utf-8")
        npm = ["npm", "install", "--no-audit", "--no-fund", "--loglevel=error"]
        subprocess.run(npm, cwd=folder, check=True)
        stamp.write_text(digest(package), encoding="utf-8")
    return True


# ---- the gateway


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


@contextmanager
def gateway(upstream: Upstream, folder: Path) -> Iterator[tuple[str, str]]:
    """A running gateway in front of the fake upstream; the addresses of both."""
    port, own = free_port(), free_port()
    config = uvicorn.Config(upstream, port=port, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    base, llm = f"http://127.0.0.1:{own}", f"openai:m@http://127.0.0.1:{port}/v1"
    store = f"sqlite:///{folder / 'store.db'}"
    command = [sys.executable, "-m", "hydra_llm", "serve", "--llm", llm, "--port", str(own)]
    log = (folder / "gateway.log").open("w")
    environment = os.environ | {"OPENAI_API_KEY": "any"}
    with (
        log,
        subprocess.Popen(
            [*command, "--store", store, "--log", "json"],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
        ) as process,
    ):
        try:
            wait_for(f"{base}/health/liveness", process, folder / "gateway.log")
            yield base, f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            server.should_exit = True
            thread.join()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + SECONDS
    while process.poll() is None and time.monotonic() < end:
        try:
            httpx2.get(url, timeout=1)
            return
        except httpx2.HTTPError:
            time.sleep(0.1)
    sys.exit(f"the gateway does not start: {log.read_text(encoding='utf-8')}")


# ---- running the code


def run_client(
    client: Client, user: str, base: str, fake: str, upstream: Upstream, log: Path
) -> None:
    """Run a section's code for a user of its own, and note what it has shown."""
    records = [
        {"id": day, "input": f"Which tea for {day}?", "output": f"peppermint of the {MARK}"}
        for day in DAYS
    ]
    url = f"{base}/v1/users/{user}"
    http = httpx2.Client(timeout=SECONDS)
    http.post(f"{url}/records", json={"records": records}).raise_for_status()
    upstream.asked.clear()
    before, printed = len(log.read_bytes()), ""
    for language, code in client.blocks:
        own = re.sub(r"\bada\b", user, code.replace(ADDRESS, base))
        out, error = run_block(language, own, fake)
        printed, client.error = printed + out, client.error or error
    asked = [body for body in upstream.asked if WORD in json.dumps(body["messages"])]
    if asked:
        client.shown["user"] = any(map(is_personal, asked))
        client.shown["seen"] = bool(re.search(r"personal:.*\btrue\b", printed, re.I))
        client.shown["feedback"] = bool(http.get(f"{url}/export").json()["feedback"])
    else:  # a tool's result has the records
        client.shown["user"] = MARK in printed
    for feature, name in SENT.items():
        if own := [body for body in asked if body.get(name)]:
            client.shown[feature] = any(map(is_personal, own))
    client.shown |= served(log, before)


def is_personal(body: dict[str, Any]) -> bool:
    return MARK in json.dumps(body["messages"])


def served(log: Path, since: int) -> dict[str, bool]:
    """Which endpoints of SERVED were asked, by the gateway's log, and whether they have answered:
    a response that is personal, vectors, the result of a tool.
    """
    written = log.read_bytes()[since:].splitlines()
    lines = [json.loads(line) for line in written if line.startswith(b"{")]
    routes = {line.get("route") for line in lines}
    answered = {
        line["route"]
        for line in lines
        if line.get("status") == 200
        and not (line["route"] == "/v1/responses" and line.get("reason") != "personal")
        and not (line["route"] == "/mcp" and ("tool" not in line or "tool_error" in line))
    }
    return {name: path in answered for name, path in SERVED.items() if path in routes}


def run_block(language: str, code: str, fake: str) -> tuple[str, str]:
    """What a block prints, and the last line of its error, if it failed."""
    programs = CACHE / "venv" / "bin"
    environment = os.environ | QUIET | {"OPENAI_BASE_URL": f"{fake}/v1"}
    environment["PATH"] = f"{programs}{os.pathsep}{os.environ['PATH']}"
    environment.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory() as folder:
        environment |= {"HOME": folder, "LLM_USER_PATH": folder, "MEM0_DIR": folder}
        if language == "js":
            (Path(folder) / "node_modules").symlink_to(CACHE / "node" / "node_modules")
        ending, program = {
            "python": ("py", [str(programs / "python")]),
            "bash": ("sh", ["bash", "-euo", "pipefail"]),
            "js": ("mjs", ["node"]),
        }[language]
        file = Path(folder) / f"block.{ending}"
        file.write_text(code, encoding="utf-8")
        try:
            done = subprocess.run(
                [*program, str(file)],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            return "", f"takes more than {SECONDS} s"
    lines = done.stderr.strip().splitlines() or ["no message"]
    return done.stdout, lines[-1] if done.returncode else ""


def run_example(base: str) -> str:
    """Type-check examples/typescript and run its programs; what went wrong, or ''."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "example"
        unwanted = shutil.ignore_patterns("node_modules", "build")
        shutil.copytree(EXAMPLE, folder, ignore=unwanted)
        (folder / "node_modules").symlink_to(CACHE / "node" / "node_modules")
        environment = {**os.environ, "HYDRA_URL": f"{base}/v1"}
        programs = (
            ["npm", "run", "build"],
            ["node", "build/fetch.js"],
            ["node", "build/ai-sdk.js"],
        )
        for program in programs:
            done = subprocess.run(
                program,
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
            said = done.stdout + done.stderr
            if done.returncode or (program[0] == "node" and said.count("personal: true") != 2):
                return f"{' '.join(program)}: {said}"
    export = httpx2.get(f"{base}/v1/users/ada/export", timeout=SECONDS).json()
    return "" if len(export["feedback"]) == 3 else f"feedback: {export['feedback']}"


# ---- the table


def table(clients: list[Client], versions: dict[str, str]) -> str:
    head = "| client | version | " + " | ".join(FEATURES) + " |"
    lines = [head, "|---|---|" + "---|" * len(FEATURES)]
    for client in clients:
        marks = [{True: "✓", False: "✗"}.get(client.shown.get(name), " ") for name in FEATURES]
        lines.append(f"| {client.name} | {versions.get(client.name, '')} | {' | '.join(marks)} |")
    return "\n".join(lines)


def versions_of(clients: list[Client]) -> dict[str, str]:
    """The clients' versions, by section."""
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", PINS.read_text(encoding="utf-8"), flags=re.M))
    names = {"openai (Python)": "openai", "LangChain": "langchain-openai", "mem0": "mem0ai"}
    names |= {"openai (Responses)": "openai", "openai-agents (Responses)": "openai-agents"}
    names |= {
        "MCP (Python SDK)": "mcp",
        "LlamaIndex": "llama-index-llms-openai-like",
        "pydantic-ai": "pydantic-ai-slim",
    }
    own = {
        client.name: pinned.get(names.get(client.name, client.name.lower()), "")
        for client in clients
    }
    node = {"openai (Node)": "openai", "Vercel AI SDK": "ai", "Vercel AI SDK (Responses)": "ai"}
    return own | {name: JAVASCRIPT[node[name]] for name in own.keys() & node.keys()}


def lost(clients: list[Client]) -> list[str]:
    """The ticks of the committed file that are no more."""
    if not RESULTS.is_file():
        return []
    before = json.loads(RESULTS.read_text(encoding="utf-8"))["clients"]
    return [
        f"{client.name}: {feature}"
        for client in clients
        for feature, was in before.get(client.name, {}).items()
        if was and not client.shown.get(feature)
    ]


def write(clients: list[Client]) -> None:
    """Write what was shown; a client that was not run keeps what is committed."""
    before = json.loads(RESULTS.read_text(encoding="utf-8"))
    shown = before["clients"] | {client.name: client.shown for client in clients}
    ran = versions_of(clients)
    clients = [c for c in sections(PAGE.read_text(encoding="utf-8")) if c.name in shown]
    for client in clients:
        client.shown = shown[client.name]
    known = before["versions"] | ran
    versions = {client.name: known[client.name] for client in clients}
    content = {client.name: client.shown for client in clients}
    text = json.dumps({"versions": versions, "clients": content}, indent=1, ensure_ascii=False)
    RESULTS.write_text(text + "\n", encoding="utf-8")
    marks = r"(<!-- table -->\n).*?(<!-- end of table -->)"
    new = f"\\1\n{table(clients, versions)}\n\n\\2"
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub(marks, new, page, flags=re.S), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write the table")
    parser.add_argument(
        "--only", default="", help="only clients whose name contains one of these, with commas"
    )
    args = parser.parse_args()
    has_node = install()
    clients = [
        client
        for client in sections(PAGE.read_text(encoding="utf-8"))
        if any(part in client.name for part in args.only.split(","))
        and (has_node or client.blocks[0][0] != "js")
    ]
    upstream = Upstream()
    with tempfile.TemporaryDirectory() as folder, gateway(upstream, Path(folder)) as (base, fake):
        log = Path(folder) / "gateway.log"
        for place, client in enumerate(clients):
            started = time.monotonic()
            run_client(client, f"ada{place}", base, fake, upstream, log)
            report(client.name, started, client.error)
        fault, started = "", time.monotonic()
        if has_node and not args.only:
            fault = run_example(base)
            report("examples/typescript", started, fault)
    versions = versions_of(clients)
    print(table(clients, versions))
    if args.write:
        write(clients)
    missing = lost(clients)
    for line in missing:
        print(f"lost: {line}", file=sys.stderr)
    return 1 if missing or fault or any(client.error for client in clients) else 0


def report(name: str, started: float, error: str) -> None:
    failed = f" FAILED: {error}" if error else ""
    print(f"{name}: {time.monotonic() - started:.0f} s{failed}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
