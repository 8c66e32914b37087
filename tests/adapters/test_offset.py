"""An offset makes a layer compute W0 x + s (B A x - B0 A0 x), and every way of saving it fits the original base."""

import copy
import json
import pickle

import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import AdaLoraConfig, LoraConfig, PeftModel, XLoraConfig, get_peft_model, get_peft_model_state_dict
from peft.utils import set_peft_model_state_dict
from peft.utils.save_and_load import get_base_model_state_dict
from safetensors.torch import load_file
from torch import nn

from tangora import InputError, find_pairs
from tangora.adapters import (
    attach_offset,
    detach_offset,
    has_offset,
    offset_layer,
    save_adapter,
)
from tests.adapters.models import IDS, Experts, quantized, tiny_llama, train, updates
from tests.cases import combinations
from tests.models import LAYERS, Holder, adapted_layer, inputs_of, loss_of
from tests.tolerances import assert_close

QUANTIZED = {"nf4", "nf4-dora", "int8"}
SINGLE = sorted(LAYERS.keys() - {"attention"})
# PEFT says so whenever an embedding is adapted, and of int8 and 4-bit layers whenever they are merged
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:.*rslora.*"),
]


@pytest.fixture(autouse=True)
def _no_model_card(monkeypatch):
    """PEFT compiles the template of its card at every saving, which takes longer than all the rest."""
    monkeypatch.setattr(PeftModel, "create_or_update_model_card", lambda *_: None)


# --- models ---


def gpt2():
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def t5():
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, decoder_start_token_id=0, tie_word_embeddings=False)
    )


def vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)
    )


def run(model, name="linear"):
    torch.manual_seed(1)
    inputs = {
        "t5": {"input_ids": IDS, "decoder_input_ids": IDS},
        "vit": {"pixel_values": torch.randn(2, 3, 8, 8, dtype=torch.float64)},
    }.get(name, {"input_ids": IDS})
    with torch.no_grad():
        output = model(torch.randn(3, 64)) if name in QUANTIZED else model(**inputs)
    return getattr(output, "logits", output)


PATTERN = {"rank_pattern": {"q_proj": 3}}
ALPHAS = {"alpha_pattern": {"v_proj": 20}}
MODELS = {
    "linear": (tiny_llama, {}),
    "all-linear": (tiny_llama, {"target_modules": "all-linear"}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "t5": (t5, {"target_modules": ["q", "wo"]}),
    "vit": (vit, {"target_modules": ["projection", "q_proj", "fc1"], "modules_to_save": ["classifier"]}),
    "embedding": (tiny_llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "dora": (tiny_llama, {"use_dora": True}),
    "dora-embedding": (tiny_llama, {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]}),
    "rslora": (tiny_llama, {"use_rslora": True}),
    "rank-pattern": (tiny_llama, PATTERN),
    "rank-pattern-rslora": (tiny_llama, {**PATTERN, "use_rslora": True}),
    "alpha-pattern": (tiny_llama, ALPHAS),
    "patterns-rslora": (tiny_llama, {**PATTERN, **ALPHAS, "use_rslora": True}),
    "modules-to-save": (tiny_llama, {"modules_to_save": ["lm_head"]}),
    "float32": (tiny_llama, {}),
    "bf16": (tiny_llama, {}),
    "nf4": (lambda: quantized("nf4"), {"target_modules": ["it"]}),
    "nf4-dora": (lambda: quantized("nf4"), {"target_modules": ["it"], "use_dora": True}),
    "int8": (lambda: quantized("int8"), {"target_modules": ["it"]}),
}
TOLERANCE = {"float32": 1e-5, "bf16": 1e-1, "nf4": 1e-5, "nf4-dora": 1e-5, "int8": 1e-5}


def base_of(name="linear"):
    base = MODELS[name][0]().eval()
    if name in QUANTIZED:
        return base
    return base.to({"float32": torch.float32, "bf16": torch.bfloat16}.get(name, torch.float64))


def plain(name="linear", adapter="default", **changes):
    torch.manual_seed(2)
    options = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **MODELS[name][1], **changes}
    base = base_of(name)
    return get_peft_model(
        base, LoraConfig(**options), adapter_name=adapter, autocast_adapter_dtype=False
    ).eval()


