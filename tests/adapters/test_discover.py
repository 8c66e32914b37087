"""Which pairs are found, and that their gradients are the dense gradient seen through the factors."""

import warnings

import pytest
import torch
from peft import AdaLoraConfig, KasaConfig, LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from tangora import InputError, TangentAdam, find_pairs
from tangora.adapters import discover
from tests.adapters.models import Experts, dense_gradient, quantized, tiny_llama
from tests.models import LAYERS, Holder, adapted_layer, inputs_of, loss_of, randomize
from tests.tolerances import assert_close

TRANSPOSED = {"gpt2-conv1d", "embedding", "embedding-padding"}
DORA_LAYERS = ("linear", "gpt2-conv1d", "embedding", "conv1d", "conv2d", "conv3d")


def check_identity(pair, inputs, loss, magnitude=None, tolerance=1e-10):
    """g_A = s B'g and g_B = s g A' for the dense gradient g."""
    plain_loss, g = dense_gradient(pair, inputs, magnitude)
    assert_close(loss.detach(), plain_loss, tolerance)
    A, B = pair.factors()
    g_A, g_B = pair.gradients()
    assert g_A.layout == g_B.layout == torch.strided
    assert g.abs().max() > 0
    assert_close(g_A, pair.scaling * B.T @ g, tolerance)
    assert_close(g_B, pair.scaling * g @ A.T, tolerance)


def only_pair(model):
    (pair,) = find_pairs(model)
    return pair


# --- the identity that everything else rests on ---


@pytest.mark.parametrize("name", sorted(LAYERS.keys() - {"attention"}))
@pytest.mark.parametrize("rslora", [False, True])
def test_gradients_are_the_dense_gradient_seen_through_the_factors(name, rslora):
    model, inputs = adapted_layer(name, use_rslora=rslora), inputs_of(name)
    pair = only_pair(model)
    assert pair.transposed == (name in TRANSPOSED)
    assert pair.scaling == pytest.approx(6 / 2**0.5 if rslora else 3)
    m, n, r = pair.shape
    assert [tuple(factor.shape) for factor in pair.factors()] == [(r, n), (m, r)]
    loss = loss_of(model(*inputs))
    loss.backward()
    check_identity(pair, inputs, loss)


@pytest.mark.parametrize("name", DORA_LAYERS)
def test_dora_gradients_are_those_of_the_direction(name):
    model, inputs = adapted_layer(name, use_dora=True), inputs_of(name)
    pair = only_pair(model)
    vector = pair.layer.lora_magnitude_vector["default"].weight
    assert all(vector is not parameter for parameter in pair.parameters)
    loss = loss_of(model(*inputs))
    loss.backward()
    check_identity(pair, inputs, loss, vector.detach().flatten())


def test_a_bias_of_lora_is_no_part_of_the_pair():
    model, inputs = adapted_layer("linear", lora_bias=True), inputs_of("linear")
    pair = only_pair(model)
    bias = pair.layer.lora_B["default"].bias
    with torch.no_grad():
        bias.zero_()
    loss = loss_of(model(*inputs))
    loss.backward()
    check_identity(pair, inputs, loss)
    assert all(parameter is not bias for parameter in pair.parameters)


def test_attention_has_pairs_for_both_projections():
    model, inputs = adapted_layer("attention"), inputs_of("attention")
    inner, outer = find_pairs(model)
    assert (inner.shape, outer.shape) == ((18, 6, 2), (6, 6, 2))
    with (
        torch.no_grad()
    ):  # PEFT 0.21.2 adds the change of out_proj twice in the forward pass, and differentiates one
        outer.B.zero_()
    loss_of(model(*inputs)).backward()
    attention = nn.MultiheadAttention(6, 2, batch_first=True).double()
    adapter_base = inner.layer.get_base_layer()
    with torch.no_grad():
        attention.in_proj_weight.copy_(adapter_base.in_proj_weight + inner.delta_weight())
        attention.out_proj.weight.copy_(outer.layer.get_base_layer().weight)
    loss_of(attention(*inputs)).backward()
    for pair, weight in ((inner, attention.in_proj_weight), (outer, attention.out_proj.weight)):
        (A, B), (g_A, g_B) = pair.factors(), pair.gradients()
        assert_close(g_A, pair.scaling * B.T @ weight.grad)
        assert_close(g_B, pair.scaling * weight.grad @ A.T)


