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
from reproductions.matrix_sensing.schemes import SCHEMES
from tangora.geometry.retraction import svd_retract
from tangora.geometry.tangent import Cotangent, coordinates, frame, project
from tangora.integrate import EULER, RK4
from tests.cases import random_case
from tests.reference import flows
from tests.reference.dense import truncated_svd
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


@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if scheme.kind == "low rank"])
def test_layers_are_stepped_side_by_side(name):
    first, second = quadratic(seed=0), quadratic(8, 11, (1.0, 0.5), seed=1)

    def together(state):
        return tuple(DenseForce(-p.gradient(Y.dense())) for p, Y in zip((first, second), state, strict=True))

    both = SCHEMES[name].step(together, (first.start(), second.start()), 0.1).state
    for problem, Y in zip((first, second), both, strict=True):
        alone = one(SCHEMES[name].step(problem.low_rank_field(), (problem.start(),), 0.1))
        assert_close(Y.dense(), alone.dense(), 1e-13)


@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if scheme.kind == "low rank"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_forces_may_come_from_autograd_and_in_float32(name, mode):
    problem = quadratic()
    modes = []

    def field(Y):
        modes.append(torch.is_grad_enabled())
        with torch.enable_grad():
            W = Y.dense().detach().requires_grad_()
            (g,) = torch.autograd.grad(problem.loss(W), W)
        return DenseForce(-g.to(Y.U.dtype))

    start = problem.start()
    single = LowRank(start.U.float(), start.S.float(), start.V.float())
    with mode():
        Y = one(SCHEMES[name].step(for_one(field), (single,), 0.1))
        assert set(modes) == {torch.is_grad_enabled()}
    exact = one(SCHEMES[name].step(problem.low_rank_field(), (start,), 0.1))
    assert not Y.S.requires_grad
    assert Y.S.dtype == torch.float32
    assert_close(Y.dense().double(), exact.dense(), 1e-5)
