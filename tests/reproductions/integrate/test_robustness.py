"""Small singular values: harmless to the low-rank schemes, fatal to explicit schemes on factors."""

import functools

import pytest

from reproductions.matrix_sensing.schemes import SCHEMES
from tests.reference import flows
from tests.reproductions.integrate.problems import march, nearby, quadratic

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
        A, B = march(name, p.factor_field("sylvester"), (p.A, p.B), STEP)[-1]
        end = p.scaling * B @ A
    else:
        (Y,) = march(name, p.low_rank_field(), (p.start(),), STEP)[-1]
        end = Y.dense()
    return float((end - reference(smallest)).norm())


@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if scheme.kind == "low rank"])
def test_low_rank_schemes_do_not_mind(name):
    near, far = error(name, 1e-3), error(name, 1e-10)
    assert 0.5 < far / near < 2
    assert far < 0.3


@pytest.mark.parametrize("name", ["euler", "rk4"])
def test_factor_schemes_blow_up(name):
    assert error(name, 1e-10) > 1e3 * error(name, 1e-3)
