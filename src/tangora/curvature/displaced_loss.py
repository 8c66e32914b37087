"""A model's mean loss over batches, as a function of a displacement in chosen coordinates."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tangora import _names
from tangora._checks import InputError, check_choice
from tangora._types import LossFn
from tangora.adapters import discover
from tangora.curvature.adapted import adapted_layers
from tangora.curvature.evaluation import Evaluation
from tangora.curvature.spaces import FactorSpace, Leaves, Space, TangentSpace
from tangora.curvature.weight_space import WeightSpace, adapted_weights, plain_weights
from tangora.probes import as_batches
from tangora.probes.collective import failing_together, sum_over_ranks

Over: TypeAlias = _names.SpaceName
Vector: TypeAlias = Tensor | Mapping[str, Tensor]
"""Flat, or named parts."""


@dataclass(frozen=True, eq=False)
class DisplacedLoss:
    r"""$L(\theta + E\delta)$ for displacements $\delta \in \mathbb{R}^n$; the model stays as it is.

    With ``torch.distributed`` running every rank reads its own batches and all get the mean over all of them.
    """

    evaluation: Evaluation
    space: Space
    batches: Iterable[Any]
    alone: bool = False
    """Whether this is one batch of many: this rank's own business."""
    reader: str = "curvature"
    """Name of the measured quantity in errors, such as ``Hessian``."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        over: Over | Space | type[Space] = "factors",
        loss_fn: LossFn | None = None,
        layers: Iterable[str] | None = None,
        adapter_name: str | None = None,
        dtype: torch.dtype | None = None,
        twice: bool = True,
    ) -> "DisplacedLoss":
        """Choose loss and coordinates: by name, a space that is there, or one of adapted layers to be made."""
        batches = as_batches(batches)
        if isinstance(over, Space):
            return cls(over.evaluation, over, batches)
        evaluation = Evaluation(model, loss_fn=loss_fn, dtype=dtype, twice=twice)
        return cls(evaluation, _space(evaluation, over, layers, adapter_name), batches)

    def flat(self, vector: Any) -> Tensor:
        """Return a vector as a flat one, or raise `InputError` if size or names do not fit."""
        space = self.space
        if isinstance(vector, Mapping):
            return space.to_flat(vector).detach()
        if not isinstance(vector, Tensor) or vector.shape != (space.size,):
            got = tuple(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
            raise InputError(f"a vector must have shape ({space.size},) or be a dict of its parts; got {got}")
        return vector.detach().to(space.device, space.dtype)

    def loss_at(self, displacement: Tensor) -> float:
        """Return the mean loss; not a number or infinite where it is."""
        leaves = self.space.to_leaves(displacement)

        def loss_of(batch: Any) -> tuple[float, Tensor]:
            with torch.no_grad():
                weight, loss = self.within(leaves, lambda: self.evaluation.loss(batch, finite=False))
            return weight, loss.double().reshape(1)

        return float(self.average(loss_of, 1, dtype=torch.float64))

    def gradient_at(self, displacement: Tensor) -> Tensor:
        """Return the gradient of the mean loss."""
        leaves = {
            name: leaf.detach().requires_grad_() for name, leaf in self.space.to_leaves(displacement).items()
        }

        def gradient_of(batch: Any) -> tuple[float, Tensor]:
            def differentiated() -> tuple[float, Tensor]:
                weight, loss = self.evaluation.loss(batch, finite=False)
                return weight, joined(first_derivatives(loss, leaves))

            return self.within(leaves, differentiated)

        size = sum(math.prod(shape) for shape in self.space.leaf_shapes().values())
        return self.space.from_leaves(self.average(gradient_of, size))

    def zero(self) -> Tensor:
        """Return the displacement to where the model is."""
        return torch.zeros(self.space.size, dtype=self.space.dtype, device=self.space.device)

    def per_batch(self) -> Iterator[tuple[Any, "DisplacedLoss"]]:
        """Yield (this rank's) batches, and the loss of each alone."""
        for batch in self.batches:
            yield batch, replace(self, batches=[batch], alone=True)

    def on(self, space: Space) -> "DisplacedLoss":
        """Return the same loss in other coordinates."""
        return replace(self, space=space)

    def within(self, leaves: Leaves, function: Callable[[], Any]) -> Any:
        """Call a function while the model is displaced; `evaluation.loss` inside gives the loss of a batch."""
        return self.evaluation.within(self.space.overrides(leaves), function)

    def average(
        self, of_batch: Callable[[Any], tuple[float, Tensor]], size: int, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Stream a weighted mean over the batches of all ranks, equal on all of them.

        ``of_batch`` gives weight and flat value of a batch, and is called with the model held still.
        """
        total = torch.zeros(size, dtype=dtype or self.space.dtype, device=self.space.device)
        weights = 0.0
        together = contextlib.nullcontext() if self.alone else failing_together(self.reader, total.device)
        with together, self.evaluation.open(self.batches):
            for batch in self.batches:
                weight, value = of_batch(batch)
                if weight:  # where no label counts the loss is not a number
                    total.add_(value.detach(), alpha=weight)
                    weights += weight
        sums = torch.tensor([weights], dtype=torch.float64, device=total.device)
        if not self.alone:
            sum_over_ranks(total, sums)
        if (whole := float(sums)) == 0:
            raise InputError("batches must hold at least one batch with at least one label; got none")
        return total / whole


def first_derivatives(loss: Tensor, leaves: Leaves, **options: Any) -> Sequence[Tensor]:
    """Differentiate a loss with respect to leaves; zeros for those that it does not depend on."""
    if not loss.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves.values()]
    return torch.autograd.grad(
        loss, list(leaves.values()), allow_unused=True, materialize_grads=True, **options
    )


def joined(tensors: Iterable[Tensor]) -> Tensor:
    """Flatten tensors one after the other."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _space(
    evaluation: Evaluation, over: Any, layers: Iterable[str] | None, adapter_name: str | None
) -> Space:
    own = isinstance(over, type) and issubclass(over, Space)
    if not own:
        check_choice("over", over, ("factors", "tangent", "weights"))
    if over == "weights" and not discover(evaluation.model, adapter_name).pairs:
        return WeightSpace(evaluation, plain_weights(evaluation, layers))
    found = adapted_layers(evaluation, adapter_name=adapter_name, layers=layers)
    if over == "weights":
        return WeightSpace(evaluation, adapted_weights(found))
    kinds: dict[Any, type[Space]] = {"factors": FactorSpace, "tangent": TangentSpace}
    return kinds.get(over, over)(evaluation, found)
