"""Files that every rank asks for are written by one."""

import os
import pickle
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from tangora._checks import InputError

T = TypeVar("T")

_calls: Counter[str] = Counter()


def on_first_rank(write: Callable[[], T], path: Path, owner: str) -> T:
    """Call a function on rank 0, and let the other ranks wait for its result.

    Rank 0 waits for nobody, so that it may also be the only one that calls.

    Args:
        write: Writes files at ``path``.
        path: The place, the same on all ranks.
        owner: Name of the public function, for messages.

    Returns:
        What it returned, on every rank.

    Raises:
        InputError: On the other ranks, if rank 0 failed, or did not write within ``TANGORA_RANK_TIMEOUT`` seconds
            (an environment variable; default 600).
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return write()
    store: Any = dist.distributed_c10d._get_default_store()
    key = f"tangora/{owner}/{path}"
    _calls[key] += 1
    key = f"{key}/{_calls[key]}"
    if dist.get_rank() == 0:
        try:
            result = write()
        except BaseException as error:
            store.set(key, pickle.dumps((None, f"{type(error).__name__}: {error}")))
            raise
        store.set(key, pickle.dumps((result, None)))
        return result
    seconds = float(os.environ.get("TANGORA_RANK_TIMEOUT", "600"))
    try:
        store.wait([key], timedelta(seconds=seconds))
    except RuntimeError:
        raise InputError(
            f"rank 0 did not write {path} within {seconds:g} s: call {owner} on every rank, or on rank 0 alone"
        ) from None
    result, failure = pickle.loads(store.get(key))
    if failure is not None:
        raise InputError(f"rank 0 could not write {path}: {failure}")
    return result
