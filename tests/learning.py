"""Learning without the choice of the regularisation, for tests whose subject is what is done with
a bundle: the choice is most of what learning a small bundle costs.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hydra_llm.training.convex import Strengths


@contextmanager
def one_strength() -> Iterator[None]:
    """Try one strength of each kind instead of all their combinations."""
    with pytest.MonkeyPatch.context() as patch:
        tried = Strengths(ridges=(10.0,), side_ridges=(1.0,), precisions=(3.0,))
        patch.setattr("hydra_llm.training.convex.Strengths", lambda: tried)
        yield
