"""Dense, one-layer versions of the published optimizers: every m x n matrix and every projector formed."""

import torch
from torch import Tensor

from tests.reference import dense


class _Factors:
    """Factors of one layer, W = s B A."""

    def __init__(self, A: Tensor, B: Tensor, s: float, lr: float):
        self.A, self.B, self.s, self.lr, self.t = A.clone(), B.clone(), s, lr, 0

    @property
    def W(self) -> Tensor:
        return self.s * self.B @ self.A

    def _retract(self, Y: Tensor) -> None:
        U, S, Vh = torch.linalg.svd(Y, full_matrices=False)
        r = len(self.A)
        self.A, self.B = S[:r].sqrt()[:, None] * Vh[:r], U[:, :r] * S[:r].sqrt()


class DenseLoRAPro(_Factors):
    """LoRA-Pro AdamW ("full" mode) from the paper's algorithm, with the true s, exact pinv and bias correction at t."""

    def __init__(self, A: Tensor, B: Tensor, s: float, lr: float, gauge: str, *, adam: bool, wd: float = 0.0):
        super().__init__(A, B, s, lr)
        self.gauge, self.adam, self.wd = gauge, adam, wd
        self.M = self.V = torch.zeros(len(B), A.shape[1], dtype=A.dtype)

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


class DenseTangentAdam(_Factors):
    """TangentAdam with every object of the size of W and retraction by a full SVD."""

    def __init__(self, A: Tensor, B: Tensor, s: float, lr: float):
        super().__init__(A, B, s, lr)
        self.M = torch.zeros(len(B), A.shape[1], dtype=A.dtype)
        self.rows, self.columns = torch.zeros(len(B), dtype=A.dtype), torch.zeros(A.shape[1], dtype=A.dtype)

    def step(self, g: Tensor) -> None:
        self.t += 1
        A, B = self.A, self.B
        seen = dense.project(A, B, g)
        self.M = 0.9 * dense.project(A, B, self.M) + 0.1 * seen
        self.rows = 0.999 * self.rows + 0.001 * seen.square().mean(1)
        self.columns = 0.999 * self.columns + 0.001 * seen.square().mean(0)
        rows, columns = (v / (1 - 0.999**self.t) for v in (self.rows, self.columns))
        D_r, D_c = (rows / rows.mean()).sqrt(), columns.sqrt() + 1e-8
        xi = dense.project_metric(A, B, self.M / (1 - 0.9**self.t), D_r, D_c)
        self._retract(B @ A - self.lr / self.s * xi)


class Muon:
    """Muon with an exact polar factor, Nesterov's momentum and decoupled decay, on W."""

    def __init__(self, W: Tensor, lr: float, step_size: float, beta: float = 0.9, wd: float = 0.0):
        self.W, self.lr, self.step_size, self.beta, self.wd = W.clone(), lr, step_size, beta, wd
        self.M = torch.zeros_like(W)

    def step(self, g: Tensor) -> None:
        self.M = self.beta * self.M + (1 - self.beta) * g
        ahead = self.beta * self.M + (1 - self.beta) * g
        self.W = (1 - self.lr * self.wd) * self.W - self.step_size * dense.msign(ahead)


class DenseTangentMuon(_Factors):
    """TangentMuon with every object of the size of W and retraction by a full SVD."""

    def __init__(self, A: Tensor, B: Tensor, s: float, step_size: float, *, nesterov: bool, iterations: int):
        super().__init__(A, B, s, step_size)
        self.nesterov, self.iterations = nesterov, iterations
        self.M = torch.zeros(len(B), A.shape[1], dtype=A.dtype)

    def step(self, g: Tensor) -> None:
        A, B = self.A, self.B
        self.M = 0.9 * dense.project(A, B, self.M) + 0.1 * dense.project(A, B, g)
        ahead = 0.9 * self.M + 0.1 * g if self.nesterov else self.M
        xi = dense.spectral_direction(A, B, ahead, self.iterations)
        self._retract(B @ A - self.lr / self.s * xi)


