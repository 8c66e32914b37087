"""Steps of Runge-Kutta methods on tuples of tensors: callables and tensors, no models."""

from tangora.integrate.implicit_midpoint import implicit_midpoint_step
from tangora.integrate.runge_kutta import Field, State, Stepped, rk_step
from tangora.integrate.tableau import (
    BOGACKI_SHAMPINE,
    EULER,
    HEUN,
    MIDPOINT,
    RK4,
    TABLEAUS,
    Tableau,
)

__all__ = [
    "BOGACKI_SHAMPINE",
    "EULER",
    "HEUN",
    "MIDPOINT",
    "RK4",
    "TABLEAUS",
    "Field",
    "State",
    "Stepped",
    "Tableau",
    "implicit_midpoint_step",
    "rk_step",
]
