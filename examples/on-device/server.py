"""A server that makes candidates and never sees a record: the device picks.

    python examples/on-device/server.py phone --llm openai:gpt-4o-mini [--port 8000]

`phone` is what `hydra-llm bundles export BUNDLE --onnx --out phone` wrote; a `user.json` in it is
not served. POST /candidates {"input": "..."} asks the LLM without records and returns the
candidates; GET / is a page that picks in the browser. Its two packages come from `npm install` in
this folder. No request leaves this origin.
"""

import argparse
import json
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from mimetypes import guess_type
from pathlib import Path
from typing import Any

from hydra_llm.config import Settings
from hydra_llm.errors import HydraError
from hydra_llm.llm.registry import open_llm
from hydra_llm.pipeline import Pipeline, UserPipeline
from hydra_llm.retrieve import Nothing
from hydra_llm.tasks.base import Task
from hydra_llm.types import Query

HERE = Path(__file__).parent
PAGE = {"/": "index.html", "/page.js": "page.js", "/hydra.js": "hydra.js"}
SHARED = ("manifest.json", "encoder.onnx", "tokenizer.json", "tokenizer_config.json", "scorer.onnx")
MOST = 100_000  # bytes of a question
POLICY = "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; img-src data:"


def pipeline_of(phone: Path, llm: str) -> UserPipeline:
    """The exported task's stages up to the candidates, without any record."""
    manifest = json.loads((phone / "manifest.json").read_text(encoding="utf-8"))
    task, settings = Task.from_json(manifest["task"]), Settings.checked(manifest["settings"])
    return UserPipeline.of(Pipeline(task, Nothing(), settings), open_llm(llm, settings), {}, {})


def make_server(phone: Path, llm: str, port: int = 0, npm: Path | None = None) -> Any:
    """The server, not yet serving; `npm` is a folder with the page's two packages."""
    pipeline, packages = pipeline_of(phone, llm), (npm or HERE / "node_modules").resolve()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            folder, _, name = path[1:].partition("/")
            file = HERE / PAGE[path] if path in PAGE else None
            if folder == "phone" and name in SHARED:
                file = phone / name
            elif folder == "npm" and (packages / name).resolve().is_relative_to(packages):
                file = packages / name
            if file is None or not file.is_file():
                self.reply(404, b"not found", "text/plain")
                return
            kind = "text/javascript" if file.suffix == ".mjs" else guess_type(file.name)[0]
            self.reply(200, file.read_bytes(), kind or "application/octet-stream")

        def do_POST(self) -> None:
            size = int(self.headers.get("Content-Length", 0))
            try:
                json_only = self.headers.get_content_type() == "application/json"
                if self.path != "/candidates" or not 0 < size <= MOST or not json_only:
                    raise ValueError("POST /candidates takes a short body of application/json")
                text = json.loads(self.rfile.read(size))["input"]
                proposal = pipeline.propose(Query("device", "asked", str(text)))
            except (ValueError, KeyError, TypeError, HydraError) as error:
                self.reply(400, str(error).encode(), "text/plain")
                return
            body = json.dumps({"candidates": [asdict(own) for own in proposal.candidates]})
            self.reply(200, body.encode(), "application/json")

        def reply(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Security-Policy", POLICY)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """No log: a question is nobody else's affair."""

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("phone", type=Path)
    parser.add_argument("--llm", required=True)
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    server = make_server(args.phone, args.llm, args.port)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
