"""Noise between mini-batches, against dense matrices."""

import itertools

import pytest
import torch

from tangora import InputError
from tangora.curvature import Hessian
from tangora.curvature.batch_noise import batch_statistics, distances, subspace_overlap
from tests.curvature.models import problem
from tests.curvature.quadratic import Quadratic, symmetric, vector
from tests.reference.curvature import DenseCurvature

SIZE, WEIGHTS = 6, [1.0, 3.0, 2.0, 2.0]


def quadratic(weights=WEIGHTS, size=SIZE):
    count = len(weights)
    return Quadratic(
        [symmetric(size, seed) for seed in range(count)],
        [vector(size, 10 + seed) for seed in range(count)],
        weights=weights,
    )


def shares(weights=WEIGHTS):
    weights = torch.tensor(weights, dtype=torch.float64)
    return weights / weights.sum()


def dense_distances(loss):
    mean = loss.dense()
    return torch.stack([(matrix - mean).square().sum() for matrix in loss.matrices])


def test_distances_are_unbiased():
    """The mean over all sign vectors there are is the expectation itself."""
    loss = quadratic()
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=SIZE)), dtype=torch.float64)
    products = [signs @ matrix for matrix in loss.matrices]
    found = distances(products, shares()).mean(1)
    torch.testing.assert_close(found, dense_distances(loss), rtol=1e-12, atol=0)


def test_equal_batches_are_at_no_distance():
    """Shared vectors: what all batches have in common cancels before it is squared, vector by vector."""
    matrix = 1e6 * symmetric(SIZE, 0)
    noise = batch_statistics(Quadratic([matrix] * 3, [vector(SIZE, 1)] * 3), probes=2)
    assert noise.variance.value <= 1e-12  # of numbers near 1e13
    assert noise.overlap == pytest.approx(1)
    assert noise.largest.deviation == pytest.approx(0, abs=1e-6)
    assert noise.batches[0].trace.standard_error > 1


def test_variance_of_batches_of_different_sizes_is_unbiased():
    """A batch of n examples has variance s2 / n; what is reported is that of a batch of mean size."""
    sizes = [2, 6, 4]
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(4000):
        # diagonal "Hessians" of single examples: for these one sign vector gives the norm exactly
        batches = [torch.randn(n, 5, generator=generator, dtype=torch.float64).mean(0) for n in sizes]
        products = [batch[None] for batch in batches]
        weights = shares([float(n) for n in sizes])
        found.append(1.5 * float(weights @ distances(products, weights)[:, 0]))
    found = torch.tensor(found)
    error = float(found.std()) / len(found) ** 0.5
    assert float(found.mean()) == pytest.approx(5 / 4, abs=3 * error)
    assert error < 0.02


def test_every_number_of_a_batch():
    loss = quadratic()
    noise = batch_statistics(loss, probes=400, top=2, seed=1)
    mean = loss.dense()
    torch.testing.assert_close(
        torch.tensor([batch.weight for batch in noise.batches], dtype=torch.float64), shares()
    )
    for batch, matrix, g in zip(noise.batches, loss.matrices, loss.gradients, strict=True):
        assert batch.largest.value == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]))
        trace = batch.trace
        assert trace.value == pytest.approx(float(matrix.trace()), abs=4 * trace.standard_error)
        assert batch.directional == pytest.approx(float(g @ matrix @ g / (g @ g)))
    assert noise.whole.value == pytest.approx(float(torch.linalg.eigvalsh(mean)[-1]))
    assert noise.trace.mean == pytest.approx(float(mean.trace()), abs=4 * trace.standard_error)
    variance = 4 / 3 * float(shares() @ dense_distances(loss))
    assert noise.variance.value == pytest.approx(variance, abs=4 * noise.variance.standard_error)
    # each batch is one step of SGD
    directional = [batch.directional for batch in noise.batches]
    assert noise.batch_sharpness == pytest.approx(sum(directional) / 4)
    vectors = [torch.linalg.eigh(matrix).eigenvectors[:, -2:] for matrix in loss.matrices]
    overlaps = [subspace_overlap(one, other) for one, other in itertools.combinations(vectors, 2)]
    assert noise.overlap == pytest.approx(sum(overlaps) / 6)
    assert noise.chance_overlap == 2 / SIZE


