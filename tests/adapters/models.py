"""One adapted layer of every kind, and the dense gradient that its factors' gradients must agree with."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from tangora import LoraPair, find_pairs

LAYERS = {
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


def inputs_of(name: str) -> tuple[Tensor, ...]:
    """What the layer of that name is called with."""
    torch.manual_seed(1)
    if name.startswith("embedding"):
        return (torch.tensor([[0, 1, 2, 10], [4, 4, 1, 6]]),)
    if name == "attention":
        return (torch.randn(2, 4, 6, dtype=torch.float64),) * 3
    shape = {"conv1d": (2, 3, 8), "conv3d": (2, 2, 4, 3, 4)}.get(
        name, (2, 3, 6, 5) if "conv2d" in name else (2, 4, 7)
    )
    return (torch.randn(shape, dtype=torch.float64),)


def adapted(name: str, **config) -> PeftModel:
    """The layer with an adapter whose factors are both random, in float64."""
    torch.manual_seed(0)
    options = {"r": 2, "lora_alpha": 6, "target_modules": ["it"], "fan_in_fan_out": name == "gpt2-conv1d"}
    model = get_peft_model(Holder(LAYERS[name]().double()), LoraConfig(**options | config))
    return randomize(model, name)


def randomize(model: PeftModel, name: str = "") -> PeftModel:
    """Draw every adapter parameter, so that no factor is zero."""
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            noise = 0.5 * torch.randn(parameter.shape, dtype=torch.float64)
            parameter.data.copy_(noise.abs() + 0.5 if "magnitude" in key else noise)
            if "embedding_A" in key and name == "embedding-padding":
                parameter.data[:, 1] = 0  # as PEFT starts it: the padding row of the table gets no gradient
    return model


def loss_of(output: Tensor | tuple) -> Tensor:
    """A loss that is linear in nothing."""
    output = output[0] if isinstance(output, tuple) else output
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return (weights * (output + 0.3 * output.square())).sum()


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


def tiny_llama(**options) -> LlamaForCausalLM:
    """One random decoder layer."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes | options))


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
