"""LaMP's download against a real server on 127.0.0.1 that breaks off, lies about lengths, and knows
or ignores ranges.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from hydra_llm.cli.main import run
from hydra_llm.datasets.fetch import addresses, fetch, load_named
from hydra_llm.datasets.native import load
from hydra_llm.errors import DataError, UserFault

QUESTIONS = [
    {
        "id": str(at),
        "input": f"Generate a headline for the following article: {'w' * 2000} {at}",
        "profile": [{"id": "1", "text": "x", "title": "y"}],
    }
    for at in range(200)
]
GOLDS = {"task": "LaMP_4", "golds": [{"id": str(at), "output": "z"} for at in range(200)]}
FILES = {
    f"/LaMP_4/{part}/{part}_{what}.json": json.dumps(content).encode()
    for part in ("train", "dev")
    for what, content in (
        ("questions", [{**q, "id": f"{part}{q['id']}"} for q in QUESTIONS]),
        ("outputs", None),
    )
}
for part in ("train", "dev"):
    golds = [{**gold, "id": f"{part}{gold['id']}"} for gold in GOLDS["golds"]]  # type: ignore[dict-item]
    FILES[f"/LaMP_4/{part}/{part}_outputs.json"] = json.dumps({**GOLDS, "golds": golds}).encode()
FIRST = "/LaMP_4/train/train_questions.json"


@dataclass
class Server:
    """What is served, how, and what was requested."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=lambda: dict(FILES))
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and range of each request."""
    cuts: dict[str, list[int]] = field(default_factory=dict)
    """For a path: after so many bytes of the next answers the connection is cut."""
    ranges: bool = True
    tag: str = '"v1"'
    status: dict[str, list[int]] = field(default_factory=dict)
    """For a path: the status of the next answers."""
    add_to_length: int = 0
    shift: int = 0
    """How far a range that is answered lies from the one that was asked for."""


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            byte_range = self.headers.get("Range")
            server.requests.append((self.path, byte_range))
            if statuses := server.status.get(self.path):
                self._answer(statuses.pop(0), b"no")
                return
            if self.path not in server.files:
                self._answer(404, b"no such page")
                return
            content = server.files[self.path]
            start = (
                int(re.findall(r"\d+", byte_range)[0])
                if byte_range and server.ranges and self.headers.get("If-Range") == server.tag
                else 0
            )
            if start > len(content) - 1:
                self._answer(416, b"")
                return
            self._answer(206 if start else 200, content, start)

        def _answer(self, status: int, content: bytes, start: int = 0) -> None:
            self.send_response(status)
            self.send_header("ETag", server.tag)
            self.send_header(
                "Content-Length",
                str(len(content) - start + (server.add_to_length if status in (200, 206) else 0)),
            )
            if status == 206:
                self.send_header(
                    "Content-Range",
                    f"bytes {start + server.shift}-{len(content) - 1}/{len(content)}",
                )
            self.end_headers()
            body = content[start:]
            cuts = server.cuts.get(self.path)
            if cuts:
                body = body[: cuts.pop(0)]
                self.close_connection = True
            self.wfile.write(body)
            if server.add_to_length:
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()
    http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(state))
    http.daemon_threads = True
    thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{http.server_address[1]}"
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


def get(server: Server, folder: Path) -> list[Path]:
    return fetch("lamp-4", "user", folder, base_url=server.url, pause=0.0)


def arrived(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


WHOLE = {address.rpartition("/")[2]: content for address, content in FILES.items()}


def test_the_official_addresses() -> None:
    root = "https://ciir.cs.umass.edu/downloads/LaMP"
    assert (
        addresses("lamp-2n", "user")["train_questions.json"]
        == f"{root}/LaMP_2/train/train_questions.json"
    )
    assert (
        addresses("lamp-2m", "user")["dev_outputs.json"]
        == f"{root}/LaMP_2/new/dev/dev_outputs.json"
    )
    assert (
        addresses("lamp-2m", "time")["dev_questions.json"]
        == f"{root}/time/LaMP_2/new/dev/dev_questions.json"
    )
    assert (
        addresses("lamp-5", "time")["train_outputs.json"]
        == f"{root}/time/LaMP_5/train/train_outputs.json"
    )


def test_the_four_files_arrive_and_load(server: Server, tmp_path: Path) -> None:
    reports: list[tuple[str, int, int | None]] = []
    files = fetch(
        "lamp-4",
        "user",
        tmp_path / "d",
        base_url=server.url + "/",
        progress=lambda *now: reports.append(now),
    )
    assert arrived(tmp_path / "d") == WHOLE
    assert sorted(file.name for file in files) == sorted(WHOLE)
    assert {(name, size) for name, done, size in reports if done == size} == {
        (name, len(content)) for name, content in WHOLE.items()
    }
    dataset = load(tmp_path / "d")
    assert (len(dataset.users("train")), len(dataset.users("test"))) == (200, 200)


def test_a_name_of_lamps_is_downloaded_once_and_a_path_is_a_path(
    server: Server, tmp_path: Path
) -> None:
    named = load_named("LaMP-4", tmp_path / "kept", base_url=server.url)
    assert named.digest == load(tmp_path / "kept" / "lamp-4").digest
    server.requests.clear()
    assert load_named("lamp-4", tmp_path / "kept", base_url=server.url).digest == named.digest
    assert (
        load_named(
            str(tmp_path / "kept" / "lamp-4"), tmp_path / "other", base_url=server.url
        ).digest
        == named.digest
    )
    assert server.requests == []
    assert not (tmp_path / "other").exists()


def test_files_that_are_there_are_not_asked_for_again(server: Server, tmp_path: Path) -> None:
    get(server, tmp_path / "d")
    server.requests.clear()
    get(server, tmp_path / "d")
    assert server.requests == []


def test_a_cut_transfer_goes_on_where_it_was(server: Server, tmp_path: Path) -> None:
    server.cuts[FIRST] = [100_000, 50_000]
    get(server, tmp_path / "d")
    assert arrived(tmp_path / "d") == WHOLE
    assert [byte_range for path, byte_range in server.requests if path == FIRST] == [
        None,
        "bytes=100000-",
        "bytes=150000-",
    ]


def test_the_next_call_goes_on_too(server: Server, tmp_path: Path) -> None:
    server.cuts[FIRST] = [10_000] * 5
    with pytest.raises(UserFault, match=r"train_questions\.json: .*50000 bytes are kept"):
        get(server, tmp_path / "d")
    server.requests.clear()
    get(server, tmp_path / "d")
    assert server.requests[0] == (FIRST, "bytes=50000-")
    assert arrived(tmp_path / "d") == WHOLE


def test_without_ranges_it_starts_over(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.cuts[FIRST] = [100_000]
    get(server, tmp_path / "d")
    assert arrived(tmp_path / "d") == WHOLE


def test_a_file_that_changed_meanwhile_is_not_glued_together(
    server: Server, tmp_path: Path
) -> None:
    server.cuts[FIRST] = [10_000] * 5
    with pytest.raises(UserFault):
        get(server, tmp_path / "d")
    server.files[FIRST] = server.files[FIRST].replace(b"www", b"vvv")
    server.tag = '"v2"'
    get(server, tmp_path / "d")
    assert arrived(tmp_path / "d") == WHOLE | {"train_questions.json": server.files[FIRST]}


def test_a_server_that_sends_another_range_is_not_believed(server: Server, tmp_path: Path) -> None:
    server.cuts[FIRST] = [10_000]
    server.shift = 1
    with pytest.raises(UserFault, match="another range"):
        get(server, tmp_path / "d")


def test_a_part_that_is_too_long_is_thrown_away(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "train_questions.json.part").write_bytes(b"x" * 10**6)
    (folder / "train_questions.json.tag").write_text('"v1"', encoding="utf-8")
    get(server, folder)
    assert arrived(folder) == WHOLE


def test_fewer_bytes_than_announced_are_no_file(server: Server, tmp_path: Path) -> None:
    server.add_to_length = 7
    with pytest.raises(UserFault, match=r"train_questions\.json"):
        get(server, tmp_path / "d")
    assert "train_questions.json" not in arrived(tmp_path / "d")


def test_a_busy_server_is_asked_again_a_missing_page_is_not(server: Server, tmp_path: Path) -> None:
    server.status[FIRST] = [503, 429]
    get(server, tmp_path / "d")
    assert arrived(tmp_path / "d") == WHOLE
    server.requests.clear()
    del server.files[FIRST]
    with pytest.raises(UserFault, match="HTTP 404"):
        get(server, tmp_path / "e")
    assert server.requests == [(FIRST, None)]


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        (FIRST, lambda content: b"<html>gone</html>", "no LaMP file"),
        (FIRST, lambda content: content[:-1], "no LaMP file"),
        (FIRST, lambda content: content.replace(b'"train7"', b'"train7x"'), "do not fit"),
        ("/LaMP_4/dev/dev_outputs.json", lambda content: b"[]", "no LaMP file"),
        (
            "/LaMP_4/dev/dev_outputs.json",
            lambda content: json.dumps({"task": "LaMP_4", "golds": []}).encode(),
            "do not fit",
        ),
    ],
)
def test_a_page_that_is_no_data_is_removed(
    server: Server, tmp_path: Path, path: str, change: Callable[[bytes], bytes], message: str
) -> None:
    server.files[path] = change(FILES[path])
    with pytest.raises(DataError, match=message):
        get(server, tmp_path / "d")
    assert path.rpartition("/")[2] not in arrived(tmp_path / "d")
    server.files[path] = FILES[path]
    get(server, tmp_path / "d")
    assert arrived(tmp_path / "d") == WHOLE


def test_the_command_says_where_the_files_are(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        run(
            [
                "data",
                "get",
                "lamp-4",
                "--out",
                str(tmp_path / "d"),
                "--base-url",
                server.url,
                "--json",
            ]
        )
        == 0
    )
    output = json.loads(capsys.readouterr().out)
    assert {Path(entry["file"]).name: entry["bytes"] for entry in output["files"]} == {
        name: len(content) for name, content in WHOLE.items()
    }


def test_without_network_it_ends_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: list[object]
) -> None:
    code = run(["data", "get", "lamp-3", "--split", "time", "--out", str(tmp_path / "d")])
    error = capsys.readouterr().err
    assert code == 2  # the user can mend it: connect, or --base-url
    assert error.count("\n") == 1
    assert "ciir.cs.umass.edu" in error
    refused.clear()


def test_an_unknown_name_is_the_users_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["data", "get", "lamp-6", "--out", str(tmp_path)]) == 2
    assert "lamp-2n" in capsys.readouterr().err
