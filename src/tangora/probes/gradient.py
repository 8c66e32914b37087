r"""Read products of the full gradient, $G\,\Omega$ and $Q^\top G$, in ordinary backward passes.

A LoRA adapter with $B = 0$ and $A = \Omega^\top$ leaves the model's output alone and has the gradient
$g_B / s = G\,\Omega$; one with $A = 0$ and $B = Q$ has $g_A / s = Q^\top G$; a doubled adapter has both. Its output is
zero, so it need not be computed at all: a probe hooks into the layers, keeps what the adapter's backward pass would
need, and adds up the products there. Memory is that of LoRA training at the same rank, on any base.

Source: Novikov et al. (2022), arXiv:2103.14974, for the doubled adapter; BackPropRSVD of Riemannion,
arXiv:2507.12142, algorithm 3, for its use in a randomized SVD.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tangora._checks import InputError
from tangora._types import LossFn, Progress
from tangora.adapters import unwrapped
from tangora.probes.batches import num_batches
from tangora.probes.collective import failing_together, sum_over_ranks
from tangora.probes.layers import ProbedLayer
from tangora.probes.losses import WeightedLoss
from tangora.probes.stillness import preserved_randomness, still

# float16 gradients of a mean loss underflow; a power of two is divided out again without rounding
_FLOAT16_LOSS_SCALE = 2.0**12


@dataclass(frozen=True)
class Request:
    """Products to read of one layer's gradient."""

    right: Tensor | None = None
    r"""$\Omega$, ``n x k``, for $G\,\Omega$."""
    left: Tensor | None = None
    r"""$Q$, ``m x k``, for $Q^\top G$."""
    dense: bool = False
    """Whether to form $G$ itself, ``m x n``."""


@dataclass(frozen=True)
class Reading:
    """Products of the mean gradient; zero for a layer that the loss does not depend on."""

    right: Tensor
    r"""$G\,\Omega$, ``m x k``."""
    left: Tensor
    r"""$Q^\top G$, ``k x n``."""
    dense: Tensor
    """$G$, ``m x n``."""

    def tensors(self) -> list[Tensor]:
        """Return all parts; those that were not asked for are empty."""
        return [self.right, self.left, self.dense]


