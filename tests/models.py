"""Tiny models for tests: transformers' families, single layers of every kind, their adapters; no file, no hub."""

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from tangora.adapters.sharded import local, share

_ENCODER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_IMAGES = {"image_size": 8, "patch_size": 4}
_FAMILIES: dict[str, tuple[type[PreTrainedModel], Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {**_ENCODER, "num_key_value_heads": 1, "vocab_size": 32}),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config,
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 32}
        | {"bos_token_id": 0, "eos_token_id": 0},
    ),
    "t5": (
        T5ForConditionalGeneration,
        T5Config,
        {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
        | {"decoder_start_token_id": 0},
    ),
    "bert": (
        BertForSequenceClassification,
        BertConfig,
        {**_ENCODER, "vocab_size": 32, "max_position_embeddings": 16, "num_labels": 3},
    ),
    "vit": (ViTForImageClassification, ViTConfig, {**_ENCODER, **_IMAGES, "num_labels": 3}),
    "clip-vision": (CLIPVisionModel, CLIPVisionConfig, {**_ENCODER, **_IMAGES}),
}


def transformer(family: str, *, seed: int | None = None, **config: Any) -> Any:
    """Return a model of a family with random weights, in evaluation mode; the config's entries are its sizes."""
    model, config_of, sizes = _FAMILIES[family]
    if seed is not None:
        torch.manual_seed(seed)
    return model(config_of(**sizes | config)).eval()


def with_lora(base: nn.Module, *, autocast_adapter_dtype: bool = False, **config: Any) -> PeftModel:
    """Add an adapter as PEFT starts it, of rank 2 with scaling 3 on all linear layers if nothing else is said."""
    options = {"r": 2, "lora_alpha": 6, "target_modules": "all-linear"}
    if any(isinstance(module, Conv1D) for module in base.modules()):
        options["fan_in_fan_out"] = True
    return get_peft_model(base, LoraConfig(**options | config), autocast_adapter_dtype=autocast_adapter_dtype)


def randomize(
    model: nn.Module, *, scale: float = 0.5, seed: int | None = None, zero_B: bool = False
) -> nn.Module:
    """Draw every adapter parameter from a normal distribution, magnitudes of DoRA above one half."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            noise = scale * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
            if "magnitude" in key:
                noise = noise.abs() + 0.5
            noise = 0 * noise if zero_B and "_B" in key else noise
            local(parameter.data).copy_(share(noise, parameter.data))
    return model


# ---- single layers ----

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(7, 5),
    "gpt2-conv1d": lambda: Conv1D(5, 7),
    "embedding": lambda: nn.Embedding(11, 6),
    "embedding-padding": lambda: nn.Embedding(11, 6, padding_idx=1),
    "conv1d": lambda: nn.Conv1d(3, 5, 3, stride=2, padding=1),
    "conv2d": lambda: nn.Conv2d(3, 5, (3, 2), stride=2, padding=1, dilation=1),
    "conv2d-pointwise": lambda: nn.Conv2d(3, 5, 1),
    "conv3d": lambda: nn.Conv3d(2, 5, 2, padding=1),
    "attention": lambda: nn.MultiheadAttention(6, 2, batch_first=True),
}
"""Makers of base layers, by name."""


class Holder(nn.Module):
    """A model whose only layer is ``it``."""

    def __init__(self, it: nn.Module):
        super().__init__()
        self.it = it

    def forward(self, *inputs):
        return self.it(*inputs)


def adapted_layer(name: str, **config: Any) -> PeftModel:
    """Return the layer with an adapter whose factors are both random, in float64."""
    torch.manual_seed(0)
    model = with_lora(Holder(LAYERS[name]().double()), target_modules=["it"], **config)
    randomize(model)
    if name == "embedding-padding":  # as PEFT starts it: the padding row of the table gets no gradient
        next(p for key, p in model.named_parameters() if "embedding_A" in key).data[:, 1] = 0
    return model


def inputs_of(name: str) -> tuple[Tensor, ...]:
    """Return what the layer of that name is called with."""
    torch.manual_seed(1)
    if name.startswith("embedding"):
        return (torch.tensor([[0, 1, 2, 10], [4, 4, 1, 6]]),)
    if name == "attention":
        return (torch.randn(2, 4, 6, dtype=torch.float64),) * 3
    shapes = {"conv1d": (2, 3, 8), "conv3d": (2, 2, 4, 3, 4)}
    shape = shapes.get(name, (2, 3, 6, 5) if "conv2d" in name else (2, 4, 7))
    return (torch.randn(shape, dtype=torch.float64),)


def loss_of(output: Tensor | tuple) -> Tensor:
    """Return a loss that is linear in nothing."""
    output = output[0] if isinstance(output, tuple) else output
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return (weights * (output + 0.3 * output.square())).sum()


# ---- models that answer, and a tokenizer for them ----

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
WORDS = ["red", "green", "blue", "cat", "dog", "sun", "sea", "####", "+", "-", "=", "\n", *"0123456789"]
_SPEAKERS = {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "initializer_range": 0.5,
    "pad_token_id": 0,
}


def tiny_llama(seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """Return a causal model with random weights, large enough that its answers differ."""
    more = {"num_key_value_heads": 2, "bos_token_id": 2, "eos_token_id": 3, "attention_dropout": 0.3}
    return transformer("llama", seed=seed, **_SPEAKERS | more | config)


def tiny_bert(seed: int = 0, **config: Any) -> BertForSequenceClassification:
    """Return a classifier of three classes with random weights and dropout."""
    return transformer("bert", seed=seed, **_SPEAKERS | {"max_position_embeddings": 64} | config)


def tiny_clip(seed: int = 0) -> CLIPModel:
    """Return a CLIP model with random weights for images of 8 x 8 pixels, and for `clip_tokenizer`."""
    torch.manual_seed(seed)
    text = {"vocab_size": _SPEAKERS["vocab_size"], "max_position_embeddings": 12}
    text |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    config = CLIPConfig(
        text_config=_ENCODER | text | {"projection_dim": 12},
        vision_config=_ENCODER | _IMAGES | {"projection_dim": 12},
        projection_dim=12,
    )
    model = CLIPModel(config).eval()
    for name, weight in model.named_parameters():
        if name.endswith(
            ("token_embedding.weight", "patch_embedding.weight", "v_proj.weight", "out_proj.weight")
        ):
            weight.data *= 20  # otherwise all texts, and all images, look alike
    return model


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """Return `tiny_tokenizer` with the end that CLIP's text model looks for."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


def tiny_tokenizer(*, pad: bool = True) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word or digit; the newline is a word."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        **({"pad_token": "<pad>"} if pad else {}),
    )
