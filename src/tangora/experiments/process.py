"""The processes that a command runs in: one, or several of a launcher; and messages in a file of the output folder."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState, PartialState
from torch.distributed.distributed_c10d import _get_default_store

from tangora._checks import InputError, OtherRankError, on_one_line
from tangora._launched import launched
from tangora._names import USER_LOG
from tangora.experiments.settings import RunSettings

_REPLACED = {
    "ACCELERATE_USE_FSDP": "; tangora train --fsdp shards a base",
    "ACCELERATE_USE_DEEPSPEED": "",
    "ACCELERATE_USE_MEGATRON_LM": "",
    "ACCELERATE_MIXED_PRECISION": "; --dtype bfloat16 keeps the base in half the memory",
}
"""Settings of accelerate's configuration that have a counterpart here."""

_runs: list[RunSettings] = []  # that processes have begun together, as all of them count


def check_one_process(command: str, instead: str = "") -> None:
    """Raise unless this process is alone."""
    if found := _found_processes():
        hint = instead and f"; {instead}"
        raise InputError(
            f"tangora {command} runs in one process, but {found[0]} {found[1]}: "
            f"start it without torchrun, accelerate launch or mpirun{hint}"
        )


def check_configuration() -> None:
    """Raise if accelerate's configuration asks for more than to start processes, which alone is recorded."""
    for variable, instead in _REPLACED.items():
        value = os.environ.get(variable, "").lower()
        if value not in {"", "no", "false", "0"}:
            raise InputError(
                f"accelerate's configuration sets {variable} to {value}, which tangora train and "
                f"compare do not support: remove it there{instead}"
            )


@contextlib.contextmanager
def joined(settings: RunSettings) -> Iterator[None]:
    """Let the processes of a launcher train together; nothing happens where this process is alone."""
    check_configuration()
    found = _found_processes()
    if found is None:
        if settings.fsdp:
            raise InputError(
                "fsdp shards the base over several processes, but there is only one: start it with "
                "torchrun or accelerate launch, or omit fsdp"
            )
        yield
        return
    _check_together(settings, found[1])
    is_new = not dist.is_initialized()
    on_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    try:
        state = PartialState(cpu=on_cpu)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the processes cannot connect to each other: {on_one_line(error, 160)}") from error
    if state.num_processes != found[1]:
        raise InputError(
            f"{found[0]} {found[1]}, but Accelerate sees {state.num_processes}: start it with torchrun or accelerate "
            "launch, which set RANK, LOCAL_RANK and WORLD_SIZE"
        )
    _runs.append(settings)
    try:
        yield
    except OtherRankError:
        raise
    except Exception as error:
        if _is_lost(error):  # one that was killed says nothing itself
            raise OtherRankError(f"another process has ended: {on_one_line(error, 160)}") from error
        if _is_first_to_fail():
            raise
        raise OtherRankError(on_one_line(error, 400)) from error
    if is_new:  # not after an error: others may still wait for an answer that never comes
        dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)


def failed_elsewhere() -> bool:
    """Tell whether a process of a launcher has ended with an error, which it reports itself."""
    with contextlib.suppress(Exception):  # the store may be gone
        return dist.is_initialized() and _get_default_store().check([_failed()])
    return False


def _found_processes() -> tuple[str, int] | None:
    # what says that there are several, and how many
    if several := launched():
        return f"{several[0]} is", several[1]
    # not imported for this: nobody can have started it then
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        size = distributed.get_world_size()
        return ("its process group has", size) if size > 1 else None
    return None


def _check_together(settings: RunSettings, size: int) -> None:
    if settings.batch_size % size:
        raise InputError(
            f"batch_size counts the examples of all processes together and must be a multiple of their number, {size}; "
            f"got {settings.batch_size}"
        )
    if (settings.device or "cpu") not in {"cpu", "cuda"}:
        raise InputError(
            f"device must be cpu or cuda when a launcher starts {size} processes, because each uses one "
            "GPU; got "
            f"{settings.device!r}"
        )
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE") or 1), torch.cuda.device_count()
    if settings.device != "cpu" and torch.cuda.is_available() and here > gpus:
        raise InputError(
            f"{here} processes were started on this machine, where {gpus} GPUs are visible: start one "
            "process per GPU, or pass --device cpu"
        )


def _failed() -> str:
    return f"tangora/failed/{len(_runs)}"


def _is_first_to_fail() -> bool:
    try:
        return _get_default_store().add(_failed(), 1) == 1
    except RuntimeError:  # it was in the first process, which is gone
        return dist.get_rank() == 0


def _is_lost(error: Exception) -> bool:
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


@contextlib.contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Send messages and Python warnings to a file, so that the terminal shows progress only."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = [
        logging.getLogger(name) for name in ("tangora", "py.warnings", "transformers", "peft", "lm_eval")
    ]
    levels = [logger.level for logger in loggers]
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.disable_default_handler()
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO if logger.name == "tangora" else logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            logging.captureWarnings(True)
            yield
    finally:
        logging.captureWarnings(False)
        transformers.logging.enable_default_handler()
        transformers.logging.set_verbosity(verbosity)
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
        handler.close()


def tell_user(*sentences: str) -> None:
    """Log sentences about the data, or of what has failed."""
    for sentence in sentences:
        logging.getLogger(USER_LOG).info("%s", sentence)
