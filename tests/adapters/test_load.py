"""A file is loaded whole or refused, and tied layers are found again by PEFT alone."""

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    VBLoRAConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file

from tangora import InputError, find_pairs
from tangora.adapters import load_adapter, save_adapter
from tests.adapters.models import tiny_llama
from tests.adapters.test_merge import TOKENS, logits, lora, made, trained
from tests.models import randomize
from tests.tolerances import assert_close

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`"),
    pytest.mark.filterwarnings("ignore:Found missing adapter keys"),
]

# --- ensure_weight_tying ---

TIED = {
    "gpt2": ("gpt2", {"targets": ["wte", "lm_head", "c_attn"]}),
    "gpt2-head": ("gpt2", {"targets": ["lm_head"]}),
    "gpt2-whole": ("gpt2", {"targets": ["c_attn"], "modules_to_save": ["lm_head"]}),
    "gpt2-tokens": ("gpt2", {"targets": ["c_attn"], "trainable_token_indices": {"wte": TOKENS}}),
    "gpt2-patterns": (
        "gpt2",
        {
            "targets": ["wte", "lm_head", "c_attn"],
            "alpha_pattern": {"lm_head": 7},
            "rank_pattern": {"c_attn": 3},
        },
    ),
    "t5": ("t5", {"targets": ["embed_tokens", "q"]}),
    "t5-shared": ("t5", {"targets": ["shared", "lm_head"]}),
    "umt5": ("umt5", {"targets": ["embed_tokens"]}),
    "bart": ("bart", {"targets": ["embed_tokens"]}),
    "bart-regex": ("bart", {"targets": r".*\.(embed_tokens|q_proj)|lm_head"}),
    "bart-head": ("bart", {"targets": ["lm_head", "q_proj"]}),
    "marian": ("marian", {"targets": ["embed_tokens", "lm_head"]}),
    "llama": ("llama", {"targets": ["embed_tokens", "q_proj"]}),
    "llama-one-layer": ("llama", {"targets": ["embed_tokens", "q_proj"], "layers_to_transform": [0]}),
    "llama-whole": ("llama", {"targets": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "gemma": ("gemma", {"targets": ["embed_tokens", "lm_head"]}),
    "whisper": ("whisper", {"targets": ["embed_tokens", "proj_out"]}),
}


@pytest.mark.parametrize("case", TIED)
def test_tied_layers_are_found_again(case, tmp_path):
    name, options = TIED[case]
    options = {**options}
    targets = options.pop("targets")
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, ensure_weight_tying=True, **options)
    model = trained(made(name), config)
    expected = logits(model, name)
    assert (expected - logits(made(name), name)).abs().max() > 1e-2
    path = save_adapter(model, tmp_path / "a")
    plain = PeftModel.from_pretrained(made(name), path.path, autocast_adapter_dtype=False)
    assert_close(logits(plain, name), expected, 1e-12)
    again = load_adapter(made(name), path, is_trainable=True, autocast_adapter_dtype=False)
    assert [pair.tied != () for pair in find_pairs(again)] == [pair.tied != () for pair in find_pairs(model)]
    second = save_adapter(again, tmp_path / "b")
    assert_close(
        logits(load_adapter(made(name), second, autocast_adapter_dtype=False), name), expected, 1e-12
    )


# --- files that do not fit ---

CONFIGS = {
    "lora": lora("q_proj", "v_proj"),
    "whole": lora("q_proj", modules_to_save=["lm_head"]),
    "tokens": lora("q_proj", trainable_token_indices={"embed_tokens": TOKENS}),
    "dora": lora("q_proj", "embed_tokens", use_dora=True),
    "adalora": AdaLoraConfig(init_r=2, target_modules=["q_proj"], total_step=10),
    "ia3": IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    "vblora": VBLoRAConfig(r=2, target_modules=["q_proj"], num_vectors=8, vector_length=4, topk=1),
}


@pytest.fixture
def fitting(request, tmp_path):
    PeftModel.save_pretrained(get_peft_model(tiny_llama(), CONFIGS[request.param]), tmp_path / "a")
    return tmp_path / "a"


def rewrite(folder, change):
    held = {key: tensor.clone() for key, tensor in load_file(folder / "adapter_model.safetensors").items()}
    change(held)
    save_file(held, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("fitting", CONFIGS, indirect=True)
@pytest.mark.messages
def test_every_tensor_must_have_a_place_and_be_there(fitting):
    load_adapter(tiny_llama(), fitting)
    load_adapter(tiny_llama(), fitting, adapter_name="other")
    load_adapter(tiny_llama(), fitting, low_cpu_mem_usage=True)
    name = next(key for key in load_file(fitting / "adapter_model.safetensors") if "base_layer" not in key)
    moved = name.replace("base_model.model.", "base_model.model.elsewhere.")
    rewrite(fitting, lambda held: held.update({moved: held[name].clone()}))
    with pytest.raises(InputError, match=f"holds {moved}"):
        load_adapter(tiny_llama(), fitting)
    rewrite(fitting, lambda held: (held.pop(name), held.pop(moved)))
    with pytest.raises(InputError, match=rf"lacks {name.removesuffix('.weight')}"):
        load_adapter(tiny_llama(), fitting)


@pytest.mark.messages
def test_an_adapter_of_a_deeper_base_is_refused(tmp_path):
    model = randomize(get_peft_model(tiny_llama(num_hidden_layers=2), lora("q_proj")))
    path = save_adapter(model, tmp_path / "a")
    with pytest.raises(InputError, match=r"holds .*layers\.1"):
        load_adapter(tiny_llama(), path)
    with pytest.raises(InputError, match=r"lacks .*layers\.2"):
        load_adapter(tiny_llama(num_hidden_layers=3), path)


@pytest.mark.messages
def test_a_base_with_an_adapter_is_refused(tmp_path):
    model = get_peft_model(tiny_llama(), lora("q_proj"))
    path = save_adapter(model, tmp_path / "a")
    for base in (model, model.get_base_model()):
        with pytest.raises(InputError, match="base already has an adapter"):
            load_adapter(base, path)


def test_prompts_are_loaded_as_peft_loads_them(tmp_path):
    model = get_peft_model(
        tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    ).eval()
    again = load_adapter(tiny_llama(), save_adapter(model, tmp_path / "a"))
    ids = torch.arange(6).view(1, 6)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")
def test_ranks_that_adalora_took_away_stay_away(tmp_path):
    model = randomize(
        get_peft_model(
            tiny_llama(), AdaLoraConfig(init_r=3, target_r=2, target_modules=["q_proj"], total_step=10)
        )
    )
    layer = next(name for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_E"))
    model.peft_config["default"].rank_pattern = {f"{layer}.lora_E.default": [True, False, True]}
    with torch.no_grad():
        model.base_model.model.get_submodule(layer).lora_E["default"][1] = 0.0
    ids = torch.arange(6).view(1, 6)
    expected = model.eval()(input_ids=ids).logits.detach()
    again = load_adapter(tiny_llama(), save_adapter(model, tmp_path / "a"))
    assert_close(again.eval()(input_ids=ids).logits.detach(), expected, 1e-5)
    assert again.base_model.model.get_submodule(layer).lora_E["default"].shape[0] == 2
    assert again.peft_config["default"].rank_pattern
