"""A symmetric matrix that is never formed, and what can be asked of it by products alone."""

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from scipy.sparse.linalg import LinearOperator

from tangora._checks import check_choice
from tangora.curvature.density import SpectralDensity, spectral_density
from tangora.curvature.eigenpairs import Eigenpairs, Which
from tangora.curvature.lanczos import lanczos_eigenpairs
from tangora.curvature.power import power_eigenpairs
from tangora.curvature.products import Progress
from tangora.curvature.trace import Estimate, frobenius_norm, hutch_plus_plus, hutchinson

_EIGENPAIRS = {"lanczos": lanczos_eigenpairs, "power": power_eigenpairs}
_TRACES = {"hutch++": hutch_plus_plus, "hutchinson": hutchinson}


class SymmetricOperator(ABC):
    """A symmetric matrix, known by its products."""

    products: int
    """Products with the matrix so far."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of rows."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of vectors."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Of vectors."""

    @abstractmethod
    def matvec(self, vector: Any) -> Any:
        """Multiply with a vector.

        Args:
            vector: ``size`` numbers.
        """

    def top_eigenpairs(
        self,
        k: int = 10,
        *,
        method: Literal["lanczos", "power"] = "lanczos",
        which: Which = "largest",
        tol: float = 1e-4,
        max_products: int | None = None,
        copies: bool = False,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Eigenpairs:
        r"""Find extreme eigenvalues and their vectors.

        Args:
            k: How many, at most ``size``.
            method: ``lanczos``, with a fraction of the products, or ``power`` iteration with deflation.
            which: ``largest``, ``smallest``, ``both`` ends, or largest by ``magnitude``.
            tol: Converged when all residuals are at most ``tol`` times the largest absolute value.
            max_products: Budget; default that of the method.
            copies: Whether ``lanczos`` is to look for all copies of multiple eigenvalues, for about twice the products;
                power iteration always does. At LoRA's start, $B = 0$, those over the factors have multiplicity r.
            seed: Of the random start.
            progress: Called after every product.

        Returns:
            The eigenpairs with residuals, and whether they converged.

        Raises:
            InputError: If a number is out of range.
        """
        check_choice("method", method, _EIGENPAIRS)
        options = {"copies": copies} if method == "lanczos" else {}
        return _EIGENPAIRS[method](
            self.matvec,
            self.size,
            k,
            which=which,
            tol=tol,
            max_products=max_products,
            **options,
            **self._how(seed, progress),
        )

    def spectral_density(
        self, *, probes: int = 4, steps: int = 40, seed: int = 0, progress: Progress | None = None
    ) -> SpectralDensity:
        """Estimate how the eigenvalues are distributed, by stochastic Lanczos quadrature.

        Args:
            seed: Of the random vectors.
            progress: Called after every product.

        Returns:
            Raw nodes and weights, with what can be read from them.

        Raises:
            InputError: If a number is out of range.
        """
        return spectral_density(
            self.matvec, self.size, probes=probes, steps=steps, **self._how(seed, progress)
        )

    def trace(
        self,
        *,
        method: Literal["hutch++", "hutchinson"] = "hutch++",
        products: int = 60,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Estimate:
        """Estimate the trace.

        Args:
            method: ``hutch++`` or ``hutchinson``.
            products: How many may be made.
            seed: Of the random vectors.
            progress: Called after every product.

        Returns:
            The estimate with its standard error.

        Raises:
            InputError: If a number is out of range.
        """
        check_choice("method", method, _TRACES)
        return _TRACES[method](self.matvec, self.size, products=products, **self._how(seed, progress))

    def frobenius_norm(
        self, *, products: int = 60, seed: int = 0, progress: Progress | None = None
    ) -> Estimate:
        """Estimate the Frobenius norm, unbiased in its square.

        Args:
            products: How many may be made.
            seed: Of the random vectors.
            progress: Called after every product.

        Returns:
            The estimate with its standard error.

        Raises:
            InputError: If a number is out of range.
        """
        return frobenius_norm(self.matvec, self.size, products=products, **self._how(seed, progress))

    def to_scipy(self) -> LinearOperator:
        """View the operator as SciPy's, for `scipy.sparse.linalg.eigsh` and its like.

        Returns:
            Takes and returns NumPy arrays in the operator's dtype.
        """

        def matvec(array: Any) -> Any:
            vector = torch.as_tensor(array.reshape(-1)).to(self.device, self.dtype)
            return self.matvec(vector).cpu().numpy()

        like = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator((self.size, self.size), matvec=matvec, rmatvec=matvec, dtype=like)  # pyright: ignore[reportCallIssue]

    def _how(self, seed: int, progress: Progress | None) -> dict[str, Any]:
        return {"seed": seed, "dtype": self.dtype, "device": self.device, "progress": progress}
