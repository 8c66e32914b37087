"""Curvature of single layers, against dense blocks."""

import itertools

import pytest
import torch
from tangora.curvature.blocks import block_statistics, block_traces, effective_number, vector_shares

from tangora import InputError
from tangora.curvature import Hessian
from tests.curvature.models import problem
from tests.curvature.quadratic import Quadratic, symmetric, vector
from tests.reference.curvature import DenseCurvature

LAYOUT = {"first": slice(0, 2), "second": slice(2, 5), "third": slice(5, 6)}


def test_traces_of_all_blocks_from_the_same_products():
    """The mean over all sign vectors there are is the expectation itself."""
    H = symmetric(6, 0)
    found = dict.fromkeys(LAYOUT, 0.0)
    for signs in itertools.product((-1.0, 1.0), repeat=6):
        z = torch.tensor(signs, dtype=torch.float64)
        for name, value in block_traces(z, H @ z, LAYOUT).items():
            found[name] += value / 64
    for name, part in LAYOUT.items():
        assert found[name] == pytest.approx(float(H[part, part].trace()), abs=1e-12)


def test_every_number_of_a_layer():
    loss = Quadratic([symmetric(6, 0), symmetric(6, 1)], layout=LAYOUT)
    H = loss.dense()
    blocks = block_statistics(loss, probes=300, top=2)
    values, vectors = torch.linalg.eigh(H)
    assert blocks.eigenvalues == pytest.approx((float(values[-1]), float(values[-2])))
    for name, part in LAYOUT.items():
        layer = blocks.layers[name]
        assert layer.size == part.stop - part.start
        assert layer.top_eigenvalue == pytest.approx(float(torch.linalg.eigvalsh(H[part, part])[-1]))
        assert layer.top_eigenvalue <= blocks.eigenvalues[0] + 1e-12  # interlacing
        assert layer.trace == pytest.approx(float(H[part, part].trace()), abs=4 * layer.trace_error)
        assert layer.trace_share == pytest.approx(layer.trace / blocks.trace)
        shares = [float(vectors[part, -1 - index].square().sum()) for index in range(2)]
        assert layer.eigenvector_shares == pytest.approx(shares)
    assert sum(layer.trace for layer in blocks.layers.values()) == pytest.approx(blocks.trace)
    assert blocks.trace == pytest.approx(float(H.trace()), abs=4 * blocks.trace_error)
    assert list(blocks.layers) == list(LAYOUT)
    assert blocks.products == 301
    assert blocks.block_products == 3


def test_a_block_diagonal_matrix_has_its_eigenvector_in_one_layer():
    H = torch.block_diag(symmetric(2, 0, low=0.1), 50 * symmetric(3, 1, low=0.1), torch.ones(1, 1))
    blocks = block_statistics(Quadratic([H.double()], layout=LAYOUT), probes=2)
    assert blocks.layers["second"].eigenvector_shares[0] == pytest.approx(1)
    assert blocks.effective_layers[0] == pytest.approx(1)
    assert blocks.layers["second"].top_eigenvalue == pytest.approx(blocks.eigenvalues[0])
    assert blocks.layers["third"].trace_error == 0  # the signs of a diagonal cancel


def test_effective_number_of_layers():
    shares = torch.tensor([[1.0, 0.25], [0.0, 0.25], [0.0, 0.25], [0.0, 0.25]], dtype=torch.float64)
    assert effective_number(shares) == pytest.approx((1, 4))


def test_shares_do_not_depend_on_length():
    v = vector(6, 0)[:, None]
    one, other = vector_shares(v, LAYOUT), vector_shares(-7 * v, LAYOUT)
    assert sum(float(share) for share in one.values()) == pytest.approx(1)
    assert all(float(one[name]) == pytest.approx(float(other[name])) for name in LAYOUT)


def test_without_eigenvalues_of_blocks():
    seen = []
    blocks = block_statistics(
        Quadratic([symmetric(6, 0)], layout=LAYOUT), probes=2, eigenvalues=False, progress=seen.append
    )
    assert all(layer.top_eigenvalue is None for layer in blocks.layers.values())
    assert blocks.block_products == 0
    assert seen == list(LAYOUT)
    assert blocks.to_dict()["layers"]["third"]["size"] == 1


@pytest.mark.messages
def test_bad_input():
    loss = Quadratic([symmetric(6, 0)], layout=LAYOUT)
    with pytest.raises(InputError, match=r"probes must be a number in \[2"):
        block_statistics(loss, probes=1)
    with pytest.raises(InputError, match=r"top must be a number in \[1"):
        block_statistics(loss, top=0)


@pytest.mark.parametrize("over", ["factors", "tangent", "weights"])
def test_layers_of_a_model(over):
    found = problem("bert", r=1, target_modules=["query", "value"])
    operator = Hessian(found.model, found.batches, over=over)
    blocks = block_statistics(operator, probes=30, tol=1e-6)
    dense = DenseCurvature(found.model, found.batches)
    if over == "factors":
        matrix, parts = dense.factor_hessian, {
            name: slice(A.start, B.stop) for name, (A, B) in dense.factor_slices().items()
        }  # fmt: skip
    else:
        matrix, parts = (
            dense.tangent_hessian if over == "tangent" else dense.weight_hessian,
            dense.weight_slices(),
        )
    values, vectors = torch.linalg.eigh(matrix)
    assert blocks.eigenvalues == pytest.approx((float(values[-1]),), rel=1e-6)
    assert list(blocks.layers) == list(parts)
    for name, layer in blocks.layers.items():
        block = matrix[parts[name], parts[name]]
        assert layer.top_eigenvalue == pytest.approx(float(torch.linalg.eigvalsh(block)[-1]), rel=1e-6)
        assert layer.trace == pytest.approx(float(block.trace()), abs=4 * layer.trace_error)
        share = float(vectors[parts[name], -1].square().sum())
        assert layer.eigenvector_shares == pytest.approx((share,), abs=1e-5)
