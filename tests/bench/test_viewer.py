"""The run viewer's page holds the samples of runs, and no text of theirs can become markup; in the
browser it filters, compares, and is used by keyboard. The browser tests need Chromium and
playwright.
"""

import json
import re
from base64 import b64encode
from collections.abc import Iterator, Mapping
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from view_page import browser, made_run

from hydra_llm.bench.report import viewer
from hydra_llm.bench.report.tables import open_run
from hydra_llm.bench.runlog import RunLog, Sample
from hydra_llm.cli.main import run
from hydra_llm.tasks.base import Task

STARS = Task("stars", "rating", "How many stars? {input}", ("1", "2", "3", "4", "5"))
MANIFEST = {"data": "d", "task": STARS.to_json(), "llm": {"model": "m"}}
HOSTILE = (
    "</script><script>window.taken = 1</script>",
    "<img src=x onerror='window.taken = 2'>",
    "<!--<script>",
    "${window.taken} $index &lt;b&gt; \u2028 \ud800",
)
PICKED = {"text": "I say 4", "answer": "4", "votes": 3, "score": 0.25, "probability": 0.5}
DETAILS: Mapping[str, Any] = {
    "input": "a film about the sea",
    "time": "",
    "records": [
        {"id": "r1", "input": "a film about ships", "output": "5", "time": "2024"}
        | {"score": 7.5, "rank": 0, "usefulness": 0.125}
    ],
    "shown": 1,
    "messages": [{"role": "user", "content": "How many stars?\na film about the sea"}],
    "candidates": [PICKED | {"greedy": True, "llm_probability": None}],
    "chosen": 0,
    "abstained": False,
}


def write(folder: Path, answers: Mapping[str, str], text: str = "") -> Path:
    """A run of one user; method → the answers to q0, q1, ..., whose gold answer is 3; `text` is
    what users and the LLM wrote.
    """
    log = RunLog(folder, MANIFEST)
    details = json.loads(json.dumps(DETAILS).replace("sea", "SEA"))
    if text:
        details["input"] = details["messages"][0]["content"] = text
        details["candidates"][0] |= {"text": text}
        details["records"][0] |= {"input": text, "output": text}
    for method, given in answers.items():
        for place, answer in enumerate(given):
            error = "HTTP 500" if answer == "!" else ""
            own = None if answer in "!?" else answer
            log.add(Sample(method, "ada", f"q{place}", "3", own, error, calls=1), details)
    return folder


def blocks(page: str) -> dict[str, Any]:
    """The JSON blocks of a page, as a browser finds them: id → content."""

    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.found: dict[str, Any] = {}
            self.inside = ""

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag == "script":
                self.inside = dict(attrs).get("id") or ""

        def handle_data(self, data: str) -> None:
            if self.inside:
                self.found[self.inside] = json.loads(data)
                self.inside = ""

    reader = Reader()
    reader.feed(page)
    return reader.found


def restored(value: Any, texts: list[str]) -> Any:
    if isinstance(value, dict):
        if "$" in value:
            return texts[value["$"]]
        return {name: restored(own, texts) for name, own in value.items()}
    return [restored(own, texts) for own in value] if isinstance(value, list) else value


def test_page_holds_index_and_details(tmp_path: Path) -> None:
    found = blocks(viewer.page([open_run(write(tmp_path / "run", {"rag": "3!", "hydra": "4?"}))]))
    assert list(found) == ["index", "q0", "q1"]
    index = found["index"]
    assert index["methods"] == ["rag", "hydra"]
    assert index["queries"][0] == [0, "q0", "a film about the SEA", "3"]
    # run, method, query, seed, gain, state, answer
    assert index["samples"] == [
        [0, 0, 0, 0, 1.0, "", "3"],
        [0, 1, 0, 0, 0.75, "", "4"],
        [0, 0, 1, 0, None, "failed", ""],
        [0, 1, 1, 0, 0.0, "unparsable", ""],
    ]
    block = found["q0"]
    own = restored(block, block["texts"])["samples"][1]
    assert own["place"] == 1
    assert own["details"]["candidates"] == [DETAILS["candidates"][0] | {"gain": 0.75}]
    assert own["details"]["records"] == DETAILS["records"]
    assert own["details"]["messages"][0]["content"].endswith("about the SEA")


