"""Motion of single weights against dense float64, also where it is tiny against what moves."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tangora.diagnostics import motion
from tangora.diagnostics.motion import (
    Overlap,
    Update,
    WeightState,
    change_between,
    change_rows,
    overlap,
    principal_angles,
    product_norm,
    step_norm,
    update_from,
)
from tests.cases import cases, gauge_transform, random_case
from tests.reference import trajectory as dense


def drawn(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moved(A, B, size, seed):
    """Return factors a relative size away, and the exact difference of their products."""
    dA, dB = size * drawn(*A.shape, seed=seed), size * drawn(*B.shape, seed=seed + 1)
    return A + dA, B + dB


@settings(max_examples=40, deadline=None)
@given(cases(), st.integers(0, 99))
def test_norm_and_difference(case, seed):
    A, B, _, s = case
    new_A, new_B = moved(A, B, 1.0, seed)
    old, new = update_from(A, B, scaling=s), update_from(new_A, new_B, scaling=s)
    assert float(product_norm(old)) == pytest.approx(s * float((B @ A).norm()), rel=1e-10)
    step = s * (new_B @ new_A - B @ A)
    assert torch.allclose(change_between(new, old).B @ change_between(new, old).A, step, atol=1e-12)
    assert float(step_norm(WeightState(new), WeightState(old))) == pytest.approx(
        float(step.norm()), rel=1e-9, abs=1e-13
    )


@pytest.mark.parametrize("size", [1e-3, 1e-7, 1e-10])
def test_a_tiny_step_is_accurate_where_gram_matrices_are_not(size):
    case = random_case(40, 30, 4, 0)
    A, B = case.A, case.B
    new_A, new_B = moved(A, B, size, 1)
    dA, dB = new_A - A, new_B - B  # exact in float64, as the two are close
    exact = float((dB @ A + B @ dA + dB @ dA).norm())
    found = float(step_norm(WeightState(Update(new_A, new_B)), WeightState(Update(A, B))))
    assert found == pytest.approx(exact, rel=1e-12)
    # the negative control: trace of a product of Gram matrices, in the same precision
    stack_A, stack_B = torch.cat([new_A, A]), torch.cat([new_B, -B], 1)
    by_grams = math.sqrt(abs(float(torch.trace((stack_B.T @ stack_B) @ (stack_A @ stack_A.T)))))
    assert (by_grams != pytest.approx(exact, rel=1e-5)) == (size < 1e-6)


def test_a_change_of_gauge_is_no_motion():
    case = random_case(25, 20, 3, 2)
    A, B = gauge_transform(case.A, case.B, 100.0, 3)
    assert float(step_norm(WeightState(Update(A, B)), WeightState(Update(case.A, case.B)))) < 1e-12


def test_stacks_of_layers():
    layers = [random_case(9, 7, 2, seed) for seed in range(3)]
    stack = Update(torch.stack([c.A for c in layers]), torch.stack([c.B for c in layers]))
    assert product_norm(stack).tolist() == pytest.approx([float((c.B @ c.A).norm()) for c in layers])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_offset_is_subtracted_exactly(dtype):
    case = random_case(12, 10, 3, 4)
    A0, B0 = case.A.to(dtype), case.B.to(dtype)
    start = update_from(A0, B0, scaling=2.0, start=(B0, A0))
    assert float(product_norm(start)) == 0.0
    A, B = A0.clone(), B0.clone()
    A[0, 0] += 2.0**-6
    B[1, 2] += 2.0**-6
    exact = dense.weight(torch.zeros(12, 10), A, B, 2.0, start=(B0, A0))
    assert float(product_norm(update_from(A, B, scaling=2.0, start=(B0, A0)))) == pytest.approx(
        float(exact.norm()), rel=1e-12
    )


@pytest.mark.parametrize("block", [5, 512])
@pytest.mark.parametrize("size", [0.3, 1e-7])
def test_dora_moves_by_its_scale_too(monkeypatch, block, size):
    monkeypatch.setattr(motion, "_BLOCK", block)
    case, W0 = random_case(13, 11, 2, 5), drawn(13, 11, seed=6)
    new_A, new_B = moved(case.A, case.B, size, 7)
    scale = drawn(13, seed=8).abs() + 0.5
    new_scale = scale + size * drawn(13, seed=9)
    old, new = WeightState(Update(case.A, case.B), scale), WeightState(Update(new_A, new_B), new_scale)
    change, grown = new_B @ new_A - case.B @ case.A, (new_scale - scale)[:, None]
    exact = new_scale[:, None] * change + grown * (W0 + case.B @ case.A)
    assert float(step_norm(new, old, W0)) == pytest.approx(float(exact.norm()), rel=1e-8)
    rows = change_rows(new, lambda rows: W0[rows])
    formed = torch.cat([rows(slice(0, 6)), rows(slice(6, 13))])
    assert torch.allclose(formed, new_scale[:, None] * (W0 + new_B @ new_A) - W0, atol=1e-13)


@pytest.mark.parametrize("block", [4, 512])
def test_overlap_is_the_dense_comparison_and_adds_up(monkeypatch, block):
    monkeypatch.setattr(motion, "_BLOCK", block)
    W0, W, W_full = (drawn(10, 6, seed=seed) for seed in range(3))

    def compared(W, W_full, W0):
        return overlap(lambda rows: (W - W0)[rows], lambda rows: (W_full - W0)[rows], len(W))

    found = compared(W, W_full, W0)
    expected = dense.compare(W, W0, W_full)
    assert (found.distance, found.relative_distance, found.cosine) == pytest.approx(expected, rel=1e-12)
    halves = compared(W[:3], W_full[:3], W0[:3]) + compared(W[3:], W_full[3:], W0[3:])
    assert (halves.distance, halves.cosine) == pytest.approx((found.distance, found.cosine), rel=1e-12)
    near = compared(W_full + 1e-9 * W, W_full, W0)
    assert near.distance == pytest.approx(1e-9 * float(W.norm()), rel=1e-6)
    assert near.cosine <= 1.0
    unmoved = compared(W0, W_full, W0)
    assert (unmoved.relative_distance, unmoved.cosine) == (1.0, None)
    assert Overlap().relative_distance is None


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_principal_angles(m, k, other, seed):
    one, two = drawn(m, min(k, m), seed=seed), drawn(m, min(other, m), seed=seed + 1)
    count = min(one.shape[1], two.shape[1])
    expected = dense.angles(one, two) if one.shape[1] >= two.shape[1] else dense.angles(two, one)
    assert len(expected) == count
    found = principal_angles(one, two)
    assert found.largest == pytest.approx(float(expected.max()), abs=1e-5)
    assert found.mean == pytest.approx(float(expected.mean()), abs=1e-5)


def test_known_angles():
    basis = torch.eye(4, dtype=torch.float64)
    turn = math.radians(30)
    tilted = torch.stack([basis[0], math.cos(turn) * basis[1] + math.sin(turn) * basis[2]], 1)
    assert principal_angles(basis[:, :2], tilted) == pytest.approx((30.0, 15.0))
    assert principal_angles(basis[:, :2], 7 * basis[:, 2:]) == pytest.approx((90.0, 90.0))
    # small ones are not lost in the rounding of a cosine near one
    near = basis[:, :1] + 1e-9 * basis[:, 1:2]
    assert principal_angles(basis[:, :1], near).largest == pytest.approx(math.degrees(1e-9), rel=1e-5)
    # the span counts, and neither size nor repetition
    R = drawn(2, 2, seed=0)
    assert principal_angles(basis[:, :2] @ R, tilted) == pytest.approx((30.0, 15.0))
    assert principal_angles(torch.zeros(4, 2), basis[:, :2]) is None
