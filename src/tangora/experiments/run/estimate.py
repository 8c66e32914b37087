"""The memory that a run will hold, from the shapes of its model alone: no weights are read, and nothing is trained.

Adapter, gradients and optimizer state are counted on a model and an optimizer without memory; activations by a forward
and a backward pass on fake tensors, which know shape and dtype and on which torch runs its operations without data.
"""

import json
import warnings
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PretrainedConfig

from tangora._names import Kind
from tangora.adapters import attach_offset, linear_layers
from tangora.experiments.run.machine import num_bytes
from tangora.experiments.run.preparing import CHECKPOINTING, CHECKPOINTING_KWARGS, prepare_as
from tangora.experiments.settings import RunSettings
from tangora.init import start_method
from tangora.recipes import Recipe
from tangora.training.models.empty_model import empty_model, reads_images

_FLOAT = 4


@dataclass(frozen=True)
class Memory:
    """Memory of training, in bytes."""

    weights: int
    """Frozen base weights, with the product that an initialization subtracts from them."""
    trained: int
    """Parameters that are trained: adapter and new head, or all."""
    gradients: int
    state: int
    """Tensors of the optimizer's state."""
    activations: int
    """The most that a forward pass of one micro-batch holds, every example as long as ``max_length``."""
    total: int
    """At the peak of a backward pass."""


def estimate(
    runs: Sequence[RunSettings], config: PretrainedConfig, kind: Kind, num_labels: int = 2
) -> list[Memory]:
    """Estimate the memory of runs on one model: the tensors of torch's operations, without memory of the libraries.

    Copies within a step and initializations that need gradients are not counted: they exist after the
    activations, or before the optimizer. Layers in 4 bits are made whole one at a time, which is not counted either.

    Args:
        runs: Whose batch size, longest example, adapter and optimizer are counted.
        config: Configuration of the base model.
        kind: ``classification`` or ``causal``.
        num_labels: Number of classes.

    Raises:
        InputError: If a recipe cannot be prepared on the model.
    """
    passes: dict[str, tuple[int, int]] = {}  # the same for recipes that differ in their optimizer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensors without data, which have no addresses
        return [_estimate(run, config, kind, num_labels, passes) for run in runs]


def _estimate(
    settings: RunSettings,
    config: PretrainedConfig,
    kind: Kind,
    num_labels: int,
    known: dict[str, tuple[int, int]],
) -> Memory:
    recipe = settings.chosen_recipe
    base = _base(settings, config, kind, num_labels)
    linear = {id(layer.weight) for layer in linear_layers(base).values()} if settings.load_in_4bit else set()
    model = _prepared(recipe, settings, base, kind)
    has_offset = recipe.start is not None and start_method(recipe.start).offset
    if has_offset:
        attach_offset(model, "default", {})
    state = _state_bytes(settings, model) if recipe.trains else 0
    if recipe.search is not None:  # its phases follow each other
        second = replace(recipe, adapter="lora", search=None)
        plain = _prepared(second, settings, _base(settings, config, kind, num_labels), kind)
        state = max(state, _state_bytes(settings, plain))
    frozen = [*model.buffers(), *(each for each in model.parameters() if not each.requires_grad)]
    weights = num_bytes(each for each in frozen if id(each) not in linear)
    weights += sum(nf4_bytes(each.numel()) for each in frozen if id(each) in linear)
    others = settings.model_dump(mode="json", exclude={"recipe", "learning_rate", "seed"})
    key = json.dumps([others, recipe.adapter, dict(recipe.options), has_offset], default=str)
    if key not in known:
        with FakeTensorMode():
            materialize(model)
            known[key] = _passes(model, _batch(settings, config, kind), min(settings.accumulate, 2))
    own, (activations, peak) = num_bytes(_trained(model)), known[key]
    return Memory(weights, own, own, state, activations, weights + own + state + peak)


def _base(settings: RunSettings, config: PretrainedConfig, kind: Kind, num_labels: int) -> Any:
    base: Any = empty_model(config, kind, num_labels, getattr(torch, settings.dtype))
    base.config.use_cache = False
    if settings.gradient_checkpointing:
        getattr(base, f"{CHECKPOINTING}_enable")(**CHECKPOINTING_KWARGS)
        base.enable_input_require_grads()
    return base


def _prepared(recipe: Recipe, settings: RunSettings, base: Any, kind: Kind) -> Any:
    num_steps = settings.steps or 1000  # says when AdaLoRA moves ranks, not how many there are
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return prepare_as(recipe, settings, kind, num_steps, base).train()


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [each for each in model.parameters() if each.requires_grad]


def _state_bytes(settings: RunSettings, model: nn.Module) -> int:
    optimizer = settings.chosen_recipe.create_optimizer(model, settings.peak_learning_rate)
    if not optimizer.state:  # torch's own make theirs in the first step
        for parameter in _trained(model):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    kept = [value for state in optimizer.state.values() for value in state.values()]
    return num_bytes(value for value in kept if isinstance(value, Tensor))


def nf4_bytes(weights: int) -> int:
    """Return the bytes of a layer of so many weights in NF4 with double quantization.

    Four bits each, one byte for every 64 of them, four for every 256 of those, and two tables.
    """
    blocks = -(-weights // 64)
    return weights // 2 + blocks + _FLOAT * -(-blocks // 256) + _FLOAT * (16 + 256 + 1)


def materialize(model: nn.Module) -> None:
    """Give a model's parameters and buffers fresh memory on the CPU: fake memory under `FakeTensorMode`."""
    for module in model.modules():
        for name, each in module._parameters.items():
            if each is not None:
                module._parameters[name] = nn.Parameter(_fresh(each), each.requires_grad)
        for name, each in module._buffers.items():
            if each is not None:
                module._buffers[name] = _fresh(each)


def _fresh(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=like.dtype, device="cpu")


def _batch(settings: RunSettings, config: PretrainedConfig, kind: Kind) -> dict[str, Tensor]:
    size = settings.batch_size
    if reads_images(config) and kind == "classification":
        vision: Any = getattr(config, "vision_config", config)
        return {"pixel_values": torch.zeros(size, vision.num_channels, vision.image_size, vision.image_size)}
    tokens = torch.zeros(size, settings.max_length, dtype=torch.long)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return batch | ({"labels": tokens} if kind == "causal" else {})


def _passes(model: nn.Module, batch: dict[str, Tensor], times: int) -> tuple[int, int]:
    """Return the most that a forward pass holds beside the model, and that all passes do, gradients included."""
    known = [*model.parameters(), *model.buffers(), *batch.values()]
    with LiveTensors(known) as tensors:
        loss = _loss(model, batch)
        forward = tensors.peak
        loss.backward()
        for _ in range(times - 1):  # the gradients of the first are there when the next begins
            del loss
            loss = _loss(model, batch)
            loss.backward()
    return forward, tensors.peak


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if "labels" in batch:
        return base(**batch).loss
    # without the head, which is small: T5's and BART's look for the end of each text, which numbers must tell
    backbone = getattr(base, base.base_model_prefix)
    decoded = {"decoder_input_ids": batch["input_ids"]} if base.config.is_encoder_decoder else {}
    return backbone(**batch, **decoded).last_hidden_state.float().sum()


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the storages that operations have made and that are still alive."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count what it makes."""
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        weakref.finalize(storage, self._freed, size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _freed(self, size: int) -> None:
        self.live -= size
