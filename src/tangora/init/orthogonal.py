"""Random orthogonal factors: the initialization that needs nothing and gives both factors a full-rank Gram matrix."""

from typing import Any

import torch

from tangora._checks import check_number
from tangora._types import FactorA, FactorB
from tangora.init.start_method import LayerToStart, StartFactors, StartMethod, option_types


def orthogonal(
    m: int, n: int, r: int, *, size: float = 3**-0.5, generator: torch.Generator | None = None
) -> tuple[FactorA, FactorB]:
    r"""Draw $A_0$ with orthogonal rows and $B_0$ with orthogonal columns, all of one norm.

    Args:
        m: Rows of the weight.
        n: Columns of the weight.
        r: Rank, at most ``min(m, n)``.
        size: Their norm; $1/\sqrt 3$ is that of PEFT's random rows of $A$.
        generator: Source of randomness; default torch's global one.

    Returns:
        $A_0$ and $B_0$ in float32; the base weight must become $W_0 - s B_0 A_0$.

    Source:
        Recommended for LoRA-Pro, whose Gram matrices must be invertible, by J. Su (2024), https://spaces.ac.cn/archives/10266.
    """
    check_number("size", size, low=0, open_low=True)
    rows = torch.linalg.qr(torch.randn(n, r, generator=generator)).Q.T
    columns = torch.linalg.qr(torch.randn(m, r, generator=generator)).Q
    return size * rows, size * columns


def _start(layer: LayerToStart, **options: Any) -> StartFactors:
    return orthogonal(*layer.shape, generator=layer.generator, **options)


ORTHOGONAL = StartMethod(_start, option_types(orthogonal, "size"), offset=True)
