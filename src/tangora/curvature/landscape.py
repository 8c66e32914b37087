r"""The loss along one or two directions from the current weights, which are not written.

Directions: leading eigenvectors of the Hessian, the gradient, random ones, or vectors given, such as the way to another
end point. Eigenvectors, gradient and random vectors are made orthonormal, so that a coordinate is a distance in the
operator's coordinates. Filter-normalised random directions have the size of the weights in every row, so that a
coordinate is a share of the weights: a layer whose weights are ten times larger feels a tenth of the same displacement,
so that plain random directions do not compare models of different scales. A row of $W = W_0 + s B A$ is an output
feature. The rows of $A$ and $B$ have no such meaning: they change under $(B R, R^{-1} A)$, which leaves $W$ alone.

Source: Li et al. (2018), arXiv:1712.09913. Differs in: filters of matrices only, not of biases or norms.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tangora._checks import InputError, check_choice, check_number, check_whole
from tangora._types import Progress
from tangora.adapters import LoraPair, discover
from tangora.adapters.pair import as_matrix
from tangora.curvature.operators import CurvatureOperator
from tangora.curvature.products import seeded_generator
from tangora.curvature.spaces import Space

Directions = Literal["eigenvectors", "gradient", "random", "filter"]
_KINDS = ("eigenvectors", "gradient", "random", "filter")


@dataclass(frozen=True)
class Landscape:
    r"""Losses on a line or a grid, $L(\theta + \sum_i t_i d_i)$.

    Attributes:
        names: Names of the directions.
        coordinates: The $t_i$ of each direction, ascending, with 0 among them.
        losses: One dimension for each direction, float64; infinite or NaN where the loss is.
        loss: At the current weights.
        norms: $\|d_i\|$.
        slopes: $g^\top d_i$, the first derivative by $t_i$.
        curvatures: $d_i^\top H d_i$, the second derivative by $t_i$.
        non_finite: How many losses are not finite.
    """

    names: tuple[str, ...]
    coordinates: tuple[Float[Tensor, " p"], ...]
    losses: Float[Tensor, "..."]
    loss: float
    norms: tuple[float, ...]
    slopes: tuple[float, ...]
    curvatures: tuple[float, ...]
    non_finite: int


def landscape(
    operator: CurvatureOperator,
    directions: Directions | Tensor | Sequence[Tensor] | Mapping[str, Tensor] = "eigenvectors",
    *,
    span: float = 1.0,
    points: int = 21,
    dimensions: int | None = None,
    tol: float = 1e-3,
    seed: int = 0,
    progress: Progress | None = None,
) -> Landscape:
    """Evaluate the loss on a line or a grid around the current weights.

    Args:
        operator: A Hessian and its loss.
        directions: ``eigenvectors`` (the leading ones), ``gradient`` (in two dimensions with the part of the leading
            eigenvector that is orthogonal to it), ``random``, ``filter``, or one or two vectors as they are, possibly
            by name.
        span: Coordinates go from ``-span`` to ``span``, over 0.
        points: In each direction, odd and at least 3.
        dimensions: 1 or 2; default 1, or the number of vectors given.
        progress: Called after each loss.

    Returns:
        The landscape. A warning tells of losses that are not finite.

    Raises:
        InputError: If an argument is out of range, a direction has another size or is zero, or ``filter`` was asked for
            in other coordinates than weights.
    """
    check_number("span", span, low=0, open_low=True)
    check_whole("points", points, low=3)
    if points % 2 == 0:
        raise InputError(f"points must be odd, so that the current weights are one of them; got {points}")
    named = _directions(operator, directions, dimensions, tol, seed)
    vectors = list(named.values())
    # symmetric to the last bit, with an exact zero
    half = torch.linspace(0, span, points // 2 + 1, dtype=torch.float64)
    line = torch.cat([-half[1:].flip(0), half])
    losses = torch.empty([points] * len(vectors), dtype=torch.float64)
    for count, place in enumerate(product(range(points), repeat=len(vectors)), 1):
        lengths = [float(line[index]) for index in place]
        losses[place] = operator.loss_at(
            sum(
                (length * vector for length, vector in zip(lengths, vectors, strict=True)),
                torch.zeros_like(vectors[0]),
            )
        )
        if progress is not None:
            progress("landscape", count, losses.numel())
    non_finite = int((~losses.isfinite()).sum())
    if non_finite:
        warnings.warn(
            f"{non_finite} of {losses.numel()} losses are not finite: use a smaller span than {span:g}",
            stacklevel=2,
        )
    gradient = operator.gradient().double()
    return Landscape(
        names=tuple(named),
        coordinates=(line,) * len(vectors),
        losses=losses,
        loss=operator.loss(),
        norms=tuple(float(vector.double().norm()) for vector in vectors),
        slopes=tuple(float(gradient @ vector.double()) for vector in vectors),
        curvatures=tuple(float(vector.double() @ (operator @ vector).double()) for vector in vectors),
        non_finite=non_finite,
    )


def _directions(
    operator: CurvatureOperator, directions: Any, dimensions: int | None, tol: float, seed: int
) -> dict[str, Tensor]:
    if not isinstance(directions, str):
        return _given(operator, directions, dimensions)
    check_choice("directions", directions, _KINDS)
    if directions == "filter" and operator.space.kind != "weights":
        raise InputError(
            "directions 'filter' need the coordinates of weights, over='weights': the rows of A and B change under "
            "(B R, R^-1 A), which does not change the model, so the directions would change, too"
        )
    dimensions = 1 if dimensions is None else dimensions
    check_choice("dimensions", dimensions, (1, 2))
    if dimensions > operator.shape[0]:
        raise InputError(
            f"dimensions must be at most the number of coordinates, {operator.shape[0]}; got {dimensions}"
        )
    if directions == "eigenvectors":
        pairs = operator.top_eigenpairs(dimensions, tol=tol, seed=seed)
        return {f"eigenvector {index + 1}": pairs.vectors[:, index] for index in range(dimensions)}
    if directions == "gradient":
        return _along_gradient(operator, dimensions, tol, seed)
    generator = seeded_generator(seed)
    noise = [
        torch.randn(operator.shape[0], generator=generator, dtype=torch.float64).to(
            operator.device, operator.dtype
        )
        for _ in range(dimensions)
    ]
    if directions == "filter":
        return {
            f"filter {index}": _filter_normalized(operator.space, draw) for index, draw in enumerate(noise, 1)
        }
    Q = torch.linalg.qr(torch.stack(noise, 1))[0]
    return {f"random {index + 1}": Q[:, index] for index in range(dimensions)}


def _along_gradient(operator: CurvatureOperator, dimensions: int, tol: float, seed: int) -> dict[str, Tensor]:
    gradient = operator.gradient()
    norm = float(gradient.norm())
    if not (norm > 0 and math.isfinite(norm)):
        raise InputError(f"directions cannot be 'gradient': its norm is {norm}")
    found = {"gradient": gradient / norm}
    if dimensions == 2:
        vector = operator.top_eigenpairs(1, tol=tol, seed=seed).vectors[:, 0]
        # QR rather than a subtraction: the gradient may be nearly the eigenvector
        Q = torch.linalg.qr(torch.stack([found["gradient"], vector], 1))[0]
        found["eigenvector 1 without gradient"] = Q[:, 1] * torch.sign(Q[:, 1] @ vector)
    return found


def _given(operator: CurvatureOperator, directions: Any, dimensions: int | None) -> dict[str, Tensor]:
    if isinstance(directions, Tensor):
        directions = [directions]
    if not isinstance(directions, Mapping):
        directions = {f"direction {index}": vector for index, vector in enumerate(directions, 1)}
    if len(directions) not in (1, 2) or dimensions not in (None, len(directions)):
        wanted = "1 or 2" if dimensions is None else dimensions
        raise InputError(f"directions must be {wanted} vectors; got {len(directions)}")
    for name, vector in directions.items():
        if vector.shape != (operator.shape[0],):
            raise InputError(f"{name} must have shape ({operator.shape[0]},); got {tuple(vector.shape)}")
        if not (vector.isfinite().all() and vector.any()):
            raise InputError(f"{name} must be finite and not zero")
    return {name: vector.to(operator.device, operator.dtype) for name, vector in directions.items()}


def _filter_normalized(space: Space, direction: Float[Tensor, " size"]) -> Float[Tensor, " size"]:
    # each row of a direction gets the norm of the same row of the weight
    model = space.evaluation.model
    pairs: dict[str, list[LoraPair]] = {}
    for pair in discover(model).pairs:
        if pair.active:
            pairs.setdefault(pair.name, []).append(pair)
    parts = {}
    for name, part in space.to_dict(direction).items():
        transposed, weight = _adapted(pairs[name]) if name in pairs else _plain(model, name)
        rows = as_matrix(part).t() if transposed else as_matrix(part)
        rows = rows * (weight.norm(dim=1, keepdim=True) / rows.norm(dim=1, keepdim=True)).to(rows)
        parts[name] = (rows.t() if transposed else rows).reshape(part.shape)
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
