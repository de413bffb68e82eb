"""The dashboard in a real browser: every page and action, accessibility by axe-core, texts that
would be scripts, other sites. Needs Chromium, playwright and axe-playwright-python.

    DASHBOARD_IMAGES=docs/images/dashboard python -m pytest tests/gateway/test_dashboard_browser.py

also writes the screenshots of docs/dashboard.md.
"""

import os
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import sqlalchemy as sa
import uvicorn
from view_page import browser

from hydra_llm.gateway.app import make_app
from hydra_llm.gateway.auth import Access, make_key
from hydra_llm.gateway.settings import ServeSettings
from hydra_llm.store import schema
from hydra_llm.store.store import Store
from hydra_llm.types import Record
from tests.waiting import FOREVER, until

from .conftest import Scripted
from .dashboard import add_figures, answered, fill

pytestmark = pytest.mark.slow
HOSTILE = (
    "<script>window.taken = 1</script>",
    "\"'><img src=x onerror='window.taken = 2'>",
    "</textarea></title><svg onload='window.taken = 3'>",
    "' autofocus onfocus='window.taken = 4' x='",
    "{{ 7 * 7 }} {% raw %} ${7 * 7} &lt;b&gt;",
    "javascript:window.taken=5",
)
OF_USER = ("/user", "/records", "/records?q=storm", "/records/new", "/answers", "/delete")
ONE = ("/records/edit?id=r1", "/records/delete?id=r1", "/answer?id=req_ada0")
OF_ADMIN = (*("/activity", "/users", "/users?q=no", "/spend", "/keys"), *("/jobs", "/bundle"))
HERE = "http://127.0.0.1:"
WAIT = 250_000.0  # milliseconds, for what never comes
IN_DOCS = ("activity", "answer-dark", "records", "spend", "user", "users-phone-dark")
IMAGES = os.environ.get("DASHBOARD_IMAGES")


@dataclass
class Site:
    """A dashboard that is up."""

    url: str
    store: Store
    keys: dict[str, str]


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """Serve an application on a free port of loopback, in a thread."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(FOREVER)
        listening.close()


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A store in which much has happened, for each test to copy; and its keys' secrets."""
    file = tmp_path_factory.mktemp("filled") / "store.db"
    store = Store(f"sqlite:///{file}")
    keys = fill(store, users=40)
    add_figures(store)
    store.truncate_log()
    store.close()
    return file, keys


@pytest.fixture
def open_site(
    filled: tuple[Path, dict[str, str]], tmp_path: Path
) -> Callable[[Path | None], AbstractContextManager[Site]]:
    @contextmanager
    def opened(bundle: Path | None = None) -> Iterator[Site]:
        file = shutil.copy(filled[0], tmp_path / "store.db")
        store, settings = Store(f"sqlite:///{file}"), ServeSettings(dashboard=True, gate="off")
        app = make_app(store, Scripted(), settings, bundle=bundle, access=Access())
        with serving(app) as url:
            yield Site(f"{url}/ui", store, dict(filled[1]))
        store.close()

    return opened


@pytest.fixture
def site(open_site: Any) -> Iterator[Site]:
    with open_site() as made:
        yield made


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if browser() is None:
        pytest.skip("no Chromium is installed")
    with sync.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=browser(), args=["--no-sandbox"])
        yield opened
        opened.close()


def shows(tab: Any, what: str, count: int) -> None:
    """Wait until the page has so many of it: a click may return before the next page is there."""
    until(lambda: tab.locator(what).count() == count)


def says(tab: Any, where: str, text: str) -> None:
    """Wait until this text stands there."""
    until(lambda: text in tab.locator(where).inner_text())


@contextmanager
def a_tab(chromium: Any, **options: Any) -> Iterator[Any]:
    """A tab of a browser of its own, of which every script's fault, breach of the policy, and every
    request to elsewhere fails the test.
    """
    context = chromium.new_context(**{"viewport": {"width": 1100, "height": 760}, **options})
    page, faults = context.new_page(), list[str]()
    page.set_default_timeout(WAIT)

    def said(message: Any) -> None:
        if "the server responded with a status of 4" not in message.text:  # as a test wants it
            faults.append(message.text)

    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", said)
    page.on("dialog", lambda dialog: faults.append(dialog.message))
    page.on("request", lambda own: own.url.startswith(HERE) or faults.append(own.url))
    yield page
    context.close()
    assert not faults


