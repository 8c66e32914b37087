r"""The published LoRA-Pro step, one layer after another: what tangora's is timed against, and no more than that.

Follows the algorithm of the released code (mrflogs/LoRA-Pro, fe26027, a DeepSpeed optimizer): every pair of factors in
a Python loop; pseudo-inverses of the Gram matrices damped by 1e-8; the $m \times m$ matrix $I - B G_B^{-1} B^\top$,
formed each time it is used; Adam's moments of the $m \times n$ equivalent gradient; a Sylvester equation solved through
complex ``torch.linalg.eig``; the result put into ``.grad`` for a base optimizer.

Differs in what would be wrong or is beside the point: the true scaling (there fixed to 2), bias correction at step 1
(there at 2), the square in the second moment in float32 (there rounded to bfloat16, two more passes over the matrix).
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tangora import LoraPair

DAMPING = 1e-8


class PublishedLoRAPro:
    r"""LoRA-Pro as released (``weight``), and the same without $m \times n$ moments (``factor``).

    ``factor`` gives each layer's direction to AdamW as its gradient, like ``tangora.LoRAPro(moments="factor")``, but
    with the released code's loop, projector and eigenvalue solver.

    Args:
        pairs: Pairs; each needs gradients at every step, which the step overwrites.
        lr: Learning rate.
        moments: ``weight`` or ``factor``.
        betas: Decay rates of the moments.
        eps: Added to the root of the second moment.
    """

    def __init__(
        self,
        pairs: Sequence[LoraPair],
        lr: float,
        moments: Literal["weight", "factor"],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        self.pairs, self.moments, self.betas, self.eps = list(pairs), moments, betas, eps
        parameters = [parameter for pair in pairs for parameter in (pair.A, pair.B)]
        self.base: torch.optim.Optimizer = (
            torch.optim.SGD(parameters, lr)
            if moments == "weight"
            else torch.optim.AdamW(parameters, lr, betas, eps, weight_decay=0.0)
        )
        self._weight_state: dict[int, dict[str, Tensor]] = {}
        self._steps = 0

    @property
    def state(self) -> dict[Any, dict[str, Tensor]]:
        """Everything kept from step to step."""
        return {**self._weight_state, **self.base.state}

    @torch.no_grad()
    def step(self) -> None:
        """Take one step."""
        self._steps += 1
        for index, pair in enumerate(self.pairs):
            pair.A.grad, pair.B.grad = self._adjusted(index, pair)
        self.base.step()

    def _adjusted(self, index: int, pair: LoraPair) -> tuple[Tensor, Tensor]:
        A, B, s = pair.A, pair.B, pair.scaling
        g_A, g_B = pair.A.grad, pair.B.grad
        assert g_A is not None
        assert g_B is not None
        inverse_A, inverse_B = damped_pinv(A @ A.T), damped_pinv(B.T @ B)
        if self.moments == "weight":
            H_A, H_B = projected(B, g_A, g_B, inverse_A, inverse_B, s)
            direction = self._adam(index, s * B @ H_A + s * H_B @ A)
            g_A, g_B = s * B.T @ direction, s * direction @ A.T
        H_A, H_B = projected(B, g_A, g_B, inverse_A, inverse_B, s)
        X = solve_sylvester_by_eig(B.T @ B, A @ A.T, -(1 / s**2) * inverse_B @ g_A @ A.T)
        return H_A + X @ A, H_B - B @ X

    def _adam(self, index: int, equivalent: Tensor) -> Tensor:
        beta1, beta2 = self.betas
        if index not in self._weight_state:
            zeros = torch.zeros_like(equivalent)
            self._weight_state[index] = {"exp_avg": zeros, "exp_avg_sq": zeros.clone()}
        first, second = self._weight_state[index]["exp_avg"], self._weight_state[index]["exp_avg_sq"]
        first.lerp_(equivalent, 1 - beta1)
        second.mul_(beta2).addcmul_(equivalent, equivalent, value=1 - beta2)
        denominator = (second.sqrt() / math.sqrt(1 - beta2**self._steps)).add_(self.eps)
        return (first / (1 - beta1**self._steps)) / denominator


def damped_pinv(gram: Tensor) -> Tensor:
    """Return the pseudo-inverse of a Gram matrix after adding 1e-8 to its diagonal.

    Args:
        gram: Symmetric.

    Returns:
        The pseudo-inverse, by SVD.
    """
    return torch.linalg.pinv(gram + DAMPING * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))


def projected(
    B: Tensor, g_A: Tensor, g_B: Tensor, inverse_A: Tensor, inverse_B: Tensor, s: float
) -> tuple[Tensor, Tensor]:
    r"""Return the directions of Theorem 2.1 in the zero gauge, with the $m \times m$ projector in full.

    Args:
        B: Factor.
        g_A: Gradient with respect to A.
        g_B: Gradient with respect to B.
        inverse_A: Inverse of $A A^\top$.
        inverse_B: Inverse of $B^\top B$.
        s: Scaling.

    Returns:
        $(H_A, H_B)$.
    """
    identity = torch.eye(len(B), dtype=B.dtype, device=B.device)
    H_A = (1 / s**2) * inverse_B @ g_A
    H_B = (1 / s**2) * ((identity - B @ inverse_B @ B.T) @ g_B @ inverse_A)
    return H_A, H_B


def solve_sylvester_by_eig(left: Tensor, right: Tensor, constant: Tensor) -> Tensor:
    """Solve ``left X + X right = constant`` by two general eigendecompositions in complex arithmetic.

    Args:
        left: Square.
        right: Square.
        constant: Right-hand side.

    Returns:
        The real part of the solution.
    """
    left_values, left_vectors = torch.linalg.eig(left)
    right_values, right_vectors = torch.linalg.eig(right)
    rotated = torch.linalg.solve(left_vectors, constant.to(left_vectors.dtype) @ right_vectors)
    solved = rotated / (left_values[:, None] + right_values[None, :])
    return (left_vectors @ solved @ torch.linalg.inv(right_vectors)).real
