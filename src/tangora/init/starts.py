"""The table of starts: what each one takes and reads, and the factors that it makes of one layer.

Models stay outside: nothing here writes a parameter. `initialize` carries out what the table says, and a diagnosis
looks at the gradient through the same factors.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

import torch

from tangora._checks import InputError, check_choice
from tangora._types import FactorA, FactorB, Weight
from tangora.geometry.sketch import LowRankSVD
from tangora.init.lora_ga import lora_ga
from tangora.init.lora_one import lora_one, lora_one_v1
from tangora.init.one_step import one_step
from tangora.init.orthogonal import orthogonal
from tangora.init.pissa import pissa
from tangora.probes.stillness import seeded

Factors = tuple[FactorA, FactorB]

PROBE_OPTIONS = ("oversampling", "power_iterations", "one_pass")
"""Options of `gradient_svds` that every start takes that reads gradients."""


@dataclass(frozen=True)
class LayerToStart:
    """What a start may be made of."""

    shape: tuple[int, int, int]
    """``(m, n, r)``."""
    scaling: float
    gradient: LowRankSVD | None
    weight: Callable[[], Weight]
    drawn: Callable[[], Factors]
    """PEFT's own start."""
    generator: torch.Generator


@dataclass(frozen=True)
class StartMethod:
    """One start."""

    factors: Callable[..., Factors]
    """``(layer, **options)`` -> $(A_0, B_0)$."""
    options: Mapping[str, Any]
    """Types of its options, by name."""
    directions: int = 0
    """Gradient directions per unit of rank; 0 for starts that do not look at the gradient."""
    values: bool = False
    """Whether it weighs directions by singular values, which few passes tell too roughly."""
    offset: bool = False
    """Whether $-s B_0 A_0$ is carried along, so that the model starts from the base."""
    any_rank: bool = False
    """Whether the rank may exceed the smaller side of the layer."""


def starts() -> tuple[str, ...]:
    """List the starts, by their names for `initialize`."""
    return tuple(_STARTS)


def start_method(name: str) -> StartMethod:
    """Look a start up in the table."""
    check_choice("method", name, tuple(_STARTS))
    return _STARTS[name]


def start_options(method: str) -> Mapping[str, Any]:
    """Return the types of a start's options, by name."""
    return _STARTS[method].options


def needs_batches(method: str) -> bool:
    """Tell whether a start reads gradients, so that `initialize` needs batches for it."""
    return _STARTS[method].directions > 0


def carries_offset(method: str) -> bool:
    """Tell whether a start subtracts its product, so that layers started so have an offset."""
    return _STARTS[method].offset


def check_options(method: str, options: Mapping[str, Any], *, has_batches: bool) -> StartMethod:
    """Look up a start and check what it is given."""
    chosen = start_method(method)
    allowed = (*chosen.options, *(PROBE_OPTIONS if chosen.directions else ()))
    for key in options:
        if key not in allowed:
            raise InputError(f"start {method!r} takes {', '.join(allowed) or 'no options'}; got {key!r}")
    if chosen.directions and not has_batches:
        raise InputError(
            f"start {method!r} reads gradients: give batches, a list of model inputs with labels"
        )
    if method == "one-step" and ("step" in options) == (options.get("held_out") is not None):
        raise InputError("start 'one-step' needs either step=... or held_out=batches to search the step on")
    return chosen


def _lora_ga(layer: LayerToStart, **options: Any) -> Factors:
    values = torch.linalg.svdvals(layer.weight()) if options.get("scale") == "weight_svd" else None
    return lora_ga(
        _gradient(layer),
        layer.shape[2],
        layer.scaling,
        weight_singular_values=values,
        generator=layer.generator,
        **options,
    )


def _lora_one(layer: LayerToStart, **options: Any) -> Factors:
    return lora_one(_gradient(layer), layer.shape[2], **options)


def _lora_one_v1(layer: LayerToStart, **options: Any) -> Factors:
    return lora_one_v1(_gradient(layer), layer.shape[2], **options)


def _one_step(layer: LayerToStart, **options: Any) -> Factors:
    return one_step(_gradient(layer), layer.shape[2], layer.scaling, **options)


def _orthogonal(layer: LayerToStart, **options: Any) -> Factors:
    return orthogonal(*layer.shape, generator=layer.generator, **options)


def _pissa(layer: LayerToStart, **options: Any) -> Factors:
    with seeded(layer.generator.initial_seed()):  # the randomized decomposition knows the global state only
        return pissa(layer.weight(), layer.shape[2], layer.scaling, **options)


def _lora(layer: LayerToStart) -> Factors:
    return layer.drawn()


def _gradient(layer: LayerToStart) -> LowRankSVD:
    assert layer.gradient is not None
    return layer.gradient


def _typed(function: Callable[..., Factors], *names: str) -> dict[str, Any]:
    hints = get_type_hints(function)
    return {name: hints.get(name, Any) for name in names}


_STARTS = {
    "lora": StartMethod(_lora, {}, any_rank=True),
    "orthogonal": StartMethod(_orthogonal, _typed(orthogonal, "size"), offset=True),
    "pissa": StartMethod(_pissa, _typed(pissa, "niter"), offset=True),
    "lora-ga": StartMethod(
        _lora_ga, _typed(lora_ga, "direction", "scale", "stable_gamma"), directions=2, offset=True
    ),
    "lora-one": StartMethod(_lora_one, _typed(lora_one, "gamma"), directions=1, values=True),
    "lora-one-v1": StartMethod(_lora_one_v1, _typed(lora_one_v1, "gamma"), directions=1, offset=True),
    "one-step": StartMethod(_one_step, _typed(one_step, "step", "held_out"), directions=1, values=True),
}