def start(model, adapter="default", seed=3, scale=0.5):
    """Random factors as the start and as the offset, so that the model is still the base."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for pair in find_pairs(model, adapter):
        for parameter in (pair.A, pair.B):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(scale * noise)
        A, B = pair.factors()
        factors[pair.name] = (B.clone(), A.clone())
    attach_offset(model, adapter, factors)
    return model


def loaded(path, name="linear", **options):
    return PeftModel.from_pretrained(base_of(name), str(path), autocast_adapter_dtype=False, **options).eval()


# --- whole models: saved is what was trained, and the base is never touched ---


# the configs that patterns are saved with are compared one by one below
@pytest.mark.parametrize(
    "name", combinations(MODELS, quick=lambda name: "pattern" not in name or name == "patterns-rslora")
)
def test_saved_adapters_fit_the_original_base(name, tmp_path):
    tolerance = TOLERANCE.get(name, 1e-12)
    base = base_of(name)
    before, expected_base = base.state_dict(), run(base, name)
    model = start(plain(name))
    assert torch.equal(run(model, name), expected_base)
    train(model)
    trained = run(model, name)
    assert float((trained - expected_base).abs().max()) > 1e-3
    paths = save_adapter(model, tmp_path / "ours"), tmp_path / "peft"
    model.save_pretrained(paths[1])
    for path in paths:
        assert_close(run(loaded(path, name), name), trained, tolerance)
    after = get_base_model_state_dict(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items() if "lm_head" not in key)
    with model.disable_adapter():
        assert torch.equal(run(model, name), expected_base)
    assert torch.equal(run(model, name), trained)


def test_saved_bf16_adapters_are_the_same_in_exact_arithmetic(tmp_path):
    model = train(start(plain("bf16")))
    path = save_adapter(model, tmp_path / "adapter")
    assert_close(run(loaded(path, "bf16").double()), run(model.double()), 1e-12)


def test_small_changes_of_large_factors_survive_low_precision():
    model = start(plain("float32"), scale=3.0)
    expected = copy.deepcopy(model).double()
    for each in (model, expected):
        for pair in find_pairs(each):
            noise = torch.randn(pair.B.shape, generator=torch.Generator().manual_seed(1))
            pair.B.data.add_((1e-3 * noise).to(pair.B))
    layer, exact = find_pairs(model)[0].layer, find_pairs(expected)[0].layer
    x = torch.randn(5, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        part = layer.lora_variant["default"].forward(layer, "default", x, torch.zeros(()))
    change = (exact(x.double()) - exact.base_layer(x.double())).detach()
    assert_close(part.double(), change, 2e-2)  # the two products alone are rounded by more than the change


@pytest.mark.parametrize("name", ["patterns-rslora", "rank-pattern", "rank-pattern-rslora", "alpha-pattern"])
def test_the_saved_config_doubles_ranks_and_keeps_scalings(name, tmp_path):
    model = start(plain(name))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    in_memory = model.peft_config["default"]
    assert config["r"] == 2 * in_memory.r == 4
    assert config["rank_pattern"] == {key: 2 * rank for key, rank in in_memory.rank_pattern.items()}
    assert config["init_lora_weights"] is True
    for own, other in zip(find_pairs(model), find_pairs(loaded(tmp_path, name)), strict=True):
        assert other.scaling == pytest.approx(own.scaling, rel=1e-15)
        assert other.shape[2] == 2 * own.shape[2]


def test_other_adapters_made_from_the_same_config_are_saved_as_they_are(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"])
    model = get_peft_model(base_of(), config, autocast_adapter_dtype=False)
    model.add_adapter("second", config)
    start(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4
    assert json.loads((tmp_path / "second" / "adapter_config.json").read_text())["r"] == 2
    assert config.to_dict()["r"] == 2


def test_layers_without_factors_get_zeros_and_the_same_rank(tmp_path):
    model = plain("rank-pattern")
    pairs = find_pairs(model)
    attach_offset(model, "default", {pairs[0].name: tuple(f.clone() for f in pairs[0].factors()[::-1])})
    B0, A0 = pairs[1].offset()
    assert not B0.any()
    assert not A0.any()
    train(model)
    model.save_pretrained(tmp_path)
    shapes = {key: tensor.shape for key, tensor in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert sorted(min(shape) for shape in shapes.values()) == [4, 4, 6, 6]
    assert_close(run(loaded(tmp_path, "rank-pattern")), run(model), 1e-12)


# --- single layers: the same as PEFT on the base weight W0 - s B0 A0 ---


def beside_mutated(name, **config):
    """A layer with an offset, and PEFT's layer on the changed base weight."""
    model = adapted_layer(name, **config).train()
    mutated = copy.deepcopy(model)
    (pair,) = find_pairs(mutated)
    generator = torch.Generator().manual_seed(5)
    m, n, r = pair.shape
    B0, A0 = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((m, r), (r, n)))
    change = pair.scaling * (B0 @ A0)
    weight = pair.layer.get_base_layer().weight
    weight.data -= (change.T if pair.transposed else change).reshape(weight.shape)
    attach_offset(model, "default", {pair.name: (B0, A0)})
    return model, mutated


