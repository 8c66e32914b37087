"""Training steps on fake tensors: of any model's shapes, on no memory, every allocation counted as it would be made.

Fake tensors know shape, dtype and device, and torch runs its operations on them without data. What is counted is what
torch's operations make and keep; see ``docs/guides/scale.md`` for what a GPU needs beside that.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM, PretrainedConfig

from tangora.experiments.run.estimate import LiveTensors
from tangora.geometry.guess import guessing
from tangora.optim import base, gathering, layerwise, stack

STEADY_STEP = 10


def meta_model(config: PretrainedConfig, rank: int, dtype: torch.dtype = torch.bfloat16) -> PeftModel:
    """Make a language model with float32 adapters on all linear layers but the head, without memory."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.config.use_cache = False
        adapted = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))
    return adapted.train()  # pyright: ignore


def passes_peak(model: nn.Module, batch: tuple[int, int], *, checkpointing: bool = False) -> int:
    """Return the most bytes that a forward and a backward pass hold beside the model, gradients included."""
    model.zero_grad()
    if checkpointing:
        held: Any = model
        held.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        held.enable_input_require_grads()
    tokens = torch.zeros(batch, dtype=torch.long)
    with LiveTensors([*model.parameters(), *model.buffers()]) as tensors:
        model(input_ids=tokens, labels=tokens).loss.backward()
    return tensors.peak


def step_peak(model: nn.Module, make: Callable[[nn.Module], Optimizer]) -> int:
    """Return the most bytes that a steady step holds beside the model, its gradients and the optimizer's state."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    with as_on_a_gpu(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of addresses, which fake tensors do not have
        optimizer = make(model)
        for kept in optimizer.state.values():
            kept["step"] = torch.tensor(
                float(STEADY_STEP)
            )  # fake tensors know numbers that were given to them
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        states = [value for kept in optimizer.state.values() for value in kept.values()]
        with LiveTensors([*model.parameters(), *gradients, *states]) as tensors:
            optimizer.step()
    return tensors.peak


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Let steps stack all layers of one shape and take the fast branches, and look at no number."""
    with contextlib.ExitStack() as patches:
        for owner, name, value in (
            (gathering, "_CPU_STACK_NUMBERS", gathering._STACK_NUMBERS),
            (stack.PairStack, "steps", STEADY_STEP),
            (stack.PairStack, "count", lambda _: None),
            (layerwise, "_waiting_costs", lambda _: True),
            (layerwise, "_read", lambda doubts, _: [False] * len(doubts)),
            (base.PairOptimizer, "_check_finite", lambda *_: None),
        ):
            patches.enter_context(mock.patch.object(owner, name, value))
        patches.enter_context(guessing())
        yield


def fake_memory() -> FakeTensorMode:
    """Return the context in which tensors take no memory."""
    return FakeTensorMode()
