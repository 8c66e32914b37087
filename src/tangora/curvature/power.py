r"""Power iteration with deflation: the simplest way to the eigenvalues of largest magnitude, for comparison.

$v \leftarrow P H v / \|P H v\|$ with $P = I - V V^\top$ the projection away from the vectors found before. The
component along the eigenvector looked for gains on the next one by $|\lambda_i / \lambda_{i+1}|$ with each product, so
close eigenvalues take many, and $\pm\lambda$ of equal magnitude never settle; Lanczos needs a fraction of the products.

For one end of the spectrum the same is done with $H \pm \sigma I$, where $\sigma$ is zero until an eigenvalue of the
wrong sign turns up as the largest in magnitude, and that magnitude afterwards.

Source: the method of PyHessian (Yao et al., 2020, arXiv:1912.07145), here with a stop on the residual and not on the
change of the eigenvalue.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tangora._types import Progress
from tangora.curvature.eigenpairs import Eigenpairs, Which, check_request, ends
from tangora.curvature.products import (
    ROUNDING,
    Matrix,
    Products,
    dot,
    norm,
    orthogonalize,
    seeded_generator,
    size_of,
)


def power_eigenpairs(
    operator: Matrix,
    k: int = 10,
    *,
    which: Which = "magnitude",
    tol: float = 1e-4,
    max_products: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Eigenpairs:
    r"""Find extreme eigenpairs by power iteration, one after the other.

    Memory: ``2 k`` vectors, and a few.

    Args:
        operator: See `tangora.curvature.lanczos_eigenpairs`, as for everything not listed here.
        k: Number of eigenpairs.
        which: ``magnitude`` is what the method finds by itself.
        tol: An eigenpair has converged when its residual, but for the part along vectors found before, is at most
            ``tol`` times the operator's norm; less than a few roundings is not asked.
        max_products: Budget, at least ``k``; default ``200 k``. What one pair leaves over, the others may use.
        seed: Seed of the random vectors.
        progress: Called after each product with their number and ``max_products``.

    Returns:
        The eigenpairs with their whole residuals; the best so far, and ``converged=False``, when the budget is spent.

    Raises:
        InputError: If a number is out of range or a product is not finite.
    """
    check_request(size_of(operator), k, which, tol, max_products)
    product = Products(operator, max_products or 200 * k, "eigenvalues", progress)
    search = _Deflation(
        product=product,
        found=torch.empty(k, product.size, dtype=product.dtype, device=product.device),
        tol=max(tol, ROUNDING * torch.finfo(product.dtype).eps),
        generator=seeded_generator(seed),
    )
    high, low = (k, 0) if which == "magnitude" else ends(k, which)
    signs = [0 if which == "magnitude" else 1] * high + [-1] * low
    pairs = [search.next(sign, k - index) for index, sign in enumerate(signs)]
    values, residuals = (torch.tensor(x, dtype=torch.float64) for x in list(zip(*pairs, strict=True))[:2])
    order = values.argsort(descending=True, stable=True)
    return Eigenpairs(
        values=values[order],
        vectors=search.found[order.to(product.device)].to(operator.dtype).mT,
        residuals=residuals[order],
        products=product.count,
        converged=all(pair.converged for pair in pairs),
    )


class _Pair(NamedTuple):
    value: float
    residual: float
    converged: bool


@dataclass
class _Deflation:
    """The vectors found so far, and how to find the next."""

    product: Products
    found: Float[Tensor, "k n"]
    tol: float
    generator: torch.Generator
    count: int = 0
    scale: float = 0.0
    shifts: dict[int, float] = field(default_factory=dict)

    def next(self, sign: int, left: int) -> _Pair:
        # of largest magnitude (0), or from the upper (1) or lower end (-1)
        # an equal share of what is left of the budget, and at least one product for each of the others
        last = self.product.count + max(1, (self.product.total - self.product.count) // left)
        vector = self._deflated(self.product.normal(self.generator))
        while True:
            image = self.product(vector)
            value, size = dot(vector, image), norm(image)
            self.scale = max(self.scale, size)
            residual = norm(image - value * vector)
            orthogonalize(image, self.found[: self.count])
            small = self.tol * self.scale
            converged = norm(image - value * vector) <= small
            other_end = converged and sign * value < -small and sign not in self.shifts
            if (converged and not other_end) or self.product.count == last:
                break
            if other_end:
                self.shifts[sign] = abs(value)
                image = self.product.normal(self.generator)
            vector = self._deflated(image.add_(vector, alpha=sign * self.shifts.get(sign, 0.0)))
        self.found[self.count] = vector
        self.count += 1
        return _Pair(value, residual, converged and not other_end)

    def _deflated(self, vector: Tensor) -> Tensor:
        before = self.found[: self.count]
        vector = vector.clone()
        orthogonalize(vector, before)
        while norm(vector) == 0.0:  # nothing left to follow
            vector = self.product.normal(self.generator)
            orthogonalize(vector, before)
        vector /= norm(vector)
        orthogonalize(vector, before)  # what remained may have been short
        return vector.div_(norm(vector))
