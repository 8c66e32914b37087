"""The loss of a model as a function of tensors that replace its own; the model is not changed."""

import contextlib
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import astuple
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from tangora._checks import InputError, check_kind
from tangora._types import LossFn
from tangora.adapters import adapter_switches, check_not_sharded, unwrapped
from tangora.curvature.differentiable import custom_functions, readable
from tangora.probes.losses import WeightedLoss
from tangora.probes.stillness import RandomState

T = TypeVar("T")

_HALF = (torch.bfloat16, torch.float16)


class Evaluation:
    """Evaluates a model's loss with some of its tensors replaced.

    Args:
        model: Any model, possibly wrapped by DDP or ``torch.compile``, which are looked through.
        loss_fn: ``loss_fn(model, batch)`` -> scalar; default the model's own loss.
        dtype: Dtype of the computation, on copies of all floating-point tensors. Default: the model's own dtypes.
        twice: Whether second derivatives are wanted.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss_fn: LossFn | None = None,
        dtype: torch.dtype | None = None,
        twice: bool = True,
    ):
        if not isinstance(model, nn.Module):
            raise InputError(f"model must be a torch.nn.Module; got {type(model).__name__}")
        check_kind("dtype", dtype, (torch.dtype, type(None)), "a torch.dtype")
        self.model: nn.Module = unwrapped(model)
        check_not_sharded(self.model.named_parameters(), "curvature")
        self.loss_fn = loss_fn
        self._weighted = WeightedLoss(self.model, loss_fn)
        self.twice = twice
        parameters = list(self.model.parameters())
        self.device = parameters[0].device if parameters else torch.device("cpu")
        held = {p.dtype for p in parameters if p.is_floating_point()}
        if dtype is None and held & {*_HALF}:
            warnings.warn(
                "curvature in half precision has an error of at least 1 %: use dtype=torch.float32 to "
                "compute on float32 copies",
                stacklevel=4,
            )
        self.cast_to = dtype
        self.dtype = dtype or (torch.float64 if torch.float64 in held else torch.float32)
        """Dtype of vectors; at least float32."""
        self.rounds_to_float32 = False
        """Whether something inside a float64 model was seen to compute in float32."""
        self.custom_functions: set[str] | None = None
        """Functions with a backward pass of their own that were met on the way to the loss."""
        self._checked = False
        self._scope = _Scope(self.model)
        self._stand_ins: dict[str, Tensor] = {}
        self._stand_ins_of: tuple[Any, ...] | None = None

    def open(self, batches: Any = None) -> contextlib.AbstractContextManager[None]:
        """Hold the model while losses of batches are read, see `readable`."""
        return readable(self.model, batches, twice=self.twice)

    def within(self, overrides: Mapping[str, Tensor], function: Callable[[], T]) -> T:
        """Call a function while tensors stand in for the model's.

        Overrides are by the names of the model's parameters and buffers, and shapes may differ. Backward passes belong
        inside too: checkpointed layers run forward again there.
        """
        tensors = {**self._copies(), **overrides}
        return functional_call(
            self._scope,
            {f"model.{name}": tensor for name, tensor in tensors.items()},
            (function,),
            tie_weights=False,
        )

    def loss(self, batch: Any, *, finite: bool = True) -> tuple[float, Tensor]:
        """Return a batch's weight in the mean, 0 where no label counts, and its loss; inside `open` and `within`.

        Raises `InputError` if the loss is no scalar, random, or (unless ``finite=False``) not finite.
        """
        weight, loss = self._first_loss(batch) if not self._checked else self._loss(batch)
        if loss.numel() != 1:
            raise InputError(f"the loss must be one number; got a tensor of shape {tuple(loss.shape)}")
        loss = loss.reshape(())
        if self.custom_functions is None and loss.requires_grad:
            self.custom_functions = custom_functions(loss)
        if finite and weight and not math.isfinite(value := float(loss.detach())):
            raise InputError(f"a batch has loss {value}; its curvature is not defined")
        return weight, loss

    def weight(self, batch: Any) -> float:
        """Return the weight of a batch in the mean: the number of its labels, or 1 with ``loss_fn``.

        The model runs only where uneven batches are tried out.
        """
        with self.open():
            return self.within({}, lambda: self._weighted.weight(batch))

    def state(self) -> tuple[Any, ...]:
        """Return what tells that a tensor of the model was replaced or changed in place, or an adapter switched.

        A change through ``.data`` that keeps the memory is not seen.
        """
        tensors = (*self.model.parameters(), *self.model.buffers())
        versions = ((each.data_ptr(), 0 if each.is_inference() else each._version) for each in tensors)
        return (*versions, *adapter_switches(self.model))

    def converted(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the model in the dtype it is evaluated in."""
        tensor = tensor.detach()
        if self.cast_to is None or not tensor.is_floating_point():
            return tensor
        return tensor.to(self.cast_to)

    def _copies(self) -> dict[str, Tensor]:
        if self.cast_to is None:
            return {}
        if self._stand_ins_of != (state := self.state()):
            copies: dict[int, Tensor] = {}
            named = (
                *self.model.named_parameters(remove_duplicate=False),
                *self.model.named_buffers(remove_duplicate=False),
            )
            self._stand_ins = {
                name: copies.setdefault(id(tensor), self.converted(tensor))
                for name, tensor in named
                if tensor.is_floating_point() and tensor.dtype != self.cast_to
            }
            self._stand_ins_of = state
        return self._stand_ins

    def _loss(self, batch: Any) -> tuple[float, Tensor]:
        if self.cast_to is not None:
            batch = _converted_batch(batch, self.cast_to)
        return self._weighted(batch)

    def _first_loss(self, batch: Any) -> tuple[float, Tensor]:
        before = RandomState.now()
        watch = _CastWatch()
        with watch if self.dtype == torch.float64 else contextlib.nullcontext():
            weight, loss = self._loss(batch)
        if not _same(
            astuple(before), astuple(RandomState.now())
        ):  # something was drawn; it may have had no effect
            _, again = self._loss(batch)
            if not torch.equal(loss, again) and loss.isfinite().all():
                raise InputError(
                    "the loss is random in evaluation mode, so it has no Hessian: the model or loss_fn draws random "
                    "numbers (a functional dropout without training=self.training?)"
                )
        if watch.seen:
            self.rounds_to_float32 = True
            warnings.warn(
                "the model computes in float32 inside although float64 was requested: the result has "
                "the accuracy of float32",
                stacklevel=2,
            )
        self._checked = True
        return weight, loss


class _Scope(nn.Module):
    """Runs anything as the forward pass of a module, so that `functional_call` surrounds it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], T]) -> T:
        return function()


class _CastWatch(TorchDispatchMode):
    """Notices float64 tensors that are turned into float32 on the way from the leaves to the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            source = args[0]
            if source.dtype == torch.float64 and result.is_floating_point() and result.dtype != torch.float64:
                self.seen |= source.requires_grad
        return result


def _converted_batch(batch: Any, dtype: torch.dtype) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        return {key: _converted_batch(value, dtype) for key, value in batch.items()}
    if type(batch) in (list, tuple):
        return type(batch)(_converted_batch(value, dtype) for value in batch)
    return batch


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor | np.ndarray):
        return bool((one == other).all())
    if isinstance(one, tuple):
        return all(_same(a, b) for a, b in zip(one, other, strict=True))
    return one == other
