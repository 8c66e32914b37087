r"""One step of an explicit Runge-Kutta method on a tuple of tensors."""

from tangora.integrate.state import Field, State, Stepped, advance, is_finite
from tangora.integrate.tableau import Tableau


def rk_step(
    field: Field,
    state: State,
    step_size: float,
    tableau: Tableau,
    *,
    first: State | None = None,
    estimate: bool = True,
) -> Stepped[State]:
    r"""Take one explicit Runge-Kutta step.

    The arithmetic is done without autograd, whatever mode the caller is in; the field may use autograd inside (under
    `torch.enable_grad`) and is called on detached tensors.

    Args:
        field: $f$ of $\dot y = f(y)$.
        state: $y$, floating point.
        step_size: $h$; negative goes back in time.
        tableau: The method.
        first: $f(y)$ if known, from the ``last`` of the step before or the ``first`` of a rejected one.
        estimate: Whether to return an error estimate, if the tableau has one. Without it, stages that serve nothing
            else are left out.

    Returns:
        The step; it fails with ``not finite`` when a new entry is.
    """
    embedded = tableau.embedded if estimate else None
    stages = tableau.evaluations if embedded is None else tableau.stages
    origin = tuple(part.detach() for part in state)
    velocities = [] if first is None else [first]
    while len(velocities) < stages:
        row = tableau.a[len(velocities)]
        velocities.append(field(advance(origin, step_size, row, velocities)))
    evaluations = stages - (first is not None)
    new = advance(origin, step_size, tableau.b[:stages], velocities)
    if not is_finite(new):
        return Stepped(state, evaluations, failure="not finite", first=velocities[0])
    error = None
    if embedded is not None:
        gaps = [weight - other for weight, other in zip(tableau.b, embedded, strict=True)]
        zero = tuple(part.new_zeros(part.shape) for part in origin)
        error = advance(zero, step_size, gaps, velocities)
    last = velocities[-1] if tableau.first_same_as_last and stages == tableau.stages else None
    return Stepped(new, evaluations, error=error, first=velocities[0], last=last)
