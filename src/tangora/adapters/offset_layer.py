r"""One PEFT layer with a frozen second pair: $W_0 x + s (B A x - B_0 A_0 x)$, whatever kind of layer it is.

The layer behaves as PEFT's would on the base weight $W_0 - s B_0 A_0$, while the base weight stays as it is. Its state
is the one plain pair $A' = [A; A_0]$, $B' = [B, -B_0]$ that says the same on the untouched base, so that checkpoints
are exact and need nothing but PEFT.
"""

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from tangora._checks import InputError
from tangora.adapters import sharded

# PEFT's layers that ask `lora_variant` in the forward pass, in merging and in unmerging
_CARRIERS = {
    "Linear",
    "Embedding",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Linear4bit",
    "Linear8bitLt",
    "HqqLoraLinear",
}
# ... and those of them that do not ask it when one batch mixes adapters
_DEAF_TO_VARIANTS_IN_MIXED_BATCHES = {"Embedding", "HqqLoraLinear"}

# Methods by which PEFT's tools take an adapter for its trained pair alone, and what it thereby cannot be. The product
# of both pairs would be no better: reduce_intruder_dimension would write it into an adapter with the same offset.
_METHODS_WITHOUT_OFFSET = {
    "get_delta_weight": "cannot be read by get_delta_weight",
    "update_layer": "cannot be created again by update_layer",
}


class _Offset(nn.Module):
    """The frozen pair of one adapter in one layer.

    Buffers: nothing unfreezes them, no optimizer sees them, and they move with the model. They are not persistent,
    because the layer's own state carries them.
    """

    A0: Tensor
    B0: Tensor

    def __init__(self, A0: Tensor, B0: Tensor):
        super().__init__()
        self.register_buffer("A0", A0, persistent=False)
        self.register_buffer("B0", B0, persistent=False)


