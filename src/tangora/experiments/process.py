"""The process that a command runs in: alone, with its messages in a file of the output folder."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import transformers

from tangora._checks import InputError
from tangora._names import USER_LOG

# what accelerate reads: its own and torchrun's, and those of three MPI launchers
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def check_one_process(command: str, instead: str = "") -> None:
    """Raise unless this process is alone."""
    for name in _SIZES:
        text = os.environ.get(name, "")
        if text.isdecimal() and int(text) > 1:
            raise InputError(_refusal(command, f"{name} is {text}", instead))
    # not imported for this: nobody can have started it then
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        size = distributed.get_world_size()
        if size > 1:
            raise InputError(_refusal(command, f"its process group has {size}", instead))


def _refusal(command: str, found: str, instead: str) -> str:
    hint = instead and f"; {instead}"
    return (
        f"tangora {command} runs in one process, but {found}: "
        f"start it without torchrun, accelerate launch or mpirun{hint}"
    )


@contextlib.contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Send messages and Python warnings to a file, so that the terminal shows progress only."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in ("tangora", "py.warnings", "transformers", "peft")]
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
