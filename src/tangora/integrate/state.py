"""What the schemes step: states, fields, and what a step returns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeAlias, TypeVar, runtime_checkable

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
        error: Estimate of the step's error, shaped like the state, from an embedded method.
        failure: Why there is no new state; None when there is one.
        first: Velocity at the state before the step, for repeating the step with another step size.
        last: Velocity at the new state, if the scheme happens to know it.
    """

    state: S
    evaluations: int
    error: S | None = None
    failure: Failure | None = None
    first: S | None = None
    last: S | None = None


@runtime_checkable
class Stepper(Protocol[S]):
    """A scheme bound to a field: all that the loop needs."""

    def __call__(self, state: S, step_size: float, first: S | None = None, /) -> Stepped[S]:
        """Take one step.

        Args:
            state: The state to start from; it is never changed in place.
            step_size: The step.
            first: Velocity at ``state``, if the step before or a rejected one handed it on.

        Returns:
            The step.
        """
        ...


@torch.no_grad()
def advance(state: State, step_size: float, weights: Sequence[float], velocities: Sequence[State]) -> State:
    r"""Return $y + h \sum_j w_j k_j$.

    Args:
        state: $y$.
        step_size: $h$.
        weights: $w$; terms of weight zero are left out.
        velocities: $k$.

    Returns:
        New tensors, detached, in the dtype of ``state``; ``state`` itself where nothing is added.
    """
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
    """Tell whether every entry is finite.

    Args:
        state: Tensors.

    Returns:
        False if any entry is infinite or not a number.
    """
    return all(bool(part.isfinite().all()) for part in state)
