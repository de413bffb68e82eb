"""Processes of one learning, as `accelerate launch` starts them, and what each of them does.

Process 0 learns as it would alone. At gradient steps it sends what is trained to the others (its
followers); all take the same steps, each on its portion of a batch, with the sum of the gradients.
Followers read no data, ask no LLM, write nothing and say nothing.
"""

import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from hydra_llm.errors import HydraError, SettingsError
from hydra_llm.extras import require

if TYPE_CHECKING:
    from torch import Tensor

WAIT = timedelta(days=30)  # followers wait while process 0 labels and fits
APART = 2**32  # between the seeds of two processes
LOST = "another process ended: what was labelled is kept, and the same command goes on"
ALONE = "one process was started: give `accelerate launch` --multi_gpu, on processors too"
_joined = False


class Lost(HydraError):
    """Another process has ended."""


def size() -> int:
    """How many processes a launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank() -> int:
    """The place of this process among them; 0 learns."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def follows() -> bool:
    """Whether this process is a follower; then it returns when process 0 has learned. Raises
    MissingExtra: there is a launch, and accelerate is not installed.
    """
    if size() > 1:
        require("accelerate", "accelerate launch")
    if rank() == 0:
        return False
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_DFL)  # at once, also while it waits
    logging.disable()
    try:
        with _group():
            while (work := _sent(None)) is not None:
                work()
    except Lost:
        pass  # process 0 has said so
    return True


@contextmanager
def leading(engine: str, *, steps: bool, say: Callable[[str], None]) -> Iterator[None]:
    """Process 0 of a launch learns in this block; nothing happens without a launch. `steps`:
    whether there will be gradient steps; `say` gets a line about what the processes do.

    Raises SettingsError: another engine is asked for too, or the launch has started no other
    process.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and size() == 1:
        raise SettingsError(f"accelerate: {ALONE}")
    if size() == 1:
        yield
        return
    if engine != "local":
        fix = "leave `accelerate launch` out, or take engine=local"
        raise SettingsError(f"engine={engine} and accelerate spread work in two ways: {fix}")
    with _group():
        shared = "take the gradient steps together; process 0 does the rest, the others wait"
        alone = "have no gradient steps to share here (a convex head, a frozen encoder): process 0"
        say(f"accelerate: {size()} processes {shared if steps else f'{alone} does all'}")
        yield
        _sent(None)


def send(work: Callable[[], None]) -> None:
    """Let each follower do `work`, a copy of it with all that it holds."""
    if _joined and rank() == 0:
        _sent(work)


def portion(index: "Tensor") -> "Tensor":
    """The part of a batch's groups [G] that is this process's."""
    return index[rank() :: size()] if _joined else index


def own_seed(seed: int) -> int:
    """A seed for what differs between the portions, such as dropout."""
    return seed + APART * rank() if _joined else seed


def summed(number: float) -> float:
    """The sum of the processes' numbers."""
    if not _joined:
        return number
    import torch

    total = torch.tensor([number], dtype=torch.float64)
    _all_reduce(total)
    return float(total)


def sum_gradients(shared: Sequence["Tensor"], own: "Tensor", rows: "Tensor") -> None:
    """Sum the processes' gradients of `shared` tensors, and of these rows of `own` [U, P], whose
    other rows have none. A tensor without a gradient in any process stays without.
    """
    if not _joined:
        return
    import torch

    grads = [tensor.grad for tensor in shared] + [None if own.grad is None else own.grad[rows]]
    there = torch.tensor([float(grad is not None) for grad in grads])
    like = [*shared, own.detach()[rows]]
    parts = [
        torch.zeros(tensor.numel()) if grad is None else grad.flatten()
        for tensor, grad in zip(like, grads, strict=True)
    ]
    flat = torch.cat([there, *parts])
    _all_reduce(flat)
    there, *parts = flat.split([len(there), *map(len, parts)])
    for tensor, known, part in zip(shared, there[:-1], parts[:-1], strict=True):
        tensor.grad = part.view_as(tensor) if known else None
    if there[-1]:
        own.grad = torch.zeros_like(own) if own.grad is None else own.grad
        own.grad[rows] = parts[-1].view_as(like[-1])


@contextmanager
def _group() -> Iterator[None]:
    """Among the processes of the launch, which find each other here."""
    global _joined
    from accelerate import PartialState
    from torch import distributed

    with _lost():
        PartialState(cpu=True, timeout=WAIT)
    _joined = True
    try:
        yield
    finally:
        _joined = False
        distributed.destroy_process_group()  # others who wait for this one hear of it


@contextmanager
def _lost() -> Iterator[None]:
    """Raise `Lost` in place of what a broken connection raises."""
    try:
        yield
    except RuntimeError as error:
        raise Lost(f"accelerate: {LOST} ({' '.join(str(error).split())[:100]})") from None


def _all_reduce(tensor: "Tensor") -> None:
    from torch import distributed

    with _lost():
        distributed.all_reduce(tensor)


def _sent(work: Callable[[], None] | None) -> Any:
    """What process 0 sends to all: work, or None at the end."""
    from torch import distributed

    held: list[Any] = [work]
    with _lost():
        distributed.broadcast_object_list(held)
    return held[0]
