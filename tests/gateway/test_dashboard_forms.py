"""What forms and addresses of the dashboard do at their edges: numbers that no database holds, line
breaks, the first key, a record whose answer is gone, a form that is too large.
"""

import time
from typing import Any

import pytest

from hydra_llm.gateway.auth import make_key
from hydra_llm.gateway.ui import administration, people, signing
from hydra_llm.store.store import Store
from hydra_llm.store.values import Spend, Spender, StoredResponse
from hydra_llm.types import Record

from .conftest import running
from .dashboard import NOW, answered, fill, visiting

pytestmark = pytest.mark.anyio
NUMBERS = (2**63, 2**64, -(2**63) - 1, 10**30, -1, 0, 2**63 - 1, 2**31, "1e400", "nan", "0x1", "")
TOO_LARGE = NUMBERS[:4]


def integers(app: Any) -> list[tuple[str, str]]:
    """Paths of the API with a number in the query, and its name."""
    return [
        (path, given["name"])
        for path, methods in app.openapi()["paths"].items()
        for given in methods.get("get", {}).get("parameters", [])
        if given["in"] == "query" and "integer" in str(given["schema"])
    ]


def pages_with_integers() -> list[tuple[str, str]]:
    routes = [r for module in (people, administration, signing) for r in module.router.routes]
    return [
        (route.path, field.alias)
        for route in routes
        for field in route.dependant.query_params
        if "int" in str(field.field_info.annotation)
    ]


async def test_no_number_of_a_query_breaks_the_store(either: Store) -> None:
    keys = fill(either)
    either.add_response(StoredResponse("resp_x", "ada", NOW, None, {"input": []}), version=None)
    async with running(either, dashboard=True) as world, visiting(world, keys["admin"]) as admin:
        admin.http.headers["authorization"] = f"Bearer {keys['admin']}"
        found = integers(world.app)
        assert {"limit", "hours", "step"} <= {name for _, name in found}
        assert pages_with_integers() == [("/ui/records", "before"), ("/ui/spend", "days")]
        for path, name in (*found, *pages_with_integers()):
            where = path.replace("{user}", "ada").replace("{response_id}", "resp_x")
            where = where.replace("{id}", "resp_x")
            for number in NUMBERS:
                query = {"user": "ada", name: str(number)}
                answer = await admin.http.get(where, params=query)
                assert answer.status_code < 500, (path, name, number)
                if number in TOO_LARGE and answer.status_code != 404:
                    assert answer.status_code == 400, (path, name, number)
        for path in ("/v1/keys", "/v1/jobs", "/ui/keys", "/ui/jobs", "/ui/answers?user=ada"):
            for number in ("1e400", "nan", "-inf", str(10**400), "1_0_x"):
                mark = "&" if "?" in path else "?"
                after = f"{mark}{'before' if 'answers' in path else 'after'}={number}_x"
                assert (await admin.http.get(f"{path}{after}")).status_code in (200, 400), after


async def test_an_untouched_form_changes_nothing(store: Store) -> None:
    """A browser has one kind of line break in its fields, and sends CRLF."""
    texts = ("one\r\ntwo", "one\rtwo", "one\ntwo", "\r\n\none\r\n", "tab\tand  blanks ")
    records = [Record("ada", f"r{n}", text, text[::-1]) for n, text in enumerate(texts)]
    store.add_records("ada", records)
    _, key = make_key(store, users=["ada"])

    def as_browsers_send(text: str) -> str:
        shown = text.replace("\r\n", "\n").replace("\r", "\n")
        return shown.replace("\n", "\r\n")

    async with running(store, dashboard=True) as world, visiting(world, key) as visitor:
        for record in records:
            sent = {name: as_browsers_send(getattr(record, name)) for name in ("input", "output")}
            answer = await visitor.post("/records/save", id=record.id, time="", **sent)
            assert answer.headers["location"].endswith("done=unchanged"), record
        assert store.records("ada")[1] == [
            Record("ada", r.id, r.input, r.output, position=n) for n, r in enumerate(records)
        ]
        sent["output"] += " and more\r\n"
        await visitor.post("/records/save", id="r4", time="", **sent)
        assert store.records("ada")[1][4].output.endswith(" and more\n")
        request = answered("req_lines", "ada")
        request.content["candidates"][0] |= {"said": "a\r\nb", "text": "a\r\nb", "answer": "a\r\nb"}
        store.add_request(request)
        await visitor.post("/answer", id="req_lines", kind="edited", edited="a\r\nb")
        made = "feedback:req_lines"
        assert store.some_records("ada", [made])[made].output == "a\r\nb"


