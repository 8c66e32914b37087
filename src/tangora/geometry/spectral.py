r"""The steepest direction of the tangent space under the spectral norm: Muon's step, computed only with thin matrices.

Muon moves the weights along $\mathrm{msign}(M) = P Q^\top$ of the momentum's singular value decomposition
$M = P \Sigma Q^\top$. An adapter can move along tangent vectors only, and the projection of $\mathrm{msign}(P_T M)$ is
one whose singular values are still close to one; alternating $\tau$ times brings them closer. In the frame's bases,
completed by those of the tangent vector itself, all of this happens in a $2r \times 2r$ matrix.

Source: tau = 1 is the direction of Riemannion (arXiv:2507.12142) and sMuon (arXiv:2608.14492), tau > 1 that of LoRA-TSD
(arXiv:2609.02734); the form with one small core is derived in ``docs/theory/tangent_muon.md``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tangora._types import FactorA
from tangora.geometry.gram import gram, plus, plus_times, relative_cutoff, times, whiten
from tangora.geometry.tangent import Cotangent, Frame, Tangent, coordinates

# Odd polynomials a x + b x^3 + c x^5, each the best approximation of 1 on the interval that the last one leaves, from
# [2e-7, 2] down to rounding: Polar Express (Amsel, Persson, Musco, Gower 2025, arXiv:2505.16932). The last is
# Newton-Schulz's of fifth order, which the others tend to.
_POLAR_EXPRESS = (
    (4.2571489273, -3.1602166312, 0.5864823232),
    (4.2571435428, -3.1602135606, 0.5864821581),
    (4.2571188076, -3.1601964523, 0.5864802066),
    (4.2570135105, -3.1601236225, 0.5864718991),
    (4.2565653167, -3.1598136197, 0.5864365379),
    (4.2546585952, -3.1584947022, 0.5862860927),
    (4.2465650224, -3.1528945366, 0.5856473034),  # float32 begins here, with [1.2e-3, 2]
    (4.2125328750, -3.1293167684, 0.5829579835),
    (4.0749711176, -3.0335012857, 0.5720313387),
    (3.5990653676, -2.6947556542, 0.5334570521),
    (2.6085042066, -1.9336502253, 0.4477941364),
    (1.9426878036, -1.3233142633, 0.3824036167),
    (1.8750979090, -1.2501087835, 0.3750108785),
    (1.8750000000, -1.2500000000, 0.3750000000),
)
_LARGEST = 2.0
# All but the last are taken of x / 1.01: the largest value of each is the end of the next one's interval, where the
# polynomials grow thirteenfold, so that rounding would leave the intervals for good within a few steps.
_SAFETY = 1.01
_FLOAT32_STEPS = slice(6, 13)


class _Iteration(NamedTuple):
    """Steps x -> x ((x^2 + p)^2 + q), after x has been scaled."""

    scale: float
    steps: list[tuple[float, float]]


def _complete_squares(polynomials: Sequence[tuple[float, float, float]]) -> _Iteration:
    """Return the same iteration on rescaled x, where polynomials are monic: their steps add no matrices."""
    scale, steps = 1.0, []
    safe = [(a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in polynomials[:-1]]
    for a, b, c in reversed([*safe, polynomials[-1]]):
        after, scale = scale, (c * scale) ** 0.2
        ratio = after / scale
        p = ratio * b / scale**2 / 2
        steps.append((p, ratio * a - p**2))
    return _Iteration(scale, steps[::-1])


_ITERATIONS = {
    torch.float64: _complete_squares(_POLAR_EXPRESS),
    torch.float32: _complete_squares(_POLAR_EXPRESS[_FLOAT32_STEPS]),
}


def polar(matrix: Float[Tensor, "*b k k"]) -> Float[Tensor, "*b k k"]:
    r"""Return the polar factor $P Q^\top$ of the singular value decomposition $P \Sigma Q^\top$.

    Matrix products only: batched, without waiting for the device; they must be in full precision (`full_precision`),
    as optimizers see to. Singular values above a share of the largest (1e-3 in
    float32, 1e-6 in float64) become one, smaller ones grow by 1e3 at least, and zeros stay zero.

    Args:
        matrix: Square, float32 or float64, of any size including zero; finite.

    Returns:
        The factor, in the same dtype.
    """
    first, steps = _ITERATIONS[matrix.dtype]
    X = matrix / _largest(matrix)
    G = X.mT @ X
    # the root of the sum of all fourth powers: above the largest singular value, but not by much
    size = torch.linalg.matrix_norm(G, keepdim=True).sqrt().clamp(min=1)
    scale = _LARGEST * first / size
    X, G = X * scale, G * scale**2
    for index, (p, q) in enumerate(steps):
        G = X.mT @ X if index else G
        G.diagonal(dim1=-2, dim2=-1).add_(p)
        G = G @ G
        G.diagonal(dim1=-2, dim2=-1).add_(q)
        X = X @ G
    return X


def thin_polar(wide: FactorA) -> FactorA:
    r"""Return the polar factor $P Q^\top$ of a matrix with few rows.

    Args:
        wide: $r \times n$, float32 or float64; may be zero, rank-deficient, or have more rows than columns.

    Returns:
        The factor; zero in directions in which the matrix is.
    """
    scaled = wide / _largest(wide)
    ((root, size),) = _orthonormal((scaled,), torch.zeros_like(scaled[..., :1, :1]))
    return (polar(size) @ root) @ scaled


def spectral_direction(at: Frame, cotangent: Cotangent, iterations: int = 1) -> Tangent:
    r"""Return $(P_T \circ \mathrm{msign})^\tau(P_T M)$, the tangent vector that approximates Muon's step.

    Args:
        at: Frame at the current factors.
        cotangent: $(B^\top M,\; M A^\top)$ of the momentum or gradient $M$, of any size.
        iterations: $\tau \ge 1$. No singular value of the result exceeds $2 / \sqrt 3$. For gradients without preferred
            directions they lie in about [0.7, 1.2] for 1, within 3 % of one for 4; where the gradient is nearly
            parallel to $B A$, directions outside of its spaces stay small.

    Returns:
        The tangent vector; zero where $P_T M$ is. Directions in which a factor vanishes move with the other one.
    """
    U, V = at.U, at.V
    r = V.shape[-2]
    left, right = coordinates(at, cotangent)
    size = _largest(left, right)
    left, right = left.div_(size), right.div_(size)
    C = left @ V.mT
    outside_V = plus(left, C, V, scale=-1.0, fresh=True)
    outside_U = plus_times(right, U, C, scale=-1.0, fresh=True).mT
    (right_root, right_size), (left_root, left_size) = _orthonormal((outside_V, outside_U), C)
    # M's projection is [U Q_J] core [V; Q_K'] for M V' - U C = Q_J R_J and (U' M - C V)' = Q_K R_K
    core = torch.cat([torch.cat([C, right_size], -1), torch.cat([left_size.mT, torch.zeros_like(C)], -1)], -2)
    for _ in range(iterations):
        core = polar(core)
        core[..., r:, r:] = 0  # the part outside of the tangent space
    K = plus(core[..., :r, :r] @ V, core[..., :r, r:] @ right_root, outside_V, fresh=True)
    return Tangent(K, times(outside_U.mT, left_root.mT @ core[..., r:, :r]))


def _largest(*parts: Tensor) -> Tensor:
    """Return the largest entry of matrices, for scales: squares of huge and inverses of tiny ones overflow."""
    largest = torch.stack([part.abs().amax((-2, -1), keepdim=True) for part in parts]).amax(0)
    return largest.clamp(min=torch.finfo(largest.dtype).tiny)


def _orthonormal(parts: Sequence[Tensor], inside: Tensor) -> list[tuple[Tensor, Tensor]]:
    r"""Return $T$, $S$ with orthonormal or zero rows of $Q = T X$ and $X = S Q$, for parts beside a core."""
    grams = [gram(part) for part in parts]
    squares = [matrix.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=0)[..., None, None] for matrix in grams]
    found = []
    size = (inside.double().square().sum((-2, -1), keepdim=True) + sum(squares)).sqrt()
    for part, G, square in zip(parts, grams, squares, strict=True):
        # where nearly all was subtracted the rest is rounding, and must not become a direction
        rounding = 10 * part.shape[-1] ** 0.5 * torch.finfo(part.dtype).eps
        is_there = square.sqrt() > rounding * size
        G_there = G.where(is_there, torch.eye(G.shape[-1], dtype=G.dtype, device=G.device))
        Z = whiten(G_there, relative_cutoff(G.shape[-1], part.dtype)).where(is_there, 0.0)
        found.append((Z.mT.to(part.dtype), (G @ Z).to(part.dtype)))
    return found
