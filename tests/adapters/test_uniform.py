"""An adapter with one rank and one alpha for all layers has the updates of the one with patterns."""

import json

import pytest
import torch
from peft import KasaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from tangora import InputError, find_pairs
from tangora.adapters import attach_offset, initial_factors, save_adapter
from tangora.adapters.saved_factors import AdapterFiles, uniform
from tests.adapters.models import logits, tiny_llama
from tests.models import Holder, randomize
from tests.tolerances import assert_close

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:.*rslora.*"),
]
PATTERNS = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 20}}


class Mixed(nn.Module):
    """An embedding, a convolution and a linear layer with a bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.conv = nn.Embedding(32, 6), nn.Conv1d(6, 8, 3, padding=1)
        self.linear = nn.Linear(8, 4)

    def forward(self, input_ids):
        return self.linear(torch.tanh(self.conv(self.embed(input_ids).mT).mT))


CASES = {
    "patterns": (tiny_llama, PATTERNS),
    "rslora": (tiny_llama, {"use_rslora": True}),
    "patterns-rslora": (tiny_llama, {**PATTERNS, "use_rslora": True}),
    "dora": (tiny_llama, {"use_dora": True, **PATTERNS}),
    "embedding": (
        tiny_llama,
        {
            "target_modules": ["embed_tokens", "q_proj"],
            "rank_pattern": {"embed_tokens": 3},
            "alpha_pattern": {"q_proj": 20},
        },
    ),
    "modules-to-save": (tiny_llama, {"modules_to_save": ["lm_head"], **PATTERNS}),
    "pissa": (tiny_llama, {"init_lora_weights": "pissa", **PATTERNS}),
    "kinds": (
        Mixed,
        {
            "target_modules": ["embed", "conv", "linear"],
            "rank_pattern": {"conv": 3, "embed": 1},
            "alpha_pattern": {"linear": 5},
        },
    ),
    "lora-bias": (
        Mixed,
        {"target_modules": ["conv", "linear"], "lora_bias": True, "alpha_pattern": {"conv": 5}},
    ),
}


def made(name):
    base, config = CASES[name]
    options = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **config}
    model = get_peft_model(base(), LoraConfig(**options)).double()  # PEFT cannot start PiSSA in float64
    initial = initial_factors(model)
    randomize(model)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in key:
            parameter.data.add_(0.1)
    return base().double(), model, initial


def config_of(saved):
    return json.loads((saved.path / "adapter_config.json").read_text())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:.*lora_B.bias")
def test_the_updates_are_those_of_the_adapter_with_patterns(name, tmp_path):
    base, model, initial = made(name)
    result = save_adapter(model, tmp_path / "a", initial=initial, uniform=True)
    config = config_of(result)
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)
    loaded = PeftModel.from_pretrained(base, result.path, autocast_adapter_dtype=False)
    pairs = find_pairs(loaded)
    assert {pair.shape[2] for pair in pairs} == {result.rank} == {config["r"]}
    assert len({pair.scaling for pair in pairs}) == 1
    # PiSSA has changed the base in float32
    assert_close(logits(loaded), logits(model), 1e-6 if initial else 1e-12)


def test_the_ranks_of_an_offset_and_a_cut_are_uniform_too(tmp_path):
    base, model, _ = made("patterns-rslora")
    factors = {p.name: (p.B.detach() + 0.3, p.A.detach().clone()) for p in find_pairs(model)}
    attach_offset(model, "default", factors)
    exact = save_adapter(model, tmp_path / "exact", uniform=True)
    assert exact.rank == 6
    loaded = PeftModel.from_pretrained(base, exact.path, autocast_adapter_dtype=False)
    assert_close(logits(loaded), logits(model), 1e-12)
    assert "rank 6" in (exact.path / "README.md").read_text()
    cut, same = (save_adapter(model, tmp_path / str(flag), rank=5, uniform=flag) for flag in (False, True))
    assert (cut.rank, cut.relative_error) == (same.rank, same.relative_error)
    first, second = (
        PeftModel.from_pretrained(tiny_llama().double(), each.path, autocast_adapter_dtype=False)
        for each in (cut, same)
    )
    assert_close(logits(second), logits(first), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_powers_of_two_and_equal_scalings_keep_every_bit(dtype):
    torch.manual_seed(0)
    tensors = {}
    for layer, rank in (("a", 4), ("b", 2), ("c", 4)):
        tensors[f"{layer}.lora_A.weight"] = torch.randn(rank, 5).to(dtype)
        tensors[f"{layer}.lora_B.weight"] = torch.randn(3, rank).to(dtype)
    scalings = {"a": 0.7, "b": 2.8, "c": 0.7}
    same = uniform(AdapterFiles(tensors, {}), scalings)
    assert (same.config["r"], same.config["lora_alpha"]) == (4, pytest.approx(2.8))
    for layer in "abc":
        B, A = (same.tensors[f"{layer}.lora_{letter}.weight"].double() for letter in "BA")
        before = (tensors[f"{layer}.lora_{letter}.weight"].double() for letter in "BA")
        ratio, old = scalings[layer] / 0.7, next(before) @ next(before)
        assert torch.equal(B @ A, ratio * old)


def test_the_scaling_is_the_one_that_rounds_the_fewest_entries():
    tensors = {}
    for layer, rows in (("small", 2), ("large", 9), ("twice", 3)):
        tensors[f"{layer}.lora_A.weight"] = torch.ones(2, 5)
        tensors[f"{layer}.lora_B.weight"] = torch.full((rows, 2), 0.1)
    same = uniform(AdapterFiles(tensors, {}), {"small": 3.0, "large": 1.0, "twice": 2.0})
    assert same.config["lora_alpha"] == 2.0
    assert torch.equal(same.tensors["large.lora_B.weight"], tensors["large.lora_B.weight"])
    assert torch.equal(same.tensors["twice.lora_B.weight"], 2 * tensors["twice.lora_B.weight"])
    assert_close(same.tensors["small.lora_B.weight"], 3 * tensors["small.lora_B.weight"], 1e-7)


def test_an_adapter_without_patterns_is_written_as_it_is(tmp_path):
    model = randomize(get_peft_model(tiny_llama(), LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"])))
    plain, same = (save_adapter(model, tmp_path / str(flag), uniform=flag) for flag in (False, True))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (plain.path / name).read_bytes() == (same.path / name).read_bytes()


def test_without_the_option_patterns_stay(tmp_path):
    _, model, _ = made("patterns-rslora")
    config = config_of(save_adapter(model, tmp_path / "a"))
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == (
        *PATTERNS.values(),
        True,
    )


@pytest.mark.messages
def test_what_has_no_uniform_form_is_refused(tmp_path):
    config = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], kasa_config=KasaConfig(), rank_pattern={"q_proj": 3}
    )
    with pytest.raises(InputError, match=r"uniform .*q_proj .*: Kasa"):
        save_adapter(get_peft_model(tiny_llama(), config), tmp_path / "a", uniform=True)
    holder = nn.Sequential(*(Holder(nn.Linear(4, 4)) for _ in range(3)))
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["it"], alpha_pattern={"0.it": 2**17})
    model = randomize(get_peft_model(holder, config, autocast_adapter_dtype=False)).half()
    with pytest.raises(InputError, match=r"float16 cannot represent the factors of .*0\.it"):
        save_adapter(model, tmp_path / "a", uniform=True)
    assert list(tmp_path.iterdir()) == []


def test_layers_that_share_their_factors_get_their_own_scaling(tmp_path):
    base = lambda: tiny_llama(tie_word_embeddings=True)  # noqa: E731
    config = LoraConfig(
        r=2,
        target_modules=["embed_tokens", "lm_head"],
        ensure_weight_tying=True,
        alpha_pattern={"lm_head": 7},
    )
    model = randomize(get_peft_model(base(), config))
    result = save_adapter(model, tmp_path / "a", uniform=True)
    with pytest.warns(UserWarning, match="ensure_weight_tying"):
        loaded = PeftModel.from_pretrained(base(), result.path)
    assert_close(logits(loaded), logits(model), 1e-6)
    assert not config_of(result)["ensure_weight_tying"]
    assert len(load_file(result.path / "adapter_model.safetensors")) == 6
