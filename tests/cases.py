"""Random pairs for the geometry as hypothesis strategies: shapes, ranks and degenerate factors; tables of cases."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor


class Case(NamedTuple):
    """A point B A, a gradient g and a scaling s."""

    A: Tensor
    B: Tensor
    g: Tensor
    s: float


def random_case(m: int, n: int, r: int, seed: int, s: float = 1.0) -> Case:
    """Draw a well-conditioned case; the singular values of both factors lie in [0.5, 2]."""
    generator = torch.Generator().manual_seed(seed)

    def factor(long: int) -> Tensor:
        draw = torch.randn(long, r, dtype=torch.float64, generator=generator)
        Q, _ = torch.linalg.qr(draw)
        values = 0.5 + 1.5 * torch.rand(r, dtype=torch.float64, generator=generator)
        rotation, _ = torch.linalg.qr(torch.randn(r, r, dtype=torch.float64, generator=generator))
        return (Q * values) @ rotation

    g = torch.randn(m, n, dtype=torch.float64, generator=generator)
    return Case(factor(n).T.contiguous(), factor(m), g, s)


@st.composite
def cases(draw: st.DrawFn, max_size: int = 12) -> Case:
    """Every shape: m < n, m > n, r = 1, r = min(m, n), s != 1."""
    m, n = draw(st.integers(1, max_size)), draw(st.integers(1, max_size))
    r = draw(st.integers(1, min(m, n)))
    s = draw(st.sampled_from([0.25, 1.0, 2.0, 5.656854249492381]))
    return random_case(m, n, r, draw(st.integers(0, 2**31)), s)


def gauge_transform(A: Tensor, B: Tensor, condition: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return (R^-1 A, B R) for a random R with the given condition number (1: orthogonal)."""
    generator = torch.Generator().manual_seed(seed)
    r = A.shape[-2]
    left, _ = torch.linalg.qr(torch.randn(r, r, dtype=A.dtype, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(r, r, dtype=A.dtype, generator=generator))
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), r, dtype=A.dtype)
    R = left @ torch.diag(values) @ right
    return torch.linalg.solve(R, A), B @ R


def combinations(*axes: Iterable[Any], quick: Callable[..., bool]) -> list[Any]:
    """All combinations as parameters of a test; those that are not quick are marked slow.

    The quick ones take every value of each axis and every pair of values that meet in a branch of the code.
    """
    return [
        pytest.param(*case, marks=() if quick(*case) else pytest.mark.slow)
        for case in itertools.product(*axes)
    ]
