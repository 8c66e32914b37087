"""The projection and its gauges against dense references: invariants 1-8 and 19 of the geometry survey."""

import pytest
import torch
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode

from tangora.geometry import gauge as gauges
from tangora.geometry.gauge import GAUGES, factor_velocity, imbalance
from tangora.geometry.guess import guessing
from tangora.geometry.retraction import retract
from tangora.geometry.tangent import (
    Cotangent,
    Metric,
    alignment_error,
    captured_energy,
    coordinates,
    dense_captured_energy,
    frame,
    project,
    project_metric,
    residual,
    second_moments,
    squared_norm,
    transport,
)
from tests.cases import Case, cases, gauge_transform, random_case
from tests.reference import dense
from tests.tolerances import assert_close


def seen(case: Case) -> Cotangent:
    """What autograd gives, divided by s: computed as g_A / s to include the rounding of both."""
    A, B, g, s = case
    return Cotangent((s * B.T @ g) / s, (s * g @ A.T) / s)


def tangent_of(A, B, M, at=None):
    """P_T(M) of a dense matrix, through what LoRA would see of it."""
    at = frame(A, B) if at is None else at
    return project(at, coordinates(at, Cotangent(B.mT @ M, M @ A.mT)))


def projected(A, B, M):
    at = frame(A, B)
    return matrix(at, tangent_of(A, B, M, at))


def frame_and_tangent(case: Case):
    at = frame(case.A, case.B)
    return at, project(at, coordinates(at, seen(case)))


def matrix(at, tangent):
    return at.U @ tangent.K + tangent.J @ at.V


@given(cases())
@settings(deadline=None, max_examples=60)
def test_projection_equals_the_dense_one(case):
    A, B, g, _ = case
    at, xi = frame_and_tangent(case)
    P_A, P_B = dense.projectors(A, B)
    assert_close(matrix(at, xi), dense.project(A, B, g))
    assert_close(residual(at, g) + matrix(at, xi), g)
    left = torch.eye(len(B), dtype=B.dtype) - P_B
    right = torch.eye(A.shape[1], dtype=A.dtype) - P_A
    assert (residual(at, g) - left @ g @ right).abs().max() < 1e-10 * g.abs().max()
    assert (at.U.T @ xi.J).abs().max() < 1e-10 * g.norm()


@given(cases())
@settings(deadline=None, max_examples=30)
def test_projection_is_an_orthogonal_projection(case):
    A, B, g, _ = case
    xi = matrix(*frame_and_tangent(case))
    assert_close(projected(A, B, xi), xi)
    other = torch.randn(g.shape, dtype=g.dtype, generator=torch.Generator().manual_seed(1))
    difference = (xi * other).sum() - (g * projected(A, B, other)).sum()
    assert abs(difference) < 1e-9 * g.norm() * other.norm()
    assert_close(projected(A, B, B @ A), B @ A)
    assert torch.linalg.matrix_rank(xi, rtol=1e-9) <= 2 * len(A)


@given(cases())
@settings(deadline=None, max_examples=30)
def test_normal_equations(case):
    A, B, g, _ = case
    error = matrix(*frame_and_tangent(case)) - g
    scale = 1e-9 * g.norm() * max(A.norm(), B.norm())
    assert (B.T @ error).abs().max() < scale
    assert (error @ A.T).abs().max() < scale


@pytest.mark.parametrize(("m", "n"), [(4, 9), (9, 4), (5, 5)])
def test_full_rank_sees_everything(m, n):
    case = random_case(m, n, min(m, n), seed=0)
    assert_close(matrix(*frame_and_tangent(case)), case.g)


