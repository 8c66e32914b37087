"""PEFT's tuner of a model with an offset: what it makes from such an adapter is right, or refused."""

import copy
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from torch import nn

from tangora._checks import InputError
from tangora.adapters.config import OffsetConfig
from tangora.adapters.offset_layer import get_offset, put_offset
from tangora.adapters.offset_state import INSTEAD, parameters_of, refuse_in


class OffsetLoraModel(LoraModel):
    """`LoraModel` that knows of offsets; a model's tuner becomes one by its ``__class__``, and is never constructed."""

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """Combine adapters, none of which may carry an offset: PEFT reads the trained factors alone.

        Args:
            adapters: Their names.
            *args: As for PEFT's method.
            **kwargs: Likewise.

        Raises:
            InputError: If one carries an offset.
        """
        for adapter in adapters:
            if isinstance(self.peft_config.get(adapter), OffsetConfig):
                raise InputError(
                    f"adapter {adapter!r} carries an offset, and cannot be combined with others: {INSTEAD}"
                )
        super().add_weighted_adapter(adapters, *args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; one that is made from the config of an adapter with an offset starts as its copy.

        TRL makes the reference model of DPO so: it adds an adapter with the same config, and copies the parameters.

        Args:
            model: The base model.
            adapter_name: Name of the new adapter.
            *args: As for PEFT's method.
            **kwargs: Likewise.

        Raises:
            InputError: If the offset that belongs to the config cannot be told.
        """
        config = self.peft_config[adapter_name]
        if not isinstance(config, OffsetConfig) or _carriers(model, adapter_name):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            return
        refuse_in("reduce_intruder_dimension", f"the config of adapter {adapter_name!r}")
        source = self._source(model, adapter_name)
        self.peft_config[adapter_name] = copy.copy(config)  # each adapter changes its own
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        for layer in _carriers(model, source):
            offset = get_offset(layer, source)
            assert offset is not None
            put_offset(layer, adapter_name, offset.A0.clone(), offset.B0.clone())
            with torch.no_grad():
                for parameter, frozen in zip(
                    parameters_of(layer, adapter_name), (offset.A0, offset.B0), strict=True
                ):
                    parameter.copy_(frozen)

    def _source(self, model: nn.Module, adapter_name: str) -> str:
        config = self.peft_config[adapter_name]
        held = [name for name in self.peft_config if name != adapter_name and _carriers(model, name)]
        same = [name for name in held if self.peft_config[name] is config] or held
        if len(same) != 1:
            raise InputError(
                f"adapter {adapter_name!r} was made from the config of an adapter with an offset, and {len(same)} "
                "adapters of this model carry one: give it a LoraConfig of its own"
            )
        return same[0]


def _carriers(model: nn.Module, adapter: str) -> list[Any]:
    return [module for module in model.modules() if get_offset(module, adapter) is not None]
