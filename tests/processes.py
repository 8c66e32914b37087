"""Several processes on one machine: each runs the same function, joined by gloo, and saves what it found."""

import os
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_processes(work: Callable[..., Any], folder: Path, world: int, *arguments: Any) -> list[Any]:
    """Return what ``work(rank, *arguments)`` returns in each of several processes."""
    (folder / "meet").unlink(missing_ok=True)
    mp.spawn(_process, args=(world, str(folder), work, arguments), nprocs=world)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _process(rank: int, world: int, folder: str, work: Callable[..., Any], arguments: tuple) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), ACCELERATE_USE_CPU="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # asked for, though nobody calls there
    with joined(rank, world, folder):
        torch.save(work(rank, *arguments), f"{folder}/{rank}.pt")


@contextmanager
def joined(rank: int, world: int, folder: str | Path):
    """Be one of several processes that meet in a folder."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()
