"""What torchrun, accelerate launch and mpirun tell a process of the others, read without torch."""

import os

_VARIABLES = (
    ("WORLD_SIZE", "RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
)
"""Those that accelerate reads: its own and torchrun's, and those of three MPI launchers."""

_MARKS = {
    "ACCELERATE_MIXED_PRECISION": "accelerate launch",
    "TORCHELASTIC_RUN_ID": "torchrun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
    "MV2_COMM_WORLD_SIZE": "mpirun",
}


def launched() -> tuple[str, int] | None:
    """Return the variable in which a launcher says that it has started several processes, and their number."""
    found = ((name, _number(name)) for name, _ in _VARIABLES)
    return next(((name, size) for name, size in found if size > 1), None)


def launched_as() -> int:
    """Return the number of this process among those of a launcher; 0 for the first, and without a launcher."""
    return next((_number(rank) for size, rank in _VARIABLES if _number(size) > 1), 0)


def launcher() -> str | None:
    """Name the program that has started several processes, if one has."""
    if launched() is None:
        return None
    return next((name for variable, name in _MARKS.items() if variable in os.environ), "another launcher")


def _number(variable: str) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else 0
