"""The weight of a layer without an adapter, whatever it is stored as."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@torch.no_grad()
def module_weight(module: nn.Module, *, transposed: bool | None = None) -> Tensor:
    """Return the weight of a layer without an adapter as a matrix, dequantized where need be.

    Args:
        module: Linear layer, GPT-2's transposed one, convolution or embedding.
        transposed: Whether it stores its weight ``in x out``; default what its type says.

    Returns:
        A new or shared ``m x n`` tensor in float32 (float64 for a float64 layer), on the layer's device; not to be
        written to.
    """
    if transposed is None:
        transposed = isinstance(module, (Conv1D, nn.Embedding))
    keep_layout([module])
    held = getattr(module, "weight", None)
    weight = dequantize_module_weight(module).detach().flatten(1)
    if held is not None and module.weight is not held:
        module.weight = held  # PEFT leaves a copy there that an 8-bit layer on the CPU cannot be called with
    weight = weight.t() if transposed else weight
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


@torch.no_grad()
def keep_layout(layers: Iterable[nn.Module]) -> None:
    """Keep 4-bit layers of bitsandbytes from repacking their weights, and undo it with a warning where it has happened.

    On a CPU with AVX512-BF16 bitsandbytes (0.49 and later) rewrites a 4-bit weight in place when it is first called in
    evaluation mode: its scales are rounded to bfloat16 for good, the layer then computes in bfloat16, and whatever
    dequantizes the weight (DoRA, merging, an initialization) misreads the new layout. That layer's evaluation becomes
    slower here and stays what it is in training.
    """
    rounded = 0
    for layer in layers:
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            layer.support_avx512bf16_for_cpu = False  # pyright: ignore[reportArgumentType]
            rounded += _unpacked(layer)
    if rounded:
        warnings.warn(
            f"bitsandbytes had repacked {rounded} 4-bit weights for inference on this CPU, which rounds their scales "
            "to bfloat16: they differ from the saved base; load it again and call tangora before evaluating it",
            stacklevel=3,
        )


def _unpacked(layer: nn.Module) -> bool:
    held: Any = layer.weight
    if not getattr(getattr(held, "quant_state", None), "packing_format_for_cpu", False):
        return False
    layer.state_dict()  # unpacks in place, for lack of a public function that does only that
    state = held.quant_state
    if state.absmax.dim() == 2:  # without nested scales bitsandbytes leaves them as the kernel wants them
        state.absmax = state.absmax.T.reshape(-1).float().contiguous()
    return True
