r"""One adapted layer inside a three-layer network of any width, and how far a few steps change what it puts out."""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from tangora.adapters import find_pairs
from tangora.experiments.reproduce.parts.width import Rate, Readout
from tangora.init import initialize
from tangora.optim import ODELoRA
from tangora.recipes import recipe

# the same for all; decay would shrink the weights and blur what a gradient step does
_ADAM: Mapping[str, Any] = MappingProxyType({"weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8})
_STARTS = MappingProxyType({"plain": "lora", "orthogonal": "orthogonal", "lora-ga": "lora-ga"})


@dataclass(frozen=True)
class Trainer:
    """A method that trains the hidden layer.

    Attributes:
        make: ``make(model, lr)`` -> optimizer of what is trainable.
        rate: Which of the learning rates it takes.
        adapts: Whether it trains LoRA factors; else the weight itself.
    """

    make: Callable[[nn.Module, float], Optimizer]
    rate: Rate
    adapts: bool = True


def _by_recipe(name: str) -> Callable[[nn.Module, float], Optimizer]:
    return lambda model, lr: recipe(name).create_optimizer(model, lr, **_ADAM)


def _sgd(model: nn.Module, lr: float) -> Optimizer:
    return SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=lr)


TRAINERS: Mapping[str, Trainer] = MappingProxyType(
    {
        "full (SGD)": Trainer(_sgd, "sgd", adapts=False),
        "full (Adam)": Trainer(_by_recipe("full"), "full", adapts=False),
        "LoRA (SGD)": Trainer(_sgd, "sgd"),
        "LoRA (Adam)": Trainer(_by_recipe("lora"), "lora"),
        "LoRA+": Trainer(_by_recipe("lora+"), "full"),
        "P-LoRA": Trainer(_by_recipe("p-lora"), "lora"),
        "LoRA-Pro (SGD)": Trainer(_by_recipe("lora-pro-sgd"), "sgd"),
        "LoRA-Pro (Adam)": Trainer(_by_recipe("lora-pro"), "full"),
        "TangentAdam": Trainer(_by_recipe("tangent"), "full"),
        "ODELoRA (Euler)": Trainer(lambda model, lr: ODELoRA(model, lr, scheme="euler"), "sgd"),
    }
)
"""Methods by name."""


class HiddenLayer:
    r"""A tanh network $d \to n \to n \to c$ without biases, whose square layer is trained.

    The first layer is frozen, so the trained layer's input $h$ is fixed; its entries are of order one at every width.

    Args:
        width: $n$.
        inputs: $d$.
        outputs: $c$.
        num_examples: Size of the batch, the same at every step.
        readout: Size of the last layer's weights: $1/\sqrt n$ (``standard``: outputs of order one) or $1/n$
            (``mean-field``).
        rank: LoRA's r.
        alpha: LoRA's alpha.
        seed: Seed of weights, inputs and targets.
    """

    def __init__(
        self,
        width: int,
        *,
        inputs: int,
        outputs: int,
        num_examples: int,
        readout: Readout,
        rank: int,
        alpha: float,
        seed: int,
    ):
        generator = torch.Generator().manual_seed(seed)
        last = width**-0.5 if readout == "standard" else 1 / width
        layers = [
            _linear(inputs, width, inputs**-0.5, generator),
            nn.Tanh(),
            _linear(width, width, width**-0.5, generator),
            nn.Tanh(),
            _linear(width, outputs, last, generator),
        ]
        x = torch.randn(num_examples, inputs, generator=generator)
        self._batch = (x, torch.randn(num_examples, outputs, generator=generator))
        self._seed = seed
        self._plain = nn.Sequential(*layers)
        with torch.no_grad():
            self.h = self._plain[:2](x)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["2"])  # pyright: ignore[reportArgumentType]
        with torch.random.fork_rng(devices=[]):
            # PEFT wraps the layer in this second container only; its factors get their values from `initialize`
            adapted = get_peft_model(nn.Sequential(*layers), config)  # pyright: ignore[reportArgumentType]
        assert isinstance(adapted, PeftModel)
        self._adapted = adapted

    def changes(self, trainer: Trainer, start: str, lr: float, steps: int) -> list[float]:
        r"""Train the layer from its start and measure how far its output has moved.

        Args:
            trainer: The method.
            start: ``plain`` (A random and B = 0, as PEFT), ``orthogonal`` (both factors orthogonal and balanced) or
                ``lora-ga``; full fine-tuning has none.
            lr: Learning rate.
            steps: Number of steps, all on the same batch.

        Returns:
            $\|\Delta W h\|$ after each step, root mean square over examples and coordinates; NaN from the first step
            on that could not be taken because a gradient was not finite.
        """
        return (
            self._factor_changes(trainer, start, lr, steps)
            if trainer.adapts
            else self._full(trainer, lr, steps)
        )

    def _factor_changes(self, trainer: Trainer, start: str, lr: float, steps: int) -> list[float]:
        model = self._adapted
        batches = [self._batch] if start == "lora-ga" else None
        (pair,) = find_pairs(model)
        nn.init.zeros_(pair.B)  # what the last method has trained goes
        initialize(model, _STARTS[start], batches, loss_fn=_loss, seed=self._seed, progress=False)

        def output() -> Tensor:
            A, B = pair.factors()
            return pair.scaling * ((self.h @ A.mT) @ B.mT)

        return self._train(model, trainer.make(model, lr), steps, output)

    def _full(self, trainer: Trainer, lr: float, steps: int) -> list[float]:
        weight = self._plain[2].weight
        assert isinstance(weight, nn.Parameter)
        kept = weight.detach().clone()
        weight.requires_grad_(True)
        try:
            optimizer = trainer.make(self._plain, lr)
            return self._train(self._plain, optimizer, steps, lambda: self.h @ (weight.detach() - kept).mT)
        finally:
            weight.requires_grad_(False)
            weight.data.copy_(kept)
            weight.grad = None

    def _train(
        self, model: nn.Module, optimizer: Optimizer, steps: int, output: Callable[[], Tensor]
    ) -> list[float]:
        def closure() -> float:
            optimizer.zero_grad()
            loss = _loss(model, self._batch)
            loss.backward()
            return loss.item()

        before, sizes = output(), []
        with warnings.catch_warnings():
            # LoRA-Pro warns of its jump from B = 0, which is among the things measured here
            warnings.filterwarnings("ignore", message="step .* changes A of", category=UserWarning)
            for _ in range(steps):
                try:
                    optimizer.step(closure)
                except FloatingPointError:
                    break
                sizes.append(float((output() - before).square().mean().sqrt()))
        return sizes + [math.nan] * (steps - len(sizes))


def _linear(inputs: int, outputs: int, size: float, generator: torch.Generator) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False, device="meta").to_empty(device="cpu")
    torch.nn.init.normal_(layer.weight, std=size, generator=generator)
    return layer.requires_grad_(False)


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (model(x) - y).square().sum(-1).mean() / 2
