"""Parts of work as tasks of Ray (docs/how-to/several-machines.md). Nothing else imports ray.

Ray does a part again whose worker died. Workers that label ask the LLM of the process that learns:
its cache, budget and limits hold for all, and a part that is done again finds its answers there.
"""

from hydra_llm.extras import require

require("ray", "engine=ray")

import asyncio
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import Any, TypeVar

import anyio

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray reports to its makers
import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hydra_llm import __version__
from hydra_llm.errors import BudgetExceeded, HydraError, LLMError, LLMRefused, SettingsError
from hydra_llm.llm.base import ChatLLM, Sampling
from hydra_llm.llm.concurrency import Progress, map_calls
from hydra_llm.pipeline import UserPipeline
from hydra_llm.training.engine import Asks
from hydra_llm.types import Generation, Message

log = logging.getLogger(__name__)
S = TypeVar("S")
P = TypeVar("P")
R = TypeVar("R")
QUESTIONS = 32  # of a part at most: so many are open at once in each worker
IN_PROCESS = ("gguf", "openvino")  # LLMs that no other process can ask
SERVED = "serve it and give openai:MODEL@URL, and workers gain more than retrieval and parsing"
AHEAD = 2  # parts for each worker that are sent at once: more would only fill memory
RETRIES = 5  # how often a part is done again whose worker died
OPEN = 10_000  # questions at most that wait for an answer
SAID = 300  # characters of what Ray says
CONNECT = 5.0  # seconds to reach a cluster


class RayEngine:
    """The workers of a cluster, one for each of its CPUs."""

    spreads = True

    def __init__(self, address: str = ""):
        _connect(address)
        self.workers = max(1, int(ray.cluster_resources().get("CPU", 1)))

    def each(self, function: Callable[[S, P], R], shared: S, parts: Iterable[P]) -> Iterator[R]:
        held, sent = [_put(shared)], deque[Any]()
        try:
            for part in parts:
                sent.append(_task.remote(__version__, function, held, part))
                if len(sent) >= AHEAD * self.workers:
                    yield _got(sent.popleft())
            while sent:
                yield _got(sent.popleft())
        finally:
            _cancel(sent)

    async def ask(
        self,
        function: Asks[P, R],
        pipeline: UserPipeline,
        items: Sequence[P],
        progress: Progress | None = None,
    ) -> list[R | LLMError]:
        asked = _Asked(pipeline.llm)
        if (kind := asked.remote.identity.get("kind")) in IN_PROCESS:
            log.warning("engine=ray: %s answers in this process alone: %s", kind, SERVED)
        settings = pipeline.settings.model_copy(update={"engine": "local"})
        remote = replace(pipeline, llm=asked.remote, settings=settings, records={}, heads={})
        size = max(1, min(QUESTIONS, ceil(len(items) / self.workers)))
        parts = (items[start : start + size] for start in range(0, len(items), size))
        results, raised = list[R | LLMError](), list[Exception]()

        async def collect(group: anyio.abc.TaskGroup) -> None:
            held, sent = [_put(remote)], deque[Any]()
            try:
                for part in parts:
                    sent.append(_task.remote(__version__, partial(_answered, function), held, part))
                while sent:
                    results.extend(await _awaited(sent.popleft()))
                    if progress is not None:
                        progress(len(results), len(items))
            except Exception as error:
                raised.append(error)
            finally:
                _cancel(sent)
            group.cancel_scope.cancel()

        try:
            async with anyio.create_task_group() as group:
                group.start_soon(asked.serve, group)
                await collect(group)
        finally:
            ray.kill(asked.mailbox)
        if asked.fatal or raised:
            raise asked.fatal or raised[0]
        return results


def _do(version: str, function: Callable[[S, P], R], held: Sequence[Any], part: P) -> R:
    """A part, in a worker."""
    if version != __version__:
        raise SettingsError(
            f"engine=ray: a worker has hydra-llm {__version__}, not {version}: install the same"
        )
    return function(_shared(held[0]), part)


_task: Any = ray.remote(max_retries=RETRIES)(_do)
_latest: tuple[Any, Any] = (None, None)


def _shared(ref: Any) -> Any:
    """What parts share, unpickled once in each worker."""
    global _latest
    if _latest[0] != ref:
        _latest = ref, ray.get(ref)
    return _latest[1]


def _answered(
    function: Asks[P, R], pipeline: UserPipeline, items: Sequence[P]
) -> list[R | LLMError]:
    """Questions of a part, all at once. Which refusal ends the run is not for one part to say."""

    async def one(item: P) -> R | LLMError:
        try:
            return await function(pipeline, item)
        except BudgetExceeded:
            raise
        except LLMError as error:
            return error

    return anyio.run(map_calls, one, items, len(items))


