"""One writer among processes that all want the same folder."""

import os
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from tangora._checks import InputError

_T = TypeVar("_T")


def first_rank_writes(path: str | os.PathLike[str], write: Callable[[], _T]) -> _T:
    """Let rank 0 write, while the other ranks wait for its result; without ``torch.distributed``, just write.

    Rank 0 waits for nobody, so that it may also call alone.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return write()
    store, target = dist.distributed_c10d._get_default_store(), os.path.abspath(path)
    key = _key(store, target)
    return _announced(store, key, target, write) if dist.get_rank() == 0 else _awaited(store, key, target)


def _key(store: Any, target: str) -> str:
    # Where a rank stands in the program: collectives so far, which all ranks have in common, and writings since then.
    # A plain count would go wrong after rank 0 has written something alone.
    try:
        world: Any = dist.group.WORLD
        step = world._get_sequence_number_for_group()
    except RuntimeError:  # a backend that does not count
        step = 0
    count = store.add(f"tangora/calls/{dist.get_rank()}/{step}/{target}", 1)
    return f"tangora/written/{step}/{count}/{target}"


def _announced(store: Any, key: str, target: str, write: Callable[[], _T]) -> _T:
    try:
        result = write()
    except BaseException as error:
        cause = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        store.set(key, pickle.dumps((None, f"rank 0 could not write {target}: {cause}")))
        raise
    store.set(key, pickle.dumps((result, None)))
    return result


def _awaited(store: Any, key: str, target: str) -> Any:
    try:
        store.wait([key])
    except RuntimeError as error:
        raise InputError(
            f"rank {dist.get_rank()} waited {store.timeout} for rank 0 to write {target}: call this on rank 0 too, "
            "with the same path, or on rank 0 alone"
        ) from error
    result, failure = pickle.loads(store.get(key))
    if failure is not None:
        raise InputError(failure)
    return result
