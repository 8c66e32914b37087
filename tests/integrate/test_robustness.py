"""Small singular values: harmless to the low-rank schemes, fatal to explicit schemes on factors."""

import functools

import pytest

from tangora.integrate import SCHEMES, integrate
from tests.integrate.problems import nearby, quadratic
from tests.reference import flows

STEP = 1 / 20


@functools.cache
def problem(smallest):
    return nearby(quadratic(20, 18, (2.0, 1.5, 1.0, smallest)))


@functools.cache
def reference(smallest):
    p = problem(smallest)
    return flows.projected_midpoint(p.gradient, p.W, p.rank, 1.0, steps=800)


def error(name, smallest):
    p = problem(smallest)
    if SCHEMES[name].kind == "factors":
        solution = integrate(SCHEMES[name].stepper(p.factor_field("sylvester")), (p.A, p.B), 1.0, STEP)
        A, B = solution.state
        end = p.scaling * B @ A
    else:
        solution = integrate(SCHEMES[name].stepper(p.low_rank_field()), (p.start(),), 1.0, STEP)
        end = solution.state[0].dense()
    assert solution.finished
    return float((end - reference(smallest)).norm())


@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if scheme.kind == "low rank"])
def test_low_rank_schemes_do_not_mind(name):
    near, far = error(name, 1e-3), error(name, 1e-10)
    assert 0.5 < far / near < 2
    assert far < 0.3


@pytest.mark.parametrize("name", ["euler", "rk4"])
def test_factor_schemes_blow_up(name):
    assert error(name, 1e-10) > 1e3 * error(name, 1e-3)