@pytest.fixture
def tab(chromium: Any) -> Iterator[Any]:
    with a_tab(chromium) as page:
        yield page


def sign_in(tab: Any, site: Site, name: str) -> None:
    tab.goto(f"{site.url}/sign-in")
    tab.get_by_label("API key").fill(site.keys[name])
    tab.get_by_role("button", name="Sign in").click()
    tab.get_by_role("button", name="Sign out").wait_for()


def picture(tab: Any, folder: Path, name: str) -> None:
    """A screenshot for the documents, or for nobody."""
    place = Path(IMAGES) if IMAGES and name in IN_DOCS else folder
    place.mkdir(parents=True, exist_ok=True)
    tab.screenshot(path=place / f"{name}.png")


def told(tab: Any) -> str:
    return str(tab.locator(".told").inner_text())


def corrected(site: Site) -> str | None:
    """The record that the latest answer to ada has become."""
    id = "feedback:req_ada0"
    record = site.store.some_records("ada", [id]).get(id)
    return record and record.output


# ---- every action


def test_a_user_does_everything(site: Site, chromium: Any, tmp_path: Path) -> None:
    with a_tab(chromium, accept_downloads=True) as tab:
        tab.goto(site.url)
        picture(tab, tmp_path, "sign-in")
        tab.keyboard.type("hk-wrong")  # the field has the focus
        tab.keyboard.press("Enter")
        assert tab.get_by_role("alert").inner_text() == "This key is not valid."
        sign_in(tab, site, "ada")
        assert tab.get_by_role("heading", level=1).inner_text() == "ada"
        picture(tab, tmp_path, "user")

        tab.get_by_role("button", name="Switch off").click()
        assert told(tab) == "Personal answers are off. Nothing was deleted."
        assert site.store.is_off("ada")
        tab.get_by_role("button", name="Switch on").click()
        assert not site.store.is_off("ada")

        tab.get_by_role("link", name="Records", exact=True).click()
        shows(tab, "main li", 20)
        picture(tab, tmp_path, "records")
        tab.get_by_role("link", name="Older records").click()
        tab.get_by_role("link", name="Older records").click()
        shows(tab, "main li", 5)
        tab.get_by_role("link", name="To the newest").click()
        tab.get_by_role("searchbox").fill("whales under the waves 9")
        tab.get_by_role("button", name="Find").click()
        assert "whales under the waves 9" in tab.locator("main li").first.inner_text()

        tab.get_by_role("link", name="Add a record").or_(tab.get_by_text("Show all")).first.click()
        tab.goto(f"{site.url}/records/new")
        tab.get_by_label("Question or situation").fill("tea?\nor coffee")
        tab.get_by_label("Answer").fill("\ntea")
        tab.get_by_role("button", name="Add").click()
        assert told(tab) == "The record was added."
        first = tab.locator("main li").first
        assert "or coffee" in first.inner_text()
        assert site.store.records("ada")[1][-1].output == "\ntea"
        first.get_by_role("link", name="Edit").click()
        assert tab.get_by_label("Answer").input_value() == "\ntea"
        tab.get_by_label("Answer").fill("coffee")
        tab.get_by_role("button", name="Save").click()
        assert told(tab) == "The record was changed."
        tab.locator("main li").first.get_by_role("button", name="Switch off").click()
        assert told(tab) == "The record is off: it is kept, and no answer uses it."
        assert len(site.store.off_records("ada")) == 1
        tab.locator("main li").first.get_by_role("button", name="Switch on").click()
        assert not site.store.off_records("ada")
        tab.locator("main li").first.get_by_role("link", name="Delete").click()
        tab.get_by_role("button", name="Delete").click()
        assert told(tab) == "The record was deleted, and what was learned from it."
        assert len(site.store.records("ada")[1]) == 45

        tab.get_by_role("link", name="Answers", exact=True).click()
        tab.get_by_role("link", name="Why this one").first.click()
        page = tab.locator("main").inner_text()
        assert "Of 3 candidates this one fits the user best" in page
        assert re.search(r"share of this label in records like the question\s+\+0\.42", page)
        picture(tab, tmp_path, "answer")
        tab.get_by_label("odd").check()
        tab.get_by_role("button", name="Take this candidate").click()
        assert told(tab) == "Thank you: your feedback was kept."
        assert corrected(site) == "odd"
        tab.get_by_label("Or write what would have been right").fill("calm, as ever")
        tab.get_by_role("button", name="Save this answer").click()
        assert corrected(site) == "calm, as ever"
        tab.get_by_role("button", name="None was right").click()
        says(tab, "main", "the answer was rejected")
        assert corrected(site) is None

        tab.get_by_role("link", name="About you").click()
        with tab.expect_download() as file:
            tab.get_by_role("link", name="Export everything").click()
        assert '"user": "ada"' in Path(file.value.path()).read_text()
        tab.get_by_role("link", name="Delete everything").click()
        tab.get_by_role("textbox").fill("Ada")
        tab.get_by_role("button", name="Delete everything").click()
        assert "nothing was deleted" in tab.get_by_role("alert").inner_text()
        tab.get_by_role("textbox").fill("ada")
        tab.get_by_role("button", name="Delete everything").click()
        says(tab, "main", "Everything about ada was deleted")
        tab.get_by_role("link", name="Go on").click()
        tab.get_by_label("API key").wait_for()
    assert site.store.state("ada").version is None
    assert site.store.state("bob").version is not None


