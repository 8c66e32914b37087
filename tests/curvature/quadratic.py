"""A loss that is a weighted mean of quadratics, with everything of a curvature operator computed exactly."""

from types import SimpleNamespace

import torch
from torch import Tensor

from tangora.curvature import CurvatureOperator, Eigenpairs


class Quadratic(CurvatureOperator):
    r"""$L(\delta) = \sum_b w_b (c_b + g_b^\top \delta + \tfrac12 \delta^\top H_b \delta)$ with normalised weights."""

    size, dtype, device, space = 0, torch.float64, torch.device("cpu"), None

    def __init__(self, matrices, gradients=None, *, weights=None, layout=None, constant=0.5):
        self.matrices = [matrix.double() for matrix in matrices]
        self.size = self.matrices[0].shape[0]
        zero = torch.zeros(self.size, dtype=torch.float64)
        self.gradients = [zero] * len(matrices) if gradients is None else gradients
        self.weights = [1.0] * len(matrices) if weights is None else weights
        self.constant = constant
        self.num_products = 0
        self.space = SimpleNamespace(layout=layout or {"all": slice(0, self.size)}, kind="weights")

    @property
    def batches(self):
        return self.matrices

    def dense(self) -> Tensor:
        return self._mean(self.matrices)

    def matvec(self, vector):
        self.num_products += 1
        return self._apply(vector)

    def _apply(self, flat):
        return self.dense() @ flat

    def top_eigenpairs(self, k=10, *, tol=1e-4, seed=0):
        self.num_products += 1
        values, vectors = torch.linalg.eigh(self.dense())
        residuals = torch.zeros(k, dtype=torch.float64)
        return Eigenpairs(values.flip(0)[:k], vectors.flip(1)[:, :k].contiguous(), residuals, 1, True)

    def block(self, layer):
        part = self.space.layout[layer]
        return Quadratic([matrix[part, part] for matrix in self.matrices], weights=self.weights)

    def per_batch(self):
        for weight, matrix, gradient in zip(self.weights, self.matrices, self.gradients, strict=True):
            yield weight, Quadratic([matrix], [gradient])

    def loss(self):
        return self.constant

    def gradient(self):
        return self._mean(self.gradients)

    def loss_at(self, displacement):
        quadratic = displacement @ (self.dense() @ displacement) / 2
        return self.constant + float(self.gradient() @ displacement + quadratic)

    def gradient_at(self, displacement):
        return self.gradient() + self.dense() @ displacement

    def _mean(self, tensors):
        pairs = zip(self.weights, tensors, strict=True)
        return sum(weight * tensor for weight, tensor in pairs) / sum(self.weights)


def symmetric(size: int, seed: int, *, low: float | None = None) -> Tensor:
    """A random symmetric matrix, with no eigenvalue below ``low``."""
    noise = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    matrix = (noise + noise.mT) / 2
    if low is None:
        return matrix
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values - values[0] + low) @ vectors.mT


def vector(size: int, seed: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
