"""Pictures of records and requests: described once by a vision endpoint, found and scored as text,
deleted with the record; what is no picture, too large or behind a private address is refused.
"""

import base64
import gzip
import json
import struct
import threading
import zlib
from collections.abc import AsyncIterator, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest

from hydra_llm.cli.main import run
from hydra_llm.errors import SettingsError
from hydra_llm.gateway.picture_cache import FILE, keep, kept
from hydra_llm.gateway.pictures import (
    PictureError,
    Pictures,
    as_search_text,
    is_public,
    kind_of,
    open_pictures,
)
from hydra_llm.gateway.settings import ServeSettings
from hydra_llm.llm.concurrency import run_sync
from hydra_llm.store.store import Store
from hydra_llm.types import Record

from .conftest import Scripted, World, running

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def png(red: int, green: int, blue: int) -> bytes:
    """A real picture of 2 × 2 pixels of a colour."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    rows = (b"\0" + bytes((red, green, blue)) * 2) * 2
    head = struct.pack(">IIBBBBB", 2, 2, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


RED, BLUE = png(255, 0, 0), png(0, 0, 255)


def data_url(raw: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(raw).decode()}"


def picture(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def colour_of(raw: bytes) -> str:
    """What the pixels of such a picture say."""
    place = raw.index(b"IDAT")
    size = struct.unpack(">I", raw[place - 4 : place])[0]
    pixel = zlib.decompress(raw[place + 4 : place + 4 + size])[1:4]
    return {b"\xff\0\0": "a red lighthouse", b"\0\0\xff": "a blue whale"}[bytes(pixel)]


class Vision(ThreadingHTTPServer):
    """A vision endpoint that reads the picture it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.seen: list[bytes] = []
        self.broken = False

    @property
    def spec(self) -> str:
        return f"openai:eye@http://127.0.0.1:{self.server_port}/v1"


class Answering(BaseHTTPRequestHandler):
    server: Vision

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text, shown = body["messages"][0]["content"]
        assert (body["model"], text["type"]) == ("eye", "text")
        raw = base64.b64decode(shown["image_url"]["url"].partition(",")[2])
        self.server.seen.append(raw)
        message = {"role": "assistant", "content": f"It shows\n{colour_of(raw)}."}
        answer: Any = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
        status = 500 if self.server.broken else 200
        content = json.dumps({"error": {"message": "out of order"}} if status > 200 else answer)
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def vision() -> Iterator[Vision]:
    with Vision() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HYDRA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


async def add(world: World, content: Any, id: str = "p", user: str = "ada") -> httpx2.Response:
    record = {"id": id, "input": content, "output": "calm"}
    return await world.http.post(f"/v1/users/{user}/records", json={"records": [record]})


async def add_others(world: World) -> None:
    """Records that share no word with the pictures: BM25 needs some, else each word is common."""
    for place, text in enumerate(("red bicycle", "old shoe", "warm soup", "tall tree")):
        assert (await add(world, text, f"other{place}")).status_code == 200


async def inputs(world: World) -> list[str]:
    shown = (await world.http.get("/v1/users/ada/records")).json()["data"]
    return [own["input"] for own in shown]


def rows(cache: Path) -> bytes:
    """All bytes of the cache's files."""
    return b"".join(file.read_bytes() for file in sorted(cache.glob(f"{FILE}*")))


async def test_a_records_picture_is_described_once_and_found(
    store: Store, vision: Vision, cache: Path
) -> None:
    parts = [{"type": "text", "text": "At the coast"}, picture(data_url(RED))]
    async with running(store, vision=vision.spec) as world:
        assert (await add(world, parts)).json()["added"] == 1
        assert (await add(world, [picture(data_url(BLUE))], "q")).json()["added"] == 1
        line = "[picture] It shows a red lighthouse"
        assert await inputs(world) == [f"At the coast\n{line}", "[picture] It shows a blue whale"]
        await add_others(world)
        assert (await add(world, parts)).json()["unchanged"] == 1
        assert vision.seen == [RED, BLUE]  # and not again
        found = await world.http.post("/v1/users/ada/search", json={"query": "whale", "limit": 1})
        assert [own["id"] for own in found.json()["data"]] == ["q"]
        await world.ask("tell me of the lighthouse", personalization={"k": 1})
        assert "red lighthouse" in str(world.upstream.bodies[-1]["messages"])


