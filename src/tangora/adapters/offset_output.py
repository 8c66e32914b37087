r"""What a trained pair and its frozen one add to a layer's output: $s (B A x - B_0 A_0 x)$, kind by kind of layer.

Arithmetic alone: it reads the factors of a layer that has an offset and changes nothing.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def is_embedding(layer: Any, adapter: str) -> bool:
    """Tell an embedding's factors, which PEFT holds as parameters, from those that are modules."""
    return adapter in layer.lora_embedding_A


def factors(layer: Any, adapter: str) -> Iterator[tuple[str, Any, Tensor, int]]:
    """Go through the two trained factors of a layer with an offset."""
    offset, kind = layer.lora_offset[adapter], "embedding_" if is_embedding(layer, adapter) else ""
    for letter, frozen, dim in (("A", offset.A0, 0), ("B", offset.B0, 1)):
        container = f"lora_{kind}{letter}"
        yield container, getattr(layer, container)[adapter], frozen, dim


def difference(layer: Any, adapter: str, x: Tensor) -> Tensor:
    r"""Compute what both pairs add, $s (B A x - B_0 A_0 x)$; dropout falls on the trained pair alone.

    $B A - B_0 A_0 = (B - B_0) A + B_0 (A - A_0)$ is exactly zero at the start, and in low precision not a small
    difference of two large rounded products.
    """
    if is_embedding(layer, adapter):
        A, B = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        A0, B0 = _frozen_factors(layer, adapter, A.dtype)
        rows = layer._embed(x, A.T)
        change = rows @ (B - B0).T + (rows - layer._embed(x, A0.T)) @ B0.T
        return layer.scaling[adapter] * _scaled_like_the_table(layer, change)
    return layer.scaling[adapter] * _change(layer, adapter, x, layer.lora_dropout[adapter](x))


def frozen_part(layer: Any, adapter: str, x: Tensor) -> Tensor:
    r"""Compute the frozen pair's part alone, without the scaling: $B_0 A_0 x$."""
    if is_embedding(layer, adapter):
        A0, B0 = _frozen_factors(layer, adapter, layer.lora_embedding_A[adapter].dtype)
        return _scaled_like_the_table(layer, layer._embed(x, A0.T) @ B0.T)
    down, up = layer.lora_A[adapter], layer.lora_B[adapter]
    A0, B0 = _frozen_factors(layer, adapter, down.weight.dtype)
    return _apply(layer, up, _apply(layer, down, x, A0), B0)


def _change(layer: Any, adapter: str, x: Tensor, dropped: Tensor) -> Tensor:
    down, up = layer.lora_A[adapter], layer.lora_B[adapter]
    A0, B0 = _frozen_factors(layer, adapter, down.weight.dtype)
    hidden = down(dropped)
    if not (_readable(down.weight, A0) and _readable(up.weight, B0)):
        return up(hidden) - frozen_part(layer, adapter, x)
    change = _apply(layer, up, hidden, up.weight - B0, up.bias)
    change = change + _apply(layer, up, _apply(layer, down, dropped, down.weight - A0), B0)
    # the frozen pair sees the whole input
    return change if dropped is x else change + frozen_part(layer, adapter, dropped - x)


def _readable(live: Tensor, frozen: Tensor) -> bool:
    # sharded and offloaded factors have their values only while their own module is called
    return (
        type(live) in (nn.Parameter, Tensor) and live.shape == frozen.shape and live.device == frozen.device
    )


def _frozen_factors(layer: Any, adapter: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    offset = layer.lora_offset[adapter]
    # PEFT casts an adapter's parameters and leaves buffers alone
    return offset.A0.to(dtype), offset.B0.to(dtype)


def _apply(layer: Any, module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if isinstance(module, nn.Linear):
        return F.linear(x, weight, bias)
    return layer.conv_fn(x, weight, bias, stride=module.stride, padding=module.padding)


def _scaled_like_the_table(layer: Any, rows: Tensor) -> Tensor:
    scale = layer._get_embed_scale()  # some embeddings multiply their output; PEFT follows them
    return rows if scale is None else rows * scale.to(rows.dtype)
