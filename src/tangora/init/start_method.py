"""One row of the table of initializations: its inputs, and its factors for one layer.

Models stay outside: nothing here writes a parameter. `initialize` carries out what the row says, and a diagnosis looks
at the gradient through the same factors.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, get_type_hints

import torch

from tangora._types import FactorA, FactorB, Weight
from tangora.geometry.sketch import LowRankSVD

StartFactors = tuple[FactorA, FactorB]


@dataclass(frozen=True)
class LayerToStart:
    """The inputs of an initialization for one layer."""

    shape: tuple[int, int, int]
    """``(m, n, r)``."""
    scaling: float
    gradient: LowRankSVD | None
    weight: Callable[[], Weight]
    drawn: Callable[[], StartFactors]
    """PEFT's own initialization."""
    generator: torch.Generator

    @property
    def known_gradient(self) -> LowRankSVD:
        """The gradient, for an initialization whose row asks for directions of it."""
        assert self.gradient is not None
        return self.gradient


def _never(options: Mapping[str, Any]) -> bool:  # noqa: ARG001
    return False


@dataclass(frozen=True)
class StartMethod:
    """One initialization."""

    factors: Callable[..., StartFactors]
    """``(layer, **options)`` -> $(A_0, B_0)$."""
    options: Mapping[str, Any]
    """Types of its options, by name."""
    directions: int = 0
    """Gradient directions per unit of rank; 0 for initializations that do not look at the gradient."""
    values: bool = False
    """Whether it weighs directions by singular values, which few passes tell too roughly."""
    offset: bool = False
    """Whether $-s B_0 A_0$ is added, so that training starts at the base model."""
    any_rank: bool = False
    """Whether the rank may exceed the smaller side of the layer."""
    any_sharding: bool = False
    """Whether the factors may be parts of larger ones on other devices."""
    reads_weight: Callable[[Mapping[str, Any]], bool] = _never
    """Whether it is made from the base weight, by its options."""
    step_sizes: Sequence[float] = ()
    """Candidates for option ``step``, compared on the batches of option ``held_out``; one of the two is needed."""
    approximation: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Options that make it in less time from a large weight, for a diagnosis."""

    @property
    def reads_gradients(self) -> bool:
        """Whether `initialize` needs batches for it."""
        return self.directions > 0

    @property
    def searches_step(self) -> bool:
        """Whether it has a step size that `initialize` can search on held-out batches."""
        return len(self.step_sizes) > 0


def option_types(function: Callable[..., StartFactors], *names: str) -> dict[str, Any]:
    """Return the types of some parameters of an initialization's function."""
    hints = get_type_hints(function)
    return {name: hints.get(name, Any) for name in names}
