r"""The implicit midpoint rule, $y_+ = y + h f(\tfrac12 (y + y_+))$: keeps every quadratic invariant of the flow.

The imbalance $B^\top B - A A^\top$ is such an invariant under the Sylvester and Lyapunov gauges.
"""

import math

import torch

from tangora._checks import check_number, check_whole
from tangora.integrate.runge_kutta import Field, State, Stepped, advance, is_finite

# the equation is solved to this many roundings of the midpoint; fewer cannot be reached reliably
_ROUNDINGS = 64


def implicit_midpoint_step(
    field: Field,
    state: State,
    step_size: float,
    *,
    tolerance: float | None = None,
    max_iterations: int = 50,
) -> Stepped[State]:
    r"""Take one step of the implicit midpoint rule by fixed-point iteration on the midpoint.

    The iteration contracts while $h$ times the Lipschitz constant of the field stays below 2.

    Args:
        tolerance: The iteration ends when the midpoint moves by at most this share of its norm; by default 64 units of
            rounding of the state's dtype, below which invariants are no longer kept.
        max_iterations: Iterations allowed, one evaluation of the field each; the first guess takes one more.

    Returns:
        The step; it fails with ``implicit solve did not converge`` when the iterations run out, and with
        ``not finite``. The state of a failed step is the old one.

    Raises:
        InputError: For a tolerance that is not positive or less than one iteration.

    Source:
        Hairer, Lubich, Wanner (2006), Geometric Numerical Integration, Theorem IV.2.1 (quadratic invariants).
    """
    check_whole("max_iterations", max_iterations, low=1)
    if tolerance is None:
        tolerance = _ROUNDINGS * max(torch.finfo(part.dtype).eps for part in state)
    check_number("tolerance", tolerance, low=0, open_low=True)
    origin = tuple(part.detach() for part in state)
    middle = advance(origin, step_size, [0.5], [field(origin)])
    for evaluations in range(2, max_iterations + 2):
        velocity = field(middle)
        moved = advance(origin, step_size, [0.5], [velocity])
        if not is_finite(moved):
            return Stepped(state, evaluations, failure="not finite")
        change = _norm(advance(moved, -1.0, [1.0], [middle]))
        if change <= tolerance * _norm(moved):
            return Stepped(advance(origin, step_size, [1.0], [velocity]), evaluations)
        middle = moved
    return Stepped(state, max_iterations + 1, failure="implicit solve did not converge")


def _norm(state: State) -> float:
    return math.sqrt(sum(float(part.double().square().sum()) for part in state))
