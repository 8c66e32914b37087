"""Symmetric operators that a model's loss over batches defines, in chosen coordinates."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, TypedDict, overload

import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn

from tangora._checks import InputError, check_choice
from tangora._types import Progress
from tangora.curvature.density import SpectralDensity, spectral_density
from tangora.curvature.displaced_loss import DisplacedLoss, Over, Vector
from tangora.curvature.eigenpairs import Eigenpairs, Which
from tangora.curvature.evaluation import Evaluation
from tangora.curvature.lanczos import lanczos_eigenpairs
from tangora.curvature.power import power_eigenpairs
from tangora.curvature.spaces import Space
from tangora.curvature.trace import TraceEstimate, frobenius_norm, hutch_plus_plus, hutchinson

_TRACES = {"hutch++": hutch_plus_plus, "hutchinson": hutchinson}


class AdapterArguments(TypedDict, total=False):
    """Choice of a model's parameters, and the precision; see `Hessian`."""

    layers: Iterable[str] | None
    adapter_name: str | None
    dtype: torch.dtype | None


class HessianArguments(AdapterArguments, total=False):
    """The same, in chosen coordinates."""

    over: Over | Space


class CurvatureOperator(ABC):
    r"""A curvature matrix of a model's mean loss over batches, known by its products, ``operator @ vector``.

    The model stays as it is: weights, gradients, training mode, attention and random state. With ``torch.distributed``
    running every rank reads its own batches and all get the mean over all of them.
    """

    num_products: int
    """Products with the matrix so far."""

    def __init__(self, displaced: DisplacedLoss):
        self._displaced = replace(displaced, reader=type(self).__name__)
        self.num_products = 0
        self._state = displaced.evaluation.state()

    @property
    def evaluation(self) -> Evaluation:
        """Evaluation of the loss: batches, precision and reduction."""
        return self._displaced.evaluation

    @property
    def space(self) -> Space:
        """The coordinates."""
        return self._displaced.space

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.evaluation.model

    @property
    def batches(self) -> Iterable[Any]:
        """The batches that are averaged over."""
        return self._displaced.batches

    @property
    def size(self) -> int:
        """Dimension of the coordinates."""
        return self.space.size

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.size, self.size

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of vectors."""
        return self.space.dtype

    @property
    def device(self) -> torch.device:
        """Device of vectors."""
        return self.space.device

    @property
    def batch_weights(self) -> list[float]:
        """Weight of each (of this rank's) batches in the mean: its number of labels, or 1."""
        return [self._weight(batch) for batch in self.batches]

    def __matmul__(self, vector: Tensor) -> Tensor:
        """Multiply with a flat vector."""
        return self.matvec(vector)

    @overload
    def matvec(self, vector: Tensor) -> Tensor: ...

    @overload
    def matvec(self, vector: Mapping[str, Tensor]) -> dict[str, Tensor]: ...

    def matvec(self, vector: Vector) -> Tensor | dict[str, Tensor]:
        """Multiply with a vector.

        Args:
            vector: Flat, of ``size`` numbers, or named parts as in ``space.names``.

        Returns:
            The product, flat or named as the vector was.

        Raises:
            InputError: If sizes or names do not fit, or loss or product are not finite.
        """
        self._follow_changes()
        flat = self._displaced.flat(vector)
        product = self._apply(flat)
        self.num_products += 1
        if not product.isfinite().all():
            raise InputError(
                "the product with the curvature matrix is not finite: the loss overflows near these weights"
            )
        return product if isinstance(vector, Tensor) else self.space.to_dict(product)

    @abstractmethod
    def _apply(self, flat: Tensor) -> Tensor:
        """Multiply with a checked flat vector."""

    def loss(self) -> float:
        """Return the mean loss at the weights."""
        return self.loss_at(self._displaced.zero())

    def gradient(self) -> Tensor:
        """Return the gradient of the mean loss at the weights."""
        return self.gradient_at(self._displaced.zero())

    def loss_at(self, displacement: Vector) -> float:
        """Return the mean loss at displaced weights, not a number or infinite where it is; nothing is written."""
        self._follow_changes()
        return self._displaced.loss_at(self._displaced.flat(displacement))

    def gradient_at(self, displacement: Vector) -> Tensor:
        """Return the gradient of the mean loss at displaced weights; nothing is written."""
        self._follow_changes()
        return self._displaced.gradient_at(self._displaced.flat(displacement))

    def per_batch(self) -> Iterator[tuple[float, "CurvatureOperator"]]:
        """Yield the weight of each of (this rank's) batches, and the operator of that batch alone."""
        for batch, alone in self._displaced.per_batch():
            yield self._weight(batch), self._twin(alone)

    def block(self, layer: str) -> "CurvatureOperator":
        """Return the diagonal block of one layer, by its name in ``space.layout``, in the coordinates of that layer."""
        check_choice("layer", layer, self.space.layout)
        return self._twin(self._displaced.on(self.space.restricted([layer])))

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
                power iteration always does. At LoRA's initialization, $B = 0$, those over the factors have multiplicity
                r.
            seed: Seed of the random start vector.
            progress: Called after every product.

        Returns:
            The eigenpairs with residuals, and whether they converged.

        Raises:
            InputError: If a number is out of range.
        """
        check_choice("method", method, ("lanczos", "power"))
        options: dict[str, Any] = {
            "tol": tol,
            "max_products": max_products,
            "seed": seed,
            "progress": progress,
        }
        if method == "power":
            return power_eigenpairs(self, k, which=which, **options)
        return lanczos_eigenpairs(self, k, which=which, copies=copies, **options)

    def spectral_density(
        self, *, probes: int = 4, steps: int = 40, seed: int = 0, progress: Progress | None = None
    ) -> SpectralDensity:
        """Estimate how the eigenvalues are distributed, see `tangora.curvature.spectral_density`."""
        return spectral_density(self, probes=probes, steps=steps, seed=seed, progress=progress)

    def trace(
        self,
        *,
        method: Literal["hutch++", "hutchinson"] = "hutch++",
        products: int = 60,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> TraceEstimate:
        """Estimate the trace, see `tangora.curvature.hutch_plus_plus` and `tangora.curvature.hutchinson`."""
        check_choice("method", method, _TRACES)
        return _TRACES[method](self, products=products, seed=seed, progress=progress)

    def frobenius_norm(
        self, *, products: int = 60, seed: int = 0, progress: Progress | None = None
    ) -> TraceEstimate:
        """Estimate the Frobenius norm, see `tangora.curvature.frobenius_norm`."""
        return frobenius_norm(self, products=products, seed=seed, progress=progress)

    def to_scipy(self) -> LinearOperator:
        """View the operator as SciPy's, for `scipy.sparse.linalg.eigsh` and its like, in the operator's dtype."""

        def matvec(array: Any) -> Any:
            vector = torch.as_tensor(array.reshape(-1)).to(self.device, self.dtype)
            return self.matvec(vector).cpu().numpy()

        like = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(self.shape, matvec=matvec, rmatvec=matvec, dtype=like)  # pyright: ignore[reportCallIssue]

    def _weight(self, batch: Any) -> float:
        return self.evaluation.weight(batch)

    def _twin(self, displaced: DisplacedLoss) -> Any:
        twin = copy.copy(self)
        twin._displaced, twin.num_products = displaced, 0
        twin._forget()
        return twin

    def _follow_changes(self) -> None:
        if (state := self.evaluation.state()) != self._state:
            self.space.refresh()
            self._state = state
            self._forget()

    def _forget(self) -> None:  # noqa: B027 - most operators keep nothing
        """Drop what was kept of the weights before they changed."""
