r"""Products with the Hessian of a model's loss by double backward, streamed over batches or from a kept graph.

$H v = \partial_\theta \langle \partial_\theta L, v \rangle$: a gradient whose graph is kept is differentiated again.
Never reverse over forward, which is silently wrong through LayerNorm in torch 2.13.

Source: Pearlmutter (1994), Fast exact multiplication by the Hessian.
"""

import itertools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tangora._checks import InputError, check_choice
from tangora._types import LossFn
from tangora.curvature.differentiable import explained, refuse_functions
from tangora.curvature.displaced_loss import DisplacedLoss, Over, first_derivatives, joined
from tangora.curvature.landscape import Directions, Landscape, landscape
from tangora.curvature.operators import CurvatureOperator
from tangora.curvature.sharpness import Sharpness, sharpness
from tangora.curvature.spaces import Leaves, Space
from tangora.probes.batches import num_batches

Differentiation = Literal["exact", "finite_difference"]

# central differences of a function known to eps are best at about this multiple of the cube root of eps
_STEP = 3.0
_WORST_DISCREPANCY = 0.5
_DISCREPANCY_TO_TELL = 0.02
_CHECKED_EVERY = 10
_WRONG = 0.01


@dataclass(frozen=True)
class _Graph:
    """A gradient that can be differentiated again and again."""

    weight: float
    leaves: Leaves
    gradient: Sequence[Tensor]
    overrides: dict[str, Tensor]