def test_no_gradients_unless_both_factors_have_one():
    model = adapted_layer("linear")
    pair = only_pair(model)
    assert pair.gradients() is None
    loss_of(model(*inputs_of("linear"))).backward()
    pair.B.grad = None
    assert pair.gradients() is None


def test_sparse_gradients_are_made_dense():
    model = adapted_layer("embedding")
    loss_of(model(*inputs_of("embedding"))).backward()
    pair = only_pair(model)
    dense = pair.gradients()
    pair.A.grad, pair.B.grad = dense[0].to_sparse(), dense[1].to_sparse()
    optimizer = TangentAdam(model, lr=1e-2)
    assert all(torch.equal(one, other) for one, other in zip(pair.gradients(), dense, strict=True))
    before = pair.delta_weight()
    optimizer.step()
    assert not torch.equal(pair.delta_weight(), before)


# --- quantized bases ---


def adapted_quantized(kind):
    model = randomize(get_peft_model(quantized(kind), LoraConfig(r=4, lora_alpha=8, target_modules=["it"])))
    layer = only_pair(model).base
    assert not layer.weight.is_floating_point()
    assert type(model.base_model.model.it).__module__.endswith("lora.bnb")
    return model, layer


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_four_bit_layers(quant_type):
    model, layer = adapted_quantized(quant_type)
    pair = only_pair(model)
    x = torch.randn(6, 64)
    loss = loss_of(model(x))
    loss.backward()
    dense = nn.Linear(64, 32, bias=False)
    bitsandbytes = pytest.importorskip("bitsandbytes")
    W0 = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).reshape(32, 64)
    dense.weight.data = W0 + pair.delta_weight()
    loss_of(dense(x)).backward()
    (A, B), (g_A, g_B) = pair.factors(), pair.gradients()
    assert_close(g_A, pair.scaling * B.T @ dense.weight.grad, 1e-4)
    assert_close(g_B, pair.scaling * dense.weight.grad @ A.T, 1e-4)


def test_eight_bit_layers_are_found():
    model, _ = adapted_quantized("int8")
    pair = only_pair(model)
    assert (pair.shape, pair.transposed) == ((32, 64, 4), False)


class IntegerLinear(nn.Module):
    """A layer like GPTQ's or AWQ's: integer weights, no parameter called weight."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.infeatures, self.outfeatures = in_features, out_features  # as GPTQ calls them
        self.register_buffer("qweight", torch.randint(-8, 8, (out_features, in_features), dtype=torch.int8))
        self.register_buffer("scale", torch.full((out_features, 1), 0.1, dtype=torch.float64))

    def forward(self, x):
        return x @ (self.qweight * self.scale).T


class WrappedIntegerLinear(nn.Module, LoraLayer):
    """What a third party's backend would register with PEFT."""

    def __init__(self, base_layer):
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = "default"
        self.update_layer("default", 2, 6, LoraConfig(r=2, lora_alpha=6))

    def forward(self, x):
        delta = self.lora_B["default"](self.lora_A["default"](x)) * self.scaling["default"]
        return self.base_layer(x) + delta


def test_wrappers_of_integer_weights_are_found_by_their_attributes():
    torch.manual_seed(0)
    model = randomize(Holder(WrappedIntegerLinear(IntegerLinear(7, 5))).double())
    pair, x = only_pair(model), inputs_of("linear")[0]
    loss_of(model(x)).backward()
    base = model.it.base_layer
    W = (base.qweight * base.scale + pair.delta_weight()).requires_grad_()
    loss_of(x @ W.T).backward()
    (A, B), (g_A, g_B) = pair.factors(), pair.gradients()
    assert_close(g_A, 3 * B.T @ W.grad)
    assert_close(g_B, 3 * W.grad @ A.T)


# --- adapters, patterns, scalings ---


