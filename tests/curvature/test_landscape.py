"""Landscapes: exact parabolas on quadratics; second differences and untouched weights on real models."""

import math

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from tangora import InputError
from tangora.adapters import find_pairs
from tangora.curvature import Hessian
from tangora.curvature.landscape import landscape
from tests.curvature.models import FLOAT64, change_gauge, problem
from tests.curvature.quadratic import Quadratic, symmetric, vector


def hessian(name, over, **config):
    found = problem(name, **config)
    return Hessian(found.model, found.batches, over=over, loss_fn=found.loss_fn)


def test_an_exact_parabola_along_an_eigenvector():
    loss = Quadratic([symmetric(7, 0)])
    found = landscape(loss, "eigenvectors", span=3.0, points=9)
    (t,) = found.coordinates
    top = float(torch.linalg.eigvalsh(loss.dense())[-1])
    torch.testing.assert_close(found.losses, loss.loss() + top * t**2 / 2)
    assert found.curvatures == pytest.approx((top,))
    assert found.slopes == pytest.approx((0,), abs=1e-12)
    assert found.norms == pytest.approx((1,))
    assert found.names == ("eigenvector 1",)
    assert [float(t[0]), float(t[4]), float(t[-1])] == [-3, 0, 3]
    assert float(found.losses[4]) == found.loss == loss.loss()


@pytest.mark.parametrize("kind", ["eigenvectors", "gradient", "random"])
def test_a_plane_is_an_exact_paraboloid_in_distances(kind):
    loss = Quadratic([symmetric(7, 0)], [vector(7, 1)])
    found = landscape(loss, kind, span=2.0, points=5, dimensions=2, seed=3)
    assert found.losses.shape == (5, 5)
    t, u = (values for values in found.coordinates)
    (a, b), (c, d) = found.slopes, found.curvatures
    along = loss.loss() + a * t[:, None] + b * u + c * t[:, None] ** 2 / 2 + d * u**2 / 2
    mixed = found.losses - along
    # what is left is one bilinear term; between eigenvectors there is none
    torch.testing.assert_close(mixed, mixed[0, 0] / 4 * t[:, None] * u, rtol=0, atol=1e-12)
    assert (abs(float(mixed[0, 0])) < 1e-12) == (kind == "eigenvectors")
    assert found.norms == pytest.approx((1, 1))
    if kind == "gradient":
        assert found.names == ("gradient", "eigenvector 1 without gradient")
        assert found.slopes == pytest.approx((float(loss.gradient().norm()), 0), abs=1e-12)


def test_vectors_are_taken_as_they_are():
    loss, way = Quadratic([symmetric(5, 0)], [vector(5, 1)]), 4 * vector(5, 2)
    found = landscape(loss, {"to the other end": way}, points=3)
    assert found.names == ("to the other end",)
    assert found.losses.tolist() == pytest.approx([loss.loss_at(-way), loss.loss(), loss.loss_at(way)])
    assert landscape(loss, way, points=3).losses.equal(found.losses)
    assert landscape(loss, [way, way], points=3).losses.shape == (3, 3)


@pytest.mark.parametrize("over", ["factors", "tangent", "weights"])
@pytest.mark.parametrize("name", FLOAT64)
def test_second_differences_are_the_curvature(name, over):
    operator = hessian(name, over)
    step = 5e-4
    found = landscape(operator, "gradient", span=2 * step, points=5)
    assert float(found.losses[2]) == found.loss
    # differences of fourth order; rounding of 1e-16 / step**2 remains
    second = found.losses @ torch.tensor([-1, 16, -30, 16, -1], dtype=torch.float64) / (12 * step**2)
    first = found.losses @ torch.tensor([1, -8, 0, 8, -1], dtype=torch.float64) / (12 * step)
    assert float(second) == pytest.approx(found.curvatures[0], rel=1e-5, abs=1e-7)
    assert float(first) == pytest.approx(found.slopes[0], rel=1e-6)


