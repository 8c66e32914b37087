"""What every algorithm here needs of an operator: counted and checked products, and random vectors to start from."""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tangora._checks import InputError, check_callable, check_kind, check_seed

Matvec = Callable[[Tensor], Tensor]
"""Product of a symmetric matrix with a flat vector."""

Progress = Callable[[int, int], object]
"""Called after each product with the number of products so far and the most there will be."""

Device = torch.device | str

ROUNDING = 10
"""So many roundings of the operator's norm are not told from zero."""


def seeded_generator(seed: int) -> torch.Generator:
    """Return a generator on the CPU, or raise `InputError` if the seed is none."""
    check_seed(seed)
    return torch.Generator().manual_seed(seed)


class Products:
    """Counts products with an operator, and refuses those that are not finite.

    Args:
        matvec: The product; what it returns is copied and may alias its argument.
        total: The most products there will be.
        dtype: Of the operator's vectors. Half precision is computed around in float32.
        progress: Called after each product.
    """

    def __init__(
        self,
        matvec: Matvec,
        size: int,
        total: int,
        *,
        dtype: torch.dtype,
        device: Device,
        progress: Progress | None = None,
    ):
        check_callable("matvec", matvec, "a function of a vector")
        self._matvec, self._operator_dtype, self._progress = matvec, dtype, progress
        self.size, self.total, self.device = size, total, device
        self.dtype = torch.promote_types(dtype, torch.float32)
        self.count = 0

    def __call__(self, vector: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Multiply.

        Returns:
            The product, free to be overwritten.

        Raises:
            InputError: If it has another shape or is not finite.
        """
        product: Any = self._matvec(vector.to(self._operator_dtype))
        check_kind("what matvec returns", product, Tensor, "a tensor")
        product = product.detach()
        self.count += 1
        if product.shape != (self.size,):
            raise InputError(f"matvec must return shape ({self.size},); got {tuple(product.shape)}")
        product = product.to(self.device, self.dtype, copy=True)
        if not math.isfinite(norm(product)):
            raise InputError(f"matvec must return finite numbers; product {self.count} is not finite")
        if self._progress is not None:
            self._progress(self.count, self.total)
        return product

    def normal(self, generator: torch.Generator) -> Float[Tensor, " n"]:
        """Draw standard normal numbers.

        Args:
            generator: On the CPU: the same vector on every device.

        Returns:
            A vector for this operator.
        """
        return torch.randn(self.size, generator=generator, dtype=self.dtype).to(self.device)

    def signs(self, generator: torch.Generator) -> Float[Tensor, " n"]:
        r"""Draw a Rademacher vector: entries $\pm 1$ with equal chance, so that $\mathbb{E}\, z z^\top = I$.

        Of all vectors with independent entries these estimate a trace with the least variance.

        Returns:
            A vector for this operator.
        """
        return random_signs((self.size,), generator, self.dtype, self.device)


def random_signs(
    shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype, device: Device
) -> Float[Tensor, "*s"]:
    r"""Draw Rademacher entries: $\pm 1$ with equal chance.

    Args:
        generator: On the CPU: the same signs on every device.
        device: Where it is wanted.
    """
    drawn = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8)
    return drawn.to(device, dtype).mul_(2).sub_(1)


def check_start(start: Float[Tensor, " n"], size: int) -> None:
    """Check the first vector of an iteration.

    Args:
        size: Dimension of the operator.

    Raises:
        InputError: If it is zero, not finite or of another shape.
    """
    if start.shape != (size,) or not 0 < norm(start) < math.inf:
        raise InputError(f"start must be a finite vector of shape ({size},) that is not zero")


def norm(vector: Float[Tensor, " n"]) -> float:
    """Return the Euclidean norm, summed in float64.

    Args:
        vector: Any floating point vector.
    """
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))


def dot(one: Float[Tensor, " n"], other: Float[Tensor, " n"]) -> float:
    """Return the inner product, summed in float64.

    Args:
        other: Of the same length.
    """
    return float((one * other).sum(dtype=torch.float64))


def orthogonalize(vector: Float[Tensor, " n"], basis: Float[Tensor, "m n"]) -> None:
    """Remove the span of orthonormal rows from a vector, in place.

    Two passes, each one product with all rows at once: the first leaves an error as large as the rounding of what it
    removed, which a short remainder cannot bear; the second removes that.

    Args:
        basis: Orthonormal rows; there may be none.

    Source:
        "Twice is enough": Giraud, Langou, Rozložník, van den Eshof (2005), Numerische Mathematik 101.
    """
    if basis.shape[0]:
        for _ in range(2):
            vector.addmv_(basis.mT, basis @ vector, alpha=-1)