def test_an_administrator_does_everything(site: Site, chromium: Any, tmp_path: Path) -> None:
    with a_tab(chromium) as tab, a_tab(chromium) as other:
        sign_in(tab, site, "admin")
        assert tab.get_by_role("heading", level=1).inner_text() == "Activity"
        for name in ("24 hours", "30 days", "7 days"):
            tab.get_by_role("link", name=name).click()
            assert tab.locator("svg.chart rect").count() > 20
        picture(tab, tmp_path, "activity")
        tab.get_by_text("As a table").first.click()
        assert tab.locator("details table tbody tr").first.is_visible()

        tab.get_by_role("link", name="Users").click()
        picture(tab, tmp_path, "users")
        tab.get_by_role("link", name="More users").click()
        shows(tab, "tbody tr", 15)
        tab.get_by_role("searchbox").fill("EXAMPLE.ORG")
        tab.get_by_role("button", name="Find").click()
        shows(tab, "tbody tr", 25)
        tab.get_by_role("searchbox").fill("nobody")
        tab.get_by_role("button", name="Find").click()
        says(tab, "main", "No user's id holds “nobody”")
        tab.get_by_role("link", name="Show all").click()
        tab.get_by_role("link", name="bob").click()
        tab.get_by_role("navigation", name="User bob").get_by_role("link", name="Records").click()
        shows(tab, "main li", 20)

        tab.get_by_role("link", name="Spend").click()
        tab.get_by_role("link", name="7 days").click()
        assert tab.get_by_role("region", name="By model").inner_text().count("gpt") == 2
        picture(tab, tmp_path, "spend")
        tab.get_by_label("Id of the user or key").fill("ada")
        tab.get_by_label("What it may spend").fill("a lot")
        tab.get_by_role("button", name="Set").click()
        assert "limits: " in tab.get_by_role("alert").inner_text()
        tab.get_by_label("What it may spend").fill("5/day")
        tab.get_by_role("button", name="Set").click()
        says(tab, "main", "The limit was set")

        tab.get_by_role("link", name="Keys").click()
        tab.get_by_role("button", name="Create").click()
        assert "name the key's users" in tab.get_by_role("alert").inner_text()
        tab.get_by_label("What it is for").fill("a phone")
        tab.get_by_label("Ids of the users").fill("ada\n\nbob")
        tab.get_by_role("button", name="Create").click()
        secret = tab.locator(".secret").inner_text()
        tab.get_by_role("link", name="Back to the keys").click()
        assert secret not in tab.content()
        picture(tab, tmp_path, "keys")
        site.keys["made"] = secret
        sign_in(other, site, "made")
        shows(other, "tbody tr", 2)  # the users of this key
        tab.get_by_role("link", name="Revoke").first.click()
        tab.get_by_role("button", name="Revoke").click()
        assert told(tab) == "The key was revoked."
        other.reload()
        other.get_by_label("API key").wait_for()

        tab.get_by_role("link", name="Jobs").click()
        tab.get_by_role("link", name="Older jobs").click()
        says(tab, "tbody", "the LLM does not answer")
        tab.get_by_role("link", name="Model").click()
        says(tab, "main", "No bundle is in use")
        tab.get_by_role("button", name="Sign out").click()
        assert told(tab) == "You are signed out."
        tab.go_back()
        tab.reload()
        tab.get_by_label("API key").wait_for()


