"""How close is equal: relative to the larger of the two, in the dtype's own units."""

import torch
from torch import Tensor


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Assert that the difference is small against the norm of what is expected."""
    assert actual.shape == expected.shape, f"shapes {tuple(actual.shape)} and {tuple(expected.shape)}"
    scale = max(float(expected.abs().max()), 1e-300) if expected.numel() else 1.0
    worst = float((actual - expected).abs().max()) if expected.numel() else 0.0
    assert torch.isfinite(actual).all(), "not finite"
    assert worst <= tolerance * scale, f"off by {worst / scale:.3e} relative, allowed {tolerance:.1e}"
