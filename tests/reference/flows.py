"""Naive dense float64 versions of the projected gradient flow and of one step of every low-rank scheme."""

from collections.abc import Callable

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from tests.reference.dense import truncated_svd

Gradient = Callable[[Tensor], Tensor]


def bases(Y: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return the leading r left and right singular vectors, m x r and n x r."""
    U, _, Vh = torch.linalg.svd(Y, full_matrices=False)
    return U[:, :r], Vh[:r].T


def tangent_part(Y: Tensor, Z: Tensor, r: int) -> Tensor:
    """Return P_T(Z) at the rank-r matrix Y."""
    U, V = bases(Y, r)
    P_U, P_V = U @ U.T, V @ V.T
    return P_U @ Z + Z @ P_V - P_U @ Z @ P_V


def projected_flow(gradient: Gradient, Y0: Tensor, r: int, t_end: float) -> Tensor:
    """Solve dY/dt = -P_T(g(Y)) on dense matrices by an eighth-order method."""

    def velocity(_t: float, flat: np.ndarray) -> np.ndarray:
        Y = torch.from_numpy(flat.copy()).reshape(Y0.shape)
        return -tangent_part(Y, gradient(Y), r).numpy().reshape(-1)

    solution = solve_ivp(
        velocity, (0, t_end), Y0.numpy().reshape(-1), method="DOP853", rtol=1e-13, atol=1e-13
    )
    assert solution.success
    return torch.from_numpy(solution.y[:, -1].copy()).reshape(Y0.shape)


def projected_midpoint(gradient: Gradient, Y0: Tensor, r: int, t_end: float, steps: int) -> Tensor:
    """Solve the same with many small steps, every stage cut by a dense SVD: usable at tiny singular values."""
    Y, h = Y0, t_end / steps
    for _ in range(steps):
        middle = truncated_svd(Y - h / 2 * tangent_part(Y, gradient(Y), r), r)
        Y = truncated_svd(Y - h * tangent_part(middle, gradient(middle), r), r)
    return Y


def ksl(gradient: Gradient, Y: Tensor, r: int, h: float) -> Tensor:
    """One Lie step with Euler substeps, in projectors: -g P_V, + P_U1 g P_V, - P_U1 g."""
    _, V = bases(Y, r)
    P_V = V @ V.T
    Y1 = Y - h * gradient(Y) @ P_V
    U1, _ = bases(Y1, r)
    P_U = U1 @ U1.T
    Y2 = Y1 + h * P_U @ gradient(Y1) @ P_V
    return Y2 - h * P_U @ gradient(Y2)


def augmented_bug(gradient: Gradient, Y: Tensor, r: int, h: float) -> Tensor:
    """One step with Euler substeps before the cut: P_U (Y - h g) P_V on the augmented bases."""
    g = gradient(Y)
    U, V = bases(Y, r)
    wide_U, _ = bases(torch.cat([U, g @ V], dim=1), 2 * r)
    wide_V, _ = bases(torch.cat([V, g.T @ U], dim=1), 2 * r)
    return wide_U @ wide_U.T @ (Y - h * g) @ wide_V @ wide_V.T
