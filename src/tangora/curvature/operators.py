"""Symmetric operators that a model's loss over batches defines, in chosen coordinates."""

import contextlib
import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from tangora._checks import InputError, check_choice
from tangora._types import LossFn
from tangora.adapters.discover import discover
from tangora.curvature.adapted import adapted_layers
from tangora.curvature.evaluation import Evaluation
from tangora.curvature.landscape import Directions, Landscape, landscape
from tangora.curvature.low_rank_space import TangentSpace
from tangora.curvature.sharpness import Sharpness, sharpness
from tangora.curvature.spaces import FactorSpace, Leaves, Space
from tangora.curvature.symmetric import SymmetricOperator
from tangora.curvature.weight_space import weight_space
from tangora.probes.batches import as_batches
from tangora.probes.collective import failing_together, sum_over_ranks

Over = Literal["factors", "tangent", "weights"]
Vector = Tensor | Mapping[str, Tensor]
"""Flat, or named parts."""


class CurvatureOperator(SymmetricOperator):
    r"""A curvature matrix of a model's mean loss over batches, known by its products.

    The model stays as it is: weights, gradients, training mode, attention and random state. With ``torch.distributed``
    running every rank reads its own batches and all get the mean over all of them.

    Args:
        model: Any Hugging Face or torch model, with or without a PEFT adapter, also quantized.
        batches: Model inputs with labels, or what ``loss_fn`` takes; read again for every product.
        over: The coordinates: ``factors`` (trainable A and B), ``tangent`` (what these reach in the weight to first
            order, in orthonormal coordinates, the same in every gauge), ``weights`` (full matrices), or a `Space`.
        loss_fn: ``loss_fn(model, batch)`` -> scalar, batches weighing alike; default the model's own loss, weighted by
            the number of labels, so that uneven batches add up to the whole.
        layers: Only these: names, their endings, or patterns with ``*``.
        adapter_name: Only this adapter; default what is trainable.
        dtype: What to compute in, on copies; default the model's own dtypes.

    Raises:
        InputError: If the model or the batches allow no curvature; one sentence says why.
    """

    _twice = True

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        over: Over | Space = "factors",
        loss_fn: LossFn | None = None,
        layers: Iterable[str] | None = None,
        adapter_name: str | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.batches = as_batches(batches)
        if isinstance(over, Space):
            self.evaluation, self.space = over.evaluation, over
        else:
            self.evaluation = Evaluation(model, loss_fn=loss_fn, dtype=dtype, twice=self._twice)
            self.space = make_space(self.evaluation, over, layers=layers, adapter_name=adapter_name)
        self.products = 0
        self._alone = False
        self._state = self.evaluation.state()

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.evaluation.model

    @property
    def size(self) -> int:
        """Dimension of the coordinates."""
        return self.space.size

    @property
    def dtype(self) -> torch.dtype:
        """Of vectors."""
        return self.space.dtype

    @property
    def device(self) -> torch.device:
        """Of vectors."""
        return self.space.device

    @property
    def batch_weights(self) -> list[float]:
        """Weight of each (of this rank's) batches in the mean: its number of labels, or 1."""
        return [self.evaluation.weight(batch) for batch in self.batches]

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
        flat = self._flat(vector)
        product = self._apply(flat)
        self.products += 1
        if not product.isfinite().all():
            raise InputError("the product with the curvature matrix is not finite: the loss overflows nearby")
        return product if isinstance(vector, Tensor) else self.space.to_dict(product)

    @abstractmethod
    def _apply(self, flat: Tensor) -> Tensor:
        """Multiply with a checked flat vector."""

    def loss(self) -> float:
        """Return the mean loss at the weights."""
        return self.loss_at(torch.zeros(self.size, dtype=self.dtype, device=self.device))

    def gradient(self) -> Tensor:
        """Return the gradient of the mean loss at the weights."""
        return self.gradient_at(torch.zeros(self.size, dtype=self.dtype, device=self.device))

    def loss_at(self, displacement: Vector) -> float:
        """Return the mean loss at displaced weights; nothing is written.

        Returns:
            The mean; not a number or infinite where it is.
        """
        self._follow_changes()
        leaves = self.space.to_leaves(self._flat(displacement))

        def loss_of(batch: Any) -> tuple[float, Tensor]:
            with torch.no_grad():
                weight, loss = self.within(leaves, lambda: self.evaluation.loss(batch, finite=False))
            return weight, loss.double().reshape(1)

        return float(self.average(loss_of, 1, dtype=torch.float64))

    def gradient_at(self, displacement: Vector) -> Tensor:
        """Return the gradient of the mean loss at displaced weights; nothing is written."""
        self._follow_changes()
        return self._gradient(self._flat(displacement))

    def _gradient(self, displacement: Tensor) -> Tensor:
        leaves = {
            name: leaf.detach().requires_grad_() for name, leaf in self.space.to_leaves(displacement).items()
        }

        def gradient_of(batch: Any) -> tuple[float, Tensor]:
            def differentiated() -> tuple[float, Tensor]:
                weight, loss = self.evaluation.loss(batch, finite=False)
                return weight, joined(first_derivatives(loss, leaves))

            return self.within(leaves, differentiated)

        return self.space.from_leaves(self.average(gradient_of, _leaf_size(self.space)))

    def per_batch(self) -> Iterator[tuple[float, "CurvatureOperator"]]:
        """Go through the (this rank's) batches.

        Yields:
            Weight of each batch, and the operator of that batch alone.
        """
        for batch in self.batches:
            alone = self._twin()
            alone.batches, alone._alone = [batch], True
            yield self.evaluation.weight(batch), alone

    def block(self, layer: str) -> "CurvatureOperator":
        """Return the diagonal block of one layer.

        Args:
            layer: Name from ``space.layout``.

        Returns:
            The operator in the coordinates of that layer.
        """
        check_choice("layer", layer, self.space.layout)
        block = self._twin()
        block.space = self.space.restricted([layer])
        return block

    def sharpness(self, radius: float, **options: Any) -> Sharpness:
        r"""Look for the largest loss in a ball around the weights.

        Args:
            radius: Of the ball, in the operator's coordinates.
            **options: Of `tangora.curvature.sharpness.sharpness`.

        Returns:
            The best point found, and how it compares with the second order.

        Raises:
            InputError: If a number is out of range.
        """
        return sharpness(self, radius, **options)

    def landscape(
        self,
        directions: Directions | Tensor | Sequence[Tensor] | Mapping[str, Tensor] = "eigenvectors",
        **options: Any,
    ) -> Landscape:
        """Evaluate the loss on a line or a grid around the weights.

        Args:
            directions: ``eigenvectors``, ``gradient``, ``random``, ``filter``, or one or two vectors.
            **options: Of `tangora.curvature.landscape.landscape`.

        Raises:
            InputError: If the directions do not fit the coordinates, or a number is out of range.
        """
        return landscape(self, directions, **options)

    def within(self, leaves: Leaves, function: Callable[[], Any]) -> Any:
        """Call a function while the model is displaced.

        Args:
            function: Without arguments; `evaluation.loss` inside gives the loss of a batch.

        Returns:
            What the function returns.
        """
        return self.evaluation.within(self.space.overrides(leaves), function)

    def average(
        self, of_batch: Callable[[Any], tuple[float, Tensor]], size: int, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Stream a weighted mean over the batches of all ranks.

        Args:
            of_batch: Weight and flat value of a batch; called with the model held still.
            size: Length of the value.
            dtype: Of the sum; default the operator's.

        Returns:
            The mean, equal on all ranks.

        Raises:
            InputError: If no batch has a label.
        """
        total = torch.zeros(size, dtype=dtype or self.dtype, device=self.device)
        weights = 0.0
        with self._together(), self.evaluation.open(self.batches):
            for batch in self.batches:
                weight, value = of_batch(batch)
                if weight:  # where no label counts the loss is not a number
                    total.add_(value.detach(), alpha=weight)
                    weights += weight
        return self._normalized(total, weights)

    def _together(self) -> Any:
        # one batch alone is this rank's own business
        return contextlib.nullcontext() if self._alone else failing_together(type(self).__name__, self.device)

    def _normalized(self, total: Tensor, weights: float) -> Tensor:
        sums = torch.tensor([weights], dtype=torch.float64, device=self.device)
        if not self._alone:
            sum_over_ranks(total, sums)
        if (whole := float(sums)) == 0:
            raise InputError("batches must hold at least one batch with at least one label; got none")
        return total / whole

    def _twin(self) -> Any:
        twin = copy.copy(self)
        twin.products = 0
        return twin

    def _follow_changes(self) -> None:
        if (state := self.evaluation.state()) != self._state:
            self.space.refresh()
            self._state = state
            self._forget()

    def _forget(self) -> None:
        """Drop what was kept of the weights before they changed."""

    def _flat(self, vector: Any) -> Tensor:
        if isinstance(vector, Mapping):
            return self.space.to_flat(vector).detach()
        if not isinstance(vector, Tensor) or vector.shape != (self.size,):
            got = tuple(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
            raise InputError(f"a vector must have shape ({self.size},) or be a dict of its parts; got {got}")
        return vector.detach().to(self.device, self.dtype)


def make_space(
    evaluation: Evaluation,
    over: Over = "factors",
    *,
    layers: Iterable[str] | None = None,
    adapter_name: str | None = None,
) -> Space:
    """Make the coordinates of an operator.

    Raises:
        InputError: If nothing is left.
    """
    check_choice("over", over, ("factors", "tangent", "weights"))
    if over == "weights":
        adapted = bool(discover(evaluation.model, adapter_name).pairs)
        return weight_space(evaluation, layers=layers, adapter_name=adapter_name, adapted=adapted)
    found = adapted_layers(evaluation, adapter_name=adapter_name, layers=layers)
    return FactorSpace(evaluation, found) if over == "factors" else TangentSpace(evaluation, found)


def first_derivatives(loss: Tensor, leaves: Leaves, **options: Any) -> Sequence[Tensor]:
    """Differentiate a loss; zeros for leaves that it does not depend on.

    Args:
        leaves: With respect to what.
        **options: Of `torch.autograd.grad`.

    Returns:
        One tensor for each leaf.
    """
    if not loss.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves.values()]
    return torch.autograd.grad(
        loss, list(leaves.values()), allow_unused=True, materialize_grads=True, **options
    )


def joined(tensors: Iterable[Tensor]) -> Tensor:
    """Flatten tensors one after the other."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _leaf_size(space: Space) -> int:
    return sum(math.prod(shape) for shape in space.leaf_shapes().values())
