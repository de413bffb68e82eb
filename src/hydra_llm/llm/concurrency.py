"""Many calls at once, and the one way from sync code to async code."""

from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import anyio
import sniffio

from hydra_llm.errors import BudgetExceeded, LLMError, LLMRefused
from hydra_llm.llm.limiter import Concurrency, Gate

T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[int, int], None]  # (done, total)
StageProgress = Callable[[str, int, int], None]  # (stage, done, total)
PARALLEL = 8  # calls at once of an LLM that says nothing about it, and questions at least


def at_once(llm: object, concurrency: Concurrency = "auto") -> Callable[[], int]:
    """How many questions may be open, for `map_calls`: so many, or as many as the LLM takes calls
    now.
    """
    if concurrency != "auto":
        return lambda: concurrency
    return lambda: max(PARALLEL, getattr(llm, "parallel", 0))


async def map_calls(
    function: Callable[[T], Awaitable[R]],
    items: Sequence[T],
    limit: int | Callable[[], int],
    progress: Progress | None = None,
) -> list[R | LLMError]:
    """Results in the items' order, an `LLMError` where a call failed; `limit` at once, which may
    change meanwhile.
    Raises BudgetExceeded, and LLMRefused of the first call unless it is for its length.
    """
    results: dict[int, R | LLMError] = {}
    fatal: list[LLMError] = []
    gate = Gate(limit if callable(limit) else lambda: limit)

    async def one(index: int, group: anyio.abc.TaskGroup) -> None:
        async with gate:
            if fatal:
                return
            try:
                results[index] = await function(items[index])
            except LLMError as error:
                results[index] = error
                refused = isinstance(error, LLMRefused) and error.fits is None and len(results) == 1
                if refused or isinstance(error, BudgetExceeded):
                    fatal.append(error)
                if refused:
                    group.cancel_scope.cancel()
        if progress is not None:
            progress(len(results), len(items))

    async with anyio.create_task_group() as group:
        for index in range(len(items)):
            group.start_soon(one, index, group)
    if fatal:
        raise fatal[0]
    return [results[index] for index in range(len(items))]


async def gathered(functions: Sequence[Callable[[], Awaitable[R]]]) -> list[R]:
    """Results of these at the same time, in their order."""
    results: dict[int, R] = {}

    async def one(index: int) -> None:
        results[index] = await functions[index]()

    async with anyio.create_task_group() as group:
        for index in range(len(functions)):
            group.start_soon(one, index)
    return [results[index] for index in range(len(functions))]


def run_sync(function: Callable[[], Awaitable[R]]) -> R:
    """Run an async function from sync code; where a loop runs (a notebook), in another thread."""
    try:
        sniffio.current_async_library()
    except sniffio.AsyncLibraryNotFoundError:
        return anyio.run(function)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(anyio.run, function).result()
