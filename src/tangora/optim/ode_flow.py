"""One step of the flow of all pairs of a model: gradients at the stages, and the schemes that ask for them."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tangora._types import FactorA, FactorB
from tangora.adapters import LoraPair
from tangora.geometry.gauge import factor_velocity
from tangora.geometry.precision import full_precision
from tangora.geometry.retraction import Factors
from tangora.integrate import TABLEAUS, State, implicit_midpoint_step, rk_step
from tangora.optim.ode_steps import (
    Descent,
    balanced_descent,
    bug_step,
    combine,
    descent,
    is_weak,
    k_step,
    l_step,
    s_step,
)
from tangora.optim.stack import PairStack

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


class Flow:
    """The flow of all factors of a model, for one step.

    Stages are placed in the model's own parameters, where the caller's closure evaluates their gradient. Afterwards, or
    when anything fails, parameters and gradients are put back as the first stage left them.

    Attributes:
        evaluations: Gradient evaluations so far, that of the start included.
    """

    def __init__(
        self,
        stacks: Sequence[PairStack],
        groups: Sequence[dict[str, Any]],
        scheme: Scheme,
        parameters: Sequence[nn.Parameter],
        evaluate: Callable[[], Any] | None,
        check: Callable[[], None],
    ):
        self.evaluations = 1
        self._stacks, self._groups, self._scheme = stacks, groups, scheme
        self._parameters, self._evaluate, self._check = parameters, evaluate, check
        self._device = stacks[0].A.device if stacks else torch.device("cpu")
        kind = self._device.type
        self._autocast = {"enabled": torch.is_autocast_enabled(kind), "dtype": torch.get_autocast_dtype(kind)}

    def step(self) -> list[Factors]:
        """Take one step."""
        origin = [(stack.A, stack.B) for stack in self._stacks]
        gradients = [
            None if self._scheme in ONE_GRADIENT or p.grad is None else p.grad.clone()
            for p in self._parameters
        ]
        try:
            self._check()
            with full_precision(self._device):
                new = self._advance(self._descents())
            if not all(factor.isfinite().all() for factors in new for factor in factors):
                raise FloatingPointError("the new factors are not finite; no step was taken")  # noqa: TRY301
        except (FloatingPointError, torch.linalg.LinAlgError) as error:
            where = f"gradient evaluation {self.evaluations} of a step of {self._scheme}"
            raise FloatingPointError(f"{where}: {error}") from error
        finally:
            for stack, (A, B) in zip(self._stacks, origin, strict=True):
                stack.place(A, B)
            if self.evaluations > 1:
                for parameter, gradient in zip(self._parameters, gradients, strict=True):
                    parameter.grad = gradient
        return new

    def _advance(self, start: list[Descent]) -> list[Factors]:
        scheme, steps = self._scheme, [group["lr"] for group in self._groups]
        if scheme == "bug":
            tolerances = [group["tolerance"] for group in self._groups]
            return [bug_step(*each) for each in zip(start, steps, tolerances, strict=True)]
        if scheme == "ksl":
            return self._ksl(start, steps)
        guards = [group["guard"] for group in self._groups]
        weak = (is_weak(*each).any() for each in zip(start, steps, guards, strict=True))
        if scheme.startswith("projected") or any(weak):
            return self._projected(start, steps, _TABLEAU_OF.get(scheme, scheme))
        firsts = [stack.step == 1 and group["balance_start"] for stack, group in self._members()]
        start = [balanced_descent(here) if first else here for here, first in zip(start, firsts, strict=True)]
        return self._in_factors(start)

    def _in_factors(self, start: list[Descent]) -> list[Factors]:
        state = _flat([Factors(here.A, here.B) for here in start])
        first = self._velocities(start)
        if self._scheme == "implicit_midpoint":
            stepped = implicit_midpoint_step(self._field, state, 1.0)
        else:
            stepped = rk_step(self._field, state, 1.0, TABLEAUS[self._scheme], first=first)
        if stepped.failure is not None:
            raise FloatingPointError(f"{stepped.failure}; no step was taken")
        return _paired(stepped.state)

    def _field(self, state: State) -> State:
        return self._velocities(self._descents_at(_paired(state)))

    def _velocities(self, at: list[Descent]) -> State:
        # step sizes differ between groups, so they are part of the field and time goes from 0 to 1
        return _flat(
            [
                Factors(*(H.mul_(-group["lr"]) for H in factor_velocity(*here, group["gauge"])))
                for here, group in zip(at, self._groups, strict=True)
            ]
        )

    def _projected(self, start: list[Descent], steps: list[float], scheme: str) -> list[Factors]:
        tableau, stages = TABLEAUS[scheme], [start]
        while len(stages) < tableau.stages:
            stages.append(self._descents_at(self._combined(stages, steps, tableau.a[len(stages)])))
        return self._combined(stages, steps, tableau.b)

    @staticmethod
    def _combined(stages: list[list[Descent]], steps: list[float], weights: Sequence[float]) -> list[Factors]:
        return [
            combine(own[0], own, [step * weight for weight in weights])
            for own, step in zip(zip(*stages, strict=True), steps, strict=True)
        ]

    def _ksl(self, start: list[Descent], steps: list[float]) -> list[Factors]:
        after_k = self._descents_at([k_step(*each) for each in zip(start, steps, strict=True)])
        spaces = [here.at.V for here in start]
        after_s = self._descents_at([s_step(*each) for each in zip(after_k, steps, spaces, strict=True)])
        return [l_step(*each) for each in zip(after_s, steps, strict=True)]

    def _descents_at(self, points: Sequence[Factors]) -> list[Descent]:
        assert self._evaluate is not None
        for stack, point in zip(self._stacks, points, strict=True):
            stack.place(*point)
        self.evaluations += 1
        with torch.enable_grad(), torch.autocast(self._device.type, **self._autocast):
            self._evaluate()
        for stack, group in self._members():
            stack.load([_gradients(pair) for pair in stack.pairs], maximize=group["maximize"])
        self._check()
        return self._descents()

    def _descents(self) -> list[Descent]:
        return [
            descent(stack.A, stack.B, stack.gradient, stack.scaling, group["weight_decay"])
            for stack, group in self._members()
        ]

    def _members(self) -> zip:
        return zip(self._stacks, self._groups, strict=True)


def _gradients(pair: LoraPair) -> tuple[FactorA, FactorB]:
    # a layer that this stage did not use (an expert that was not chosen) stays where it is
    A, B = pair.factors()
    return pair.gradients() or (torch.zeros_like(A), torch.zeros_like(B))


def _flat(factors: Sequence[Factors]) -> State:
    return tuple(factor for pair in factors for factor in pair)


def _paired(state: Sequence[Tensor]) -> list[Factors]:
    return [Factors(*pair) for pair in zip(state[::2], state[1::2], strict=True)]