async def test_descriptions_go_with_the_record_and_with_the_user(
    store: Store, vision: Vision, cache: Path
) -> None:
    async with running(store, vision=vision.spec) as world:
        await add(world, [picture(data_url(RED))])
        await add(world, [picture(data_url(BLUE))], "q")
        assert b"red lighthouse" in rows(cache)
        await world.http.delete("/v1/users/ada/records/p")
        assert b"red lighthouse" not in rows(cache)
        assert b"blue whale" in rows(cache)
        await world.http.delete("/v1/users/ada")
        assert b"blue whale" not in rows(cache)
        await add(world, [picture(data_url(RED))])
        assert vision.seen == [RED, BLUE, RED]


def test_the_command_deletes_descriptions_too(store: Store, cache: Path) -> None:
    with store.change("ada", create=True) as change:
        change.add([Record("ada", "p", "At the coast\n[picture] a red lighthouse", "calm")])
    for text in ("a red lighthouse", "a blue whale"):
        keep(cache / FILE, text.encode(), text)
    assert run(["users", "delete", "ada", "--store", str(store.url)]) == 0
    assert kept(cache / FILE, b"a red lighthouse") is None
    assert kept(cache / FILE, b"a blue whale") == "a blue whale"


async def test_pictures_of_requests_reach_the_upstream(
    store: Store, vision: Vision, cache: Path
) -> None:
    messages = [{"role": "user", "content": [picture(data_url(BLUE))]}]
    for asked in (False, True):
        async with running(store, vision=vision.spec, vision_requests=asked) as world:
            await add(world, "a whale in the bay", "w")
            await add_others(world)
            body = {"model": "m", "user": "ada", "messages": messages, "personalization": {"k": 1}}
            answer = await world.http.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200
            reason = answer.headers["x-hydra-personalized"]
            assert reason == ("true" if asked else "false; reason=no-question")
            sent = world.upstream.bodies[-1]["messages"]
            assert messages[0]["content"][0] in sent[-1]["content"]
            assert ("a whale in the bay" in str(sent)) == asked
    assert vision.seen == [BLUE]
    assert b"whale" not in rows(cache)  # of requests nothing is kept


async def test_a_broken_endpoint_costs_no_answer_and_no_record(
    store: Store, vision: Vision, cache: Path
) -> None:
    async with running(store, vision=vision.spec, vision_requests=True) as world:
        await add(world, "a whale in the bay", "w")
        vision.broken = True
        failed = await add(world, [picture(data_url(RED))])
        assert failed.status_code == 502
        assert "records[0].input: the vision endpoint failed" in failed.json()["error"]["message"]
        assert await inputs(world) == ["a whale in the bay"]
        parts = [{"type": "text", "text": "a whale?"}, picture(data_url(BLUE))]
        body = {"model": "m", "user": "ada", "messages": [{"role": "user", "content": parts}]}
        answer = await world.http.post("/v1/chat/completions", json=body)
        assert answer.headers["x-hydra-personalized"] == "true"
        metrics = (await world.http.get("/metrics")).text
        assert 'hydra_failures_total{part="vision"} 1.0' in metrics


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([picture("data:image/png;base64,aGVsbG8=")], "the picture is none: send PNG, JPEG"),
        ([picture("data:image/png;base64,@@@")], "is not valid base64"),
        ([picture(data_url(RED + bytes(2000)))], "has more than 1500 bytes"),
        ([picture("http://127.0.0.1/a.png")], "is not fetched: send it as a data: URL, or list"),
        ([picture("file:///etc/passwd")], "is not fetched"),
        ([picture("http://localhost/a.png")], "the picture's host localhost has a private address"),
        ([{"type": "image_url"}], "a part of type image_url has no image_url.url"),
        ([{"type": "input_audio"}], "a part is neither"),
    ],
)
async def test_bad_pictures_are_one_line(
    content: Any, said: str, store: Store, vision: Vision, cache: Path
) -> None:
    settings: dict[str, Any] = {"max_picture_bytes": 1500, "vision_hosts": "localhost"}
    async with running(store, vision=vision.spec, **settings) as world:
        answer = await add(world, content)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, "records[0].input")
        assert error["message"].startswith("records[0].input: ")
        assert said in error["message"]
        assert "\n" not in error["message"]
        assert (await world.http.get("/v1/users/ada/records")).status_code == 404
    assert vision.seen == []


