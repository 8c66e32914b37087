"""PEFT's and TRL's own tools on adapters with an offset: right, or refused by name."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraModel
from peft.tuners.lora.conversion import convert_to_lora
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft.utils.hotswap import (
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)
from torch import nn

from tangora import InputError, TangentAdam, find_pairs, initialize
from tangora.adapters import base_weight, detach_offset, load_adapter, offset_factors, save_adapter
from tests.adapters.models import adapted, inputs_of
from tests.adapters.tied import IDS, assert_same, made, output, trained

pytestmark = [
    pytest.mark.messages,
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`", "ignore:.*tied.*"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:.*RANK.*", "ignore:Adapter .* was active"),
]
CASES = {
    "linear": ("llama", ["q_proj", "v_proj"], {}),
    "rslora-patterns": ("llama", ["q_proj", "o_proj"], {"use_rslora": True, "rank_pattern": {"o_proj": 3}}),
    "dora": ("llama", ["q_proj", "v_proj"], {"use_dora": True}),
    "embedding": ("bart", ["shared", "q_proj"], {}),
    "gpt2": ("gpt2", ["c_attn", "c_proj"], {}),
}
every = pytest.mark.parametrize("case", CASES)


def started(case, method="orthogonal"):
    name, targets, options = CASES[case]
    model = get_peft_model(made(name), LoraConfig(r=2, lora_alpha=4, target_modules=list(targets), **options))
    initialize(model, method)
    return model.eval()


def plain(case, adapter=None, model=None):
    name, targets, options = CASES[case]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=list(targets), init_lora_weights=False, **options)
    if model is None:
        return get_peft_model(made(name), config)
    model.add_adapter(adapter, config)
    return model


def copied_as_trl_does(model, name="ref"):
    """DPOTrainer, GRPOTrainer: a second adapter of the same config, and its parameters by their names."""
    model.add_adapter(name, model.peft_config["default"])
    for key, parameter in list(model.named_parameters()):
        if ".default." in key:
            model.get_parameter(key.replace(".default.", f".{name}.")).data.copy_(parameter.data)
    return model


@every
@pytest.mark.parametrize("method", ["orthogonal", "pissa"])
def test_a_copied_reference_is_the_model_at_that_moment(case, method, tmp_path):
    model = started(case, method)
    base = output(made(CASES[case][0]))
    copied_as_trl_does(model)
    model.set_adapter("ref")
    assert_same(output(model), base)
    model.set_adapter("default")
    trained(model)
    moved = output(model)
    assert float((moved - base).abs().max()) > 1e-3
    model.set_adapter("ref")
    assert_same(output(model), base)  # the reference stands still
    copied_as_trl_does(model, "later")
    model.set_adapter("later")
    assert_same(output(model), moved)
    save_adapter(model, tmp_path / "later")
    assert_same(output(load_adapter(made(CASES[case][0]), tmp_path / "later")), moved)
    model.delete_adapter("later")
    model.set_adapter("default")
    assert_same(output(model), moved)


@every
def test_a_model_with_a_copied_reference_can_be_copied_and_pickled(case):
    model = copied_as_trl_does(started(case))
    trained(model)
    before = output(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin), before)
        assert type(twin.base_model) is type(model.base_model)
        pair = find_pairs(twin, "default")[0]
        delta = pair.layer.get_delta_weight("default")
        with torch.no_grad():
            pair.B.add_(1.0)
        assert not torch.equal(delta, pair.layer.get_delta_weight("default"))  # bound to the copy's own layer
        assert torch.equal(output(model), before)


def test_a_reference_trains_nothing_by_itself():
    model = copied_as_trl_does(started("linear"))
    model.set_adapter("default")
    optimizer = TangentAdam(model, lr=1e-2)
    model(input_ids=IDS, labels=IDS).loss.backward()
    ref = [pair.A.detach().clone() for pair in find_pairs(model, "ref")]
    optimizer.step()
    assert all(torch.equal(a, pair.A) for a, pair in zip(ref, find_pairs(model, "ref"), strict=True))


@every
def test_which_offset_a_config_belongs_to_must_be_known(case):
    model = started(case)
    config = copy.copy(model.peft_config["default"])
    model.add_adapter("copy", config)  # one adapter has an offset: it can only be this one
    model.set_adapter("copy")
    assert_same(output(model), output(made(CASES[case][0])))
    with pytest.raises(InputError, match="'third'.*2 adapters"):
        model.add_adapter("third", copy.copy(config))
    assert "third" not in model.peft_config
    detach_offset(model, "copy")
    detach_offset(model, "default")
    assert type(model.base_model) is LoraModel


@every
@pytest.mark.parametrize("kind", ["cat", "linear", "svd", "ties_svd", "dare_linear", "magnitude_prune"])
@pytest.mark.parametrize("order", [("default", "plain"), ("plain", "default"), ("default",)])
def test_combinations_are_refused_in_any_order(case, kind, order):
    model = plain(case, "plain", started(case))
    before = output(model)
    with pytest.raises(InputError, match="'default' carries an offset"):
        model.add_weighted_adapter(list(order), [1.0] * len(order), "sum", combination_type=kind)
    assert "sum" not in model.peft_config
    assert torch.equal(output(model), before)


def test_plain_adapters_beside_an_offset_are_combined():
    model = plain("linear", "other", plain("linear", "plain", started("linear")))
    model.add_weighted_adapter(["plain", "other"], [1.0, 0.5], "sum", combination_type="cat")
    model.set_adapter("sum")
    deltas = {name: find_pairs(model, name)[0].delta_weight() for name in ("plain", "other", "sum")}
    torch.testing.assert_close(deltas["sum"], deltas["plain"] + 0.5 * deltas["other"])


@pytest.mark.parametrize("case", ["linear", "rslora-patterns", "dora", "gpt2"])
def test_hotswapping_into_an_offset_is_refused(case, tmp_path):
    model = trained(started(case))
    before = output(model)
    save_adapter(model, tmp_path / "own")
    save_adapter(trained(plain(case)), tmp_path / "plain")
    for path in ("own", "plain"):
        with pytest.raises(InputError, match="'default' carries an offset"):
            hotswap_adapter(model, str(tmp_path / path), adapter_name="default", torch_device="cpu")
    state = {
        f"{n}.weight": m.weight.detach()
        for n, m in model.named_modules()
        if n.endswith(("_A.default", "_B.default"))
    }
    with pytest.raises(InputError, match="offset"):
        hotswap_adapter_from_state_dict(model, state, "default", model.peft_config["default"])
    assert torch.equal(output(model), before)


@pytest.mark.parametrize("case", ["linear", "dora", "gpt2"])
def test_exports_can_be_swapped_among_each_other(case, tmp_path):
    wanted = {}
    for seed in (0, 1):
        model = started(case)
        trained(model, 0.1 * (1 + seed))
        wanted[seed] = output(model)
        save_adapter(model, tmp_path / str(seed))
    served = load_adapter(made(CASES[case][0]), tmp_path / "0")
    hotswap_adapter(served, str(tmp_path / "1"), adapter_name="default", torch_device="cpu")
    assert_same(output(served), wanted[1])


def test_factors_padded_for_hotswapping_change_nothing():
    model = trained(started("linear"))
    before = output(model)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert_same(output(model), before)


@pytest.mark.parametrize("case", ["linear", "embedding", "rslora-patterns"])
def test_intruder_reduction_is_refused(case):
    model = trained(started(case))
    with pytest.raises(InputError, match="reduce_intruder_dimension"):
        reduce_intruder_dimension(
            model, old_adapter_name="default", new_adapter_name="new", logging_sink=None
        )
    assert "new" not in model.peft_config


@pytest.mark.parametrize("case", ["linear", "gpt2", "dora"])
def test_conversion_is_refused(case):
    model = trained(started(case))
    with pytest.raises((TypeError, ValueError, InputError)):
        convert_to_lora(model, rank=2)


@pytest.mark.parametrize("name", ["linear", "gpt2-conv1d", "embedding", "conv2d", "conv1d"])
def test_the_delta_of_a_layer_is_that_of_both_pairs(name):
    torch.manual_seed(0)
    model = adapted(name, init_lora_weights=False)
    pair = find_pairs(model)[0]
    alone = pair.layer.get_delta_weight("default")
    initialize(model, "orthogonal")
    trained(model)
    assert offset_factors(pair) is not None
    inputs, base = inputs_of(name), pair.layer.get_base_layer()
    delta = pair.layer.get_delta_weight("default")
    assert delta.shape == alone.shape == base.weight.shape
    with torch.no_grad():
        wanted = model(*inputs)
        twin = copy.deepcopy(base)
        twin.weight.add_(delta)
        torch.testing.assert_close(twin(*inputs), wanted, rtol=1e-4, atol=1e-4)
    assert base_weight(pair).shape[0] in base.weight.shape
    detach_offset(model, "default")
    assert "get_delta_weight" not in pair.layer.__dict__


@every
def test_a_checkpoint_needs_its_start_to_be_repeated(case, tmp_path):
    model = trained(started(case))
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="tangora.initialize"):
        plain(case).load_adapter(str(tmp_path), "default")
    again = started(case)
    again.load_adapter(str(tmp_path), "default")
    assert_same(output(again), output(model))
    assert_same(output(load_adapter(made(CASES[case][0]), tmp_path, is_trainable=True)), output(model))
    with pytest.raises(InputError, match="detach_offset"):
        again.load_state_dict(plain(case).state_dict())


def test_other_errors_of_loading_stay_what_they_are(tmp_path):
    model = plain("linear")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="nowhere"):
        model.load_adapter(str(tmp_path / "nowhere"), "x")
    assert isinstance(PeftModel.from_pretrained(made("llama"), tmp_path).base_model, nn.Module)
