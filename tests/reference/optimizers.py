"""Dense, one-layer versions of the published optimizers: every m x n matrix and every projector formed."""

import torch
from torch import Tensor

from tests.reference import dense


class DenseLoRAPro:
    """LoRA-Pro AdamW ("full" mode) from the paper's algorithm, with the true s, exact pinv and bias correction at t."""

    def __init__(self, A: Tensor, B: Tensor, s: float, lr: float, gauge: str, *, adam: bool, wd: float = 0.0):
        self.A, self.B, self.s, self.lr, self.gauge, self.adam, self.wd = (
            A.clone(),
            B.clone(),
            s,
            lr,
            gauge,
            adam,
            wd,
        )
        self.M = self.V = torch.zeros(len(B), A.shape[1], dtype=A.dtype)
        self.t = 0

    def step(self, g: Tensor) -> None:
        self.t += 1
        A, B, s = self.A, self.B, self.s
        H_A, H_B = dense.velocity(A, B, g, s, "zero")
        equivalent = s * (B @ H_A + H_B @ A)
        if self.adam:
            self.M = 0.9 * self.M + 0.1 * equivalent
            self.V = 0.999 * self.V + 0.001 * equivalent**2
            update = (self.M / (1 - 0.9**self.t)) / ((self.V / (1 - 0.999**self.t)).sqrt() + 1e-8)
        else:
            update = g
        H_A, H_B = dense.velocity(A, B, update, s, self.gauge)
        keep = 1 - self.lr * self.wd
        self.A, self.B = keep * A - self.lr * H_A, keep * B - self.lr * H_B


class AdafactorWithMomentum:
    """Adafactor's second moments (no clipping, no relative step) with Adam's momentum and decoupled decay, on W."""

    def __init__(self, W: Tensor, lr: float, betas: tuple[float, float], eps: float, wd: float = 0.0):
        self.W, self.lr, self.betas, self.eps, self.wd = W.clone(), lr, betas, eps, wd
        self.M = torch.zeros_like(W)
        self.rows, self.columns = torch.zeros_like(W[:, 0]), torch.zeros_like(W[0])
        self.t = 0

    def step(self, g: Tensor) -> None:
        self.t += 1
        beta1, beta2 = self.betas
        self.M = beta1 * self.M + (1 - beta1) * g
        self.rows = beta2 * self.rows + (1 - beta2) * g.square().mean(1)
        self.columns = beta2 * self.columns + (1 - beta2) * g.square().mean(0)
        rows, columns = (v / (1 - beta2**self.t) for v in (self.rows, self.columns))
        root = (rows / rows.mean()).sqrt()[:, None] * (columns.sqrt() + self.eps)[None, :]
        self.W = (1 - self.lr * self.wd) * self.W - self.lr * self.M / (1 - beta1**self.t) / root


class DenseTangentAdam:
    """TangentAdam with every object of the size of W and retraction by a full SVD."""

    def __init__(self, A: Tensor, B: Tensor, s: float, lr: float):
        self.A, self.B, self.s, self.lr = A.clone(), B.clone(), s, lr
        self.M = torch.zeros(len(B), A.shape[1], dtype=A.dtype)
        self.rows, self.columns = torch.zeros(len(B), dtype=A.dtype), torch.zeros(A.shape[1], dtype=A.dtype)
        self.t = 0

    @property
    def Y(self) -> Tensor:
        return self.B @ self.A

    def step(self, g: Tensor) -> None:
        self.t += 1
        A, B, r = self.A, self.B, len(self.A)
        seen = dense.project(A, B, g)
        self.M = 0.9 * dense.project(A, B, self.M) + 0.1 * seen
        self.rows = 0.999 * self.rows + 0.001 * seen.square().mean(1)
        self.columns = 0.999 * self.columns + 0.001 * seen.square().mean(0)
        rows, columns = (v / (1 - 0.999**self.t) for v in (self.rows, self.columns))
        D_r, D_c = (rows / rows.mean()).sqrt(), columns.sqrt() + 1e-8
        xi = dense.project_metric(A, B, self.M / (1 - 0.9**self.t), D_r, D_c)
        U, S, Vh = torch.linalg.svd(B @ A - self.lr / self.s * xi, full_matrices=False)
        self.A, self.B = S[:r].sqrt()[:, None] * Vh[:r], U[:, :r] * S[:r].sqrt()


class Muon:
    """Muon with an exact polar factor, Nesterov's momentum and decoupled decay, on W."""

    def __init__(self, W: Tensor, lr: float, step_size: float, beta: float = 0.9, wd: float = 0.0):
        self.W, self.lr, self.step_size, self.beta, self.wd = W.clone(), lr, step_size, beta, wd
        self.M = torch.zeros_like(W)

    def step(self, g: Tensor) -> None:
        self.M = self.beta * self.M + (1 - self.beta) * g
        ahead = self.beta * self.M + (1 - self.beta) * g
        self.W = (1 - self.lr * self.wd) * self.W - self.step_size * dense.msign(ahead)


class DenseTangentMuon:
    """TangentMuon with every object of the size of W and retraction by a full SVD."""

    def __init__(self, A: Tensor, B: Tensor, s: float, step_size: float, *, nesterov: bool, iterations: int):
        self.A, self.B, self.s, self.step_size = A.clone(), B.clone(), s, step_size
        self.nesterov, self.iterations = nesterov, iterations
        self.M = torch.zeros(len(B), A.shape[1], dtype=A.dtype)

    @property
    def Y(self) -> Tensor:
        return self.B @ self.A

    def step(self, g: Tensor) -> None:
        A, B, r = self.A, self.B, len(self.A)
        self.M = 0.9 * dense.project(A, B, self.M) + 0.1 * dense.project(A, B, g)
        ahead = 0.9 * self.M + 0.1 * g if self.nesterov else self.M
        xi = dense.spectral_direction(A, B, ahead, self.iterations)
        U, S, Vh = torch.linalg.svd(B @ A - self.step_size / self.s * xi, full_matrices=False)
        self.A, self.B = S[:r].sqrt()[:, None] * Vh[:r], U[:, :r] * S[:r].sqrt()