def loss_and_gradients(model, name):
    torch.manual_seed(6)  # the same dropout
    loss = loss_of(model(*inputs_of(name)))
    model.zero_grad()
    loss.backward()
    return loss.detach(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("name", SINGLE)
def test_loss_and_gradients_are_those_on_the_changed_base(name, dropout, config):
    model, mutated = beside_mutated(name, lora_dropout=dropout, **config)
    (loss, gradients), (expected, others) = (loss_and_gradients(each, name) for each in (model, mutated))
    assert_close(loss, expected, 1e-12)
    assert gradients.keys() == others.keys()
    assert all("offset" not in key for key in gradients)
    for key, gradient in gradients.items():
        assert_close(gradient, others[key], 1e-10)


@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*")
def test_a_bias_of_lora_is_kept():
    model, mutated = beside_mutated("linear", lora_bias=True)
    with torch.no_grad():
        for each in (model, mutated):
            each.base_model.model.it.lora_B["default"].bias.fill_(0.3)
    inputs = inputs_of("linear")
    expected = mutated(*inputs).detach()
    assert_close(model(*inputs).detach(), expected, 1e-12)
    model.merge_adapter()
    assert_close(model(*inputs).detach(), expected, 1e-12)


@pytest.mark.parametrize("name", ["linear", "gpt2-conv1d", "conv2d"])
def test_factors_that_are_sharded_are_only_used_through_their_modules(name, monkeypatch):
    model, mutated = beside_mutated(name, lora_dropout=0.4)
    expected, others = loss_and_gradients(mutated, name)
    monkeypatch.setattr(offset_layer, "_readable", lambda *_: False)
    loss, gradients = loss_and_gradients(model, name)
    assert_close(loss, expected, 1e-12)
    assert all(torch.allclose(gradients[key], others[key], rtol=1e-10) for key in gradients)


def test_an_embedding_that_scales_its_output():
    class Scaled(nn.Embedding):
        embed_scale = 4.0

        def forward(self, ids):
            return super().forward(ids) * self.embed_scale

    torch.manual_seed(0)
    holder = Holder(Scaled(11, 6).double())
    model = start(
        get_peft_model(holder, LoraConfig(r=2, target_modules=["it"]), autocast_adapter_dtype=False)
    )
    inputs = inputs_of("embedding")
    with torch.no_grad():
        assert torch.equal(model(*inputs), holder.it.base_layer(*inputs))
        train(model)
        trained = model(*inputs)
        model.merge_adapter()
        assert_close(model(*inputs), trained, 1e-12)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", SINGLE)
def test_merging_and_unmerging(name, dora, safe):
    model = beside_mutated(name, use_dora=dora)[0].eval()
    inputs = inputs_of(name)
    trained = model(*inputs).detach()
    layer = model.base_model.model.it
    before = layer.get_base_layer().weight.detach().clone()
    model.merge_adapter(safe_merge=safe)
    assert not torch.equal(layer.get_base_layer().weight, before)
    assert_close(layer.base_layer(*inputs).detach(), trained, 1e-11)
    model.unmerge_adapter()
    assert_close(layer.get_base_layer().weight.detach(), before, 1e-11)
    assert_close(model(*inputs).detach(), trained, 1e-11)
    merged = model.merge_and_unload(safe_merge=safe)
    assert_close(merged(*inputs).detach(), trained, 1e-11)
    assert not any("lora" in key for key in merged.state_dict())


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
@pytest.mark.parametrize("dora", [False, True])
def test_two_offsets_are_merged_together(dora):
    model = beside_mutated("linear", use_dora=dora)[0].eval()
    model.add_adapter("second", LoraConfig(r=3, target_modules=["it"], use_dora=dora))
    start(model.double(), "second")
    model.base_model.set_adapter(["default", "second"])
    train(model)
    inputs, layer = inputs_of("linear"), model.base_model.model.it
    trained, before = model(*inputs).detach(), layer.base_layer.weight.detach().clone()
    model.merge_adapter(safe_merge=True)
    if not dora:  # PEFT's DoRA adapters, merged one after another, are not what they are side by side
        assert_close(layer.base_layer(*inputs).detach(), trained, 1e-11)
    model.unmerge_adapter()
    assert_close(layer.base_layer.weight.detach(), before, 1e-11)
    assert_close(model(*inputs).detach(), trained, 1e-11)


@pytest.mark.filterwarnings("ignore:.*may get different generations due to rounding")
@pytest.mark.parametrize("name", ["nf4", "nf4-dora", "int8"])
def test_quantized_layers_are_merged_as_peft_merges_the_saved_adapter(name, tmp_path):
    model = train(start(plain(name)))
    model.save_pretrained(tmp_path)
    other = loaded(tmp_path, name)
    assert_close(
        run(model.merge_and_unload(safe_merge=True), name),
        run(other.merge_and_unload(safe_merge=True), name),
        1e-5,
    )


# --- several adapters, modes, copies ---


def two_adapters():
    model = start(plain())
    model.add_adapter(
        "second", LoraConfig(r=3, target_modules=["q_proj", "k_proj"]), autocast_adapter_dtype=False
    )
    return randomized_second(train(model))


def randomized_second(model):
    for pair in find_pairs(model, "second"):
        pair.B.data.normal_(generator=torch.Generator().manual_seed(7))
    return model


def test_an_adapter_with_and_one_without_an_offset(tmp_path):
    model = two_adapters()
    base = run(base_of())
    first = run(model)
    model.set_adapter("second")
    second = run(model)
    assert not any(pair.trainable for pair in find_pairs(model, "default"))
    assert [p for n, p in model.named_parameters() if "offset" in n] == []
    model.save_pretrained(tmp_path)
    assert_close(run(loaded(tmp_path)), first, 1e-12)
    assert_close(run(loaded(tmp_path / "second")), second, 1e-12)
    layer = find_pairs(model, "second")[0].layer
    x = torch.randn(2, 16, dtype=torch.float64)
    outputs = {}
    for names in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(names)
        outputs[tuple(names)] = layer(x).detach()
    sum_of_both = outputs["default",] + outputs["second",] - layer.base_layer(x)
    assert_close(outputs["default", "second"], sum_of_both, 1e-12)
    with model.disable_adapter():
        assert torch.equal(run(model), base)


@pytest.mark.parametrize("name", ["linear", "embedding", "gpt2", "vit"])
def test_one_batch_may_mix_adapters(name):
    model = start(plain(name))
    targets = MODELS[name][1].get("target_modules", ["q_proj", "v_proj"])
    config = LoraConfig(r=3, target_modules=targets, fan_in_fan_out=name == "gpt2")
    model.add_adapter("second", config, autocast_adapter_dtype=False)
    for pair in find_pairs(model, "second"):
        for parameter in (pair.A, pair.B):
            parameter.data.normal_(generator=torch.Generator().manual_seed(8))
    train(model)
    inputs = IDS if name != "vit" else torch.randn(2, 3, 8, 8, dtype=torch.float64)
    alone = {}
    with torch.no_grad():
        for adapter in ("default", "second"):
            model.set_adapter(adapter)
            alone[adapter] = model(inputs).logits
        with model.disable_adapter():
            alone["__base__"] = model(inputs).logits
        if name == "vit":  # modules_to_save of one adapter alone
            return
        for names in (["default", "second"], ["__base__", "default"], ["second", "__base__"]):
            mixed = model(inputs, adapter_names=names).logits
            for row, adapter in enumerate(names):
                assert_close(mixed[row], alone[adapter][row], 1e-12)


def test_the_scaling_is_read_at_each_call():
    model = train(start(plain()))
    pair = find_pairs(model)[0]
    x = torch.randn(3, 16, dtype=torch.float64)
    part = (pair.layer(x) - pair.layer.base_layer(x)).detach()
    pair.layer.set_scale("default", 0.5)
    assert_close((pair.layer(x) - pair.layer.base_layer(x)).detach(), 0.5 * part, 1e-12)


def test_dropout_falls_on_the_trained_pair_alone():
    model = start(plain(lora_dropout=0.5)).train()
    pair = find_pairs(model)[0]
    x = torch.ones(500, 16, dtype=torch.float64)
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)
    torch.manual_seed(0)
    A, B = pair.factors()
    expected = pair.layer.base_layer(x) + pair.scaling * (dropped - x) @ A.T @ B.T
    assert_close(pair.layer(x).detach(), expected, 1e-12)


