"""Whom a server has in memory is whom the store has."""

from types import SimpleNamespace

import pytest

from hydra_llm.gateway.user_cache import UserCache
from hydra_llm.store.store import Store
from hydra_llm.store.values import UserState

from .conftest import records_of, running

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("version", [2**60, 3])
def test_a_user_of_another_version_is_not_in_the_cache(
    store: Store, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add_records("ada", records_of("ada"))
    cache = UserCache(store, None, 10)
    user = cache.current("ada")
    assert user is not None
    assert cache.current("ada") is user
    monkeypatch.setattr(store, "state", lambda name: UserState(version, None))
    assert cache.current("ada") is not user


async def test_a_user_recreated_by_a_slow_clock_is_not_the_deleted_one(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another server, whose clock is late, deletes the user and takes new records."""
    store.add_records("ada", records_of("ada"))
    async with running(store) as world:
        assert (
            len(
                (await world.ask("a battle", personalization={"k": 64})).json()["personalization"][
                    "records"
                ]
            )
            > 1
        )
        other = Store(str(store.url))
        other.delete_user("ada")
        monkeypatch.setattr("hydra_llm.store.store.time", SimpleNamespace(time=lambda: 1e9))
        other.add_records("ada", records_of("ada", 1))
        other.close()
        monkeypatch.undo()
        details = (await world.ask("a battle", personalization={"k": 64})).json()["personalization"]
        assert details["records"] == ["r0"]
