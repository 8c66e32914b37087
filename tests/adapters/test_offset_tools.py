"""PEFT's and TRL's own tools on an adapter with an offset give the right model, or one sentence."""

import copy
import pickle

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.conversion import convert_to_lora, save_as_lora
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft.utils import set_peft_model_state_dict
from peft.utils.hotswap import (
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)

from tangora import InputError, find_pairs, load_adapter, save_adapter
from tangora.adapters import attach_offset, detach_offset, has_offset
from tests.adapters.models import IDS, train
from tests.adapters.test_offset import MODELS, QUANTIZED, base_of, plain, run, start
from tests.models import Holder, adapted_layer, inputs_of
from tests.tolerances import assert_close

KINDS = ["linear", "gpt2", "embedding", "dora", "dora-embedding", "rslora", "patterns-rslora", "nf4", "vit"]
WEIGHTED = 1e-6  # PEFT keeps the weights of combinations in float32
EXACT = {name for name in KINDS if "dora" not in name and name not in QUANTIZED}

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:.*rslora.*"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
]


@pytest.fixture(autouse=True)
def _no_model_card(monkeypatch):
    monkeypatch.setattr(PeftModel, "create_or_update_model_card", lambda *_: None)


def started(name="linear"):
    return start(plain(name))


def with_second(name="linear", **changes):
    """Give the model a plain adapter besides one with an offset."""
    model = train(started(name))
    options = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **MODELS[name][1], **changes}
    options.pop("modules_to_save", None)
    model.add_adapter("second", LoraConfig(**options, init_lora_weights=False))
    return model.eval()


def copied_like_trl(model, reference="ref"):
    """Do what TRL does for the reference model of DPO, GRPO and KTO, line by line."""
    model.add_adapter(reference, model.peft_config["default"])
    for name, param in model.named_parameters():
        if ".default." in name:
            ref_param = model.get_parameter(name.replace(".default.", f".{reference}."))
            ref_param.data.copy_(param.data)
    return model


def logits(model, adapter, name="linear"):
    before = model.active_adapters
    model.set_adapter(adapter)
    output = run(model, name)
    model.set_adapter(before[0])
    return output


def factors(model, adapter="default"):
    return {
        key: value.clone() for key, value in get_peft_model_state_dict(model, adapter_name=adapter).items()
    }


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --- copies of the adapter ---


@pytest.mark.parametrize("name", KINDS)
def test_trl_s_reference_adapter_is_the_model_it_was_copied_from(name):
    model = started(name)
    base = run(model.get_base_model() if name in QUANTIZED else base_of(name), name)
    model = copied_like_trl(model)
    if name in EXACT:  # in others the start of these tests has not the base's magnitudes
        assert_close(logits(model, "ref", name), base)
    assert_close(logits(model, "ref", name), logits(model, "default", name))
    reference = logits(model, "ref", name)
    trained = train(model)
    with torch.no_grad():
        assert not torch.allclose(logits(trained, "default", name), reference)


def test_trl_s_copy_of_a_trained_adapter_stays_where_it_was():
    model = copied_like_trl(train(started()))
    expected = logits(model, "default")
    assert_close(logits(model, "ref"), expected)
    model.set_adapter("default")
    train(model)
    assert_close(logits(model, "ref"), expected)
    assert not torch.allclose(logits(model, "default"), expected)


@pytest.mark.parametrize("name", ["linear", "gpt2", "embedding", "dora", "rslora", "nf4"])
def test_an_added_adapter_starts_at_the_same_base(name):
    model = started(name)
    before = logits(model, "default", name)
    train(model)
    model.add_adapter("again", copy.deepcopy(model.peft_config["default"]))
    if "dora" not in name:
        assert_close(logits(model, "again", name), before)
    assert has_offset(model, "again")
    offsets = [m.lora_offset for m in model.modules() if hasattr(m, "lora_offset")]
    assert all(o["again"].A0.data_ptr() != o["default"].A0.data_ptr() for o in offsets)


