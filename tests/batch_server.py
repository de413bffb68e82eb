"""A real HTTP endpoint on loopback that speaks OpenAI's Batch API, for tests: it works on a batch
when it is asked for it the `polls`-th time. Also a program, which another process can kill.
"""

import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any

Body = dict[str, Any]
Answer = tuple[int, Any]


def completion(body: Body) -> Answer:
    """Texts that tell the prompt, the seed and the place."""
    prompt, seed = body["messages"][-1]["content"], body.get("seed", 0)
    texts = [f"{prompt} {body.get('temperature')} {seed + i}" for i in range(body.get("n", 1))]
    choices = [
        {"index": i, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        for i, text in enumerate(texts)
    ]
    usage = {"prompt_tokens": 7, "completion_tokens": 2 * len(texts), "total_tokens": 9}
    return 200, {"id": "x", "object": "chat.completion", "choices": choices, "usage": usage}


class BatchServer:
    """What it holds: `files` (id → content), `batches` (id → the API's object), and how often each
    request was executed. Tests change its attributes to make it fail.
    """

    def __init__(self, answer: Callable[[Body], Answer] = completion, port: int = 0):
        self.answer, self.polls, self.most = answer, 1, 50_000
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, Body] = {}
        self.executed, self.direct = Counter[str](), list[Body]()
        self.requests: list[str] = []
        self.cut_before: set[str] = set()  # the next request of this kind gets no answer, unread
        self.cut_after: set[str] = set()  # and this one is carried out before
        self.fail: dict[str, Answer] = {}  # kind → what is answered instead
        self.refuse: Callable[[list[Body]], list[Body]] = lambda lines: []  # a batch's errors
        self.expires = self.loses = 0  # how many lines of the next batch are not executed
        self._numbers, self._lock, self._polled = count(1), threading.Lock(), Counter[str]()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer.handle(self, "POST")

            def do_GET(self) -> None:
                outer.handle(self, "GET")

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        options = {"poll_interval": 0.02}
        threading.Thread(target=self._server.serve_forever, kwargs=options, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def handle(self, handler: Any, method: str) -> None:
        path = handler.path.partition("?")[0].removeprefix("/v1")
        kind = f"{method} {re.sub(r'(file|batch)-[0-9]+', 'ID', path)}"
        self.requests.append(kind)
        if kind in self.cut_before:
            self.cut_before.discard(kind)
            length = int(handler.headers.get("Content-Length") or 0)
            handler.rfile.read(min(100, length))  # a part of it
            handler.close_connection = True
            return
        content = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        with self._lock:
            status, body = self.fail.get(kind) or self.reply(kind, path, content, handler.headers)
        if kind in self.cut_after:
            self.cut_after.discard(kind)
            handler.close_connection = True
            return
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(sent)))
        handler.send_header("Content-Type", "application/json")
        handler.end_headers()
        handler.wfile.write(sent)

    def reply(self, kind: str, path: str, content: bytes, headers: Any) -> Answer:
        id = next((part for part in path.split("/") if re.match(r"(file|batch)-", part)), "")
        if id and id not in self.files and id not in self.batches:
            return 404, {"error": {"message": f"no {id}"}}
        match kind:
            case "POST /chat/completions":
                self.direct.append(json.loads(content))
                return self.answer(json.loads(content))
            case "POST /files":
                boundary = re.search(r"boundary=([^;]+)", headers["Content-Type"])
                assert boundary is not None
                parts = content.split(b"--" + boundary[1].encode())
                (part,) = (part for part in parts if b"filename=" in part)
                return 200, self._file(part.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n"))
            case "GET /files/ID/content":
                return 200, self.files[id]
            case "POST /batches":
                return 200, self._batch(json.loads(content))
            case "GET /batches":
                data = list(self.batches.values())[::-1]
                return 200, {"object": "list", "data": data, "has_more": False}
            case "GET /batches/ID":
                self._polled[id] += 1
                if self.batches[id]["status"] == "in_progress" and self._polled[id] >= self.polls:
                    self.work(id)
                return 200, self.batches[id]
            case "POST /batches/ID/cancel":
                self.batches[id]["status"] = "cancelled"
                return 200, self.batches[id]
        return 404, {"error": {"message": f"no {kind}"}}

    def _file(self, content: bytes) -> Body:
        id = f"file-{next(self._numbers)}"
        self.files[id] = content
        fields = {"object": "file", "bytes": len(content), "created_at": 1, "status": "processed"}
        return {"id": id, "filename": "requests.jsonl", "purpose": "batch", **fields}

    def _batch(self, asked: Body) -> Body:
        id, lines = f"batch-{next(self._numbers)}", self.lines(asked["input_file_id"])
        batch = {"id": id, "object": "batch", "status": "in_progress", **asked}
        batch |= {"created_at": 10, "in_progress_at": 20}
        batch["request_counts"] = {"total": len(lines), "completed": 0, "failed": 0}
        errors = self.refuse(lines)
        if len(lines) > self.most:
            errors = [{"code": "too_many_requests", "message": f"at most {self.most} requests"}]
        if errors:
            batch |= {"status": "failed", "errors": {"object": "list", "data": errors}}
        self.batches[id] = batch
        return batch

    def lines(self, file: str) -> list[Body]:
        return [json.loads(line) for line in self.files[file].splitlines()]

    def work(self, id: str) -> None:
        """Answer a batch's requests."""
        batch = self.batches[id]
        output, errors = list[Body](), list[Body]()
        lines = self.lines(batch["input_file_id"])
        assert len({line["custom_id"] for line in lines}) == len(lines)
        expired, lost = self.expires, self.loses
        self.expires = self.loses = 0
        for place, line in enumerate(reversed(lines)):  # in any order
            row = {"id": f"r{place}", "custom_id": line["custom_id"], "response": None}
            if place < expired:
                fault = {"code": "batch_expired", "message": "not executed in time"}
                errors.append({**row, "error": fault})
                continue
            self.executed[canonical(line["body"])] += 1
            status, body = self.answer(line["body"])
            response = {"status_code": status, "request_id": "q", "body": body}
            (output if status == 200 else errors).append({**row, "response": response})
        written = b"".join(json.dumps(row).encode() + b"\n" for row in output[lost:])
        written += b'{"id": "cut", "custom_' if lost else b""
        batch["output_file_id"] = self._file(written)["id"]
        if errors:
            text = b"".join(json.dumps(row).encode() + b"\n" for row in errors)
            batch["error_file_id"] = self._file(text)["id"]
        batch |= {"status": "expired" if expired else "completed", "completed_at": 120}
        counts = {"total": len(lines), "completed": len(output), "failed": len(errors)}
        batch["request_counts"] = counts


def canonical(body: Body) -> str:
    return json.dumps(body, sort_keys=True)