@given(cases())
@settings(deadline=None, max_examples=40)
def test_gauges_equal_the_dense_formulas_and_move_w_alike(case):
    A, B, g, s = case
    at, xi = frame_and_tangent(case)
    for gauge in GAUGES:
        H_A, H_B = (h / s for h in factor_velocity(A, B, at, xi, gauge))
        expected_A, expected_B = dense.velocity(A, B, g, s, gauge)
        scale = max(expected_A.abs().max(), expected_B.abs().max())
        assert (H_A - expected_A).abs().max() < 1e-10 * scale
        assert (H_B - expected_B).abs().max() < 1e-10 * scale
        assert_close(s * (B @ H_A + H_B @ A), dense.project(A, B, g))


@given(cases())
@settings(deadline=None, max_examples=30)
def test_balance_is_kept_by_sylvester_and_lyapunov_only(case):
    A, B, g, _ = case
    at, xi = frame_and_tangent(case)

    def drift(gauge):
        H_A, H_B = factor_velocity(A, B, at, xi, gauge)
        change = H_B.T @ B + B.T @ H_B - H_A @ A.T - A @ H_A.T
        return change.abs().max() / max(B.norm() * H_B.norm() + A.norm() * H_A.norm(), 1e-300)

    assert drift("sylvester") < 1e-10
    assert drift("lyapunov") < 1e-10


def test_lyapunov_decomposes_its_one_matrix_once(monkeypatch):
    calls = []
    original = gauges.eigendecompose
    monkeypatch.setattr(gauges, "eigendecompose", lambda matrix: calls.append(1) or original(matrix))
    case = random_case(8, 6, 3, seed=0)
    at, xi = frame_and_tangent(case)
    for name, expected in (("sylvester", 2), ("lyapunov", 1)):
        calls.clear()
        factor_velocity(case.A, case.B, at, xi, name)
        assert len(calls) == expected


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-8])
@pytest.mark.parametrize("condition", [1.0, 1e3])
@pytest.mark.parametrize("gauge", ["sylvester", "lyapunov"])
def test_without_decompositions_the_gauges_are_the_same(gauge, condition, size):
    A, B, g, s = random_case(40, 30, 8, seed=1)
    A, B = gauge_transform(A, size * B, condition, seed=2)
    case = Case(A, B, g, s)
    at, xi = frame_and_tangent(case)
    wanted = factor_velocity(A, B, at, xi, gauge)
    with guessing():
        found = factor_velocity(A, B, at, xi, gauge)
    for one, other in zip(wanted, found, strict=True):
        assert (one - other).abs().max() < 1e-11 * condition**2 * one.abs().max()


def test_balance_is_not_kept_by_the_other_gauges():
    case = random_case(8, 6, 3, seed=0)
    at, xi = frame_and_tangent(case)
    for gauge in ("zero", "symmetric"):
        H_A, H_B = factor_velocity(case.A, case.B, at, xi, gauge)
        change = H_B.T @ case.B + case.B.T @ H_B - H_A @ case.A.T - case.A @ H_A.T
        assert change.abs().max() > 1e-3


def test_sylvester_is_the_least_velocity_and_horizontal():
    A, B, _, _ = case = random_case(9, 7, 3, seed=2)
    at, xi = frame_and_tangent(case)
    H_A, H_B = factor_velocity(A, B, at, xi, "sylvester")
    assert_close(B.T @ H_B, H_A @ A.T)
    norm = H_A.square().sum() + H_B.square().sum()
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        X = 1e-3 * torch.randn(3, 3, dtype=A.dtype, generator=generator)
        assert (H_A + X @ A).square().sum() + (H_B - B @ X).square().sum() > norm


def test_sylvester_with_equal_eigenvalues():
    A, B, g, _ = random_case(9, 7, 3, seed=3)
    A, B = torch.linalg.qr(A.T)[0].T, torch.linalg.qr(B)[0]  # both Gram matrices are the identity
    at = frame(A, B)
    H_A, H_B = factor_velocity(A, B, at, tangent_of(A, B, g), "sylvester")
    assert_close(B.T @ H_B, H_A @ A.T)