@pytest.mark.parametrize("gone", ["deleted", "retention"])
async def test_a_record_stays_editable_when_its_answer_is_gone(either: Store, gone: str) -> None:
    keys = fill(either)
    either.add_request(answered("req_x", "ada", question="marmalade"))
    made = "feedback:req_x"
    async with running(either, dashboard=True) as world, visiting(world, keys["ada"]) as visitor:
        await visitor.post("/answer", id="req_x", kind="edited", edited="odd")
        page = await visitor.get(f"/records/edit?id={made}")
        assert page.headers["location"] == "/ui/answer?user=ada&id=req_x"
        if gone == "deleted":  # as DELETE /v1/responses/{id} does
            either.delete_response("ada", "resp_x", request="req_x")
        else:
            either.prune(time.time() + 1)
        page = await visitor.get(f"/records/edit?id={made}")
        assert (page.status_code, "marmalade" in page.text) == (200, True)
        assert "/ui/answer?" not in page.text
        sent = {"input": "marmalade", "time": ""}
        answer = await visitor.post("/records/save", id=made, output="odd", **sent)
        assert answer.headers["location"].endswith("done=unchanged")
        assert either.unlearned_feedback("ada")
        answer = await visitor.post("/records/save", id=made, output="calm", **sent)
        assert answer.headers["location"].endswith("done=changed")
        assert either.some_records("ada", [made])[made].output == "calm"
        assert not either.unlearned_feedback("ada", or_learned=True), "it said something else"
        assert (await visitor.post("/records/delete", id=made)).status_code == 303
        assert not either.some_records("ada", [made])


async def test_no_key_locks_everybody_out(store: Store) -> None:
    """Who has no key cannot make one that ends their session and leaves no administrator."""
    async with running(store, dashboard=True) as world, visiting(world) as visitor:
        await visitor.sign_in("")
        assert "the first one is an administrator's" in (await visitor.get("/keys")).text
        answer = await visitor.post("/keys", kind="users", users="ada")
        assert answer.status_code == 400
        assert "make an administrator&#39;s key first" in answer.text
        answer = await world.http.post("/v1/keys", json={"users": ["ada"]})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "admin")
        assert not store.has_keys()
        assert (await visitor.get("/keys")).status_code == 200, "the session goes on"
        answer = await visitor.post("/keys", kind="admin", label="first")
        assert answer.status_code == 201
        secret = answer.text.partition("<code>")[2].partition("</code>")[0]
        assert (await visitor.get("/keys")).status_code == 303
        await visitor.sign_in(secret)
        assert (await visitor.post("/keys", kind="users", users="ada")).status_code == 201


async def test_a_form_that_is_too_large_gives_a_page(store: Store) -> None:
    keys = fill(store)
    async with running(store, dashboard=True, max_body_bytes=4096) as world:
        async with visiting(world, keys["ada"]) as visitor:
            answer = await visitor.post("/records/save", input="x" * 5000, output="y")
            assert answer.status_code == 413
            assert answer.headers["content-type"].startswith("text/html")
            assert "the body has more than 4096 bytes" in answer.text
            assert "Sign out" in answer.text
            answer = await visitor.post("/sign-in", key="x" * 5000)
            assert (answer.status_code, answer.text[:9]) == (413, "<!doctype")
        body = {"records": [{"id": "1", "input": "x" * 5000, "output": "y"}]}
        headers = {"authorization": f"Bearer {keys['ada']}"}
        answer = await world.http.post("/v1/users/ada/records", json=body, headers=headers)
        assert answer.json()["error"]["code"] == "body_too_large"


async def test_spend_by_key_is_for_administrators(either: Store) -> None:
    keys = fill(either)
    ids = {name: key.split("-")[1] for name, key in keys.items()}
    hostile = make_key(either, users=["bob"], label="<b>label</b>")[0].id
    day, amount = time.strftime("%Y-%m-%d", time.gmtime()), Spend(2, 900, 60, cost=3 * 10**9)
    names = {"", "admin", "gone", ids["ada"], hostile}
    either.add_spend({Spender(day, key, "ada", "m"): amount for key in names})
    async with running(either, dashboard=True) as world:
        async with visiting(world, keys["admin"]) as admin:
            page = (await admin.get("/spend")).text
            table = page.partition('aria-label="By key')[2].partition("</table>")[0]
            assert table.count("<tr>") == 1 + len(names)
            assert table.count("3.00") == len(names)
            assert f'<a href="/ui/keys?id={ids["ada"]}">ada&#39;s phone</a>' in table
            assert "&lt;b&gt;label&lt;/b&gt;" in table
            for other in ("without a key", "HYDRA_ADMIN_KEY", "gone"):
                assert other in table
            page = (await admin.get(f"/keys?id={ids['ada']}")).text
            assert page.count("Revoke…") == 1
            assert "bob" not in page.partition("Create a key")[0]
        for name in ("ada", "two"):
            async with visiting(world, keys[name]) as visitor:
                assert "By key" not in (await visitor.get("/spend")).text
                assert (await visitor.get(f"/keys?id={ids['ada']}")).status_code == 403
    async with running(either, dashboard=True) as world, visiting(world, keys["admin"]) as admin:
        assert "By key" in (await admin.get("/spend?days=30")).text
