"""BUG with a truncation tolerance: what is cut, which rank it finds, and that the loss goes down."""

import itertools

import pytest
import torch

from reproductions.matrix_sensing.low_rank import LowRank, Truncation
from reproductions.matrix_sensing.schemes import SCHEMES
from tests.reproductions.integrate.problems import DOUBLE, march, orthonormal, quadratic

STEP = 0.5
ADAPTIVE = ["bug", "parallel_bug", "projected_euler"]


def start(rank, seed=3):
    generator = torch.Generator().manual_seed(seed)
    S = torch.linspace(2.0, 1.0, rank, dtype=DOUBLE).diag()
    return LowRank(orthonormal(12, rank, generator), S, orthonormal(10, rank, generator))


def problem(rank):
    """A quadratic whose minimiser has this rank, with singular values 3 to 1."""
    generator = torch.Generator().manual_seed(8)
    left, right = orthonormal(12, rank, generator), orthonormal(10, rank, generator)
    values = torch.linspace(3.0, 1.0, rank, dtype=DOUBLE)
    return quadratic()._replace(target=(left * values) @ right.T)


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("tolerance", [1.0, 2.0])
def test_a_step_cuts_no_more_than_the_tolerance(name, tolerance):
    p = quadratic(distance=1.0)
    (whole,), (cut,) = (
        SCHEMES[name].step(p.low_rank_field(), (p.start(),), STEP, truncation=rule).state
        for rule in (Truncation(), Truncation(tolerance))
    )
    assert cut.rank < whole.rank == 6
    assert float((whole.dense() - cut.dense()).norm()) <= tolerance


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("rank", [1, 8], ids=["too small", "too large"])
def test_the_rank_of_the_minimiser_is_found(name, rank):
    p = problem(4)
    states = march(name, p.low_rank_field(), (start(rank),), STEP, 60 * STEP, truncation=Truncation(0.05))
    (Y,) = states[-1]
    assert Y.rank == 4
    assert float((Y.dense() - p.target).norm()) < 1e-6


def test_the_largest_rank_is_kept():
    p = problem(4)
    rule = Truncation(0.05, max_rank=3)
    states = march("bug", p.low_rank_field(), (start(1),), STEP, 20 * STEP, truncation=rule)
    ranks = [Y.rank for (Y,) in states]
    assert ranks[0] == 1
    assert max(ranks) == ranks[-1] == 3


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("tolerance", [0.5, 0.05])
@pytest.mark.parametrize("rank", [1, 8])
def test_the_loss_rises_by_no_more_than_the_tolerance_allows(name, tolerance, rank):
    p = quadratic(distance=0.5)
    rule = Truncation(tolerance)
    states = march(name, p.low_rank_field(), (start(rank),), STEP, 30 * STEP, truncation=rule)
    seen = [Y.dense() for (Y,) in states]
    smoothness = float(p.weights.max())
    for before, after in itertools.pairwise(seen):
        # cutting moves the matrix by at most tau, which costs at most |g| tau + (smoothness / 2) tau^2
        slack = float(p.gradient(before).norm()) * tolerance + smoothness / 2 * tolerance**2
        assert float(p.loss(after)) <= float(p.loss(before)) + slack
    if tolerance < 0.1:  # a tolerance above what a step adds outside of U and V keeps the rank as it is
        assert float(p.loss(seen[-1])) < 0.5 * float(p.loss(seen[0]))