@pytest.mark.parametrize("name", ["linear", "embedding", "dora", "nf4"])
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_independent_and_whole(name, way, tmp_path):
    model = train(start(plain(name)))
    trained = run(model, name)
    twin = way(model)
    assert torch.equal(run(twin, name), trained)
    train(twin, seed=9)
    assert torch.equal(run(model, name), trained)
    twin.save_pretrained(tmp_path)
    tolerance = TOLERANCE.get(name, 1e-12)
    assert_close(run(loaded(tmp_path, name), name), run(twin, name), tolerance)
    state = get_peft_model_state_dict(model)
    train(twin, seed=10)
    set_peft_model_state_dict(twin, state)
    assert torch.equal(run(twin, name), trained)


def test_deleting_the_adapter_deletes_its_offset(tmp_path):
    model = two_adapters()
    model.set_adapter("second")
    second = run(model)
    model.delete_adapter("default")
    assert not has_offset(model, "default")
    assert torch.equal(run(model), second)
    model.save_pretrained(tmp_path)
    model.add_adapter("default", LoraConfig(r=2, target_modules=["q_proj"]), autocast_adapter_dtype=False)
    model.set_adapter("default")
    assert torch.equal(run(model), run(base_of()))
    assert (
        get_peft_model_state_dict(model)[
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        ].shape[0]
        == 2
    )


