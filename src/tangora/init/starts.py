"""The table of starts, by their names for `initialize`."""

from collections.abc import Mapping
from typing import Any

from tangora._checks import InputError, check_choice
from tangora.init.lora_ga import LORA_GA
from tangora.init.lora_one import LORA_ONE, LORA_ONE_V1
from tangora.init.one_step import ONE_STEP
from tangora.init.orthogonal import ORTHOGONAL
from tangora.init.pissa import PISSA
from tangora.init.start_method import StartMethod

PROBE_OPTIONS = ("oversampling", "power_iterations", "one_pass")
"""Options of `gradient_svds` that every start takes that reads gradients."""

_STARTS = {
    "lora": StartMethod(lambda layer: layer.drawn(), {}, any_rank=True, any_sharding=True),
    "orthogonal": ORTHOGONAL,
    "pissa": PISSA,
    "lora-ga": LORA_GA,
    "lora-one": LORA_ONE,
    "lora-one-v1": LORA_ONE_V1,
    "one-step": ONE_STEP,
}


def starts() -> tuple[str, ...]:
    """List the starts, by their names for `initialize`."""
    return tuple(_STARTS)


def start_method(name: str) -> StartMethod:
    """Look a start up in the table."""
    check_choice("method", name, tuple(_STARTS))
    return _STARTS[name]


def start_options(method: str) -> Mapping[str, Any]:
    """Return the types of a start's options, by name."""
    return start_method(method).options


def needs_batches(method: str) -> bool:
    """Tell whether a start reads gradients, so that `initialize` needs batches for it."""
    return start_method(method).directions > 0


def searches_step(method: str) -> bool:
    """Tell whether a start has a step size, which `initialize` can search on held-out batches."""
    return len(start_method(method).step_sizes) > 0


def carries_offset(method: str) -> bool:
    """Tell whether a start subtracts its product, so that layers started so have an offset."""
    return start_method(method).offset


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
    if chosen.step_sizes and ("step" in options) == (options.get("held_out") is not None):
        raise InputError(f"start {method!r} needs either step=... or held_out=batches to search the step on")
    return chosen
