"""The pages of administrators: activity, users, keys, jobs, the bundle in use. Each calls the
function of an endpoint. A key for several users sees the list of these users too.
"""

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from anyio.to_thread import run_sync
from fastapi import Query, Response

from hydra_llm.gateway import admin_routes, spend_routes, user_routes
from hydra_llm.gateway.admin_routes import gateway_of_admin
from hydra_llm.gateway.auth import WITHOUT_KEYS
from hydra_llm.gateway.deployment import folder_of
from hydra_llm.gateway.schemas import MAX_ID, ApiError, KeyIn, id_fault
from hydra_llm.gateway.ui.charts import NAMES, SPANS, figures, money_bars, seconds, summed
from hydra_llm.gateway.ui.pages import Form, Here, Visit, go, make_router, show
from hydra_llm.gateway.ui.people import valid
from hydra_llm.store.values import PURPOSES, Key

if TYPE_CHECKING:
    from hydra_llm.bundle import Bundle

PAGE = 25
CARD = "README.md"  # in a bundle's folder
MOST_SUMS = 10_000  # rows of days and models
REPORT = "report.html"  # in a bundle's folder: of its benchmark, as `bench show --html` writes it
REPORT_POLICY = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline';"
    " style-src 'unsafe-inline'; img-src data:; font-src data:; frame-ancestors 'none'"
)
"""A report has scripts of its own; in a sandbox they see nothing of the dashboard."""

router = make_router()


@router.get("/activity")
def activity_page(here: Here, span: str = "day") -> Response:
    """What was answered lately, and why not personally."""
    chosen = SPANS.get(span, SPANS["day"])
    happened = admin_routes.activity(here.http, hours=chosen.hours, step=chosen.step)
    values: dict[str, Any] = {"span": chosen, "spans": SPANS, "names": NAMES, "seconds": seconds}
    values["drift"] = happened["drift"]
    shown = figures(happened["data"], chosen, time.time())
    return show(here, "activity.html", figures=shown, **values)


@router.get("/users")
def users_page(here: Here, after: str = "", q: str = "") -> Response:
    """The users for whom the caller may speak, with size and activity."""
    contains = q.strip()[:MAX_ID]
    page = user_routes.list_users(here.http, after=after, limit=PAGE, contains=contains)
    more = page["data"][-1]["id"] if page["has_more"] else None
    values = {"users": page["data"], "more": more, "first": not after, "q": q}
    return show(here, "users.html", **values)


@router.get("/spend")
def spend_page(here: Here, days: Annotated[int, Query(ge=1, le=366)] = 7) -> Response:
    """What was spent: of all users, or of those for whom the caller may speak."""
    return _spend_page(here, days)


@router.post("/spend")
def set_limit(here: Here, form: Form) -> Response:
    """Set what a user or a key may spend; empty: as the settings say."""
    kind = "key" if form.get("kind") == "key" else "user"
    name, limits = form.get("name", "").strip(), form.get("limits", "").strip()
    try:
        sent = valid(spend_routes.LimitIn, limits=limits or None, **{kind: name})
        spend_routes.set_limits(sent, here.http)
    except ApiError as error:
        if error.status not in (400, 404):
            raise
        return _spend_page(here, fault=str(error), given=form)
    return go(here.http, "/spend", done="limit")


def _spend_page(
    here: Visit, days: int = 7, fault: str = "", given: dict[str, str] | None = None
) -> Response:
    http = here.http
    since = (datetime.now(UTC).date() - timedelta(days=days - 1)).isoformat()
    spent = spend_routes.show_spend(http, by="day,model", since=since, limit=MOST_SUMS)
    dearest = spend_routes.show_spend(http, by="user", since=since, limit=PAGE)
    by_day, by_model = (summed(spent["data"], name) for name in ("day", "model"))
    values: dict[str, Any] = {"total": spent["total"], "currency": spent["currency"]}
    values |= {"days": days, "chosen": (7, 30, 90), "by_day": by_day, "by_user": dearest["data"]}
    values["by_model"] = sorted(by_model, key=lambda row: row["cost"] or 0.0, reverse=True)
    values |= {"limits": None, "by_key": []}
    if here.caller.admin:
        keys = spend_routes.show_spend(http, by="key", since=since, limit=PAGE)["data"]
        known = http.app.state.gateway.store.keys([row["key"] for row in keys])
        labels = {key.id: key.label for key in known}
        values["by_key"] = [{**row, "label": labels.get(row["key"])} for row in keys]
        values["limits"] = spend_routes.show_limits(http)
    values["bars"] = money_bars(by_day, days, since)
    values |= {"fault": fault, "given": given or {}}
    return show(here, "spend.html", 400 if fault else 200, **values)


# ---- keys


@router.get("/keys")
def keys_page(here: Here, after: str = "", id: str = "") -> Response:
    """The keys, newest first, or the one of an id."""
    if not id:
        return _keys_page(here, after)
    values: dict[str, Any] = {"keys": [_key(here, id)], "more": None, "first": False}
    values |= {"open": False, "purposes": PURPOSES}
    return show(here, "keys.html", **values, fault="", given={})


