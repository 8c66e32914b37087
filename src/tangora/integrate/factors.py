r"""The flow of LoRA factors that moves the weight like full fine-tuning: $s(\dot B A + B \dot A) = -P_T(g)$.

States are $(A_1, B_1, A_2, B_2, \dots)$, one pair for each adapted layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from tangora._checks import InputError, check_choice, check_number
from tangora.geometry.gauge import GAUGES, Gauge, factor_velocity
from tangora.geometry.retraction import rebalance
from tangora.geometry.tangent import Cotangent, coordinates, frame, project
from tangora.integrate.state import Field, State, Stepped, Stepper


def factor_field(
    gradients: Callable[[State], State], gauge: Gauge = "lyapunov", scaling: float | Sequence[float] = 1.0
) -> Field:
    r"""Return the field $(\dot A, \dot B) = -\tfrac1s (H_A, H_B)$ of the projected gradient flow on the factors.

    Args:
        gradients: $(A_1, B_1, \dots) \mapsto (g_{A,1}, g_{B,1}, \dots)$ as autograd gives them, $g_A = s B^\top g$ and
            $g_B = s\, g A^\top$. All calls within a step must see the same batch.
        gauge: Which of the velocities with the same effect on the weight; ``sylvester`` and ``lyapunov`` keep
            $B^\top B - A A^\top$.
        scaling: $s$ of $W = W_0 + s B A$, or one for each pair.

    Returns:
        The field. One call is one call of ``gradients``.

    Raises:
        InputError: For an unknown gauge or a scaling that is not positive; on a call, for a state that is not made of
            pairs, or not of as many as there are scalings.

    Source:
        ODELoRA, arXiv:2602.07479 (abstract); derivation in ``docs/theory/ode_lora.md``.
    """
    check_choice("gauge", gauge, GAUGES)
    for value in [scaling] if isinstance(scaling, (int, float)) else scaling:
        check_number("scaling", value, low=0, open_low=True)

    def field(state: State) -> State:
        scalings = _for_pairs(state, scaling)
        seen = gradients(state)
        velocities: list[torch.Tensor] = []
        with torch.no_grad():
            for i, s in enumerate(scalings):
                A, B = state[2 * i : 2 * i + 2]
                g_A, g_B = seen[2 * i : 2 * i + 2]
                at = frame(A, B)
                tangent = project(at, coordinates(at, Cotangent(g_A / s, g_B / s)))
                velocities += [-H / s for H in factor_velocity(A, B, at, tangent, gauge)]
        return tuple(velocities)

    return field


def rebalanced(stepper: Stepper[State]) -> Stepper[State]:
    r"""Wrap a stepper on factors so that every step ends on the balanced manifold $B^\top B = A A^\top$.

    Args:
        stepper: Stepper on states $(A_1, B_1, A_2, B_2, \dots)$.

    Returns:
        The same stepper, with every pair rebalanced after the step at unchanged $B A$.
    """

    def take(state: State, step_size: float, _first: State | None = None) -> Stepped[State]:
        # what is known of velocities was known in another gauge, so it is neither used nor handed on
        stepped = stepper(state, step_size, None)
        if stepped.failure is not None:
            return replace(stepped, first=None)
        pairs = range(len(_for_pairs(state, 1.0)))
        balanced = (rebalance(*stepped.state[2 * i : 2 * i + 2]) for i in pairs)
        return replace(
            stepped, state=tuple(factor for pair in balanced for factor in pair), first=None, last=None
        )

    return take


def _for_pairs(state: State, scaling: float | Sequence[float]) -> Sequence[float]:
    count, odd = divmod(len(state), 2)
    scalings = [scaling] * count if isinstance(scaling, (int, float)) else scaling
    if odd or len(scalings) != count:
        raise InputError(
            f"state must hold A and B of {len(scalings)} pairs, {2 * len(scalings)} tensors; got {len(state)}"
        )
    return scalings
