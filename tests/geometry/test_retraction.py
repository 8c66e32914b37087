"""Retractions: where they land, how well, and when `auto` changes over."""

import itertools

import pytest
import torch
from hypothesis import given, settings

from tangora.geometry.retraction import (
    MAX_IMBALANCE,
    kept_balanced,
    rebalance,
    retract,
    svd_retract,
    well_conditioned,
)
from tangora.geometry.tangent import Cotangent, coordinates, frame, project, transport
from tests.cases import cases, gauge_transform, random_case
from tests.reference import dense
from tests.tolerances import assert_close


def point(case):
    A, B, g, _ = case
    at = frame(A, B)
    return at, project(at, coordinates(at, Cotangent(B.T @ g, g @ A.T)))


@given(cases())
@settings(deadline=None, max_examples=40)
def test_svd_is_the_metric_projection_in_balanced_factors(case):
    A, B, g, _ = case
    at, xi = point(case)
    A_new, B_new = svd_retract(A, B, at, xi, 0.3)
    target = B @ A - 0.3 * dense.project(A, B, g)
    assert_close(B_new @ A_new, dense.truncated_svd(target, len(A)))
    assert_close(B_new.T @ B_new, A_new @ A_new.T)


@given(cases())
@settings(deadline=None, max_examples=40)
def test_orthographic_equals_its_closed_form(case):
    A, B, g, _ = case
    at, xi = point(case)
    A_new, B_new = retract(A, B, at, xi, 1e-3, "orthographic")
    assert_close(B_new @ A_new, dense.orthographic(A, B, dense.project(A, B, g), 1e-3))


def test_orthographic_is_second_order():
    A, B, _, _ = case = random_case(12, 10, 3, seed=0)
    at, xi = point(case)
    errors = []
    for step in (4e-3, 2e-3, 1e-3):
        one, other = retract(A, B, at, xi, step, "orthographic"), svd_retract(A, B, at, xi, step)
        errors.append((one.B @ one.A - other.B @ other.A).norm().item())
    for coarse, fine in itertools.pairwise(errors):
        assert 2**3 * 0.8 < coarse / fine < 2**3 * 1.25


@pytest.mark.parametrize("kind", ["auto", "orthographic", "svd"])
def test_from_b_equal_zero(kind):
    A, _, g, _ = random_case(9, 7, 3, seed=1)
    B = torch.zeros(9, 3, dtype=A.dtype)
    at = frame(A, B)
    A_new, B_new = retract(A, B, at, project(at, coordinates(at, Cotangent(B.T @ g, g @ A.T))), 0.1, kind)
    P_A, _ = dense.projectors(A, B)
    assert_close(B_new @ A_new, -0.1 * g @ P_A)


def test_auto_takes_svd_where_it_must_and_only_there():
    step = 1e-2
    calm, wild = random_case(9, 7, 3, seed=1), random_case(9, 7, 3, seed=2)
    # a step that takes the weakest direction of Y almost exactly to zero: the orthographic core is singular there
    U, S, Vh = torch.linalg.svd(wild.B @ wild.A)
    removal = (1 - 1e-6) * S[2] / step - U[:, 2] @ wild.g @ Vh[2]
    wild = wild._replace(g=wild.g + removal * torch.outer(U[:, 2], Vh[2]))
    A, B, g = (torch.stack([calm[i], wild[i]]) for i in range(3))
    at = frame(A, B)
    xi = project(at, coordinates(at, Cotangent(B.mT @ g, g @ A.mT)))
    auto = retract(A, B, at, xi, step, "auto")
    orthographic, svd = retract(A, B, at, xi, step, "orthographic"), svd_retract(A, B, at, xi, step)
    assert torch.equal(auto.B[0], orthographic.B[0])
    assert torch.equal(auto.B[1], svd.B[1])
    moved = (svd.B[1] @ svd.A[1] - B[1] @ A[1]).norm()
    missed = (orthographic.B[1] @ orthographic.A[1] - svd.B[1] @ svd.A[1]).norm()
    assert missed > 10 * moved  # the negative control: the switch really is needed