@pytest.mark.parametrize("gauge", GAUGES)
def test_descent_equals_captured_energy(gauge):
    A, B, g, s = case = random_case(8, 11, 3, seed=4, s=2.0)
    at, xi = frame_and_tangent(case)
    H_A, H_B = (h / s for h in factor_velocity(A, B, at, xi, gauge))
    slope = (s * B.T @ g * H_A).sum() + (s * g @ A.T * H_B).sum()
    assert slope.item() == pytest.approx(squared_norm(xi).item(), rel=1e-10)


@given(cases())
@settings(deadline=None, max_examples=30)
def test_energy_and_error_from_factors_and_from_the_dense_gradient(case):
    A, B, g, _ = case
    at, xi = frame_and_tangent(case)
    expected = dense.project(A, B, g)
    kappa = (expected.norm() / g.norm()) ** 2
    assert captured_energy(xi, g.norm()).item() == pytest.approx(kappa.item(), rel=1e-10)
    assert dense_captured_energy(at, g).item() == pytest.approx(kappa.item(), rel=1e-10)
    assert alignment_error(xi, g.norm()).item() == pytest.approx(
        (g - expected).norm().item(), abs=1e-7 * float(g.norm())
    )


@given(cases(max_size=7))
@settings(deadline=None, max_examples=25)
def test_metric_projection_equals_least_squares(case):
    A, B, g, _ = case
    generator = torch.Generator().manual_seed(5)
    rows = 0.1 + torch.rand(len(B), dtype=A.dtype, generator=generator)
    columns = 0.1 + torch.rand(A.shape[1], dtype=A.dtype, generator=generator)
    at = frame(A, B)
    xi = project_metric(at, coordinates(at, seen(case)), Metric(rows, columns))
    expected = dense.project_metric(A, B, g, rows, columns)
    assert_close(matrix(at, xi), expected)
    # the same vector whether the gradient or its tangent part is preconditioned, and descent in the metric
    slope = (g * expected).sum()
    assert slope.item() == pytest.approx((rows[:, None] * columns * expected**2).sum().item(), rel=1e-8)


@given(cases())
@settings(deadline=None, max_examples=20)
def test_unit_metric_is_the_plain_projection(case):
    A, B, g, _ = case
    at = frame(A, B)
    unit = Metric(torch.ones(len(B), dtype=A.dtype), torch.ones(A.shape[1], dtype=A.dtype))
    plain = project(at, coordinates(at, seen(case)))
    assert_close(matrix(at, project_metric(at, coordinates(at, seen(case)), unit)), matrix(at, plain))


@given(cases())
@settings(deadline=None, max_examples=30)
def test_second_moments_equal_the_dense_ones(case):
    A, B, g, _ = case
    at = frame(A, B)
    rows, columns = second_moments(at, coordinates(at, seen(case)))
    expected = dense.project(A, B, g).square()
    assert_close(rows, expected.mean(1))
    assert_close(columns, expected.mean(0))


@given(cases())
@settings(deadline=None, max_examples=30)
def test_transport_is_projection(case):
    A, B, g, _ = case
    at = frame(A, B)
    M = dense.project(A, B, g)
    new = random_case(len(B), A.shape[1], len(A), seed=9)
    moved = transport(at, seen(case), new.A, new.B)
    assert_close(moved.A, new.B.T @ M)
    assert_close(moved.B, M @ new.A.T)
    there = frame(new.A, new.B)
    landed = matrix(there, project(there, coordinates(there, moved)))
    assert_close(landed, dense.project(new.A, new.B, M))
    assert landed.norm() <= M.norm() * (1 + 1e-10)


@given(cases())
@settings(deadline=None, max_examples=30)
def test_the_gradient_form_is_a_bijection_on_the_tangent_space(case):
    A, B, g, _ = case
    at = frame(A, B)
    stay = transport(at, seen(case), A, B)
    M = dense.project(A, B, g)
    assert_close(stay.A, B.T @ M)
    assert_close(stay.B, M @ A.T)
    assert_close(matrix(at, project(at, coordinates(at, stay))), M)