def test_attaching_again_replaces_and_detaching_restores():
    model = plain("dora")
    train(model)
    without = run(model, "dora")
    start(model)
    first = {pair.name: pair.offset()[0].clone() for pair in find_pairs(model)}
    start(model, seed=11)
    assert all(not torch.equal(first[pair.name], pair.offset()[0]) for pair in find_pairs(model))
    layer = find_pairs(model)[0].layer
    assert type(layer.lora_variant["default"].inner).__name__ == "DoraLinearVariant"
    assert len(layer._state_dict_hooks) == len(layer._load_state_dict_pre_hooks) == 1
    detach_offset(model, "default")
    detach_offset(model, "default")
    train(start_from(model))
    assert_close(run(model, "dora"), without, 1e-12)
    assert not has_offset(model, "default")
    assert find_pairs(model)[0].offset() is None
    assert type(model.peft_config["default"]) is LoraConfig
    assert model.peft_config["default"].to_dict()["r"] == 2


def start_from(model):
    fresh = plain("dora").state_dict()
    model.load_state_dict(fresh)
    return model


def test_the_offset_is_frozen_and_moves_with_the_model():
    model = start(plain())
    model.requires_grad_(True)
    model.set_adapter("default")
    offset = find_pairs(model)[0].layer.lora_offset["default"]
    assert not offset.A0.requires_grad
    assert not list(offset.parameters())
    count = sum(p.numel() for p in plain().parameters())
    assert sum(p.numel() for p in model.parameters()) == count
    model.float()
    assert offset.A0.dtype == torch.float32
    assert model.get_model_status().requires_grad["default"] is True
    assert model.get_model_status().available_adapters == ["default"]


def test_adapters_cast_by_peft_after_the_start():
    model = start(plain("bf16"))
    model.base_model._cast_adapter_dtype("default", autocast_adapter_dtype=True)
    assert find_pairs(model)[0].A.dtype == torch.float32
    assert find_pairs(model)[0].offset()[0].dtype == torch.bfloat16
    assert torch.equal(run(model, "bf16"), run(base_of("bf16"), "bf16"))
    state = get_peft_model_state_dict(model)
    assert all(tensor.dtype == torch.float32 for tensor in state.values())


def test_modules_that_accelerate_hooked_are_not_called_past_the_offset():
    model = start(plain("dora"))
    expected = run(train(model))
    for pair in find_pairs(model):
        for factor in (pair.layer.lora_A["default"], pair.layer.lora_B["default"]):
            add_hook_to_module(factor, AlignDevicesHook(execution_device="cpu"))
    assert torch.equal(run(model), expected)


