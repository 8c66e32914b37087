"""Power iteration with deflation: the same answers as Lanczos, for more products."""

import pytest
import torch

from tangora import InputError
from tangora.curvature.eigenpairs import select
from tangora.curvature.lanczos import lanczos_eigenpairs
from tangora.curvature.power import power_eigenpairs
from tests.curvature.spectra import Rotated, neural_like, orthonormal, separated
from tests.tolerances import assert_close


def eigenpairs(operator, k, **options):
    return power_eigenpairs(operator, operator.size, k, dtype=operator.dtype, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("which", ["largest", "smallest", "both", "magnitude"])
def test_the_wanted_pairs_are_found(which, dtype):
    values = torch.cat([torch.tensor([4.0, 3.0, 2.0, -6.0, -4.5, -2.5]), torch.linspace(-0.2, 0.2, 94)])
    operator = Rotated(values, dtype=dtype)
    pairs = eigenpairs(operator, 3, which=which, tol=1e-6, max_products=3000)
    assert pairs.converged
    assert pairs.products == operator.products
    wanted = operator.values[select(operator.values, 3, which)]
    assert_close(pairs.values, wanted, 1e-9 if dtype == torch.float64 else 3e-6)
    assert orthonormal(pairs.vectors) < (1e-12 if dtype == torch.float64 else 1e-6)
    images = torch.stack([operator(vector.contiguous()) for vector in pairs.vectors.mT], 1)
    residuals = (images - pairs.vectors * pairs.values.to(dtype)).double().norm(dim=0)
    assert (residuals <= pairs.residuals + 1e-5).all()


def test_the_residual_is_that_of_the_returned_vector():
    operator = Rotated(neural_like(500))
    pairs = eigenpairs(operator, 4, max_products=30)
    assert not pairs.converged
    assert pairs.products == 30
    images = torch.stack([operator(vector.contiguous()) for vector in pairs.vectors.mT], 1)
    assert_close((images - pairs.vectors * pairs.values).norm(dim=0), pairs.residuals, 1e-10)


def test_lanczos_needs_a_fifth_of_the_products():
    operator = Rotated(neural_like(500))
    pairs = eigenpairs(operator, 5, tol=1e-6, max_products=2000)
    lanczos = lanczos_eigenpairs(operator, 500, 5, tol=1e-6, dtype=operator.dtype)
    assert pairs.converged
    assert lanczos.converged
    assert_close(pairs.values, lanczos.values, 1e-10)
    assert 5 * lanczos.products <= pairs.products


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
@pytest.mark.parametrize("which", ["largest", "smallest", "both", "magnitude"])
def test_multiples_of_the_identity(value, which):
    operator = Rotated(torch.full((6,), value))
    pairs = eigenpairs(operator, 6, which=which)
    assert pairs.converged
    assert (pairs.values - value).abs().max() < 1e-12
    assert orthonormal(pairs.vectors) < 1e-12


def test_values_of_opposite_signs_and_equal_size_do_not_settle():
    operator = Rotated(torch.tensor([1.0, -1.0, 0.1, 0.0]))
    pairs = eigenpairs(operator, 1, max_products=200)
    assert not pairs.converged
    assert pairs.residuals[0] > 0.1


def test_multiple_eigenvalues_are_found_as_often_as_they_are():
    operator = Rotated(torch.cat([torch.tensor([3.0, 3.0, 3.0]), torch.linspace(0, 1, 50)]))
    pairs = eigenpairs(operator, 3, tol=1e-8)
    assert_close(pairs.values, torch.full((3,), 3.0).double(), 1e-12)


def test_the_start_is_used_and_progress_told():
    operator, heard = Rotated(separated(100)), []
    vector = torch.linalg.eigh(operator.dense()).eigenvectors[:, -1]
    pairs = eigenpairs(operator, 1, start=vector, progress=lambda *counts: heard.append(counts))
    assert pairs.products == 1
    assert heard == [(1, 200)]


@pytest.mark.messages
def test_bad_requests():
    with pytest.raises(InputError, match="k must be at most the dimension of the operator, 4; got 5"):
        power_eigenpairs(lambda vector: vector, 4, 5)
    with pytest.raises(InputError, match="start must be a finite vector"):
        power_eigenpairs(lambda vector: vector, 4, 1, start=torch.zeros(4))
    with pytest.raises(InputError, match="not finite"):
        power_eigenpairs(lambda vector: vector * torch.nan, 4, 1)
