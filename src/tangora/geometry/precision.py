"""Products in the precision of their operands, whatever a program allows for its model."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_FULL = ("none", "ieee")  # "none" is torch's default for products: full float32


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switch off autocast, TF32 and bfloat16 products: they lose small directions and make iterations diverge."""
    with torch.autocast(device.type, enabled=False), _full_float32():
        yield


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    backends: Any = torch.backends
    if not hasattr(backends.cuda.matmul, "fp32_precision"):  # torch before 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    # the older functions raise once a program has used these switches, and these work with both
    switches = [backends.cuda.matmul, backends.mkldnn.matmul]
    changed = [(each, each.fp32_precision) for each in switches if each.fp32_precision not in _FULL]
    for each, _ in changed:
        each.fp32_precision = "ieee"
    try:
        yield
    finally:
        for each, precision in changed:
            each.fp32_precision = precision
