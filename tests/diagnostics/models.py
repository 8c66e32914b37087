"""Small models in float64 with adapters, and their dense gradients by plain autograd."""

import contextlib

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from tangora import find_pairs
from tests.models import tiny_bert


def classifier_batches(sizes=(4, 3, 1), seed=0) -> list[dict[str, Tensor]]:
    """Texts of three classes, in batches of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "input_ids": torch.randint(4, 20, (size, 6), generator=generator),
            "labels": torch.randint(0, 3, (size,), generator=generator),
        }
        for size in sizes
    ]


def causal_batches(sizes=(3, 1)) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(4, 20, (size, 7), generator=generator) for size in sizes]
    return [{"input_ids": each, "labels": each} for each in ids]


def bert() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1}
    return tiny_bert(**sizes, hidden_dropout_prob=0.1).double().train()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=24, n_positions=16, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)
    return GPT2LMHeadModel(config).double()


def adapted(base: nn.Module, **options) -> PeftModel:
    """Adapters on all linear layers, as PEFT starts them."""
    defaults = {"r": 2, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "SEQ_CLS"}
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(**defaults | options))


def moved(model: PeftModel) -> PeftModel:
    """Give every factor random entries, as after training."""
    torch.manual_seed(2)
    for pair in find_pairs(model):
        pair.A.data.copy_(torch.randn_like(pair.A) / 4)
        pair.B.data.copy_(torch.randn_like(pair.B) / 8)
    return model


def dense_gradients(model: nn.Module, batches, *, off: bool = False) -> dict[str, Tensor]:
    """Return the mean gradient of every adapted layer's weight, m x n, by the names of the base model."""
    layers = {
        name.removeprefix("base_model.model.").removesuffix(".base_layer"): layer
        for name, layer in model.named_modules()
        if name.endswith(".base_layer")
    }
    wanted = {name: layer.weight for name, layer in layers.items()}
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    model.eval()
    for weight in wanted.values():
        weight.requires_grad_(True)
    with model.disable_adapter() if off else contextlib.nullcontext():
        losses = [(float(_labels(batch)), model(**batch).loss) for batch in batches]
        loss = sum(weight * each for weight, each in losses) / sum(weight for weight, _ in losses)
        gradients = torch.autograd.grad(loss, list(wanted.values()))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(before[name])
    return {
        name: gradient.T if isinstance(layers[name], (Conv1D, nn.Embedding)) else gradient
        for name, gradient in zip(wanted, gradients, strict=True)
    }


def _labels(batch) -> int:
    labels = batch["labels"]
    return labels.numel() if labels.dim() == 1 else labels[:, 1:].numel()
