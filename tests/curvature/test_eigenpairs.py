"""Eigenpairs by Lanczos and power iteration: prescribed spectra, SciPy, and the cases that break naive versions."""

import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh

from tangora import InputError
from tangora.curvature.eigenpairs import select
from tangora.curvature.lanczos import Krylov, lanczos_eigenpairs
from tangora.curvature.power import power_eigenpairs
from tangora.curvature.products import Products
from tests.curvature.spectra import (
    Function,
    Rotated,
    clustered,
    indefinite,
    neural_like,
    orthonormal,
    separated,
    true_residuals,
)
from tests.tolerances import assert_close

SPECTRA = {"separated": separated, "clustered": clustered, "indefinite": indefinite}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("which", "k"), [("largest", 10), ("smallest", 3), ("both", 5), ("magnitude", 6)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_wanted_pairs_are_found_with_their_residuals(spectrum, which, k, dtype):
    operator = Rotated(SPECTRA[spectrum](), dtype=dtype)
    accurate = dtype == torch.float64
    pairs = lanczos_eigenpairs(operator, k, which=which, tol=1e-8 if accurate else 1e-5, max_products=1000)
    assert pairs.converged
    assert pairs.products == operator.num_products
    wanted = operator.values[select(operator.values, k, which)]
    assert (pairs.values - wanted).abs().max() <= (1e-9 if accurate else 5e-5) * operator.values.abs().max()
    assert (pairs.values.diff() <= 0).all()
    assert pairs.values.dtype == torch.float64
    assert pairs.vectors.dtype == dtype
    assert pairs.vectors.shape == (operator.size, k)
    assert orthonormal(pairs.vectors) < (1e-12 if accurate else 2e-6)
    assert (true_residuals(operator, pairs) <= pairs.residuals).all()


def tridiagonalize(operator, start, dimension):
    return Krylov(Products(operator, dimension), dimension, start).tridiagonalize(dimension)


def test_the_residual_bound_holds_before_convergence():
    operator = Rotated(neural_like(1000))
    for products in (12, 16, 20):
        pairs = lanczos_eigenpairs(operator, 10, tol=1e-12, max_products=products)
        assert not pairs.converged
        assert pairs.products == products
        assert_close(true_residuals(operator, pairs), pairs.residuals, 1e-6)


def test_restarts_need_no_larger_basis():
    operator = Rotated(indefinite())
    unrestarted = lanczos_eigenpairs(operator, 4, which="both", tol=1e-9, max_basis=200)
    restarted = lanczos_eigenpairs(operator, 4, which="both", tol=1e-9, max_basis=12, max_products=2000)
    assert unrestarted.converged
    assert restarted.converged
    assert unrestarted.products < restarted.products
    assert_close(restarted.values, operator.values[[0, 1, -2, -1]], 1e-12)
    assert (true_residuals(operator, restarted) <= restarted.residuals).all()


def test_a_long_float32_iteration_shows_no_ghosts():
    # every eigenvalue once: without reorthogonalisation the leading ones come back
    values = torch.cat([torch.arange(10, 21).double(), torch.linspace(0, 1, 489).double()])
    operator = Rotated(values, dtype=torch.float32)
    start = torch.ones(operator.size)
    small = tridiagonalize(operator, start, 120)
    ritz = torch.linalg.eigvalsh(
        torch.diag(small.diagonal) + torch.diag(small.off_diagonal, 1) + torch.diag(small.off_diagonal, -1)
    )
    assert ritz.shape == (120,)
    assert int((ritz > 1.5).sum()) == 11
    assert_close(ritz[-11:].flip(0), operator.values[:11], 1e-6)
    assert orthonormal(small.basis.mT) < 2e-6
    pairs = lanczos_eigenpairs(operator, 11, tol=1e-5, max_products=150)
    assert_close(pairs.values, operator.values[:11], 1e-6)


def test_the_tridiagonal_matrix_is_the_projected_operator():
    operator = Rotated(neural_like(300))
    start = torch.randn(300, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    small = tridiagonalize(operator, start, 30)
    T = torch.diag(small.diagonal) + torch.diag(small.off_diagonal, 1) + torch.diag(small.off_diagonal, -1)
    images = torch.stack([operator @ row for row in small.basis])
    assert_close(small.basis @ images.mT, T, 1e-12)
    assert_close(small.basis[0], start / start.norm(), 1e-14)
    rest = images - T @ small.basis
    assert rest[:-1].abs().max() < 1e-12
    assert float(rest[-1].norm()) == pytest.approx(small.remainder, rel=1e-10)


def test_an_invariant_start_ends_early():
    values, start = torch.arange(40).double(), torch.zeros(40).double()
    start[[3, 7, 20]] = 1.0
    small = tridiagonalize(torch.diag(values), start, 30)
    assert small.diagonal.shape == (3,)
    assert small.remainder == 0.0


def test_all_eigenvalues():
    operator = Rotated(clustered(120))
    pairs = lanczos_eigenpairs(operator, 120)
    assert pairs.converged
    assert pairs.products == 120
    assert_close(pairs.values, operator.values, 1e-12)
    assert (true_residuals(operator, pairs) <= pairs.residuals).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", ["zero", "identity", "low rank", "minus identity"])
@pytest.mark.parametrize("which", ["largest", "smallest", "both", "magnitude"])
def test_invariant_subspaces_are_left_again(case, which, dtype):
    values = {
        "zero": torch.zeros(60),
        "identity": torch.ones(60),
        "minus identity": -torch.ones(60),
        "low rank": torch.tensor([5.0, 5.0, 5.0, 2.0, -3.0, -3.0] + [0.0] * 54),
    }[case]
    operator = Rotated(values, dtype=dtype)
    pairs = lanczos_eigenpairs(operator, 5, which=which, tol=1e-6, max_products=200)
    assert pairs.converged
    found = pairs.values - operator.values[select(operator.values, 5, which)]
    assert found.abs().max() < (1e-12 if dtype == torch.float64 else 1e-5)
    assert orthonormal(pairs.vectors) < (1e-12 if dtype == torch.float64 else 2e-6)
    assert (true_residuals(operator, pairs) <= pairs.residuals + 1e-14).all()


def test_invariant_subspaces_are_left_again_with_a_full_basis():
    values = torch.cat([torch.tensor([5.0] * 4 + [2.0] * 3 + [1.0, 0.5]).double(), torch.zeros(100).double()])
    operator = Rotated(values)
    pairs = lanczos_eigenpairs(operator, 7, tol=1e-9, max_basis=9, max_products=400)
    assert pairs.converged
    assert_close(pairs.values, operator.values[:7], 1e-12)


@pytest.mark.parametrize("max_basis", [None, 16])
def test_copies_that_one_start_cannot_see(max_basis):
    # the bulk keeps the Krylov space from ending
    values = torch.cat(
        [torch.tensor([9.0, 9.0, 9.0, 7.0, 7.0, 5.0]).double(), torch.linspace(-1, 1, 194).double()]
    )
    operator = Rotated(values)
    plain = lanczos_eigenpairs(operator, 3, tol=1e-6, max_products=2000, max_basis=max_basis)
    assert plain.converged
    assert_close(plain.values, torch.tensor([9.0, 7.0, 5.0]).double(), 1e-10)
    for k in (3, 6):
        pairs = lanczos_eigenpairs(operator, k, tol=1e-6, max_products=2000, max_basis=max_basis, copies=True)
        assert pairs.converged
        assert_close(pairs.values, operator.values[:k], 1e-10)
    assert orthonormal(pairs.vectors) < 1e-12
    assert (true_residuals(operator, pairs) <= pairs.residuals).all()


def test_agrees_with_scipy():
    operator = Rotated(neural_like(400))
    linear = LinearOperator(
        (400, 400), matvec=lambda x: (operator @ torch.from_numpy(x).reshape(-1)).numpy(), dtype="float64"
    )
    expected = torch.from_numpy(eigsh(linear, 8, which="LA", tol=1e-10)[0]).flip(0)
    assert_close(lanczos_eigenpairs(operator, 8, tol=1e-8).values, expected, 1e-12)


def test_size_one_and_a_matvec_that_returns_its_argument():
    pairs = lanczos_eigenpairs(torch.eye(1), 1)
    assert pairs.values.tolist() == pytest.approx([1.0])
    pairs = lanczos_eigenpairs(Function(lambda vector: vector, 7), 3)
    assert pairs.values.tolist() == pytest.approx([1.0] * 3)
    assert orthonormal(pairs.vectors) < 1e-6


def test_half_precision_is_computed_around():
    matrix = torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5, 0.0]))
    pairs = lanczos_eigenpairs(Function(lambda x: (matrix @ x.float()).bfloat16(), 5, torch.bfloat16), 2)
    assert pairs.vectors.dtype == torch.bfloat16
    assert (pairs.values - torch.tensor([4.0, 2.0])).abs().max() < 0.05


