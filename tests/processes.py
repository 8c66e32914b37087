"""Processes of a test's own, forked from a server that has imported what takes long; several are joined by gloo."""

import multiprocessing
import os
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# the server of the tests is that of a comparison's runs
multiprocessing.set_forkserver_preload(["tangora.experiments.comparison.worker"])


def process(work: Callable[..., Any], *arguments: Any) -> multiprocessing.Process:
    """Start a process that calls a function."""
    started = multiprocessing.get_context("forkserver").Process(target=work, args=arguments)
    started.start()
    return started


def in_processes(work: Callable[..., Any], folder: Path, world: int, *arguments: Any) -> list[Any]:
    """Return what ``work(rank, *arguments)`` returns in each of several processes."""
    (folder / "meet").unlink(missing_ok=True)
    mp.start_processes(
        _process, args=(world, str(folder), work, arguments), nprocs=world, start_method="forkserver"
    )
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
