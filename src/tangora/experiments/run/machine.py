"""The memory that a run takes, and how busy its machine is."""

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tangora.report import MemoryUse
from tangora.report.run_records import MachineLoad
from tangora.training.trainer import bare_optimizer

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
_PEAK = "VmHWM:"


def load_average() -> float | None:
    """Return how many processes ran or wanted to, mean over the last minute; ``None`` on Windows."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def machine_load(before: float | None) -> MachineLoad | None:
    """Return the load before and after a run, and the number of processors."""
    after = load_average()
    if before is None or after is None:
        return None
    return MachineLoad(before=before, after=after, processors=os.cpu_count() or 1)


def reset_peak() -> bool:
    """Forget the peak of memory so far: allocated on a GPU, or resident in the process on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    try:  # 5 resets the peak of the resident size: Linux only
        _RESET.write_text("5")
    except OSError:
        return False
    return True


def peak_bytes() -> int | None:
    """Return the peak since `reset_peak`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith(_PEAK)]
    return 1024 * int(found[0][1]) if found else None


def memory_use(optimizer: Optimizer | None, model: nn.Module, peak: int | None) -> MemoryUse:
    """Count what a run holds."""
    states = bare_optimizer(optimizer)
    tensors = [
        v for s in (states.state.values() if states else ()) for v in s.values() if isinstance(v, Tensor)
    ]
    return MemoryUse(
        peak_bytes=peak,
        optimizer_state_bytes=num_bytes(tensors),
        adapter_bytes=num_bytes(p for p in model.parameters() if p.requires_grad),
    )


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Count what tensors take."""
    return sum(each.numel() * each.element_size() for each in tensors)