async def test_nothing_stays_of_pictures_whose_record_is_not_added(
    store: Store, vision: Vision, cache: Path
) -> None:
    """No deletion would find it: it stands in no record."""
    whole = {"id": "p", "input": [picture(data_url(RED))], "output": "calm"}
    broken = {"id": "q", "input": [picture("data:image/png;base64,aGVsbG8=")], "output": "calm"}
    long = {"id": "q", "input": "x" * 2000, "output": "calm"}
    both = {**whole, "input": [*whole["input"], *broken["input"]]}
    async with running(store, vision=vision.spec, max_text=1000, max_records=1) as world:
        for records, status in (([whole, broken], 400), ([both], 400), ([whole, long], 400)):
            answer = await world.http.post("/v1/users/ada/records", json={"records": records})
            assert answer.status_code == status
            assert b"red lighthouse" not in rows(cache)
        await add(world, "a text", "other")
        assert (await add(world, whole["input"])).status_code == 413
        assert b"red lighthouse" not in rows(cache)


async def test_descriptions_are_limited_by_number_and_spend(
    store: Store, vision: Vision, cache: Path
) -> None:
    limits = {"key_limits": "1 tokens/day", "user_limits": "1 tokens/day"}
    async with running(store, vision=vision.spec, **limits) as world:
        many = await add(world, [picture(data_url(RED))] * 17)
        assert "there are 17 pictures: send at most 16" in many.json()["error"]["message"]
        assert (await add(world, [picture(data_url(RED))])).status_code == 200
        assert (await add(world, [picture(data_url(BLUE))], "q")).status_code == 429
        assert (await add(world, "a text", "r")).status_code == 200
    assert vision.seen == [RED]


async def test_in_private_mode_no_endpoint_sees_a_records_picture(
    store: Store, vision: Vision, cache: Path, bundles: dict[str, Path]
) -> None:
    async with running(store, bundles["tags"], vision=vision.spec, private=True) as world:
        answer = await add(world, [picture(data_url(RED))])
        assert answer.status_code == 400
        assert "private mode shows no record" in answer.json()["error"]["message"]
    assert vision.seen == []


async def test_without_vision_records_are_texts_alone(store: Store) -> None:
    async with running(store) as world:
        answer = await add(world, [picture(data_url(RED))])
        assert answer.status_code == 400
        assert "give this server the setting `vision`" in answer.json()["error"]["message"]


# ---- fetching


def fetching(tmp_path: Path, addresses: list[str], answer: httpx2.Response) -> tuple[Pictures, Any]:
    asked: list[httpx2.Request] = []

    def reply(request: httpx2.Request) -> httpx2.Response:
        asked.append(request)
        return answer

    async def resolve(host: str, port: int) -> list[str]:
        return addresses

    eye = Scripted(rule=lambda body, index: "a red square")
    settings = ServeSettings(vision_hosts=("pictures.example",), max_picture_bytes=1024)
    transport = httpx2.MockTransport(reply)
    return Pictures(eye, "eye", settings, tmp_path / FILE, transport, resolve), asked


def fetch(pictures: Pictures, url: str) -> str:
    return run_sync(partial(pictures.in_words, "here", [picture(url)]))


def test_the_address_that_was_checked_is_asked(tmp_path: Path) -> None:
    pictures, asked = fetching(
        tmp_path, ["93.184.216.34"], httpx2.Response(200, stream=httpx2.ByteStream(RED))
    )
    assert fetch(pictures, "https://pictures.example/a.png?x=1") == "[picture] a red square"
    (request,) = asked
    assert str(request.url) == "https://93.184.216.34/a.png?x=1"
    assert request.headers["host"] == "pictures.example"
    assert request.extensions["sni_hostname"] == "pictures.example"


