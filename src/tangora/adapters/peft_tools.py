"""PEFT's tools that work on factors past their layer, and would leave an offset behind: they ask here first.

Layers refuse by themselves what goes through their methods (`put_offset`). The rest is refused, or completed, at the
one place in PEFT that each tool has to pass, looked up at call time: importing a tool before tangora changes nothing.
"""

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, hotswap, loftq_utils
from safetensors import safe_open
from torch import nn

from tangora._checks import InputError
from tangora.adapters.discover import discover
from tangora.adapters.offset import OffsetConfig
from tangora.adapters.offset_layer import copy_offset, get_offset, refusal


def respect_offsets() -> None:
    """Let PEFT's tools ask for offsets, from now on in this process; without an offset they do what they did."""
    LoraModel.inject_adapter = _inject_with_offset(LoraModel.inject_adapter)
    _ask_first(PeftModel, "load_adapter", _check_rank)
    _ask_first(LoraModel, "add_weighted_adapter", _check_combined)
    _ask_first(hotswap, "_convert_scalings_to_tensor", _check_padded)
    _ask_first(loftq_utils, "_SafetensorLoader", _check_replaced)
    hotswap.attrgetter = _getter_for_hotswap


def _ask_first(owner: Any, name: str, check: Callable[..., None]) -> None:
    asked = getattr(owner, name)

    @functools.wraps(asked)
    def asking(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return asked(*args, **kwargs)

    setattr(owner, name, asking)


def _with_offset(model: nn.Module) -> Iterator[str]:
    for module in model.modules():
        yield from getattr(module, "lora_offset", ())


def _check_combined(tuner: LoraModel, adapters: Sequence[str], *_: Any, **__: Any) -> None:
    for adapter in _with_offset(tuner):
        if adapter in adapters:
            raise refusal(adapter, "cannot be combined with others")


def _check_padded(model: nn.Module, *_: Any, **__: Any) -> None:
    for adapter in _with_offset(model):
        raise refusal(adapter, "cannot be prepared for hotswapping")


def _check_replaced(model: nn.Module, *_: Any, **__: Any) -> None:
    for adapter in _with_offset(model):
        raise refusal(adapter, "cannot get LoftQ's factors")


def _check_rank(model: PeftModel, model_id: Any, adapter_name: str, *_: Any, **options: Any) -> None:
    # the other way round, a layer with an offset refuses the state by itself
    file = Path(model_id) / (options.get("subfolder") or "") / SAFETENSORS_WEIGHTS_NAME
    if adapter_name not in model.peft_config or options.get("ignore_mismatched_sizes") or not file.is_file():
        return
    with safe_open(file, "pt") as tensors:
        ranks = {key: tensors.get_slice(key).get_shape()[0] for key in tensors.keys() if ".lora_" in key}  # noqa: SIM118
    for pair in discover(model).pairs:
        found = ranks.get(f"{pair.name}.lora_A.weight", ranks.get(f"{pair.name}.lora_embedding_A"))
        carried = get_offset(pair.layer, adapter_name)
        own = pair.A.shape[0]
        if pair.adapter != adapter_name or carried is not None or found in (None, own):
            continue
        what = f"{file} has rank {found} in {pair.name}, and adapter {adapter_name!r} has rank {own}"
        if found == 2 * own:
            raise InputError(
                f"{what}; files of adapters that tangora.initialize initialized have twice the rank: call it in the "
                "same way as before that training, or go on with tangora.load_adapter(base, path, is_trainable=True)"
            )
        raise InputError(f"{what}: make the adapter with the rank of the file")


def _getter_for_hotswap(key: str) -> Callable[[nn.Module], Any]:
    # hotswap looks up every factor in this way before it writes the first one
    path, found, factor = key.rpartition(".lora_")
    adapter = f"{factor}..".split(".")[1]

    def get(model: nn.Module) -> Any:
        value = operator.attrgetter(key)(model)
        if found and get_offset(operator.attrgetter(path)(model), adapter):
            raise refusal(adapter, "cannot be swapped for another in place")
        return value

    return get


def _inject_with_offset(inject: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(inject)
    def injecting(tuner: LoraModel, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config: Any = tuner.peft_config[adapter_name]
        carried = set(_with_offset(model))
        if carried and getattr(config, "arrow_config", None) is not None:
            raise refusal(min(carried), "cannot be routed to by Arrow")
        if isinstance(config, OffsetConfig) and config.offset_of not in carried:
            raise InputError(
                f"adapter {adapter_name!r} was made from the config of an adapter with an offset, which this model "
                "does not have: give it a LoraConfig of its own"
            )
        inject(tuner, model, adapter_name, *args, **kwargs)
        if isinstance(config, OffsetConfig):
            for module in model.modules():
                if get_offset(module, config.offset_of):
                    copy_offset(module, config.offset_of, adapter_name)
            tuner.peft_config[adapter_name] = OffsetConfig(config, adapter_name)

    return injecting
