r"""Filter normalisation: directions that are as large as the weights, row by row.

A layer whose weights are ten times larger feels a tenth of the same displacement, so that plain random directions do
not compare models of different scales. A row of $W = W_0 + s B A$ is an output feature. The rows of $A$ and $B$ have no
such meaning: they change under $(B R, R^{-1} A)$, which leaves $W$ alone.

Source: Li et al. (2018), arXiv:1712.09913. Differs in: matrices only, no biases or norms.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tangora.adapters import LoraPair, discover
from tangora.adapters.pair import as_matrix


def filter_normalized(direction: Float[Tensor, "m n"], weight: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """Give each row of a direction the norm of the same row of the weight.

    Args:
        direction: Any matrix without zero rows.
        weight: Rows are output features.

    Returns:
        The direction; zero in rows where the weight is.
    """
    return direction * (weight.norm(dim=1, keepdim=True) / direction.norm(dim=1, keepdim=True)).to(direction)


def normalize_filters(space: Any, direction: Float[Tensor, " size"]) -> Float[Tensor, " size"]:
    """Normalise a direction in the coordinates of weights.

    Args:
        space: A `WeightSpace`.
    """
    model = space.evaluation.model
    pairs: dict[str, list[LoraPair]] = {}
    for pair in discover(model).pairs:
        if pair.adapter in pair.layer.active_adapters:  # pyright: ignore[reportOperatorIssue]
            pairs.setdefault(pair.name, []).append(pair)
    parts = {}
    for name, part in space.to_dict(direction).items():
        transposed, weight = _adapted(pairs[name]) if name in pairs else _plain(model, name)
        rows = as_matrix(part).t() if transposed else as_matrix(part)
        scaled = filter_normalized(rows, weight)
        parts[name] = (scaled.t() if transposed else scaled).reshape(part.shape)
    return space.to_flat(parts)


@torch.no_grad()
def _adapted(pairs: list[LoraPair]) -> tuple[bool, Tensor]:
    weight = pairs[0].base_weight()
    for pair in pairs:
        weight = pair.weight(weight)
    return pairs[0].transposed, weight


def _plain(model: nn.Module, name: str) -> tuple[bool, Tensor]:
    transposed = isinstance(model.get_submodule(name.rpartition(".")[0]), (Conv1D, nn.Embedding))
    weight = as_matrix(model.get_parameter(name).detach())
    return transposed, weight.t() if transposed else weight
