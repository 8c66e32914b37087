"""Live curves: the same numbers that a run writes to its folder, sent to TensorBoard and other trackers."""

from collections.abc import Sequence
from pathlib import Path

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, get_available_reporting_integrations
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from tangora._checks import InputError
from tangora._names import Tracker

TENSORBOARD = "tensorboard"
"""Name of the tracker, and of its folder in a run's folder."""


def check_trackers(names: Sequence[Tracker]) -> None:
    """Check that trackers can be used, before any time has been spent."""
    available = get_available_reporting_integrations()
    for name in names:
        if name not in available:
            raise InputError(f"report_to {name} needs the package {name}: pip install {name}")


def trackers(names: Sequence[Tracker], folder: Path) -> list[TrainerCallback]:
    """Make the callbacks that send what the Trainer logs to trackers."""
    made: list[TrainerCallback] = []
    for name in names:
        if name == TENSORBOARD:
            from torch.utils.tensorboard import SummaryWriter

            # beside the checkpoints, which are not kept, and which the callback would choose
            made.append(TensorBoardCallback(SummaryWriter(str(folder / TENSORBOARD))))
        else:
            made += [make() for make in get_reporting_integration_callbacks([name])]
    return made
