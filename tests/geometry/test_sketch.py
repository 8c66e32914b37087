"""Randomized factorisations: exact where they must be, within the published bound elsewhere."""

import pytest
import torch

from tangora.geometry.sketch import (
    orthonormalize,
    outside_energy,
    svd_from_one_pass,
    svd_from_range,
)
from tests.tolerances import assert_close


def normal(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_spectrum(m, n, values, seed=0):
    """A random matrix with these singular values."""
    left = torch.linalg.qr(normal(m, len(values), seed=seed)).Q
    right = torch.linalg.qr(normal(n, len(values), seed=seed + 1)).Q
    return (left * values) @ right.T


def dense(svd):
    return (svd.U * svd.S[..., None, :]) @ svd.Vh


def check_orthonormal(svd):
    for frame in (svd.U, svd.Vh.mT):
        eye = torch.eye(frame.shape[-1], dtype=frame.dtype).expand(*frame.shape[:-2], -1, -1)
        assert_close(frame.mT @ frame, eye, 1e-12)
    assert (svd.S.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize(("m", "n"), [(9, 14), (14, 9), (8, 8)])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_both_estimates_are_exact_up_to_the_rank_they_are_given(m, n, rank):
    G = with_spectrum(m, n, torch.linspace(2, 1, rank, dtype=torch.float64))
    omega, psi = normal(n, 5, seed=7), normal(8, m, seed=8)
    basis = orthonormalize(G @ omega)
    for svd in (svd_from_range(basis, basis.T @ G), svd_from_one_pass(G @ omega, psi @ G, psi)):
        assert_close(dense(svd), G, 1e-11)
        check_orthonormal(svd)
        assert_close(svd.S[:rank], torch.linalg.svdvals(G)[:rank], 1e-11)
        assert svd.S[rank:].abs().sum() < 1e-11
        assert_close(dense(svd.truncate(rank)), G, 1e-11)


def test_the_whole_space_is_exact():
    G = normal(6, 9, seed=0)
    basis = orthonormalize(G @ normal(9, 6, seed=1))
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    svd = svd_from_range(basis, basis.T @ G)
    assert_close(svd.S, S, 1e-12)
    assert_close((svd.U * U).sum(0).abs(), torch.ones(6, dtype=torch.float64), 1e-10)
    assert_close((svd.Vh * Vh).sum(1).abs(), torch.ones(6, dtype=torch.float64), 1e-10)


def test_factorisations_are_batched():
    G = torch.stack([with_spectrum(7, 5, torch.tensor([3.0, 1.0]).double(), seed=s) for s in (0, 5)])
    basis = orthonormalize(G @ normal(5, 3, seed=1))
    svd = svd_from_range(basis, basis.mT @ G)
    assert_close(dense(svd), G, 1e-12)
    check_orthonormal(svd)
    energy, error = outside_energy(basis, G @ normal(2, 5, 4, seed=3))
    assert energy.shape == error.shape == (2,)
    assert energy.max() < 1e-24


@pytest.mark.parametrize("tall", ["zero", "repeated", "tiny"])
def test_a_basis_is_orthonormal_whatever_it_must_span(tall):
    if tall == "zero":
        matrix = torch.zeros(8, 3, dtype=torch.float64)
    elif tall == "repeated":
        matrix = normal(8, 1, seed=0).expand(8, 3).contiguous()
    else:
        matrix = 1e-160 * normal(8, 3, seed=0)  # its squares are no longer numbers
    Q = orthonormalize(matrix)
    assert_close(Q.T @ Q, torch.eye(3, dtype=torch.float64), 1e-12)
    assert (matrix - Q @ (Q.T @ matrix)).norm() <= 1e-12 * matrix.norm()


# --- the energy outside ---


def test_outside_energy_is_zero_where_nothing_is_outside():
    G = with_spectrum(12, 10, torch.tensor([4.0, 2.0, 1.0]).double())
    basis = orthonormalize(G @ normal(10, 3, seed=2))
    energy, error = outside_energy(basis, G @ normal(10, 6, seed=3))
    assert energy < 1e-24
    assert error < 1e-24


def test_outside_energy_is_unbiased():
    values = 0.8 ** torch.arange(12, dtype=torch.float64)
    G = with_spectrum(20, 15, values)
    basis = orthonormalize(G @ normal(15, 4, seed=2))
    exact = float((G - basis @ (basis.T @ G)).square().sum())
    energy, error = outside_energy(basis, G @ normal(15, 4000, seed=3))
    assert abs(float(energy) - exact) < 3 * float(error)
    assert float(error) < 0.05 * exact
    few, few_error = outside_energy(basis, G @ normal(15, 8, seed=4))
    assert abs(float(few) - exact) < 4 * float(few_error)
    biased = float((G - basis @ (basis.T @ G)).square().sum()) + float((basis.T @ G).square().sum())
    assert abs(float(energy) - biased) > 30 * float(error), "the bound tells the two energies apart"


def test_a_standard_error_covers_as_often_as_it_should():
    G = with_spectrum(20, 15, 0.8 ** torch.arange(12, dtype=torch.float64))
    basis = orthonormalize(G @ normal(15, 4, seed=2))
    exact = float((G - basis @ (basis.T @ G)).square().sum())
    inside = 0
    for seed in range(100):
        energy, error = outside_energy(basis, G @ normal(15, 16, seed=1000 + seed))
        inside += abs(float(energy) - exact) < 2 * float(error)
    assert 80 <= inside <= 99


# --- the error on average ---


def test_error_keeps_to_the_bound_on_average():
    m, n, r, p, seeds = 40, 30, 6, 8, 20
    values = 0.8 ** torch.arange(n, dtype=torch.float64)
    G = with_spectrum(m, n, values)
    two_pass, one_pass = [], []
    for seed in range(seeds):
        omega, psi = normal(n, r + p, seed=2 * seed), normal(2 * (r + p), m, seed=2 * seed + 1)
        basis = orthonormalize(G @ omega)
        two_pass.append(float((G - dense(svd_from_range(basis, basis.T @ G))).norm()))
        one_pass.append(float((G - dense(svd_from_one_pass(G @ omega, psi @ G, psi))).norm()))
    bound = (1 + r / (p - 1)) ** 0.5 * float(values[r:].square().sum().sqrt())
    optimum = float(values[r + p :].square().sum().sqrt())
    mean_two, mean_one = sum(two_pass) / seeds, sum(one_pass) / seeds
    assert mean_two <= bound
    assert min(two_pass) > 1.5 * optimum, "the bound says something: a random basis is not the best one"
    assert mean_two < mean_one < 2 * mean_two, "one pass costs accuracy, and not much of it"


def test_power_iterations_bring_the_optimum():
    G = with_spectrum(40, 30, 0.8 ** torch.arange(30, dtype=torch.float64))
    k = 14
    optimum = float((0.8 ** torch.arange(k, 30, dtype=torch.float64)).norm())
    right, errors = normal(30, k, seed=0), []
    for _ in range(6):
        basis = orthonormalize(G @ right)
        errors.append(float((G - basis @ (basis.T @ G)).norm()) / optimum)
        right = orthonormalize(G.T @ basis)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1.5
    assert errors[-1] < 1.02