class DenseLoRAMuon(_Factors):
    """LoRA-Muon from the paper's formulas, with roots and polar factors by eigen- and singular value decompositions."""

    def __init__(self, A: Tensor, B: Tensor, s: float, lr: float, wd: float = 0.0):
        super().__init__(A, B, s, lr)
        self.wd = wd
        self.M_A, self.M_B = torch.zeros_like(A), torch.zeros_like(B)

    def step(self, g: Tensor) -> None:
        A, B = self.A, self.B
        self.M_A = 0.9 * self.M_A + 0.1 * self.s * B.mT @ g
        self.M_B = 0.9 * self.M_B + 0.1 * self.s * g @ A.mT
        root_A, root_B = (dense.power(S, -0.5) for S in (A @ A.mT, B.mT @ B))
        step_A = -self.lr / 2 / self.s * root_B @ dense.msign(root_B @ self.M_A)
        step_B = -self.lr / 2 / self.s * dense.msign(self.M_B @ root_A) @ root_A
        k = (1 - self.lr * self.wd) ** 0.5
        self.A, self.B = k * A + step_A / k, k * B + step_B / k


class DensePoLoRA(_Factors):
    """PoLoRA from the paper's formulas, with diagonal matrices and roots formed."""

    def __init__(self, A: Tensor, B: Tensor, s: float, lr: float):
        super().__init__(A, B, s, lr)
        self.M_A, self.M_B = torch.zeros_like(A), torch.zeros_like(B)
        self.Q, self.P = torch.full_like(A[0], 1e-12), torch.full_like(B[:, 0], 1e-12)

    def step(self, g: Tensor) -> None:
        A, B, r = self.A, self.B, len(self.A)
        g_A, g_B = self.s * B.mT @ g, self.s * g @ A.mT
        self.M_A, self.M_B = 0.9 * self.M_A + 0.1 * g_A, 0.9 * self.M_B + 0.1 * g_B
        ahead_A, ahead_B = 0.9 * self.M_A + 0.1 * g_A, 0.9 * self.M_B + 0.1 * g_B
        q, p = (torch.diag((x / x.max() + 1e-4) ** -0.5) for x in (self.Q, self.P))
        C_B, C_A = B.mT @ p.inverse() @ p.inverse() @ B, A @ q.inverse() @ q.inverse() @ A.mT
        C_B, C_A = (
            C + max(1e-4 * torch.linalg.matrix_norm(C, 2).item(), 1e-12) * torch.eye(r, dtype=C.dtype)
            for C in (C_B, C_A)
        )
        root_B, root_A = dense.power(C_B, -0.5), dense.power(C_A, -0.5)
        D_A = root_B @ dense.msign(root_B @ ahead_A @ q) @ q
        D_B = p @ dense.msign(p @ ahead_B @ root_A) @ root_A
        norm = torch.linalg.matrix_norm
        rho = self.lr / self.s / (norm(A, 2) + norm(B, 2))
        self.A = A - rho * D_A / norm(D_A, 2).clamp(min=1e-300)
        self.B = B - rho * D_B / norm(D_B, 2).clamp(min=1e-300)
        self.Q = 0.99 * self.Q + 0.01 / r * (g_A * (C_B.inverse() @ g_A)).sum(0)
        self.P = 0.99 * self.P + 0.01 / r * (g_B * (g_B @ C_A.inverse())).sum(1)


class DenseLoRARITE(_Factors):
    """LoRA-RITE from the paper's algorithm: thin QRs, bases of the last step kept, no escaped mass."""

    def __init__(self, A: Tensor, B: Tensor, s: float, lr: float, betas: tuple[float, float] = (0.9, 0.999)):
        super().__init__(A, B, s, lr)
        self.betas = betas
        self.kept: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def _moved(self, key: str, gradient: Tensor, other: Tensor) -> Tensor:
        """Return the step of a tall factor, whose partner's transpose is ``other``."""
        Q, R = torch.linalg.qr(other)
        seen = gradient @ R.inverse()
        beta1, beta2 = (b * (1 - b ** (self.t - 1)) / (1 - b**self.t) for b in self.betas)
        old, M, V = self.kept.get(key, (Q, 0 * seen, 0 * R))
        P = Q.mT @ old
        V = beta2 * P @ V @ P.mT + (1 - beta2) * seen.mT @ seen / len(seen)
        values, vectors = torch.linalg.eigh(V)
        inverse_root = (vectors / (values.clamp(min=0).sqrt() + 1e-6)) @ vectors.mT
        M = beta1 * M @ P.mT + (1 - beta1) * seen @ inverse_root
        self.kept[key] = (Q, M, V)
        return -self.lr * M @ R.inverse().mT

    def step(self, g: Tensor) -> None:
        self.t += 1
        A, B = self.A, self.B
        step_B = self._moved("B", self.s * g @ A.mT, A.mT)
        step_A = self._moved("A", (self.s * B.mT @ g).mT, B).mT
        self.A, self.B = A + step_A, B + step_B
