"""Runs of the benchmark learn quickly: the choice of the regularization is no subject here."""

import pytest

from hydra_llm.bench import experiment
from tests.learning import quick_learn


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "learn", quick_learn)
