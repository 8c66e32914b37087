r"""The one loop that all schemes share: from 0 to $T$ in fixed or controlled steps, with an account of the end."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, get_args

from tangora._checks import InputError, check_number, check_whole
from tangora.integrate.control import Control
from tangora.integrate.state import Failure, Stepped, Stepper

Status = Literal[
    "finished", "step size collapsed", "implicit solve did not converge", "not finite", "too many steps"
]
STATUSES: tuple[Status, ...] = get_args(Status)

S = TypeVar("S")

# a rest of the interval this much longer than the step is rounding, not a step of its own
_ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class Solution(Generic[S]):
    """Where an integration came to, and why it ended there.

    Attributes:
        status: ``finished``, or what went wrong.
        state: The last good state; on success the state at the end.
        t: Its time.
        steps: Steps taken.
        rejected: Steps tried and rejected by the error control.
        evaluations: Evaluations of the field, those of failed and rejected steps included.
        step_size: The step that was last tried.
    """

    status: Status
    state: S
    t: float
    steps: int
    rejected: int
    evaluations: int
    step_size: float

    @property
    def finished(self) -> bool:
        """Whether the end was reached."""
        return self.status == "finished"

    @property
    def message(self) -> str:
        """One line for people: what happened, where, after how much work."""
        work = f"{self.steps} steps taken, {self.rejected} rejected, {self.evaluations} evaluations"
        if self.finished:
            return f"finished at t = {self.t:g} ({work})"
        return f"{self.status} at t = {self.t:g}, step {self.steps + 1} of size {self.step_size:g} ({work})"


@dataclass
class _Run(Generic[S]):
    """The loop's running account."""

    state: S
    step_size: float
    first: S | None = None
    t: float = 0.0
    steps: int = 0
    rejected: int = 0
    evaluations: int = 0
    tried: float = 0.0
    ratio: float = 1.0
    failure: Failure | None = None

    def accept(self, stepped: Stepped[S], t: float) -> None:
        self.state, self.first, self.t = stepped.state, stepped.last, t
        self.steps += 1

    def end(self, status: Status) -> Solution[S]:
        return Solution(status, self.state, self.t, self.steps, self.rejected, self.evaluations, self.tried)


def integrate(
    stepper: Stepper[S],
    state: S,
    t_end: float,
    step_size: float,
    *,
    control: Control | None = None,
    observe: Callable[[float, S], None] | None = None,
    max_steps: int = 100_000,
) -> Solution[S]:
    r"""Integrate from time 0 to $T$.

    Args:
        stepper: A scheme bound to a field, see `tangora.integrate.SCHEMES`, or any function like it.
        state: The state at time 0.
        t_end: $T > 0$.
        step_size: The step; with ``control`` the first one. The last step is shortened to end at $T$.
        control: Error control; the stepper must return error estimates.
        observe: Called with time and state at the start and after every step taken.
        max_steps: Steps tried at most.

    Returns:
        The solution. Numerical failure is a status and not an error; the state is then the last good one.

    Raises:
        InputError: For an argument outside of its range, or for control of a scheme without an error estimate.
    """
    check_number("t_end", t_end, low=0, open_low=True)
    check_number("step_size", step_size, low=0, open_low=True)
    check_whole("max_steps", max_steps, low=1)
    run = _Run(state, step_size)
    if observe is not None:
        observe(0.0, state)
    while run.t < t_end:
        if run.steps + run.rejected >= max_steps:
            return run.end("too many steps")
        before = run.steps
        failure = _try_step(run, stepper, t_end, control)
        if failure is not None:
            return run.end(failure)
        if observe is not None and run.steps > before:
            observe(run.t, run.state)
    return run.end("finished")


def _try_step(run: _Run[S], stepper: Stepper[S], t_end: float, control: Control | None) -> Status | None:
    if control is not None and run.step_size < control.min_step:
        run.tried = run.step_size
        return run.failure or "step size collapsed"
    rest = t_end - run.t
    is_last = rest <= run.step_size * (1 + _ROUNDING)
    run.tried = rest if is_last else run.step_size
    stepped = stepper(run.state, run.tried, run.first)
    run.evaluations += stepped.evaluations
    run.failure = stepped.failure
    reached = t_end if is_last else run.t + run.tried
    if control is None:
        if stepped.failure is None:
            run.accept(stepped, reached)
        return stepped.failure
    ratio = _ratio(control, stepped, run.state)
    run.step_size = min(run.tried * control.factor(ratio, run.ratio), control.max_step)
    if ratio <= 1:
        run.accept(stepped, reached)
        run.ratio = ratio
        return None
    run.rejected += 1
    run.first = stepped.first
    return None


def _ratio(control: Control, stepped: Stepped[Any], state: Any) -> float:
    if stepped.failure is not None:
        return math.inf
    if stepped.error is None:
        raise InputError("control must be None for a scheme without an error estimate")
    ratio = control.ratio(stepped.error, state, stepped.state)
    return ratio if math.isfinite(ratio) else math.inf
