r"""One rank and one alpha for a whole adapter, as readers without patterns (GGUF, some servers) expect."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tangora._checks import InputError
from tangora.adapters.compress import layers_of


@dataclass(frozen=True)
class Uniform:
    """An adapter whose layers all have the scaling ``alpha / rank``."""

    tensors: dict[str, Tensor]
    """All tensors; those of layers that had another rank or scaling are new."""
    rank: int
    """Rank of every layer."""
    alpha: float
    """Alpha of every layer."""


def uniform(tensors: Mapping[str, Tensor], scalings: Mapping[str, float]) -> Uniform:
    r"""Write every update $s B A$ with one scaling $c$ and one rank: $c\,(\tfrac{s}{c} B) A$, filled up with zeros.

    The scaling $c$ is one of the adapter's own. Factors that are multiplied by a power of two keep every bit, so the
    one is taken from which most entries of $B$ differ by such a power.
    """
    layers = layers_of(tensors)
    rank = max(tensors[key_A].shape[0] for key_A, _ in layers.values())
    common = _commonest_scaling(
        {layer: tensors[key_B].numel() for layer, (_, key_B) in layers.items()}, scalings
    )
    result = dict(tensors)
    for layer, (key_A, key_B) in layers.items():
        ratio, missing = scalings[layer] / common, rank - tensors[key_A].shape[0]
        for key in (key_B, f"{layer}.lora_B.bias"):
            if key in tensors and ratio != 1:
                result[key] = _times(tensors[key], ratio, layer)
        if missing:
            result[key_A] = _padded(tensors[key_A], missing, 0)
            result[key_B] = _padded(result[key_B], missing, 1)
    return Uniform(result, rank, common * rank)


def _commonest_scaling(sizes: Mapping[str, int], scalings: Mapping[str, float]) -> float:
    classes, exact = Counter[float](), Counter[float]()
    for layer, size in sizes.items():
        classes[math.frexp(scalings[layer])[0]] += size
        exact[scalings[layer]] += size
    mantissa = classes.most_common(1)[0][0]
    return max((s for s in exact if math.frexp(s)[0] == mantissa), key=exact.__getitem__)


def _times(factor: Tensor, ratio: float, layer: str) -> Tensor:
    result = (factor.double() * ratio).to(factor.dtype)
    if not torch.isfinite(result).all() or ((result == 0) & (factor != 0)).any():
        raise InputError(
            f"uniform must be False, because {factor.dtype} has no room for the factors of {layer} times {ratio:g}; "
            "save the model in float32"
        )
    return result


def _padded(factor: Tensor, missing: int, dim: int) -> Tensor:
    shape = list(factor.shape)
    shape[dim] = missing
    return torch.cat([factor, factor.new_zeros(shape)], dim)
