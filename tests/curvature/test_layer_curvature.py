"""Curvature of single layers, against dense blocks."""

import pytest
import torch

from tangora import InputError
from tangora.curvature import Hessian, layer_curvatures
from tests.curvature.models import problem
from tests.curvature.quadratic import Quadratic, symmetric
from tests.reference.curvature import DenseCurvature

LAYOUT = {"first": slice(0, 2), "second": slice(2, 5), "third": slice(5, 6)}


def test_every_number_of_a_layer():
    loss = Quadratic([symmetric(6, 0), symmetric(6, 1)], layout=LAYOUT)
    H = loss.dense()
    layers = layer_curvatures(loss, probes=300)
    values, vectors = torch.linalg.eigh(H)
    assert [layer.name for layer in layers] == list(LAYOUT)
    for layer, part in zip(layers, LAYOUT.values(), strict=True):
        block = H[part, part]
        assert (layer.size, layer.space) == (part.stop - part.start, "weights")
        assert layer.largest.value == pytest.approx(float(torch.linalg.eigvalsh(block)[-1]))
        assert layer.largest.value <= float(values[-1]) + 1e-12  # interlacing
        assert layer.trace.value == pytest.approx(float(block.trace()), abs=4 * layer.trace.standard_error)
        assert (layer.trace.products, layer.trace.samples) == (301, 300)
        assert layer.eigenvector_share == pytest.approx(float(vectors[part, -1].square().sum()))


def test_a_block_diagonal_matrix_has_its_eigenvector_in_one_layer():
    H = torch.block_diag(symmetric(2, 0, low=0.1), 50 * symmetric(3, 1, low=0.1), torch.ones(1, 1))
    calls = []
    layers = layer_curvatures(
        Quadratic([H.double()], layout=LAYOUT),
        probes=2,
        eigenvalues=False,
        progress=lambda *call: calls.append(call),
    )
    assert [layer.eigenvector_share for layer in layers] == pytest.approx([0, 1, 0])
    assert layers[2].trace.standard_error == 0  # the signs of a diagonal cancel
    assert all(layer.largest is None for layer in layers)
    assert calls == [("layers", count, 3) for count in (1, 2, 3)]


@pytest.mark.messages
def test_bad_input():
    with pytest.raises(InputError, match="probes"):
        layer_curvatures(Quadratic([symmetric(6, 0)], layout=LAYOUT), probes=1)


@pytest.mark.parametrize("over", ["factors", "tangent", "weights"])
def test_layers_of_a_model(over):
    found = problem("bert", r=1, target_modules=["query", "value"])
    operator = Hessian(found.model, found.batches, over=over)
    layers = layer_curvatures(operator, probes=30, tol=1e-6)
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
    vectors = torch.linalg.eigh(matrix).eigenvectors
    assert [layer.name for layer in layers] == list(parts)
    for layer in layers:
        part = parts[layer.name]
        block = matrix[part, part]
        assert layer.largest.value == pytest.approx(float(torch.linalg.eigvalsh(block)[-1]), rel=1e-6)
        assert layer.trace.value == pytest.approx(float(block.trace()), abs=4 * layer.trace.standard_error)
        assert layer.eigenvector_share == pytest.approx(float(vectors[part, -1].square().sum()), abs=1e-5)
