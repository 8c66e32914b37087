"""Processes that train together: what the first of them does for all, what each does of the whole, and shared errors.

Without ``torch.distributed``, or with one process, everything here is the plain call. With several, all processes come
to the same calls in the same order.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from tangora._checks import InputError, OtherRankError
from tangora.adapters.sharded import several_ranks

T = TypeVar("T")


def num_ranks() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if several_ranks() else 1


def rank() -> int:
    """Return the number of this process; the first is 0."""
    return dist.get_rank() if several_ranks() else 0


def is_first() -> bool:
    """Tell whether this is the process that writes files and shows progress."""
    return rank() == 0


def from_first(work: Callable[[], T]) -> T:
    """Let the first process do something, and give its result, or its error, to all."""
    if not several_ranks():
        return work()
    found: list[Any] = [None, None]
    failure: Exception | None = None
    if is_first():
        try:
            found[0] = work()
        except Exception as error:
            failure, found[1] = error, _said(error)
    dist.broadcast_object_list(found)
    if failure is not None:
        raise failure
    if found[1] is not None:
        raise OtherRankError(found[1])
    return found[0]


@contextlib.contextmanager
def failing_as_one() -> Iterator[None]:
    """Raise on all processes what one of them raises within; nothing within may wait for another process."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    found = gathered(None if failure is None else _said(failure))
    if failure is not None:
        raise failure
    if others := [each for each in found if each is not None]:
        raise OtherRankError(others[0])


def gathered(part: T) -> list[T]:
    """Return what every process gives, in their order."""
    if not several_ranks():
        return [part]
    found: list[Any] = [None] * num_ranks()
    dist.all_gather_object(found, part)
    return found


def dealt(items: Sequence[T]) -> list[T]:
    """Return the items of this process: they are dealt like cards, and few go to all."""
    items = list(items)
    return items[rank() :: num_ranks()] if len(items) >= num_ranks() else items


def dealt_alike(items: Sequence[T]) -> Iterator[tuple[T, bool]]:
    """Yield the items of this process, equally many on each: an item that only fills up comes with ``False``.

    A forward pass of a sharded model is one of all processes.
    """
    items = list(items)
    for turn in range(math.ceil(len(items) / num_ranks())):
        index = turn * num_ranks() + rank()
        yield (items[index], True) if index < len(items) else (items[-1], False)


def check_alike(found: dict[str, Any]) -> None:
    """Raise unless all processes have found the same."""
    for number, other in enumerate(gathered(found)):
        for key, value in found.items():
            if other[key] != value:
                raise InputError(
                    f"{key} differs between processes: {value!r} in process {rank()} and {other[key]!r} in "
                    f"process {number}; give all machines the same files and the same command"
                )


def _said(error: Exception) -> str:
    said = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
    return said if isinstance(error, InputError) or is_first() else f"process {rank()}: {said}"
