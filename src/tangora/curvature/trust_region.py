r"""The largest value of a quadratic in a ball, exactly from a matrix and approximately from products.

$\max_{\|x\| \le \rho} g^\top x + \tfrac12 x^\top H x$ is attained where $(\mu I - H)\, x = g$ with
$\mu \ge \max(\lambda_{\max}, 0)$ and $\mu\,(\rho - \|x\|) = 0$: on the sphere, or inside of it where $H$ curves down.

Source: Conn, Gould and Toint, Trust Region Methods (2000), chapter 7; the restriction to a Krylov space is chapter 5.2.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from scipy.optimize import brentq
from torch import Tensor

from tangora.curvature.products import Matrix


class BallMaximum(NamedTuple):
    """Where a quadratic is largest in a ball."""

    step: Float[Tensor, " n"]
    value: float


def maximize_quadratic(
    matrix: Float[Tensor, "n n"], gradient: Float[Tensor, " n"], radius: float
) -> BallMaximum:
    r"""Maximise $g^\top x + \tfrac12 x^\top H x$ in the ball $\|x\| \le \rho$, the hard case included, in float64."""
    values, vectors = torch.linalg.eigh(matrix.double())
    along = vectors.mT @ gradient.double()
    top, size = float(values[-1]), float(along.norm())
    gaps = max(top, 0.0) - values

    def solution(shift: float) -> Tensor:
        # a direction without gradient stays unused, also where its gap is zero
        return torch.where(along == 0, 0.0, along / (gaps + shift).clamp(min=torch.finfo(gaps.dtype).tiny))

    def excess(shift: float) -> float:
        return 1 / float(solution(shift).norm()) - 1 / radius

    x = solution(0.0)
    if float(x.norm()) > radius:
        x = solution(brentq(excess, 0.0, 2 * size / radius, xtol=1e-300, rtol=1e-14, maxiter=1000))  # pyright: ignore
        x *= radius / x.norm()
    elif top > 0:  # nothing pushes along the largest curvature: either sign of it fills the ball
        x[-1] += (radius**2 - float(x.square().sum())) ** 0.5
    value = float(along @ x + (values * x.square()).sum() / 2)
    return BallMaximum(vectors @ x, value)


def maximize_in_krylov_space(
    operator: Matrix,
    gradient: Float[Tensor, " n"],
    starts: Sequence[Float[Tensor, " n"]],
    radius: float,
    dimension: int,
) -> BallMaximum:
    r"""Maximise the quadratic over the part of the ball in a block Krylov space of $H$ of so many dimensions.

    The space is spanned by the starts, the products with them, the products with those, and so on. It holds the
    maximum itself once it holds all of $g$'s and, in the hard case, the leading eigenvector's: starts should be these.
    Starts that are all zero give the step zero.
    """
    pending, basis, images = [*starts], [], []
    while pending and len(basis) < dimension:
        vector = _orthonormal(pending.pop(0), basis)
        if vector is None:
            continue
        basis.append(vector)
        images.append(operator @ vector)
        pending.append(images[-1])
    if not basis:
        return BallMaximum(torch.zeros_like(gradient), 0.0)
    Q = torch.stack(basis, 1)
    small = (Q.mT @ torch.stack(images, 1)).double()
    found = maximize_quadratic((small + small.mT) / 2, Q.mT @ gradient, radius)
    return BallMaximum(Q @ found.step.to(Q), found.value)


def _orthonormal(vector: Tensor, basis: list[Tensor]) -> Tensor | None:
    """Return what a vector adds to the span of a basis; ``None`` if that is rounding."""
    size = float(vector.norm())
    if size == 0:
        return None
    vector = vector / size
    if not basis:
        return vector
    Q = torch.stack(basis, 1)
    vector = vector - Q @ (Q.mT @ vector)
    size = float(vector.norm())
    if size < 100 * torch.finfo(vector.dtype).eps:
        return None
    vector = vector / size
    vector = vector - Q @ (
        Q.mT @ vector
    )  # what is left may be small, and its rounding errors point into the basis
    return vector / vector.norm()
