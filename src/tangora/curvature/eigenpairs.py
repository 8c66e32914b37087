"""Some eigenvalues of a symmetric operator, with their vectors and error bounds."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tangora._checks import InputError, check_choice, check_number, check_whole

Which = Literal["largest", "smallest", "both", "magnitude"]
"""Largest or smallest values, half of them from each end (one more from the upper), or largest absolute values."""


@dataclass(frozen=True)
class Eigenvalue:
    r"""One eigenvalue, and how far its vector is from being an eigenvector."""

    value: float
    residual: float
    r"""$\|H v - \lambda v\|$: the operator has an eigenvalue within this distance."""


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    r"""Eigenvalues and vectors.

    Attributes:
        values: $\lambda_i$ in descending order, float64 on the CPU.
        vectors: Orthonormal columns in the operator's dtype and on its device.
        residuals: Bounds of $\|H v_i - \lambda_i v_i\|$, float64 on the CPU. The operator has an eigenvalue within this
            distance of $\lambda_i$; the error of a well separated $\lambda_i$ is of the order of its square.
        products: Products with the operator that were made.
        converged: Whether all residuals reached the tolerance.
    """

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "n k"]
    residuals: Float[Tensor, " k"]
    products: int
    converged: bool

    @property
    def eigenvalues(self) -> list[Eigenvalue]:
        """Every value with its residual, without vectors."""
        pairs = zip(self.values.tolist(), self.residuals.tolist(), strict=True)
        return [Eigenvalue(value, residual) for value, residual in pairs]


def select(values: Float[Tensor, " m"], count: int, which: Which) -> Tensor:
    """Return the indices of so many of the descending values, ascending."""
    total = values.shape[0]
    if which == "magnitude":
        return values.abs().argsort(descending=True, stable=True)[:count].sort().values
    high, low = ends(count, which)
    return torch.cat([torch.arange(high), torch.arange(total - low, total)])


def ends(count: int, which: Which) -> tuple[int, int]:
    """Return how many of so many eigenvalues are from the upper and from the lower end; not for ``magnitude``."""
    high = {"largest": count, "smallest": 0, "both": (count + 1) // 2}[which]
    return high, count - high


def check_request(size: int, k: int, which: Which, tol: float, max_products: int | None) -> None:
    """Raise `InputError` if what an eigenvalue algorithm is asked for is out of range."""
    check_whole("k", k, low=1)
    if k > size:
        raise InputError(f"k must be at most the dimension of the operator, {size}; got {k}")
    check_choice("which", which, ("largest", "smallest", "both", "magnitude"))
    check_number("tol", tol, low=0)
    if max_products is not None:
        check_whole("max_products", max_products, low=k)