class OffsetVariant(LoraVariant):
    """PEFT's hook into a layer's forward pass and merging, here for an adapter that carries an offset."""

    def __init__(self, inner: LoraVariant | None):
        self.inner = inner

    def supports_lora_conversion(self) -> bool:
        """Say no: PEFT's conversion reads the trained pair alone."""
        return False

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Add the adapter's part to the base layer's output."""
        if self.inner is None:
            return result + _difference(module, active_adapter, x)
        whole = with_both_pairs(module, active_adapter)
        dropout: Any = None if _is_embedding(module, active_adapter) else module.lora_dropout[active_adapter]
        if module.training and dropout is not None and not isinstance(dropout, nn.Identity):
            # DoRA drops out the input of the whole weight. On the base W0 - s B0 A0 the layer's own output would
            # still come from the whole input: s B0 A0 (x_dropped - x) makes up for it.
            dropped = dropout(x)
            result = result + module.scaling[active_adapter] * _frozen_part(
                module, active_adapter, dropped - x
            )
            x = dropped
            _replace(whole, "lora_dropout", active_adapter, _AlreadyDropped())
        return self.inner.forward(whole, active_adapter=active_adapter, x=x, result=result, **kwargs)

    def merge_safe(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, module: LoraLayer, active_adapter: str, orig_weight: Tensor
    ) -> Tensor:
        """Return the weight with the adapter in it."""
        whole = with_both_pairs(module, active_adapter)
        if self.inner is not None:
            return self.inner.merge_safe(whole, active_adapter, orig_weight)
        return _added(orig_weight, _delta(whole, active_adapter))

    def merge_unsafe(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, module: LoraLayer, active_adapter: str, orig_weight: Tensor
    ) -> None:
        """Put the adapter into the weight in place."""
        whole = with_both_pairs(module, active_adapter)
        if self.inner is not None:
            self.inner.merge_unsafe(whole, active_adapter, orig_weight)
        else:
            orig_weight.data += _delta(whole, active_adapter)

    def unmerge(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, module: LoraLayer, active_adapter: str, orig_weight: Tensor
    ) -> Tensor:
        """Return the weight without the adapter."""
        whole = with_both_pairs(module, active_adapter)
        if self.inner is not None:
            return self.inner.unmerge(whole, active_adapter, orig_weight)
        return _added(orig_weight.data, -_delta(whole, active_adapter))


class _AlreadyDropped(nn.Module):
    # no nn.Identity: by that PEFT recognizes adapters without dropout
    def forward(self, x: Tensor) -> Tensor:
        return x


def why_no_carrier(layer: nn.Module, adapter: str) -> str | None:
    """Say why a layer cannot carry an offset."""
    kind, base = type(layer).__name__, layer.get_base_layer()  # pyright: ignore[reportCallIssue]
    variant = inner_variant(layer.lora_variant.get(adapter))  # pyright: ignore
    if kind not in _CARRIERS or not type(layer).__module__.startswith("peft.tuners.lora"):
        return f"it is adapted by PEFT's {kind}, whose forward pass cannot subtract an initial product"
    if variant is not None and "Dora" not in type(variant).__name__:
        return (
            "its forward pass is not that of plain LoRA "
            f"({type(variant).__name__.removesuffix('LinearVariant')})"
        )
    if hasattr(layer, "lora_arrow"):
        return "Arrow routes only between the trained pairs"
    if getattr(base, "max_norm", None) is not None:
        return "max_norm of the embedding rescales the factor"
    if getattr(base, "_hf_tp_plan", None) is not None:
        return "it is split over devices (tensor parallel)"
    return None


def inner_variant(variant: LoraVariant | None) -> LoraVariant | None:
    """Look through an offset at the variant of the forward pass."""
    return variant.inner if isinstance(variant, OffsetVariant) else variant


def get_offset(layer: nn.Module, adapter: str) -> _Offset | None:
    """Look up the frozen pair."""
    held: Any = getattr(layer, "lora_offset", {})
    return held[adapter] if adapter in held else None  # noqa: SIM401 (a ModuleDict has no get)


def put_offset(layer: Any, adapter: str, A0: Tensor, B0: Tensor) -> None:
    """Give a layer an offset, or replace the one it has."""
    if not hasattr(layer, "lora_offset"):
        layer.lora_offset = nn.ModuleDict()
        # so that PEFT deletes and moves the offset with the adapter
        layer.adapter_layer_names = (*layer.adapter_layer_names, "lora_offset")
        # functions of modules, so that copies and pickles of the model keep them
        layer.register_state_dict_post_hook(_join_state)
        layer.register_load_state_dict_pre_hook(_split_state)
        for method in _METHODS_WITHOUT_OFFSET:
            setattr(layer, method, partial(_call_unless_offset, layer, method))
        if type(layer).__name__ in _DEAF_TO_VARIANTS_IN_MIXED_BATCHES:
            layer.register_forward_hook(_subtract_in_mixed_batch, with_kwargs=True)
    layer.lora_offset[adapter] = _Offset(A0, B0)
    layer.lora_variant[adapter] = OffsetVariant(inner_variant(layer.lora_variant.get(adapter)))


def copy_offset(layer: Any, source: str, adapter: str) -> None:
    """Let another adapter of a layer start as one with an offset did: with its frozen pair, and at it."""
    offset = layer.lora_offset[source]
    put_offset(layer, adapter, offset.A0.clone(), offset.B0.clone())
    for _, live, frozen, _ in _factors(layer, adapter):
        if not _weight(live).is_meta:
            _weight(live).data = frozen.clone()


def refusal(adapter: str, reason: str) -> InputError:
    """Make the error for what PEFT cannot do with an adapter that has an offset."""
    return InputError(
        f"adapter {adapter!r} has an initial product that is subtracted, and {reason}: save it with "
        "tangora.save_adapter, load it on the base with tangora.load_adapter(base, path, "
        "is_trainable=True), and use that model"
    )


def drop_offset(layer: Any, adapter: str) -> None:
    """Take a layer's offset away; the layer then computes what PEFT's does."""
    del layer.lora_offset[adapter]
    variant = layer.lora_variant.pop(adapter)
    if variant.inner is not None:
        layer.lora_variant[adapter] = variant.inner


def with_both_pairs(layer: Any, adapter: str) -> Any:
    """Make a view of a layer whose one pair has the product B A - B0 A0."""
    whole = copy.copy(layer)
    for method in _METHODS_WITHOUT_OFFSET:
        whole.__dict__.pop(method, None)
    whole.__dict__["_modules"] = dict(layer._modules)
    for container, live, frozen, dim in _factors(layer, adapter):
        weight = _weight(live)
        frozen = frozen.to(weight)  # noqa: PLW2901
        # [B - B0, B0] [A; A - A0]: unlike [B, -B0] [A; A0] it is exactly zero at the start, and later as exact as the
        # change is small
        joined = torch.cat([weight, weight - frozen] if dim == 0 else [weight - frozen, frozen], dim)
        _replace(
            whole, container, adapter, joined if isinstance(live, Tensor) else _with_weight(live, joined)
        )
    return whole


def _call_unless_offset(layer: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    adapter: Any = args[0] if args else kwargs.get("adapter_name", kwargs.get("adapter"))
    if get_offset(layer, adapter):
        raise refusal(adapter, _METHODS_WITHOUT_OFFSET[method])
    return getattr(type(layer), method)(layer, *args, **kwargs)


def _weight(live: Any) -> Tensor:
    return live if isinstance(live, Tensor) else live.weight


def _replace(whole: Any, container: str, adapter: str, value: Any) -> None:
    # a container as PEFT's own is, because torch.compile looks into it
    held, kind = (
        copy.copy(getattr(whole, container)),
        "_parameters" if isinstance(value, Tensor) else "_modules",
    )
    held.__dict__[kind] = {**held.__dict__[kind], adapter: value}
    whole.__dict__["_modules"][container] = held


def _with_weight(module: nn.Module, weight: Tensor) -> nn.Module:
    twin: Any = copy.copy(module)
    twin.__dict__["_parameters"] = {**module._parameters, "weight": weight}
    # where Accelerate spreads a model over devices, this is bound to the original module and its weight
    twin.__dict__.pop("forward", None)
    return twin


def _delta(whole: Any, adapter: str) -> Tensor:
    return whole.get_delta_weight(adapter).detach()


def _added(weight: Tensor, delta: Tensor) -> Tensor:
    return (weight + delta.to(weight.device)).to(weight.dtype)


@torch.no_grad()
def _subtract_in_mixed_batch(
    layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor:
    names = kwargs.get("adapter_names")
    if names is None or layer.disable_adapters:
        return output
    for adapter in layer.lora_offset:
        if rows := [row for row, name in enumerate(names) if name == adapter]:
            x = args[0][rows]
            if not _is_embedding(layer, adapter):
                x = x.to(layer.lora_A[adapter].weight.dtype)
            part = layer.scaling[adapter] * _frozen_part(layer, adapter, x)
            output[rows] = (output[rows] - part).to(output.dtype)
    return output


def _is_embedding(layer: Any, adapter: str) -> bool:
    """Tell an embedding's factors, which PEFT holds as parameters, from those that are modules."""
    return adapter in layer.lora_embedding_A