def test_hostile_texts_are_data(tmp_path: Path) -> None:
    for place, text in enumerate(HOSTILE):
        folder = write(tmp_path / str(place), {"hydra": "3"}, text)
        page = viewer.page([open_run(folder)])
        found = blocks(page)
        assert found["index"]["queries"][0][2] == text
        block = restored(found["q0"], found["q0"]["texts"])
        assert block["samples"][0]["details"]["records"][0]["output"] == text
        assert page.count("<script") == 3  # index, program, one query
        assert "<img" not in page


def test_only_the_page_s_own_script_and_style_run(tmp_path: Path) -> None:
    page = viewer.page([open_run(write(tmp_path / "run", {"rag": "3"}))])
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy is not None
    script = page.split("<script>")[1].split("</script>")[0]
    style = page.split("<style>")[1].split("</style>")[0]
    for kind, text in (("script", script), ("style", style)):
        digest = b64encode(sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy[1]
    assert policy[1].startswith("default-src 'none'")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|fetch", script)
    assert not re.search(r"https?:|url\(|@import", page)


def test_two_runs_start_with_what_differs(tmp_path: Path) -> None:
    runs = [
        open_run(write(tmp_path / name / "run", {"rag": "34", "hydra": answers}))
        for name, answers in (("a", "33"), ("b", "34"))
    ]
    index = blocks(viewer.page(runs))["index"]
    assert [own["name"] for own in index["runs"]] == ["1 run", "2 run"]
    assert index["first"] == ["1/1", "0/1"]
    assert len(index["queries"]) == 2


def test_runs_of_other_data_and_unknown_methods_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "run", {"rag": "3"})
    other = RunLog(tmp_path / "other", {**MANIFEST, "data": "e"})
    other.add(Sample("rag", "ada", "q0", "3", "3"))
    page = ["--out", str(tmp_path / "view.html")]
    assert run(["bench", "view", str(folder), str(tmp_path / "other"), *page]) == 2
    assert "answer other data sets: view them one by one" in capsys.readouterr().err
    assert run(["bench", "view", str(folder), "--methods", "rag,hydra@4,8", *page]) == 2
    assert "no run has a method 'hydra@4,8': take some of rag" in capsys.readouterr().err
    assert not (tmp_path / "view.html").exists()


def test_methods_and_limit_make_a_smaller_page(tmp_path: Path) -> None:
    opened = open_run(write(tmp_path / "run", {"rag": "333", "hydra": "444"}))
    found = blocks(viewer.page([opened], ["hydra"], 2))
    assert found["index"]["methods"] == ["hydra"]
    assert list(found) == ["index", "q0", "q1"]


def test_a_run_without_details_shows_answers(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run", MANIFEST)
    log.add(Sample("rag", "ada", "q0", "3", "4", choice={"choice_accuracy": 0.5}))
    (own,) = blocks(viewer.page([open_run(tmp_path / "run")]))["q0"]["samples"]
    assert (own["answer"], own["gain"], "details" in own) == ("4", 0.5, False)


# ---- in the browser


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if browser() is None:
        pytest.skip("no Chromium is installed")
    with sync.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=browser(), args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def tab(chromium: Any) -> Iterator[Any]:
    """A tab of which every fault, and every request but that of the page itself, fails the test."""
    page, faults = chromium.new_page(viewport={"width": 1200, "height": 800}), list[str]()
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text))
    page.on("request", lambda own: own.is_navigation_request() or faults.append(own.url))
    yield page
    page.close()
    assert not faults


def view(tab: Any, folder: Path, *runs: Path) -> None:
    file = folder / "view.html"
    file.write_text(viewer.page([open_run(own) for own in runs]), encoding="utf-8")
    tab.goto(file.as_uri())


def listed(tab: Any) -> list[str]:
    return [row.strip() for row in tab.locator(".row .top").all_inner_texts()]


@pytest.mark.slow
def test_five_thousand_samples_are_a_short_list_of_rows(tab: Any, tmp_path: Path) -> None:
    view(tab, tmp_path, made_run(tmp_path / "run", 5000))
    assert tab.locator("#count").inner_text().startswith("5,000 of 5,000 samples")
    assert 0 < tab.locator(".row").count() < 40
    tab.focus("#list")
    tab.keyboard.press("End")
    last = tab.locator(".row[aria-selected=true]")
    assert last.get_attribute("aria-posinset") == "5000"
    assert tab.locator("#detail h2").inner_text() == "User user99, query q499"
    tab.select_option("#method", label="hydra@4,8")
    tab.select_option("#user", label="user7")
    assert tab.locator("#count").inner_text().startswith("5 of 500 samples")
    tab.keyboard.press("Escape")
    tab.keyboard.press("/")
    tab.keyboard.type("q37")
    tab.locator("#count", has_text="1 of 500 samples").wait_for()
    assert listed(tab) == ["user7 · q37 · hydra@4,8"]


