r"""What the experiments on a low-rank shift $\Delta = W^* - W_0$ share: data, starts, angles and one descent loop.

Stacks of problems are dense float64 tensors with leading batch dimensions; $Y = B A$ is the update (scaling 1), so
that LoRA-One's left and right (its weights act from the right) are our right and left.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from tangora._types import FactorA, FactorB, Weight
from tangora.experiments.reproduce.parts.linear_shift import Inputs
from tangora.geometry.sketch import LowRankSVD
from tangora.geometry.tangent import Cotangent
from tangora.init import one_step
from tangora.optim.preconditioned_adamw import precondition

Gradient: TypeAlias = Callable[[Weight], Weight]
"""Full gradient at an update $Y$."""


class Factors(NamedTuple):
    """A pair of factors, possibly a stack of them."""

    A: FactorA
    B: FactorB

    @property
    def product(self) -> Weight:
        """The update $B A$."""
        return self.B @ self.A


def draw_shift(
    m: int, n: int, rank: int, condition: float, generator: torch.Generator
) -> Float[Tensor, "m n"]:
    """Draw a shift with random singular spaces and singular values from 1 to 1 / condition, evenly in the logarithm.

    Args:
        m: Rows.
        n: Columns.
        rank: Its rank.
        condition: Largest over smallest singular value.
        generator: Source of randomness.

    Returns:
        The shift.
    """
    left = torch.linalg.qr(torch.randn(m, rank, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64)).Q
    exponents = torch.linspace(0.0, -1.0, rank, dtype=torch.float64) if rank > 1 else torch.zeros(1)
    return left * condition ** exponents.double() @ right.T


def draw_inputs(num: int, n: int, inputs: Inputs, generator: torch.Generator) -> Float[Tensor, "N n"]:
    """Draw independent sub-Gaussian inputs with mean 0 and variance 1.

    Args:
        num: How many.
        n: Their dimension.
        inputs: Distribution of the entries.
        generator: Source of randomness.

    Returns:
        One input in each row.
    """
    if inputs == "gaussian":
        return torch.randn(num, n, generator=generator, dtype=torch.float64)
    uniform = torch.rand(num, n, generator=generator, dtype=torch.float64) - 0.5
    return uniform.sign() if inputs == "rademacher" else uniform * 12**0.5


def spectral_start(gradient: Weight, rank: int, *, step: float) -> Factors:
    r"""Build the start $B_0 A_0 = -\eta\,G_r$ of each of a stack of gradients.

    Args:
        gradient: $G$.
        rank: $r$.
        step: $\eta$.

    Returns:
        Balanced factors.
    """
    U, S, Vh = torch.linalg.svd(gradient, full_matrices=False)
    flat = zip(U.flatten(0, -3), S.flatten(0, -2), Vh.flatten(0, -3), strict=True)
    pairs = [one_step(LowRankSVD(*parts), rank, 1.0, step=step) for parts in flat]
    shape = gradient.shape[:-2]
    A, B = (torch.stack(parts).unflatten(0, shape) for parts in zip(*pairs, strict=True))
    return Factors(A, B)


def leading_left(matrix: Weight, rank: int) -> FactorB:
    """Return an orthonormal basis of the leading left singular subspace.

    Args:
        matrix: Any matrix.
        rank: Dimension of the subspace.

    Returns:
        The basis as columns.
    """
    return torch.linalg.svd(matrix, full_matrices=False).U[..., :rank]


def sine_of_angle(basis: Float[Tensor, "*#b m r"], other: Float[Tensor, "*#b m q"]) -> Float[Tensor, "..."]:
    r"""Return $\|U_\perp^\top V\|_2$, the sine of the largest principal angle.

    Computed as $\|(I - U U^\top) V\|_2$, which is accurate for small angles.

    Args:
        basis: $U$ with orthonormal columns.
        other: $V$ with orthonormal columns.

    Returns:
        A number in [0, 1].
    """
    return torch.linalg.matrix_norm(other - basis @ (basis.mT @ other), ord=2)


def plain_step(at: Factors, g: Weight) -> Cotangent:
    """Return LoRA's own directions.

    Args:
        at: The factors.
        g: Full gradient at their product.

    Returns:
        Gradients with respect to the factors.
    """
    return Cotangent(at.B.mT @ g, g @ at.A.mT)


def preconditioned_step(damping: float) -> Callable[[Factors, Weight], Cotangent]:
    """Make the directions of preconditioned LoRA.

    Args:
        damping: Added to the Gram matrices.

    Returns:
        A function like `plain_step`.
    """

    def directions(at: Factors, g: Weight) -> Cotangent:
        return precondition(at.A, at.B, *plain_step(at, g), damping)

    return directions


def descend(
    start: Factors,
    gradient: Gradient,
    directions: Callable[[Factors, Weight], Cotangent],
    learning_rate: tuple[float | Tensor, float | Tensor],
    steps: int,
    watch: Callable[[int, Factors, Weight], bool | None],
) -> Factors:
    """Run gradient descent on both factors at once.

    Args:
        start: Where it begins.
        gradient: Full gradient at an update.
        directions: From the factors and the full gradient there.
        learning_rate: For A and for B; tensors give each problem of the stack its own.
        steps: How many.
        watch: Called with the number of steps done, the factors and the full gradient there, 0 and the last included;
            the descent ends early when it returns true.

    Returns:
        The last factors.
    """
    at = start
    for step in range(steps + 1):
        g = gradient(at.product)
        if watch(step, at, g) or step == steps:
            break
        direction = directions(at, g)
        at = Factors(at.A - learning_rate[0] * direction.A, at.B - learning_rate[1] * direction.B)
    return at


def contraction(errors: Float[Tensor, " t"], low: float, high: float) -> float:
    """Fit the factor by which an error shrinks in each step.

    Args:
        errors: By step.
        low: Errors below are left out.
        high: Errors above are left out.

    Returns:
        Factor of the straight line through the logarithms; NaN with fewer than three errors between the bounds.
    """
    inside = ((errors >= low) & (errors <= high)).nonzero()[:, 0]
    return float(torch.exp(slope(inside.double(), errors[inside].log()))) if len(inside) > 2 else float("nan")


def slope(x: Float[Tensor, " k"], y: Float[Tensor, " k"]) -> Float[Tensor, ""]:
    """Fit a straight line.

    Args:
        x: Abscissae, not all equal.
        y: Ordinates.

    Returns:
        Its slope.
    """
    centred = x - x.mean()
    return centred @ (y - y.mean()) / (centred @ centred)
