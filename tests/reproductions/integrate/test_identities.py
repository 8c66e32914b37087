"""Steps of the low-rank schemes against their dense closed forms, and what they ask of a force."""

import pytest
import torch

from reproductions.matrix_sensing.low_rank import (
    DenseForce,
    LowRank,
    Truncation,
    bug_step,
    ksl_step,
    parallel_bug_step,
    project_force,
    projected_rk_step,
)
from reproductions.matrix_sensing.schemes import SCHEMES, factor_field
from tangora.geometry.gauge import GAUGES
from tangora.geometry.retraction import svd_retract
from tangora.geometry.tangent import Cotangent, coordinates, frame, project
from tangora.integrate import EULER, RK4
from tests.cases import random_case
from tests.reference import flows
from tests.reference.dense import project as project_dense
from tests.reference.dense import truncated_svd, velocity
from tests.reproductions.integrate.problems import for_one, quadratic
from tests.tolerances import assert_close

EVERYTHING = Truncation()
STEP = 0.3
SHAPES = [(12, 10, 3), (10, 12, 3), (5, 7, 4), (6, 6, 1)]  # also 2r > min(m, n)


@pytest.fixture(params=SHAPES, ids=str)
def frozen(request):
    """A point Y, a gradient g that does not change, and the field of -g."""
    A, B, g, _ = random_case(*request.param, seed=0)
    return LowRank.from_factors(A, B), g, for_one(lambda _Y: DenseForce(-g))


def one(stepped):
    assert stepped.failure is None
    (Y,) = stepped.state
    return Y


def test_projected_force(frozen):
    Y, g, _ = frozen
    K, J = project_force(Y, DenseForce(g))
    assert_close(Y.U @ K + J @ Y.V.T, flows.tangent_part(Y.dense(), g, Y.rank), 1e-12)


def test_parallel_bug_before_the_cut_is_the_tangent_step(frozen):
    Y, g, field = frozen
    expected = Y.dense() - STEP * flows.tangent_part(Y.dense(), g, Y.rank)
    assert_close(one(parallel_bug_step(field, (Y,), STEP, truncation=EVERYTHING)).dense(), expected, 1e-12)


def test_parallel_bug_projected_euler_and_the_svd_retraction_are_one(frozen):
    Y, g, field = frozen
    expected = truncated_svd(Y.dense() - STEP * flows.tangent_part(Y.dense(), g, Y.rank), Y.rank)
    assert_close(one(parallel_bug_step(field, (Y,), STEP)).dense(), expected, 1e-12)
    assert_close(one(projected_rk_step(field, (Y,), STEP, EULER)).dense(), expected, 1e-12)
    A, B = Y.S @ Y.V.T, Y.U
    at = frame(A, B)
    new = svd_retract(A, B, at, project(at, coordinates(at, Cotangent(B.T @ g, g @ A.T))), STEP)
    assert_close(new.B @ new.A, expected, 1e-10)


def test_ksl_with_a_frozen_force_is_a_sweep_of_subspace_iteration(frozen):
    Y, g, field = frozen
    full = Y.dense() - STEP * g
    U, _ = torch.linalg.qr(full @ Y.V)
    assert_close(one(ksl_step(field, (Y,), STEP)).dense(), U @ U.T @ full, 1e-12)


def test_augmented_minus_parallel_bug_is_the_new_corner(frozen):
    Y, g, field = frozen
    augmented = one(bug_step(field, (Y,), STEP, truncation=EVERYTHING)).dense()
    parallel = one(parallel_bug_step(field, (Y,), STEP, truncation=EVERYTHING)).dense()
    outside_U, _ = flows.bases(g @ Y.V - Y.U @ (Y.U.T @ g @ Y.V), min(Y.rank, len(g) - Y.rank))
    outside_V, _ = flows.bases(g.T @ Y.U - Y.V @ (Y.V.T @ g.T @ Y.U), min(Y.rank, len(g.T) - Y.rank))
    corner = outside_U @ outside_U.T @ g @ outside_V @ outside_V.T
    assert float((augmented - parallel + STEP * corner).norm()) < 1e-12 * float(g.norm())


def test_steps_against_dense_projectors_with_a_force_that_changes():
    problem = quadratic()
    Y, field = problem.start(), problem.low_rank_field()
    dense = Y.dense()
    assert_close(one(ksl_step(field, (Y,), STEP)).dense(), flows.ksl(problem.gradient, dense, 3, STEP), 1e-12)
    wide = flows.augmented_bug(problem.gradient, dense, 3, STEP)
    assert_close(one(bug_step(field, (Y,), STEP, truncation=EVERYTHING)).dense(), wide, 1e-12)
    assert_close(one(bug_step(field, (Y,), STEP)).dense(), truncated_svd(wide, 3), 1e-12)


def test_substeps_solved_more_accurately_change_only_higher_order():
    problem = quadratic()
    Y, field = problem.start(), problem.low_rank_field()
    for step in (ksl_step, bug_step):
        gaps = [
            (one(step(field, (Y,), h)).dense() - one(step(field, (Y,), h, tableau=RK4)).dense()).norm()
            for h in (1e-2, 5e-3)
        ]
        assert 3.5 < gaps[0] / gaps[1] < 4.5


@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if scheme.kind == "low rank"])
def test_only_the_products_of_one_backward_pass_are_asked_for(name):
    problem = quadratic()
    calls = []

    class Checked:
        def __init__(self, Y):
            self.Y, self.force = Y, DenseForce(-problem.gradient(Y.dense()))

        def right(self, X):
            assert X is self.Y.V
            return self.force.right(X)

        def left(self, X):
            assert X is self.Y.U
            return self.force.left(X)

    def field(Y):
        calls.append(Y)
        return Checked(Y)

    scheme = SCHEMES[name]
    stepped = scheme.step(for_one(field), (problem.start(),), 0.1)
    assert stepped.evaluations == len(calls) == scheme.evaluations


@pytest.mark.parametrize("gauge", GAUGES)
def test_velocity_of_factors_is_minus_the_projected_gradient_in_the_weight(gauge):
    A, B, g, _ = random_case(9, 7, 3, seed=0)
    s = 2.5
    dA, dB = factor_field(lambda _state: (s * B.T @ g, s * g @ A.T), gauge, s)((A, B))
    H_A, H_B = velocity(A, B, g, s, gauge)
    assert_close(dA, -H_A)
    assert_close(dB, -H_B)
    assert_close(s * (dB @ A + B @ dA), -project_dense(A, B, g))
