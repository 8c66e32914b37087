"""What an adapted layer must agree with, and further layers: banks of experts, quantized ones."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import LlamaForCausalLM

from tangora import LoraPair, find_pairs
from tests.models import Holder, loss_of, transformer


class Experts(nn.Module):
    """A bank of matrices without layers, as mixture-of-experts models have."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, 8) / 8)

    def forward(self, x):
        return torch.einsum("eoi,bi->bo", self.weight, x)


class LinearAndExperts(nn.Module):
    """A plain layer before a bank of matrices."""

    def __init__(self):
        super().__init__()
        self.linear, self.experts = nn.Linear(8, 8), Experts()

    def forward(self, x):
        return self.experts(self.linear(x))


def dense_gradient(pair: LoraPair, inputs: tuple[Tensor, ...], magnitude: Tensor | None = None):
    """Loss and gradient with respect to V = W0 + s B A of an equivalent plain layer, out x in.

    With a magnitude the layer's weight is that of DoRA, whose norm PEFT detaches.
    """
    base = copy.deepcopy(pair.layer.get_base_layer())
    stored = base.weight.detach()
    W0 = stored.T if pair.transposed else stored.flatten(1)
    V = (W0 + pair.delta_weight()).requires_grad_()
    W = V if magnitude is None else magnitude.view(-1, 1) * V / V.detach().norm(dim=1, keepdim=True)
    weight = W.T if pair.transposed else W.view(stored.shape)
    loss = loss_of(functional_call(base, {"weight": weight}, inputs))
    loss.backward()
    return loss.detach(), V.grad


def tiny_llama(**options: Any) -> LlamaForCausalLM:
    """One random decoder layer, in training mode."""
    return transformer(
        "llama", seed=0, **{"num_hidden_layers": 1, "num_key_value_heads": 2} | options
    ).train()


def quantized(kind: str, *, bias: bool = False) -> Holder:
    """A linear layer of 64 inputs and 32 outputs as bitsandbytes stores it: nf4, fp4 or int8."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    if kind == "int8":
        layer = bitsandbytes.nn.Linear8bitLt(64, 32, bias=bias, has_fp16_weights=False)
    else:
        layer = bitsandbytes.nn.Linear4bit(64, 32, bias, torch.float32, quant_type=kind)
    state = {"weight": torch.randn(32, 64) / 8} | ({"bias": torch.randn(32)} if bias else {})
    layer.load_state_dict(state, strict=False)
    holder = Holder(layer.to("cpu"))
    setattr(holder, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)
    return holder


def train(model: nn.Module, seed: int = 4):
    """Move everything trainable, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


IDS = torch.arange(12).view(2, 6)
"""Two texts for `tiny_llama`."""


def logits(model):
    """The output for `IDS`."""
    with torch.no_grad():
        output = model(input_ids=IDS)
    return getattr(output, "logits", output)


def updates(model: nn.Module) -> dict[str, Tensor]:
    """s (B A - B0 A0) of every layer, dense."""
    found = {}
    for pair in find_pairs(model):
        A, B = pair.factors()
        B0, A0 = pair.offset() or (B[:, :0], A[:0])
        found[pair.name] = pair.scaling * (B @ A - B0 @ A0)
    return found
