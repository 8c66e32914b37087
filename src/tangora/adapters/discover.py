"""Find the LoRA pairs of a PEFT model by its layers' attributes, so that every wrapper of a linear layer works."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from tangora._checks import InputError, check_kind
from tangora.adapters.offset_layer import inner_variant
from tangora.adapters.pair import LoraPair
from tangora.adapters.stored_weight import keep_layout

# PEFT variants of the forward pass under which g_A = s B'g and g_B = s g A' still hold for the weight W0 + s B A.
_PLAIN_VARIANTS = ("Dora", "_Dora", "ALora")


@dataclass(frozen=True)
class Discovery:
    """The adapters of a model."""

    pairs: list[LoraPair]
    """Plain pairs, each once."""
    skipped: dict[str, str]
    """Layers that look like LoRA and are no plain pair, with the reason."""


def find_pairs(model: nn.Module, adapter_name: str | None = None) -> list[LoraPair]:
    """List the (A, B) pairs of a PEFT model.

    Linear layers (also transposed ones, and quantized ones of any backend that PEFT wraps), embeddings and
    convolutions, with LoRA, rsLoRA or DoRA and any rank or alpha pattern. Tied layers are listed once. Layers that are
    no plain pair are named in one warning.

    Args:
        model: A model made by PEFT, possibly wrapped (DDP, compiled).
        adapter_name: Only this adapter; default all.

    Returns:
        The pairs in the order of the model's layers; empty for a model without LoRA.

    Raises:
        InputError: If ``adapter_name`` names no adapter of the model.
    """
    found = discover(model, adapter_name)
    if found.skipped:
        warnings.warn(describe_skipped(found.skipped), stacklevel=2)
    return found.pairs


def describe_skipped(skipped: dict[str, str]) -> str:
    """Put the layers that are no plain pair into one sentence."""
    return f"not plain LoRA pairs, so trained by AdamW: {by_reason(skipped)}"


def by_reason(skipped: dict[str, str]) -> str:
    """Group layers by the reason why they are no plain pair."""
    names: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{reason}: {some_of(alike)}" for reason, alike in names.items())


def some_of(names: Sequence[str]) -> str:
    """List at most five names, and count the others."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def discover(model: nn.Module, adapter_name: str | None = None) -> Discovery:
    """Find the pairs of a PEFT model and what is none, without a warning; 4-bit layers under pairs keep their layout.

    Args:
        model: A model made by PEFT.
        adapter_name: Only this adapter; default all.

    Returns:
        Pairs and skipped layers.

    Raises:
        InputError: If ``model`` is no module or ``adapter_name`` names no adapter of it.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    check_kind("adapter_name", adapter_name, (str, type(None)), "the name of an adapter")
    pairs: list[LoraPair] = []
    skipped: dict[str, str] = {}
    adapters: set[str] = set()
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        for adapter, A, B in _factors(layer):
            adapters.add(adapter)
            if adapter_name in (None, adapter):
                _sort_in(pairs, skipped, name, layer, adapter, A, B)
    if adapter_name is not None and adapter_name not in adapters:
        known = ", ".join(sorted(adapters)) or "none: it has no LoRA layers"
        raise InputError(f"adapter_name must be one of the model's adapters ({known}); got {adapter_name!r}")
    keep_layout(pair.base for pair in pairs)
    return Discovery(pairs, skipped)


def _factors(layer: LoraLayer) -> Iterator[tuple[str, Any, Any]]:
    for adapter in layer.lora_A:
        yield adapter, _parameter(layer.lora_A[adapter]), _parameter(layer.lora_B[adapter])
    for adapter in layer.lora_embedding_A:
        yield adapter, layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]


def _parameter(holder: Any) -> Any:
    # a module with a weight in ordinary layers, the parameter itself in AdaLoRA's
    return holder if isinstance(holder, nn.Parameter) else getattr(holder, "weight", None)


def _sort_in(
    pairs: list[LoraPair], skipped: dict[str, str], name: str, layer: LoraLayer, adapter: str, A: Any, B: Any
) -> None:
    reason = _why_not_plain(layer, adapter, A, B)
    if reason is not None:
        skipped[name] = reason
        return
    embedding = adapter in layer.lora_embedding_A
    transposed = embedding or bool(getattr(layer, "fan_in_fan_out", False))
    pair = LoraPair(name, layer, adapter, A, B, transposed)  # pyright: ignore[reportArgumentType]
    for index, other in enumerate(pairs):
        if other.A is A and other.B is B:
            return
        if _same_memory(other.A, B) and _same_memory(other.B, A):  # tied through transposed views
            pairs[index] = replace(other, tied=(*other.tied, (A, B)))
            return
    pairs.append(pair)


def _same_memory(one: nn.Parameter, other: nn.Parameter) -> bool:
    # without storage (meta device) nothing can be told apart, and nothing is tied
    return one.data_ptr() != 0 and one.data_ptr() == other.data_ptr() and one.numel() == other.numel()


def _why_not_plain(layer: LoraLayer, adapter: str, A: Any, B: Any) -> str | None:
    inner = inner_variant(layer.lora_variant.get(adapter))  # an offset is constant, and changes no gradient
    variant = type(inner).__name__ if inner else ""
    kind = type(layer).__name__
    if hasattr(layer, "lora_E"):
        return "AdaLoRA (a third factor)"
    if kind == "ParamWrapper":
        return "target_parameters (several matrices in one pair)"
    if variant and not variant.startswith(_PLAIN_VARIANTS):
        return f"{variant.removesuffix('Variant')} (its forward pass is not that of plain LoRA)"
    if getattr(layer.get_base_layer(), "groups", 1) != 1:
        return "convolution with groups (block-diagonal, not a matrix product)"
    if not (isinstance(A, nn.Parameter) and isinstance(B, nn.Parameter)):
        return f"{kind} without plain factors"
    if not A.is_floating_point() or A.dim() < 2 or B.shape[1:].numel() != A.shape[0]:
        return f"{kind} with factors of unexpected shape {tuple(A.shape)} and {tuple(B.shape)}"
    return None