def test_each_copy_has_the_offset_of_the_adapter_it_was_made_from():
    model = started()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    start(model, "other", seed=7)
    for source in ("default", "other"):
        model.add_adapter(f"like-{source}", model.peft_config[source])
        for layer in (pair.layer for pair in find_pairs(model, source)):
            copied, first = layer.lora_offset[f"like-{source}"], layer.lora_offset[source]
            assert torch.equal(copied.A0, first.A0)
            assert torch.equal(copied.B0, first.B0)


@pytest.mark.messages
def test_arrow_does_not_route_to_an_offset():
    model = started()
    with pytest.raises(InputError, match=r"'default' has an initial product .* cannot be routed to"):
        model.add_adapter("router", LoraConfig(arrow_config=peft.ArrowConfig()))
    assert set(model.peft_config) == {"default"}


def test_an_added_adapter_of_dora_starts_at_the_base():
    model = get_peft_model(base_of(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)).eval()
    for pair in find_pairs(model):
        torch.nn.init.normal_(pair.B)
    attach_offset(model, "default", {p.name: p.factors()[::-1] for p in find_pairs(model)})
    model.add_adapter("again", model.peft_config["default"])
    assert_close(logits(model, "again"), run(base_of()))


@pytest.mark.parametrize("name", ["linear", "embedding", "dora", "rslora"])
def test_the_copy_is_saved_and_loaded_like_the_first(name, tmp_path):
    model = copied_like_trl(train(started(name)))
    model.set_adapter("ref")
    save_adapter(model, tmp_path / "ref")
    again = load_adapter(base_of(name), tmp_path / "ref", adapter_name="ref", autocast_adapter_dtype=False)
    assert_close(run(again.eval(), name), logits(model, "ref", name))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_the_model_refuse_and_copy_by_themselves(way):
    model = train(started())
    twin = way(model)
    train(model, seed=9)
    expected = run(twin)
    assert_close(logits(copied_like_trl(twin), "ref"), expected)
    with pytest.raises(InputError, match="'default'"):
        find_pairs(twin, "default")[0].layer.get_delta_weight("default")
    detach_offset(model, "default")
    find_pairs(model, "default")[0].layer.get_delta_weight("default")


def test_detaching_leaves_the_copy_its_offset():
    model = copied_like_trl(started())
    before = logits(model, "ref")
    detach_offset(model, "default")
    assert type(model.peft_config["default"]) is LoraConfig
    model.add_adapter("like-ref", model.peft_config["ref"])
    assert_close(logits(model, "like-ref"), before)
    assert model.peft_config["ref"].to_dict()["r"] == 4
    assert_close(logits(model, "ref"), before)


@pytest.mark.messages
def test_a_config_with_an_offset_is_of_no_use_without_it():
    model = started()
    config = copy.deepcopy(model.peft_config["default"])
    with pytest.raises(InputError, match="'default' was created from the config"):
        get_peft_model(base_of(), config)
    with pytest.raises(InputError, match="'other' was created from the config"):
        peft.inject_adapter_in_model(config, base_of(), adapter_name="other")
    detach_offset(model, "default")
    with pytest.raises(InputError, match="'ref' was created from the config"):
        model.add_adapter("ref", config)
    assert set(model.peft_config) == {"default"}
    assert not any("ref" in key for key in model.state_dict())


def test_averages_of_states_are_those_of_the_factors():
    clients = [train(started(), seed=seed) for seed in (4, 5)]
    states = [get_peft_model_state_dict(client) for client in clients]
    server = started()
    set_peft_model_state_dict(server, {key: (states[0][key] + states[1][key]) / 2 for key in states[0]})
    expected = started()
    with torch.no_grad():
        for own, one, two in zip(*(m.parameters() for m in (expected, *clients)), strict=True):
            own.copy_((one + two) / 2)
    assert_close(run(server), run(expected))


# --- refused ---

