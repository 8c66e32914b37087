"""Orders of convergence, measured: the solution, the balance, and what the gauge does not change."""

import functools

import pytest
import torch

from reproductions.matrix_sensing.schemes import SCHEMES
from tangora.geometry.gauge import GAUGES, imbalance
from tests.reference import flows
from tests.reproductions.integrate.problems import march, quadratic, slope

PROBLEM = quadratic(scaling=2.0)
FACTOR_SCHEMES = [name for name, scheme in SCHEMES.items() if scheme.kind == "factors"]
LOW_RANK_SCHEMES = [name for name, scheme in SCHEMES.items() if scheme.kind == "low rank"]


@functools.cache
def reference():
    return flows.projected_flow(PROBLEM.gradient, PROBLEM.W, PROBLEM.rank, 1.0)


def factors_at_end(name, gauge, step_size):
    # for the order it is enough to solve the implicit equation well below the error of the coarsest step
    options = {"tolerance": 1e-9} if name == "implicit_midpoint" else {}
    return march(name, PROBLEM.factor_field(gauge), (PROBLEM.A, PROBLEM.B), step_size, **options)[-1]


def matrix_at_end(name, step_size):
    if SCHEMES[name].kind == "factors":
        A, B = factors_at_end(name, "sylvester", step_size)
        return PROBLEM.scaling * B @ A
    (Y,) = march(name, PROBLEM.low_rank_field(), (PROBLEM.start(),), step_size)[-1]
    return Y.dense()


def sizes(order):
    return [1 / (k * (2 if order == 1 else 1)) for k in (8, 16, 32, 64)]


@pytest.mark.parametrize("name", list(SCHEMES))
def test_order(name):
    scheme = SCHEMES[name]
    errors = [float((matrix_at_end(name, h) - reference()).norm()) for h in sizes(scheme.order)]
    assert abs(slope(sizes(scheme.order), errors) - scheme.order) <= 0.15


@pytest.mark.parametrize("gauge", ["sylvester", "lyapunov"])
@pytest.mark.parametrize("name", [name for name in FACTOR_SCHEMES if name != "implicit_midpoint"])
def test_order_of_the_drift_from_balance(name, gauge):
    # Heun is better than its order: what it adds to a quadratic invariant is h^2/4 (k_1 - k_2)^T Q (k_1 - k_2)
    order = 3 if name == "heun" else SCHEMES[name].order
    drifts = [float(imbalance(*factors_at_end(name, gauge, h)).norm()) for h in sizes(order)]
    assert abs(slope(sizes(order), drifts) - order) <= 0.15


@pytest.mark.parametrize("gauge", ["zero", "symmetric"])
def test_other_gauges_lose_the_balance(gauge):
    drifts = [float(imbalance(*factors_at_end("rk4", gauge, h)).norm()) for h in (1 / 16, 1 / 32)]
    assert min(drifts) > 1e-2
    assert abs(drifts[0] / drifts[1] - 1) < 1e-2  # of the flow itself, not of the scheme


@pytest.mark.parametrize("gauge", ["sylvester", "lyapunov"])
def test_implicit_midpoint_keeps_the_balance(gauge):
    end = march("implicit_midpoint", PROBLEM.factor_field(gauge), (PROBLEM.A, PROBLEM.B), 1 / 16)[-1]
    assert float(imbalance(*end).norm()) < 1e-12


@pytest.mark.parametrize("gauge", GAUGES)
def test_all_gauges_reach_the_same_weight(gauge):
    A, B = factors_at_end("rk4", gauge, 1 / 64)
    assert float((PROBLEM.scaling * B @ A - reference()).norm()) < 1e-7


@pytest.mark.parametrize("name", LOW_RANK_SCHEMES)
def test_bases_stay_orthonormal(name):
    (Y,) = march(name, PROBLEM.low_rank_field(), (PROBLEM.start(),), 1 / 16)[-1]
    eye = torch.eye(PROBLEM.rank, dtype=Y.S.dtype)
    assert float((Y.U.T @ Y.U - eye).norm()) < 1e-13
    assert float((Y.V.T @ Y.V - eye).norm()) < 1e-13
