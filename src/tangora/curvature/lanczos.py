r"""The Lanczos iteration with full reorthogonalisation: extreme eigenvalues from few products.

From $v_1$ the recurrence $H V_m = V_m T_m + \beta_m v_{m+1} e_m^\top$ builds an orthonormal basis $V_m$ of the Krylov
space; the eigenpairs $(\theta, s)$ of the small $T_m$ give Ritz pairs $(\theta, V_m s)$ with the residual
$\|H V_m s - \theta V_m s\| = \beta_m |s_m|$, which is known without another product. Every new vector is
orthogonalised twice against all others: without that converged eigenvalues come back as ghosts.

When the basis is full the best Ritz vectors are kept and the iteration continues with the same remainder
(thick restart;
$T$ is then an arrow followed by a tridiagonal part). When the remainder vanishes the basis spans an invariant subspace;
the iteration continues with a random vector orthogonal to it, until such a sequence has nothing to add.

Source: Parlett, The Symmetric Eigenvalue Problem (1998), chapter 13; thick restart: Wu and Simon (2000), SIAM J. Matrix
Anal. Appl. 22; reorthogonalisation: `tangora.curvature.products.orthogonalize`.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tangora._checks import InputError, check_whole
from tangora._types import Progress
from tangora.curvature.eigenpairs import Eigenpairs, Which, check_request, ends, select
from tangora.curvature.products import (
    ROUNDING,
    Matrix,
    Products,
    dot,
    norm,
    orthogonalize,
    seeded_generator,
    size_of,
)

# a remainder of so many roundings is noise of the products: the Krylov space has ended
_BREAKDOWN = 100
# before that many products no residual is trusted, unless the Krylov space has ended
_LEAST_PRODUCTS = 10
# columns rotated at once: a restart needs no second basis
_CHUNK = 1 << 16


class Tridiagonal(NamedTuple):
    r"""$V H V^\top = T$ with orthonormal rows of $V$; $T$ in float64 on the CPU.

    ``remainder`` is $\beta_m$, the norm of what the basis lacks to be invariant; zero where the iteration ended early.
    """

    diagonal: Float[Tensor, " m"]
    off_diagonal: Float[Tensor, " m-1"]
    basis: Float[Tensor, "m n"]
    remainder: float


def lanczos_eigenpairs(
    operator: Matrix,
    k: int = 10,
    *,
    which: Which = "largest",
    tol: float = 1e-4,
    max_products: int | None = None,
    max_basis: int | None = None,
    copies: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Eigenpairs:
    r"""Find extreme eigenpairs by thick-restart Lanczos.

    Memory: ``max_basis + 1`` vectors, and ``k`` for the result.

    Args:
        operator: A symmetric matrix: anything with ``@``, ``shape``, ``dtype`` and ``device``.
        k: Number of eigenpairs, at most the operator's dimension $n$.
        which: See `tangora.curvature.eigenpairs.Which`.
        tol: Converged when all residuals are at most ``tol`` times the operator's norm; less than a few roundings is
            not asked.
        max_products: Budget, at least ``k``; default $n$ if the basis may grow as large, else 10 full bases.
        max_basis: Vectors held before a restart, at least ``k + 2``; default ``2 k + 40``.
        copies: Also look for further copies of multiple eigenvalues, which one start vector cannot see unless the
            Krylov space ends: after convergence continue with random vectors until one adds nothing. Costs
            about as many
            products again.
        seed: Seed of the random vectors.
        progress: Called after each product with their number and ``max_products``.

    Returns:
        The eigenpairs; the best so far, and ``converged=False``, when the budget is spent.

    Raises:
        InputError: If a number is out of range or a product is not finite.
    """
    size = size_of(operator)
    check_request(size, k, which, tol, max_products)
    if max_basis is not None:
        check_whole("max_basis", max_basis, low=min(k + 2, size))
    rows = min(max_basis or 2 * k + 40, size)
    budget = max_products or (size if rows == size else 10 * rows)
    rows = min(rows, budget)
    product = Products(operator, budget, "eigenvalues", progress)
    generator = seeded_generator(seed)
    krylov = Krylov(product, rows, product.normal(generator))
    search = _Search(k, which, max(tol, ROUNDING * torch.finfo(product.dtype).eps), copies)
    return search.run(krylov, generator).in_dtype(operator.dtype)


class Ritz(NamedTuple):
    """Eigenpairs of the projected operator, values in descending order, vectors in columns.

    ``own`` tells those of the present sequence from those of former ones.
    """

    values: Float[Tensor, " m"]
    vectors: Float[Tensor, "m m"]
    residuals: Float[Tensor, " m"]
    own: Bool[Tensor, " m"]


class Krylov:
    """An orthonormal basis that grows by one vector with each product, and the operator projected on it.

    Args:
        rows: Vectors that the basis may hold; one more is stored.

    Attributes:
        count: Vectors in the basis.
        sequence: Where the present sequence starts; what is before spans an invariant subspace.
        broken: Whether the last product added nothing: the basis is invariant.
        remainder: Norm of what the last product added.
        scale: The largest norm of a product with a basis vector.
    """

    def __init__(self, product: Products, rows: int, start: Float[Tensor, " n"]):
        if start.shape != (product.size,) or not 0 < norm(start) < math.inf:
            raise InputError(f"start must be a finite vector of shape ({product.size},) that is not zero")
        self.product = product
        self.basis = torch.empty(rows + 1, product.size, dtype=product.dtype, device=product.device)
        self.basis[0] = start / norm(start)
        self.projected = np.zeros((rows + 1, rows + 1))
        self.rows, self.count, self.sequence = rows, 0, 0
        self.broken, self.remainder, self.scale = False, 0.0, 0.0
        self._restarts, self._neglected = 0, 0.0

    @property
    def complete(self) -> bool:
        """Whether the basis spans everything."""
        return self.count == self.product.size

    @property
    def full(self) -> bool:
        """Whether a restart is due."""
        return self.count == self.rows

    def step(self) -> None:
        """Multiply the newest vector, and make the next one of the product."""
        at = self.count
        vector = self.product(self.basis[at])
        self.scale = max(self.scale, norm(vector))
        self.projected[at, at] = dot(self.basis[at], vector)
        self.count += 1
        orthogonalize(vector, self.basis[: self.count])
        self.remainder = 0.0 if self.complete else norm(vector)
        self.broken = self.remainder <= _BREAKDOWN * torch.finfo(vector.dtype).eps * self.scale
        if not self.broken:
            self.basis[self.count] = vector.div_(self.remainder)
            self.projected[at, at + 1] = self.projected[at + 1, at] = self.remainder

    def tridiagonalize(self, dimension: int) -> Tridiagonal:
        """Multiply until the Krylov space ends or has this dimension; for a new basis only."""
        while self.count < dimension and not self.broken:
            self.step()
        small = torch.from_numpy(self.projected[: self.count, : self.count])
        remainder = 0.0 if self.broken else self.remainder
        return Tridiagonal(
            small.diagonal().clone(), small.diagonal(1).clone(), self.basis[: self.count], remainder
        )

    def ritz(self) -> Ritz:
        """Diagonalise the projected operator, former sequences and the present one apart: they are not coupled.

        Residuals are as far as the present remainder tells.
        """
        count, first = self.count, self.sequence
        values, vectors = np.empty(count), np.zeros((count, count))
        for part in (slice(first), slice(first, count)):
            values[part], vectors[part, part] = self._eigh(self.projected[part, part])
        residuals = np.abs(vectors[-1]) * (0.0 if self.broken else self.remainder)
        order = np.argsort(-values, kind="stable")
        found = (values[order], vectors[:, order], residuals[order], order >= first)
        return Ritz(*map(torch.from_numpy, found))

    def _eigh(self, small: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not len(small):
            return np.empty(0), np.empty((0, 0))
        if self._restarts:
            return np.linalg.eigh(small)
        return scipy.linalg.eigh_tridiagonal(small.diagonal(), small.diagonal(1))  # pyright: ignore[reportReturnType]

    def rounding(self) -> float:
        """Return what residuals may hide: couplings that were dropped, and rounding."""
        eps = torch.finfo(self.product.dtype).eps
        return self._neglected + ROUNDING * (1 + self._restarts) * eps * self.scale

    def combine(self, coefficients: Float[Tensor, "m p"], into: Float[Tensor, "p n"]) -> None:
        """Combine basis vectors into rows that may be the first ones of the basis itself."""
        turned = coefficients.mT.to(into)
        for left in range(0, into.shape[1], _CHUNK):
            part = slice(left, left + _CHUNK)
            into[:, part] = turned @ self.basis[: self.count, part]

    def restart(self, ritz: Ritz, keep: Tensor) -> None:
        """Replace the basis by some Ritz vectors, fewer than rows; the next vector stays."""
        keep = keep[ritz.own[keep].long().argsort(stable=True)]
        coupling = ritz.vectors[-1, keep] * (0.0 if self.broken else self.remainder)
        kept = keep.shape[0]
        self.combine(ritz.vectors[:, keep], self.basis[:kept])
        self.basis[kept] = self.basis[self.count]
        self.projected[:] = 0.0
        self.projected[range(kept), range(kept)] = ritz.values[keep].numpy()
        self.projected[kept, :kept] = self.projected[:kept, kept] = coupling.numpy()
        self.count, self.sequence = kept, int((~ritz.own[keep]).sum())
        self._restarts += 1

    def renew(self, generator: torch.Generator) -> None:
        """Start another sequence, from a random vector orthogonal to the basis, which must be invariant."""
        coupling = self.projected[self.count, : self.count]
        self._neglected = float(
            np.hypot(self._neglected, max(np.linalg.norm(coupling), self.remainder * self.broken))
        )
        self.projected[self.count, :] = self.projected[:, self.count] = 0.0
        vector = self.product.normal(generator)
        for _ in range(2):  # what remains may be short, where the basis spans nearly everything
            orthogonalize(vector, self.basis[: self.count])
            vector /= norm(vector)
        self.basis[self.count] = vector
        self.sequence, self.broken, self.remainder = self.count, False, 0.0


class _Found(NamedTuple):
    """Result of a search."""

    krylov: Krylov
    ritz: Ritz
    wanted: Tensor
    converged: bool

    def in_dtype(self, dtype: torch.dtype) -> Eigenpairs:
        krylov, ritz, wanted, converged = self
        rows = torch.empty(
            wanted.shape[0], krylov.product.size, dtype=krylov.basis.dtype, device=krylov.basis.device
        )
        krylov.combine(ritz.vectors[:, wanted], rows)
        return Eigenpairs(
            values=ritz.values[wanted],
            vectors=rows.to(dtype).mT,
            residuals=ritz.residuals[wanted] + krylov.rounding(),
            products=krylov.product.count,
            converged=converged,
        )


@dataclass(frozen=True)
class _Search:
    """Wanted eigenpairs, and the test of their convergence."""

    k: int
    which: Which
    tol: float
    copies: bool

    def run(self, krylov: Krylov, generator: torch.Generator) -> _Found:
        product = krylov.product
        while True:
            krylov.step()
            spent = product.count == product.total
            if not (spent or self._due(krylov)):
                if krylov.broken:
                    krylov.renew(generator)
                continue
            ritz = krylov.ritz()
            wanted = select(ritz.values, min(self.k, krylov.count), self.which)
            small = self.tol * float(ritz.values.abs().max())
            converged = self._seen(krylov) and bool((ritz.residuals[wanted] <= small).all())
            exhausted = converged and self._exhausted(krylov, ritz, small)
            done = exhausted and self._nothing_hidden(krylov, ritz, ritz.values[wanted], small)
            if spent or done or krylov.complete:
                return _Found(krylov, ritz, wanted, done or krylov.complete)
            if krylov.broken and not krylov.full:
                krylov.renew(generator)
            elif exhausted or krylov.broken:
                krylov.restart(ritz, self._kept(krylov, ritz, ritz.residuals <= small))
                krylov.renew(generator)
            elif krylov.full:
                krylov.restart(ritz, self._kept(krylov, ritz, ritz.own))

    def _seen(self, krylov: Krylov) -> bool:
        # a random start holds so little of each eigenvector that after two or three steps, with one outlier found at
        # the other end, the bulk's Ritz values have small residuals too
        return krylov.count >= self.k and (krylov.broken or krylov.product.count >= _LEAST_PRODUCTS)

    def _due(self, krylov: Krylov) -> bool:
        # look at the Ritz pairs at each step, in large bases only where it costs little
        count = krylov.count
        if krylov.full or krylov.complete:
            return True
        return count >= self.k and (krylov.broken or count % max(1, count // 100) == 0)

    def _outermost(self, ritz: Ritz) -> Tensor:
        # indices of the ends of the present sequence: the most that it can still add
        own = ritz.own.nonzero()[:, 0]
        return own[select(ritz.values[own], min(2 if self.which == "both" else 1, len(own)), self.which)]

    def _exhausted(self, krylov: Krylov, ritz: Ritz, small: float) -> bool:
        # the first sequence has done its work when the wanted pairs have converged, another one when it is clear
        # that it adds nothing more
        return krylov.sequence == 0 or bool((ritz.residuals[self._outermost(ritz)] <= small).all())

    def _nothing_hidden(self, krylov: Krylov, ritz: Ritz, wanted: Tensor, small: float) -> bool:
        # an eigenvector that no sequence so far could see would have shown in this one
        if krylov.sequence == 0:
            return not (self.copies or krylov.broken)
        values = ritz.values[self._outermost(ritz)]
        if self.which == "magnitude":
            return bool(values.abs().max() <= wanted.abs().min() + small)
        high, low = ends(self.k, self.which)
        above = high > 0 and bool(values.max() > wanted[high - 1] + small)
        below = low > 0 and bool(values.min() < wanted[high] - small)
        return not (above or below)

    def _kept(self, krylov: Krylov, ritz: Ritz, candidates: Tensor) -> Tensor:
        # what is wanted of former sequences, and the best candidates in the room that it leaves
        wanted = select(ritz.values, min(self.k, krylov.count), self.which)
        former = wanted[~ritz.own[wanted] & ~candidates[wanted]]
        room = min(self.k + (krylov.rows - self.k) // 2, krylov.rows - 1) - len(former)
        at = candidates.nonzero()[:, 0]
        return torch.cat([former, at[select(ritz.values[at], min(room, len(at)), self.which)]])
