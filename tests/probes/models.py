"""Tiny models of every architecture with batches for them, and their dense gradients by plain autograd."""

import copy
from collections.abc import Callable

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
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

from tangora.probes import ProbedLayer

VOCABULARY = 19


def gpt2(**options) -> PreTrainedModel:
    sizes = {"n_embd": 12, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": VOCABULARY}
    return GPT2LMHeadModel(GPT2Config(**sizes | options))


def t5(**options) -> PreTrainedModel:
    sizes = {"d_model": 12, "d_kv": 6, "d_ff": 20, "num_layers": 1, "num_heads": 2, "vocab_size": VOCABULARY}
    return T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **sizes | options))


def vit(**options) -> PreTrainedModel:
    sizes = {"image_size": 8, "patch_size": 4, "num_channels": 2, "num_labels": 3}
    return ViTForImageClassification(ViTConfig(**_encoder() | sizes | options))


def bert(**options) -> PreTrainedModel:
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "num_labels": 3}
    return BertForSequenceClassification(BertConfig(**_encoder() | sizes | options))


def llama(**options) -> PreTrainedModel:
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes | heads | options))


def _encoder() -> dict[str, int]:
    return {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}


MAKERS: dict[str, Callable[..., PreTrainedModel]] = {
    "gpt2": gpt2,
    "t5": t5,
    "vit": vit,
    "bert": bert,
    "llama": llama,
}
TOLERANCE = {"llama": 1e-5, "t5": 1e-5}
"""Their norms compute in float32 whatever the weights are; all others hold 1e-10."""

OWN_LOSS_TOLERANCE = {**TOLERANCE, "gpt2": 1e-6}
"""The same with the model's own loss: that of causal models is computed in float32."""

TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc", "wte"],
    "t5": ["q", "v", "wi", "wo"],
    "vit": ["query", "value", "fc1", "fc2", "projection"],
    "bert": ["query", "value", "dense", "word_embeddings"],
    "llama": "all-linear",
}
"""What LoRA adapts in them: linear layers, transposed ones, embeddings and a convolution."""


def model_of(name: str, dtype: torch.dtype = torch.float64, **options) -> PreTrainedModel:
    """The model, in evaluation mode, with weights large enough that no gradient is tiny."""
    torch.manual_seed(0)
    model = MAKERS[name](**options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model.to(dtype).eval()


def adapted(name: str, dtype: torch.dtype = torch.float64, *, model_options=None, **config) -> PeftModel:
    """The model with a fresh LoRA adapter."""
    torch.manual_seed(1)
    options = {"r": 2, "lora_alpha": 6, "target_modules": TARGETS[name], "fan_in_fan_out": name == "gpt2"}
    base = model_of(name, dtype, **(model_options or {}))
    return get_peft_model(base, LoraConfig(**options | config), autocast_adapter_dtype=False)


def batch_of(name: str, size: int = 3, seed: int = 0, length: int = 6, dtype: torch.dtype = torch.float64):
    """Inputs and labels; for language models some labels are left out."""
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        pixels = torch.randn(size, 2, 8, 8, dtype=dtype, generator=generator)
        return {"pixel_values": pixels, "labels": torch.randint(3, (size,), generator=generator)}
    tokens = torch.randint(2, VOCABULARY, (size, length), generator=generator)
    if name == "bert":
        return {"input_ids": tokens, "labels": torch.randint(3, (size,), generator=generator)}
    labels = torch.randint(2, VOCABULARY, (size, length - 1), generator=generator) if name == "t5" else tokens
    labels = labels.clone()
    labels[0, : 2 + seed % 3] = -100
    return {"input_ids": tokens, "labels": labels}


def batches_of(name: str, count: int = 3, **options) -> list[dict[str, Tensor]]:
    """Several batches, of different sizes."""
    return [batch_of(name, size=2 + index, seed=index, **options) for index in range(count)]


def dense_gradients(model: nn.Module, layers: list[ProbedLayer], loss_of: Callable) -> dict[str, Tensor]:
    """Unfreeze the weights of a copy in evaluation mode, differentiate, orient the gradients like the update s B A."""
    by_id = {id(layer.module): layer.name for layer in layers}
    names = {name: by_id[id(module)] for name, module in model.named_modules() if id(module) in by_id}
    model = copy.deepcopy(model).eval()
    modules = dict(model.named_modules())
    weights = {}
    for path, name in names.items():
        module = modules[path]
        base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        base.weight = nn.Parameter(base.weight.detach().clone())  # its own: a tied weight has two gradients
        weights[name] = base
    loss_of(model).backward()
    return {name: _oriented(base) for name, base in weights.items()}


def _oriented(base: nn.Module) -> Tensor:
    gradient = torch.zeros_like(base.weight) if base.weight.grad is None else base.weight.grad
    stored_in_by_out = isinstance(base, nn.Embedding) or type(base).__name__ == "Conv1D"
    return gradient.T if stored_in_by_out else gradient.flatten(1)


def exact_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A loss in the model's own precision, linear in nothing."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if "decoder_start_token_id" in vars(model.config) and model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = batch["labels"].clamp(min=0)
    log_probabilities = model(**inputs).logits.log_softmax(-1)
    targets = batch["labels"].clamp(min=0)[..., None]
    return -log_probabilities.gather(-1, targets).mean() if targets.dim() > 1 else log_probabilities.mean()


def mean_loss_of(batches) -> Callable[[nn.Module], Tensor]:
    """The model's own loss over a list of batches, each weighted by the number of labels that it predicts."""

    def loss_of(model: nn.Module) -> Tensor:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        shift = type(inner).__name__ in ("GPT2LMHeadModel", "LlamaForCausalLM")
        counts = [int((batch["labels"][..., int(shift) :] != -100).sum()) for batch in batches]
        losses = [count * model(**batch).loss for count, batch in zip(counts, batches, strict=True)]
        return sum(losses) / sum(counts)

    return loss_of
