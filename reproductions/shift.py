r"""Shared by the experiments on a low-rank shift $\Delta = W^* - W_0$: data, initializations, angles, one descent loop.

Stacks of problems are dense float64 tensors with leading batch dimensions; $Y = B A$ is the update (scaling 1), so
that LoRA-One's left and right (its weights act from the right) are our right and left.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from tangora._types import FactorA, FactorB, Weight
from tangora.geometry.sketch import LowRankSVD
from tangora.geometry.tangent import Cotangent
from tangora.init import one_step
from tangora.optim.preconditioned_adamw import precondition

LORA_ONE = "LoRA-One (arXiv:2502.01235)"

Inputs: TypeAlias = Literal["gaussian", "rademacher", "uniform"]


class Factors(NamedTuple):
    """A pair of factors, possibly a stack of them."""

    A: FactorA
    B: FactorB

    @property
    def product(self) -> Weight:
        """The update $B A$."""
        return self.B @ self.A


Directions: TypeAlias = Callable[[Factors, Weight], Cotangent]
"""Directions of both factors, from the factors and the full gradient at their product."""


def draw_shift(
    m: int, n: int, rank: int, condition: float, generator: torch.Generator
) -> Float[Tensor, "m n"]:
    """Draw a shift with random singular spaces and singular values from 1 to 1 / condition, evenly in the logarithm."""
    left = torch.linalg.qr(torch.randn(m, rank, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64)).Q
    exponents = torch.linspace(0.0, -1.0, rank, dtype=torch.float64) if rank > 1 else torch.zeros(1)
    return left * condition ** exponents.double() @ right.T


def draw_inputs(num: int, n: int, inputs: Inputs, generator: torch.Generator) -> Float[Tensor, "N n"]:
    """Draw independent sub-Gaussian inputs with mean 0 and variance 1, one in each row."""
    if inputs == "gaussian":
        return torch.randn(num, n, generator=generator, dtype=torch.float64)
    uniform = torch.rand(num, n, generator=generator, dtype=torch.float64) - 0.5
    return uniform.sign() if inputs == "rademacher" else uniform * 12**0.5


def spectral_start(gradient: Weight, rank: int, *, step: float) -> Factors:
    r"""Build the balanced start $B_0 A_0 = -\eta\,G_r$ of each of a stack of gradients."""
    U, S, Vh = torch.linalg.svd(gradient, full_matrices=False)
    flat = zip(U.flatten(0, -3), S.flatten(0, -2), Vh.flatten(0, -3), strict=True)
    pairs = [one_step(LowRankSVD(*parts), rank, 1.0, step=step) for parts in flat]
    A, B = (torch.stack(parts).unflatten(0, gradient.shape[:-2]) for parts in zip(*pairs, strict=True))
    return Factors(A, B)


def leading_left(matrix: Weight, rank: int) -> FactorB:
    """Return an orthonormal basis of the leading left singular subspace."""
    return torch.linalg.svd(matrix, full_matrices=False).U[..., :rank]


def sine_of_angle(basis: Float[Tensor, "*#b m r"], other: Float[Tensor, "*#b m q"]) -> Float[Tensor, "..."]:
    r"""Return the sine of the largest principal angle, $\|(I - U U^\top) V\|_2$, accurate for small angles."""
    return torch.linalg.matrix_norm(other - basis @ (basis.mT @ other), ord=2)


def plain_step(at: Factors, g: Weight) -> Cotangent:
    """Return LoRA's own directions, the gradients with respect to the factors."""
    return Cotangent(at.B.mT @ g, g @ at.A.mT)


def preconditioned_step(damping: float) -> Directions:
    """Make the directions of preconditioned LoRA; the damping is added to the Gram matrices."""
    return lambda at, g: precondition(at.A, at.B, *plain_step(at, g), damping)


def descend(
    start: Factors,
    gradient: Callable[[Weight], Weight],
    directions: Directions,
    learning_rate: tuple[float | Tensor, float | Tensor],
    steps: int,
    watch: Callable[[int, Factors], bool | None],
) -> None:
    """Run gradient descent on both factors at once.

    Args:
        start: Factors to begin with.
        gradient: Full gradient at an update.
        directions: Directions in which the factors descend.
        learning_rate: Of A and of B; tensors give each problem of the stack its own.
        steps: Most steps.
        watch: Called with the number of steps done and the factors there, from 0 on; ends the descent when it is true.
    """
    at = start
    for step in range(steps + 1):
        if watch(step, at) or step == steps:
            return
        direction = directions(at, gradient(at.product))
        at = Factors(at.A - learning_rate[0] * direction.A, at.B - learning_rate[1] * direction.B)


def errors_of_descent(
    start: Factors,
    gradient: Callable[[Weight], Weight],
    directions: Directions,
    learning_rate: float,
    steps: int,
    error: Callable[[Weight], Tensor],
    enough: float,
) -> Float[Tensor, "t ..."]:
    """Run a descent with one learning rate until all errors are small enough; return the errors by step."""
    errors: list[Tensor] = []

    def watch(_: int, at: Factors) -> bool:
        errors.append(error(at.product))
        return bool((errors[-1] <= enough).all())

    descend(start, gradient, directions, (learning_rate, learning_rate), steps, watch)
    return torch.stack(errors)


def contraction(errors: Float[Tensor, " t"], low: float, high: float) -> float:
    """Fit the factor by which errors between two bounds shrink in each step; NaN with fewer than three of them."""
    inside = ((errors >= low) & (errors <= high)).nonzero()[:, 0]
    return float(torch.exp(slope(inside.double(), errors[inside].log()))) if len(inside) > 2 else float("nan")


def slope(x: Float[Tensor, " k"], y: Float[Tensor, " k"]) -> Float[Tensor, ""]:
    """Return the slope of the straight line fitted to points."""
    centred = x - x.mean()
    return centred @ (y - y.mean()) / (centred @ centred)
