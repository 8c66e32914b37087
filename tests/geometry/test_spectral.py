"""The spectral direction against dense alternating projections and the SVD; its limits; its polynomials."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tangora.geometry import spectral
from tangora.geometry.spectral import polar, spectral_direction
from tangora.geometry.tangent import Cotangent, frame
from tests.cases import cases, gauge_transform, random_case
from tests.reference import dense
from tests.tolerances import assert_close


def direction(A, B, M, iterations=1):
    at = frame(A, B)
    xi = spectral_direction(at, Cotangent(B.mT @ M, M @ A.mT), iterations)
    return at.U @ xi.K + xi.J @ at.V


def with_values(values, seed=0, dtype=torch.float64):
    """A square matrix with these singular values, and its polar factor."""
    generator = torch.Generator().manual_seed(seed)
    size = len(values)
    P, Q = (
        torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0]
        for _ in range(2)
    )
    return ((P * values) @ Q).to(dtype), P @ Q


@given(cases(), st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_equals_dense_alternating_projections(case, iterations):
    A, B, g, _ = case
    assert_close(direction(A, B, g, iterations), dense.spectral_direction(A, B, g, iterations))


@pytest.mark.parametrize(("iterations", "low", "high"), [(1, 0.7, 1.2), (4, 0.95, 1.05)])
def test_singular_values_are_close_to_one(iterations, low, high):
    for seed in range(5):
        A, B, g, _ = random_case(40, 30, 4, seed)
        values = torch.linalg.svdvals(direction(A, B, g, iterations))
        assert values[7] > low
        assert values[0] < high
        assert values[8] < 1e-10


@pytest.mark.parametrize("iterations", [1, 3])
def test_float32_is_close_to_the_dense_direction(iterations):
    for seed in range(5):
        A, B, g, _ = random_case(40, 30, 8, seed)
        fast = direction(A.float(), B.float(), g.float(), iterations).double()
        assert_close(fast, dense.spectral_direction(A, B, g, iterations), 1e-3)


@pytest.mark.parametrize("condition", [1.0, 10.0, 1e3])
def test_does_not_depend_on_the_gauge(condition):
    A, B, g, _ = random_case(9, 12, 3, 0)
    other_A, other_B = gauge_transform(A, B, condition, seed=1)
    assert_close(direction(other_A, other_B, g, 2), direction(A, B, g, 2), 1e-9)


@pytest.mark.parametrize(("m", "n"), [(4, 7), (7, 4), (5, 5)])
def test_full_rank_is_muon_on_the_weights(m, n):
    A, B, g, _ = random_case(m, n, min(m, n), 0)
    assert_close(direction(A, B, g), dense.msign(g))


def test_a_zero_factor_leaves_the_polar_factor_of_the_others_gradient():
    A, B, g, _ = random_case(9, 12, 3, 0)
    P_A, P_B = dense.projectors(A, B)
    assert_close(direction(A, 0 * B, g), dense.msign(g @ P_A))
    assert_close(direction(0 * A, B, g), dense.msign(P_B @ g))
    assert direction(0 * A, 0 * B, g).eq(0).all()


@pytest.mark.parametrize("lost", ["A", "B", "both"])
def test_rank_deficient_factors(lost):
    A, B, g, _ = random_case(9, 12, 4, 0)
    if lost != "B":
        A[1] = A[0]
    if lost != "A":
        B[:, 2] = 0
    assert_close(direction(A, B, g, 2), dense.spectral_direction(A, B, g, 2), 1e-8)


@pytest.mark.parametrize(("m", "n", "r"), [(3, 12, 5), (12, 3, 5), (3, 3, 8), (1, 1, 2)])
def test_ranks_above_the_size_of_the_layer(m, n, r):
    generator = torch.Generator().manual_seed(0)
    A, B, g = (
        torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((r, n), (m, r), (m, n))
    )
    assert_close(direction(A, B, g), dense.msign(g), 1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [-30, -12, 12, 30])
def test_the_size_of_the_gradient_does_not_matter(dtype, exponent):
    A, B, g, _ = (
        part.to(dtype) if isinstance(part, torch.Tensor) else part for part in random_case(9, 12, 3, 0)
    )
    at = frame(A, B)
    seen = Cotangent(B.mT @ g, g @ A.mT)
    xi = spectral_direction(at, seen)
    scaled = spectral_direction(at, type(seen)(*(10.0**exponent * part for part in seen)))
    for one, other in zip(xi, scaled, strict=True):
        assert_close(other, one, 1e-4 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_gradient_is_no_direction(dtype):
    A, B, g, _ = random_case(9, 12, 3, 0)
    assert direction(A.to(dtype), B.to(dtype), 0 * g.to(dtype)).eq(0).all()


def test_stacks_are_stepped_as_their_members():
    members = [random_case(9, 12, 3, seed) for seed in range(3)]
    members[1].B.zero_()
    A, B, g = (torch.stack([getattr(case, key) for case in members]) for key in "ABg")
    for index, one in enumerate(direction(A, B, g, 2)):
        assert_close(one, direction(A[index], B[index], g[index], 2))


@pytest.mark.parametrize(("dtype", "lowest"), [(torch.float32, 1e-2), (torch.float64, 1e-6)])
@pytest.mark.parametrize("size", [2, 16, 64])
def test_polar_factor_of_matrices_of_any_condition(dtype, lowest, size):
    matrix, expected = with_values(
        torch.logspace(0, torch.tensor(lowest).log10(), size, dtype=torch.float64), dtype=dtype
    )
    assert_close(polar(matrix).double(), expected, 1e-4 if dtype == torch.float32 else 1e-9)


def test_weak_directions_grow_and_none_is_moved_further_than_the_strong_ones():
    matrix, _ = with_values(torch.logspace(0, -9, 10, dtype=torch.float64), dtype=torch.float32)
    values = torch.linalg.svdvals(polar(matrix).double())
    assert values.max() < 1.001
    assert (values >= torch.logspace(3, -6, 10, dtype=torch.float64).clamp(max=0.999)).all()


@pytest.mark.parametrize("weak", [0.7340575, 0.7340582, 0.7340590, 0.1764868])
def test_no_singular_value_escapes(weak):
    # where each polynomial takes the end of its interval to the end of the next one's, rounding grew by 13 a step
    for size in (1.96, 1.98, 2.0, 2.02):
        matrix = torch.diag(torch.tensor([1.0, 0.5, 0.3783, 0.2], dtype=torch.float64))
        for _ in range(200):
            matrix[2, 2] = weak * (matrix**4).sum() ** 0.25 / size
        assert torch.linalg.matrix_norm(polar(matrix), 2) < 1 + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_values_of_many_matrices_stay_below_one(dtype):
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(20_000, 4, 4, dtype=torch.float64, generator=generator).to(dtype)
    assert torch.linalg.matrix_norm(polar(matrices).double(), 2).max() < 1 + 1e-5


def test_the_direction_of_the_smallest_gradients_is_finite():
    A, B, g, _ = random_case(9, 12, 3, 0)
    A, B, g = A.float(), B.float(), g.float()
    for exponent in (-34, -38, -42, -45):
        small = 10.0**exponent * g
        assert direction(A, B, small).isfinite().all()


def test_products_of_a_program_in_half_precision_do_not_matter():
    matrix, expected = with_values(torch.logspace(0, -2, 16, dtype=torch.float64), dtype=torch.float32)
    torch.set_float32_matmul_precision("medium")
    try:
        assert_close(polar(matrix).double(), expected, 1e-4)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def best_quintic(low, high):
    """Remez: the odd polynomial of degree five that is nearest to one on [low, high]."""
    x = torch.tensor([low, 0.75 * low + 0.25 * high, 0.25 * low + 0.75 * high, high], dtype=torch.float64)
    for _ in range(100):
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        a, b, c, error = torch.linalg.solve(
            torch.stack([x, x**3, x**5, signs], 1), torch.ones(4, dtype=torch.float64)
        )
        root = (9 * b**2 - 20 * a * c).sqrt()
        x[1], x[2] = ((-3 * b - root) / (10 * c)).sqrt(), ((-3 * b + root) / (10 * c)).sqrt()
        x[1:3] = x[1:3].sort().values
    return (a, b, c), error.abs()


def test_each_polynomial_is_the_best_on_the_interval_that_the_last_one_leaves():
    low, high = 2e-7, 2.0
    for row in spectral._POLAR_EXPRESS[:-2]:
        (a, b, c), error = best_quintic(low, high)
        assert torch.tensor(row) == pytest.approx([float(a), float(b), float(c)], abs=1e-6)
        low, high = float(1 - error), float(1 + error)


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9")
def test_torchs_new_switches_of_precision_do_not_matter_either():
    matrix, expected = with_values(torch.logspace(0, -2, 16, dtype=torch.float64), dtype=torch.float32)
    switches = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [each.fp32_precision for each in switches]
    try:
        switches[0].fp32_precision, switches[1].fp32_precision = "tf32", "bf16"
        assert_close(polar(matrix).double(), expected, 1e-4)
        assert [each.fp32_precision for each in switches] == ["tf32", "bf16"]
    finally:
        for each, precision in zip(switches, before, strict=True):
            each.fp32_precision = precision
