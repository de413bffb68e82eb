"""`/metrics`: what is in it, how few labels have how few values; the dashboard and the alerts of
deploy/ name nothing that is not there.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from hydra_llm import __version__
from hydra_llm.errors import StoreError
from hydra_llm.gateway.auth import make_key
from hydra_llm.gateway.upstream import UpstreamError
from hydra_llm.store.store import Store
from tests.waiting import FOREVER, until

from .conftest import records_of, running
from .test_workers import children, served

DEPLOY = Path(__file__).parents[2] / "deploy"
FROM_PROMETHEUS = {"instance", "job", "le"}  # labels that it adds, and those of buckets
USED = re.compile(r"\b((?:hydra|process)_\w+)(?:\{([^}]*)\})?")


def samples_of(text: str) -> dict[str, set[str]]:
    """Names of samples → their labels' names."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


async def figures_of(store: Store, bundle: Path) -> str:
    """The figures of a gateway at which everything has happened."""
    store.add_records("ada", records_of("ada"))
    async with running(store, bundle, samples=2, user_limits="45 tokens/day") as world:
        answer = (await world.ask("a storm", model="gpt-4o")).json()
        liked = {"request_id": answer["id"], "rating": 1.0}
        assert (await world.http.post("/v1/feedback", json=liked)).status_code == 200
        await world.ask("a storm", "bob")
        world.upstream.faults = [UpstreamError(500, "down")]
        await world.ask("x", None)
        await world.http.post("/v1/users/ada/fit")
        complete = world.upstream.complete

        async def fails(body: Any) -> Any:
            if "temperature" in body:
                raise UpstreamError(500, "down")
            return {**await complete(body), "usage": None}

        world.upstream.complete = fails  # type: ignore[method-assign]
        assert (await world.ask("a storm")).status_code == 200
        assert (await world.ask("a storm")).status_code == 429
        world.app.state.gateway.ledger.flush()
        return (await world.http.get("/metrics")).text


@pytest.mark.anyio
async def test_dashboard_and_alerts_name_what_is_there(
    store: Store, bundles: dict[str, Path]
) -> None:
    text = await figures_of(store, bundles["tags"])
    there = samples_of(text)
    dashboard = json.loads((DEPLOY / "grafana" / "hydra-llm.json").read_text())
    alerts = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text())
    queries = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", ())]
    queries += [variable.get("definition", "") for variable in dashboard["templating"]["list"]]
    queries += [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]
    used = set[str]()
    for query in queries:
        names = USED.findall(query)
        used |= {name for name, _ in names}
        labels = {label for name, _ in names for label in there.get(name, ())} | FROM_PROMETHEUS
        for name, selector in names:
            assert name in there, (name, query)
            asked = set(re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", selector))
            assert asked <= there[name] | FROM_PROMETHEUS, query
        grouped = re.findall(r"by \(([^)]*)\)", query)
        assert {label.strip() for group in grouped for label in group.split(",")} <= labels, query
    own = {name for name in there if name.startswith("hydra_") and not name.endswith("_created")}
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in own}
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in used}
    assert families - shown == {"hydra_today_tokens", "hydra_key_today_tokens"}
    for secret in ('"ada"', "bob", "storm"):
        assert secret not in text


def test_the_dashboard_is_one_of_grafana() -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "hydra-llm.json").read_text())
    assert {"uid", "title", "schemaVersion", "panels", "templating", "time"} <= dashboard.keys()
    assert len(dashboard["uid"]) <= 40
    ids, taken = set[int](), set[tuple[int, int]]()
    for panel in dashboard["panels"]:
        assert panel["id"] not in ids
        ids.add(panel["id"])
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["title"]
        assert panel["description"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        references = [target["refId"] for target in panel["targets"]]
        assert references
        assert len(set(references)) == len(references)
        for target in panel["targets"]:
            assert target["expr"].count("(") == target["expr"].count(")")
            assert target["datasource"] == panel["datasource"]
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    said = set(re.findall(r"\$\{?([a-z]\w*)", json.dumps(dashboard)))
    assert said == variables


@pytest.mark.anyio
async def test_what_runs_and_what_is_in_the_store(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hydra_llm.gateway.state_metrics.KEPT_SECONDS", 0.0)
    keys = [make_key(store, admin=True) for _ in range(25)]
    for user in ("ada", "bob"):
        store.add_records(user, records_of(user, 1))
    store.add_job("job", "ada", "fit")
    async with running(store) as world:
        message = {"role": "user", "content": "x"}
        body = {"model": "gpt-4o", "messages": [message], "user": "eve"}
        for _, secret in keys:
            own = {"authorization": f"Bearer {secret}"}
            await world.http.post("/v1/chat/completions", json=body, headers=own)
        world.app.state.gateway.ledger.flush()
        text = (await world.http.get("/metrics")).text
        assert f'version="{__version__}"' in text
        assert "hydra_users 2.0" in text
        assert re.search(r'hydra_jobs\{state="(waiting|failed)"\} 1.0', text)
        assert 'hydra_today_cost{kind="request"} 0.000875' in text
        assert len(re.findall(r"^hydra_key_today_cost\{", text, re.MULTILINE)) == 20
        monkeypatch.setattr(Store, "user_and_job_counts", failing)
        text = (await world.http.get("/metrics")).text
        assert "hydra_users " not in text
        assert "hydra_build_info" in text


def failing(*_: Any) -> Any:
    raise StoreError("down")


@pytest.mark.slow
def test_figures_of_processes_are_those_of_all_workers(tmp_path: Path) -> None:
    where = ["--llm", "fake:echo", "--store", f"sqlite:///{tmp_path / 's.db'}"]
    with served(*where, "--workers", "2") as (process, at, _):
        until(lambda: len(children(process.pid)) == 2)
        body = {"model": "fake:echo", "messages": [{"role": "user", "content": "x"}]}

        def figures() -> dict[str, float]:
            assert httpx2.post(f"{at}/v1/chat/completions", json=body).status_code == 200
            text = httpx2.get(f"{at}/metrics", timeout=FOREVER).text
            families = text_string_to_metric_families(text)
            return {s.name: s.value for family in families for s in family.samples if not s.labels}

        resident = 0.0

        def both() -> bool:
            """Whether the figure is of about as much as the two have."""
            nonlocal resident
            resident = figures()["process_resident_memory_bytes"]
            pages = [
                int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                for pid in children(process.pid)
            ]
            whole = sum(pages) * os.sysconf("SC_PAGE_SIZE")
            return 0.8 * whole < resident < 1.25 * whole

        until(both)
