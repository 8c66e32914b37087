r"""Step-size control from an embedded error estimate."""

import math
from dataclasses import dataclass

from tangora._checks import InputError, check_number, check_whole
from tangora.integrate.state import State


@dataclass(frozen=True)
class Control:
    r"""A PI controller: the next step is $h\,\alpha\, e_n^{-(k_I + k_P)/p}\, e_{n-1}^{k_P/p}$.

    $e_n$ is the root mean square over all entries of the estimated error divided by
    $\mathtt{atol} + \mathtt{rtol}\,\max(|y|, |y_+|)$, and $p$ is one more than the order of the lower of the two
    methods. A step is taken when $e_n \le 1$.

    Args:
        error_order: Order of the embedded method.
        rtol: Tolerance relative to each entry of the state.
        atol: Tolerance in the state's units.
        min_step: Below it the step size has collapsed.
        max_step: Never more than this.
        proportional: $k_P$; 0 with ``integral`` 1 is the standard controller.
        integral: $k_I$.
        safety: $\alpha$.
        shrink: Smallest factor from one step to the next; taken when a step failed.
        grow: Largest factor.

    Raises:
        InputError: For values outside of their ranges.

    Source:
        Hairer & Wanner (1996), Solving Ordinary Differential Equations II, section IV.2; coefficients Söderlind (2003).
    """

    error_order: int
    rtol: float = 1e-4
    atol: float = 1e-6
    min_step: float = 1e-10
    max_step: float = math.inf
    proportional: float = 0.4
    integral: float = 0.3
    safety: float = 0.9
    shrink: float = 0.2
    grow: float = 5.0

    def __post_init__(self) -> None:
        check_whole("error_order", self.error_order, low=1)
        check_number("rtol", self.rtol, low=0)
        check_number("atol", self.atol, low=0)
        if self.rtol == 0 and self.atol == 0:
            raise InputError("rtol or atol must be positive; got 0 for both")
        check_number("min_step", self.min_step, low=0, open_low=True)
        if not self.max_step >= self.min_step:
            raise InputError(f"max_step must be at least min_step, {self.min_step:g}; got {self.max_step!r}")
        check_number("proportional", self.proportional, low=0)
        check_number("integral", self.integral, low=0, open_low=True)
        check_number("safety", self.safety, low=0, high=1, open_low=True)
        check_number("shrink", self.shrink, low=0, high=1, open_low=True, open_high=True)
        check_number("grow", self.grow, low=1)

    def ratio(self, error: State, state: State, new: State) -> float:
        """Return the error in units of the tolerance.

        Args:
            error: Estimated error of the step.
            state: State before the step.
            new: State after it.

        Returns:
            At most 1 if the step is good enough.
        """
        total, count = 0.0, 0
        for e, y, y_new in zip(error, state, new, strict=True):
            # an error of exactly zero is fine however small the tolerance
            scale = self.atol + self.rtol * y.abs().maximum(y_new.abs())
            total += float((e / scale).where(e != 0, 0.0).double().square().sum())
            count += e.numel()
        return math.sqrt(total / count)

    def factor(self, ratio: float, before: float) -> float:
        """Return by what to multiply the step size.

        Args:
            ratio: The error of this step in units of the tolerance; infinite if it failed.
            before: That of the last step that was taken; 1 if there was none.

        Returns:
            Between ``shrink`` and ``grow``; below 1 after a step that is not good enough.
        """
        if not math.isfinite(ratio):
            return self.shrink
        p = self.error_order + 1
        if ratio > 1:
            # the memory of a good step would only delay the retreat
            return max(self.safety * ratio ** (-1 / p), self.shrink)
        smallest = 1e-10
        change = max(ratio, smallest) ** (-(self.integral + self.proportional) / p)
        change *= max(before, smallest) ** (self.proportional / p)
        return min(max(self.safety * change, self.shrink), self.grow)
