"""The frozen weight under a pair, whatever it is stored as."""

from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tangora.adapters.four_bit import keep_layout
from tangora.adapters.offset import offset_factors
from tangora.adapters.offset_layer import get_offset, with_both_pairs
from tangora.adapters.offset_output import is_embedding
from tangora.adapters.pair import LoraPair, as_matrix


@torch.no_grad()
def base_weight(pair: LoraPair) -> Tensor:
    r"""Return $W_0$ in the orientation of $s B A$, dequantized where need be.

    Returns:
        A new or shared ``m x n`` tensor in float32 (float64 for a float64 layer), on the layer's device; not to be
        written to.
    """
    base = pair.layer.get_base_layer()  # pyright: ignore[reportCallIssue]
    assert isinstance(base, nn.Module)
    return module_weight(base, transposed=pair.transposed)


@torch.no_grad()
def module_weight(module: nn.Module, *, transposed: bool | None = None) -> Tensor:
    """Return the weight of a layer without an adapter as a matrix, dequantized where need be.

    Args:
        module: Linear layer, GPT-2's transposed one, convolution or embedding.
        transposed: Whether it stores its weight ``in x out``; default what its type says.

    Returns:
        As `base_weight`.
    """
    if transposed is None:
        transposed = isinstance(module, (Conv1D, nn.Embedding))
    keep_layout([module])
    held = getattr(module, "weight", None)
    weight = as_matrix(dequantize_module_weight(module).detach())
    if held is not None and module.weight is not held:
        module.weight = held  # PEFT leaves a copy there that an 8-bit layer on the CPU cannot be called with
    weight = weight.t() if transposed else weight
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


@torch.no_grad()
def magnitude_scale(pair: LoraPair) -> Tensor | None:
    r"""Return what DoRA multiplies each row of $W_0 + s B A$ with, magnitude over norm.

    PEFT takes the norm as a constant in the backward pass, so that the factors move the layer's weight by
    $D\,(s B A)$ with the diagonal $D$ returned here.

    Returns:
        ``m`` numbers in the dtype of `base_weight`; ``None`` for a layer without magnitudes.
    """
    magnitudes = getattr(pair.layer, "lora_magnitude_vector", None) or {}
    if pair.adapter not in magnitudes:
        return None
    weight = base_weight(pair)
    weight = weight + pair.delta_weight().to(weight)
    if (offset := offset_factors(pair)) is not None:
        weight = weight - pair.scaling * (offset[0] @ offset[1]).to(weight)
    return magnitudes[pair.adapter].weight.detach().flatten().to(weight) / weight.norm(dim=1)


def refresh_magnitude(pair: LoraPair) -> None:
    """Set a DoRA layer's magnitudes to the norms of the weight it has now; nothing happens to other layers.

    DoRA then starts from exactly that weight.

    Args:
        pair: The pair, with or without an offset.
    """
    layer: Any = pair.layer
    magnitudes = getattr(layer, "lora_magnitude_vector", None) or {}
    if pair.adapter not in magnitudes:
        return
    holder: Any = magnitudes[pair.adapter]
    magnitude = holder.weight
    view = layer if get_offset(layer, pair.adapter) is None else with_both_pairs(layer, pair.adapter)
    if is_embedding(layer, pair.adapter):
        A, B = (held[pair.adapter].detach() for held in (view.lora_embedding_A, view.lora_embedding_B))
    else:
        A, B = (held[pair.adapter].weight for held in (view.lora_A, view.lora_B))
    holder.update_layer(base_layer=layer.get_base_layer(), lora_A=A, lora_B=B, scaling=pair.scaling)
    # PEFT makes a new parameter; an optimizer may know the old one
    magnitude.data.copy_(holder.weight.detach())
    holder.weight = magnitude
