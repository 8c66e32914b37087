"""Measures of one layer against dense float64 formulas, and what a gauge must not change."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tangora.diagnostics.alignment import (
    EquivalentGradient,
    bases,
    captured,
    captured_share,
    condition_number,
    cosine,
    effective_rank,
    equivalent_gradient,
    imbalance_norms,
)
from tangora.geometry.tangent import Coordinates
from tests.cases import cases, gauge_transform, random_case
from tests.reference import dense


def look(A, B, g):
    at = bases(A, B)
    return at, Coordinates(at.U.mT @ g.to(at.U), g.to(at.V) @ at.V.mT)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_captured_energy_is_that_of_the_dense_projection(case):
    at, seen = look(case.A, case.B, case.g)
    expected = dense.project(case.A, case.B, case.g).square().sum()
    assert captured(at, seen) == pytest.approx(float(expected), rel=1e-10, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(cases(), st.sampled_from([1.0, 1e3]), st.integers(0, 100))
def test_the_gauge_does_not_matter(case, condition, seed):
    A, B = gauge_transform(case.A, case.B, condition, seed)
    one, other = captured(*look(case.A, case.B, case.g)), captured(*look(A, B, case.g))
    assert other == pytest.approx(one, rel=1e-8, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(cases())
def test_equivalent_gradient(case):
    A, B, g, s = case
    step = s**2 * (B @ B.T @ g + g @ A.T @ A)
    found = equivalent_gradient(A, B, *look(A, B, g), scaling=s)
    assert found.inner == pytest.approx(float((step * g).sum()), rel=1e-9)
    assert found.squared_norm == pytest.approx(float(step.square().sum()), rel=1e-9)
    # nothing in the tangent space is closer to g than its projection
    best = captured_share(captured(*look(A, B, g)), float(g.square().sum())) ** 0.5
    assert cosine(found, float(g.square().sum())) <= best + 1e-9


def test_equivalent_gradient_of_scaled_rows():
    A, B, g, s = random_case(6, 5, 2, 0, s=2.0)
    D = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5
    # dV = s^2 (B B' D g + D g A' A) moves the weight by D dV
    step = s**2 * D[:, None] * (B @ B.T @ (D[:, None] * g) + D[:, None] * g @ A.T @ A)
    scaled = D[:, None] * B
    found = equivalent_gradient(A, scaled, *look(A, scaled, g), scaling=s, row_scale=D)
    assert found.inner == pytest.approx(float((step * g).sum()), rel=1e-10)
    assert found.squared_norm == pytest.approx(float(step.square().sum()), rel=1e-10)


def test_zero_and_deficient_factors():
    A, B, g, _ = random_case(6, 5, 2, 0)
    zero = torch.zeros_like(B)
    P_A, _ = dense.projectors(A, B)
    assert captured(*look(A, zero, g)) == pytest.approx(float((g @ P_A).square().sum()), rel=1e-12)
    assert captured(*look(torch.zeros_like(A), zero, g)) == 0.0
    twice = torch.stack([A[0], A[0]])
    alone = captured(*look(A[:1], B[:, :1], g))
    assert captured(*look(twice, B[:, :1].expand(-1, 2), g)) == pytest.approx(alone, rel=1e-10)
    assert captured_share(0.0, 0.0) == 0.0
    assert captured_share(2.0, 1.9) == 1.0
    assert cosine(EquivalentGradient(0.0, 0.0), 1.0) is None


def test_full_rank_sees_everything():
    A, B, g, _ = random_case(7, 4, 4, 3)
    assert captured(*look(A, B, g)) == pytest.approx(float(g.square().sum()), rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_factors_are_taken_as_they_are(dtype):
    A, B, g, _ = random_case(9, 8, 3, 4)
    A, B = A.to(dtype), B.to(dtype)
    expected = dense.project(A.double(), B.double(), g).square().sum()
    assert captured(*look(A, B, g)) == pytest.approx(float(expected), rel=1e-10)


def test_factors_alone():
    A, B, _, _ = random_case(8, 6, 3, 5)
    values = torch.linalg.eigvalsh(A @ A.T)
    assert condition_number(A) == pytest.approx(float(values[-1] / values[0]), rel=1e-10)
    assert condition_number(torch.zeros(2, 5)) is None
    assert condition_number(torch.ones(2, 5)) is None
    singular = torch.linalg.svdvals(B @ A)[:3]
    shares = singular / singular.sum()
    assert effective_rank(A, B) == pytest.approx(float((-(shares * shares.log()).sum()).exp()), rel=1e-10)
    assert effective_rank(A, torch.zeros_like(B)) == 0.0
    orthonormal = torch.linalg.qr(B).Q
    assert effective_rank(orthonormal.T, orthonormal) == pytest.approx(3.0)
    assert effective_rank(torch.ones(1, 4), torch.ones(9, 1)) == pytest.approx(1.0)
    norm, share = imbalance_norms(A, B)
    assert norm == pytest.approx(float(torch.linalg.matrix_norm(B.T @ B - A @ A.T)), rel=1e-12)
    assert 0 < share < 1
    assert imbalance_norms(orthonormal.T, orthonormal) == pytest.approx((0.0, 0.0), abs=1e-14)
    assert imbalance_norms(A, torch.zeros_like(B))[1] == 1.0
    assert imbalance_norms(torch.zeros_like(A), torch.zeros_like(B)) == (0.0, 0.0)
