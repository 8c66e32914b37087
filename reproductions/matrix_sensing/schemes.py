r"""All integration schemes by name: of factors, in tangora, and of low-rank matrices, beside this file."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch

from reproductions.matrix_sensing.low_rank import bug_step, ksl_step, parallel_bug_step, projected_rk_step
from tangora.geometry.gauge import Gauge, factor_velocity
from tangora.geometry.tangent import Cotangent, coordinates, frame, project
from tangora.integrate import (
    EULER,
    HEUN,
    MIDPOINT,
    RK4,
    TABLEAUS,
    Field,
    State,
    Stepped,
    implicit_midpoint_step,
    rk_step,
)


class Scheme(NamedTuple):
    """A method of integration."""

    kind: Literal["factors", "low rank"]
    """State of the scheme: a pair (A, B) under a field, or several `LowRank` under a `LowRankField`."""
    order: int
    """Order of accuracy."""
    evaluations: int | None
    """Gradients per step; None where it depends on how fast an equation is solved."""
    step: Callable[..., Stepped[Any]]
    """``step(field, state, step_size, **options)``."""


SCHEMES: dict[str, Scheme] = {
    **{
        name: Scheme("factors", tableau.order, tableau.stages, partial(rk_step, tableau=tableau))
        for name, tableau in TABLEAUS.items()
    },
    "implicit_midpoint": Scheme("factors", 2, None, implicit_midpoint_step),
    **{
        f"projected_{tableau.name}": Scheme(
            "low rank", tableau.order, tableau.stages, partial(projected_rk_step, tableau=tableau)
        )
        for tableau in (EULER, HEUN, MIDPOINT, RK4)
    },
    "ksl": Scheme("low rank", 1, 3, ksl_step),
    "bug": Scheme("low rank", 1, 2, bug_step),
    "parallel_bug": Scheme("low rank", 1, 1, parallel_bug_step),
}


def factor_field(
    gradients: Callable[[State], State], gauge: Gauge = "lyapunov", scaling: float = 1.0
) -> Field:
    r"""Return the field $(\dot A, \dot B) = -\tfrac1s (H_A, H_B)$, which moves $W = W_0 + s B A$ along $-P_T(g)$.

    Args:
        gradients: $(A, B) \mapsto (g_A, g_B)$ as autograd gives them, $g_A = s B^\top g$ and $g_B = s\, g A^\top$.
        gauge: One of the velocities with the same effect on the weight; ``sylvester`` and ``lyapunov`` keep
            $B^\top B - A A^\top$.
        scaling: $s$.

    Source:
        ODELoRA, arXiv:2602.07479 (abstract); derivation in ``docs/theory/ode_lora.md``.
    """

    def field(state: State) -> State:
        A, B = state
        g_A, g_B = gradients(state)
        with torch.no_grad():
            at = frame(A, B)
            tangent = project(at, coordinates(at, Cotangent(g_A / scaling, g_B / scaling)))
            return tuple(-H / scaling for H in factor_velocity(A, B, at, tangent, gauge))

    return field
