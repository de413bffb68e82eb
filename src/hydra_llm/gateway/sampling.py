"""Several candidates for one request: the caller's own call and samples, until a deadline. Samples
of all requests share the endpoint's limiter (llm/limiter.py); the caller's own call never waits.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hydra_llm.gateway.spend import drawing
from hydra_llm.gateway.telemetry import Telemetry
from hydra_llm.gateway.upstream import Upstream, UpstreamError, learn_samples
from hydra_llm.llm.endpoint import CapabilityCache
from hydra_llm.llm.limiter import Limiter, Sent

Body = dict[str, Any]


class CandidateSampler:
    """Asks an upstream for candidates, in requests that its models are known to take."""

    def __init__(self, telemetry: Telemetry, deadline: float):
        self._telemetry, self._deadline = telemetry, deadline
        self._capabilities = CapabilityCache()

    async def sample(
        self,
        upstream: Upstream,
        body: Body,
        count: int,
        temperature: float,
        sample_if: Callable[[Body], bool] | None = None,
        beside: Sequence[Any] = (),
    ) -> tuple[list[Body], int]:
        """Completions with the caller's own choices first, an answer to each of the messages
        `beside` at temperature 0, and samples, `count` together; and how many of the first choices
        are of temperature 0. A `count` of 1 is the caller's own request alone, whatever its `n`.

        `temperature` is the samples', unless the caller's own is higher. Their seed is the caller's
        plus 1, not to repeat the caller's answer. Where `sample_if` is given they are drawn after
        the caller's own answer, if it is true of that. `UpstreamError` if none came in time.
        """
        if count == 1:  # the caller's own request has no deadline
            bare = {**without(body, "stream_options"), "stream": False}
            return [await upstream.complete(bare)], 0
        own = int(body.get("n") or 1)
        bodies = self._bodies(body, count - own, temperature, beside)
        if sample_if is None:
            results = await self._complete(upstream, bodies, own)
        else:
            results = [await upstream.complete(bodies[0])]
            bodies = bodies if sample_if(results[0]) else bodies[:1]
            results += await self._complete(upstream, bodies[1:], own=0)
        learn_samples(self._capabilities, bodies[-1], results)
        self._count_failed(results)
        completions, greedy, ahead = [], 0, True
        for sent, result in zip(bodies, results, strict=True):
            if isinstance(result, UpstreamError):
                continue
            completions.append(result)
            ahead = ahead and sent.get("temperature") == 0  # endpoints sample where none is given
            greedy += len(result["choices"]) * ahead
        if not completions:
            raise results[0]
        return completions, greedy

    def _count_failed(self, results: Sequence[Any]) -> None:
        """Count the candidates that failed, unless all did by the caller's own mistake."""
        failed = [own for own in results if isinstance(own, UpstreamError)]
        if len(failed) < len(results) or not all(own.is_callers for own in failed):
            for own in failed:
                self._telemetry.failed("candidates", own)

    def _bodies(
        self, body: Body, more: int, temperature: float, beside: Sequence[Any]
    ) -> list[Body]:
        """The caller's own request, those with other messages, and those for the samples: `more`
        answers beside the caller's own.
        """
        first = without(body, "stream", "stream_options")
        if more < 1:
            return [first]
        known, single = self._capabilities.of(str(body.get("model"))), without(first, "n")
        warms = "temperature" not in known.refused
        cold = {"temperature": 0} if warms else {}
        others = [{**single, "messages": messages, **cold} for messages in beside[:more]]
        samples, drawn = more - len(others), dict(single)
        if isinstance(first.get("seed"), int):
            drawn["seed"] = first["seed"] + 1
        if warms:
            drawn["temperature"] = max(float(first.get("temperature") or 0.0), temperature)
        if known.native_n and samples > 0:
            return [first, *others, {**drawn, "n": samples}]
        seed = drawn.get("seed")
        seeds = [{"seed": seed + i} if isinstance(seed, int) else {} for i in range(samples)]
        return [first, *others, *({**drawn, **own} for own in seeds)]

    async def _complete(self, upstream: Upstream, bodies: list[Body], own: int) -> list[Any]:
        """Completions or `UpstreamError`s in the bodies' order, as of the deadline."""
        late = UpstreamError(504, "the upstream did not answer before the deadline")
        results: list[Any] = [late] * len(bodies)
        limiter, ends = upstream.limiter, asyncio.get_running_loop().time() + self._deadline

        async def complete(place: int, body: Body) -> None:
            is_own, sent = bool(own and place == 0), limiter and limiter.beside()
            drawing.set("request" if is_own else "samples")  # of this task alone
            try:
                if limiter is None or is_own:
                    results[place] = await upstream.complete(body)
                else:
                    results[place] = await _in_turn(limiter, upstream, body, ends)
            except UpstreamError as error:
                results[place] = error
                if limiter and sent and is_own:
                    _tell(limiter, sent, error)
            except Exception as error:  # the task is not awaited: asyncio would log its message
                message = f"the upstream's answer cannot be read ({type(error).__name__})"
                results[place] = UpstreamError(502, message)

        if not bodies:
            return []
        tasks = [asyncio.create_task(complete(*item)) for item in enumerate(bodies)]
        try:
            await asyncio.wait(tasks, timeout=self._deadline)
            arrived = [result for result in results if not isinstance(result, UpstreamError)]
            if sum(len(completion["choices"]) for completion in arrived) < own:
                # The caller's own request has as long as it would have had without a gateway.
                await tasks[0]
        finally:
            for task in tasks:
                task.cancel()
        return results


async def _in_turn(limiter: Limiter, upstream: Upstream, body: Body, ends: float) -> Any:
    """A completion as the limiter lets it be asked for, again after a 429 that will pass. Where the
    endpoint asks for a wait beyond the deadline `ends`, an `UpstreamError` comes at once.
    """
    loop, again = asyncio.get_running_loop(), False
    while True:
        if loop.time() + limiter.wait() >= ends:
            raise UpstreamError(429, "the upstream asks to wait beyond the deadline")
        async with limiter.request(again=again) as sent:
            try:
                completion = await upstream.complete(body)
                limiter.saw(sent, 200, {})
                return completion
            except UpstreamError as error:
                if not (again := _tell(limiter, sent, error)):
                    raise
            except asyncio.CancelledError:
                if loop.time() >= ends:  # else the client has left
                    limiter.timed_out(sent)
                raise


def _tell(limiter: Limiter, sent: Sent, error: UpstreamError) -> bool:
    """Tell the limiter of an error; whether the request may be sent again."""
    if error.status == 504:
        limiter.timed_out(sent)
    again = limiter.saw(sent, error.status, error.headers or {})
    return again and "insufficient_quota" not in map(error.body["error"].get, ("code", "type"))


def without(body: Mapping[str, Any], *names: str) -> Body:
    """A body without these fields."""
    return {name: value for name, value in body.items() if name not in names}
