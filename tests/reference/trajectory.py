"""Naive dense float64 versions of METHODS section 9 over time: every weight and every projector formed."""

from itertools import pairwise

import torch
from torch import Tensor


def weight(W0: Tensor, A: Tensor, B: Tensor, s: float, *, start=None, magnitude=None) -> Tensor:
    """Return what the layer multiplies with: W0 + s (B A - B0 A0), normed by rows and stretched for DoRA."""
    W = W0.double() + s * B.double() @ A.double()
    if start is not None:
        W -= s * start[0].double() @ start[1].double()
    if magnitude is not None:
        W = magnitude.double()[:, None] * W / W.norm(dim=1, keepdim=True)
    return W


def path_length(weights: list[Tensor]) -> float:
    return float(sum((new - old).norm() for old, new in pairwise(weights)))


def whole_path_length(steps: list[list[Tensor]]) -> float:
    """Of many layers, each step's weights joined to one vector."""
    return path_length([torch.cat([W.flatten() for W in weights]) for weights in steps])


def compare(W: Tensor, W0: Tensor, W_full: Tensor) -> tuple[float, float, float]:
    """Return distance, relative distance and cosine to full fine-tuning."""
    own, other = (W - W0).flatten(), (W_full - W0).flatten()
    gap = (W - W_full).norm()
    return float(gap), float(gap / other.norm()), float(own @ other / (own.norm() * other.norm()))


def angles(one: Tensor, other: Tensor) -> Tensor:
    """Return the principal angles of two column spaces in degrees, ascending, from their projectors.

    The non-zero singular values of (I - P) Q are the sines, those of P Q the cosines.
    """
    P = one @ torch.linalg.pinv(one)
    Q = torch.linalg.qr(other).Q
    cosines = torch.linalg.svdvals(P @ Q)
    sines = torch.linalg.svdvals(Q - P @ Q).flip(0)
    small = cosines > 0.7
    return torch.rad2deg(torch.where(small, sines.clamp(max=1).asin(), cosines.clamp(max=1).acos()))


def gradient_view(A: Tensor, B: Tensor, g: Tensor, r: int) -> tuple[Tensor, Tensor, float, float]:
    """Return the angles of B and A to the leading r singular subspaces, kappa and epsilon."""
    P_A, P_B = torch.linalg.pinv(A) @ A, B @ torch.linalg.pinv(B)
    missed = g - (P_B @ g + g @ P_A - P_B @ g @ P_A)
    U, _, Vh = torch.linalg.svd(g, full_matrices=False)
    kappa = 1 - float(missed.square().sum() / g.square().sum())
    return angles(U[:, :r], B), angles(Vh[:r].T, A.T), kappa, float(missed.norm())


def gradient_shape(g: Tensor, r: int) -> tuple[float, float, float]:
    """Return stable rank, effective rank, and the share of the leading 2r singular values."""
    values = torch.linalg.svdvals(g)
    shares = values / values.sum()
    energies = values.square()
    effective = torch.exp(-(shares * shares.log()).sum())
    return (
        float(energies.sum() / energies[0]),
        float(effective),
        float(energies[: 2 * r].sum() / energies.sum()),
    )
