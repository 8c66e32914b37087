"""The products that a probe reads are those of the dense gradient, for every kind of layer."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from tangora import InputError
from tangora.adapters import module_weight
from tangora.probes import GradientProbe, Request, gradient_norms, gradient_svds, mean_loss, probed_layers
from tests.adapters.models import quantized
from tests.models import LAYERS, Holder, inputs_of, loss_of
from tests.probes.models import (
    OWN_LOSS_TOLERANCE,
    TOLERANCE,
    adapted,
    batches_of,
    dense_gradients,
    exact_loss,
    mean_loss_of,
    model_of,
)
from tests.tolerances import assert_close

ONE_LAYER = sorted(LAYERS.keys() - {"attention"})


def holder_loss(model, batch):
    return loss_of(model(*batch))


def mean_exact_loss(batches):
    return lambda model: sum(exact_loss(model, batch) for batch in batches) / len(batches)


def check_exactly(model, batches, **options):
    return check_model(model, batches, exact_loss, mean_exact_loss(batches), **options)


def requests_for(layers, k=3, seed=0, *, dense=True):
    """Random factors for both sides, wider than the layer where it is small."""
    generator = torch.Generator().manual_seed(seed)

    def draw(rows):
        return torch.randn(rows, k, dtype=torch.float64, generator=generator)

    return {layer.name: Request(draw(layer.n), draw(layer.m), dense) for layer in layers}


def check_readings(readings, requests, gradients, tolerance=1e-10):
    """Each part against the dense gradient, relative to that gradient's norm."""
    assert readings.keys() == gradients.keys()
    for name, G in gradients.items():
        reading, request = readings[name], requests[name]
        for read, exact in (
            (reading.dense, G),
            (reading.right, G @ request.right.to(G.dtype)),
            (reading.left, request.left.to(G.dtype).T @ G),
        ):
            assert read.shape == exact.shape, name
            assert float((read - exact).norm()) <= 10 * tolerance * float(G.norm()), name


def check_model(model, batches, loss_fn=None, reference=None, tolerance=1e-10, layers=None):
    layers = probed_layers(model) if layers is None else layers
    requests = requests_for(layers)
    gradients = dense_gradients(model, layers, reference or mean_loss_of(batches))
    with GradientProbe(model, layers, loss_fn=loss_fn) as probe:
        readings = probe.read(batches, requests)
    check_readings(readings, requests, gradients, tolerance)
    return readings, gradients


# --- one layer of each kind ---


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ONE_LAYER)
def test_every_kind_of_layer_under_peft(name, dora, rslora):
    torch.manual_seed(0)
    config = LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=["it"],
        fan_in_fan_out=name == "gpt2-conv1d",
        use_dora=dora,
        use_rslora=rslora,
    )
    model = get_peft_model(Holder(LAYERS[name]().double()), config, autocast_adapter_dtype=False)
    batch = inputs_of(name)
    _, gradients = check_model(model, [batch], holder_loss, lambda m: holder_loss(m, batch))
    assert all(G.abs().max() > 0 for G in gradients.values())


@pytest.mark.parametrize("name", sorted(set(ONE_LAYER) - {"embedding", "embedding-padding"}))
def test_every_kind_of_layer_in_a_plain_model(name):
    torch.manual_seed(0)
    model, batch = Holder(LAYERS[name]().double()), inputs_of(name)
    check_model(model, [batch], holder_loss, lambda m: holder_loss(m, batch))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(7, 5, bias=False),
        nn.Conv1d(3, 5, 3, padding=2, dilation=2),
        nn.Conv2d(3, 5, 3, stride=(2, 1), padding=(1, 0)),
        nn.Conv3d(2, 4, (2, 1, 2), stride=(1, 2, 1), dilation=(1, 1, 2)),
    ],
    ids=str,
)
def test_geometries_of_layers(layer):
    name = {nn.Linear: "linear", nn.Conv1d: "conv1d", nn.Conv2d: "conv2d", nn.Conv3d: "conv3d"}[type(layer)]
    model, batch = Holder(layer.double()), inputs_of(name)
    check_model(model, [batch], holder_loss, lambda m: holder_loss(m, batch))


def test_two_dimensional_inputs():
    model = Holder(nn.Linear(7, 5).double())
    batch = (inputs_of("linear")[0][0],)
    check_model(model, [batch], holder_loss, lambda m: holder_loss(m, batch))


def test_embeddings_that_scale_what_they_look_up():
    torch.manual_seed(0)
    embedding = Gemma3TextScaledWordEmbedding(11, 6, padding_idx=0, embed_scale=2.5).double()
    model = get_peft_model(
        Holder(embedding), LoraConfig(r=2, target_modules=["it"]), autocast_adapter_dtype=False
    )
    batch = inputs_of("embedding")
    _, gradients = check_model(model, [batch], holder_loss, lambda m: holder_loss(m, batch))
    (G,) = gradients.values()
    assert (G[:, 0] == 0).all()
    assert (G[:, 1] != 0).any()


