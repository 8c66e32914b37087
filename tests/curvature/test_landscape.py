"""Landscapes: exact parabolas on quadratics; second differences and untouched weights on real models."""

import json
import math

import pytest
import torch
from tangora.curvature.filters import filter_normalized, normalize_filters
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


@pytest.mark.parametrize("over", ["factors", "tangent", "weights"])
def test_the_model_is_untouched(over):
    operator = hessian("bert", over)
    operator.model.train()
    before = {key: value.clone() for key, value in operator.model.state_dict().items()}
    state = torch.get_rng_state()
    landscape(operator, "random", points=3, dimensions=2, span=10.0)
    after = operator.model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert all(parameter.grad is None for parameter in operator.model.parameters())
    assert operator.model.training
    assert torch.equal(torch.get_rng_state(), state)


class Wall(Quadratic):
    def loss_at(self, displacement):
        return math.inf if float(displacement.norm()) > 1.5 else super().loss_at(displacement)


def test_losses_that_are_not_finite_are_recorded_and_told():
    with pytest.warns(UserWarning, match="2 of 5 losses are not finite: take a smaller span than 2"):
        found = landscape(Wall([symmetric(3, 0)]), "random", span=2.0, points=5)
    assert found.non_finite == 2
    assert found.losses.isinf().tolist() == [True, False, False, False, True]
    assert json.loads(json.dumps(found.to_dict()))["losses"][0] == math.inf


def test_rows_of_a_filter_normalised_direction_have_the_norms_of_the_weights():
    direction, weight = vector(12, 0).view(3, 4), vector(12, 1).view(3, 4)
    weight[1] = 0
    found = filter_normalized(direction, weight)
    torch.testing.assert_close(found.norm(dim=1), weight.norm(dim=1))
    torch.testing.assert_close(found[0], direction[0] * (weight[0].norm() / direction[0].norm()))


@pytest.mark.parametrize("name", [*FLOAT64, "embedding"])
def test_filters_of_an_adapted_model_are_rows_of_its_weights(name):
    """GPT-2 stores its weights transposed, and so does an embedding."""
    operator = (
        hessian("bert", "weights", target_modules=["query", "word_embeddings"])
        if name == "embedding"
        else hessian(name, "weights")
    )
    noise = vector(operator.size, 0)
    parts = operator.space.to_dict(normalize_filters(operator.space, noise))
    for pair in find_pairs(operator.model):
        weight = pair.layer.get_base_layer().weight.detach()
        weight = (weight.T if pair.transposed else weight) + pair.delta_weight()
        found = parts[pair.name].T if pair.transposed else parts[pair.name]
        assert found.shape == weight.shape
        torch.testing.assert_close(found.norm(dim=1), weight.norm(dim=1))
        given = operator.space.to_dict(noise)[pair.name]
        given = given.T if pair.transposed else given
        torch.testing.assert_close(
            torch.nn.functional.cosine_similarity(found, given), torch.ones(len(found), dtype=torch.float64)
        )


def test_filters_are_the_same_in_every_gauge():
    one, other = hessian("mlp", "weights"), hessian("mlp", "weights")
    change_gauge(find_pairs(other.model), condition=100.0)
    first, second = (landscape(each, "filter", span=0.5, points=5, seed=2) for each in (one, other))
    torch.testing.assert_close(first.losses, second.losses, rtol=1e-8, atol=0)
    assert first.norms == pytest.approx(second.norms, rel=1e-8)
    assert not torch.allclose(first.losses, landscape(one, "filter", span=0.5, points=5, seed=3).losses)


def test_filters_of_a_plain_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 6, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=11, max_position_embeddings=8, **sizes))
    model = model.double().eval()
    batch = {"input_ids": torch.arange(10).view(2, 5), "labels": torch.tensor([0, 1])}
    operator = Hessian(model, [batch], over="weights")
    found = operator.space.to_dict(normalize_filters(operator.space, vector(operator.size, 0)))
    weights = dict(model.named_parameters())
    for name, part in found.items():
        dim = 0 if "embeddings" in name else 1
        torch.testing.assert_close(part.norm(dim=dim), weights[name].detach().norm(dim=dim))
    assert landscape(operator, "filter", points=3).losses.isfinite().all()


@pytest.mark.messages
def test_bad_input():
    loss = Quadratic([symmetric(4, 0)])
    for over in ("factors", "tangent"):
        with pytest.raises(
            InputError, match=r"'filter' need the coordinates of weights, over='weights': the rows of"
        ):
            landscape(hessian("mlp", over), "filter")
    with pytest.raises(InputError, match=r"points must be odd.*got 4"):
        landscape(loss, points=4)
    with pytest.raises(InputError, match=r"span must be a number in \(0"):
        landscape(loss, span=0.0)
    with pytest.raises(InputError, match="did you mean gradient"):
        landscape(loss, "gradiant")
    with pytest.raises(InputError, match="dimensions must be one of 1, 2; got 3"):
        landscape(loss, dimensions=3)
    with pytest.raises(InputError, match="directions cannot be 'gradient': its norm is 0"):
        landscape(loss, "gradient")
    with pytest.raises(InputError, match=r"direction 1 must have shape \(4,\); got \(3,\)"):
        landscape(loss, torch.ones(3))
    with pytest.raises(InputError, match="direction 2 must be finite and not zero"):
        landscape(loss, [torch.ones(4), torch.zeros(4)])
    with pytest.raises(InputError, match="directions must be 2 vectors; got 1"):
        landscape(loss, torch.ones(4), dimensions=2)
