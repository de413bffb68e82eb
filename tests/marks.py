"""Which cases of a parametrized test are left to `make test`."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_except(values: Iterable[Any], *fast: Any) -> list[Any]:
    """The values as parameters, all but `fast` marked slow; each of `fast` must be there."""
    values = list(values)
    assert set(fast) <= set(values), f"{fast} are not all among {values}"
    return [v if v in fast else pytest.param(v, marks=pytest.mark.slow) for v in values]