class Stack(nn.Module):
    """Layers for patterns, variants and mixtures."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))


def stack_model(**config):
    torch.manual_seed(0)
    return get_peft_model(Stack(), LoraConfig(**{"r": 2, "target_modules": ["one", "two"]} | config))


def test_adapters_are_told_apart():
    model = stack_model()
    model.add_adapter("second", LoraConfig(r=3, target_modules=["one"]))
    assert [(p.name.split(".")[-1], p.adapter) for p in find_pairs(model)] == [
        ("one", "default"),
        ("one", "second"),
        ("two", "default"),
    ]
    assert [p.shape for p in find_pairs(model, "second")] == [(8, 8, 3)]
    assert [p.adapter for p in find_pairs(model, "default")] == ["default"] * 2


def test_an_adapter_that_is_not_active_is_not_trainable():
    model = stack_model()
    model.add_adapter("second", LoraConfig(r=3, target_modules=["one"]))
    assert [p.adapter for p in find_pairs(model) if p.trainable] == ["default"] * 2
    model.set_adapter("second")
    assert [p.adapter for p in find_pairs(model) if p.trainable] == ["second"]


@pytest.mark.messages
def test_unknown_adapters_and_non_modules_are_refused():
    with pytest.raises(InputError, match=r"one of the model's adapters \(default\); got 'other'"):
        find_pairs(stack_model(), "other")
    with pytest.raises(InputError, match="none: it has no LoRA layers"):
        find_pairs(nn.Linear(2, 2), "default")
    with pytest.raises(InputError, match=r"model must be a torch\.nn\.Module; got dict"):
        find_pairs({})


def test_a_model_without_lora_has_no_pairs():
    assert find_pairs(nn.Sequential(nn.Linear(2, 2))) == []


@pytest.mark.parametrize("rslora", [False, True])
def test_rank_and_alpha_patterns(rslora):
    model = stack_model(lora_alpha=6, rank_pattern={"two": 4}, alpha_pattern={"two": 10}, use_rslora=rslora)
    one, two = find_pairs(model)
    assert (one.shape[2], two.shape[2]) == (2, 4)
    power = 0.5 if rslora else 1
    assert (one.scaling, two.scaling) == pytest.approx((6 / 2**power, 10 / 4**power))


def test_scaling_is_read_live():
    model = stack_model(lora_alpha=6)
    pair = find_pairs(model)[0]
    before = pair.delta_weight()
    pair.layer.set_scale("default", 0.5)
    assert pair.scaling == 1.5
    assert_close(pair.delta_weight(), before / 2)


def test_modules_to_save_are_no_pairs():
    pairs = find_pairs(stack_model(modules_to_save=["head"]))
    assert [pair.name.split(".")[-1] for pair in pairs] == ["one", "two"]


def test_pairs_are_the_live_parameters():
    model = stack_model()
    pair = find_pairs(model)[0]
    assert pair.layer is model.base_model.model.one
    assert pair.A is pair.layer.lora_A["default"].weight
    assert pair.B is pair.layer.lora_B["default"].weight


# --- tied and shared layers ---


def test_a_layer_registered_twice_is_listed_once():
    model = stack_model()
    inner = model.base_model.model
    inner.again = inner.one
    assert len(find_pairs(model)) == 2


def test_layers_that_share_their_factors_are_listed_once():
    model = stack_model()
    inner = model.base_model.model
    inner.two.lora_A, inner.two.lora_B = inner.one.lora_A, inner.one.lora_B
    assert [pair.name.split(".")[-1] for pair in find_pairs(model)] == ["one"]


def tied_llama():
    base = tiny_llama(tie_word_embeddings=True).double()
    targets = ["embed_tokens", "lm_head", "q_proj"]
    config = LoraConfig(r=2, lora_alpha=6, target_modules=targets, ensure_weight_tying=True)
    model = get_peft_model(base, config)
    for pair in find_pairs(model):
        with torch.no_grad():
            pair.A.normal_()
            pair.B.normal_()
    return model


def tied_loss(model):
    ids = torch.arange(12).view(2, 6)
    return model(input_ids=ids, labels=ids).loss


def test_tied_layers_are_listed_once_with_the_sum_of_their_gradients():
    model = tied_llama()
    tied, other = find_pairs(model)
    assert len(tied.tied) == 1
    assert other.tied == ()
    assert len(tied.parameters) == 4
    base = model.get_base_model()
    head = base.lm_head
    assert tied.tied[0][0] is head.lora_A["default"].weight
    tied_loss(model).backward()
    both = tied.gradients()
    alone = tied.A.grad, tied.B.grad
    other_A, other_B = (parameter.grad for parameter in tied.tied[0])
    assert_close(both[0], alone[0] + other_B.T)
    assert_close(both[1], alone[1] + other_A.T)


def test_the_tied_gradient_is_the_dense_gradient_of_the_tied_weight():
    model = tied_llama()
    tied, other = find_pairs(model)
    loss = tied_loss(model)
    loss.backward()
    plain = tiny_llama(tie_word_embeddings=True).double()
    with torch.no_grad():
        plain.model.embed_tokens.weight += tied.delta_weight().T
        plain.model.layers[0].self_attn.q_proj.weight += other.delta_weight()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    plain_loss = tied_loss(plain)
    plain_loss.backward()
    assert_close(loss.detach(), plain_loss.detach())
    g = plain.lm_head.weight.grad.T
    (A, B), (g_A, g_B) = tied.factors(), tied.gradients()
    assert_close(g_A, tied.scaling * B.T @ g)
    assert_close(g_B, tied.scaling * g @ A.T)


def test_tied_views_agree_after_a_step():
    model = tied_llama()
    tied = find_pairs(model)[0]
    optimizer = TangentAdam(model, lr=1e-2)
    before = tied.A.detach().clone()
    tied_loss(model).backward()
    optimizer.step()
    assert not torch.equal(tied.A, before)
    head_A, head_B = tied.tied[0]
    assert torch.equal(head_A, tied.B.T)
    assert torch.equal(head_B, tied.A.T)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in tied.parameters)


# --- what is no plain pair ---


class Mixed(nn.Module):
    """A linear layer, a grouped convolution and experts."""

    def __init__(self):
        super().__init__()
        self.linear, self.experts = nn.Linear(8, 8), Experts()
        self.grouped = nn.Conv1d(8, 8, 1, groups=2)

    def forward(self, x):
        return self.experts(self.grouped(self.linear(x).unsqueeze(-1)).squeeze(-1))


def mixed_model():
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["linear", "grouped"], target_parameters=["experts.weight"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LoRA adapter added to ConvNd layer with groups")
        return get_peft_model(Mixed(), config)


def test_what_is_no_plain_pair_is_named_in_one_warning():
    with pytest.warns(UserWarning, match="not plain LoRA pairs") as caught:
        pairs = find_pairs(mixed_model())
    assert [pair.name.split(".")[-1] for pair in pairs] == ["linear"]
    text = str(caught[0].message)
    assert len(caught) == 1
    assert "trained by AdamW" in text
    assert "convolution with groups" in text
    assert "target_parameters" in text
    assert "model.grouped" in text
    assert "model.experts" in text


def test_a_mixed_model_is_trained_with_adamw_beside_the_pairs():
    model = mixed_model()
    with pytest.warns(UserWarning, match="not plain LoRA pairs, so trained by AdamW") as caught:
        optimizer = TangentAdam(model, lr=1e-2)
    assert len(caught) == 1
    x = torch.randn(5, 8)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(loss_of(model(x)))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters() if name in before)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LoraConfig(r=2, target_modules=["one"], kasa_config=KasaConfig()), "KasaLinear"),
        (LoraConfig(r=2, target_modules=["one"], init_lora_weights="mica"), "MiCALinear"),
        (AdaLoraConfig(init_r=2, target_modules=["one"], total_step=10, tinit=0, tfinal=1), "AdaLoRA"),
    ],
)
def test_other_forward_passes_are_skipped_with_the_reason(config, reason):
    torch.manual_seed(0)
    model = get_peft_model(Stack(), config)
    found = discover(model)
    assert found.pairs == []
    assert list(found.skipped) == ["base_model.model.one"]
    assert reason in found.skipped["base_model.model.one"]
    with pytest.warns(UserWarning, match=reason):
        assert find_pairs(model) == []


def test_activated_lora_is_plain():
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[1])
    assert len(find_pairs(get_peft_model(tiny_llama(), config))) == 1


def test_one_plain_adapter_beside_another_kind():
    model = get_peft_model(Stack(), LoraConfig(r=2, target_modules=["one", "two"]), adapter_name="plain")
    model.add_adapter("mica", LoraConfig(r=2, target_modules=["one"], init_lora_weights="mica"))
    found = discover(model, "plain")
    assert [pair.adapter for pair in found.pairs] == ["plain"] * 2
    assert found.skipped == {}
    assert list(discover(model).skipped) == ["base_model.model.one"]


def test_a_warning_names_at_most_five_layers_per_reason():
    model = get_peft_model(
        nn.Sequential(*(nn.Linear(4, 4) for _ in range(7))),
        LoraConfig(r=2, target_modules=[str(index) for index in range(7)], init_lora_weights="mica"),
    )
    with pytest.warns(UserWarning, match=r"model\.4 and 2 more"):
        find_pairs(model)


def test_models_on_the_meta_device():
    with torch.device("meta"):
        model = get_peft_model(
            Stack(), LoraConfig(r=2, target_modules=["one", "two"]), low_cpu_mem_usage=True
        )
    assert len(find_pairs(model)) == 2
