"""The peak of the memory that training holds: allocated on a GPU, resident in the process on a CPU."""

from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
_PEAK = "VmHWM:"


def reset_peak() -> bool:
    """Forget the peak so far.

    Returns:
        Whether `peak_bytes` can tell a new one.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    try:  # 5 resets the peak of the resident size: Linux only
        _RESET.write_text("5")
    except OSError:
        return False
    return True


def peak_bytes() -> int | None:
    """Return the peak since `reset_peak`.

    Returns:
        Bytes: allocated on the GPU if there is one, else resident in this process with everything it has loaded;
        ``None`` where the system does not tell.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith(_PEAK)]
    return 1024 * int(found[0][1]) if found else None
