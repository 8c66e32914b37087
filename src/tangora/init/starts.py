"""The table of initializations, by their names for `initialize`."""

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
"""Options of `gradient_svds` that every initialization takes that reads gradients."""

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
    """List the initializations, by their names for `initialize`."""
    return tuple(_STARTS)


def start_method(name: str) -> StartMethod:
    """Look an initialization up in the table."""
    check_choice("method", name, tuple(_STARTS))
    return _STARTS[name]


def check_options(method: str, options: Mapping[str, Any], *, has_batches: bool) -> StartMethod:
    """Look up an initialization and check what it is given."""
    chosen = start_method(method)
    allowed = (*chosen.options, *(PROBE_OPTIONS if chosen.reads_gradients else ()))
    for key in options:
        if key not in allowed:
            raise InputError(
                f"initialization {method!r} takes {', '.join(allowed) or 'no options'}; got {key!r}"
            )
    if chosen.reads_gradients and not has_batches:
        raise InputError(
            f"initialization {method!r} reads gradients: give batches, a list of model inputs with labels"
        )
    if chosen.searches_step and ("step" in options) == (options.get("held_out") is not None):
        raise InputError(
            f"initialization {method!r} needs either step=... or held_out=batches to search the step on"
        )
    return chosen
