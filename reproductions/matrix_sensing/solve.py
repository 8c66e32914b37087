"""Iterate a method on a stack of problems and keep an account of it."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reproductions.matrix_sensing.methods import Method
from reproductions.matrix_sensing.problem import Problems
from tangora.geometry.retraction import Factors

# far beyond any detour of a method that still arrives
_DIVERGED = 1e3


class Trace(NamedTuple):
    """Results of a method on every problem."""

    errors: Float[Tensor, "k s c"]
    """Relative error of the start and after every iteration; NaN once it diverged, and after the last iteration."""
    iterations: Float[Tensor, "s c"]
    """The first iteration whose error is below the tolerance; infinite if none is."""
    evaluations: Float[Tensor, "s c"]
    """Gradients until then."""
    diverged: Bool[Tensor, "s c"]
    """Iteration at which the error passed a thousand, or failed."""

    def column(self, index: int) -> "Trace":
        """Return the account of one condition number."""
        return Trace(*(part[..., index : index + 1] for part in self))


def solve(
    method: Method,
    problems: Problems,
    start: Factors,
    step_size: float,
    *,
    tolerance: float,
    max_iterations: int,
) -> Trace:
    """Iterate until every problem is solved to a relative error, or has diverged."""

    def iterate(problems: Problems, start: Factors, account: _Account) -> Trace:
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

    def alone(i: int, j: int) -> Trace:
        problem = problems.single(i, j)
        account = _Account(problem, tolerance)
        try:
            return iterate(problem, Factors(*(part[i : i + 1, j : j + 1] for part in start)), account)
        except (FloatingPointError, torch.linalg.LinAlgError):
            account.diverged |= True
            return account.trace()

    try:
        return iterate(problems, start, _Account(problems, tolerance))
    except (FloatingPointError, torch.linalg.LinAlgError):
        # one problem can stop a scheme for the whole stack; alone it stops only itself
        rows, columns = problems.target.shape[:2]
        return _joined([[alone(i, j) for j in range(columns)] for i in range(rows)])


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


def _joined(traces: list[list[Trace]]) -> Trace:
    length = max(len(trace.errors) for row in traces for trace in row)

    def padded(errors: Tensor) -> Tensor:
        return torch.cat([errors, errors.new_full((length - len(errors), *errors.shape[1:]), torch.nan)])

    rows = [
        [torch.cat(parts, -1) for parts in zip(*((padded(e), *rest) for e, *rest in row), strict=True)]
        for row in traces
    ]
    return Trace(*(torch.cat(parts, -2) for parts in zip(*rows, strict=True)))
