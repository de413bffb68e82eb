"""The dashboard over HTTP: sessions, forms, headers, and who may see and do what."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from hydra_llm.gateway.activity import Activity, quantile
from hydra_llm.gateway.auth import make_key
from hydra_llm.gateway.ui import administration, people, signing
from hydra_llm.gateway.ui.charts import SPANS, figures, seconds
from hydra_llm.store import schema
from hydra_llm.store.store import Store
from hydra_llm.types import Record

from .conftest import records_of, running
from .dashboard import ADMIN_ENDPOINTS, NOW, answered, fill, visiting

pytestmark = pytest.mark.anyio
QUESTION = "the battle for the bridge in winter"
OF_USER = [
    *("/user", "/records", "/records?q=storm", "/records?before=9", "/records/new"),
    *("/records/edit?id=r1", "/records/delete?id=r1", "/answers", "/answers?before=1_x"),
    *("/answer?id=req_{user}0", "/export", "/delete"),
]
"""Pages about one user."""
OF_ADMIN = [
    "/activity",
    "/activity?span=week",
    "/keys",
    "/keys/revoke?id={key}",
    "/jobs",
    "/bundle",
]
OF_ALL = ["", "/users", "/users?q=a", "/spend", "/spend?days=7", "/nothing"]
WITHOUT_SIGNING = ["/sign-in", f"/{signing.SHEET_NAME}", "/icon.svg"]
FORMS: dict[str, dict[str, str]] = {
    "/user/switch": {"enabled": "no"},
    "/user/fit": {},
    "/records/save": {"id": "r1", "input": "tea", "output": "green"},
    "/records/switch": {"id": "r1", "enabled": "no"},
    "/records/delete": {"id": "r1"},
    "/answer": {"id": "req_{user}0", "kind": "chosen", "chosen": "1"},
    "/delete": {"confirm": "{user}"},
}
"""Forms about one user, and fields with which each changes something."""
ADMIN_FORMS: dict[str, dict[str, str]] = {
    "/keys": {"kind": "admin", "label": "mine"},
    "/keys/revoke": {"id": "{key}"},
    "/spend": {"kind": "key", "name": "{key}", "limits": "1/day"},
}


def of_admin(keys: dict[str, str]) -> list[str]:
    """Pages of administrators."""
    return [path.replace("{key}", keys["ada"].split("-")[1]) for path in OF_ADMIN]


def for_user(path: str, user: str) -> str:
    path = path.replace("{user}", user)
    return f"{path}{'&' if '?' in path else '?'}user={user}"


def kept(store: Store) -> Any:
    """All rows but those of sessions."""
    with store.reading() as connection:
        return {
            table.name: sorted(map(str, connection.execute(sa.select(table)).all()))
            for table in schema.metadata.sorted_tables
            if table.name not in ("sessions", "serving")
        }


def test_each_page_is_in_the_lists_of_this_file() -> None:
    routes = [r for module in (people, administration, signing) for r in module.router.routes]
    listed = {path.partition("?")[0] for path in (*OF_USER, *OF_ADMIN, *OF_ALL, *WITHOUT_SIGNING)}
    listed |= {"/", "/bundle/report", "/{rest:path}"} - {"/nothing"}
    gets = {route.path.removeprefix("/ui") for route in routes if "GET" in route.methods}
    assert gets == listed - {"/nothing"}
    posts = {route.path.removeprefix("/ui") for route in routes if "POST" in route.methods}
    assert posts == {*FORMS, *ADMIN_FORMS, "/sign-in", "/sign-out"}


# ---- who may see and do what


async def test_pages_are_shown_to_whom_they_belong(either: Store) -> None:
    keys = fill(either)
    async with running(either, dashboard=True) as world:
        for name, key in keys.items():
            admin = name == "admin"
            async with visiting(world, key) as visitor:
                for path in OF_USER:
                    for user in ("ada", "bob"):
                        answer = await visitor.get(for_user(path, user))
                        assert answer.status_code == (200 if admin or user == "ada" else 403), path
                        if answer.status_code == 403:
                            assert "letters" not in answer.text
                for path in of_admin(keys):
                    assert (await visitor.get(path)).status_code == (200 if admin else 403), path
                assert (await visitor.get("/bundle/report")).status_code == (404 if admin else 403)
                assert (await visitor.get("")).status_code == 303
                users = (await visitor.get("/users")).text
                assert ("bob" in users) == admin
                assert (await visitor.get("/nothing")).status_code == 404


async def test_who_is_not_signed_in_sees_nothing(store: Store) -> None:
    fill(store)
    before = kept(store)
    async with running(store, dashboard=True) as world, visiting(world) as visitor:
        for path in (*OF_ADMIN, *OF_ALL, *(for_user(path, "ada") for path in OF_USER)):
            answer = await visitor.get(path)
            assert (answer.status_code, answer.headers["location"]) == (303, "/ui/sign-in")
            assert answer.content == b""
        await visitor.get("/sign-in")
        for path, fields in (FORMS | ADMIN_FORMS).items():
            answer = await visitor.post(f"{path}?user=ada", **fields)
            assert answer.status_code == 303
            assert answer.headers["location"] == "/ui/sign-in?done=ended"
        for path in WITHOUT_SIGNING:
            assert (await visitor.get(path)).status_code == 200
    assert kept(store) == before


async def test_forms_of_others_change_nothing(either: Store) -> None:
    """A key for some users neither changes another user nor does what administrators do."""
    keys = fill(either)
    victim, _ = make_key(either, users=["bob"])
    before = kept(either)
    async with running(either, dashboard=True) as world:
        for name in ("ada", "two"):
            async with visiting(world, keys[name]) as visitor:
                for path, fields in (FORMS | ADMIN_FORMS).items():
                    given = {
                        field: value.format(user="bob", key=victim.id)
                        for field, value in fields.items()
                    }
                    answer = await visitor.post(f"{path}?user=bob", **given)
                    assert answer.status_code == 403, path
                # another user's answer under one's own name
                answer = await visitor.post("/answer?user=ada", id="req_bob0", kind="rejected")
                assert answer.status_code == 404
    assert kept(either) == before


async def test_a_form_without_its_token_changes_nothing(store: Store) -> None:
    keys = fill(store)
    before = kept(store)
    async with (
        running(store, dashboard=True) as world,
        visiting(world, keys["admin"]) as admin,
        visiting(world, keys["admin"]) as other,
    ):
        for path, fields in (FORMS | ADMIN_FORMS | {"/sign-out": {}}).items():
            given = {field: value.format(user="ada", key="x") for field, value in fields.items()}
            for token in ("", "0" * 64, other.token):
                answer = await admin.post(f"{path}?user=ada", **given, token=token)
                assert answer.status_code == 403, path
                assert "this form was not made for you" in answer.text
        assert kept(store) == before
        assert (await admin.get("/activity")).status_code == 200  # still signed in
        stranger = await admin.http.post("/ui/sign-in", data={"key": keys["ada"]})
        assert stranger.status_code == 403


@pytest.mark.parametrize(("method", "path", "body"), ADMIN_ENDPOINTS)
async def test_endpoints_of_administrators_are_theirs_alone(
    either: Store, method: str, path: str, body: Any
) -> None:
    keys = fill(either)
    victim, _ = make_key(either, users=["bob"])
    path, before = path.replace("{key}", victim.id), kept(either)
    async with running(either) as world:
        for key, status in ((keys["ada"], 403), (keys["two"], 403), ("", 401), ("hk-x-y", 401)):
            headers = {"authorization": f"Bearer {key}"}
            answer = await world.http.request(method, path, json=body, headers=headers)
            assert answer.status_code == status
        assert kept(either) == before
        headers = {"authorization": f"Bearer {keys['admin']}"}
        answer = await world.http.request(method, path, json=body, headers=headers)
        assert answer.status_code in (200, 201), answer.text


async def test_keys_are_made_listed_and_revoked_by_the_api(either: Store) -> None:
    _, admin = make_key(either, admin=True)
    async with running(either) as world:
        world.http.headers["authorization"] = f"Bearer {admin}"
        made = [
            (await world.http.post("/v1/keys", json={"users": [f"u{n}", "x"], "label": "l"})).json()
            for n in range(5)
        ]
        listed, query = [], ""
        while True:
            page = (await world.http.get(f"/v1/keys?limit=2{query}")).json()
            listed += page["data"]
            if not page["has_more"]:
                break
            query = f"&after={page['next']}"
        assert [key["id"] for key in listed[:5]] == [key["id"] for key in reversed(made)]
        assert len(listed) == 6
        assert "hash" not in listed[0]
        assert all(made[0]["key"] not in str(key) for key in listed)
        own = (await world.http.get("/v1/keys?user=u3")).json()["data"]
        assert [key["users"] for key in own] == [["u3", "x"]]
        asked = {"headers": {"authorization": f"Bearer {made[0]['key']}"}}
        assert (await world.http.get("/v1/models", **asked)).status_code == 200
        assert (await world.http.delete(f"/v1/keys/{made[0]['id']}")).json()["revoked"]
        assert (await world.http.get("/v1/models", **asked)).status_code == 401
        assert (await world.http.delete("/v1/keys/none")).status_code == 404
        for wrong in ({}, {"admin": True, "users": ["a"]}, {"users": [""]}, {"more": 1}):
            assert (await world.http.post("/v1/keys", json=wrong)).status_code == 400
        assert (await world.http.get("/v1/keys?after=x")).status_code == 400


# ---- sessions


async def test_the_cookie_is_no_key_and_no_other_site_s(store: Store) -> None:
    _, key = make_key(store, users=["ada"])
    async with running(store, dashboard=True) as world:
        for scheme, name in (("http", "hydra"), ("https", "__Host-hydra")):
            async with visiting(world, url=f"{scheme}://localhost") as visitor:
                await visitor.get("/sign-in")
                said = (await visitor.post("/sign-in", key=key)).headers.get_list("set-cookie")[0]
                found, *parts = said.split("; ")
                assert found.startswith(f"{name}=")
                assert not any(part in said for part in key.split("-", 2)[1:])
                assert {"HttpOnly", "SameSite=strict", "Max-Age=28800"} <= {*parts}
                assert ("Secure" in parts) == (scheme == "https")
                assert f"Path={'/' if scheme == 'https' else '/ui'}" in parts
    with store.reading() as connection:
        rows = connection.execute(sa.select(schema.sessions)).all()
    assert len(rows) == 2
    assert found.partition("=")[2].partition(".")[0] not in str(rows)


async def test_a_planted_cookie_is_not_who_signs_in(store: Store) -> None:
    """Session fixation: an id from before the sign-in, or made up, is never a session."""
    _, key = make_key(store, users=["ada"])
    async with running(store, dashboard=True) as world, visiting(world) as attacker:
        await attacker.get("/sign-in")
        planted = attacker.cookie
        async with visiting(world) as victim:
            for name in ("hydra", "hydra-form"):
                victim.http.cookies.set(name, planted, domain="localhost.local", path="/ui")
            assert (await victim.sign_in(key)).status_code == 303
            assert victim.cookie != planted
            assert (await victim.get("/user")).status_code == 200
        assert (await attacker.get("/user")).status_code == 303
        id, _, signature = planted.partition(".")
        for made_up in (id, f"{id}.", f"x.{signature}", f"{id}.{'0' * 64}", "é.ü"):
            cookie = f"hydra={made_up}".encode()
            answer = await world.http.get("/ui/user", headers={b"cookie": cookie})
            assert answer.status_code == 303


async def test_signing_out_ends_a_copied_cookie_too(store: Store) -> None:
    _, key = make_key(store, users=["ada"])
    async with running(store, dashboard=True) as world, visiting(world, key) as visitor:
        copied = {"cookie": f"hydra={visitor.cookie}"}
        assert (await world.http.get("/ui/user", headers=copied)).status_code == 200
        answer = await visitor.post("/sign-out")
        assert answer.headers["location"] == "/ui/sign-in?done=out"
        assert (await world.http.get("/ui/user", headers=copied)).status_code == 303


async def test_a_session_ends_with_its_key_and_its_time(store: Store) -> None:
    made, key = make_key(store, users=["ada"])
    async with running(store, dashboard=True) as world, visiting(world, key) as visitor:
        assert (await visitor.get("/user")).status_code == 200
        store.revoke_key(made.id)
        assert (await visitor.get("/user")).status_code == 303
        assert "This key is not valid." in (await visitor.sign_in(key)).text
        _, key = make_key(store, users=["ada"])
        await visitor.sign_in(key)
        with store.writing() as connection:
            past = sa.update(schema.sessions).values(expires=time.time() - 1)
            connection.execute(past)
        assert (await visitor.get("/user")).status_code == 303
        await visitor.sign_in(key)
        store.add_records("ada", records_of("ada"))
        store.delete_user("ada")  # and the key with it
        assert (await visitor.get("/user")).status_code == 303


async def test_the_admin_key_signs_in_until_it_changes(store: Store) -> None:
    old, new = "an-admin-key-of-old", "an-admin-key-of-now"
    async with running(store, dashboard=True, admin_key=old) as world, visiting(world, old) as own:
        assert (await own.get("/activity")).status_code == 200
        cookie = {"cookie": f"hydra={own.cookie}"}
    for given, status in ((old, 200), (new, 303), ("", 303)):
        async with running(store, dashboard=True, admin_key=given) as world:
            answer = await world.http.get("/ui/activity", headers=cookie)
            assert answer.status_code == status


async def test_without_keys_this_machine_alone_goes_on_without_one(store: Store) -> None:
    async with running(store, dashboard=True) as world:
        async with visiting(world) as visitor:
            assert "Continue without a key" in (await visitor.get("/sign-in")).text
            assert (await visitor.sign_in("")).status_code == 303
            assert (await visitor.get("/activity")).status_code == 200
            cookie = {"cookie": f"hydra={visitor.cookie}"}
            rebound = await world.http.get(
                "/ui/activity", headers=cookie | {"host": "evil.example"}
            )
            assert rebound.status_code == 403
            make_key(store, admin=True)
            assert (await visitor.get("/activity")).status_code == 303
        async with visiting(world, url="http://evil.example") as foreign:
            await foreign.get("/sign-in")
            assert (await foreign.post("/sign-in", key="")).status_code == 401
    beyond = running(store, dashboard=True, on_loopback=False)
    async with beyond as world, visiting(world) as visitor:
        assert "Enter your key." in (await visitor.sign_in("")).text


async def test_a_session_is_no_key_of_the_api(store: Store) -> None:
    keys = fill(store)
    async with running(store, dashboard=True) as world, visiting(world, keys["admin"]) as visitor:
        for path in ("/v1/users", "/v1/keys", "/v1/users/ada/records"):
            answer = await world.http.get(path, headers={"cookie": f"hydra={visitor.cookie}"})
            assert answer.status_code == 401
        assert (await visitor.http.get("/uix")).status_code == 401


async def test_it_is_off_unless_it_is_switched_on(store: Store) -> None:
    async with running(store) as world:
        assert (await world.http.get("/ui")).status_code == 404
    make_key(store, admin=True)
    async with running(store) as world:
        assert (await world.http.get("/ui/sign-in")).status_code == 401


async def test_rates_count_for_a_session_as_for_its_key(store: Store) -> None:
    _, key = make_key(store, users=["ada"])
    limited = running(store, dashboard=True, requests_per_minute=3)
    async with limited as world, visiting(world, key) as visitor:
        statuses = [(await visitor.get("/records")).status_code for _ in range(3)]
        assert statuses == [200, 200, 429]


# ---- what goes out


async def test_no_page_may_be_framed_or_run_a_script(store: Store) -> None:
    keys = fill(store)
    async with running(store, dashboard=True) as world, visiting(world, keys["admin"]) as visitor:
        paths = [*WITHOUT_SIGNING, *OF_ADMIN, *OF_ALL, "/user", "/records?user=%00", "/user?user=x"]
        paths += [for_user(path, "ada") for path in OF_USER]
        for path in paths:
            answer = await visitor.get(path)
            policy = answer.headers["content-security-policy"]
            assert "frame-ancestors 'none'" in policy
            assert "script-src" not in policy
            assert policy.startswith("default-src 'none';")
            assert "unsafe" not in policy
            assert answer.headers["x-frame-options"] == "DENY"
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["referrer-policy"] == "same-origin"
            if path not in WITHOUT_SIGNING[1:]:
                assert answer.headers["cache-control"] == "no-store", path
            if answer.headers.get("content-type", "").startswith("text/html"):
                assert not re.search(
                    r"<script|\son\w+=|\sstyle=|javascript:|https?://", answer.text
                )


async def test_errors_are_pages_of_one_line(either: Store, caplog: Any) -> None:
    keys = fill(either)
    async with running(either, dashboard=True) as world, visiting(world, keys["admin"]) as visitor:
        for path, status in (
            ("/user?user=", 400),
            ("/records?user=ada&before=x", 400),
            ("/records/edit?user=ada&id=none", 404),
            ("/answer?user=ada&id=none", 404),
            ("/answer?user=ada&id=req_bob0", 404),
            ("/answer?user=ada&id=%00", 404),
            ("/records/edit?user=ada&id=%00", 404),
            ("/users?q=%00", 400),
            ("/keys?after=1_%00", 400),
            ("/records/edit?user=ada", 400),
            ("/records/edit?user=ada&id=feedback:none", 404),
            ("/keys?id=none", 404),
            ("/keys?id=%00", 404),
            ("/keys/revoke?id=nokey", 404),
        ):
            answer = await visitor.get(path)
            assert answer.status_code == status, path
            assert answer.text.count('role="alert"') == 1
            assert "Sign out" in answer.text
        world.app.state.gateway.store.latest_jobs = None  # a bug
        answer = await visitor.get("/jobs")
        assert answer.status_code == 500
        assert "something went wrong here" in answer.text
    assert "TypeError" in caplog.text


async def test_a_root_path_is_before_every_address(store: Store) -> None:
    keys = fill(store)
    behind = running(store, dashboard=True, root_path="/llm")
    async with behind as world, visiting(world, url="http://localhost/llm") as visitor:
        answer = await visitor.get("/sign-in")
        assert 'href="/llm/ui/' in answer.text
        answer = await visitor.post("/sign-in", key=keys["ada"])
        assert answer.headers["location"] == "/llm/ui"
        assert "Path=/llm/ui" in answer.headers.get_list("set-cookie")[0]
        addresses = re.findall(r'(?:href|action)="([^"]+)"', (await visitor.get("/user")).text)
        assert all(address.startswith(("/llm/ui", "#")) for address in addresses)


# ---- what forms do is what the API does


async def test_a_record_is_written_changed_and_deleted(store: Store) -> None:
    keys = fill(store)
    async with running(store, dashboard=True) as world, visiting(world, keys["ada"]) as visitor:
        text = "one\n\ntwo <b>&amp; \U0001f40b"
        sent = {"input": text.replace("\n", "\r\n"), "output": "calm", "time": "2026-11"}
        answer = await visitor.post("/records/save", **sent)
        assert answer.headers["location"] == "/ui/records?user=ada&done=added"
        record = store.records("ada")[1][-1]
        assert (record.input, record.output, record.time) == (text, "calm", "2026-11")
        again = await visitor.post("/records/save", **{**sent, "time": ""})
        assert again.headers["location"] == "/ui/records?user=ada&done=unchanged"
        assert store.records("ada")[1][-1] == record, "equal question and answer: no second one"
        await visitor.post("/records/save", id=record.id, input=text, output="loud")
        (changed,) = [own for own in store.records("ada")[1] if own.id == record.id]
        assert changed.output == "loud"
        for wrong, said in (
            ({"input": "", "output": "x"}, "input is empty"),
            ({"input": "x", "output": "y", "time": "soon"}, "time: "),
            ({"input": "x", "output": "y" * 100_001}, "output is longer than 100000 characters"),
            ({"id": "feedback:req_x", "input": "x", "output": "y"}, "id begins with"),
        ):
            answer = await visitor.post("/records/save", **wrong)
            assert answer.status_code == 400
            assert said in answer.text
        await visitor.post("/records/delete", id=record.id)
        assert record.id not in {own.id for own in store.records("ada")[1]}


async def test_pages_of_records_hold_each_once(either: Store) -> None:
    fill(either, records=45)
    seen, before = [], None
    while page := either.record_page("ada", before=before, limit=20):
        seen += [record.id for _, record in page]
        before = page[-1][0]
    assert seen == [f"r{n}" for n in reversed(range(45))]
    at, ids = None, []
    while requests := either.latest_requests("ada", 2, before=at):
        ids += [request.id for request in requests]
        at = (requests[-1].created, requests[-1].id)
    assert ids == ["req_ada0", "req_ada1", "req_ada2"]
    assert either.some_records("ada", ["r1", "none"]).keys() == {"r1"}


async def test_users_are_found_by_a_part_of_their_id(either: Store) -> None:
    for user in ("Ada", "bad", "100%", "100x", "a_b"):
        either.add_records(user, [Record(user, "1", "tea", "green")])
    either.add_request(answered("r", "Ada"))

    def found(part: str) -> list[str]:
        return [own.id for own in either.user_counts(contains=part)]

    assert sorted(found("ad")) == ["Ada", "bad"]
    assert (found("0%"), found("_"), found("\\")) == (["100%"], ["a_b"], [])
    latest = {own.id: own.latest for own in either.user_counts()}
    assert latest["Ada"] == pytest.approx(NOW - 60)
    assert latest["bad"] is None


@pytest.mark.parametrize("stream", [False, True])
async def test_personal_answers_are_switched_off_and_on(either: Store, stream: bool) -> None:
    either.add_records("ada", records_of("ada"))
    async with running(either) as world:
        assert (await world.ask(QUESTION)).headers["x-hydra-personalized"] == "true"
        where = "/v1/users/ada/personalization"
        answer = await world.http.put(where, json={"enabled": False})
        assert answer.json() == {"user": "ada", "enabled": False}
        answer = await world.ask(QUESTION, stream=stream)
        assert answer.headers["x-hydra-personalized"] == "false; reason=switched-off"
        assert len(world.upstream.bodies[-1]["messages"]) == 1
        found = await world.http.post("/v1/users/ada/search", json={"query": "sea"})
        assert found.status_code == 200
        assert (await world.http.get("/v1/users/ada/export")).json()["off"] is True
        await world.http.put(where, json={"enabled": True})
        assert (await world.ask(QUESTION)).headers["x-hydra-personalized"] == "true"


async def test_an_answer_is_corrected_as_by_the_api(store: Store, bundles: dict[str, Path]) -> None:
    store.add_records("ada", records_of("ada"))
    _, key = make_key(store, users=["ada"])
    async with running(store, bundles["tags"], dashboard=True) as world:
        world.http.headers["authorization"] = f"Bearer {key}"
        asked = await world.ask(QUESTION)
        id = asked.headers["x-hydra-request-id"]
        async with visiting(world, key) as visitor:
            shown = (await visitor.get(f"/answer?id={id}")).text
            stored = store.request(id)
            assert stored is not None
            assert stored.content["abstained"] == asked.json()["personalization"]["abstained"]
            assert "picked" in shown
            answer = await visitor.post("/answer", id=id, kind="edited", edited="odd")
            assert answer.headers["location"].endswith("done=corrected")
            record = store.some_records("ada", [f"feedback:{id}"])[f"feedback:{id}"]
            assert record.output == "odd"
            again = await visitor.post("/answer", id=id, kind="edited", edited="odd")
            assert again.headers["location"].endswith("done=repeated")
            for wrong in ({"kind": "edited"}, {"kind": "chosen", "chosen": "x"}, {}):
                assert (await visitor.post("/answer", id=id, **wrong)).status_code == 400
            edit = await visitor.get(f"/records/edit?id=feedback:{id}")
            assert edit.headers["location"] == f"/ui/answer?user=ada&id={id}"


async def test_everything_is_deleted_after_its_id_is_written(store: Store) -> None:
    keys = fill(store)
    async with running(store, dashboard=True) as world, visiting(world, keys["ada"]) as visitor:
        answer = await visitor.post("/delete", confirm="Ada")
        assert "Write the id exactly" in answer.text
        assert store.state("ada").version is not None
        answer = await visitor.post("/delete", confirm="ada")
        assert "Everything about ada was deleted" in answer.text
        assert store.state("ada").version is None
        assert (await visitor.get("/user")).status_code == 303
    assert store.state("bob").version is not None


# ---- figures


def test_activity_counts_until_the_store_takes_it(store: Store) -> None:
    activity = Activity(clock=lambda: 7300.0)
    activity.answered("personal", {"prepare": 0.01, "adapt": 0.02, "upstream": 70.0}, False)
    activity.answered("personal", {"prepare": 0.001}, True)
    activity.answered("off-task", {"upstream": 0.3})
    failing = Store(store.url)
    with failing.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE activity RENAME TO gone")
    activity.keep(failing)
    with failing.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE gone RENAME TO activity")
    failing.close()
    for _ in range(2):
        activity.keep(store)  # the second time there is nothing
    rows = [(own.hour, own.kind, own.name, own.count) for own in store.activity(0)]
    assert rows == [
        (7200, "answer", "off-task", 1),
        (7200, "answer", "personal", 2),
        (7200, "own", "0.01", 1),
        (7200, "own", "0.05", 1),
        (7200, "pick", "first", 1),
        (7200, "pick", "other", 1),
        (7200, "upstream", "0.5", 1),
        (7200, "upstream", "inf", 1),
    ]
    shown = figures(rows, SPANS["day"], 7300.0)
    assert (shown["total"], shown["personal"], shown["gated"], shown["judged"]) == (3, 2, 1, 3)
    assert (shown["first"], shown["picked"]) == (1, 2)
    assert seconds(shown["upstream"]) == "> 60 s"
    assert seconds(shown["own"]) == "≤ 50 ms"
    assert shown["bars"]["rows"] == [("02:00", [2, 1, 0, 0, 0])]
    assert figures([], SPANS["month"], NOW)["total"] == 0


async def test_limits_are_set_on_the_page(store: Store) -> None:
    keys = fill(store)
    async with running(store, dashboard=True) as world, visiting(world, keys["admin"]) as admin:
        answer = await admin.post("/spend", kind="user", name="ada", limits=" 5/day ")
        assert answer.headers["location"] == "/ui/spend?done=limit"
        assert [(own.name, own.value) for own in store.limits()] == [("ada", "5/day")]
        page = await admin.get("/spend?done=limit")
        assert "The limit was set" in page.text
        for given, fault in (
            ({"name": "ada", "limits": "five"}, "limits: "),
            ({"name": "ada\u0000", "limits": "1/day"}, "user "),
            ({"kind": "key", "name": "none", "limits": "1/day"}, "no such key"),
        ):
            answer = await admin.post("/spend", **{"kind": "user", **given})
            assert answer.status_code == 400, given
            assert fault in answer.text
        assert [own.value for own in store.limits()] == ["5/day"]
        await admin.post("/spend", kind="user", name="ada", limits="")
        assert not store.limits()


def test_a_quantile_is_the_bound_of_its_class() -> None:
    classes = {"0.1": 90, "1": 9, "inf": 1}
    bounds = [quantile(classes, share) for share in (0.5, 0.9, 0.95, 0.99, 1.0)]
    assert bounds == [0.1, 0.1, 1.0, 1.0, float("inf")]
    assert quantile({}, 0.5) is None


def test_figures_of_two_servers_are_added(either: Store) -> None:
    for _ in range(2):
        either.add_activity({(3600, "answer", "personal"): 2, (0, "answer", "personal"): 1})
    assert [own.count for own in either.activity(3600)] == [4]
    assert [(own.hour, own.count) for own in either.activity(0, 7200)] == [(0, 6)]
    either.prune_activity(3600)
    assert [own.hour for own in either.activity(0)] == [3600]
