"""The commands' tests share one encoder."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def one_encoder(shared_minilm: None) -> None:
    """Every bundle that a command loads has the same MiniLM."""
