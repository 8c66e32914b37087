"""The methods that matrix sensing compares, each as one iteration on a whole stack of problems."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from reproductions.matrix_sensing.low_rank import DenseForce, LowRank
from reproductions.matrix_sensing.problem import Problems
from reproductions.matrix_sensing.schemes import SCHEMES, factor_field
from tangora._types import Weight
from tangora.geometry.gauge import Gauge
from tangora.geometry.retraction import Factors, svd_retract
from tangora.geometry.tangent import Cotangent, coordinates, frame, project
from tangora.integrate import Stepped
from tangora.optim.adamw import adamw_update, step_counters
from tangora.optim.preconditioned_adamw import precondition

# ScaledGD has none; far below the Gram matrices of a solution found to six digits, and enough to invert any of them
_DAMPING = 1e-12
# the implicit equation is solved well beyond the accuracy that an experiment asks of the weight
_IMPLICIT_TOLERANCE = 1e-10

Iteration = tuple[Any, int]
"""A new state, and the gradients that it took."""


def _product(state: Any) -> Weight:
    A, B = state[:2]
    return B @ A


def _merge_tensors(mask: Bool[Tensor, "s c"], one: Any, other: Any) -> Any:
    return tuple(torch.where(mask[..., None, None], x, y) for x, y in zip(one, other, strict=True))


@dataclass(frozen=True)
class Method:
    """An iterative method.

    Attributes:
        kind: ``scheme``: an integration of the projected gradient flow; ``baseline``: anything else.
        step: ``step(problems, state, step size)``; raises `FloatingPointError` or ``LinAlgError`` if it cannot.
        contraction: $R(-h)$, by which an iteration multiplies the error of a pure quadratic, if that is known.
        start: Balanced factors to the method's own state.
        weight: State to the matrices it stands for.
        merge: ``merge(mask, one, other)``: the state of ``one`` where the mask holds, else that of ``other``.
        own_rates: Whether its step size is a learning rate of its own kind, to be searched for.
    """

    kind: Literal["scheme", "baseline"]
    step: Callable[[Problems, Any, float], Iteration]
    contraction: Callable[[float], float] | None = None
    start: Callable[[Factors], Any] = tuple
    weight: Callable[[Any], Weight] = _product
    merge: Callable[[Bool[Tensor, "s c"], Any, Any], Any] = _merge_tensors
    own_rates: bool = False


def _factor_gradients(problems: Problems, A: Tensor, B: Tensor) -> Cotangent:
    g = problems.gradient(B @ A)
    return Cotangent(B.mT @ g, g @ A.mT)


def _checked(stepped: Stepped[Any]) -> Iteration:
    if stepped.failure is not None:
        raise FloatingPointError(stepped.failure)
    return stepped.state, stepped.evaluations


def _in_factors(
    name: str, gauge: Gauge = "lyapunov", **options: Any
) -> Callable[[Problems, Any, float], Iteration]:
    def step(problems: Problems, state: Any, size: float) -> Iteration:
        field = factor_field(lambda factors: _factor_gradients(problems, *factors), gauge)
        return _checked(SCHEMES[name].step(field, state, size, **options))

    return step


class _LowRanks(NamedTuple):
    """Low-rank schemes take one matrix per layer; here the problems of a stack are the layers."""

    shape: tuple[int, ...]
    matrices: tuple[LowRank, ...]

    @classmethod
    def of(cls, factors: Factors) -> "_LowRanks":
        A, B = (factor.flatten(0, 1) for factor in factors)
        return cls(factors.A.shape[:2], tuple(map(LowRank.from_factors, A, B)))

    def dense(self) -> Weight:
        return torch.stack([Y.dense() for Y in self.matrices]).unflatten(0, self.shape)

    @staticmethod
    def merge(mask: Bool[Tensor, "s c"], one: "_LowRanks", other: "_LowRanks") -> "_LowRanks":
        chosen = zip(mask.flatten().tolist(), one.matrices, other.matrices, strict=True)
        return _LowRanks(one.shape, tuple(x if first else y for first, x, y in chosen))


def _low_rank(name: str, contraction: Callable[[float], float] | None) -> Method:
    def step(problems: Problems, state: _LowRanks, size: float) -> Iteration:
        def field(matrices: tuple[LowRank, ...]) -> tuple[DenseForce, ...]:
            gradients = problems.gradient(_LowRanks(state.shape, matrices).dense())
            return tuple(DenseForce(-g) for g in gradients.flatten(0, 1))

        matrices, evaluations = _checked(SCHEMES[name].step(field, state.matrices, size))
        return _LowRanks(state.shape, matrices), evaluations

    return Method("scheme", step, contraction, _LowRanks.of, _LowRanks.dense, _LowRanks.merge)


def _retracted(problems: Problems, state: Any, size: float) -> Iteration:
    A, B = state
    at = frame(A, B)
    tangent = project(at, coordinates(at, _factor_gradients(problems, A, B)))
    return svd_retract(A, B, at, tangent, size), 1


def _plain(problems: Problems, state: Any, size: float) -> Iteration:
    A, B = state
    g_A, g_B = _factor_gradients(problems, A, B)
    return (A - size * g_A, B - size * g_B), 1


def _scaled(problems: Problems, state: Any, size: float) -> Iteration:
    A, B = state
    H_A, H_B = precondition(A, B, *_factor_gradients(problems, A, B), _DAMPING)
    return (A - size * H_A, B - size * H_B), 1


def _adam_start(factors: Factors) -> Any:
    zeros = tuple(torch.zeros_like(factor) for factor in (*factors, *factors))
    return (*factors, *zeros, torch.zeros(1, 1, 1, 1, dtype=factors.A.dtype))


def _adam(problems: Problems, state: Any, size: float) -> Iteration:
    # torch's fused kernel goes through memory in order, so all its tensors must be laid out alike
    A, B, *moments, count = (part.clone(memory_format=torch.contiguous_format) for part in state)
    gradients = [gradient.contiguous() for gradient in _factor_gradients(problems, A, B)]
    group = {"lr": size, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    # restarted problems keep counting: bias correction is over by then
    taken = int(count.max())
    adamw_update((A, B), gradients, moments[:2], moments[2:], step_counters((A, B), taken + 1), group)
    return (A, B, *moments, count + 1), 1


def _full(problems: Problems, state: Any, size: float) -> Iteration:
    (W,) = state
    return (W - size * problems.gradient(W),), 1


def _taylor(order: int) -> Callable[[float], float]:
    # the stability polynomial of every explicit method whose order is its number of stages
    def contraction(size: float) -> float:
        term, total = 1.0, 1.0
        for k in range(1, order + 1):
            term *= -size / k
            total += term
        return abs(total)

    return contraction


_DESCENT = _taylor(1)

METHODS = {
    "Euler": Method("scheme", _in_factors("euler"), _DESCENT),
    "Heun": Method("scheme", _in_factors("heun"), _taylor(2)),
    "midpoint": Method("scheme", _in_factors("midpoint"), _taylor(2)),
    "Bogacki-Shampine": Method("scheme", _in_factors("bogacki_shampine"), _taylor(3)),
    "RK4": Method("scheme", _in_factors("rk4"), _taylor(4)),
    "implicit midpoint": Method(
        "scheme",
        _in_factors("implicit_midpoint", tolerance=_IMPLICIT_TOLERANCE),
        lambda size: abs(1 - size / 2) / (1 + size / 2),
    ),
    "projected RK2": _low_rank("projected_heun", _taylor(2)),
    "projected RK4": _low_rank("projected_rk4", _taylor(4)),
    "KSL": _low_rank("ksl", None),
    "BUG": _low_rank("bug", None),
    "parallel BUG": _low_rank("parallel_bug", _DESCENT),
    "LoRA-Pro SGD": Method("baseline", _in_factors("euler", "sylvester"), _DESCENT),
    "SVD retraction": Method("baseline", _retracted, _DESCENT),
    "ScaledGD": Method("baseline", _scaled, _DESCENT),
    "plain descent": Method("baseline", _plain),
    "Adam on factors": Method("baseline", _adam, start=_adam_start, own_rates=True),
    "full descent": Method(
        "baseline",
        _full,
        _DESCENT,
        start=lambda factors: (factors.B @ factors.A,),
        weight=lambda state: state[0],
    ),
}
"""Methods by name: integration schemes of the projected flow (factor schemes in the Lyapunov gauge), then baselines."""
