"""Tiny random models of the kinds that people adapt, each with one batch and its loss."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.models import transformer, with_lora

IDS = torch.arange(16).view(2, 8)
LABELS = torch.tensor([0, 2])


class Specimen(NamedTuple):
    """A model with adapters, and its loss on one batch."""

    model: PeftModel
    loss: Callable[[], Tensor]


def _adapted(base: nn.Module, *targets: str, **config) -> PeftModel:
    return with_lora(
        base, r=4, lora_alpha=8, target_modules=list(targets), autocast_adapter_dtype=True, **config
    )


def _language(base: PreTrainedModel, *targets: str, **config) -> Specimen:
    model = _adapted(base, *targets, **config)
    return Specimen(model, lambda: model(input_ids=IDS, labels=IDS).loss)


def llama_bf16() -> Specimen:
    """Base in bf16; PEFT keeps the adapters in float32."""
    return _language(transformer("llama").bfloat16(), "q_proj", "v_proj", "down_proj")


def llama_dora() -> Specimen:
    """Magnitudes beside the pairs."""
    return _language(transformer("llama"), "q_proj", "down_proj", use_dora=True)


def llama_embedding() -> Specimen:
    """The table of tokens is adapted too."""
    return _language(transformer("llama"), "embed_tokens", "q_proj")


def llama_nf4() -> Specimen:
    """Every linear layer of the decoder in four bits."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = transformer("llama")
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
    return _language(transformer("gpt2"), "c_attn", "c_proj")


def t5() -> Specimen:
    """Encoder and decoder."""
    return _language(transformer("t5"), "q", "v", "wo")


def vit() -> Specimen:
    """Images to classes, with a trained head."""
    base, pixels = transformer("vit"), torch.randn(2, 3, 8, 8)
    model = _adapted(base, "q_proj", "v_proj", modules_to_save=["classifier"])
    return Specimen(model, lambda: model(pixel_values=pixels, labels=LABELS).loss)


def clip_vision() -> Specimen:
    """A vision tower without a head, pulled towards given embeddings."""
    base, pixels, wanted = transformer("clip-vision"), torch.randn(2, 3, 8, 8), torch.randn(2, 16)
    model = _adapted(base, "q_proj", "v_proj", "fc2")
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
    model = _adapted(base, "0", "2", modules_to_save=["5"])
    return Specimen(model, lambda: nn.functional.cross_entropy(model(pixels), LABELS))


ZOO = [llama_bf16, llama_nf4, llama_dora, llama_embedding, gpt2, t5, vit, clip_vision, convolutions]
"""Makers of every specimen; the seed is the caller's."""
