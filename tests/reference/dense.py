"""Naive dense float64 versions of METHODS sections 1 to 3: one matrix at a time, every projector formed."""

import torch
from torch import Tensor


def projectors(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return P_A (n x n) and P_B (m x m)."""
    return torch.linalg.pinv(A, rtol=1e-12) @ A, B @ torch.linalg.pinv(B, rtol=1e-12)


def project(A: Tensor, B: Tensor, g: Tensor) -> Tensor:
    P_A, P_B = projectors(A, B)
    return P_B @ g + g @ P_A - P_B @ g @ P_A


def velocity(A: Tensor, B: Tensor, g: Tensor, s: float, gauge: str) -> tuple[Tensor, Tensor]:
    """Return (H_A, H_B) of Theorem 2.1, from the paper's formulas in g_A, g_B."""
    g_A, g_B = s * B.T @ g, s * g @ A.T
    G_A, G_B = torch.linalg.pinv(A @ A.T, hermitian=True), torch.linalg.pinv(B.T @ B, hermitian=True)
    X = gauge_matrix(A, B, g_A, s, gauge)
    _, P_B = projectors(A, B)
    H_A = G_B @ g_A / s**2 + X @ A
    H_B = (torch.eye(len(B), dtype=B.dtype) - P_B) @ g_B @ G_A / s**2 - B @ X
    return H_A, H_B


def gauge_matrix(A: Tensor, B: Tensor, g_A: Tensor, s: float, gauge: str) -> Tensor:
    r = len(A)
    eye = torch.eye(r, dtype=A.dtype)
    gram_A, gram_B = A @ A.T, B.T @ B
    G_A, G_B = torch.linalg.pinv(gram_A, hermitian=True), torch.linalg.pinv(gram_B, hermitian=True)
    K = g_A @ A.T
    if gauge == "zero":
        return torch.zeros_like(eye)
    if gauge == "symmetric":
        return -G_B @ K @ G_A / (2 * s**2)
    if gauge == "sylvester":
        left, right, constant = gram_B, gram_A, -G_B @ K / s**2
    else:
        left = right = gram_A + gram_B
        constant = -(G_B @ K + K.T @ G_B) / s**2
    # vec(L X + X R) = (L kron I + I kron R) vec(X), row-major
    system = torch.kron(left.contiguous(), eye) + torch.kron(eye, right.T.contiguous())
    return (torch.linalg.pinv(system, rtol=1e-13) @ constant.reshape(-1)).reshape(r, r)


def project_metric(A: Tensor, B: Tensor, g: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Minimise |xi - H^-1 g|_H over the tangent space by brute-force least squares."""
    (r, n), m = A.shape, len(B)
    basis = []
    for i in range(r):
        for j in range(n):
            E = torch.zeros(r, n, dtype=A.dtype)
            E[i, j] = 1
            basis.append(B @ E)
        for j in range(m):
            E = torch.zeros(m, r, dtype=A.dtype)
            E[j, i] = 1
            basis.append(E @ A)
    weight = (rows[:, None] * columns[None, :]).sqrt()
    columns_of_T = torch.stack([(weight * t).reshape(-1) for t in basis], dim=1)
    target = (weight * (g / (rows[:, None] * columns[None, :]))).reshape(-1)
    coefficients = torch.linalg.pinv(columns_of_T, rtol=1e-11) @ target
    return ((columns_of_T @ coefficients).reshape(m, n)) / weight


def truncated_svd(Y: Tensor, r: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(Y, full_matrices=False)
    return (U[:, :r] * S[:r]) @ Vh[:r]


def orthographic(A: Tensor, B: Tensor, xi: Tensor, step: float) -> Tensor:
    """Find Y+ of rank r with P_T(Y+ - (Y - h xi)) = 0, from the closed form in U, S, V."""
    r = len(A)
    U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
    U, S, V = U[:, :r], torch.diag(S[:r]), Vh[:r].T
    target = B @ A - step * xi
    core = U.T @ target @ V
    left, right = target @ V, U.T @ target
    return left @ torch.linalg.inv(core) @ right


def msign(Z: Tensor) -> Tensor:
    """Return U V' of the SVD, without the directions in which Z vanishes."""
    U, S, Vh = torch.linalg.svd(Z, full_matrices=False)
    kept = S / S[0] > 1e-11
    return U[:, kept] @ Vh[kept]


def spectral_direction(A: Tensor, B: Tensor, M: Tensor, iterations: int) -> Tensor:
    """Alternate between the matrices with singular values one and the tangent space."""
    X = project(A, B, M)
    for _ in range(iterations):
        X = project(A, B, msign(X))
    return X


def power(matrix: Tensor, exponent: float) -> Tensor:
    """Power of a symmetric positive semi-definite matrix on its numerical range, zero elsewhere."""
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > 1e-12 * values[-1].clamp(min=0)
    powers = values.where(kept, 1.0).pow(exponent).where(kept, 0.0)
    return (vectors * powers) @ vectors.mT
