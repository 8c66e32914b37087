r"""From a step in the tangent space back to rank r: $Y_+ \approx Y - h\,\xi$ with $Y = B A$.

All retractions are independent of the gauge: they depend on $Y$, not on how it is split into $B$ and $A$.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from tangora._types import Core, FactorA, FactorB
from tangora.geometry.gram import cholesky_inverse, plus, plus_times
from tangora.geometry.guess import all_may
from tangora.geometry.tangent import Frame, Tangent

Retraction = Literal["auto", "orthographic", "svd"]
RETRACTIONS: tuple[Retraction, ...] = get_args(Retraction)

# `orthographic` is trusted while the core it inverts has at most this condition number (METHODS, section 2).
_MAX_CONDITION = 10.0
# Factors may have this many times the least sum of squares before they are balanced again.
MAX_IMBALANCE = 2.0
# A direction of Y weaker than this share of the strongest keeps factors of at least this size (squared), so that the
# adapter goes on seeing it: balanced factors of an exactly singular Y would be blind there for ever.
_FLOOR = 1e-6


class Factors(NamedTuple):
    """A pair of factors."""

    A: FactorA
    B: FactorB


def rounded(factors: Factors, stored: torch.dtype) -> Factors:
    """Round factors to the dtype of their parameters, so that transported tensors match the rounded factors."""
    return Factors(*(factor.to(stored).to(factor.dtype) for factor in factors))


def retract(
    A: FactorA, B: FactorB, at: Frame, tangent: Tangent, step: float | Tensor, kind: Retraction = "auto"
) -> Factors:
    r"""Take the step $Y - h\,\xi$ and retract to rank r.

    Args:
        step: $h$, in units of $B A$ (learning rate divided by the scaling $s$).
        kind: ``orthographic`` (along the normal space), ``svd``, or ``auto``: per matrix ``orthographic`` while it is
            well-conditioned, else ``svd``.
    """
    if kind == "svd":
        return svd_retract(A, B, at, tangent, step)
    core = _relative_core(at, tangent, step)
    near = _near_identity(core)
    ill = _ill_conditioned_factors(A, B, at) if kind == "auto" else torch.zeros_like(near)
    if all_may(near & ~ill):
        return _orthographic(A, B, at, tangent, step, _inverse_near_identity(core))
    by_core = _orthographic(A, B, at, tangent, step, torch.linalg.inv_ex(core).inverse)
    if kind == "orthographic":
        return by_core
    needs_svd = ~well_conditioned(core) | ill
    return _mixed(by_core, A, B, at, tangent, step, needs_svd) if needs_svd.any() else by_core


def decayed_step(
    A: FactorA,
    B: FactorB,
    at: Frame,
    tangent: Tangent,
    step: float | Tensor,
    decay: float | Tensor,
    kind: Retraction,
) -> Factors:
    r"""Take the step $\gamma Y - h\,\xi$ and retract to rank r, with approximately balanced factors.

    Args:
        step: $h$, in units of $B A$.
        decay: $\gamma$, one minus learning rate times weight decay.
        kind: As for `retract`.

    Returns:
        New factors, see `kept_balanced`: clipping by norm would else see longer and longer gradients.
    """
    shrunk = at._replace(whiten_B=at.whiten_B / decay)
    return kept_balanced(*retract(A, B * decay, shrunk, tangent, step, kind))


def svd_retract(A: FactorA, B: FactorB, at: Frame, tangent: Tangent, step: float | Tensor) -> Factors:
    r"""Return balanced factors of the best rank-r approximation of $Y - h \xi$.

    $Y - h\xi = [U\;\; J]\,[\,(U^\top B) A - h K;\; -h V]$, both thin matrices orthogonalised by QR, and an SVD of
    the small core. Through QR and not through Gram matrices, which lose the small directions.

    Returns:
        $B_+ = U_+ \sqrt{\Sigma}$, $A_+ = \sqrt{\Sigma} V_+$; the old factors where nothing is left, $Y - h\xi = 0$.
    """
    left = torch.cat([at.U, tangent.J], dim=-1)
    right = torch.cat([(at.U.mT @ B) @ A - step * tangent.K, -step * at.V], dim=-2)
    return balanced_product(left, right, A.shape[-2], Factors(A, B))


def rebalance(A: FactorA, B: FactorB) -> Factors:
    r"""Balance the factors, $B^\top B = A A^\top$, at unchanged $B A$.

    Returns:
        $B = U\sqrt{\Sigma}$, $A = \sqrt{\Sigma} V$ from the SVD of $B A$, by two QR factorisations and a small SVD;
        the old factors where $B A = 0$.
    """
    return balanced_product(B, A, A.shape[-2], Factors(A, B))


def kept_balanced(A: FactorA, B: FactorB) -> Factors:
    r"""Balance the factors of those products whose gradients would be much longer than balanced ones'.

    $B A$ does not care how it is split, but all that looks at the factors' gradients does, such as clipping by norm.
    They are about as long as the factors, and $\|A\|^2 + \|B\|^2 \ge 2 \|B A\|_*$, with equality for balanced factors
    only.

    Returns:
        Balanced factors, see `rebalance`, where $\|A\|^2 + \|B\|^2 > 4 \sqrt{r} \|B A\|$, which is at least twice the
        least; the others unchanged.
    """
    G_A, G_B = A @ A.mT, B.mT @ B
    size = (G_A + G_B).diagonal(dim1=-2, dim2=-1).sum(-1)
    product = (G_A * G_B).sum((-2, -1)).clamp(min=0).sqrt()
    far = size > 2 * MAX_IMBALANCE * math.sqrt(A.shape[-2]) * product
    if all_may(~far):
        return Factors(A, B)
    A_new, B_new = A.clone(), B.clone()
    A_new[far], B_new[far] = rebalance(A[far], B[far])
    return Factors(A_new, B_new)


def balanced_product(
    left: Float[Tensor, "*b m k"], right: Float[Tensor, "*b k n"], rank: int, fallback: Factors
) -> Factors:
    r"""Return balanced factors of the best rank-r approximation of a product of thin matrices.

    Args:
        fallback: Result where the product is zero.

    Returns:
        $B = U\sqrt{\Sigma}$ and $A = \sqrt{\Sigma} V$, by falling singular value; weights of $A$ have a floor, see
        `svd_retract`. Ranks beyond the smaller side of the product are zero in both factors.
    """
    Q_left, R_left = torch.linalg.qr(left)
    Q_right, R_right = torch.linalg.qr(right.mT)
    P, values, Qh = torch.linalg.svd(R_left @ R_right.mT, full_matrices=False)
    P, values, Qh = P[..., :, :rank], values[..., :rank], Qh[..., :rank, :]
    size = values.clamp(min=values[..., :1] * _FLOOR).sqrt()
    weight = (values / size).nan_to_num(nan=0.0)
    B_new = (Q_left @ P) * weight[..., None, :]
    A_new = size[..., :, None] * (Qh @ Q_right.mT)
    missing = rank - values.shape[-1]
    if missing > 0:  # PEFT allows ranks above the layer's size, which nothing can use
        A_new, B_new = F.pad(A_new, (0, 0, 0, missing)), F.pad(B_new, (0, missing))
    alive = (values[..., :1] > 0)[..., None]
    return Factors(A_new.where(alive, fallback.A), B_new.where(alive, fallback.B))


def well_conditioned(core: Core) -> Bool[Tensor, "*b"]:
    r"""Tell whether the orthographic retraction may be trusted.

    Args:
        core: $\Omega = I - h S^{-1} U^\top \xi V^\top$ with $S = U^\top Y V^\top$; a change of gauge rotates it.

    Returns:
        True where $\mathrm{cond}(\Omega) \le 10$.
    """
    values = torch.linalg.svdvals(core.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))
    return _near_identity(core) | (values[..., 0] <= _MAX_CONDITION * values[..., -1])


def _near_identity(core: Core) -> Bool[Tensor, "*b"]:
    # cond(I - E) <= (1 + |E|) / (1 - |E|): most matrices pass this cheap test and need no singular values
    identity = torch.eye(core.shape[-1], dtype=core.dtype, device=core.device)
    return torch.linalg.matrix_norm(core - identity) <= (_MAX_CONDITION - 1) / (_MAX_CONDITION + 1)


def _inverse_near_identity(core: Core) -> Core:
    # its condition number is at most ten: squared, in float64, that costs nothing
    core64 = core.double()
    return (cholesky_inverse(core64.mT @ core64) @ core64.mT).to(core.dtype)


def _relative_core(at: Frame, tangent: Tangent, step: float | Tensor) -> Core:
    identity = torch.eye(at.whiten_A.shape[-1], dtype=at.whiten_A.dtype, device=at.whiten_A.device)
    return identity - step * (at.whiten_A.mT @ at.whiten_B) @ (tangent.K @ at.V.mT)


def _orthographic(
    A: FactorA, B: FactorB, at: Frame, tangent: Tangent, step: float | Tensor, inverse: Core
) -> Factors:
    r"""Retract along the normal space: $P_T(Y_+) = P_T(Y - h \xi)$.

    $A_+ = A - h K_B$ and $B_+ = B - h J_A (A_+ A^\top G_A^{-1})^{-1}$. Second order (equal to the SVD retraction up to
    $O(h^3)$), one $r \times r$ solve, no SVD, works from $B = 0$. Leaves its domain when the step is larger than the
    smallest singular value of $Y$; see `well_conditioned`.

    Source:
        Absil & Oseledets (2015), Low-rank retractions: a survey and new results, section 3.
    """
    A_new = plus(A, -step * at.whiten_B, tangent.K)
    B_new = plus_times(B, tangent.J, -step * (inverse @ at.whiten_A.mT))
    return Factors(A_new, B_new)


def _ill_conditioned_factors(A: FactorA, B: FactorB, at: Frame) -> Bool[Tensor, "*b"]:
    # |F|^2 |Z|^2 bounds the condition number of the Gram matrix from above; svd_retract returns balanced factors
    limit = 1 / torch.finfo(A.dtype).eps
    return torch.maximum(_condition_bound(A, at.whiten_A), _condition_bound(B, at.whiten_B)) > limit


def _condition_bound(factor: Float[Tensor, "*b p q"], whitening: Core) -> Float[Tensor, "*b"]:
    return torch.linalg.matrix_norm(factor).square() * torch.linalg.matrix_norm(whitening).square()


def _mixed(
    by_core: Factors,
    A: FactorA,
    B: FactorB,
    at: Frame,
    tangent: Tangent,
    step: float | Tensor,
    needs_svd: Bool[Tensor, "*b"],
) -> Factors:
    A_new, B_new = by_core
    chosen = Frame(*(part[needs_svd] for part in at))
    turned = Tangent(*(part[needs_svd] for part in tangent))
    by_svd = svd_retract(A[needs_svd], B[needs_svd], chosen, turned, step)
    A_new[needs_svd], B_new[needs_svd] = by_svd
    return Factors(A_new, B_new)
