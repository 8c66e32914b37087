"""Small batches add up to the big one, whatever the model's loss is a mean over."""

import pytest
import torch
from torch import nn

from tangora import InputError
from tangora.probes import GradientProbe, Request, as_batches, mean_loss, probed_layers
from tests.models import Holder, inputs_of, loss_of
from tests.probes.models import OWN_LOSS_TOLERANCE, batch_of, dense_gradients, model_of
from tests.tolerances import assert_close


def split(batch, sizes):
    """Rows of a batch as several, of these sizes."""
    parts = {key: value.split(sizes) for key, value in batch.items()}
    return [{key: rows[index] for key, rows in parts.items()} for index in range(len(sizes))]


def big_batch(name):
    batch = batch_of(name, size=6)
    if name in ("gpt2", "llama", "t5"):  # rows with very different numbers of labels
        for row, left_out in enumerate((0, 4, 1, 3, 2, 0)):
            batch["labels"][row, :left_out] = -100
    return batch


def read(model, batches, loss_fn=None):
    layers = probed_layers(model)[:4]
    with GradientProbe(model, layers, loss_fn=loss_fn) as probe:
        readings = probe.read(batches, {layer.name: Request(dense=True) for layer in layers})
        return {name: reading.dense for name, reading in readings.items()}, probe.loss


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bert", "vit"])
def test_uneven_batches_add_up_to_the_big_one(name):
    model, big = model_of(name), big_batch(name)
    tolerance = OWN_LOSS_TOLERANCE.get(name, 1e-10)
    exact = dense_gradients(model, probed_layers(model)[:4], lambda m: m(**big).loss)
    parts = split(big, (1, 2, 3))
    for batches in ([big], parts):
        gradients, loss = read(model, batches)
        assert loss == pytest.approx(model(**big).loss.item(), rel=1e-6)
        for key, G in exact.items():
            assert_close(gradients[key], G, 10 * tolerance)
    plain_mean, _ = read(model, parts, lambda m, batch: m(**batch).loss)
    assert any((plain_mean[key] - G).norm() > 1e-3 * G.norm() for key, G in exact.items()), "weights matter"


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_labels_that_are_no_classes(problem):
    outputs = 1 if problem == "regression" else 3
    model = model_of("bert", num_labels=outputs, problem_type=problem)
    big = batch_of("bert", size=6)
    shape = (6,) if outputs == 1 else (6, outputs)
    big["labels"] = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = dense_gradients(model, probed_layers(model)[:4], lambda m: m(**big).loss)
    gradients, _ = read(model, split(big, (1, 2, 3)))
    for key, G in exact.items():
        assert_close(gradients[key], G, 1e-9)


def test_a_loss_of_ones_own_weighs_all_batches_alike():
    torch.manual_seed(0)
    model = Holder(nn.Linear(7, 5).double())
    x = inputs_of("linear")[0].reshape(-1, 7)
    parts = [(x[:1],), (x[1:],)]

    def loss_fn(model, batch):
        return loss_of(model(*batch)) / len(batch[0])

    gradients, loss = read(model, parts, loss_fn)
    each = [dense_gradients(model, probed_layers(model), lambda m, b=b: loss_fn(m, b))["it"] for b in parts]
    assert_close(gradients["it"], (each[0] + each[1]) / 2)
    assert loss == pytest.approx((sum(loss_fn(model, batch) for batch in parts) / 2).item())


def test_the_mean_loss_is_weighted_like_the_gradient():
    model, big = model_of("gpt2"), big_batch("gpt2")
    expected = model(**big).loss.item()
    model.train()
    assert mean_loss(model, split(big, (1, 2, 3))) == pytest.approx(expected, rel=1e-6)
    assert mean_loss(model, iter(split(big, (4, 2)))) == pytest.approx(expected, rel=1e-6)
    assert model.training
    assert mean_loss(model, [big], loss_fn=lambda m, b: m(**b).loss * float("nan")) == float("inf")


def test_iterators_become_lists():
    batches = as_batches(iter([1, 2]))
    assert list(batches) == list(batches) == [1, 2]
    loader = torch.utils.data.DataLoader([1, 2])
    assert list(as_batches(loader)) == list(loader)
    assert as_batches(again := as_batches(loader)) is again


@pytest.mark.messages
def test_what_is_no_list_of_batches_is_named():
    batch = batch_of("bert")
    with pytest.raises(InputError, match="held_out must be a list of batches; got a single batch"):
        as_batches(batch, "held_out")
    with pytest.raises(InputError, match="batches must be a list of batches or a DataLoader; got None"):
        as_batches(None)
    del batch["labels"]
    with pytest.raises(InputError, match="no loss for a batch of input_ids: add labels"):
        mean_loss(model_of("bert"), [batch])
    with pytest.raises(InputError, match="at least one label"):
        mean_loss(model_of("bert"), [])
