"""LoRA-TSD as published, one layer after the other: what a batched step in small cores is compared with.

Written from the formulas of arXiv:2609.02734: averages of the factors' gradients without transport, two thin QRs and a
quintic Newton-Schulz iteration of a 2r x 2r matrix in each of the alternating projections.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tangora import LoraPair

_QUINTIC = (3.4445, -4.7750, 2.0315)
_RIDGE = 1e-8


class PublishedLoRATSD:
    """LoRA-TSD on pairs.

    Args:
        pairs: What it steps.
        lr: Size of a step, in units of the weight.
        iterations: Alternating projections.
        momentum: Decay rate of the averages.
    """

    def __init__(self, pairs: Sequence[LoraPair], lr: float, iterations: int = 1, momentum: float = 0.95):
        self.pairs, self.lr, self.iterations, self.momentum = list(pairs), lr, iterations, momentum
        self.state: dict[Tensor, dict[str, Any]] = {
            factor: {"momentum": torch.zeros_like(factor)} for pair in pairs for factor in (pair.A, pair.B)
        }

    @torch.no_grad()
    def step(self) -> None:
        """Take one step of every pair."""
        for pair in self.pairs:
            A, B, s = pair.A.detach(), pair.B.detach(), pair.scaling
            M_A, M_B = (self.state[factor]["momentum"] for factor in (pair.A, pair.B))
            assert pair.A.grad is not None
            assert pair.B.grad is not None
            M_A.lerp_(pair.A.grad / s, 1 - self.momentum)
            M_B.lerp_(pair.B.grad / s, 1 - self.momentum)
            inverse_A, inverse_B = _inverse(A @ A.mT), _inverse(B.mT @ B)
            outside = M_A - (M_A @ A.mT) @ inverse_A @ A
            left = torch.cat([B, M_B @ inverse_A], 1)
            right = torch.cat([inverse_B @ outside, A], 0)
            for _ in range(self.iterations):
                Q_left, R_left = torch.linalg.qr(left)
                Q_right, R_right = torch.linalg.qr(right.mT)
                core = _newton_schulz(R_left @ R_right.mT)
                along_A, along_B = Q_right.mT @ A.mT @ inverse_A, inverse_B @ (B.mT @ Q_left)
                across = Q_left @ (core @ along_A)
                left = torch.cat([B, across - B @ (inverse_B @ (B.mT @ across))], 1)
                right = torch.cat([along_B @ core @ Q_right.mT, A], 0)
            rank, size = A.shape[0], self.lr / s
            pair.A.sub_(right[:rank], alpha=size)
            pair.B.sub_(left[:, rank:], alpha=size)


def _inverse(gram: Tensor) -> Tensor:
    ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.inv(gram + ridge)


def _newton_schulz(matrix: Tensor) -> Tensor:
    a, b, c = _QUINTIC
    X = matrix / matrix.norm().clamp(min=1e-12)
    for _ in range(5):
        G = X @ X.mT
        X = a * X + (b * G + c * (G @ G)) @ X
    return X
