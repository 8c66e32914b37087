"""The PEFT model inside its wrappers, when it is one that can be written or merged as it stands."""

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from peft import PeftMixedModel, PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from tangora._checks import InputError
from tangora.adapters.wrapped import check_not_sharded, unwrapped

_APART = (
    "merge the inner adapter into the base first (merge_and_unload), or hold both in one model (add_adapter) and save "
    "each by itself"
)
_GATHER = "gather the full state dict, load it into a model that is not sharded, and take that"


def bare_model(model: nn.Module) -> PeftModel:
    """Look through wrappers at a PEFT model, and refuse one that computes with adapters it does not own."""
    bare = unwrapped(model)
    if isinstance(bare, PeftMixedModel):
        raise InputError(
            "a mixed model (get_peft_model with mixed=True) cannot be written: give every kind of adapter a PeftModel "
            "of its own, and merge one before adding the next"
        )
    if not isinstance(bare, PeftModel):
        raise InputError(f"model must be a PeftModel; got {type(bare).__name__}")
    base: Any = bare.get_base_model()
    if any(isinstance(module, PeftModel) for module in base.modules()):
        raise InputError(f"the base of the model is itself a PeftModel: {_APART}")
    for name, layer in base.named_modules():
        if isinstance(layer, BaseTunerLayer) and _in_use(layer) and not _owns(bare.base_model, name, layer):
            raise InputError(f"the base already holds another adapter at {name}: {_APART}")
    return bare


def named_adapter_parameters(
    model: nn.Module, adapter_name: str | None = None
) -> Iterator[tuple[str, nn.Parameter]]:
    """Walk over the parameters of adapters and of modules to save."""
    for name, layer in model.named_modules():
        if not isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            continue
        for kind in layer.adapter_layer_names:
            held = attrgetter(kind)(layer)
            for key, parameter in held.named_parameters() if isinstance(held, nn.Module) else ():
                if adapter_name in (None, key.partition(".")[0]):
                    yield f"{name}.{kind}.{key}", parameter


def check_gathered(model: nn.Module, what: str, *, adapters_only: bool = False) -> None:
    """Refuse to write parameters of which a process holds a part only."""
    check_not_sharded(
        named_adapter_parameters(model) if adapters_only else model.named_parameters(), what, _GATHER
    )
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise InputError(
                f"{what} needs whole weights, and {name or 'the model'} is sharded (FSDP): {_GATHER}"
            )


def _in_use(layer: BaseTunerLayer) -> bool:
    return bool(set(layer.active_adapters) & set(layer._get_available_adapters()))


def _owns(tuner: Any, name: str, layer: BaseTunerLayer) -> bool:
    if isinstance(layer, TrainableTokensLayer) and (layer.tied_adapter or name.endswith(".token_adapter")):
        return True
    if not isinstance(layer, getattr(tuner, "tuner_layer_cls", ())):
        return False
    owners = [
        *tuner.targeted_module_names,
        *(key.rpartition(".")[0] for key in tuner.targeted_parameter_names),
    ]
    return any(name == owner or name.startswith(f"{owner}.") for owner in owners)
