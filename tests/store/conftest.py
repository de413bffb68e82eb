"""A new store for each test, in each of the databases (`url`, tests/conftest.py)."""

from collections.abc import Iterator

import pytest

from hydra_llm.store.store import Store


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    opened = Store(url)
    yield opened
    opened.close()