def test_batches_are_sharper_than_their_mean():
    noise = batch_statistics(quadratic(), probes=2)
    assert noise.whole.value <= noise.largest.mean
    assert noise.largest.deviation > 0


def test_the_same_seed_gives_the_same_numbers_and_progress_counts_batches():
    calls = []
    one, other, third = (
        batch_statistics(quadratic(), probes=4, seed=seed, progress=lambda *call: calls.append(call))
        for seed in (5, 5, 6)
    )
    assert one == other
    assert one.trace != third.trace
    assert calls[:4] == [("mini-batches", count, 4) for count in range(1, 5)]


def test_a_batch_without_labels_counts_for_nothing():
    with_empty, without = quadratic([*WEIGHTS, 0.0]), quadratic()
    with_empty.matrices = [*without.matrices, torch.full((SIZE, SIZE), torch.nan, dtype=torch.float64)]
    with_empty.dense = without.dense
    assert batch_statistics(with_empty, probes=3) == batch_statistics(without, probes=3)


def test_a_gradient_of_zero_has_no_direction():
    noise = batch_statistics(Quadratic([symmetric(4, 0), symmetric(4, 1)]), probes=2)
    assert noise.batch_sharpness is None
    assert noise.batches[0].directional is None


def test_overlap_of_subspaces():
    eye = torch.eye(5, dtype=torch.float64)
    assert subspace_overlap(eye[:, :2], eye[:, :2]) == 1
    assert subspace_overlap(eye[:, :2], eye[:, 3:]) == 0
    angle = torch.tensor(0.3, dtype=torch.float64)
    turned = angle.cos() * eye[:, :1] + angle.sin() * eye[:, 4:]
    assert subspace_overlap(eye[:, :1], turned) == pytest.approx(float(angle.cos() ** 2))


@pytest.mark.messages
def test_bad_input():
    with pytest.raises(InputError, match="at least two batches with labels; got 1"):
        batch_statistics(quadratic([1.0]))
    for options in ({"probes": 1}, {"top": 0}):
        with pytest.raises(InputError, match=next(iter(options))):
            batch_statistics(quadratic(), **options)


@pytest.mark.parametrize("over", ["factors", "tangent"])
def test_batches_of_a_model(over):
    found = problem("bert", batches=3, r=1, target_modules=["query", "value"])
    operator = Hessian(found.model, found.batches, over=over)
    noise = batch_statistics(operator, probes=24, tol=1e-6)
    assert [batch.weight for batch in noise.batches] == pytest.approx([2 / 9, 3 / 9, 4 / 9])
    matrices = []
    for batch, data in zip(noise.batches, found.batches, strict=True):
        dense = DenseCurvature(found.model, [data])
        matrix = dense.factor_hessian if over == "factors" else dense.tangent_hessian
        gradient = dense.factor_gradient if over == "factors" else dense.projector @ dense.weight_gradient
        assert batch.largest.value == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-6)
        trace = batch.trace
        assert trace.value == pytest.approx(float(matrix.trace()), abs=4 * trace.standard_error)
        expected = gradient @ matrix @ gradient / gradient.square().sum()
        assert batch.directional == pytest.approx(float(expected))
        matrices.append(matrix)
    dense = Quadratic(matrices, weights=[2.0, 3.0, 4.0])
    away = dense_distances(dense)
    expected = 3 / 2 * float(shares([2.0, 3.0, 4.0]) @ away)
    assert noise.variance.value == pytest.approx(expected, abs=4 * noise.variance.standard_error)
    assert noise.variance.standard_error < expected
