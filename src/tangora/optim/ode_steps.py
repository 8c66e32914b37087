r"""The schemes of ODELoRA: the descent of $Y = B A$ at given factors, and one step along it.

Along the flow $\dot W = -P_T(g)$, restricted to rank r, $W = W_0 + s Y$ gives $\dot Y = -\xi$ with
$\xi = P_T(g) / s + \lambda Y$ for decay $\lambda$. Everything here is a pure function of stacks of equal layers; a
scheme with several stages asks a `DescentField` for the descents at other factors.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from tangora._types import FactorA, FactorB
from tangora.geometry.gauge import factor_velocity
from tangora.geometry.gram import times
from tangora.geometry.retraction import Factors, balanced_product, rebalance, svd_retract
from tangora.geometry.tangent import (
    Cotangent,
    Frame,
    Tangent,
    coordinates,
    frame,
    project,
    squared_norm,
)
from tangora.integrate import TABLEAUS, State, implicit_midpoint_step, rk_step

Scheme = Literal[
    "euler",
    "heun",
    "midpoint",
    "bogacki_shampine",
    "rk4",
    "implicit_midpoint",
    "projected_rk2",
    "projected_rk4",
    "ksl",
    "bug",
]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
ONE_GRADIENT: tuple[Scheme, ...] = ("euler", "bug")

# Tableaus of the projected schemes; the implicit one has no retracted form, and gets the explicit one of its order.
_TABLEAU_OF = {"projected_rk2": "heun", "projected_rk4": "rk4", "implicit_midpoint": "midpoint"}


class Descent(NamedTuple):
    r"""Factors, the frame there, and the tangent vector $\xi$ along which $Y$ descends."""

    A: FactorA
    B: FactorB
    at: Frame
    tangent: Tangent


DescentField: TypeAlias = Callable[[Sequence[Factors]], list[Descent]]
"""The descents of all stacks at other factors; each call evaluates the model's gradient once."""


def ode_step(
    scheme: Scheme,
    start: Sequence[Descent],
    field: DescentField,
    groups: Sequence[dict[str, Any]],
    *,
    balance: Sequence[bool],
) -> list[Factors]:
    """Take one step of all stacks together, with the options of their groups.

    Args:
        balance: Whether a stack's factors are balanced first, by schemes that step in the factors.

    Raises:
        FloatingPointError: If an implicit step does not converge or a stage is not finite.
    """
    steps = [group["lr"] for group in groups]
    if scheme == "bug":
        tolerances = [group["tolerance"] for group in groups]
        return [_bug(*each) for each in zip(start, steps, tolerances, strict=True)]
    if scheme == "ksl":
        return _ksl(start, field, steps)
    guards = [group["guard"] for group in groups]
    weak = (_is_weak(*each).any() for each in zip(start, steps, guards, strict=True))
    if scheme.startswith("projected") or any(weak):
        return _projected(start, field, steps, _TABLEAU_OF.get(scheme, scheme))
    start = [_balanced(here) if first else here for here, first in zip(start, balance, strict=True)]
    return _in_factors(scheme, start, field, groups)


def _in_factors(
    scheme: Scheme, start: Sequence[Descent], field: DescentField, groups: Sequence[dict[str, Any]]
) -> list[Factors]:
    def velocities(at: Sequence[Descent]) -> State:
        # step sizes differ between groups, so they are part of the field and time goes from 0 to 1
        return _flat(
            [
                [H.mul_(-group["lr"]) for H in factor_velocity(d.A, d.B, d.at, d.tangent, group["gauge"])]
                for d, group in zip(at, groups, strict=True)
            ]
        )

    def velocities_at(state: State) -> State:
        return velocities(field(_paired(state)))

    state, first = _flat([(here.A, here.B) for here in start]), velocities(start)
    if scheme == "implicit_midpoint":
        stepped = implicit_midpoint_step(velocities_at, state, 1.0)
    else:
        stepped = rk_step(velocities_at, state, 1.0, TABLEAUS[scheme], first=first)
    if stepped.failure is not None:
        raise FloatingPointError(f"{stepped.failure}; no step was taken")
    return _paired(stepped.state)


def _flat(factors: Sequence[Sequence[Tensor]]) -> State:
    return tuple(factor for pair in factors for factor in pair)


def _paired(state: Sequence[Tensor]) -> list[Factors]:
    return [Factors(*pair) for pair in zip(state[::2], state[1::2], strict=True)]


def _projected(
    start: Sequence[Descent], field: DescentField, steps: Sequence[float], tableau_name: str
) -> list[Factors]:
    tableau, stages = TABLEAUS[tableau_name], [start]

    def combined(weights: Sequence[float]) -> list[Factors]:
        return [
            _combine(own, [step * weight for weight in weights])
            for own, step in zip(zip(*stages, strict=True), steps, strict=True)
        ]

    while len(stages) < tableau.stages:
        stages.append(field(combined(tableau.a[len(stages)])))
    return combined(tableau.b)


