"""What the schemes step: states, fields, and what a step returns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

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
    """A step, taken or failed.

    Attributes:
        state: The new state; after a failure the state before the step.
        evaluations: Evaluations of the field.
        failure: Why there is no new state; None when there is one.
    """

    state: S
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
