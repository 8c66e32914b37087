r"""The state of a layer with an offset: one plain pair of twice the rank, $A' = [A; A_0]$ and $B' = [B, -B_0]$.

It says the same on the untouched base, so that checkpoints are exact and need nothing but PEFT.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from tangora._checks import InputError
from tangora.adapters.offset_output import factors


def join_state(layer: Any, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Put the frozen pair into a layer's state, as a hook of torch.

    Every bit of all four factors can be read back.
    """
    for adapter in layer.lora_offset:
        for key, frozen, dim in _entries(layer, adapter, prefix):
            if key in state:
                live, frozen = state[key], -frozen if dim else frozen  # noqa: PLW2901
                whole = torch.cat([_whole(live), frozen.to(live.device, live.dtype)], dim)
                state[key] = _placed(whole, live)


@torch.no_grad()
def split_state(layer: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take the frozen pair out of a state that is about to be loaded, as a hook of torch."""
    for adapter in layer.lora_offset:
        for key, frozen, dim in _entries(layer, adapter, prefix):
            if key not in state:
                continue
            given = state[key]
            if given.shape != torch.cat([frozen, frozen], dim).shape:
                raise InputError(
                    f"{key} must have rank {2 * frozen.shape[dim]}, as the state of a layer with an offset has; "
                    f"got shape {tuple(given.shape)}: call detach_offset before loading another adapter, or "
                    "tangora.load_adapter(base, path, is_trainable=True) on the base model"
                )
            trained, start = _whole(given).split(frozen.shape[dim], dim)
            state[key] = _placed(trained.clone(), given)
            frozen.copy_(-start if dim else start)


def _entries(layer: Any, adapter: str, prefix: str) -> Iterator[tuple[str, Tensor, int]]:
    for container, live, frozen, dim in factors(layer, adapter):
        yield f"{prefix}{container}.{adapter}" + ("" if isinstance(live, Tensor) else ".weight"), frozen, dim


def _whole(tensor: Tensor) -> Tensor:
    # of a sharded factor by communication: like the state itself, it is asked for on every process
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _placed(tensor: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return tensor
    # every process has the whole tensor: no communication
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