class _Mailbox:
    """Questions of workers on their way to the process that has the LLM."""

    def __init__(self) -> None:
        self.questions: asyncio.Queue[tuple[int, Any, Sampling]] = asyncio.Queue()
        self.answers: dict[int, asyncio.Future[Any]] = {}
        self.count = 0

    async def ask(self, messages: Any, sampling: Sampling) -> Any:
        self.count += 1
        number = self.count
        answer = self.answers[number] = asyncio.get_running_loop().create_future()
        await self.questions.put((number, messages, sampling))
        return await answer

    async def take(self) -> list[tuple[int, Any, Sampling]]:
        """The questions that have come since, at least one."""
        first = await self.questions.get()
        return [first, *(self.questions.get_nowait() for _ in range(self.questions.qsize()))]

    async def answer(self, number: int, answer: Any) -> None:
        self.answers.pop(number).set_result(answer)


@dataclass(frozen=True)
class _RemoteLLM:
    """The LLM of the process that learns, as a worker sees it."""

    identity: Mapping[str, Any]
    mailbox: Any

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        answer = await self.mailbox.ask.remote(tuple(map(dict, messages)), sampling)
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    async def aclose(self) -> None:
        """Nothing to release."""


class _Asked:
    """Answers the questions of workers by an LLM of this process."""

    def __init__(self, llm: ChatLLM):
        self.llm, self.answered = llm, 0
        self.fatal: LLMError | None = None
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {"num_cpus": 0, "max_concurrency": OPEN, "scheduling_strategy": here}
        self.mailbox = ray.remote(_Mailbox).options(**options).remote()
        self.remote = _RemoteLLM(dict(llm.identity), self.mailbox)

    async def serve(self, group: anyio.abc.TaskGroup) -> None:
        while True:
            for question in await self.mailbox.take.remote():
                group.start_soon(self._answer, group, *question)

    async def _answer(
        self, group: anyio.abc.TaskGroup, number: int, messages: Any, sampling: Sampling
    ) -> None:
        answer: Generation | Exception
        try:
            answer = await self.llm.generate(messages, sampling)
        except Exception as error:  # of any kind: the worker raises it, and so does its part
            answer = error
        self.answered += 1
        # A wrong key: every other call would fail as well.
        if self.answered == 1 and isinstance(answer, LLMRefused) and answer.fits is None:
            self.fatal = answer
            group.cancel_scope.cancel()
        await self.mailbox.answer.remote(number, answer)


def _connect(address: str) -> None:
    """Raises SettingsError: the cluster cannot be reached, or this machine is not part of it."""
    # Ray prints what it says of dead workers to standard output, where a command's JSON goes.
    ray._private.worker.print_to_stdstream = _log_of_ray
    if ray.is_initialized():
        return
    if address:
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), CONNECT).close()
        except (OSError, OverflowError) as error:
            fix = "start it by `ray start --head`, or take engine=ray for this machine alone"
            fault = f"no cluster can be reached there ({error})"
            raise SettingsError(f"engine=ray:{address}: {fault}: {fix}") from None
    quiet = {"logging_level": "ERROR", "log_to_driver": False}
    try:
        ray.init(address or None, **quiet)
    except (RayError, OSError, RuntimeError, ValueError) as error:
        fix = "run `ray start --address=HOST:PORT` on this machine, or take engine=ray alone"
        said = " ".join(str(error).split())
        raise SettingsError(f"engine=ray: cannot join the cluster ({said}): {fix}") from None


def _log_of_ray(data: Mapping[str, Any], ignore_prefix: bool = False) -> None:
    log.warning("engine=ray: %s", " ".join(" ".join(data["lines"]).split())[:SAID])


def _put(shared: Any) -> Any:
    try:
        return ray.put(shared)
    except TypeError as error:
        fault = f"cannot be sent to workers ({' '.join(str(error).split())[:200]})"
        raise SettingsError(f"engine=ray: {fault}: take engine=local") from None


def _got(ref: Any) -> Any:
    try:
        return ray.get(ref)
    except RayError as error:
        raise _cause(error) from None


async def _awaited(ref: Any) -> Any:
    try:
        return await ref
    except RayError as error:
        raise _cause(error) from None


def _cause(error: RayError) -> Exception:
    """What a part raised; in one line where its worker was lost too often."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        return cause if isinstance(cause, Exception) else error
    said = " ".join(str(error).split())[:SAID]
    fix = "the same command goes on; `ray status` and Ray's logs say more"
    return HydraError(f"engine=ray: workers of a part were lost ({said}): {fix}")


def _cancel(refs: Iterable[Any]) -> None:
    for ref in refs:
        ray.cancel(ref, force=True)
