"""All schemes as data: what they step, their order, what a step costs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

from tangora._checks import InputError
from tangora.integrate.bug import bug_step
from tangora.integrate.control import Control
from tangora.integrate.implicit_midpoint import implicit_midpoint_step
from tangora.integrate.ksl import ksl_step
from tangora.integrate.parallel_bug import parallel_bug_step
from tangora.integrate.projected_rk import projected_rk_step
from tangora.integrate.runge_kutta import rk_step
from tangora.integrate.state import Stepped, Stepper
from tangora.integrate.tableau import EULER, HEUN, MIDPOINT, RK4, TABLEAUS

Kind = Literal["factors", "low rank"]


@dataclass(frozen=True)
class Scheme:
    """A method of integration.

    Args:
        name: Its key in `SCHEMES`.
        kind: What it steps: ``factors``, a tuple of tensors under a `tangora.integrate.Field`; or ``low rank``, a tuple
            of `tangora.integrate.LowRank` under a `tangora.integrate.LowRankField`.
        order: Order of accuracy.
        evaluations: Gradients per step at fixed step size; None where it depends on how fast an equation is solved.
        step: ``step(field, state, step_size, **options)``, one step.
        embedded_order: Order of the error estimate, if there is one.
    """

    name: str
    kind: Kind
    order: int
    evaluations: int | None
    step: Callable[..., Stepped[Any]]
    embedded_order: int | None = None

    def stepper(self, field: Callable[[Any], Any], **options: Any) -> Stepper[Any]:
        """Bind the scheme to a field.

        Args:
            field: The right-hand side, of the kind that the scheme steps.
            **options: Options of ``step``, for instance ``truncation``.

        Returns:
            What `tangora.integrate.integrate` needs.
        """

        def take(state: Any, step_size: float, first: Any = None) -> Stepped[Any]:
            known = {} if first is None else {"first": first}
            return self.step(field, state, step_size, **known, **options)

        return take

    def control(self, **tolerances: Any) -> Control:
        """Make the error control that fits the scheme.

        Args:
            **tolerances: Fields of `tangora.integrate.Control`, such as ``rtol`` and ``atol``.

        Returns:
            The control.

        Raises:
            InputError: If the scheme has no error estimate.
        """
        if self.embedded_order is None:
            able = ", ".join(scheme.name for scheme in SCHEMES.values() if scheme.embedded_order is not None)
            raise InputError(f"scheme must be one of {able} for error control; got {self.name!r}")
        return Control(self.embedded_order, **tolerances)


def _projected(tableau_name: str) -> Scheme:
    tableau = TABLEAUS[tableau_name]
    step = partial(projected_rk_step, tableau=tableau)
    return Scheme(f"projected_{tableau.name}", "low rank", tableau.order, tableau.evaluations, step)


SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {
        scheme.name: scheme
        for scheme in (
            *(
                Scheme(
                    tableau.name,
                    "factors",
                    tableau.order,
                    tableau.evaluations,
                    partial(rk_step, tableau=tableau),
                    tableau.embedded_order,
                )
                for tableau in TABLEAUS.values()
            ),
            Scheme("implicit_midpoint", "factors", 2, None, implicit_midpoint_step),
            *(_projected(tableau.name) for tableau in (EULER, HEUN, MIDPOINT, RK4)),
            Scheme("ksl", "low rank", 1, 3, ksl_step),
            Scheme("bug", "low rank", 1, 2, bug_step),
            Scheme("parallel_bug", "low rank", 1, 1, parallel_bug_step),
        )
    }
)
