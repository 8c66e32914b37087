r"""Gram matrices of thin factors and what is needed of them: bases, inverses, eigendecompositions.

Everything is $r \times r$ and held in float64 whatever the factors' dtype: squaring a factor squares its condition
number, and float32 Gram matrices would lose every direction below a thousandth of the largest.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tangora._types import Core, FactorA, FactorB
from tangora.geometry.guess import all_may

# A Cholesky pivot ratio this much above the cut-off leaves no doubt that the eigenvalues are above it too.
_SAFETY = 1e4


class Eigendecomposition(NamedTuple):
    """Eigendecomposition of a symmetric matrix, ascending."""

    values: Float[Tensor, "*b r"]
    vectors: Core


def gram(factor: FactorA) -> Core:
    r"""Return $F F^\top$ in float64.

    Args:
        factor: $F$, short side first; pass ``B.mT`` for the Gram matrix of the columns of $B$.
    """
    factor = factor.double()
    return factor @ factor.mT


def times(tall: FactorB, core: Core) -> FactorB:
    """Multiply a tall matrix by a small one, keeping its long side contiguous.

    Batched products with an ``m x r`` operand are several times slower than with its transpose, so tall factors are
    held as transposed views throughout.
    """
    return (core.mT @ tall.mT).mT


def plus(base: Tensor, left: Tensor, right: Tensor, *, scale: float = 1.0, fresh: bool = False) -> Tensor:
    """Return ``base + scale * left @ right`` without a temporary for the product.

    A step of a whole model is bound by memory traffic, so one pass less over the factors can be felt.

    Args:
        fresh: Whether ``base`` is the caller's own temporary, which may be overwritten.
    """
    if base.dim() != 3:
        return base + scale * (left @ right)
    if fresh:
        return base.baddbmm_(left, right, alpha=scale)
    return torch.baddbmm(base, left, right, alpha=scale)


def plus_times(
    base: FactorB, tall: FactorB, core: Core, *, scale: float = 1.0, fresh: bool = False
) -> FactorB:
    """Return ``base + scale * tall @ core``, like `plus` and `times`."""
    return plus(base.mT, core.mT, tall.mT, scale=scale, fresh=fresh).mT


def relative_cutoff(rank: int, dtype: torch.dtype) -> float:
    """Eigenvalues of a Gram matrix below this share of the largest are rounding errors of the factor.

    Args:
        rank: Size of the Gram matrix.
        dtype: Dtype in which the factor was known.

    Returns:
        The squared relative accuracy of the singular values, and at least that of float64 eigenvalues.
    """
    return max((rank * torch.finfo(dtype).eps) ** 2, 10 * rank * torch.finfo(torch.float64).eps)


def eigendecompose(matrix: Core) -> Eigendecomposition:
    """Eigendecompose a symmetric positive semi-definite matrix; never fails on non-finite input.

    Args:
        matrix: Symmetric; entries that overflowed are treated as a factor without information, that is as zero.

    Returns:
        Eigenvalues, clamped to be non-negative, and eigenvectors.
    """
    finite = matrix.isfinite().all(-1).all(-1)[..., None, None]
    values, vectors = torch.linalg.eigh(matrix.where(finite, 0.0))
    return Eigendecomposition(values.clamp(min=0), vectors)


def whiten(matrix: Core, cutoff: float) -> Core:
    r"""Return $Z$ with $Z^\top G Z = I$ on the numerical range of $G$, zero columns elsewhere; $Z Z^\top = G^+$.

    $F^\top Z$ then has orthonormal columns. Cholesky where every pivot is safely above the cut-off, eigenvectors
    for the rest of the stack: $G = 0$ (LoRA's $B = 0$ initialization) gives $Z = 0$.

    Args:
        matrix: $G$, symmetric positive semi-definite.
        cutoff: Eigenvalues up to this share of the largest count as zero.

    Returns:
        $Z$, in the dtype of ``matrix``.
    """
    root, info = torch.linalg.cholesky_ex(matrix)
    pivots = root.diagonal(dim1=-2, dim2=-1)
    safe = (info == 0) & (pivots.amin(-1) ** 2 > _SAFETY * cutoff * pivots.amax(-1) ** 2)
    if all_may(safe):
        return _inverse_transposed(root)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    by_cholesky = _inverse_transposed(root.where(safe[..., None, None], identity))
    return by_cholesky.where(safe[..., None, None], _whiten_by_eigenvectors(matrix, safe, cutoff))


def _inverse_transposed(root: Core) -> Core:
    identity = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device).expand_as(root)
    return torch.linalg.solve_triangular(root, identity, upper=False).mT


def _whiten_by_eigenvectors(matrix: Core, skip: Bool[Tensor, "*b"], cutoff: float) -> Core:
    result = torch.zeros_like(matrix)
    values, vectors = eigendecompose(matrix[~skip])
    kept = values > cutoff * values[..., -1:]
    result[~skip] = vectors * values.rsqrt().where(kept, 0.0)[..., None, :]
    return result


def cholesky_inverse(matrix: Core) -> Core:
    """Return the inverse of a positive definite matrix, without looking whether it is one."""
    whitening = _inverse_transposed(torch.linalg.cholesky_ex(matrix).L)
    return whitening @ whitening.mT


def damped_whiten(matrix: Core, damping: float | Tensor) -> Core:
    r"""Return $Z$ with $Z Z^\top = (G + \lambda I)^{-1}$ of a positive semi-definite $G$, by Cholesky.

    Args:
        damping: $\lambda > 0$, or one for each matrix of the stack, ``*b 1 1``.
    """
    return _inverse_transposed(_damped_cholesky(matrix, damping))


def damped_inverse(matrix: Core, damping: float) -> Core:
    r"""Return $(G + \lambda I)^{-1}$ of a positive semi-definite $G$ for $\lambda > 0$, by Cholesky."""
    return torch.cholesky_inverse(_damped_cholesky(matrix, damping))


def _damped_cholesky(matrix: Core, damping: float | Tensor) -> Core:
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.cholesky(matrix + damping * identity)
