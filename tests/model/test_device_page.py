"""examples/on-device in a real browser: its scores are the device's, and no record leaves the page.

Needs Chromium, playwright and the page's packages, which `make device-page` installs.
"""

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from view_page import browser

from hydra_llm.bundle import Bundle
from hydra_llm.device import Device
from hydra_llm.export import export_onnx
from hydra_llm.model.interactions import LabelBilinear
from hydra_llm.types import Candidate
from tests.test_examples import EXAMPLES, module

from .test_device import STARS, TEXTS, bundle_of

pytestmark = pytest.mark.slow
QUESTIONS = [
    TEXTS[0],  # of a record, and among the known texts
    TEXTS[55],
    "Old CAFÉ songs,\tslowly\N{EM DASH}new! 5.1 北京 \N{SLIGHTLY SMILING FACE}",
    "the great film of war " * 20,  # longer than the encoder's window
]
WAIT = 120_000.0  # milliseconds, on a busy machine


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if browser() is None:
        pytest.skip("no Chromium is installed")
    if not (EXAMPLES / "on-device" / "node_modules").exists():
        pytest.skip("the page's packages are not installed: make device-page")
    with sync.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=browser(), args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def phone(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    interaction = LabelBilinear(16, 3, 6, codes=2, texts=2, own_rank=4)
    bundle_of(STARS, tiny_folder, interaction, "linear").save(folder / "bundle")
    export_onnx(Bundle.load(folder / "bundle", cache=folder), folder / "phone", "ada")
    return folder / "phone"


@pytest.fixture
def address(phone: Path) -> Iterator[str]:
    server = module("on-device/server").make_server(phone, "fake:rule=labels")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_page_picks_as_the_device_does(chromium: Any, phone: Path, address: str) -> None:
    page, sent, faults = chromium.new_page(), [], list[str]()
    page.set_default_timeout(WAIT)
    page.on("request", lambda own: sent.append((own.url, own.post_data or "")))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
    page.goto(address)
    page.set_input_files("#user", phone / "user.json")
    device = Device.load(phone)
    for question in QUESTIONS:
        page.fill("#question", question)
        page.click("button")
        page.locator("#status", has_text=re.compile("picked|failed")).wait_for()
        assert page.text_content("#status").startswith("picked: "), page.text_content("#status")
        found = page.evaluate("window.picked")
        candidates = [Candidate(**own) for own in found["candidates"]]
        ours = device.choose(page.input_value("#question"), candidates)
        scores = [own.score for own in ours.candidates if own.score is not None]
        assert found["scores"] == pytest.approx(scores, abs=2e-3)
        assert found["chosen"] == ours.chosen
    page.close()
    assert not faults
    assert all(url.startswith(address) for url, _ in sent)
    bodies = [json.loads(body) for _, body in sent if body]
    assert [list(body) for body in bodies] == [["input"]] * len(QUESTIONS)
    assert not any("user.json" in url for url, _ in sent)


def test_the_client_picks_what_the_device_picks(phone: Path, address: str) -> None:
    reply = httpx2.post(f"{address}candidates", json={"input": QUESTIONS[1]})
    candidates = [Candidate(**own) for own in reply.json()["candidates"]]
    chosen = Device.load(phone).choose(QUESTIONS[1], candidates)
    picked = module("on-device/pick").pick(phone, QUESTIONS[1], address.rstrip("/"))
    assert picked == candidates[chosen.chosen].answer
    assert httpx2.post(f"{address}candidates", json=["no"]).status_code == 400
    # a page of another origin can send this without asking the server first
    assert httpx2.post(f"{address}candidates", content=b'{"input": "x"}').status_code == 400
    for path in ("phone/user.json", "npm/../server.py", "phone/../bundle/config.json"):
        assert httpx2.get(address + path).status_code == 404