def test_the_same_seed_gives_the_same_bits_and_leaves_the_global_state():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first, second = (lanczos_eigenpairs(Rotated(separated(200)), 4, seed=5) for _ in range(2))
    assert torch.equal(first.vectors, second.vectors)
    assert torch.equal(first.values, second.values)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_progress_is_told_of_every_product():
    calls = []
    pairs = lanczos_eigenpairs(
        Rotated(separated(100)), 3, max_products=40, progress=lambda *call: calls.append(call)
    )
    assert calls == [("eigenvalues", done, 40) for done in range(1, pairs.products + 1)]
    assert [(one.value, one.residual) for one in pairs.eigenvalues] == list(
        zip(pairs.values.tolist(), pairs.residuals.tolist(), strict=True)
    )


@pytest.mark.messages
@pytest.mark.parametrize("method", [lanczos_eigenpairs, power_eigenpairs])
@pytest.mark.parametrize(
    "options",
    [{"k": 11}, {"k": 0}, {"k": 2, "which": "biggest"}, {"k": 2, "tol": -1.0}, {"k": 2, "max_products": 1}],
)
def test_bad_requests(method, options):
    with pytest.raises(InputError, match=list(options)[-1]):
        method(torch.eye(10), **options)


@pytest.mark.messages
@pytest.mark.parametrize("method", [lanczos_eigenpairs, power_eigenpairs])
def test_bad_products(method):
    with pytest.raises(InputError, match="product 1 is not finite"):
        method(Function(lambda vector: vector / 0, 10), 2)
    with pytest.raises(InputError, match=r"shape \(10,\); got \(3,\)"):
        method(Function(lambda vector: vector[:3], 10), 2)
    with pytest.raises(InputError, match="operator must be a square matrix"):
        method(torch.ones(3, 4), 2)
    with pytest.raises(InputError, match="max_basis"):
        lanczos_eigenpairs(torch.eye(10), 2, max_basis=3)
    with pytest.raises(InputError, match="start"):
        tridiagonalize(torch.eye(10), torch.zeros(10), 2)