def test_changing_the_gauge_changes_nothing():
    A, B, g, _ = random_case(9, 8, 3, seed=6)
    A2, B2 = gauge_transform(A, B, condition=1e3, seed=1)
    assert_close(projected(A2, B2, g), projected(A, B, g))


def test_imbalance():
    A, B, _, _ = random_case(5, 4, 2, seed=0)
    assert_close(imbalance(A, B), B.T @ B - A @ A.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e12])
@pytest.mark.parametrize("which", ["A", "B", "both"])
def test_vanishing_and_huge_factors_have_finite_limits(which, scale, dtype):
    A, B, g, _ = (t.to(dtype) if isinstance(t, torch.Tensor) else t for t in random_case(8, 6, 2, seed=0))
    A = A * scale if which in ("A", "both") else A
    B = B * scale if which in ("B", "both") else B
    at = frame(A, B)
    xi = tangent_of(A, B, g)
    expected = dense.project(A.double(), B.double(), g.double())
    assert_close(matrix(at, xi).double(), expected, 1e-10 if dtype == torch.float64 else 1e-5)
    for gauge in GAUGES:
        assert all(torch.isfinite(h).all() for h in factor_velocity(A, B, at, xi, gauge))
    for kind in ("auto", "svd"):
        assert all(torch.isfinite(f).all() for f in retract(A, B, at, xi, 1e-3, kind))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_factors_beyond_the_range_of_their_square_never_give_nan(scale):
    A, B, g, _ = (t.float() if isinstance(t, torch.Tensor) else t for t in random_case(8, 6, 2, seed=0))
    at = frame(A, B * scale)
    xi = project(at, coordinates(at, Cotangent(scale * B.T @ g, g @ A.T)))
    assert all(torch.isfinite(part).all() for part in (at.U, at.V, *xi))


def test_rank_deficient_factors():
    A, B, g, _ = random_case(8, 6, 3, seed=0)
    A[2] = A[1] + A[0]
    B[:, 0] = 0
    assert_close(projected(A, B, g), dense.project(A, B, g))


def test_a_stack_equals_its_members():
    members = [random_case(7, 5, 2, seed=seed) for seed in range(4)]
    members[2] = members[2]._replace(B=torch.zeros_like(members[2].B))  # one member takes the other branch
    A, B, g = (torch.stack([case[i] for case in members]) for i in range(3))
    at = frame(A, B)
    together = at.U @ tangent_of(A, B, g).K
    for alone, case in zip(together, members, strict=True):
        at = frame(case.A, case.B)
        assert_close(at.U @ tangent_of(case.A, case.B, case.g).K + 1.0, alone + 1.0)


class Shapes(TorchDispatchMode):
    """Records the shape of every tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.seen.add(tuple(tensor.shape[-2:]))
        return result


@pytest.mark.parametrize("kind", ["auto", "orthographic", "svd"])
def test_nothing_large_is_ever_formed(kind):
    m, n, r = 40, 30, 3
    A, B, g, _ = random_case(m, n, r, seed=0)
    gradient = Cotangent(B.T @ g, g @ A.T)
    metric = Metric(torch.ones(m, dtype=A.dtype), torch.ones(n, dtype=A.dtype))
    with Shapes() as shapes:
        at = frame(A, B)
        local = coordinates(at, gradient)
        xi = project(at, local)
        second_moments(at, local)
        for gauge in GAUGES:
            factor_velocity(A, B, at, xi, gauge)
        step = project_metric(at, local, metric)
        new = retract(A, B, at, step, 1e-2, kind)
        transport(at, gradient, *new)
    large = {shape for shape in shapes.seen if len(shape) == 2 and min(shape) > 2 * r}
    assert not large, f"formed {large}"
