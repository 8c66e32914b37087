r"""Layers whose gradient follows from their input $X$ and output $Y$ alone: $G = (\partial L/\partial Y)^\top X$.

Nothing here touches a weight, so quantized layers of any backend work like the others. $G$ is $m \times n$ in the
orientation of the update $s B A$: for an embedding, whose update is $(B A)^\top$, that is features by vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight
from transformers.pytorch_utils import Conv1D

from tangora._checks import InputError
from tangora.adapters import LoraPair, base_layer, discover, uncompiled_modules

# called as functions of their weights, never as layers
_NEVER_CALLED = (nn.MultiheadAttention, nn.modules.linear.NonDynamicallyQuantizableLinear)
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_WEIGHT_GRADIENT = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}


@dataclass(frozen=True, eq=False)
class ProbedLayer:
    """A linear map inside a model."""

    name: str
    """Its path in the model."""
    module: nn.Module
    """The module to call: the layer, or PEFT's wrapper around it."""
    m: int
    """Rows of the gradient."""
    n: int
    """Columns of the gradient."""
    pair: LoraPair | None = None
    """The adapter on it, where there is one."""

    @property
    def path(self) -> str:
        """Its path in the base model."""
        return self.name if self.pair is None else self.pair.path

    @property
    def base(self) -> nn.Module:
        """The layer that holds the weight."""
        return base_layer(self.module)

    def times(self, x: Tensor, right: Tensor) -> Tensor:
        r"""Return $X\,\Omega$, ``N x k``: all that the product $G\,\Omega$ needs of the input.

        Args:
            right: $\Omega$, ``n x k``.
        """
        base = self.base
        if isinstance(base, nn.Embedding):
            rows = right[x.reshape(-1)]
            return rows if base.padding_idx is None else rows * (x.reshape(-1, 1) != base.padding_idx)
        if isinstance(base, nn.modules.conv._ConvNd):
            kernel = right.T.reshape(-1, *base.weight.shape[1:])
            return _rows(_CONV[x.dim() - 2](_padded(x.to(right.dtype), base), kernel, **_geometry(base)))
        return x.reshape(-1, self.n).to(right.dtype) @ right

    def gradient_times(self, grad: Tensor, product: Tensor) -> Tensor:
        r"""Return $G\,\Omega$, ``m x k``, from the gradient of the layer's output and what `times` returned."""
        return self._output_rows(grad, product.dtype).T @ product

    def times_gradient(self, left: Tensor | None, grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        r"""Return $Q^\top G$, ``k x n``, computed in ``dtype``.

        Args:
            left: $Q$, ``m x k``; ``None`` stands for the identity.
            grad: Gradient of the layer's output.
        """
        base, rows = self.base, self._output_rows(grad, dtype)
        rows = rows if left is None else rows @ left
        if isinstance(base, nn.Embedding):
            if base.padding_idx is not None:
                rows = rows * (x.reshape(-1, 1) != base.padding_idx)
            return rows.new_zeros(self.n, rows.shape[1]).index_add_(0, x.reshape(-1), rows).T
        if isinstance(base, nn.modules.conv._ConvNd):
            spatial = [1, *range(2, grad.dim())]
            channels = rows.reshape(grad.shape[0], *(grad.shape[d] for d in spatial[1:]), -1).movedim(-1, 1)
            shape = (rows.shape[1], *base.weight.shape[1:])
            x = _padded(x.to(dtype), base)
            kernel = _CONV_WEIGHT_GRADIENT[x.dim() - 2](x, shape, channels, **_geometry(base))
            return kernel.flatten(1)
        return rows.T @ x.reshape(-1, self.n).to(dtype)

    def _output_rows(self, grad: Tensor, dtype: torch.dtype) -> Tensor:
        base = self.base
        if isinstance(base, nn.modules.conv._ConvNd):
            return _rows(grad.to(dtype))
        rows = grad.reshape(-1, self.m).to(dtype)
        # Gemma's embeddings scale what they look up, and PEFT scales the adapter's share alike
        scale = getattr(base, "embed_scale", None) if isinstance(base, nn.Embedding) else None
        return rows if scale is None else rows * scale


def probed_layers(
    model: nn.Module, *, adapter_name: str | None = None, names: Sequence[str] | None = None
) -> list[ProbedLayer]:
    """List the layers of a model whose gradient can be measured.

    Args:
        model: A PEFT model, whose adapted layers are listed, or a plain model, all of whose linear layers are.
        adapter_name: Only layers with this adapter; default all.
        names: Only layers whose name is, or ends with, one of these (PEFT's ``target_modules``).

    Returns:
        The layers in the order of the model.

    Raises:
        InputError: If ``names`` leaves none, or the model has none.
    """
    pairs = discover(model, adapter_name).pairs
    if pairs:
        found = [ProbedLayer(pair.name, pair.layer, *pair.shape[:2], pair) for pair in pairs]
    else:
        modules = uncompiled_modules(model)
        found = [
            ProbedLayer(name, layer, *size) for name, layer in modules.items() if (size := _shape(layer))
        ]
    by_name = {layer.name: layer for layer in found if _is_named(layer.name, names)}
    readable = [layer for layer in by_name.values() if _why_unreadable(layer.base) is None]
    if not readable:
        wanted = f" called {', '.join(names)}" if names is not None else ""
        odd = next(iter(unreadable_layers(model, names).items()), None)
        reason = f" ({odd[0]}: {odd[1]})" if odd else ""
        raise InputError(f"model has no linear layer{wanted} whose gradient can be measured{reason}")
    return readable


def unreadable_layers(model: nn.Module, names: Sequence[str] | None) -> dict[str, str]:
    """List the layers that hold a weight whose gradient cannot be read."""
    layers = {name: layer for name, layer in uncompiled_modules(model).items() if _is_named(name, names)}
    return {name: reason for name, layer in layers.items() if (reason := _why_unreadable(layer))}


def why_unread(layer: nn.Module) -> str:
    """Say why the gradient of a layer has not been read.

    Args:
        layer: The layer, or PEFT's wrapper around it.
    """
    return _why_unreadable(base_layer(layer)) or "the model does not call it with gradients on these batches"


def _is_named(name: str, names: Sequence[str] | None) -> bool:
    return names is None or any(name == wanted or name.endswith(f".{wanted}") for wanted in names)


def _why_unreadable(layer: nn.Module) -> str | None:
    if isinstance(layer, _NEVER_CALLED):
        return "its weight is used without calling the layer"
    if not isinstance(layer, nn.modules.conv._ConvNd):
        return None
    if layer.transposed:
        return "transposed convolution"
    if layer.groups != 1:
        return "convolution with groups (block-diagonal, not a matrix product)"
    if layer.padding_mode != "zeros":
        return f"convolution with padding_mode {layer.padding_mode!r}"
    return None


def _shape(layer: nn.Module) -> tuple[int, int] | None:
    if isinstance(layer, Conv1D):
        return layer.weight.shape[1], layer.weight.shape[0]
    if isinstance(layer, nn.modules.conv._ConvNd):
        return None if _why_unreadable(layer) else (layer.out_channels, layer.weight.shape[1:].numel())
    sizes = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
    has_weight = isinstance(getattr(layer, "weight", None), Tensor)  # quantized layers keep theirs packed
    return sizes if has_weight and isinstance(sizes[0], int) and isinstance(sizes[1], int) else None  # pyright: ignore[reportReturnType]


def _rows(channels: Tensor) -> Tensor:
    # N x C x space -> (N space) x C
    return channels.movedim(1, -1).reshape(-1, channels.shape[1])


def _padded(x: Tensor, layer: Any) -> Tensor:
    # "same" may pad the two sides differently, which no number says
    return F.pad(x, layer._reversed_padding_repeated_twice) if isinstance(layer.padding, str) else x


def _geometry(layer: Any) -> dict[str, Any]:
    padding = 0 if isinstance(layer.padding, str) else layer.padding
    return {"stride": layer.stride, "padding": padding, "dilation": layer.dilation}
