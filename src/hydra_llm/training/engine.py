"""Where the parts of learning and fitting are done: in this process, or by workers elsewhere.

Every engine does the same work on the same parts and gives the same results in the parts' order.
Caches of the LLM's answers, its budget and the files that are written stay with the caller.
"""

from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from typing import Protocol, TypeVar

from hydra_llm.errors import LLMError
from hydra_llm.llm.concurrency import Progress, at_once, map_calls
from hydra_llm.pipeline import UserPipeline

S = TypeVar("S")
P = TypeVar("P")
R = TypeVar("R")
Asks = Callable[[UserPipeline, P], Awaitable[R]]


class Engine(Protocol):
    """Does parts of work. Functions are of a module, arguments and results can be pickled."""

    spreads: bool  # whether parts are done at the same time, elsewhere

    def each(self, function: Callable[[S, P], R], shared: S, parts: Iterable[P]) -> Iterator[R]:
        """`function(shared, part)` of each part, in order. What a part raises is raised."""

    async def ask(
        self,
        function: Asks[P, R],
        pipeline: UserPipeline,
        items: Sequence[P],
        progress: Progress | None = None,
    ) -> list[R | LLMError]:
        """`function(pipeline, item)` of each item, which asks the pipeline's LLM of nothing but
        what is in the item; results and errors as of `map_calls`.
        """


class Local:
    """This process, as many questions at once as the LLM takes."""

    spreads = False

    def each(self, function: Callable[[S, P], R], shared: S, parts: Iterable[P]) -> Iterator[R]:
        return (function(shared, part) for part in parts)

    async def ask(
        self,
        function: Asks[P, R],
        pipeline: UserPipeline,
        items: Sequence[P],
        progress: Progress | None = None,
    ) -> list[R | LLMError]:
        limit = at_once(pipeline.llm, pipeline.settings.concurrency)
        return await map_calls(partial(function, pipeline), items, limit, progress)


@cache
def open_engine(name: str) -> Engine:
    """The engine of the setting `engine`. Raises MissingExtra or SettingsError: Ray is not
    installed, or its cluster cannot be reached.
    """
    if name == "local":
        return Local()
    from hydra_llm.training.ray_engine import RayEngine

    return RayEngine(name.partition(":")[2])
