"""Ranks that are zero in both factors are left out of a saved adapter, and nothing else changes."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from tangora import ODELoRA, find_pairs, save_adapter
from tangora.adapters import attach_offset
from tests.adapters.models import IDS, logits, tiny_llama
from tests.models import randomize
from tests.tolerances import assert_close

CONFIGS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "patterns-rslora": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 3},
        "alpha_pattern": {"v_proj": 20},
    },
    "dora": {"use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "modules-to-save": {"modules_to_save": ["lm_head"]},
}
pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")


def adapted(name="lora", r=4):
    options = {"r": r, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], **CONFIGS[name]}
    return get_peft_model(tiny_llama(), LoraConfig(**options), autocast_adapter_dtype=False).eval()


def cut(model):
    """Set 0, 1, 2, … ranks of the pairs to zero, not the last ones only."""
    kept = {}
    for index, pair in enumerate(find_pairs(model)):
        r = len(pair.A)
        gone = [(index + k) % r for k in range(min(index, r))]
        pair.A.data[gone], pair.B.data[:, gone] = 0.0, 0.0
        kept[pair.name] = max(1, r - len(gone))
    return kept


def read(path):
    config = json.loads((path / "adapter_config.json").read_text())
    return config, load_file(path / "adapter_model.safetensors")


def ranks(model):
    return {pair.name: len(pair.A) for pair in find_pairs(model)}


@pytest.mark.filterwarnings("ignore:.*rslora.*")
@pytest.mark.parametrize("name", CONFIGS)
def test_the_function_stays_and_plain_peft_finds_the_ranks(name, tmp_path):
    model = randomize(adapted(name))
    kept = cut(model)
    assert len(set(kept.values())) > 1
    result = save_adapter(model, tmp_path / "out")
    loaded = PeftModel.from_pretrained(
        tiny_llama(), str(tmp_path / "out"), autocast_adapter_dtype=False
    ).eval()
    assert_close(logits(loaded), logits(model), 1e-6)
    assert ranks(loaded) == kept
    assert result.rank == max(kept.values())
    scalings = {pair.name: pair.scaling for pair in find_pairs(model)}
    assert {pair.name: pair.scaling for pair in find_pairs(loaded)} == pytest.approx(scalings)


def test_with_an_offset_only_the_trained_half_is_trimmed(tmp_path):
    model = randomize(adapted())
    attach_offset(model, "default", {pair.name: pair.factors()[::-1] for pair in find_pairs(model)})
    kept = cut(model)
    save_adapter(model, tmp_path / "out")
    loaded = PeftModel.from_pretrained(
        tiny_llama(), str(tmp_path / "out"), autocast_adapter_dtype=False
    ).eval()
    assert_close(logits(loaded), logits(model), 1e-6)
    for name, rank in ranks(loaded).items():
        assert 4 <= rank <= 4 + kept[name]


def test_on_request_every_rank_stays(tmp_path):
    model = randomize(adapted())
    cut(model)
    save_adapter(model, tmp_path / "out", trim_ranks=False)
    config, tensors = read(tmp_path / "out")
    assert config["r"] == 4
    assert not config["rank_pattern"]
    assert all(value.shape[0] == 4 for key, value in tensors.items() if "lora_A" in key)


def test_a_fresh_adapter_keeps_its_rank(tmp_path):
    model = adapted()
    save_adapter(model, tmp_path / "out")
    model.save_pretrained(str(tmp_path / "peft"))
    (config, tensors), (plain, expected) = read(tmp_path / "out"), read(tmp_path / "peft")
    assert config["r"] == plain["r"] == 4
    assert all(torch.equal(tensors[key], value) for key, value in expected.items())


def test_trimming_comes_before_compression(tmp_path):
    model = randomize(adapted())
    cut(model)
    result = save_adapter(model, tmp_path / "out", rank=2)
    assert result.rank == 2
    assert result.relative_error > 0
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "out"))
    assert set(ranks(loaded).values()) <= {1, 2}


def test_what_rank_adaptive_training_found_is_what_is_written(tmp_path):
    torch.manual_seed(0)
    model = adapted(r=8)
    optimizer = ODELoRA(model, lr=0.3, scheme="bug", tolerance=0.3)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    found = {pair.name: max(1, int((pair.B != 0).any(0).sum())) for pair in find_pairs(model)}
    assert min(found.values()) < 8
    save_adapter(model, tmp_path / "out")
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "out")).eval()
    assert ranks(loaded) == found
    assert_close(logits(loaded), logits(model), 1e-5)
