"""Several candidates for one request: the caller's own call and samples, until a deadline.
Knows no users and no scorer.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra_llm.gateway.telemetry import Telemetry
from hydra_llm.gateway.upstream import Upstream, UpstreamError, learn_samples
from hydra_llm.llm.endpoint import CapabilityCache

Body = dict[str, Any]


@dataclass(frozen=True)
class Sampled:
    """The completions that came in time, the caller's own first."""

    completions: list[dict[str, Any]]
    greedy: int
    """How many of the first choices are of temperature 0."""

    @property
    def choices(self) -> list[dict[str, Any]]:
        return [choice for completion in self.completions for choice in completion["choices"]]


class CandidateSampler:
    """Asks an upstream, as its models have been found to take requests."""

    def __init__(self, telemetry: Telemetry, deadline: float):
        self._telemetry, self._deadline = telemetry, deadline
        self._capabilities = CapabilityCache()

    async def sample(
        self, upstream: Upstream, body: Body, count: int, temperature: float
    ) -> Sampled:
        """The caller's own choices and samples, `count` together.

        `temperature` is the samples', unless the caller's own is higher. Their seed is the caller's
        plus 1: at the same seed and temperature they would repeat the caller's answer.

        Raises:
            UpstreamError: none came.
        """
        own = int(body.get("n") or 1)
        bodies = self._bodies(body, count - own, temperature)
        made = await self._complete(upstream, bodies, own)
        learn_samples(self._capabilities, bodies[-1], made)
        errors = [each for each in made if isinstance(each, UpstreamError)]
        for error in errors:
            self._telemetry.failed("candidates", error)
        good = [
            (sent, each)
            for sent, each in zip(bodies, made, strict=True)
            if not isinstance(each, UpstreamError)
        ]
        if not good:
            raise errors[0]
        greedy = sum(len(each["choices"]) for sent, each in good if is_greedy(sent))
        return Sampled([each for _, each in good], greedy)

    def _bodies(self, body: Body, samples: int, temperature: float) -> list[Body]:
        """The caller's own request, and those that bring so many samples."""
        first = without(body, "stream", "stream_options")
        if samples < 1:
            return [first]
        known, more = self._capabilities.of(str(body.get("model"))), dict(first)
        if isinstance(first.get("seed"), int):
            more["seed"] = first["seed"] + 1
        if "temperature" not in known.refused:
            more["temperature"] = max(float(first.get("temperature") or 0.0), temperature)
        return (
            [first, {**more, "n": samples}] if known.native_n else [first, *_singles(more, samples)]
        )

    async def _complete(self, upstream: Upstream, bodies: Sequence[Body], own: int) -> list[Any]:
        """Completions or `UpstreamError`s in the bodies' order, as of the deadline, with at least
        what the caller's own request brings.
        """
        late = UpstreamError(504, "the upstream did not answer before the deadline")
        made: list[Any] = [late] * len(bodies)

        async def complete(place: int) -> None:
            try:
                made[place] = await upstream.complete(bodies[place])
            except UpstreamError as error:
                made[place] = error
            except Exception as error:  # nobody awaits it: asyncio would log its message
                said = f"the upstream's answer cannot be read ({type(error).__name__})"
                made[place] = UpstreamError(502, said)

        tasks = [asyncio.create_task(complete(place)) for place in range(len(bodies))]
        try:
            await asyncio.wait(tasks, timeout=self._deadline)
            arrived = [each for each in made if not isinstance(each, UpstreamError)]
            if sum(len(each["choices"]) for each in arrived) < own:
                # The caller's own request has as long as it would have had without a gateway.
                await tasks[0]
        finally:
            for task in tasks:
                task.cancel()
        return made


def is_greedy(body: Mapping[str, Any]) -> bool:
    """Whether a request asks for temperature 0; endpoints sample where none is given."""
    return body.get("temperature") == 0


def without(body: Mapping[str, Any], *names: str) -> Body:
    """A body without these fields."""
    return {name: value for name, value in body.items() if name not in names}


def _singles(body: Body, count: int) -> list[Body]:
    seed, bare = body.get("seed"), without(body, "n")
    return [{**bare, "seed": seed + i} if isinstance(seed, int) else bare for i in range(count)]