def test_keyword_inputs():
    class Caller(Holder):
        def forward(self, x):
            return self.it(input=x)

    torch.manual_seed(0)
    model, batch = Caller(nn.Linear(7, 5).double()), inputs_of("linear")
    check_model(model, [batch], holder_loss, lambda m: holder_loss(m, batch))


def test_a_module_that_is_called_several_times():
    class Twice(Holder):
        def forward(self, x):
            return self.it(torch.tanh(self.it(x)))

    torch.manual_seed(0)
    batch = (torch.randn(4, 5, dtype=torch.float64),)
    check_model(Twice(nn.Linear(5, 5).double()), [batch], holder_loss, lambda m: holder_loss(m, batch))


def test_a_layer_that_the_loss_does_not_depend_on():
    class Beside(Holder):
        def __init__(self):
            super().__init__(nn.Linear(7, 5).double())
            self.called, self.never = nn.Linear(7, 5).double(), nn.Linear(7, 5).double()

        def forward(self, x):
            self.called(x)
            return self.it(x)

    torch.manual_seed(0)
    batch = inputs_of("linear")
    readings, _ = check_model(Beside(), [batch], holder_loss, lambda m: holder_loss(m, batch))
    for name in ("called", "never"):
        assert all((tensor == 0).all() for tensor in readings[name].tensors())
    assert readings["it"].dense.abs().max() > 0


def test_a_loss_that_depends_on_no_layer():
    model, batch = Holder(nn.Linear(7, 5).double()), inputs_of("linear")
    constant = torch.tensor(2.0, dtype=torch.float64)
    with GradientProbe(model, probed_layers(model), loss_fn=lambda *_: constant) as probe:
        readings = probe.read([batch], {"it": Request(dense=True)})
        assert probe.loss == 2
    assert (readings["it"].dense == 0).all()


# --- whole models ---


@pytest.mark.parametrize("name", ["gpt2", "t5", "vit", "bert", "llama"])
@pytest.mark.parametrize("peft", [False, True])
def test_whole_models(name, peft):
    model, batches = adapted(name) if peft else model_of(name), batches_of(name)
    check_model(model, batches, tolerance=OWN_LOSS_TOLERANCE.get(name, 1e-10))
    check_exactly(model, batches, tolerance=TOLERANCE.get(name, 1e-10))


def test_a_tied_embedding_is_read_alone():
    model = adapted("gpt2", target_modules=["wte"], fan_in_fan_out=False)
    assert model.get_base_model().lm_head.weight is model.get_base_model().transformer.wte.base_layer.weight
    check_exactly(model, batches_of("gpt2"))


def test_the_point_where_a_trained_adapter_stands():
    model = adapted("gpt2")
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    readings, _ = check_exactly(model, batches_of("gpt2"))
    with model.disable_adapter():
        base, _ = check_exactly(model, batches_of("gpt2"))
    assert any((readings[name].dense - base[name].dense).norm() > 1e-3 for name in readings)


def test_several_adapters():
    model = adapted("bert")
    model.add_adapter("other", LoraConfig(r=3, target_modules=["query"]))
    model.double()
    other = probed_layers(model, adapter_name="other")
    assert {layer.name.rpartition(".")[2] for layer in other} == {"query"}
    assert len(other) == 2
    assert len(probed_layers(model)) > 2
    check_exactly(model, batches_of("bert"), layers=other)


def test_layers_are_chosen_by_name():
    model = model_of("gpt2")
    chosen = probed_layers(model, names=["c_attn", "transformer.h.0.mlp.c_fc"])
    assert [layer.name for layer in chosen] == [
        "transformer.h.0.attn.c_attn",
        "transformer.h.0.mlp.c_fc",
        "transformer.h.1.attn.c_attn",
    ]
    assert [(layer.m, layer.n) for layer in chosen] == [(36, 12), (48, 12), (36, 12)]


def test_attention_weights_that_are_no_layer_are_left_out():
    class Attention(Holder):
        def __init__(self):
            super().__init__(nn.MultiheadAttention(6, 2, batch_first=True))
            self.head = nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.it(x, x, x)[0])

    model = get_peft_model(Attention().double(), LoraConfig(r=2, target_modules=["it", "head"]))
    batch = (torch.randn(2, 4, 6, dtype=torch.float64),)
    layers = probed_layers(model)
    assert [layer.name for layer in layers] == ["base_model.model.head"]
    check_model(model, [batch], holder_loss, lambda m: holder_loss(m, batch), layers=layers)