class GradientProbe:
    r"""Context manager that reads the mean gradient of chosen layers over batches.

    Inside, the model computes what it computes in evaluation mode, bit for bit. Afterwards model, gradients, training
    mode, random state and memory are as they were, also when a batch raises.

    With ``torch.distributed`` running, every rank reads its own batches and all ranks get the mean over all of them;
    only the thin products travel.

    Args:
        model: Any model, possibly wrapped, quantized, or with gradient checkpointing.
        layers: From `probed_layers`.
        loss_fn: ``loss_fn(model, batch)`` -> scalar, averaged over batches with equal weights; default the loss that a
            Hugging Face model returns, weighted by the number of labels in the batch, so that small batches add up to
            the big one.
        progress: Called after every batch of each reading.

    Examples:
        >>> with GradientProbe(model, probed_layers(model)) as probe:  # doctest: +SKIP
        ...     readings = probe.read(batches, {"lm_head": Request(right=omega)})
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[ProbedLayer],
        *,
        loss_fn: LossFn | None = None,
        progress: Progress | None = None,
    ):
        self.model: nn.Module = unwrapped(model)
        self.layers = {layer.name: layer for layer in layers}
        self.device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        """Where readings are held."""
        self.dtype = torch.float64 if _holds(self.model, torch.float64) else torch.float32
        """Dtype of the computation, whatever the model's own dtype."""
        self.loss: float | None = None
        """Mean loss of the last reading."""
        self.reached: set[str] = set()
        """Layers of the last reading that the model called with gradients, on any rank."""
        self._loss = WeightedLoss(self.model, loss_fn)
        self._progress = progress
        self._exit = contextlib.ExitStack()
        self._requests: Mapping[str, Request] = {}
        self._readings: dict[str, Reading] = {}
        self._weight = 1.0

    def __enter__(self) -> "GradientProbe":
        with contextlib.ExitStack() as stack:
            stack.enter_context(still(self.model))
            anchor = torch.zeros((), device=self.device, requires_grad=True)
            for layer in self.layers.values():
                handle = layer.module.register_forward_hook(self._hook(layer, anchor), with_kwargs=True)
                stack.callback(handle.remove)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._exit.close()
        self._requests, self._readings = {}, {}

    def read(self, batches: Iterable[Any], requests: Mapping[str, Request]) -> dict[str, Reading]:
        """Run all batches once and return the products asked for, of the mean gradient.

        Args:
            batches: Keyword dictionaries for the model, or whatever ``loss_fn`` takes.
            requests: By name of the layer, as the readings.

        Raises:
            InputError: If there is no batch, a batch has no labels, or a loss or gradient is not finite.
        """
        self._requests = {name: self._prepared(request) for name, request in requests.items()}
        self._readings = {name: self._zeros(name, request) for name, request in requests.items()}
        self.reached = set()
        total_weight = total_loss = 0.0
        count = 0
        with failing_together("GradientProbe.read", self.device), preserved_randomness(batches):
            for batch in batches:
                weight, loss = self._backward(batch, count)
                total_weight, total_loss, count = total_weight + weight, total_loss + weight * loss, count + 1
                if self._progress is not None:
                    self._progress("gradient", count, num_batches(batches) or 0)
        readings, self._readings, self._requests = self._readings, {}, {}
        total_weight, total_loss = self._over_ranks(readings, total_weight, total_loss)
        if total_weight == 0:
            raise InputError("batches must hold at least one batch with at least one label; got none")
        self.loss = total_loss / total_weight
        for name, reading in readings.items():
            for tensor in reading.tensors():
                if not tensor.div_(total_weight).isfinite().all():
                    raise InputError(f"the gradient of layer {name} is not finite on these batches")
        return readings

    def _backward(self, batch: Any, index: int) -> tuple[float, float]:
        with torch.enable_grad():
            self._weight, loss = self._loss(batch)
            if self._weight == 0:
                return 0.0, 0.0  # no label counts here; the mean over none is not a number
            value = float(loss.detach())
            if not math.isfinite(value):
                raise InputError(f"batch {index} has loss {value}; its gradient is not defined")
            scale = _FLOAT16_LOSS_SCALE if _holds(self.model, torch.float16) else 1.0
            self._weight /= scale
            if loss.requires_grad:
                (loss * scale).backward()
        return self._weight * scale, value

    def _hook(self, layer: ProbedLayer, anchor: Tensor) -> Callable[..., Tensor | None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
            if layer.name not in self._requests or not torch.is_grad_enabled():
                return None
            self.reached.add(layer.name)
            x = args[0] if args else next(iter(kwargs.values()))
            return _Tap.apply(output, anchor, x.detach(), self, layer)

        return hook

    def _over_ranks(self, readings: Mapping[str, Reading], *totals: float) -> list[float]:
        tensors = [tensor for reading in readings.values() for tensor in reading.tensors() if tensor.numel()]
        numbers = [*totals, *(float(name in self.reached) for name in readings)]
        summed = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        sum_over_ranks(*tensors, summed)
        numbers = summed.tolist()
        self.reached = {name for name, times in zip(readings, numbers[len(totals) :], strict=True) if times}
        return numbers[: len(totals)]

    def _prepared(self, request: Request) -> Request:
        right, left = (
            None if factor is None else factor.to(self.device, self.dtype)
            for factor in (request.right, request.left)
        )
        return Request(right, left, request.dense)

    def _zeros(self, name: str, request: Request) -> Reading:
        m, n = self.layers[name].m, self.layers[name].n
        right, left = (0 if factor is None else factor.shape[1] for factor in (request.right, request.left))
        sizes = (m, right), (left, n), (m, n) if request.dense else (0, 0)
        return Reading(*(torch.zeros(size, device=self.device, dtype=self.dtype) for size in sizes))

    def _accumulate(self, layer: ProbedLayer, grad: Tensor, x: Tensor | None, product: Tensor | None) -> None:
        request, reading = self._requests[layer.name], self._readings[layer.name]

        def add(total: Tensor, product: Tensor) -> None:
            total.add_(product.to(total.device), alpha=self._weight)

        if request.right is not None:
            if product is None:
                assert x is not None
                product = layer.times(x, request.right.to(x.device))
            add(reading.right, layer.gradient_times(grad, product))
        if x is not None and request.left is not None:
            left = request.left.to(grad.device)
            add(reading.left, layer.times_gradient(left, grad, x, self.dtype))
        if x is not None and request.dense:
            add(reading.dense, layer.times_gradient(None, grad, x, self.dtype))


class _Tap(torch.autograd.Function):
    """Identity on a layer's output whose backward pass reads the layer's gradient.

    What it keeps goes through ``save_for_backward``, so that checkpointing drops and recomputes it like the rest.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, anchor: Tensor, x: Tensor, probe: GradientProbe, layer: ProbedLayer
    ) -> Tensor:
        del anchor  # only makes the output require a gradient in a model whose weights are all frozen
        request = probe._requests[layer.name]
        keeps_input, product = request.left is not None or request.dense, None
        if request.right is not None and not keeps_input:  # else the product is made when it is needed
            with _without_autocast(output):
                product = layer.times(x, request.right.to(x.device))
        ctx.probe, ctx.layer = probe, layer
        ctx.save_for_backward(product, x if keeps_input else None)
        return output.clone()  # a view would forbid the in-place operations that some models do next

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        product, x = ctx.saved_tensors
        with torch.no_grad(), _without_autocast(grads[0]):
            ctx.probe._accumulate(ctx.layer, grads[0], x, product)
        return grads[0], None, None, None, None


def _without_autocast(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)


def _holds(model: nn.Module, dtype: torch.dtype) -> bool:
    return any(p.dtype == dtype for p in model.parameters())