@pytest.mark.slow
def test_a_sample_shows_prompt_candidates_records_and_gold(tab: Any, tmp_path: Path) -> None:
    view(tab, tmp_path, write(tmp_path / "run", {"rag": "3!", "hydra": "4?"}))
    tab.select_option("#method", label="hydra")
    tab.focus("#list")
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("Enter")
    shown = tab.locator("#detail").inner_text()
    assert tab.locator("#detail").evaluate("node => node === document.activeElement")
    for text in ("a film about the SEA", "How many stars?", "a film about ships", "I say 4"):
        assert text in tab.locator("#detail").text_content()
    assert re.search(r"gold\s+3", shown)
    assert re.search(r"✓\s+4\s+3\s+yes\s+0\.250\s+0\.500\s+0\.750", shown)  # the candidate
    assert re.search(r"yes\s+a film about ships\s+5\s+7\.500\s+1\s+0\.125", shown)  # the record
    tab.get_by_role("button", name="rag").click()  # the other method's answer to the same query
    assert tab.locator("#detail section h3").inner_text() == "rag"
    tab.keyboard.press("Escape")
    tab.keyboard.press("j")
    assert "HTTP 500" in tab.locator("#detail section dl").inner_text()


@pytest.mark.slow
def test_outcomes_are_filtered(tab: Any, tmp_path: Path) -> None:
    view(tab, tmp_path, write(tmp_path / "run", {"rag": "345!?"}))
    for outcome, queries in (
        ("gain 1", ["q0"]),
        ("gain between 0 and 1", ["q1", "q2"]),
        ("gain 0", ["q4"]),
        ("not readable", ["q4"]),
        ("failed", ["q3"]),
    ):
        tab.select_option("#outcome", label=outcome)
        assert listed(tab) == [f"ada · {query} · rag" for query in queries]


@pytest.mark.slow
def test_two_runs_show_the_queries_whose_answers_differ(tab: Any, tmp_path: Path) -> None:
    first = write(tmp_path / "first", {"hydra": "3345"})
    view(tab, tmp_path, first, write(tmp_path / "second", {"hydra": "3435"}))
    assert listed(tab) == ["ada · q1 · second: hydra", "ada · q2 · second: hydra"]
    tab.select_option("#difference", label="better than the other")
    assert listed(tab) == ["ada · q2 · second: hydra"]
    tab.locator(".row").first.click()
    assert tab.locator("#detail section h3").all_inner_texts() == ["second: hydra", "first: hydra"]


@pytest.mark.slow
@pytest.mark.parametrize("text", HOSTILE[:3])
def test_hostile_texts_are_shown_and_not_run(tab: Any, tmp_path: Path, text: str) -> None:
    view(tab, tmp_path, write(tmp_path / "run", {"hydra": "3"}, text))
    tab.locator(".row").first.click()
    assert tab.locator("#detail dd").first.inner_text() == text
    assert tab.locator("#detail .text").all_text_contents() == [text, text]  # as written, prompt
    assert tab.evaluate("window.taken") is None
    assert tab.locator("img").count() == 0


@pytest.mark.slow
def test_phone_and_dark(tab: Any, tmp_path: Path) -> None:
    view(tab, tmp_path, made_run(tmp_path / "run", 50))
    tab.set_viewport_size({"width": 360, "height": 640})
    assert not tab.locator("#detail").is_visible()
    tab.locator(".row").first.click()
    assert not tab.locator("#list").is_visible()
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    tab.get_by_role("button", name="Back to the list").click()
    assert tab.locator("#list").is_visible()
    colour = "getComputedStyle(document.body).backgroundColor"
    assert tab.evaluate(colour) == "rgb(255, 255, 255)"
    tab.emulate_media(color_scheme="dark")
    assert tab.evaluate(colour) == "rgb(22, 22, 22)"
