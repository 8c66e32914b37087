r"""Explicit Runge-Kutta methods as data: Butcher tableaus, checked when they are made."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from tangora._checks import InputError, check_whole

_TOLERANCE = 1e-12


@dataclass(frozen=True)
class Tableau:
    r"""An explicit Runge-Kutta method $k_i = f(y + h \sum_{j<i} a_{ij} k_j)$, $y_+ = y + h \sum_i b_i k_i$.

    The stated orders are checked against the order conditions, so that a misprint in a coefficient cannot go unnoticed.

    Args:
        name: Name in `TABLEAUS` and in messages.
        a: One row per stage; row $i$ holds the $i$ coefficients left of the diagonal, so the method is explicit.
        b: Weights of the step.
        order: Order of the step, 1 to 4.

    Raises:
        InputError: If rows and weights do not fit together, or an order condition up to the stated order fails.

    Source:
        Hairer, Nørsett, Wanner (1993), Solving Ordinary Differential Equations I, sections II.1 and II.2.
    """

    name: str
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    order: int

    def __post_init__(self) -> None:
        for i, row in enumerate(self.a):
            if len(row) != i:
                raise InputError(
                    f"row {i} of a in tableau {self.name} must have {i} coefficients, those left of the diagonal "
                    f"(explicit); got {len(row)}"
                )
        self._check_weights()

    @property
    def c(self) -> tuple[float, ...]:
        r"""Times of the stages in units of the step: $c_i = \sum_j a_{ij}$."""
        return tuple(math.fsum(row) for row in self.a)

    @property
    def stages(self) -> int:
        """Evaluations of the field in a step."""
        return len(self.b)

    def _check_weights(self) -> None:
        check_whole(f"order of tableau {self.name}", self.order, low=1)
        if self.order > 4:
            raise InputError(f"order of tableau {self.name} must be at most 4; got {self.order}")
        if len(self.b) != len(self.a) or not self.b:
            raise InputError(
                f"b of tableau {self.name} must have one weight per stage, {len(self.a)}; got {len(self.b)}"
            )
        for condition, value, wanted in self._order_conditions():
            if len(condition) <= self.order and abs(value - wanted) > _TOLERANCE:
                raise InputError(
                    f"b of tableau {self.name} must satisfy the order-{len(condition)} condition "
                    f"{condition} = {wanted:g} to be of order {self.order}; got {value:.6g}"
                )

    def _order_conditions(self) -> list[tuple[str, float, float]]:
        # one letter per node of the tree, so as many letters as the order: bcac is the sum of b_i c_i a_ij c_j
        weights, c = self.b, self.c
        ac = self._apply(c)
        ac2, aac = self._apply([x * x for x in c]), self._apply(ac)
        return [
            ("b", math.fsum(weights), 1.0),
            ("bc", _dot(weights, c), 1 / 2),
            ("bcc", _dot(weights, [x * x for x in c]), 1 / 3),
            ("bac", _dot(weights, ac), 1 / 6),
            ("bccc", _dot(weights, [x**3 for x in c]), 1 / 4),
            ("bcac", _dot(weights, [x * y for x, y in zip(c, ac, strict=True)]), 1 / 8),
            ("bacc", _dot(weights, ac2), 1 / 12),
            ("baac", _dot(weights, aac), 1 / 24),
        ]

    def _apply(self, values: Sequence[float]) -> list[float]:
        return [_dot(row, values[: len(row)]) for row in self.a]


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(left, right, strict=True))


EULER = Tableau("euler", a=((),), b=(1.0,), order=1)
"""Gradient descent, when the field is a negative gradient."""

HEUN = Tableau("heun", a=((), (1.0,)), b=(0.5, 0.5), order=2)
"""Heun's method."""

MIDPOINT = Tableau("midpoint", a=((), (0.5,)), b=(0.0, 1.0), order=2)
"""Runge's midpoint method."""

BOGACKI_SHAMPINE = Tableau(
    "bogacki_shampine",
    a=((), (1 / 2,), (0.0, 3 / 4)),
    b=(2 / 9, 1 / 3, 4 / 9),
    order=3,
)
"""Bogacki & Shampine (1989), without the fourth stage of its error estimate."""

RK4 = Tableau(
    "rk4",
    a=((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
    b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
    order=4,
)
"""The classical method of Kutta (1901)."""

TABLEAUS: Mapping[str, Tableau] = MappingProxyType(
    {tableau.name: tableau for tableau in (EULER, HEUN, MIDPOINT, BOGACKI_SHAMPINE, RK4)}
)
