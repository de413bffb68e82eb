"""What an upstream refuses because of the request itself is no failure of the server: it is in no
count of failures, and the log calls nothing failed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hydra_llm.gateway.upstream import UpstreamError
from hydra_llm.store.store import Store

from .conftest import World, records_of, running

pytestmark = pytest.mark.anyio
QUESTION = "the battle for the bridge in winter"
FAILURES = "hydra_failures_total{"


def refuse(world: World, status: int, *, only_records: bool = False) -> None:
    """Have the upstream refuse every request, or those with more than the caller's message."""
    complete = world.upstream.complete

    async def refused(body: Mapping[str, Any]) -> Any:
        if only_records and len(body["messages"]) == 1:
            return await complete(body)
        raise UpstreamError(status, "no such model, or no such field")

    world.upstream.complete = refused  # type: ignore[method-assign]


async def figures(world: World) -> str:
    return str((await world.http.get("/metrics")).text)


@pytest.mark.parametrize("status", [400, 404, 413, 422])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_is_refused_is_not_a_failure(
    store: Store,
    bundles: dict[str, Path],
    caplog: pytest.LogCaptureFixture,
    status: int,
    samples: int,
    stream: bool,
) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store, bundles["tags"], samples=samples) as world:
        refuse(world, status)
        for user in ("ada", None):
            answer = await world.ask(QUESTION, user, stream=stream)
            early = not stream or samples == 1 or user is None  # else the status is out already
            assert answer.status_code == (status if early else 200)
            assert "no such model" in answer.text
        assert FAILURES not in await figures(world)
    assert "failed" not in caplog.text


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
async def test_records_that_are_refused_are_left_out_and_counted(
    store: Store, bundles: dict[str, Path], samples: int, stream: bool
) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store, bundles["tags"], samples=samples) as world:
        refuse(world, 400, only_records=True)
        assert (await world.ask(QUESTION, stream=stream)).status_code == 200
        counted = [line for line in (await figures(world)).splitlines() if FAILURES in line]
        assert counted == ['hydra_failures_total{part="records"} 1.0']


@pytest.mark.parametrize("status", [401, 403, 408, 429, 500, 503])
async def test_other_refusals_of_all_candidates_are_failures(
    store: Store, bundles: dict[str, Path], status: int
) -> None:
    """The server's key, a rate, a time: nothing that the caller can mend in the request."""
    store.add_records("ada", records_of("ada"))
    async with running(store, bundles["tags"], samples=3) as world:
        refuse(world, status)
        assert (await world.ask(QUESTION)).status_code == status
        assert 'hydra_failures_total{part="candidates"}' in await figures(world)