def _ksl(start: Sequence[Descent], field: DescentField, steps: Sequence[float]) -> list[Factors]:
    """Take one step of the projector-splitting integrator (Lubich & Oseledets 2014, arXiv:1301.1058)."""
    after_k = field([_k_step(*each) for each in zip(start, steps, strict=True)])
    spaces = [here.at.V for here in start]
    after_s = field([_s_step(*each) for each in zip(after_k, steps, spaces, strict=True)])
    return [_l_step(*each) for each in zip(after_s, steps, strict=True)]


def descent(A: FactorA, B: FactorB, cotangent: Cotangent, scaling: float, decay: float) -> Descent:
    r"""Return $\xi = P_T(g)/s + \lambda Y$."""
    at = frame(A, B)
    K, J = (part / scaling for part in project(at, coordinates(at, cotangent)))
    if decay:
        K = K + decay * (at.U.mT @ B) @ A
    return Descent(A, B, at, Tangent(K, J))


def _balanced(here: Descent) -> Descent:
    """Move a descent to balanced factors of the same product."""
    A, B = rebalance(here.A, here.B)
    U, V, K, J = here.at.U, here.at.V, here.tangent.K, here.tangent.J
    seen = Cotangent((B.mT @ U) @ K, times(U, K @ A.mT) + times(J, V @ A.mT))
    return descent(A, B, seen, 1.0, 0.0)


def _is_weak(here: Descent, step: float, guard: float) -> Bool[Tensor, "*b"]:
    r"""Tell where a step is large against the smallest singular value of $Y$.

    The factors' velocities grow like $1/\sigma_r(Y)$, so that such a step leaves the domain of every scheme in the
    factors, however smooth the flow of $Y$ is.
    """
    size = step * squared_norm(here.tangent).sqrt()
    core = (here.at.U.mT @ here.B) @ (here.A @ here.at.V.mT)
    return guard * size > torch.linalg.svdvals(core)[..., -1]


def _bug(here: Descent, step: float, tolerance: float) -> Factors:
    r"""Take one step of the parallel BUG integrator with a single gradient: $\mathrm{SVD}(Y - h \xi)$, cut.

    Ceruti, Kusch, Lubich (2024), parallel BUG, arXiv:2304.05660; GeoLoRA, arXiv:2410.18720, for gradients. That its
    product is $\mathrm{SVD}_r(Y - h P_T g)$ is checked in the tests.
    """
    new = svd_retract(here.A, here.B, here.at, here.tangent, step)
    return _cut_ranks(new, tolerance) if tolerance else new


def _cut_ranks(factors: Factors, tolerance: float) -> Factors:
    """Set the weakest directions of balanced factors to zero."""
    values = factors.B.norm(dim=-2) * factors.A.norm(dim=-1)
    tails = values.square().flip(-1).cumsum(-1).flip(-1).sqrt()
    kept = (tails > tolerance * tails[..., :1]) | (tails[..., :1] == 0)
    return Factors(factors.A * kept[..., :, None], factors.B * kept[..., None, :])


def _combine(stages: Sequence[Descent], weights: Sequence[float]) -> Factors:
    r"""Return balanced factors of the best rank-r approximation of $Y - \sum_i w_i \xi_i$, $Y$ that of the first."""
    start = stages[0]
    left, right = [start.at.U], [(start.at.U.mT @ start.B) @ start.A]
    for stage, weight in zip(stages, weights, strict=True):
        if weight:
            left += [stage.at.U, stage.tangent.J]
            right += [-weight * stage.tangent.K, -weight * stage.at.V]
    rank = start.A.shape[-2]
    return balanced_product(torch.cat(left, -1), torch.cat(right, -2), rank, Factors(start.A, start.B))


def _k_step(here: Descent, step: float) -> Factors:
    """Step the column space, at fixed row space."""
    V, K, J = here.at.V, here.tangent.K, here.tangent.J
    along = times(here.B, here.A @ V.mT) - step * (J + times(here.at.U, K @ V.mT))
    Q, R = torch.linalg.qr(along)
    return Factors(R @ V, Q)


def _s_step(here: Descent, step: float, V: FactorA) -> Factors:
    """Step the core backwards in time, at fixed column and row space."""
    return Factors(here.A + step * (_seen_from_B(here) @ V.mT) @ V, here.B)


def _l_step(here: Descent, step: float) -> Factors:
    """Step the row space, at fixed column space."""
    return rebalance(here.A - step * _seen_from_B(here), here.B)


def _seen_from_B(here: Descent) -> FactorA:
    return (here.B.mT @ here.at.U) @ here.tangent.K