def _factors(layer: Any, adapter: str) -> Iterator[tuple[str, Any, Tensor, int]]:
    """Go through the two trained factors of a layer with an offset."""
    offset, kind = layer.lora_offset[adapter], "embedding_" if _is_embedding(layer, adapter) else ""
    for letter, frozen, dim in (("A", offset.A0, 0), ("B", offset.B0, 1)):
        container = f"lora_{kind}{letter}"
        yield container, getattr(layer, container)[adapter], frozen, dim


def _difference(layer: Any, adapter: str, x: Tensor) -> Tensor:
    r"""Compute what both pairs add, $s (B A x - B_0 A_0 x)$; dropout falls on the trained pair alone.

    $B A - B_0 A_0 = (B - B_0) A + B_0 (A - A_0)$ is exactly zero at the start, and in low precision not a small
    difference of two large rounded products.
    """
    if _is_embedding(layer, adapter):
        A, B = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        A0, B0 = _frozen_factors(layer, adapter, A.dtype)
        rows = layer._embed(x, A.T)
        change = rows @ (B - B0).T + (rows - layer._embed(x, A0.T)) @ B0.T
        return layer.scaling[adapter] * _scaled_like_the_table(layer, change)
    return layer.scaling[adapter] * _change(layer, adapter, x, layer.lora_dropout[adapter](x))


def _frozen_part(layer: Any, adapter: str, x: Tensor) -> Tensor:
    r"""Compute the frozen pair's part alone, without the scaling: $B_0 A_0 x$."""
    if _is_embedding(layer, adapter):
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
        return up(hidden) - _frozen_part(layer, adapter, x)
    change = _apply(layer, up, hidden, up.weight - B0, up.bias)
    change = change + _apply(layer, up, _apply(layer, down, dropped, down.weight - A0), B0)
    # the frozen pair sees the whole input
    return change if dropped is x else change + _frozen_part(layer, adapter, dropped - x)


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


def _join_state(layer: Any, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Put the frozen pair into a layer's state, as a hook of torch.

    Every bit of all four factors can be read back.
    """
    for adapter in layer.lora_offset:
        for key, frozen, dim in _entries(layer, adapter, prefix):
            if key in state:
                live, frozen = state[key], -frozen if dim else frozen  # noqa: PLW2901
                # of a sharded factor by communication: like the state itself, it is asked for on every process
                (trained,) = sharded.whole([live])
                both = torch.cat([trained, frozen.to(live.device, live.dtype)], dim)
                state[key] = sharded.distribute(both, live)


@torch.no_grad()
def _split_state(layer: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take the frozen pair out of a state that is about to be loaded, as a hook of torch."""
    for adapter in layer.lora_offset:
        for key, frozen, dim in _entries(layer, adapter, prefix):
            if key not in state:
                continue
            given = state[key]
            if given.shape != torch.cat([frozen, frozen], dim).shape:
                raise InputError(
                    f"{key} must have rank {2 * frozen.shape[dim]}, because the layer subtracts an "
                    f"initial product; got shape {tuple(given.shape)}: call detach_offset before "
                    "loading another adapter, or "
                    "tangora.load_adapter(base, path, is_trainable=True) on the base model"
                )
            (both,) = sharded.whole([given])
            trained, start = both.split(frozen.shape[dim], dim)
            state[key] = sharded.distribute(trained.clone(), given)
            frozen.copy_(-start if dim else start)


def _entries(layer: Any, adapter: str, prefix: str) -> Iterator[tuple[str, Tensor, int]]:
    for container, live, frozen, dim in _factors(layer, adapter):
        yield f"{prefix}{container}.{adapter}" + ("" if isinstance(live, Tensor) else ".weight"), frozen, dim
