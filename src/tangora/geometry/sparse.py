r"""Sparse velocities of the factors: least squares with an $\ell_1$ penalty, from the gradients of the factors.

$\min \|B H_A + H_B A - g\|_F^2 + \lambda (\|H_A\|_1 + \|H_B\|_1)$. The gradient of the first part needs
$(B^\top g,\; g A^\top)$ only, and its Lipschitz constant is exactly $2 (\|A\|_2^2 + \|B\|_2^2)$, so that proximal
gradient descent needs no line search.

Source: the problem is that of the blog on LoRA-Pro, section 13; the method is FISTA (Beck & Teboulle 2009) with the
restart of O'Donoghue & Candès (2015).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from tangora._types import FactorA, FactorB
from tangora.geometry.gram import gram, times
from tangora.geometry.tangent import Cotangent

_LOOK_EVERY = 10  # iterations, since looking waits for the device


def sparse_velocity(
    A: FactorA,
    B: FactorB,
    cotangent: Cotangent,
    start: Cotangent,
    sparsity: float,
    *,
    iterations: int,
    tolerance: float,
) -> Cotangent:
    r"""Return the sparse velocity of the factors for $s = 1$.

    Args:
        cotangent: $(B^\top g,\; g A^\top)$.
        start: Velocity without a penalty, where the iteration begins.
        sparsity: $\lambda$ in units of the smallest one at which nothing moves,
            $2 \max(\|B^\top g\|_\infty, \|g A^\top\|_\infty)$ of each layer: 0 is ``start``, 1 is no step.
        iterations: At most so many, each of $O((m + n) r^2)$.
        tolerance: It ends before when no layer's velocity changes by more than this share of it.

    Returns:
        $(H_A, H_B)$, with exact zeros.
    """
    G_A, G_B = gram(A), gram(B.mT)
    largest = (torch.linalg.eigvalsh(G_A) + torch.linalg.eigvalsh(G_B))[..., -1, None, None]
    step = (1 / largest).where(largest > 0, 0.0).to(A.dtype)
    G_A, G_B = G_A.to(A.dtype), G_B.to(B.dtype)
    biggest = torch.maximum(*(each.abs().amax((-2, -1), keepdim=True) for each in cotangent))
    now, ahead, age = start, start, torch.ones_like(step)
    for index in range(iterations):
        residual_A = G_B @ ahead.A + (B.mT @ ahead.B) @ A - cotangent.A
        residual_B = times(B, ahead.A @ A.mT) + times(ahead.B, G_A) - cotangent.B
        new = Cotangent(
            _shrunk(ahead.A - step * residual_A, sparsity * step * biggest),
            _shrunk(ahead.B - step * residual_B, sparsity * step * biggest),
        )
        moved = Cotangent(new.A - now.A, new.B - now.B)
        overshot = _dot(Cotangent(ahead.A - new.A, ahead.B - new.B), moved) > 0
        age = age.where(~overshot, 1.0)
        older = (1 + (1 + 4 * age**2).sqrt()) / 2
        momentum = (age - 1) / older
        now, age = new, older
        ahead = Cotangent(new.A + momentum * moved.A, new.B + momentum * moved.B)
        if index % _LOOK_EVERY == 0 and bool((_dot(moved, moved) <= tolerance**2 * _dot(now, now)).all()):
            break
    return now


def _shrunk(values: Tensor, threshold: Tensor) -> Tensor:
    return values.sign() * (values.abs() - threshold).clamp(min=0)


def _dot(one: Cotangent, other: Cotangent) -> Float[Tensor, "*b 1 1"]:
    return sum((x * y).sum((-2, -1), keepdim=True) for x, y in zip(one, other, strict=True))  # pyright: ignore