class Wall(Quadratic):
    def loss_at(self, displacement):
        return math.inf if float(displacement.norm()) > 1.5 else super().loss_at(displacement)


def test_losses_that_are_not_finite_are_recorded_and_told():
    with pytest.warns(UserWarning, match="2 of 5 losses are not finite: use a smaller span than 2"):
        found = landscape(Wall([symmetric(3, 0)]), "random", span=2.0, points=5)
    assert found.non_finite == 2
    assert found.losses.isinf().tolist() == [True, False, False, False, True]


def filter_direction(operator, monkeypatch):
    """The direction that a landscape of filters goes along: where its loss was evaluated last."""
    places = []
    monkeypatch.setattr(type(operator), "loss_at", lambda self, place: places.append(place) or 0.0)
    landscape(operator, "filter", points=3)
    return operator.space.to_dict(places[-2])


@pytest.mark.parametrize("name", [*FLOAT64, "embedding"])
def test_filters_of_an_adapted_model_are_rows_of_its_weights(name, monkeypatch):
    """GPT-2 stores its weights transposed, and so does an embedding."""
    operator = (
        hessian("bert", "weights", target_modules=["query", "word_embeddings"])
        if name == "embedding"
        else hessian(name, "weights")
    )
    parts = filter_direction(operator, monkeypatch)
    for pair in find_pairs(operator.model):
        weight = pair.layer.get_base_layer().weight.detach()
        weight = (weight.T if pair.transposed else weight) + pair.delta_weight()
        found = parts[pair.name].T if pair.transposed else parts[pair.name]
        assert found.shape == weight.shape
        torch.testing.assert_close(found.norm(dim=1), weight.norm(dim=1))


def test_filters_are_the_same_in_every_gauge():
    one, other = hessian("mlp", "weights"), hessian("mlp", "weights")
    change_gauge(find_pairs(other.model), condition=100.0)
    first, second = (landscape(each, "filter", span=0.5, points=5, seed=2) for each in (one, other))
    torch.testing.assert_close(first.losses, second.losses, rtol=1e-8, atol=0)
    assert first.norms == pytest.approx(second.norms, rel=1e-8)
    assert not torch.allclose(first.losses, landscape(one, "filter", span=0.5, points=5, seed=3).losses)


def test_filters_of_a_plain_model(monkeypatch):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 6, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=11, max_position_embeddings=8, **sizes))
    model = model.double().eval()
    batch = {"input_ids": torch.arange(10).view(2, 5), "labels": torch.tensor([0, 1])}
    operator = Hessian(model, [batch], over="weights")
    assert landscape(operator, "filter", points=3).losses.isfinite().all()
    weights = dict(model.named_parameters())
    for name, part in filter_direction(operator, monkeypatch).items():
        dim = 0 if "embeddings" in name else 1
        torch.testing.assert_close(part.norm(dim=dim), weights[name].detach().norm(dim=dim))


@pytest.mark.messages
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": 4}, "odd"),
        ({"span": 0.0}, "span"),
        ({"directions": "gradiant"}, "did you mean gradient"),
        ({"dimensions": 3}, "dimensions"),
        ({"directions": "gradient"}, "norm is 0"),
        ({"directions": torch.ones(3)}, r"direction 1 must have shape \(4,\)"),
        ({"directions": [torch.ones(4), torch.zeros(4)]}, "direction 2 must be finite"),
        ({"directions": torch.ones(4), "dimensions": 2}, "2 vectors; got 1"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(InputError, match=message):
        landscape(Quadratic([symmetric(4, 0)]), **options)


@pytest.mark.messages
@pytest.mark.parametrize("over", ["factors", "tangent"])
def test_filters_need_the_coordinates_of_weights(over):
    with pytest.raises(InputError, match="'filter'"):
        landscape(hessian("mlp", over), "filter")
