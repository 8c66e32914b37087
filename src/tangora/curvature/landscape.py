r"""The loss along one or two directions from the current weights, which are not written.

Directions: leading eigenvectors of the Hessian, the gradient, random ones, or vectors given, such as the way to another
end point. Eigenvectors, gradient and random vectors are made orthonormal, so that a coordinate is a distance in the
operator's coordinates. Filter-normalised random directions (`filters`) have the size of the weights in every row, so
that a coordinate is a share of the weights.

Source: Li et al. (2018), arXiv:1712.09913.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tangora._checks import InputError, check_choice, check_number, check_whole
from tangora.curvature.filters import normalize_filters
from tangora.curvature.products import seeded_generator
from tangora.curvature.surface import LossSurface
from tangora.curvature.weight_space import WeightSpace

Directions = Literal["eigenvectors", "gradient", "random", "filter"]
_KINDS = ("eigenvectors", "gradient", "random", "filter")


@dataclass(frozen=True)
class Landscape:
    r"""Losses on a line or a grid, $L(\theta + \sum_i t_i d_i)$.

    Attributes:
        names: Of the directions.
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

    def to_dict(self) -> dict[str, Any]:
        """Return everything as lists; losses that are not finite stay floats that are not."""
        return vars(self) | {
            "coordinates": [values.tolist() for values in self.coordinates],
            "losses": self.losses.tolist(),
        }


def landscape(
    operator: LossSurface,
    directions: Directions | Tensor | Sequence[Tensor] | Mapping[str, Tensor] = "eigenvectors",
    *,
    span: float = 1.0,
    points: int = 21,
    dimensions: int | None = None,
    tol: float = 1e-3,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
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
        progress: Called with the number of losses evaluated so far and of all.

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
        steps = [float(line[index]) for index in place]
        losses[place] = operator.loss_at(
            sum(
                (step * vector for step, vector in zip(steps, vectors, strict=True)),
                torch.zeros_like(vectors[0]),
            )
        )
        if progress is not None:
            progress(count, losses.numel())
    non_finite = int((~losses.isfinite()).sum())
    if non_finite:
        warnings.warn(
            f"{non_finite} of {losses.numel()} losses are not finite: take a smaller span than {span:g}",
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
        curvatures=tuple(float(vector.double() @ operator.matvec(vector).double()) for vector in vectors),
        non_finite=non_finite,
    )


def _directions(
    operator: LossSurface, directions: Any, dimensions: int | None, tol: float, seed: int
) -> dict[str, Tensor]:
    if not isinstance(directions, str):
        return _given(operator, directions, dimensions)
    check_choice("directions", directions, _KINDS)
    if directions == "filter" and not isinstance(operator.space, WeightSpace):
        raise InputError(
            "directions 'filter' need the coordinates of weights, over='weights': the rows of A and B change under "
            "(B R, R^-1 A), which leaves the model as it is, and so would the directions"
        )
    dimensions = 1 if dimensions is None else dimensions
    check_choice("dimensions", dimensions, (1, 2))
    if dimensions > operator.size:
        raise InputError(
            f"dimensions must be at most the number of coordinates, {operator.size}; got {dimensions}"
        )
    if directions == "eigenvectors":
        pairs = operator.top_eigenpairs(dimensions, tol=tol, seed=seed)
        return {f"eigenvector {index + 1}": pairs.vectors[:, index] for index in range(dimensions)}
    if directions == "gradient":
        return _along_gradient(operator, dimensions, tol, seed)
    generator = seeded_generator(seed)
    noise = [
        torch.randn(operator.size, generator=generator, dtype=torch.float64).to(
            operator.device, operator.dtype
        )
        for _ in range(dimensions)
    ]
    if directions == "filter":
        return {
            f"filter {index}": normalize_filters(operator.space, draw) for index, draw in enumerate(noise, 1)
        }
    Q = torch.linalg.qr(torch.stack(noise, 1))[0]
    return {f"random {index + 1}": Q[:, index] for index in range(dimensions)}


def _along_gradient(operator: LossSurface, dimensions: int, tol: float, seed: int) -> dict[str, Tensor]:
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


def _given(operator: LossSurface, directions: Any, dimensions: int | None) -> dict[str, Tensor]:
    if isinstance(directions, Tensor):
        directions = [directions]
    if not isinstance(directions, Mapping):
        directions = {f"direction {index}": vector for index, vector in enumerate(directions, 1)}
    if len(directions) not in (1, 2) or dimensions not in (None, len(directions)):
        wanted = "1 or 2" if dimensions is None else dimensions
        raise InputError(f"directions must be {wanted} vectors; got {len(directions)}")
    for name, vector in directions.items():
        if vector.shape != (operator.size,):
            raise InputError(f"{name} must have shape ({operator.size},); got {tuple(vector.shape)}")
        if not (vector.isfinite().all() and vector.any()):
            raise InputError(f"{name} must be finite and not zero")
    return {name: vector.to(operator.device, operator.dtype) for name, vector in directions.items()}
