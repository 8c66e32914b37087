"""What the measures of this folder need of an operator: products, gradients and losses near one point."""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class LossSurface(Protocol):
    r"""A loss near the current weights, in flat coordinates $\delta \in \mathbb{R}^n$; nothing writes the weights."""

    @property
    def size(self) -> int:
        """The dimension $n$."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of flat vectors."""
        ...

    @property
    def device(self) -> torch.device:
        """Of flat vectors."""
        ...

    @property
    def products(self) -> int:
        """Products with the Hessian so far."""
        ...

    @property
    def space(self) -> Any:
        """The coordinates, with the slice of every layer in ``layout``."""
        ...

    def matvec(self, vector: Any) -> Any:
        """Multiply the Hessian with a flat vector."""
        ...

    def top_eigenpairs(self, k: int = ..., *, tol: float = ..., seed: int = ...) -> Any:
        """Return the largest eigenvalues and their vectors."""
        ...

    def block(self, layer: str) -> Any:
        """Return the diagonal block of one layer."""
        ...

    def per_batch(self) -> Iterator[tuple[float, Any]]:
        """Yield every batch's weight and surface."""
        ...

    def loss(self) -> float:
        """Return the loss at the current weights."""
        ...

    def gradient(self) -> Tensor:
        """Return the gradient at the current weights."""
        ...

    def loss_at(self, displacement: Any) -> float:
        """Return the loss at a displacement."""
        ...

    def gradient_at(self, displacement: Any) -> Tensor:
        """Return the gradient at a displacement."""
        ...


def mean_and_error(values: Float[Tensor, "*b p"]) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
    """Return the mean over independent samples and its standard error.

    Args:
        values: Samples along the last dimension, at least two.

    Returns:
        Both in float64.
    """
    values = values.double()
    return values.mean(-1), values.std(-1) / values.shape[-1] ** 0.5