@pytest.mark.messages
@pytest.mark.parametrize(
    "name",
    ["linear", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dora-embedding", "gpt2"))],
)
def test_a_compiled_model(name):
    torch._dynamo.reset()
    model = plain(name)
    compiled = torch.compile(model, backend="eager")
    run(compiled, name)
    factors = {pair.name: pair.factors()[::-1] for pair in find_pairs(start(copy.deepcopy(model)))}
    attach_offset(compiled, "default", factors)
    train(model)
    assert_close(run(compiled, name), run(model, name), 1e-12)
    detach_offset(compiled, "default")
    assert not has_offset(model, "default")


@pytest.mark.parametrize("name", ["linear", "gpt2-conv1d", "conv2d", "embedding"])
def test_magnitudes_follow_the_whole_weight(name):
    model = adapted_layer(name, use_dora=True).eval()
    (pair,) = find_pairs(model)
    attach_offset(model, "default", {pair.name: tuple(1.5 * factor for factor in pair.factors()[::-1])})
    (A, B), (B0, A0) = pair.factors(), pair.offset()
    weight = pair.base_weight() + pair.scaling * (B @ A - B0 @ A0)
    known = pair.layer.lora_magnitude_vector["default"].weight.requires_grad_(False)
    pair.refresh_magnitude()
    magnitude = pair.layer.lora_magnitude_vector["default"].weight
    assert magnitude is known  # an optimizer may hold it
    assert not magnitude.requires_grad
    assert_close(magnitude.flatten(), weight.norm(dim=1), 1e-12)


# --- state ---


@pytest.mark.parametrize("name", ["linear", "embedding", "vit", "dora"])
def test_the_state_is_the_plain_pair_and_loads_into_both_halves(name):
    model = train(start(plain(name)))
    expected, before = run(model, name), updates(model)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert not any("offset" in key for key in state)
    for pair in find_pairs(model):
        keys = [
            key for key in state if key.startswith(pair.name) and (".lora_A" in key or "embedding_A" in key)
        ]
        assert [state[key].shape[0] for key in keys] == [2 * pair.shape[2]]
    other = train(start(plain(name), seed=12), seed=13)
    assert float((run(other, name) - expected).abs().max()) > 1e-3
    other.load_state_dict(state)
    assert torch.equal(run(other, name), expected)
    for key, update in updates(other).items():
        assert torch.equal(update, before[key])


def test_peft_loads_into_an_adapter_that_exists(tmp_path):
    model = train(start(plain()))
    expected = run(model)
    model.save_pretrained(tmp_path)
    other = train(start(plain(), seed=12), seed=13)
    result = other.load_adapter(str(tmp_path), "default", is_trainable=True, autocast_adapter_dtype=False)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(run(other), expected)
    assert all(pair.trainable for pair in find_pairs(other))


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_saved_adapter_is_an_ordinary_one_to_train_on(low_memory, tmp_path):
    model = train(start(plain()))
    path = save_adapter(model, tmp_path / "first")
    again = loaded(path, is_trainable=True, low_cpu_mem_usage=low_memory)
    assert not has_offset(again, "default")
    train(again)
    second = save_adapter(again, tmp_path / "second")
    assert second.rank == 4
    assert_close(run(loaded(second)), run(again), 1e-12)


@pytest.mark.messages
def test_states_of_another_rank_are_refused(tmp_path):
    model = start(plain())
    expected = run(model)
    with pytest.raises(InputError, match=r"lora_A\.default\.weight must have rank 4, .* got shape \(2, 16\)"):
        model.load_state_dict(plain().state_dict())
    assert torch.equal(run(model), expected)
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"has rank 4 in .*q_proj, .*tangora\.initialize"):
        plain().load_adapter(str(tmp_path), "default")
    other = tmp_path / "other"
    plain(r=3).save_pretrained(other)
    with pytest.raises(InputError, match=r"has rank 3 in .*q_proj, but adapter 'default' has rank 2: create"):
        plain().load_adapter(str(other), "default")


