"""Exports with one rank and one alpha, and files that no layer takes."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from tangora import InputError, initialize
from tangora.adapters import load_adapter, save_adapter
from tests.adapters.models import LinearAndExperts
from tests.adapters.tied import assert_same, made, output, trained

pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`", "ignore:.*tied.*")
PATTERNS = {"rank_pattern": {"q_proj": 3, "v_proj": 5}, "alpha_pattern": {"v_proj": 7}}
CONFIGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": PATTERNS,
    "patterns-rslora": {**PATTERNS, "use_rslora": True},
    "dora-patterns": {**PATTERNS, "use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"], "rank_pattern": {"embed_tokens": 3}},
    "odd-alpha": {"lora_alpha": 5, "r": 3},
    "modules-to-save": {**PATTERNS, "modules_to_save": ["lm_head"]},
}


def adapted(name="llama", **options):
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "o_proj"], **options}
    return trained(get_peft_model(made(name), LoraConfig(**config)))


@pytest.mark.parametrize("case", CONFIGS)
def test_every_layer_gets_one_rank_and_one_alpha(case, tmp_path):
    model = adapted(**CONFIGS[case])
    before = output(model)
    saved = save_adapter(model, tmp_path / "x", uniform=True)
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert not config["use_rslora"]
    assert isinstance(config["lora_alpha"], int)
    ranks = {
        v.shape[0] for k, v in load_file(tmp_path / "x" / "adapter_model.safetensors").items() if "_A" in k
    }
    assert ranks == {config["r"]} == {saved.rank}
    assert_same(output(PeftModel.from_pretrained(made("llama"), tmp_path / "x")), before)
    assert torch.equal(output(model), before)


@pytest.mark.parametrize(
    ("case", "changed"), [("plain", 0), ("patterns", 2), ("odd-alpha", 0), ("rslora", 3)]
)
def test_layers_with_the_common_scaling_keep_every_bit(case, changed, tmp_path):
    model = adapted(**CONFIGS[case])
    save_adapter(model, tmp_path / "faithful")
    save_adapter(model, tmp_path / "uniform", uniform=True)
    one, other = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("faithful", "uniform")
    )
    same = [key for key in one if torch.equal(one[key], other[key][: one[key].shape[0], : one[key].shape[1]])]
    assert len(same) == len(one) - changed


def test_a_start_with_an_offset_says_its_rank_and_can_be_cut(tmp_path):
    model = get_peft_model(made("llama"), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
    initialize(model, "orthogonal")
    trained(model)
    before = output(model)
    assert save_adapter(model, tmp_path / "exact", uniform=True).rank == 4
    assert_same(output(PeftModel.from_pretrained(made("llama"), tmp_path / "exact")), before)
    assert save_adapter(model, tmp_path / "cut", uniform=True, rank=1).rank == 1


@pytest.mark.messages
def test_layers_that_are_no_pairs_have_no_uniform_rank(tmp_path):
    config = LoraConfig(r=2, target_modules=["linear"], target_parameters=["experts.weight"])
    model = get_peft_model(LinearAndExperts(), config)
    with pytest.raises(InputError, match=r"uniform cannot be True.*experts"):
        save_adapter(model, tmp_path / "x", uniform=True)


@pytest.mark.messages
@pytest.mark.parametrize("name", ["llama", "gpt2", "bart"])
def test_tensors_that_no_layer_takes_are_refused(name, tmp_path):
    targets = {"gpt2": ["c_attn"]}.get(name, ["q_proj"])
    save_adapter(adapted(name, target_modules=targets, fan_in_fan_out=name == "gpt2"), tmp_path / "x")
    file = tmp_path / "x" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(iter(tensors))
    load_adapter(made(name), tmp_path / "x")
    save_file({**tensors, key.replace("0", "7", 1): tensors[key].clone()}, file)
    with pytest.raises(InputError, match="1 tensors that no layer of the model takes"):
        load_adapter(made(name), tmp_path / "x")