# --- quantized bases ---


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_layers_give_the_gradient_at_the_dequantized_weight(kind, peft):
    model = quantized(kind, bias=True)
    if peft:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["it"]))
    model.eval()  # bitsandbytes takes another kernel in training
    layers = probed_layers(model)
    (layer,) = layers
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3))
    requests = requests_for(layers)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="MatMul8bitLt")  # inputs are cast, says bitsandbytes
        with GradientProbe(model, layers, loss_fn=holder_loss) as probe:
            readings = probe.read([(x,)], requests)
        with torch.no_grad():
            output = model(x)
    output.requires_grad_()
    loss_of(output).backward()
    G = output.grad.reshape(-1, 32).T @ x.reshape(-1, 64)
    check_readings(readings, requests, {layer.name: G}, tolerance=1e-5)
    dense = nn.Linear(64, 32)
    with torch.no_grad():
        dense.weight.copy_(module_weight(layer.base))
        dense.bias.copy_(layer.base.bias)
    loss_of(dense(x)).backward()
    tolerance = 1e-5 if kind == "nf4" else 0.01  # the int8 kernel rounds its inputs
    assert_close(readings[layer.name].dense, dense.weight.grad, tolerance)


# --- no gradient of the weight's size ---


class ShapesMade(TorchDispatchMode):
    """Records which operations make a tensor of the weight's shape in memory of its own."""

    def __init__(self, m, n, known):
        super().__init__()
        self.forbidden = {(m, n), (n, m)}
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            own = isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in self.known
            if own and tuple(value.shape) in self.forbidden:
                self.made.append(str(func))
        return result


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("peft", [False, True])
def test_no_gradient_of_the_weights_size_is_formed(peft, one_pass):
    m, n = 53, 41
    torch.manual_seed(0)
    model = Holder(nn.Linear(n, m).double())
    if peft:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["it"]), autocast_adapter_dtype=False)
    batch = (torch.randn(2, 5, n, dtype=torch.float64),)
    with ShapesMade(m, n, model.parameters()) as made:
        gradient_svds(model, [batch], 3, loss_fn=holder_loss, one_pass=one_pass)
    assert made.made == []
    layers = probed_layers(model)
    with (
        ShapesMade(m, n, model.parameters()) as made,
        GradientProbe(model, layers, loss_fn=holder_loss) as probe,
    ):
        probe.read([batch], {layers[0].name: Request(dense=True)})
    assert made.made, "the recorder sees a gradient that is formed"


# --- what cannot be read ---


@pytest.mark.messages
@pytest.mark.parametrize(
    ("loss_fn", "batches", "message"),
    [
        (holder_loss, [], "at least one batch"),
        (lambda m, b: holder_loss(m, b) * float("nan"), 2, "batch 0 has loss nan"),
        (lambda m, b: m(*b), 1, r"one number; got a tensor of shape \(2, 4, 5\)"),
        (lambda m, b: 1.0, 1, "one number; got float"),
        (None, 1, "without loss_fn a batch must be a dict of model inputs; got tuple"),
        (lambda m, b: (0 * m(*b)).sqrt().sum(), 1, "the gradient of layer it is not finite"),
    ],
)
def test_what_cannot_be_read_is_named(loss_fn, batches, message):
    model = Holder(nn.Linear(7, 5).double())
    batches = [inputs_of("linear")] * batches if isinstance(batches, int) else batches
    with (
        GradientProbe(model, probed_layers(model), loss_fn=loss_fn) as probe,
        pytest.raises(InputError, match=message),
    ):
        probe.read(batches, {"it": Request(dense=True)})


@pytest.mark.messages
def test_layers_that_do_not_exist_are_named():
    with pytest.raises(InputError, match="no linear layer called nothing"):
        probed_layers(model_of("gpt2"), names=["nothing"])
    with pytest.raises(InputError, match="no linear layer"):
        probed_layers(nn.Sequential(nn.ReLU()))
    with pytest.raises(InputError, match=r"it: convolution with padding_mode 'circular'"):
        gradient_norms(Holder(nn.Conv1d(3, 5, 3, padding=1, padding_mode="circular")), [])


def test_a_batch_without_a_label_that_counts_adds_nothing():
    model, batches = adapted("gpt2"), batches_of("gpt2", 2)
    ignored = {**batches[0], "labels": torch.full_like(batches[0]["input_ids"], -100)}
    layer = probed_layers(model)[0]
    found = []
    for given in (batches, [*batches, ignored]):
        with GradientProbe(model, [layer]) as probe:
            found.append(probe.read(given, {layer.name: Request(dense=True)})[layer.name].dense)
    assert torch.equal(*found)
    assert mean_loss(model, [*batches, ignored]) == mean_loss(model, batches)
    with GradientProbe(model, [layer]) as probe, pytest.raises(InputError, match="at least one label"):
        probe.read([ignored], {layer.name: Request(dense=True)})
