"""Folders that appear whole or not at all, written by one of the processes that want them."""

import errno
import itertools
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from tangora._checks import InputError, OtherRankError
from tangora.adapters.sharded import several_ranks

_T = TypeVar("_T")


def check_replaceable(target: Path, *, what: str, marker: str, known: Callable[[str], bool]) -> None:
    """Refuse to replace a folder that holds anything but what is to be written."""
    if not target.exists():
        return
    held = {entry.name for entry in target.iterdir()} if target.is_dir() else set()
    if not target.is_dir() or (held and marker not in held):
        raise InputError(f"{target} exists but is not a saved {what}; choose another path")
    if unknown := sorted(name for name in held if not known(name)):
        raise InputError(
            f"{target} holds {unknown[0]} in addition to the {what}; it would be deleted: choose another path"
        )


@contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """Make a temporary folder on the same file system, and remove it in any case."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield scratch / "new"  # mkdtemp's own folder is readable by its owner only
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def replace_folder(source: Path, target: Path) -> None:
    """Move a folder to its place; what was there comes back if that fails."""
    for attempt in itertools.count():
        old = source.with_name(f"old-{attempt}")
        try:
            with suppress(FileNotFoundError):
                target.rename(old)
            source.rename(target)
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                continue  # another process was quicker: its folder is replaced in turn
            if old.exists() and not target.exists():
                old.rename(target)
            raise
        else:
            return


def first_rank_writes(path: str | os.PathLike[str], write: Callable[[], _T]) -> _T:
    """Let rank 0 write, while the other ranks wait for its result; without ``torch.distributed``, just write.

    Rank 0 waits for nobody, so that it may also call alone.
    """
    if not several_ranks():
        return write()
    store, target = dist.distributed_c10d._get_default_store(), os.path.abspath(path)
    key = _place_in_program(store, target)
    return _announced(store, key, target, write) if dist.get_rank() == 0 else _awaited(store, key, target)


def _place_in_program(store: Any, target: str) -> str:
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
        raise OtherRankError(failure)
    return result
