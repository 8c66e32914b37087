r"""One step of full gradient descent, truncated to rank $r$, without training: a baseline that costs nothing."""

from typing import Any

from tangora._checks import check_number
from tangora._types import FactorA, FactorB
from tangora.geometry.sketch import LowRankSVD
from tangora.init.start_method import LayerToStart, StartFactors, StartMethod, option_types

STEP_SIZES = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4)
"""Step sizes of the line search, large to small."""


def one_step(gradient: LowRankSVD, r: int, scaling: float, *, step: float) -> tuple[FactorA, FactorB]:
    r"""Build balanced factors with $s B_0 A_0 = -\eta\, G_r$, where $G_r$ is the best rank-$r$ part of $G$.

    Args:
        gradient: Leading singular triplets of $G$.
        r: Rank, at most $\min(m, n)$.
        step: $\eta$, the step size of gradient descent on the weights.

    Returns:
        $A_0$ and $B_0$; the base weight stays as it is.

    Source:
        The "one-step gradient descent" rows of arXiv:2502.01235; its authors search $\eta$ between 10 and 1e-4.
    """
    check_number("step", step, low=0)
    U, S, Vh = gradient.truncate(r)
    root = (S * (step / scaling)).sqrt()
    return root[:, None] * Vh, -U * root


def _start(layer: LayerToStart, **options: Any) -> StartFactors:
    return one_step(layer.known_gradient, layer.shape[2], layer.scaling, **options)


ONE_STEP = StartMethod(
    _start,
    option_types(one_step, "step", "held_out"),
    directions=1,
    values=True,
    step_sizes=STEP_SIZES,
)
