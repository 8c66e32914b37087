"""Readings that all ranks make together: meeting before them, failing together within them, and sums over them."""

import contextlib
import functools
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from tangora._checks import InputError, check_number
from tangora.adapters.sharded import several_ranks

P = ParamSpec("P")
T = TypeVar("T")

_WARN_AFTER = 10.0
_TIMEOUT_VARIABLE, _TIMEOUT = "TANGORA_RANK_TIMEOUT", 120.0

_functions: list[str] = []  # public functions in progress, the outermost first
_meetings: Counter[str] = Counter()  # held so far in the present process group
_group: list[object] = []


def collective(function: Callable[P, T]) -> Callable[P, T]:
    """Let messages about missing ranks name a public function, the outermost one in progress."""

    @functools.wraps(function)
    def named(*args: P.args, **kwargs: P.kwargs) -> T:
        _functions.append(function.__name__)
        try:
            return function(*args, **kwargs)
        finally:
            _functions.pop()

    return named


def sum_over_ranks(*tensors: Tensor) -> None:
    """Add up tensors over all ranks in place, where ``torch.distributed`` runs."""
    if several_ranks():
        for tensor in tensors:
            dist.all_reduce(tensor)


@contextlib.contextmanager
def failing_together(what: str, device: torch.device | None = None) -> Iterator[None]:
    """Begin a reading with all ranks, and raise on all of them what one raises, so that none waits for another."""
    if several_ranks():
        _meet(_functions[0] if _functions else what)
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    failures = torch.tensor(float(failure is not None), device=device)
    sum_over_ranks(failures)
    if failure is not None:
        raise failure
    if failures:
        raise InputError("another rank failed to read its batches; see the error message of that rank")


def _meet(what: str) -> None:
    store = _get_default_store()
    if _group != [store]:  # another process group counts from the beginning
        _group[:] = [store]
        _meetings.clear()
    prefix = f"tangora/{what}/{_meetings[what]}"
    keys = [f"{prefix}/{rank}" for rank in range(dist.get_world_size())]
    own = keys[dist.get_rank()]
    store.set(own, "here")
    timeout = _timeout()
    if not _arrive(store, keys, min(_WARN_AFTER, timeout)):
        warnings.warn(f"{what} waits for {_missing(store, keys)}: call it on every rank", stacklevel=2)
        if not _arrive(store, keys, timeout - _WARN_AFTER):
            missing = _missing(store, keys)
            store.delete_key(own)
            raise InputError(
                f"{what} must run on all ranks together, but {missing} did not call it within "
                f"{timeout:g} seconds: call it on every rank, or increase {_TIMEOUT_VARIABLE}"
            )
    _meetings[what] += 1


def _arrive(store: dist.Store, keys: list[str], seconds: float) -> bool:
    if seconds <= 0:
        return False
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except RuntimeError:
        return False
    return True


def _missing(store: dist.Store, keys: list[str]) -> str:
    missing = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
    return f"rank{'s' if len(missing) > 1 else ''} {', '.join(missing) or '(all ranks have arrived now)'}"


def _timeout() -> float:
    given = os.environ.get(_TIMEOUT_VARIABLE, _TIMEOUT)
    try:
        seconds = float(given)
    except ValueError:
        raise InputError(f"{_TIMEOUT_VARIABLE} must be a number of seconds; got {given!r}") from None
    check_number(_TIMEOUT_VARIABLE, seconds, low=0, open_low=True)
    return seconds
