"""Time integration of gradient flows on factors and on rank-r matrices: callables and tensors, no models."""

from tangora.integrate.bug import bug_step
from tangora.integrate.control import Control
from tangora.integrate.factors import factor_field, rebalanced
from tangora.integrate.force import DenseForce, Force, LowRankField, for_one, project_force
from tangora.integrate.implicit_midpoint import implicit_midpoint_step
from tangora.integrate.ksl import ksl_step
from tangora.integrate.loop import STATUSES, Solution, Status, integrate
from tangora.integrate.low_rank import LowRank, LowRankState, NotFiniteError, Truncation, truncate
from tangora.integrate.parallel_bug import parallel_bug_step
from tangora.integrate.projected_rk import projected_rk_step
from tangora.integrate.runge_kutta import rk_step
from tangora.integrate.schemes import SCHEMES, Scheme
from tangora.integrate.state import Field, State, Stepped, Stepper
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
    "SCHEMES",
    "STATUSES",
    "TABLEAUS",
    "Control",
    "DenseForce",
    "Field",
    "Force",
    "LowRank",
    "LowRankField",
    "LowRankState",
    "NotFiniteError",
    "Scheme",
    "Solution",
    "State",
    "Status",
    "Stepped",
    "Stepper",
    "Tableau",
    "Truncation",
    "bug_step",
    "factor_field",
    "for_one",
    "implicit_midpoint_step",
    "integrate",
    "ksl_step",
    "parallel_bug_step",
    "project_force",
    "projected_rk_step",
    "rebalanced",
    "rk_step",
    "truncate",
]