@pytest.mark.parametrize(
    ("url", "addresses", "answer", "said"),
    [
        (
            "https://pictures.example/a",
            ["93.184.216.34", "10.0.0.1"],
            (200, RED),
            "private address",
        ),
        ("https://pictures.example/a", [], (200, RED), "has no address"),
        ("https://pictures.example/a", ["93.184.216.34"], (302, b""), "redirects are not followed"),
        ("https://pictures.example/a", ["93.184.216.34"], (200, bytes(5000)), "more than 1024"),
        ("https://pictures.example/a", ["93.184.216.34"], (200, b"<html>"), "the picture is none"),
        ("https://pictures.example:8/a", ["93.184.216.34"], (200, RED), "is not fetched"),
        ("https://me@other.example/a", ["93.184.216.34"], (200, RED), "is not fetched"),
        ("https://[::1/a", ["93.184.216.34"], (200, RED), "is not fetched"),
    ],
)
def test_what_is_not_fetched(
    url: str, addresses: list[str], answer: tuple[int, bytes], said: str, tmp_path: Path
) -> None:
    response = httpx2.Response(
        answer[0], stream=httpx2.ByteStream(answer[1]), headers={"location": "http://10.0.0.1/"}
    )
    pictures, asked = fetching(tmp_path, addresses, response)
    with pytest.raises(PictureError, match=said):
        fetch(pictures, url)
    assert len(asked) <= 1


def test_what_a_host_sends_is_not_unpacked(tmp_path: Path) -> None:
    """A megabyte may become a gigabyte."""
    packed = gzip.compress(RED)
    answer = httpx2.Response(
        200, stream=httpx2.ByteStream(packed), headers={"content-encoding": "gzip"}
    )
    pictures, asked = fetching(tmp_path, ["93.184.216.34"], answer)
    with pytest.raises(PictureError, match="the picture is none"):
        fetch(pictures, "https://pictures.example/a")
    assert asked[0].headers["accept-encoding"] == "identity"


def test_a_host_has_only_so_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a whole: a byte now and then is no progress."""
    monkeypatch.setattr("hydra_llm.gateway.pictures.FETCH_SECONDS", 0.05)

    class Drops(httpx2.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            while True:
                yield b""
                await anyio.sleep(0.01)

    pictures, _ = fetching(tmp_path, ["93.184.216.34"], httpx2.Response(200, stream=Drops()))
    with pytest.raises(PictureError, match="was not there within"):
        fetch(pictures, "https://pictures.example/a")


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.9.9", "169.254.169.254", "0.0.0.0"),
        *("100.64.0.1", "224.0.0.1", "::1", "fe80::1%eth0", "fd00::1", "::ffff:10.0.0.1"),
        *("64:ff9b::a00:1", "2002:a00:1::1", "64:ff9b:1::a00:1", "fec0::1"),
        *("::127.0.0.1", "::ffff:0:127.0.0.1"),
    ],
)
def test_private_addresses(address: str) -> None:
    assert not is_public(address)
    assert is_public("93.184.216.34")
    assert is_public("2606:2800:220:1:248:1893:25c8:1946")


def test_kinds_of_pictures() -> None:
    assert kind_of(RED) == "png"
    assert kind_of(b"\xff\xd8\xff\xe0") == "jpeg"
    assert kind_of(b"RIFF\x10\0\0\0WEBPVP8 ") == "webp"
    assert kind_of(b"RIFF\x10\0\0\0WAVEfmt ") == ""
    assert kind_of(b"<svg/>") == ""


def test_a_description_has_words_that_can_be_found() -> None:
    said = 'A red\nlighthouse, at 3.5 m. The sign says: "Stop!" It is calm.'
    found = as_search_text(said)
    assert found == 'A red lighthouse at 3.5 m - The sign says - "Stop!" It is calm'
    assert len(as_search_text("word " * 1000)) <= 1000


def test_the_setting_names_an_endpoint(tmp_path: Path) -> None:
    unused: Any = None
    assert open_pictures(ServeSettings(), tmp_path, unused, unused) is None
    with pytest.raises(SettingsError, match="is no vision endpoint: write openai:MODEL"):
        open_pictures(ServeSettings(vision="gguf:eye"), tmp_path, unused, unused)
    with pytest.raises(SettingsError, match="write a host as"):
        ServeSettings.checked({"vision_hosts": "https://pictures.example/"})
