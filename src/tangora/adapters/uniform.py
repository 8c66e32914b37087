"""One rank and one alpha for all layers, for readers that know no patterns: GGUF, vLLM, llama.cpp."""

from collections import Counter
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from tangora.adapters.compress import layers_of


def uniform(
    tensors: Mapping[str, Tensor], scalings: Mapping[str, float]
) -> tuple[dict[str, Tensor], int, float | int]:
    r"""Fold the scalings of an adapter into its factors $B$ and fill all ranks up with zeros.

    Every $s B A$ stays what it is, up to the rounding of $B$; layers with the commonest scaling keep every bit.

    Args:
        tensors: Tensors of a saved adapter of plain pairs.
        scalings: Scaling by the name of the layer.

    Returns:
        All tensors, the rank, and alpha: every scaling is alpha / rank.
    """
    result, layers = dict(tensors), layers_of(tensors)
    rank = max(tensors[key_A].shape[0] for key_A, _ in layers.values())
    common = Counter(scalings[layer] for layer in layers).most_common(1)[0][0]
    alpha = common * rank
    if not float(alpha).is_integer():  # some readers take whole numbers only
        alpha, common = rank, 1.0
    for layer, (key_A, key_B) in layers.items():
        A, B = tensors[key_A], tensors[key_B]
        factor, missing = scalings[layer] / common, rank - A.shape[0]
        scaled = B if factor == 1 else (B.double() * factor).to(B.dtype)
        result[key_A] = F.pad(A, (*[0, 0] * (A.dim() - 1), 0, missing)).contiguous()
        result[key_B] = F.pad(scaled, (*[0, 0] * (B.dim() - 2), 0, missing)).contiguous()
    return result, rank, int(alpha)