def test_the_switch_does_not_see_the_gauge():
    A, B, _, _ = case = random_case(9, 7, 3, seed=2)
    A2, B2 = gauge_transform(A, B, condition=1e3, seed=0)
    for step in (1e-3, 1e-1, 1.0, 10.0):
        at, xi = point(case)
        at2, xi2 = point(case._replace(A=A2, B=B2))
        one, other = retract(A, B, at, xi, step), retract(A2, B2, at2, xi2, step)
        assert_close(other.B @ other.A, one.B @ one.A, 1e-8)


def test_well_conditioned_is_the_condition_number():
    cores = torch.stack([torch.diag(torch.tensor([1.0, v])) for v in (1.0, 0.11, 0.09, 0.0, -5.0, 30.0)])
    assert well_conditioned(cores).tolist() == [True, True, False, False, True, False]


@given(cases())
@settings(deadline=None, max_examples=30)
def test_rebalancing_keeps_w_exactly(case):
    A, B, _, _ = case
    A_new, B_new = rebalance(A * 1e3, B * 1e-3)
    assert_close(B_new @ A_new, B @ A, 1e-12)
    assert_close(B_new.T @ B_new, A_new @ A_new.T, 1e-11)


@pytest.mark.parametrize("scale", [1.0, 3.0, 30.0, 1e-3])
def test_unbalanced_factors_are_balanced_and_others_left_alone(scale):
    first, second = (random_case(9, 6, 3, seed=seed) for seed in (0, 1))
    even = rebalance(first.A, first.B)
    A = torch.stack([scale * even.A, second.A])
    B = torch.stack([even.B / scale, second.B])
    new = kept_balanced(A, B)
    assert_close(new.B @ new.A, B @ A, 1e-12)
    size = new.A.square().sum((-2, -1)) + new.B.square().sum((-2, -1))
    nuclear = torch.linalg.matrix_norm(B @ A, ord="nuc")
    assert (size <= 2 * MAX_IMBALANCE * 3**0.5 * nuclear).all()
    if scale == 1.0:
        assert torch.equal(new.A[0], A[0])
        assert torch.equal(new.B[0], B[0])
    if scale in (30.0, 1e-3):
        assert_close(new.A[0] @ new.A[0].mT, new.B[0].mT @ new.B[0], 1e-10)


def test_a_lost_direction_can_come_back():
    A, B, g, _ = random_case(9, 7, 3, seed=4)
    B[:, 2] = 0  # Y has rank two, and the step is zero: nothing brings a third direction in
    at = frame(A, B)
    still = project(at, coordinates(at, Cotangent(torch.zeros_like(A), torch.zeros_like(B))))
    A_new, B_new = svd_retract(A, B, at, still, 0.1)
    assert_close(B_new @ A_new, B @ A)
    there = frame(A_new, B_new)
    assert torch.linalg.matrix_rank(there.V, rtol=1e-8) == 3


def test_nothing_to_do_changes_nothing():
    A, _, _, _ = random_case(9, 7, 3, seed=4)
    B = torch.zeros(9, 3, dtype=A.dtype)
    at = frame(A, B)
    still = project(at, coordinates(at, Cotangent(torch.zeros_like(A), torch.zeros_like(B))))
    for kind in ("auto", "orthographic", "svd"):
        A_new, B_new = retract(A, B, at, still, 0.1, kind)
        assert torch.equal(A_new, A)
        assert torch.equal(B_new, B)


def test_rebalancing_leaves_the_momentum_unchanged():
    A, B, g, _ = random_case(9, 7, 3, seed=5)
    at = frame(A, B)
    M = dense.project(A, B, g)
    A_new, B_new = rebalance(A, B)
    moved = transport(at, Cotangent(B.T @ M, M @ A.T), A_new, B_new)
    there = frame(A_new, B_new)
    xi = project(there, coordinates(there, moved))
    assert_close(there.U @ xi.K + xi.J @ there.V, M)