def test_an_outlier_at_the_other_end_does_not_end_the_search():
    """After two steps one Ritz value is the negative outlier, the other is in the bulk with a small residual."""
    size = 200_000
    values = torch.zeros(size, dtype=torch.float64)
    values[:2] = torch.tensor([-65.0, 40.0])
    values[2:] = 1e-3 * torch.linspace(-1, 1, size - 2, dtype=torch.float64)
    for seed in range(3):
        found = lanczos_eigenpairs(
            Function(lambda v: values * v, size, torch.float64), 1, tol=1e-2, seed=seed
        )
        assert found.converged
        assert found.values[0] == pytest.approx(40, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("which", ["largest", "smallest", "both", "magnitude"])
def test_power_iteration_finds_the_wanted_pairs(which, dtype):
    values = torch.cat([torch.tensor([4.0, 3.0, 2.0, -6.0, -4.5, -2.5]), torch.linspace(-0.2, 0.2, 94)])
    operator = Rotated(values, dtype=dtype)
    pairs = power_eigenpairs(operator, 3, which=which, tol=1e-6, max_products=3000)
    assert pairs.converged
    assert pairs.products == operator.num_products
    wanted = operator.values[select(operator.values, 3, which)]
    assert_close(pairs.values, wanted, 1e-9 if dtype == torch.float64 else 3e-6)
    assert orthonormal(pairs.vectors) < (1e-12 if dtype == torch.float64 else 1e-6)
    assert (true_residuals(operator, pairs) <= pairs.residuals + 1e-5).all()


def test_after_power_iteration_the_residual_is_that_of_the_returned_vector():
    operator = Rotated(neural_like(500))
    pairs = power_eigenpairs(operator, 4, max_products=30)
    assert not pairs.converged
    assert pairs.products == 30
    assert_close(true_residuals(operator, pairs), pairs.residuals, 1e-10)


def test_lanczos_needs_a_fifth_of_the_products():
    operator = Rotated(neural_like(500))
    pairs = power_eigenpairs(operator, 5, tol=1e-6, max_products=2000)
    lanczos = lanczos_eigenpairs(operator, 5, tol=1e-6)
    assert pairs.converged
    assert lanczos.converged
    assert_close(pairs.values, lanczos.values, 1e-10)
    assert 5 * lanczos.products <= pairs.products


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
@pytest.mark.parametrize("which", ["largest", "smallest", "both", "magnitude"])
def test_power_iteration_on_multiples_of_the_identity(value, which):
    operator = Rotated(torch.full((6,), value))
    pairs = power_eigenpairs(operator, 6, which=which)
    assert pairs.converged
    assert (pairs.values - value).abs().max() < 1e-12
    assert orthonormal(pairs.vectors) < 1e-12


def test_values_of_opposite_signs_and_equal_size_do_not_settle():
    operator = Rotated(torch.tensor([1.0, -1.0, 0.1, 0.0]))
    pairs = power_eigenpairs(operator, 1, max_products=200)
    assert not pairs.converged
    assert pairs.residuals[0] > 0.1


def test_power_iteration_finds_multiple_eigenvalues_as_often_as_they_are():
    operator = Rotated(torch.cat([torch.tensor([3.0, 3.0, 3.0]), torch.linspace(0, 1, 50)]))
    pairs = power_eigenpairs(operator, 3, tol=1e-8)
    assert_close(pairs.values, torch.full((3,), 3.0).double(), 1e-12)
