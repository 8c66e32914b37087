"""Operators with prescribed eigenvalues: n can be thousands, and every product is a Fourier transform."""

import math

import numpy as np
import torch
from torch import Tensor


class Rotated:
    r"""$H = Q^\top \operatorname{diag}(\lambda)\, Q$ with an orthogonal $Q$ that spreads every eigenvector.

    $Q$ is random signs followed by the discrete Hartley transform, which is orthogonal and its own inverse. Random
    signs as probes are exact on a diagonal matrix; here they are not.
    """

    def __init__(self, values, *, dtype=torch.float64, seed=0):
        self.values = torch.as_tensor(values, dtype=torch.float64).sort(descending=True).values
        self.size, self.dtype, self.device = self.values.shape[0], dtype, torch.device("cpu")
        generator = torch.Generator().manual_seed(31415926 + seed)  # not the seeds of probes
        self.signs = (2 * torch.randint(0, 2, (self.size,), generator=generator) - 1).to(dtype)
        self.order = torch.randperm(self.size, generator=generator)
        self.diagonal = self.values[self.order].to(dtype)
        self.num_products = 0

    @property
    def shape(self):
        return self.size, self.size

    def __matmul__(self, vector):
        assert vector.shape == (self.size,)
        assert vector.dtype == self.dtype
        self.num_products += 1
        return self.signs * hartley(self.diagonal * hartley(self.signs * vector))

    def dense(self):
        eye = torch.eye(self.size, dtype=self.dtype)
        return torch.stack([Rotated.__matmul__(self, row) for row in eye])


class Function:
    """An operator that multiplies as it is told to."""

    def __init__(self, matvec, size, dtype=torch.float32):
        self.matvec, self.shape, self.dtype, self.device = matvec, (size, size), dtype, torch.device("cpu")

    def __matmul__(self, vector):
        return self.matvec(vector)


def true_residuals(operator, pairs) -> Tensor:
    """The norms of H v - λ v."""
    images = torch.stack([operator @ vector.contiguous() for vector in pairs.vectors.mT], 1)
    return (images.double() - pairs.vectors.double() * pairs.values).norm(dim=0)


def hartley(vector):
    transformed = torch.fft.fft(vector)
    return (transformed.real - transformed.imag) / math.sqrt(vector.shape[-1])


def separated(size=500, outliers=10):
    """A bulk in [0, 0.5] and outliers 10, 11, ..."""
    return torch.cat([torch.linspace(0, 0.5, size - outliers).double(), 10 + torch.arange(outliers).double()])


def neural_like(size=5000, seed=0):
    """Ten outliers from 0.7 to 12, a tail 0.5 / i, and a bulk of standard deviation 0.01."""
    rng = np.random.default_rng(seed)
    outliers = np.geomspace(0.7, 12, 10)
    tail = 0.5 / np.arange(1, size // 50 + 1)
    bulk = 0.01 * rng.standard_normal(size - len(outliers) - len(tail))
    return torch.from_numpy(np.concatenate([outliers, tail, bulk]))


def clustered(size=500):
    """Five clusters of four values each that differ by a thousandth, and a bulk."""
    centres = torch.arange(5, 10).double()
    clusters = (centres[:, None] + 1e-3 * torch.arange(4).double()).flatten()
    return torch.cat([clusters, torch.linspace(-1, 1, size - 20).double()])


def indefinite(size=500):
    """As many values below zero as above, denser towards zero."""
    half = torch.linspace(0.02, 1, size // 2).double() ** 2
    return torch.cat([5 * half, -4 * half])


def semicircle(size=1000):
    """Wigner's law on [-1, 1], by its quantiles."""
    angles = torch.linspace(-math.pi / 2, math.pi / 2, 20001).double()
    shares = 0.5 + (angles + angles.sin() * angles.cos()) / math.pi
    wanted = (torch.arange(size).double() + 0.5) / size
    return torch.from_numpy(np.interp(wanted, shares, angles.sin()))


def wasserstein(nodes, weights, values):
    """The distance between a discrete measure and the eigenvalues: the area between distribution functions."""
    nodes, weights, values = (np.asarray(x, dtype=np.float64) for x in (nodes, weights, values))
    points = np.concatenate([nodes, values])
    masses = np.concatenate([weights, np.full(len(values), -1 / len(values))])
    order = points.argsort()
    return float((np.abs(masses[order].cumsum())[:-1] * np.diff(points[order])).sum())


def pooled(density) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of all probes together."""
    weights = np.concatenate([*map(np.asarray, density.weights)]) / len(density.weights)
    return np.concatenate([*map(np.asarray, density.nodes)]), weights


def smoothed_nodes(density, width=None, points=41) -> tuple[np.ndarray, np.ndarray]:
    """The mixture of normal distributions that the smoothed density is, as a fine discrete measure."""
    nodes, weights = pooled(density)
    widths = (
        np.concatenate([*map(np.asarray, density.widths())]) if width is None else np.full(len(nodes), width)
    )
    quantiles = torch.special.ndtri((torch.arange(points).double() + 0.5) / points).numpy()
    spread = nodes[:, None] + widths[:, None] * quantiles
    return spread.ravel(), np.repeat(weights / points, points)


def orthonormal(vectors: Tensor) -> float:
    """How far the Gram matrix of the columns is from the identity."""
    vectors = vectors.double()
    return float((vectors.mT @ vectors - torch.eye(vectors.shape[1]).double()).abs().max())
