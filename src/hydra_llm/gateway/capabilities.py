"""What each of an upstream's models takes: several answers at once, another temperature for
samples. Learned from its answers.

Kept per model and for some minutes only: no request, and no bad day of an upstream, changes for
good how others are asked.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hydra_llm.gateway.upstream import UpstreamError

SECONDS = 600.0
MODELS = 1000


@dataclass(frozen=True, slots=True)
class Capabilities:
    """How a model is asked for samples."""

    native_n: bool = True
    """By `n`; else each sample is a request of its own."""
    own_temperature: bool = True
    """At the gateway's temperature; else at the caller's."""
    until: float = 0.0


class CapabilityCache:
    """Of each model, what was seen within the last minutes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._of: OrderedDict[str, Capabilities] = OrderedDict()

    def of(self, body: Mapping[str, Any]) -> Capabilities:
        """How the model of a request is asked."""
        found = self._of.get(str(body.get("model")))
        return found if found is not None and found.until > self._clock() else Capabilities()

    def learn(self, body: Mapping[str, Any], made: Sequence[Any], wanted: int) -> None:
        """From what came of the caller's own request, first, and of the samples, last: completions
        or `UpstreamError`s.
        """
        first, last, before = made[0], made[-1], self.of(body)
        if (
            isinstance(first, UpstreamError) or wanted < 1 or "seed" in body
        ):  # a seed of the caller's may be what was refused
            return
        refused = isinstance(last, UpstreamError) and last.status in (400, 422)
        too_few = not isinstance(last, UpstreamError) and len(last["choices"]) < wanted
        if before.native_n and (refused or too_few):
            self._keep(body, replace(before, native_n=False))
        elif refused:
            self._keep(body, replace(before, own_temperature=False))

    def _keep(self, body: Mapping[str, Any], habit: Capabilities) -> None:
        self._of[str(body.get("model"))] = replace(habit, until=self._clock() + SECONDS)
        while len(self._of) > MODELS:
            self._of.popitem(last=False)