COMBINATIONS = [
    "svd",
    "linear",
    "cat",
    "ties",
    "ties_svd",
    "dare_ties",
    "dare_linear",
    "dare_ties_svd",
    "dare_linear_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]


@pytest.mark.messages
@pytest.mark.parametrize("order", [["default", "second"], ["second", "default"], ["default"]])
@pytest.mark.parametrize("kind", COMBINATIONS)
def test_no_combination_with_an_offset(kind, order):
    model = with_second()
    before = model.state_dict().keys()
    with pytest.raises(
        InputError, match=r"'default' has an initial product .* cannot be combined with others"
    ):
        model.add_weighted_adapter(order, [0.5] * len(order), "both", combination_type=kind, density=0.5)
    assert model.state_dict().keys() == before
    assert set(model.peft_config) == {"default", "second"}


@pytest.mark.parametrize("name", ["linear", "gpt2", "embedding"])
def test_what_was_saved_can_be_combined(name, tmp_path):
    model = with_second(name)
    for adapter in ("default", "second"):
        model.set_adapter(adapter)
        save_adapter(model, tmp_path / adapter)
    loaded = load_adapter(base_of(name), tmp_path / "default", autocast_adapter_dtype=False)
    loaded.load_adapter(str(tmp_path / "second"), "second", autocast_adapter_dtype=False)
    loaded.add_weighted_adapter(["second", "default"], [1.0, 0.0], "sum", combination_type="cat")
    assert_close(logits(loaded.eval(), "sum", name), logits(model, "second", name))


@pytest.mark.parametrize("kind", ["cat", "linear", "svd"])
def test_plain_adapters_beside_an_offset_are_combined(kind):
    model = with_second()
    model.add_adapter("third", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model.add_weighted_adapter(["second", "third"], [1.0, 0.0], "sum", combination_type=kind)
    assert_close(logits(model, "sum"), logits(model, "second"), WEIGHTED)


@pytest.mark.messages
@pytest.mark.parametrize("name", ["linear", "gpt2", "dora", "nf4", "rslora"])
def test_no_files_are_swapped_into_an_offset(name, tmp_path):
    model = train(started(name))
    save_adapter(model, tmp_path / "own")
    train(plain(name)).save_pretrained(tmp_path / "plain")
    train(model, seed=5)
    before = factors(model)
    for folder in ("own", "plain"):
        with pytest.raises(InputError, match=r"'default' has an initial product .* cannot be swapped"):
            hotswap_adapter(model, str(tmp_path / folder), adapter_name="default", torch_device="cpu")
    with pytest.raises(InputError, match=r"'default' has an initial product .* cannot be prepared"):
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert same(factors(model), before)


@pytest.mark.messages
def test_nor_by_the_state_of_fewer_layers():
    model = train(started())
    key = f"{find_pairs(model)[0].name}.lora_A.default.weight"
    before = factors(model)
    with pytest.raises(InputError, match="'default'"):
        hotswap_adapter_from_state_dict(
            model, {key: model.get_parameter(key).detach()}, "default", model.peft_config["default"]
        )
    assert same(factors(model), before)


def test_a_plain_adapter_beside_an_offset_is_swapped(tmp_path):
    model = with_second()
    other = train(plain(), seed=6)
    other.save_pretrained(tmp_path)
    model.set_adapter("second")
    hotswap_adapter(model, str(tmp_path), adapter_name="second", torch_device="cpu")
    assert_close(logits(model, "second"), run(other))


@pytest.mark.messages
@pytest.mark.parametrize("name", ["linear", "gpt2", "embedding", "dora", "nf4"])
def test_no_tool_takes_the_trained_pair_for_the_update(name, tmp_path):
    model = with_second(name)
    layer = find_pairs(model, "default")[0].layer
    assert not layer.supports_lora_conversion("default")
    with pytest.raises(InputError, match=r"'default' has an initial product .* cannot be read"):
        layer.get_delta_weight("default")
    assert layer.get_delta_weight("second").isfinite().all()
    before = logits(model, "default", name)
    with pytest.raises(InputError, match=r"'default' has an initial product .* cannot be read"):
        reduce_intruder_dimension(model, new_adapter_name="reduced", logging_sink=None)
    for tool in (convert_to_lora, lambda m, rank: save_as_lora(str(tmp_path), m, rank)):
        with pytest.raises(TypeError, match="LoRA"):
            tool(model, rank=2)
    assert_close(logits(model, "default", name), before)


@pytest.mark.messages
@pytest.mark.parametrize("name", ["linear", "embedding", "dora", "nf4", "vit"])
def test_a_layer_does_not_make_its_adapter_anew(name):
    model = train(started(name))
    before = run(model, name)
    layer = find_pairs(model, "default")[0].layer
    with pytest.raises(InputError, match=r"'default' has an initial product .* cannot be created again"):
        layer.update_layer("default", 2, 4, config=LoraConfig(r=2, use_dora="dora" in name))
    with pytest.raises(InputError, match=r"'default' has an initial product .* cannot be created again"):
        layer.update_layer(adapter_name="default", r=2, lora_alpha=4, config=LoraConfig(r=2))
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("default", LoraConfig(r=2))
    assert_close(run(model, name), before)


@pytest.mark.messages
def test_loftq_does_not_replace_a_trained_pair():
    model = started("nf4")
    before = factors(model)
    with pytest.raises(InputError, match=r"'default' has an initial product .* cannot get LoftQ's factors"):
        peft.replace_lora_weights_loftq(model, "unused.safetensors")
    assert same(factors(model), before)


# --- right ---


@pytest.mark.parametrize("name", ["linear", "gpt2", "embedding", "rslora", "nf4"])
def test_batches_may_mix_an_offset_its_copy_and_the_base(name):
    model = copied_like_trl(started(name))
    train(model)
    quantized = name in QUANTIZED
    x = torch.randn(2, 64) if quantized else IDS

    def call(**options):
        return getattr(output := model(x, **options), "logits", output).detach()

    alone = []
    for adapter in ("default", "ref"):
        model.set_adapter(adapter)
        alone.append(call())
    mixed = call(adapter_names=["default", "ref"])
    assert_close(mixed, torch.stack([alone[0][0], alone[1][1]]), 1e-5 if quantized else 1e-10)
    with model.disable_adapter():
        assert_close(alone[1], call(), 1e-5 if quantized else 1e-10)


@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv3d", "gpt2-conv1d", "embedding", "linear"])
def test_every_kind_of_layer_gives_its_copy_the_offset(name):
    model = adapted_layer(name).eval()
    attach_offset(model, "default", {p.name: p.factors()[::-1] for p in find_pairs(model)})
    expected = Holder(model.base_model.model.it.get_base_layer())(*inputs_of(name))
    copied_like_trl(model)
    for adapter in ("default", "ref"):
        model.set_adapter(adapter)
        assert_close(model(*inputs_of(name)).detach(), expected.detach())


# --- ranks of checkpoints ---


@pytest.mark.messages
@pytest.mark.parametrize("name", ["linear", "gpt2", "embedding", "dora", "rslora", "vit", "patterns-rslora"])
def test_files_of_another_rank_are_explained(name, tmp_path):
    train(started(name)).save_pretrained(tmp_path / "offset")
    train(plain(name)).save_pretrained(tmp_path / "plain")
    for make, right, wrong in ((started, "offset", "plain"), (plain, "plain", "offset")):
        model = make(name)
        before = factors(model)
        with pytest.raises(InputError, match="load_adapter"):
            model.load_adapter(str(tmp_path / wrong), "default")
        assert same(factors(model), before)
        model.load_adapter(str(tmp_path / right), adapter_name="default")
        assert not same(factors(model), before)


@pytest.mark.messages
def test_checkpoints_of_several_adapters_are_explained(tmp_path):
    copied_like_trl(started()).save_pretrained(tmp_path)
    model = started()
    model.add_adapter("ref", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with pytest.raises(InputError, match="'ref'"):
        model.load_adapter(str(tmp_path / "ref"), "ref")
    with pytest.raises(InputError, match="'ref'"):
        model.load_adapter(str(tmp_path), "ref", subfolder="ref")
