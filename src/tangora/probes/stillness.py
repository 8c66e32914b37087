"""Hold a model still while it is read, and give it back as it was; the same for the random state."""

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@contextlib.contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Freeze all weights, switch dropout and caches off; restore everything afterwards.

    Layers that checkpoint their activations do so in training mode only, so they alone stay in it, with their own
    dropout rates at zero. Compiled models run as plain ones, and reentrant checkpoints without reentry.
    """
    with contextlib.ExitStack() as stack:
        # a compiled graph would keep hooks, flags and numbers of the moment it was traced
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        _set(stack, torch.utils.checkpoint, "CheckpointFunction", _WithoutReentry)
        for parameter in [p for p in model.parameters() if p.requires_grad]:
            stack.callback(parameter.requires_grad_, True)
            parameter.requires_grad_(False)
        training = [module for module in model.modules() if module.training]
        stack.callback(_set_training, model, training)
        _set_training(
            model, checkpointing := [m for m in training if getattr(m, "gradient_checkpointing", False)]
        )
        for module in checkpointing:
            for name in [key for key, value in vars(module).items() if _is_dropout_rate(key, value)]:
                _set(stack, module, name, 0.0)
        if getattr(config := getattr(model, "config", None), "use_cache", False):  # would only take memory
            _set(stack, config, "use_cache", False)
        yield


@dataclass(frozen=True)
class RandomState:
    """The random state of Python, numpy and torch (CPU and CUDA) at one moment."""

    python: Any
    numpy: Any
    cpu: Tensor
    cuda: tuple[Tensor, ...]

    @classmethod
    def now(cls) -> "RandomState":
        """Copy the present state."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), tuple(cuda))  # noqa: NPY002

    def put_back(self) -> None:
        """Make it the present state again."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002 - the global state, which data collators may use
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(list(self.cuda))


@contextlib.contextmanager
def preserved_randomness(batches: Any = None) -> Iterator[None]:
    """Put back the random state of torch (all devices), numpy and Python afterwards."""
    present = RandomState.now()
    own = [(generator, generator.get_state()) for generator in _generators(batches)]
    try:
        yield
    finally:
        present.put_back()
        for generator, state in own:
            generator.set_state(state)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from a seed, and put the random state back afterwards."""
    with preserved_randomness():
        torch.manual_seed(seed)
        yield


def _generators(batches: Any) -> set[torch.Generator]:
    batches = getattr(batches, "batches", batches)  # `as_batches` checks that every pass is the same
    holders = batches, getattr(batches, "sampler", None), getattr(batches, "batch_sampler", None)
    held = (getattr(holder, "generator", None) for holder in holders)
    return {generator for generator in held if isinstance(generator, torch.Generator)}


def _set_training(model: nn.Module, training: Iterable[nn.Module]) -> None:
    for module in model.modules():
        module.training = False
    for module in training:
        module.training = True


def _set(stack: contextlib.ExitStack, owner: Any, name: str, value: object) -> None:
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _is_dropout_rate(name: str, value: object) -> bool:
    return isinstance(value, float) and "drop" in name


class _WithoutReentry:
    """Stands in for ``torch.utils.checkpoint.CheckpointFunction``, which runs its function without a graph.

    With frozen weights a reentrant checkpoint has no gradient unless one of its inputs requires one, and it hides
    tensors that stand in for the model's. The other implementation of torch has the same values and neither defect.
    """

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)