def test_the_model_in_use_has_its_card(
    chromium: Any, tmp_path: Path, bundles: dict[str, Path], open_site: Any
) -> None:
    with open_site(bundles["tags"]) as site, a_tab(chromium) as tab:
        sign_in(tab, site, "admin")
        tab.get_by_role("link", name="Model").click()
        says(tab, "main", "hydra-llm bundle for task tags")
        assert violations(tab) == []
        report = bundles["tags"] / "report.html"
        script = "<script>try { parent.document.cookie } catch (e) { document.title = e.name }"
        report.write_text(f"<!doctype html><title>t</title>{script}</script><p>.6 accuracy")
        try:
            tab.reload()
            tab.get_by_role("link", name="The benchmark's report").click()
            assert tab.title() == "SecurityError"  # a sandbox: it reaches no cookie
        finally:
            report.unlink()
        tab.goto(f"{site.url}/user?user=ada")
        tab.get_by_role("button", name="Learn from all records").click()
        assert told(tab).startswith("Learning has begun")
        (job,) = site.store.latest_jobs(1)
        assert (job.user, job.kind) == ("ada", "fit")


# ---- accessibility


def violations(tab: Any) -> list[str]:
    """What axe-core finds on a page, by its strictest common rules."""
    found = find_spec("axe_playwright_python")
    if found is None or found.origin is None:
        pytest.skip("axe-playwright-python is not installed")
    tab.evaluate(Path(found.origin).with_name("axe.min.js").read_text(encoding="utf-8"))
    tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
    run = "tags => axe.run(document, {runOnly: {type: 'tag', values: tags}})"
    result = tab.evaluate(run, tags)
    return [f"{own['id']}: {own['nodes'][0]['html']}" for own in result["violations"]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_and_a_phone_shows_all(
    site: Site, chromium: Any, scheme: str, tmp_path: Path
) -> None:
    """Every page, on a screen and on a phone: no violation, and no page is wider than the phone."""
    phone, wide = {"width": 360, "height": 740}, {"width": 1100, "height": 760}
    for name in ("ada", "admin"):
        with a_tab(chromium, color_scheme=scheme, viewport=wide) as tab:
            tab.goto(f"{site.url}/sign-in")
            assert violations(tab) == []
            sign_in(tab, site, name)
            revoke = f"/keys/revoke?id={site.keys['two'].split('-')[1]}"
            of_admin = (*OF_ADMIN, revoke) if name == "admin" else ()
            paths = [*OF_USER, *ONE, *of_admin, "/nothing"]
            for path in paths:
                user = "" if path in OF_ADMIN else f"{'&' if '?' in path else '?'}user=ada"
                tab.goto(f"{site.url}{path}{user}")
                assert (path, violations(tab)) == (path, [])
                tab.set_viewport_size(phone)
                assert tab.evaluate("document.documentElement.scrollWidth") <= 360, path
                if name == "admin" and path in ("/activity", "/users"):
                    picture(tab, tmp_path, f"{path[1:]}-phone-{scheme}")
                assert (path, violations(tab)) == (path, [])
                tab.set_viewport_size(wide)
                if scheme == "dark" and path in ("/activity", "/answer?id=req_ada0"):
                    picture(tab, tmp_path, f"{path[1:].partition('?')[0]}-dark")


def test_all_is_reached_by_keyboard(site: Site, tab: Any) -> None:
    """The first stop skips to the content; each stop is seen; forms are sent by Enter."""
    sign_in(tab, site, "ada")
    tab.goto(f"{site.url}/records")
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    assert tab.locator(".skip").bounding_box()["x"] > 0
    seen = "getComputedStyle(document.activeElement).outlineStyle"
    stops = []
    for _ in range(12):
        tab.keyboard.press("Tab")
        assert tab.evaluate(seen) == "solid"
        stops.append(tab.evaluate("document.activeElement.textContent.trim()"))
    assert stops[1:6] == ["About you", "Records", "Answers", "Spend", "Sign out"]
    assert "Add a record" in stops
    tab.get_by_role("searchbox").focus()
    tab.keyboard.type("army")
    with tab.expect_navigation():
        tab.keyboard.press("Enter")
    assert "army" in tab.locator("main li").first.inner_text()


# ---- a phone

CUT = """() => {
  const faults = [];
  const seen = own => own.getClientRects().length > 0;
  const inside = (own, of) => own.left >= of.left - .5 && own.right <= of.right + .5;
  for (const svg of document.querySelectorAll('svg.chart')) {
    const box = svg.getBoundingClientRect();
    for (const text of svg.querySelectorAll('text')) {
      const own = text.getBoundingClientRect();
      const high = own.top >= box.top - .5 && own.bottom <= box.bottom + .5;
      if (!inside(own, box) || !high) faults.push(`chart: ${text.textContent}`);
      for (const other of svg.querySelectorAll('text')) {
        const its = other.getBoundingClientRect();
        const apart = own.right <= its.left || its.right <= own.left
          || own.bottom <= its.top + 2 || its.bottom <= own.top + 2;
        if (other !== text && !apart) faults.push(`on each other: ${text.textContent}`);
      }
    }
  }
  for (const cell of document.querySelectorAll('th, td')) {
    if (!seen(cell)) continue;
    const scroll = cell.closest('.scroll');
    const rolls = scroll && getComputedStyle(scroll).overflowX === 'auto';
    if (rolls && scroll.dataset.wide !== undefined) continue;
    const of = (rolls ? scroll : document.documentElement).getBoundingClientRect();
    if (!inside(cell.getBoundingClientRect(), of)) faults.push(`table: ${cell.textContent.trim()}`);
  }
  for (const tile of document.querySelectorAll('.tiles dd')) {
    if (tile.scrollWidth > tile.clientWidth) faults.push(`tile: ${tile.textContent}`);
  }
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const dates = /\\d{4}-\\d{2}(-\\d{2}( \\d{2}:\\d{2})?)?|\\d{2} [A-Z][a-z]{2}( \\d{2}:\\d{2})?/g;
  while (walker.nextNode()) {
    const node = walker.currentNode;
    if (node.parentElement.closest('.hidden')) continue;
    for (const found of node.textContent.matchAll(dates)) {
      const range = document.createRange();
      range.setStart(node, found.index);
      range.setEnd(node, found.index + found[0].length);
      const lines = new Set([...range.getClientRects()].map(own => Math.round(own.top)));
      if (lines.size > 1) faults.push(`date: ${found[0]}`);
    }
  }
  return faults;
}"""
"""What a page has of cut texts: labels of charts outside of their view box or on each other,
figures wider than their tile, cells outside of their table's frame (one of many columns,
`data-wide`, scrolls), dates in two lines.
"""
TIMES = ("/activity?span=day", "/activity?span=week", "/activity?span=month")
DAYS = ("/spend?days=7", "/spend?days=30", "/spend?days=90", "/spend?days=1")


@pytest.mark.parametrize("width", [390, 360, 1100])
def test_a_phone_cuts_nothing(open_site: Any, chromium: Any, width: int, bundles: Any) -> None:
    phone = {"width": width, "height": 844}
    with open_site(bundles["tags"]) as site:
        for name in ("ada", "admin"):
            with a_tab(chromium, viewport=phone) as tab:
                sign_in(tab, site, name)
                of_admin = (*TIMES, *DAYS, *OF_ADMIN) if name == "admin" else DAYS
                for path in (*OF_USER, *ONE, *of_admin):
                    user = "" if path in of_admin else f"{'&' if '?' in path else '?'}user=ada"
                    tab.goto(f"{site.url}{path}{user}")
                    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
                    assert (path, tab.evaluate(CUT)) == (path, [])
                    assert tab.evaluate("document.documentElement.scrollWidth") <= width, path


def test_the_check_finds_what_is_cut(tab: Any, site: Site) -> None:
    """A label outside of its chart, two on each other, a cell, a date: each is found."""
    tab.set_viewport_size({"width": 390, "height": 844})
    sign_in(tab, site, "admin")
    tab.goto(f"{site.url}/activity?span=day")
    tab.locator("svg.chart text").first.evaluate("own => own.setAttribute('x', -50)")
    assert [own.split(":")[0] for own in tab.evaluate(CUT)] == ["chart"]
    tab.reload()
    tab.locator("svg.chart text").nth(1).evaluate("own => own.setAttribute('y', 12)")
    assert [own.split(":")[0] for own in tab.evaluate(CUT)] == ["on each other"] * 2
    tab.reload()
    tab.locator("td").last.evaluate("own => own.style.paddingLeft = '500px'")
    assert "table" in [own.split(":")[0] for own in tab.evaluate(CUT)]
    tab.reload()
    tab.locator("h1").evaluate(
        "own => { own.textContent = '2026-11-29 10:00'; own.style.width = '5rem' }"
    )
    assert tab.evaluate(CUT) == ["date: 2026-11-29 10:00"]


def test_without_prices_there_is_no_chart_of_cost(tab: Any, site: Site) -> None:
    spend = schema.spend
    with site.store.writing() as connection:
        connection.execute(sa.update(spend).values(cost=0, unpriced_tokens=spend.c.prompt_tokens))
    sign_in(tab, site, "admin")
    tab.goto(f"{site.url}/spend")
    assert tab.locator("svg.chart").count() == 0
    main = tab.locator("main").inner_text()
    assert "No model that was used has a price" in main
    assert "As a table" in main


# ---- what is hostile


def test_texts_that_would_be_scripts_are_shown(tab: Any, site: Site) -> None:
    """Stored XSS: in records, answers, ids of users, labels of keys and errors of jobs."""
    store = site.store
    for place, text in enumerate(HOSTILE):
        store.add_records(text, [Record(text, text, text, text, text)])
        request = answered(f"req_x{place}", text, question=text)
        request.content["candidates"][0] |= {"said": text}
        request.content["records"] = [text]
        store.add_request(request)
        store.add_job(f"x{place}", text, "fit")
        store.update_job(f"x{place}", 1, 2, state="failed", error=text)
        make_key(store, label=text, users=[text])
    sign_in(tab, site, "admin")
    forms = ("/records/edit", "/records/delete", "/answer")
    for place, text in enumerate(HOSTILE):
        for path in (*OF_USER, *forms, "/nothing"):
            own = {"user": text, "id": f"req_x{place}" if path == "/answer" else text}
            query = urlencode(own)
            tab.goto(f"{site.url}{path}{'&' if '?' in path else '?'}{query}")
            assert tab.evaluate("window.taken") is None, path
            assert tab.locator("img, script, svg").count() == 0, path
        tab.goto(f"{site.url}/records?{query}")
        says(tab, "main", text)
        tab.get_by_role("link", name="Edit").click()
        assert tab.get_by_label("Answer").input_value() == text
    search = urlencode({"q": HOSTILE[0]})
    for path in ("/users", "/keys", "/jobs", f"/users?{search}", f"/activity?span={search}"):
        tab.goto(f"{site.url}{path}")
        assert tab.evaluate("window.taken") is None, path
        assert tab.locator("img, script").count() == 0, path


async def other_site(scope: Any, receive: Any, send: Any) -> None:
    """A page of another site that frames the dashboard, and sends a form to it."""
    if scope["type"] != "http":
        return
    target = scope["query_string"].decode()
    form = f'<form method=post action="{target}/user/switch?user=ada"><input name=enabled value=no>'
    body = f'<iframe src="{target}/sign-in"></iframe>{form}<button>Win</button></form>'
    headers = [(b"content-type", b"text/html")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body.encode()})


def test_other_sites_neither_frame_it_nor_send_its_forms(site: Site, chromium: Any) -> None:
    context = chromium.new_context()
    tab = context.new_page()
    tab.set_default_timeout(WAIT)
    sign_in(tab, site, "ada")
    with serving(other_site) as elsewhere:
        tab.goto(f"{elsewhere.replace('127.0.0.1', 'localhost')}/?{site.url}")
        frame = tab.frames[1]
        until(lambda: tab.wait_for_timeout(20) is None and frame.url != "")  # it has been tried
        assert frame.url.startswith("chrome-error:")
        tab.get_by_role("button", name="Win").click()
        tab.get_by_label("API key").wait_for()  # the cookie did not come along
        assert not site.store.is_off("ada")
        tab.goto(f"{site.url}/user")
        tab.get_by_role("button", name="Switch off").wait_for()  # and is still there
    context.close()
