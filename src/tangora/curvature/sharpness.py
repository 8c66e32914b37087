r"""Largest rise of the loss in a ball around the weights.

$S(\rho) = \max_{\|\delta\| \le \rho} L(\theta + \delta) - L(\theta)$, by projected gradient ascent from several starts.
The maximum of a loss that is not concave cannot be certified, so that the best point found is a lower bound. Next to it
stands what the second-order expansion says: $\max_{\|\delta\| \le \rho} g^\top \delta + \tfrac12 \delta^\top H \delta$
over a Krylov space, and its bound $\rho \|g\| + \tfrac12 \rho^2 \lambda_{\max}^+$, which needs no space.

Radius and result belong to the coordinates: over factors they change with the gauge $(B R, R^{-1} A)$, over tangent
space and weights they do not.

Source: Keskar et al. (2017), arXiv:1609.04836, for sharpness in a neighbourhood; Foret et al. (2021), arXiv:2010.01412,
for the ball. Differs in: several starts, line search, no division by the loss.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tangora import _names
from tangora._checks import check_number, check_whole
from tangora._types import Progress
from tangora.curvature.eigenpairs import Eigenpairs
from tangora.curvature.operators import CurvatureOperator
from tangora.curvature.products import seeded_generator
from tangora.curvature.trust_region import maximize_in_krylov_space

_SMALLEST_STEP = 1e-3


@dataclass(frozen=True, eq=False)
class Sharpness:
    r"""The largest loss found in a ball.

    Attributes:
        space: Coordinates that the ball lies in.
        radius: $\rho$.
        loss: $L(\theta)$.
        rise: Largest rise that was found, a lower bound of $S(\rho)$; infinite if a loss in the ball is.
        displacement: Where; flat, of norm at most $\rho$.
        starts: Rise that each start led to, by name.
        second_order: Maximum of the second-order expansion over a Krylov space, at most that over the ball.
        second_order_bound: $\rho \|g\| + \tfrac12 \rho^2 \max(\lambda_{\max}, 0)$, at least that over the ball as
            far as the eigenvalue is right.
        products: Products with the Hessian.
    """

    space: _names.SpaceName
    radius: float
    loss: float
    rise: float
    displacement: Tensor
    starts: dict[str, float]
    second_order: float
    second_order_bound: float
    products: int


def sharpness(
    operator: CurvatureOperator,
    radius: float,
    *,
    steps: int = 10,
    random_starts: int = 1,
    krylov: int = 10,
    pairs: Eigenpairs | None = None,
    tol: float = 1e-3,
    seed: int = 0,
    progress: Progress | None = None,
) -> Sharpness:
    r"""Look for the largest loss in a ball around the weights, which are not written.

    Args:
        operator: A Hessian and its loss.
        radius: $\rho > 0$ in the operator's coordinates.
        steps: Gradients for each start, at least 0.
        random_starts: Random points on the sphere, at least 0, beside the gradient, the leading eigenvector in both
            directions, and the maximum of the second-order expansion.
        krylov: Dimension of the space in which that is maximised, at least 2; each takes a product.
        pairs: Leading eigenpairs of the operator, where they are known already; only the first is used.
        tol: Tolerance of the leading eigenpair, where it is not given.
        seed: Seed of the random starting points.
        progress: Called after each start.

    Returns:
        The best point found and how it compares with the second order.

    Raises:
        InputError: If a number is out of range.
    """
    check_number("radius", radius, low=0, open_low=True)
    check_whole("steps", steps, low=0)
    check_whole("random_starts", random_starts, low=0)
    check_whole("krylov", krylov, low=2)
    before, base = operator.num_products, operator.loss()
    gradient = operator.gradient()
    leading = operator.top_eigenpairs(1, tol=tol, seed=seed) if pairs is None else pairs
    vector = leading.vectors[:, 0]
    second = maximize_in_krylov_space(operator, gradient, [gradient, vector], radius, krylov)
    generator = seeded_generator(seed)
    noise = [torch.randn(operator.shape[0], generator=generator).to(vector) for _ in range(random_starts)]
    best, rise, rises = torch.zeros_like(vector), 0.0, {}
    starts = dict(_starts(gradient, vector, second.step, noise, radius))
    for name, start in starts.items():
        point, rises[name] = _ascend(operator, base, start, radius, steps)
        if rises[name] > rise:
            best, rise = point, rises[name]
        if progress is not None:
            progress(f"sharpness from {name}", len(rises), len(starts))
    norm, curvature = float(gradient.double().norm()), float(leading.values[0])
    return Sharpness(
        space=operator.space.kind,
        radius=float(radius),
        loss=base,
        rise=rise,
        displacement=best,
        starts=rises,
        second_order=second.value,
        second_order_bound=radius * norm + radius**2 * max(curvature, 0.0) / 2,
        products=operator.num_products - before,
    )


def _starts(
    gradient: Tensor, vector: Tensor, second: Tensor, noise: list[Tensor], radius: float
) -> Iterator[tuple[str, Tensor]]:
    directions = [
        ("gradient", gradient),
        ("eigenvector", vector),
        ("-eigenvector", -vector),
        *((f"random {number}", draw) for number, draw in enumerate(noise, 1)),
    ]
    yield "second order", _into_ball(second, radius)
    for name, direction in directions:
        if direction.any():
            yield name, direction * (radius / float(direction.norm()))


def _into_ball(point: Tensor, radius: float) -> Tensor:
    size = float(point.norm())
    return point if size <= radius else point * (radius / size)


def _ascend(
    operator: CurvatureOperator, base: float, point: Tensor, radius: float, steps: int
) -> tuple[Tensor, float]:
    def rise_at(displacement: Tensor) -> float:
        # a loss that is not a number counts as infinite
        loss = operator.loss_at(displacement)
        return loss - base if math.isfinite(loss) else math.inf

    # the step doubles after a success and shrinks after a failure
    best, size = rise_at(point), 1.0
    for _ in range(steps):
        if math.isinf(best):
            break
        gradient = operator.gradient_at(point)
        norm = float(gradient.norm())
        if not (norm > 0 and math.isfinite(norm)):
            break
        while size >= _SMALLEST_STEP:
            trial = _into_ball(point + gradient * (size * radius / norm), radius)
            rise = rise_at(trial)
            if rise > best:
                point, best, size = trial, rise, 2 * size
                break
            size /= 4
        else:
            break
    return point, best
