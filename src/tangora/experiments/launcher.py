"""Commands run in one process: under a launcher each process would write the same files and train on its own."""

import os
import sys

from tangora._checks import InputError

# what accelerate reads: its own and torchrun's, and those of three MPI launchers
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def check_one_process(command: str, instead: str = "") -> None:
    """Raise unless this process is alone."""
    for name in _SIZES:
        text = os.environ.get(name, "")
        if text.isdecimal() and int(text) > 1:
            raise InputError(_refusal(command, f"{name} is {text}", instead))
    distributed = sys.modules.get(
        "torch.distributed"
    )  # not imported for this: nobody can have started it then
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
