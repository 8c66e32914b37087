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
