"""Pairs without a gradient are named, or refused with the cause: no run trains nothing without a word."""

import warnings
import weakref
from collections.abc import Sequence
from typing import Any

from torch import nn

from tangora._checks import InputError
from tangora.adapters import LoraPair, discover
from tangora.adapters.discover import some_of


class Watch:
    """Checks at every step of an optimizer that what can be trained is trained, and warns once of each finding."""

    def __init__(self, model: "weakref.ref[nn.Module] | None" = None):
        self._model = model
        self._seen = _adapters(model)
        self._warned: set[str] = set()

    def __reduce__(self) -> tuple[type["Watch"], tuple[()]]:
        return Watch, ()  # a copy of the optimizer belongs to a copy of the model

    def check(self, pairs: Sequence[LoraPair], moving: Sequence[LoraPair]) -> None:
        """Look for pairs that take no step."""
        if len(moving) < len(pairs):
            stepping = {id(pair) for pair in moving}
            still = [pair for pair in pairs if id(pair) not in stepping and pair.scaling != 0]
            _refuse_frozen_factor(still)
            if still and not moving:
                _refuse_cause(still[0])
                self._warn(
                    "no gradient",
                    "no LoRA pair has a gradient, so the step would change nothing: call loss.backward() first",
                )
            elif still:
                names = some_of([f"{pair.name}{'' if pair.active else ' (adapter off)'}" for pair in still])
                self._warn(
                    "missing",
                    f"{len(still)} of {len(pairs)} LoRA pairs have no gradient and are not updated: {names}",
                )
        self._check_new_adapters(pairs)

    def _check_new_adapters(self, pairs: Sequence[LoraPair]) -> None:
        if (adapters := _adapters(self._model)) == self._seen:
            return
        self._seen = adapters
        model = self._model() if self._model is not None else None
        if model is None:
            return
        held = {id(parameter) for pair in pairs for parameter in pair.parameters}
        new = [
            pair
            for pair in discover(model).pairs
            if pair.trainable and pair.active and id(pair.A) not in held
        ]
        if new:
            names = some_of(sorted({repr(pair.adapter) for pair in new}))
            self._warn(
                f"added {names}",
                f"{len(new)} trainable LoRA pairs of adapter {names} were added after the optimizer was "
                "created, so it does not train them: create a new optimizer, or call "
                "add_param_group({'pairs': ...})",
            )

    def _warn(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, stacklevel=5)


def _adapters(model: "weakref.ref[nn.Module] | None") -> tuple[str, ...]:
    """Return the adapters of a PEFT model and which of them are active, to be compared from step to step."""
    held: Any = model() if model is not None else None
    while held is not None and not hasattr(held, "peft_config"):
        held = getattr(held, "module", getattr(held, "_orig_mod", None))
    return () if held is None else (*held.peft_config, "", *held.active_adapters)


def _refuse_frozen_factor(still: Sequence[LoraPair]) -> None:
    for pair in still:
        if pair.A.requires_grad != pair.B.requires_grad:
            frozen, other = ("B", "A") if pair.A.requires_grad else ("A", "B")
            raise InputError(
                f"factor {frozen} of {pair.name} was frozen after the optimizer was created, but a pair "
                f"needs both factors: create a new optimizer, and AdamW trains factor {other}"
            )


def _refuse_cause(pair: LoraPair) -> None:
    """Raise `InputError` if a pair can never get a gradient, saying why."""
    layer: Any = pair.layer
    if not pair.attached:
        raise InputError(
            f"layer {pair.name} has new factors since the optimizer was created, and the old ones have "
            "no gradient: create the optimizer after fully_shard, FSDP or any other step that replaces "
            "parameters"
        )
    if pair.adapter not in layer.active_adapters:
        raise InputError(
            f"the optimizer was created for adapter {pair.adapter!r}, and "
            f"{', '.join(map(repr, layer.active_adapters))} "
            "is active: create an optimizer for the active adapter, or call "
            f"model.set_adapter({pair.adapter!r})"
        )
    if not pair.active:
        state = "disabled" if layer.disable_adapters else "merged into the weights"
        raise InputError(
            f"adapter {pair.adapter!r} is {state}, so it gets no gradient: enable or unmerge it before "
            "training"
        )
    if not pair.trainable:
        raise InputError(
            f"the factors of adapter {pair.adapter!r} were frozen after the optimizer was created: call "
            "requires_grad_(True) on them, or model.set_adapter"
        )