class Sentences(torch.utils.data.Dataset):
    """Token ids that are their own labels."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        ids = (torch.arange(8) * (index + 1)) % 32
        return {"input_ids": ids, "labels": ids}


def trainer_of(folder, seed):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=100,
    )
    model = start(plain("float32", lora_dropout=0.1, modules_to_save=["lm_head"]), seed=seed)
    return transformers.Trainer(model=model, args=arguments, train_dataset=Sentences())


def test_a_trainer_resumes_bit_for_bit(tmp_path):
    whole = trainer_of(tmp_path, seed=3)
    whole.train()
    resumed = trainer_of(tmp_path / "again", seed=14)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    states = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    whole.model.eval()
    assert torch.equal(run(whole.model), run(resumed.model.eval()))
    assert_close(run(loaded(tmp_path / "checkpoint-4", "float32")), run(whole.model), 1e-5)
    base = get_base_model_state_dict(whole.model)
    assert all(torch.equal(base[key], value) for key, value in base_of("float32").state_dict().items())


# --- errors ---


@pytest.mark.messages
def test_factors_must_fit():
    model = plain()
    name = find_pairs(model)[0].name
    good = torch.zeros(16, 2), torch.zeros(2, 16)
    with pytest.raises(
        InputError, match=r"factors must name layers of the adapter, such as .*q_proj; got nowhere"
    ):
        attach_offset(model, "default", {"nowhere": good})
    with pytest.raises(
        InputError, match=r"must have shapes \(16, 2\) and \(2, 16\); got \(2, 16\) and \(16, 2\)"
    ):
        attach_offset(model, "default", {name: good[::-1]})
    with pytest.raises(InputError, match="must be finite"):
        attach_offset(model, "default", {name: (good[0], good[1] / 0)})
    with pytest.raises(InputError, match="adapter_name must be one of"):
        attach_offset(model, "other", {})
    with pytest.raises(InputError, match="needs a PeftModel"):
        attach_offset(base_of(), "default", {})
    assert not has_offset(model, "default")
    assert type(model.peft_config["default"]) is LoraConfig


@pytest.mark.messages
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adapted_layer("attention"), r"MultiheadAttention, whose forward pass"),
        (lambda: plain("float32", init_lora_weights="olora"), "changed the base weights"),
        (
            lambda: plain(alora_invocation_tokens=[1], task_type="CAUSAL_LM"),
            r"forward pass .*\(ALora\)",
        ),
        (
            lambda: get_peft_model(Holder(Experts()), LoraConfig(r=2, target_parameters=["it.weight"])),
            "plain pair .*: target_parameters",
        ),
        (
            lambda: get_peft_model(
                Holder(nn.Conv1d(4, 4, 3, groups=2)), LoraConfig(r=2, target_modules=["it"])
            ),
            "convolution with groups",
        ),
        (
            lambda: get_peft_model(
                tiny_llama(),
                AdaLoraConfig(init_r=2, target_modules=["q_proj"], total_step=10, tinit=0, tfinal=1),
            ),
            "AdaLoRA",
        ),
        (
            lambda: get_peft_model(
                tiny_llama(tie_word_embeddings=True),
                LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True),
            ),
            "tied to those of another layer",
        ),
        (
            lambda: get_peft_model(
                Holder(nn.Embedding(8, 4, max_norm=1.0)), LoraConfig(r=2, target_modules=["it"])
            ),
            "max_norm of the embedding",
        ),
    ],
    ids=["attention", "olora", "alora", "experts", "groups", "adalora", "tied", "max-norm"],
)
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_what_cannot_carry_an_offset_is_named(make, message):
    model = make()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        attach_offset(model, "default", {})
    assert not has_offset(model, "default")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.messages
def test_adapters_that_xlora_mixes_are_refused(tmp_path):
    plain("float32").save_pretrained(tmp_path)
    adapters = {"0": str(tmp_path), "1": str(tmp_path)}
    base = base_of("float32")
    base.config.use_cache = False
    model = get_peft_model(base, XLoraConfig(hidden_size=16, xlora_depth=1, adapters=adapters))
    with pytest.raises(InputError, match=r"'0' must be LoRA; got .*XLoraModel"):
        attach_offset(model, "0", {})


@pytest.mark.messages
def test_merged_adapters_are_refused():
    model = start(plain())
    model.merge_adapter()
    with pytest.raises(InputError, match=r"is merged into .*q_proj: call unmerge_adapter first"):
        attach_offset(model, "default", {})
    with pytest.raises(InputError, match="is merged"):
        detach_offset(model, "default")
    model.unmerge_adapter()
    detach_offset(model, "default")
