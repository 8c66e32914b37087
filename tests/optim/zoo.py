"""Tiny random models of the kinds that people adapt, each with one batch and its loss."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

IDS = torch.arange(16).view(2, 8)
LABELS = torch.tensor([0, 2])


class Specimen(NamedTuple):
    """A model with adapters, and its loss on one batch."""

    model: PeftModel
    loss: Callable[[], Tensor]


def _language(base: PreTrainedModel, *targets: str, **config) -> Specimen:
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), **config))
    return Specimen(model, lambda: model(input_ids=IDS, labels=IDS).loss)


def _llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config)


def llama_bf16() -> Specimen:
    """Base in bf16; PEFT keeps the adapters in float32."""
    return _language(_llama().bfloat16(), "q_proj", "v_proj", "down_proj")


def llama_dora() -> Specimen:
    """Magnitudes beside the pairs."""
    return _language(_llama(), "q_proj", "down_proj", use_dora=True)


def llama_embedding() -> Specimen:
    """The table of tokens is adapted too."""
    return _language(_llama(), "embed_tokens", "q_proj")


def llama_nf4() -> Specimen:
    """Every linear layer of the decoder in four bits."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = _llama()
    for module in list(base.model.layers.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                small = bitsandbytes.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False, quant_type="nf4"
                )
                small.load_state_dict(child.state_dict())
                setattr(module, name, small.to("cpu"))
    base.is_loaded_in_4bit = True
    return _language(base, "q_proj", "v_proj", "down_proj")


def gpt2() -> Specimen:
    """Layers that store their weight transposed."""
    config = GPT2Config(
        vocab_size=32, n_positions=8, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return _language(GPT2LMHeadModel(config).eval(), "c_attn", "c_proj", fan_in_fan_out=True)


def t5() -> Specimen:
    """Encoder and decoder."""
    config = T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return _language(T5ForConditionalGeneration(config).eval(), "q", "v", "wo")


def vit() -> Specimen:
    """Images to classes, with a trained head."""
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    base, pixels = ViTForImageClassification(config), torch.randn(2, 3, 8, 8)
    model = get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    )
    return Specimen(model, lambda: model(pixel_values=pixels, labels=LABELS).loss)


def clip_vision() -> Specimen:
    """A vision tower without a head, pulled towards given embeddings."""
    config = CLIPVisionConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
    )
    base, pixels, wanted = CLIPVisionModel(config), torch.randn(2, 3, 8, 8), torch.randn(2, 16)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "fc2"]))
    return Specimen(model, lambda: (model(pixel_values=pixels).pooler_output - wanted).square().mean())


def convolutions() -> Specimen:
    """Kernels of different sizes."""
    base = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 8, 1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(288, 3),
    )
    pixels = torch.randn(2, 3, 6, 6)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0", "2"], modules_to_save=["5"]))
    return Specimen(model, lambda: nn.functional.cross_entropy(model(pixels), LABELS))


ZOO = [llama_bf16, llama_nf4, llama_dora, llama_embedding, gpt2, t5, vit, clip_vision, convolutions]
"""Makers of every specimen; the seed is the caller's."""
