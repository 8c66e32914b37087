"""Rank-r matrices: making and cutting them."""

import pytest
import torch

from reproductions.matrix_sensing.low_rank import LowRank, NotFiniteError, Truncation
from reproductions.matrix_sensing.schemes import SCHEMES
from tangora._checks import InputError
from tests.cases import random_case
from tests.reference.dense import truncated_svd
from tests.reproductions.integrate.problems import march, orthonormal, quadratic
from tests.tolerances import assert_close


def with_values(values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    S = torch.tensor(values, dtype=torch.float64).diag()
    k = len(values)
    return LowRank(orthonormal(9, k, generator), S, orthonormal(7, k, generator))


def test_the_product_of_factors():
    A, B, _, _ = random_case(9, 7, 3, seed=0)
    Y = LowRank.from_factors(A, B)
    assert Y.rank == 3
    assert_close(Y.dense(), B @ A, 1e-13)
    assert_close(Y.U.T @ Y.U, torch.eye(3, dtype=A.dtype), 1e-13)


@pytest.mark.parametrize("shape", [(9, 7), (7, 9)])
def test_cut_is_the_truncated_svd(shape):
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = LowRank.from_thin(matrix, torch.eye(shape[1], dtype=matrix.dtype))
    assert_close(whole.cut(Truncation.fixed(3)).dense(), truncated_svd(matrix, 3), 1e-13)


def test_zero_factor_keeps_its_rank():
    A, B, _, _ = random_case(9, 7, 3, seed=0)
    Y = LowRank.from_factors(A, 0 * B)
    assert Y.rank == Y.cut(Truncation.fixed(3)).rank == 3
    assert torch.equal(Y.dense(), torch.zeros_like(B @ A))


@pytest.mark.parametrize(
    ("tolerance", "bounds", "rank"),
    [
        (0.0, {}, 4),  # only the exact zero goes
        (0.09, {}, 4),
        (0.11, {}, 3),
        (0.5, {}, 3),  # 0.5^2 < 0.5^2 + 0.1^2: the tail counts together
        (0.51, {}, 2),
        (1e9, {}, 1),
        (1e9, {"min_rank": 3}, 3),
        (0.0, {"max_rank": 2}, 2),
    ],
)
def test_the_rank_is_the_least_within_the_tolerance(tolerance, bounds, rank):
    Y = with_values([3.0, 2.0, 0.5, 0.1, 0.0])
    cut = Y.cut(Truncation(tolerance, **bounds))
    assert cut.rank == rank
    missed = float((Y.dense() - cut.dense()).norm())
    assert missed <= tolerance + 1e-14 or "max_rank" in bounds
    if rank > bounds.get("min_rank", 1):
        worse = Y.cut(Truncation.fixed(rank - 1))
        assert float((Y.dense() - worse.dense()).norm()) > tolerance or "max_rank" in bounds


def test_small_values_count_in_float32():
    # 1e-5 next to 1 is a rounding error when squares are summed from the largest on
    values = torch.tensor([1.0, 1e-5], dtype=torch.float32)
    assert Truncation(0.9e-5).rank(values) == 2
    assert Truncation(1.1e-5).rank(values) == 1


@pytest.mark.messages
@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"tolerance": -1.0}, "tolerance"),
        ({"min_rank": 0}, "min_rank"),
        ({"max_rank": 2, "min_rank": 3}, "max_rank"),
    ],
)
def test_impossible_rules_are_refused(options, key):
    with pytest.raises(InputError, match=key):
        Truncation(**options)


@pytest.mark.messages
def test_parts_that_do_not_fit_are_refused():
    Y = with_values([2.0, 1.0])
    with pytest.raises(InputError, match="S must"):
        LowRank(Y.U, Y.S[:1], Y.V)


def test_what_is_not_finite_is_not_cut():
    Y = with_values([2.0, float("nan")])
    with pytest.raises(NotFiniteError):
        Y.cut(Truncation())


ADAPTIVE = ["bug", "parallel_bug", "projected_euler"]


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("tolerance", [1.0, 2.0])
def test_a_step_cuts_no_more_than_the_tolerance(name, tolerance):
    p = quadratic(distance=1.0)
    (whole,), (cut,) = (
        SCHEMES[name].step(p.low_rank_field(), (p.start(),), 0.5, truncation=rule).state
        for rule in (Truncation(), Truncation(tolerance))
    )
    assert cut.rank < whole.rank == 6
    assert float((whole.dense() - cut.dense()).norm()) <= tolerance


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("rank", [1, 8], ids=["too small", "too large"])
def test_the_rank_of_the_minimiser_is_found(name, rank):
    generator = torch.Generator().manual_seed(8)
    left, right = orthonormal(12, 4, generator), orthonormal(10, 4, generator)
    target = (left * torch.linspace(3.0, 1.0, 4, dtype=left.dtype)) @ right.T
    values = torch.linspace(2.0, 1.0, rank, dtype=left.dtype)
    start = LowRank(orthonormal(12, rank, generator), values.diag(), orthonormal(10, rank, generator))
    field = quadratic()._replace(target=target).low_rank_field()
    (Y,) = march(name, field, (start,), 0.5, 30.0, truncation=Truncation(0.05))[-1]
    assert Y.rank == 4
    assert float((Y.dense() - target).norm()) < 1e-6
