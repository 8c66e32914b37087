"""The interface of operators for all algorithms: counted and checked products, and random vectors to start from."""

import math
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from tangora._checks import InputError, check_kind, check_seed, check_whole, shown
from tangora._types import Progress

Device = torch.device | str

ROUNDING = 10
"""So many roundings of the operator's norm are not told from zero."""


@runtime_checkable
class Matrix(Protocol):
    """A symmetric matrix of which products with vectors are enough: an operator, or a tensor."""

    @property
    def shape(self) -> Any:
        """``(n, n)``."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of vectors."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of vectors."""
        ...

    def __matmul__(self, vector: Any, /) -> Any:
        """Multiply with a flat vector."""
        ...


def size_of(operator: Matrix) -> int:
    """Return the number of rows, or raise `InputError` if this is no square matrix."""
    shape: Any = getattr(operator, "shape", ())
    dtype = getattr(operator, "dtype", None)
    square = isinstance(shape, tuple) and len(shape) == 2 and shape[0] == shape[1]
    if not (square and isinstance(dtype, torch.dtype) and hasattr(operator, "device")):
        raise InputError(
            f"operator must be a square matrix with @, shape, dtype and device; got {shown(operator)}"
        )
    check_whole("size", shape[0], low=1)
    return int(shape[0])


def seeded_generator(seed: int) -> torch.Generator:
    """Return a generator on the CPU, or raise `InputError` if the seed is none."""
    check_seed(seed)
    return torch.Generator().manual_seed(seed)


class Products:
    """Counts products with an operator, and refuses those that are not finite.

    Half precision is computed around in float32.
    """

    def __init__(self, operator: Matrix, total: int, what: str = "", progress: Progress | None = None):
        self.size, self.device = size_of(operator), operator.device
        self.dtype = torch.promote_types(operator.dtype, torch.float32)
        self.total, self.count = total, 0
        self._operator, self._what, self._progress = operator, what, progress

    def __call__(self, vector: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return the product, free to be overwritten: what the operator returns may alias its argument."""
        product: Any = self._operator @ vector.to(self._operator.dtype)
        check_kind("a product", product, Tensor, "a tensor")
        self.count += 1
        if product.shape != (self.size,):
            raise InputError(f"a product must have shape ({self.size},); got {tuple(product.shape)}")
        product = product.detach().to(self.device, self.dtype, copy=True)
        if not math.isfinite(norm(product)):
            raise InputError(f"products must be finite numbers; product {self.count} is not finite")
        if self._progress is not None:
            self._progress(self._what, self.count, self.total)
        return product

    def normal(self, generator: torch.Generator) -> Float[Tensor, " n"]:
        """Draw standard normal numbers, on the CPU: the same on every device."""
        return torch.randn(self.size, generator=generator, dtype=self.dtype).to(self.device)

    def signs(self, generator: torch.Generator) -> Float[Tensor, " n"]:
        r"""Draw a Rademacher vector: entries $\pm 1$ with equal chance, so that $\mathbb{E}\, z z^\top = I$.

        Of all vectors with independent entries these estimate a trace with the least variance.
        """
        return random_signs((self.size,), generator, self.dtype, self.device)


def random_signs(
    shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype, device: Device
) -> Float[Tensor, "*s"]:
    r"""Draw Rademacher entries, $\pm 1$ with equal chance, on the CPU: the same on every device."""
    drawn = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8)
    return drawn.to(device, dtype).mul_(2).sub_(1)


def norm(vector: Float[Tensor, " n"]) -> float:
    """Return the Euclidean norm, summed in float64."""
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))


def dot(one: Float[Tensor, " n"], other: Float[Tensor, " n"]) -> float:
    """Return the inner product, summed in float64."""
    return float((one * other).sum(dtype=torch.float64))


def orthogonalize(vector: Float[Tensor, " n"], basis: Float[Tensor, "m n"]) -> None:
    """Remove the span of orthonormal rows from a vector, in place; there may be none.

    Two passes, each one product with all rows at once: the first leaves an error as large as the rounding of what it
    removed, which a short remainder cannot bear; the second removes that.

    Source:
        "Twice is enough": Giraud, Langou, Rozložník, van den Eshof (2005), Numerische Mathematik 101.
    """
    if basis.shape[0]:
        for _ in range(2):
            vector.addmv_(basis.mT, basis @ vector, alpha=-1)