@router.post("/keys")
def create_key(here: Here, form: Form) -> Response:
    """Create a key, and show it this once."""
    users = [name.strip() for name in form.get("users", "").split("\n") if name.strip()]
    admin = form.get("kind") == "admin"
    try:
        label = form.get("label", "").strip()
        purposes = [own for own in PURPOSES if form.get(own) or "purposes" not in form]
        about: dict[str, Any] = {"admin": admin, "label": label, "purposes": purposes}
        sent = valid(KeyIn, users=[] if admin else users, **about)
        made = admin_routes.create_key(sent, here.http)
    except ApiError as error:
        if error.status != 400:
            raise
        return _keys_page(here, fault=str(error), given=form)
    return show(here, "key_made.html", 201, made=made)


@router.get("/keys/revoke")
def ask_to_revoke(here: Here, id: str) -> Response:
    """Whether a key is to be revoked."""
    return show(here, "key_revoke.html", key=_key(here, id), own=id == here.caller.key)


@router.post("/keys/revoke")
def revoke_key(here: Here, form: Form) -> Response:
    """Revoke a key: sessions that were begun with it end at once."""
    admin_routes.revoke_key(form.get("id", ""), here.http)
    return go(here.http, "/keys", done="revoked")


def _key(here: Visit, id: str) -> Key:
    """A key, for an administrator. `ApiError` 403, 404."""
    store = gateway_of_admin(here.http).store
    if id_fault(id) or (key := store.key(id)) is None:
        raise ApiError(404, "there is no such key: it may have been deleted with its user")
    return key


def _keys_page(
    here: Visit, after: str = "", fault: str = "", given: dict[str, str] | None = None
) -> Response:
    page = admin_routes.list_keys(here.http, after=after, limit=PAGE)
    values = {"keys": page["data"], "more": page["next"], "first": not after}
    values |= {"fault": fault, "given": given or {}}
    values |= {"open": here.caller is WITHOUT_KEYS, "purposes": PURPOSES}
    return show(here, "keys.html", 400 if fault else 200, **values)


# ---- jobs and the bundle


@router.get("/jobs")
def jobs_page(here: Here, after: str = "") -> Response:
    """The jobs of all users, newest first."""
    page = admin_routes.list_jobs(here.http, after=after, limit=PAGE)
    values = {"jobs": page["data"], "more": page["next"], "first": not after}
    return show(here, "jobs.html", **values)


@router.get("/bundle")
def bundle_page(here: Here) -> Response:
    """The bundle in use, with its model card."""
    gateway = gateway_of_admin(here.http)
    deployment = gateway.deployment
    bundle, active = deployment.bundle, gateway.active_bundle
    values: dict[str, Any] = {"bundle": None, "gate": deployment.gate}
    settings = deployment.pipeline.settings
    names = ("retriever", "retrieved", "k", "samples", "temperature", "max_prompt_tokens")
    values["settings"] = [(name.replace("_", " "), getattr(settings, name)) for name in names]
    if bundle is not None:
        facts = [("set by", "hydra-llm bundles use" if active else "serve --bundle")]
        facts += [("folder", str(_folder(here))), ("weights", bundle.weights[:16])]
        values |= {
            "bundle": facts,
            "card": _card(_card_text(here, bundle)),
            "report": _facts(bundle.report),
        }
        values["page"] = _report(here) is not None
    return show(here, "bundle.html", **values)


@router.get("/bundle/report")
async def bundle_report(here: Here) -> Response:
    """The benchmark's report that lies beside the bundle."""
    gateway_of_admin(here.http)
    if (file := await run_sync(_report, here)) is None:
        raise ApiError(404, f"there is no {REPORT} in the bundle's folder")
    content = await run_sync(file.read_bytes)
    policy = {"content-security-policy": REPORT_POLICY}
    return Response(content, media_type="text/html; charset=utf-8", headers=policy)


def _card_text(here: Visit, bundle: "Bundle") -> str:
    """The card as it was written: the server's bundle holds no users."""
    folder = _folder(here)
    file = folder / CARD if folder else None
    return file.read_text(encoding="utf-8") if file and file.is_file() else bundle.card()


def _folder(here: Visit) -> Path | None:
    gateway = here.http.app.state.gateway
    given: Path | None = here.http.app.state.bundle
    return folder_of(gateway.active_bundle) if gateway.active_bundle else given


def _report(here: Visit) -> Path | None:
    folder = _folder(here)
    file = folder / REPORT if folder else None
    return file if file and file.is_file() else None


def _card(text: str) -> list[tuple[str, str]]:
    """The lines of a model card with what each is: title, item or text."""
    marks = {"# ": "title", "## ": "title", "- ": "item"}
    lines = []
    for line in filter(None, map(str.strip, text.split("\n"))):
        mark = next((mark for mark in marks if line.startswith(mark)), "")
        lines.append((marks.get(mark, "text"), line.removeprefix(mark)))
    return lines


def _facts(report: Any, place: str = "") -> list[tuple[str, str]]:
    """What a bundle's report says, a line for each value."""
    if not isinstance(report, dict):
        value = f"{report:.4g}" if isinstance(report, float) else str(report)
        return [(place, value)]
    return [
        fact
        for name, own in report.items()
        for fact in _facts(own, f"{place} › {name}" if place else str(name))
    ]
