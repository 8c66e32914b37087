"""A probe changes nothing: neither the model nor the random state, neither what is computed nor what is kept."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from tangora.probes import GradientProbe, Request, gradient_norms, gradient_svds, probed_layers
from tests.cases import combinations
from tests.models import Holder, inputs_of, loss_of
from tests.probes.models import adapted, batch_of, batches_of, dense_gradients, exact_loss, model_of
from tests.tolerances import assert_close

DROPOUT = {
    "gpt2": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
    "t5": {"dropout_rate": 0.3},
    "vit": {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3},
    "bert": {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3},
    "llama": {"attention_dropout": 0.3},
}


def requests_for(layers, k=2):
    generator = torch.Generator().manual_seed(0)
    return {
        layer.name: Request(
            torch.randn(layer.n, k, dtype=torch.float64, generator=generator),
            torch.randn(layer.m, k, dtype=torch.float64, generator=generator),
        )
        for layer in layers
    }


def read(model, batches, loss_fn=exact_loss, **requests):
    layers = probed_layers(model)
    with GradientProbe(model, layers, loss_fn=loss_fn) as probe:
        return probe.read(batches, requests or requests_for(layers))


def assert_same(one, other, tolerance):
    assert one.keys() == other.keys()
    for name in one:
        for left, right in zip(one[name].tensors(), other[name].tensors(), strict=True):
            assert_close(left, right, tolerance)


def state_of(model):
    """Everything about a model that a probe could touch."""
    parameters = dict(model.named_parameters())
    return {
        "values": {name: p.detach().clone() for name, p in parameters.items()},
        "grads": {name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()},
        "identities": {name: (id(p), id(p.grad)) for name, p in parameters.items()},
        "requires_grad": {name: p.requires_grad for name, p in parameters.items()},
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
            for name, module in model.named_modules()
        },
        "plain": {
            name: {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float))}
            for name, module in model.named_modules()
        },
        "config": copy.deepcopy(model.config.to_dict()),
    }


def random_state():
    return np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002


def assert_equal_states(one, other):
    for key, value in one.items():
        if key in ("values", "grads", "buffers"):
            assert value.keys() == other[key].keys()
            for name, tensor in value.items():
                same = other[key][name]
                assert (tensor is None and same is None) or torch.equal(tensor, same), (key, name)
        else:
            assert value == other[key], key


def untidy(name, **options):
    """A model in a state that no probe would leave: gradients here and there, modes and flags mixed."""
    model = adapted(name, model_options={**DROPOUT[name], **options}, lora_dropout=0.4)
    model.train()
    torch.manual_seed(3)
    for index, (_, parameter) in enumerate(model.named_parameters()):
        if index % 3 == 0:
            parameter.grad = torch.randn_like(parameter)
        if index % 5 == 0:
            parameter.requires_grad_(not parameter.requires_grad)
    for index, module in enumerate(model.modules()):
        if index % 4 == 1:
            module.training = False
    return model


def spends_randomness(loss_of=exact_loss):
    def loss_fn(model, batch):
        random.random()
        np.random.rand()  # noqa: NPY002
        torch.rand(1)
        return loss_of(model, batch)

    return loss_fn


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    combinations(
        ["gpt2", "t5", "vit", "bert", "llama"],
        [False, True],
        quick=lambda name, checkpointing: not checkpointing or name in ("gpt2", "t5"),
    ),
)
def test_everything_is_as_it_was(name, checkpointing):
    model, batches = untidy(name), batches_of(name)
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    before, randomness = state_of(model), random_state()
    gradient_svds(model, batches, 2, power_iterations=0, loss_fn=spends_randomness())
    gradient_norms(model, batches[:1], loss_fn=spends_randomness())
    assert_equal_states(before, state_of(model))
    assert random_state() == randomness


@pytest.mark.messages  # run-time type checks draw from Python's random state themselves
def test_the_random_state_of_python():
    model, before = model_of("bert"), random.getstate()
    gradient_svds(model, batches_of("bert", 1), 2, loss_fn=spends_randomness())
    assert random.getstate() == before


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_everything_is_as_it_was_after_an_error(name):
    model, batches = untidy(name), batches_of(name)
    before, randomness = state_of(model), random_state()
    calls = []

    def fails(model, batch):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("in the middle")
        return spends_randomness()(model, batch)

    with pytest.raises(RuntimeError, match="in the middle"):
        gradient_svds(model, batches, 2, loss_fn=fails)
    broken = [*batches[:1], {**batches[1], "labels": batches[1]["labels"][:1, :2]}]
    with pytest.raises(Exception, match=r"size|shape|Expected|dimension"):
        gradient_svds(model, broken, 2)
    assert_equal_states(before, state_of(model))
    assert random_state() == randomness


def test_a_layer_that_fails_in_the_backward_pass():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("backward")

    model = untidy("bert")
    before = state_of(model)
    with pytest.raises(RuntimeError, match="backward"):
        read(model, batches_of("bert"), lambda m, b: Fails.apply(exact_loss(m, b)))
    assert_equal_states(before, state_of(model))


# --- order of batches ---


@pytest.mark.parametrize("own_generator", [False, True])
def test_a_loader_that_shuffles_replays_its_order(own_generator):
    model = Holder(nn.Linear(3, 2).double())
    generator = torch.Generator().manual_seed(5) if own_generator else None
    data = torch.arange(21.0, dtype=torch.float64).reshape(7, 3)
    loader = DataLoader(data, batch_size=2, shuffle=True, generator=generator)
    seen = []

    def loss_fn(model, batch):
        seen.append(batch)
        return loss_of(model(batch))

    torch.manual_seed(0)
    before = generator.get_state() if own_generator else torch.get_rng_state()
    spectrum = gradient_svds(model, loader, 2, loss_fn=loss_fn)["it"]
    after = generator.get_state() if own_generator else torch.get_rng_state()
    assert torch.equal(before, after)
    assert len(seen) == 4 * 4
    for index, batch in enumerate(seen):
        assert torch.equal(batch, seen[index % 4])
    assert not torch.equal(torch.cat(seen[:4]), data)
    again = gradient_svds(model, seen[:4], 2, loss_fn=loss_fn)["it"]
    assert_close(spectrum.svd.S, again.svd.S, 1e-12)


# --- what is computed ---


@pytest.mark.parametrize("name", ["gpt2", "t5", "vit", "bert", "llama"])
def test_the_output_is_that_of_evaluation_mode_to_the_last_bit(name):
    model = untidy(name)
    batch = batch_of(name)
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(**batch).logits
    outputs = []

    def loss_fn(model, batch):
        output = model(**batch)
        outputs.append(output.logits.detach())
        return output.loss

    one = read(model, [batch], loss_fn)
    assert_same(one, read(model, [batch], loss_fn), 1e-12)
    assert all(torch.equal(output, expected) for output in outputs)
    with torch.no_grad():
        assert not torch.equal(model.train()(**batch).logits, expected), "dropout would show"


@pytest.mark.parametrize(
    ("name", "peft", "reentrant"),
    combinations(
        ["gpt2", "t5", "vit", "bert", "llama"],
        [False, True],
        [False, True],
        quick=lambda name, peft, reentrant: peft != reentrant or name == "t5",
    ),
)
def test_gradient_checkpointing_changes_no_reading(name, peft, reentrant):
    options = DROPOUT[name]
    model = adapted(name, model_options=options) if peft else model_of(name, **options)
    batches = batches_of(name, 2)
    expected = read(model, batches)
    inner = model.get_base_model() if peft else model
    inner.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    before = state_of(model)
    assert_same(read(model, batches), expected, 1e-12)
    assert_equal_states(before, state_of(model))


def test_checkpointing_drops_what_is_kept_of_the_inputs():
    model, batch = model_of("bert").train(), batch_of("bert", size=7)
    layers = [layer for layer in probed_layers(model) if ".layer." in layer.name]
    requests = requests_for(layers)
    shapes = {(7, 6, 12), (7, 6, 20), (7 * 6, 2)}  # inputs, and their products with the right factors

    def kept():
        sizes = []

        def pack(tensor):
            if tuple(tensor.shape) in shapes:
                sizes.append(tensor.numel())
            return tensor

        def loss_fn(model, batch):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                return exact_loss(model, batch)

        with GradientProbe(model, layers, loss_fn=loss_fn) as probe:
            probe.read([batch], requests)
        return sum(sizes)

    plain = kept()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert kept() < plain / 3


def test_in_place_operations_may_follow_a_layer():
    class InPlace(Holder):
        def __init__(self):
            super().__init__(nn.Linear(7, 5).double())
            self.last = nn.Linear(5, 5).double()

        def forward(self, x):
            hidden = F.relu(self.it(x), inplace=True)
            return self.last(hidden).mul_(2)

    torch.manual_seed(0)
    model, batch = InPlace(), inputs_of("linear")
    loss_fn = lambda m, b: loss_of(m(*b))  # noqa: E731
    readings = read(model, [batch], loss_fn, it=Request(dense=True), last=Request(dense=True))
    for name, G in dense_gradients(model, probed_layers(model), lambda m: loss_fn(m, batch)).items():
        assert_close(readings[name].dense, G)


# --- precisions ---


def test_autocast():
    model, batches = model_of("llama", torch.float32), batches_of("llama")
    layers = probed_layers(model)
    exact = read(model, batches, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = read(model, batches, None)
    for layer in layers:
        for one, other in zip(exact[layer.name].tensors(), rounded[layer.name].tensors(), strict=True):
            assert other.dtype == torch.float32
            assert (one - other).norm() <= 0.1 * one.norm()
    assert any(not torch.equal(exact[key].right, rounded[key].right) for key in exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision(dtype):
    model = model_of("gpt2", dtype)
    batches = batches_of("gpt2")
    rounded = read(model, batches, None)
    exact = read(model.float(), batches, None)
    for name, reading in rounded.items():
        for one, other in zip(exact[name].tensors(), reading.tensors(), strict=True):
            assert other.dtype == torch.float32
            assert (one - other).norm() <= 0.1 * one.norm()


def test_small_gradients_survive_float16():
    model = Holder(nn.Linear(7, 5)).half()
    x = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0))

    def loss_fn(model, batch):
        return (2e-6 * model(batch[0]).float()).square().sum() + 1e-8 * model(batch[0]).float().sum()

    (G,) = dense_gradients(model.float(), probed_layers(model), lambda m: loss_fn(m, (x,))).values()
    model.half()
    reading = read(model, [(x.half(),)], loss_fn, it=Request(dense=True))["it"]
    assert reading.dense.abs().max() > 0
    assert (reading.dense - G).norm() <= 0.02 * G.norm()
    weight = nn.Parameter(model.it.weight.detach().clone())
    loss_fn(lambda inputs: F.linear(inputs, weight, model.it.bias), (x.half(),)).backward()
    assert (weight.grad.float() - G).norm() > 0.02 * G.norm(), "plain float16 loses them"
