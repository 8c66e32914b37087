"""Iterate a method on a stack of problems and keep an account of it."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tangora.experiments.reproduce.matrix_sensing.methods import Method
from tangora.experiments.reproduce.matrix_sensing.problem import Problems
from tangora.geometry.retraction import Factors

# far beyond any detour of a method that still arrives
_DIVERGED = 1e3


@dataclass(frozen=True)
class Trace:
    """What came of a method on every problem.

    Attributes:
        errors: Relative error of the start and after every iteration; NaN from the iteration on that diverged, and
            after the last one that was run.
        iterations: The first whose error is below the tolerance; infinite if none is.
        evaluations: Gradients taken until then.
        diverged: Where the error passed a thousand, or an iteration failed.
    """

    errors: Float[Tensor, "k s c"]
    iterations: Float[Tensor, "s c"]
    evaluations: Float[Tensor, "s c"]
    diverged: Bool[Tensor, "s c"]


def solve(
    method: Method,
    problems: Problems,
    start: Factors,
    step_size: float,
    *,
    tolerance: float,
    max_iterations: int,
) -> Trace:
    """Iterate until every problem is solved or has diverged.

    Args:
        method: The method.
        problems: The stack.
        start: Factors, one pair per problem.
        step_size: Step size or rate.
        tolerance: Relative error that counts as solved.
        max_iterations: Iterations at most.

    Returns:
        The account.
    """
    try:
        return _iterate(method, problems, start, step_size, max_iterations, _Account(problems, tolerance))
    except (FloatingPointError, torch.linalg.LinAlgError):
        # one problem can stop a scheme for the whole stack; alone it stops only itself
        rows, columns = problems.target.shape[:2]
        traces = [
            [
                _alone(
                    method,
                    problems.single(i, j),
                    Factors(*(factor[i : i + 1, j : j + 1] for factor in start)),
                    step_size,
                    tolerance,
                    max_iterations,
                )
                for j in range(columns)
            ]
            for i in range(rows)
        ]
        return _joined(traces)


def _alone(
    method: Method,
    problems: Problems,
    start: Factors,
    step_size: float,
    tolerance: float,
    max_iterations: int,
) -> Trace:
    account = _Account(problems, tolerance)
    try:
        return _iterate(method, problems, start, step_size, max_iterations, account)
    except (FloatingPointError, torch.linalg.LinAlgError):
        account.diverged |= True
        return account.trace()


class _Account:
    """Errors so far."""

    def __init__(self, problems: Problems, tolerance: float):
        shape = problems.target.shape[:2]
        self._problems, self._tolerance = problems, tolerance
        self._errors: list[Tensor] = []
        self._iterations, self._evaluations = torch.full(shape, torch.inf), torch.full(shape, torch.inf)
        self.diverged = torch.zeros(shape, dtype=torch.bool)

    @property
    def finished(self) -> bool:
        return bool((self.diverged | self._iterations.isfinite()).all())

    def note(self, W: Tensor, evaluations: int) -> None:
        error = self._problems.error(W)
        self.diverged |= ~(error < _DIVERGED)
        fresh = (error <= self._tolerance) & ~self.diverged & self._iterations.isinf()
        self._iterations[fresh] = float(len(self._errors))
        self._evaluations[fresh] = float(evaluations)
        self._errors.append(error.where(~self.diverged, torch.nan))

    def trace(self) -> Trace:
        # a problem that was solved first is solved, whatever came of further iterations
        lost = self.diverged & self._iterations.isinf()
        return Trace(torch.stack(self._errors), self._iterations, self._evaluations, lost)


def _iterate(
    method: Method,
    problems: Problems,
    start: Factors,
    step_size: float,
    max_iterations: int,
    account: _Account,
) -> Trace:
    origin = state = method.start(start)
    evaluations = 0
    account.note(method.weight(state), evaluations)
    for _ in range(max_iterations):
        if account.finished:
            break
        state, taken = method.step(problems, state, step_size)
        evaluations += taken
        account.note(method.weight(state), evaluations)
        if account.diverged.any():
            # those that are lost go on from the start, so that their entries stay finite and disturb nobody
            state = method.merge(account.diverged, origin, state)
    return account.trace()


def _joined(traces: list[list[Trace]]) -> Trace:
    length = max(len(trace.errors) for row in traces for trace in row)

    def grid(key: str) -> Tensor:
        return torch.cat([torch.cat([getattr(trace, key) for trace in row], dim=1) for row in traces])

    errors = torch.cat([torch.cat([_padded(trace.errors, length) for trace in row], 2) for row in traces], 1)
    return Trace(errors, grid("iterations"), grid("evaluations"), grid("diverged"))


def _padded(errors: Tensor, length: int) -> Tensor:
    return torch.cat([errors, errors.new_full((length - len(errors), *errors.shape[1:]), torch.nan)])