class Hessian(CurvatureOperator):
    r"""The Hessian of a model's mean loss as a symmetric operator.

    Args:
        model: Any Hugging Face or torch model, with or without a PEFT adapter, also quantized.
        batches: Model inputs with labels, or what ``loss_fn`` takes; read again for every product.
        over: The coordinates: ``factors`` (trainable A and B), ``tangent`` (what these reach in the weight to first
            order, in orthonormal coordinates, the same in every gauge), ``weights`` (full matrices), or a `Space`.
        loss_fn: ``loss_fn(model, batch)`` -> scalar, batches weighing alike; default the model's own loss, weighted by
            the number of labels, so that uneven batches add up to the whole.
        layers: Only these: names, their endings, or patterns with ``*``.
        adapter_name: Only this adapter; default what is trainable.
        dtype: Dtype of the computation, on copies; default: the model's own dtypes.
        differentiation: ``exact``, by double backward; ``finite_difference`` for models with an operation that has no
            second derivative (fused attention): central differences of gradients, compared at two step sizes.
        cache_graph: Whether to keep the gradient's graph of every batch between products, which halves their cost and
            holds the memory of a forward and backward pass; default when there is one batch and no checkpointing.

    Raises:
        InputError: If the model or the batches allow no Hessian; one sentence says why.

    Examples:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        >>> hessian = Hessian(model, [torch.randn(5, 4)], loss_fn=lambda model, x: model(x).square().mean())
        >>> hessian.size
        14
        >>> hessian.matvec(torch.ones(14)).shape
        torch.Size([14])
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        over: Over | Space | type[Space] = "factors",
        loss_fn: LossFn | None = None,
        layers: Iterable[str] | None = None,
        adapter_name: str | None = None,
        dtype: torch.dtype | None = None,
        differentiation: Differentiation = "exact",
        cache_graph: bool | None = None,
    ):
        check_choice("differentiation", differentiation, ("exact", "finite_difference"))
        self.differentiation: Differentiation = differentiation
        self.discrepancy: float | None = None
        """For finite differences: largest relative change of a product when the step is halved."""
        self._cache_graph = cache_graph
        self._graphs: list[_Graph] = []
        self._verified = False
        displaced = DisplacedLoss.of(
            model,
            batches,
            over=over,
            loss_fn=loss_fn,
            layers=layers,
            adapter_name=adapter_name,
            dtype=dtype,
            twice=differentiation == "exact",
        )
        super().__init__(displaced)

    @property
    def caches_graph(self) -> bool:
        """Whether graphs are kept between products."""
        if self.differentiation != "exact":
            return False
        if self._cache_graph is None:
            one = num_batches(self.batches) == 1
            return one and not any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules())
        return self._cache_graph

    def release(self) -> None:
        """Free the memory of kept graphs; the next product builds them again."""
        self._graphs = []

    _forget = release

    def sharpness(self, radius: float, **options: Any) -> Sharpness:
        r"""Look for the largest loss in a ball around the weights.

        Args:
            radius: Radius of the ball, in the operator's coordinates.
            **options: Options of `tangora.curvature.sharpness.sharpness`.

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
            **options: Options of `tangora.curvature.landscape.landscape`.

        Raises:
            InputError: If the directions do not fit the coordinates, or a number is out of range.
        """
        return landscape(self, directions, **options)

    def _apply(self, flat: Tensor) -> Tensor:
        if self.differentiation == "finite_difference":
            return self._by_differences(flat)
        product = self._by_double_backward(flat)
        if self.evaluation.custom_functions and not self._verified:
            self._verify(flat, product)
        return product

    def _by_double_backward(self, flat: Tensor) -> Tensor:
        directions = list(self.space.to_leaves(flat).values())
        kept = self._graphs if self.caches_graph else None
        number = itertools.count()

        def product_of(batch: Any) -> tuple[float, Tensor]:
            if kept is None:
                graph = self._graph(batch)
            else:
                if (index := next(number)) == len(kept):
                    kept.append(self._graph(batch))
                graph = kept[index]

            def differentiated() -> Tensor:
                with explained():
                    return joined(_second_derivatives(graph, directions, retain_graph=kept is not None))

            return graph.weight, self.evaluation.within(graph.overrides, differentiated)

        size = sum(direction.numel() for direction in directions)
        return self.space.from_leaves(self._displaced.average(product_of, size))

    def _graph(self, batch: Any) -> _Graph:
        leaves = self.space.leaves()
        overrides = self.space.overrides(leaves)

        def differentiated() -> tuple[float, Sequence[Tensor]]:
            weight, loss = self.evaluation.loss(batch)
            if not weight:  # the loss may be no number, which would spoil nothing: the batch does not count
                return 0.0, [torch.zeros_like(leaf) for leaf in leaves.values()]
            with explained():
                return weight, first_derivatives(loss, leaves, create_graph=True)

        weight, gradient = self.evaluation.within(overrides, differentiated)
        return _Graph(weight, leaves, gradient, overrides)

    def _verify(self, flat: Tensor, product: Tensor) -> None:
        # a backward pass of someone's own may treat as constant what it is not, without a word
        if (norm := float(torch.linalg.vector_norm(flat))) == 0:
            return
        step = self._step() / norm
        coarse, fine = self._difference(flat, step), self._difference(flat, step / 2)
        size = float(torch.linalg.vector_norm(fine))
        own, gap = (float(torch.linalg.vector_norm(other - fine)) for other in (coarse, product))
        if gap > max(10 * own, _WRONG * size):
            refuse_functions(self.evaluation.custom_functions or (), gap / size if size else math.inf)
        self._verified = True

    def _by_differences(self, flat: Tensor) -> Tensor:
        norm = float(torch.linalg.vector_norm(flat))
        if norm == 0:
            return torch.zeros_like(flat)
        product = self._difference(flat, step := self._step() / norm)
        if self.num_products % _CHECKED_EVERY == 0:
            finer = self._difference(flat, step / 2)
            size = float(torch.linalg.vector_norm(finer))
            self._judge(float(torch.linalg.vector_norm(product - finer)) / size if size else 0.0)
        return product

    def _difference(self, flat: Tensor, step: float) -> Tensor:
        gradient_at = self._displaced.gradient_at
        return (gradient_at(step * flat) - gradient_at(-step * flat)) / (2 * step)

    def _step(self) -> float:
        held = {p.dtype for p in self.model.parameters() if p.is_floating_point()}
        coarsest = self.evaluation.cast_to or max(held, key=lambda dtype: torch.finfo(dtype).eps)
        if self.evaluation.rounds_to_float32:
            coarsest = torch.float32
        return _STEP * torch.finfo(coarsest).eps ** (1 / 3)

    def _judge(self, discrepancy: float) -> None:
        self.discrepancy = max(discrepancy, self.discrepancy or 0.0)
        if discrepancy > _WORST_DISCREPANCY:
            raise InputError(
                f"finite differences change by {discrepancy:.0%} when the step is halved, so they do "
                "not approximate the Hessian: compute in float32 (dtype=torch.float32) or exactly"
            )
        if discrepancy > _DISCREPANCY_TO_TELL:
            warnings.warn(
                f"finite differences change by {discrepancy:.1%} when the step is halved", stacklevel=4
            )


def _second_derivatives(
    graph: _Graph, directions: Sequence[Tensor], *, retain_graph: bool
) -> Sequence[Tensor]:
    # of <g, v> with respect to leaves; parts of g without a graph are constant
    pairs = zip(graph.gradient, directions, strict=True)
    varying = [(g, v) for g, v in pairs if g.requires_grad]
    leaves = list(graph.leaves.values())
    if not varying:
        return [torch.zeros_like(leaf) for leaf in leaves]
    gradients, vectors = zip(*varying, strict=True)
    return torch.autograd.grad(
        gradients, leaves, vectors, allow_unused=True, materialize_grads=True, retain_graph=retain_graph
    )
