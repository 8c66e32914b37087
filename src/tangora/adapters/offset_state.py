"""The state of a layer with an offset is that of one plain pair of twice the rank, which PEFT alone can load."""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tangora._checks import InputError
from tangora.adapters.offset_output import is_embedding

INSTEAD = "save_adapter it, load_adapter that on the base, and use the tool there"


def factors_of(layer: Any, adapter: str) -> Iterator[tuple[str, Any, Tensor, int]]:
    """Go through both factors of a layer with an offset.

    Args:
        layer: The layer.
        adapter: The adapter.

    Yields:
        Name of the container in the layer, what it holds for the adapter, the frozen counterpart, and the dimension of
        the rank.
    """
    offset, kind = layer.lora_offset[adapter], "embedding_" if is_embedding(layer, adapter) else ""
    for letter, frozen, dim in (("A", offset.A0, 0), ("B", offset.B0, 1)):
        container = f"lora_{kind}{letter}"
        yield container, getattr(layer, container)[adapter], frozen, dim


def weight_of(live: Any) -> Any:
    """Return the parameter of a factor.

    Args:
        live: Module, or for embeddings the parameter itself.

    Returns:
        The parameter.
    """
    return live if isinstance(live, Tensor) else live.weight


def parameters_of(layer: Any, adapter: str) -> list[nn.Parameter]:
    """Return the trained factors as PEFT holds them.

    Args:
        layer: A layer with an offset.
        adapter: The adapter.

    Returns:
        A and B.
    """
    return [weight_of(live) for _, live, _, _ in factors_of(layer, adapter)]


def _entries(layer: Any, adapter: str, prefix: str) -> Iterator[tuple[str, Tensor, int]]:
    for container, live, frozen, dim in factors_of(layer, adapter):
        yield f"{prefix}{container}.{adapter}" + ("" if isinstance(live, Tensor) else ".weight"), frozen, dim


def join_state(layer: Any, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Write both pairs as one, [A; A0] and [B, -B0], from which every bit can be read back.

    Args:
        layer: The layer whose state is made, as for every ``state_dict`` hook.
        state: State, changed in place.
        prefix: The layer's name and a dot.
        _metadata: Unused.
    """
    for adapter in layer.lora_offset:
        # the one thing that PEFT's hotswap calls before it writes into the trained factors
        refuse_in("hotswap_adapter_from_state_dict", f"adapter {adapter!r}")
        for key, frozen, dim in _entries(layer, adapter, prefix):
            if key in state:
                trained = _gathered(state[key])
                joined = torch.cat([trained, (-frozen if dim else frozen).to(trained)], dim)
                state[key] = _sharded_like(state[key], joined)


@torch.no_grad()
def split_state(layer: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Read both pairs back from a state that `join_state` wrote.

    Args:
        layer: The layer that loads.
        state: State, changed in place: the trained pair stays in it.
        prefix: The layer's name and a dot.
        *_: Unused.

    Raises:
        InputError: If the state is that of an adapter without an offset, or of another rank.
    """
    for adapter in layer.lora_offset:
        for key, frozen, dim in _entries(layer, adapter, prefix):
            if key not in state:
                continue
            rank, given = frozen.shape[dim], state[key]
            if given.shape != torch.cat([frozen, frozen], dim).shape:
                raise InputError(
                    f"{key} must have rank {2 * rank}, because its layer carries an offset; got shape "
                    f"{tuple(given.shape)}: call detach_offset before loading an adapter that has none"
                )
            trained, start = _gathered(given).split(rank, dim)
            state[key] = _sharded_like(given, trained.clone())
            frozen.copy_(-start if dim else start)


def _gathered(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "placements") else tensor


def _sharded_like(tensor: Any, value: Tensor) -> Tensor:
    # every rank holds the whole value, so that nothing is sent
    if not hasattr(tensor, "placements"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)


def refuse_in(function: str, what: str) -> None:
    """Refuse to go on inside a function of PEFT that would ignore an offset, and asks nobody who could know of it.

    Args:
        function: Its name.
        what: What carries the offset.

    Raises:
        InputError: If it is running.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == function and frame.f_globals.get("__name__", "").startswith("peft."):
            raise InputError(f"{what} carries an offset, which peft's {function} would ignore: {INSTEAD}")
        frame = frame.f_back
