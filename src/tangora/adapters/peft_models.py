"""PEFT models in all forms: wrapped, sharded, merged, mixed; and the base model under their adapters."""

import contextlib
from collections.abc import Container, Iterable, Iterator
from operator import attrgetter
from typing import Any

from peft import PeftMixedModel, PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch._dynamo import OptimizedModule

from tangora._checks import InputError
from tangora.adapters.sharded import is_sharded

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
# modules whose functions take the place of a block's forward pass and read A, B and the scaling themselves
_FUSED = ("unsloth.kernels", "axolotl.kernels", "axolotl.monkeypatch.lora_kernels")
_APART = (
    "merge the inner adapter into the base first (merge_and_unload), or put both into one model "
    "(add_adapter) and save each separately"
)
_GATHER = "gather the full state dict, load it into a model that is not sharded, and use that model"


def unwrapped(model: Any) -> Any:
    """Return the model inside wrappers for data-parallel training and compilation; anything else unchanged."""
    while isinstance(model, (*_PARALLEL, OptimizedModule)):
        model = model._orig_mod if isinstance(model, OptimizedModule) else model.module
    return model


def uncompiled_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return modules by path, without the wrappers that ``torch.compile`` puts around some of them."""
    return {name: module for name, module in model.named_modules() if not isinstance(module, OptimizedModule)}


def base_layer(layer: nn.Module) -> nn.Module:
    """Return the layer inside PEFT's wrapper; anything else unchanged."""
    unwrap = getattr(layer, "get_base_layer", None)
    return layer if unwrap is None else unwrap()


def has_adapter(model: nn.Module) -> bool:
    """Return whether a model has an adapter of any kind, created by PEFT or injected into a plain model."""
    return isinstance(model, PeftModel) or any(isinstance(m, BaseTunerLayer) for m in model.modules())


def check_unfused(model: nn.Module) -> None:
    """Raise `InputError` if fused kernels bypass the layers, so that hooks and initial products have no effect."""
    for name, module in model.named_modules():
        for value in (*vars(module).values(), type(module).forward):
            bound = getattr(value, "func", value)  # of a partial
            function = getattr(bound, "__func__", bound)
            home = str(getattr(function, "__module__", ""))
            if home.startswith(_FUSED) and not getattr(function, "__name__", "original").startswith(
                "original"
            ):
                raise InputError(
                    f"{home.partition('.')[0].capitalize()}'s fused LoRA kernel in {name} bypasses the "
                    "layers that an initialization changes: create the adapter without this kernel "
                    "(Axolotl: lora_mlp_kernel, "
                    "lora_qkv_kernel, lora_o_kernel, lora_embedding_kernel: false; Unsloth: peft.get_peft_model), or "
                    "keep PEFT's initialization"
                )


def active_adapter(model: nn.Module) -> str:
    """Return the name of the one active adapter.

    Raises:
        InputError: If ``model`` is no PEFT model, or not exactly one adapter is active.
    """
    if not isinstance(model, PeftModel):
        raise InputError(f"model must be a PeftModel; got {type(model).__name__}")
    active = model.active_adapters
    if len(active) != 1:
        raise InputError(f"model must have one active adapter; got {', '.join(active) or 'none'}")
    return active[0]


def bare_model(model: nn.Module) -> PeftModel:
    """Return the PEFT model inside wrappers; raise `InputError` if it uses adapters of another model."""
    bare = unwrapped(model)
    if isinstance(bare, PeftMixedModel):
        raise InputError(
            "a mixed model (get_peft_model with mixed=True) cannot be saved: use a separate PeftModel "
            "for every kind of adapter, and merge one before you add the next"
        )
    if not isinstance(bare, PeftModel):
        raise InputError(f"model must be a PeftModel; got {type(bare).__name__}")
    base: Any = bare.get_base_model()
    if any(isinstance(module, PeftModel) for module in base.modules()):
        raise InputError(f"the base of the model is itself a PeftModel: {_APART}")
    for name, layer in base.named_modules():
        if isinstance(layer, BaseTunerLayer) and _in_use(layer) and not _owns(bare.base_model, name, layer):
            raise InputError(f"the base already has another adapter at {name}: {_APART}")
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


@contextlib.contextmanager
def adapters_off(model: nn.Module, *, keep_heads: bool = False) -> Iterator[None]:
    """Switch off adapters and modules to save for a while.

    PEFT's own ``disable_adapter`` leaves the active adapter trainable, whether it was or not; here only the switch
    itself is moved, and put back.

    Args:
        model: Any model with PEFT layers.
        keep_heads: Whether modules to save stay as they are, and only adapters are switched off.

    Raises:
        InputError: If an adapter is merged, because the base weights are then not there.
    """
    check_unmerged(model)
    kinds = (BaseTunerLayer,) if keep_heads else (BaseTunerLayer, AuxiliaryTrainingWrapper)
    switched = [module for module in model.modules() if isinstance(module, kinds)]
    before = [module.disable_adapters for module in switched]
    try:
        for module in switched:
            module._disable_adapters = True
        yield
    finally:
        for module, was in zip(switched, before, strict=True):
            module._disable_adapters = was


def adapter_switches(model: nn.Module) -> tuple[Any, ...]:
    """Return PEFT's settings that are not tensors, for comparison: scalings, active and disabled adapters."""
    scaled: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)]
    return tuple(
        (*layer.scaling.values(), *layer.active_adapters, layer.disable_adapters) for layer in scaled
    )


def check_unmerged(model: nn.Module, adapter_name: str | None = None) -> None:
    """Raise `InputError`, naming the adapter and a layer, if an adapter (default any) of the model is merged."""
    for name, module in model.named_modules():
        merged = module.merged_adapters if isinstance(module, BaseTunerLayer) else ()
        for adapter in merged:
            if adapter_name in (None, adapter):
                raise InputError(f"adapter {adapter!r} is merged into {name}: call unmerge_adapter first")


def check_not_sharded(
    parameters: Iterable[tuple[str, nn.Parameter]],
    what: str,
    instead: str = "call it before the model is sharded",
) -> None:
    """Raise `InputError`, naming the parameter, if a process holds only a part of one.

    Args:
        what: The function that needs them whole, for the message.
        instead: Advice for the message.
    """
    for name, parameter in parameters:
        if is_sharded(parameter) or hasattr(parameter, "ds_id"):
            raise InputError(
                f"{what} needs whole weights, and {name} is sharded (FSDP, tensor parallelism, ZeRO-3): {instead}"
            )


def check_gathered(
    model: nn.Module, what: str, *, adapters_only: bool = False, gathered: Container[str] = ()
) -> None:
    """Raise `InputError` if a parameter to be saved is sharded and was not gathered."""
    parameters = named_adapter_parameters(model) if adapters_only else model.named_parameters()
    check_not_sharded(((name, p) for name, p in parameters if name not in gathered), what, _GATHER)
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
