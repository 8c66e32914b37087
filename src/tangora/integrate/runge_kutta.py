r"""Explicit Runge-Kutta methods on tuples of tensors: states, fields, and one step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from tangora.integrate.tableau import Tableau

State: TypeAlias = tuple[Tensor, ...]
"""The unknowns of an ODE, for instance the factors of all layers of a model."""

Field: TypeAlias = Callable[[State], State]
"""``field(y)`` -> dy/dt, shaped like ``y``, in tensors of its own: what it returned before must not change later.

One call is one evaluation of the gradient. Autonomous: all stages of a step must see the same batch.
"""

Failure = Literal["implicit solve did not converge", "not finite"]

S = TypeVar("S")


@dataclass(frozen=True, eq=False)
class Stepped(Generic[S]):
    """A step, taken or failed."""

    state: S  # after a failure the state before the step
    evaluations: int
    failure: Failure | None = None


@torch.no_grad()
def advance(state: State, step_size: float, weights: Sequence[float], velocities: Sequence[State]) -> State:
    r"""Return $y + h \sum_j w_j k_j$."""
    used = [
        (step_size * weight, velocity)
        for weight, velocity in zip(weights, velocities, strict=True)
        if weight != 0
    ]
    moved = list(state)
    for scale, velocity in used:
        moved = [y.add(k.to(y.dtype), alpha=scale) for y, k in zip(moved, velocity, strict=True)]
    return tuple(y.detach() for y in moved)


def is_finite(state: State) -> bool:
    """Tell whether every entry is finite."""
    return all(bool(part.isfinite().all()) for part in state)


def rk_step(
    field: Field,
    state: State,
    step_size: float,
    tableau: Tableau,
    *,
    first: State | None = None,
) -> Stepped[State]:
    r"""Take one explicit Runge-Kutta step.

    The arithmetic is done without autograd, whatever mode the caller is in; the field may use autograd inside (under
    `torch.enable_grad`) and is called on detached tensors.

    Args:
        field: $f$ of $\dot y = f(y)$.
        step_size: $h$; negative goes back in time.

    Returns:
        The step; it fails with ``not finite`` when a new entry is.
    """
    origin = tuple(part.detach() for part in state)
    velocities = [] if first is None else [first]
    while len(velocities) < tableau.stages:
        row = tableau.a[len(velocities)]
        velocities.append(field(advance(origin, step_size, row, velocities)))
    evaluations = tableau.stages - (first is not None)
    new = advance(origin, step_size, tableau.b, velocities)
    if not is_finite(new):
        return Stepped(state, evaluations, failure="not finite")
    return Stepped(new, evaluations)
