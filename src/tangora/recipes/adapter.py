"""The adapter that a recipe trains: the one that a model has, checked, or a new one on a base model."""

import copy
import logging
from typing import Any

from peft import AdaLoraConfig, LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from tangora._checks import InputError, shown
from tangora.adapters import active_adapter, mutates_base, unwrapped
from tangora.init import is_trained, started_by
from tangora.init.methods import seeded
from tangora.recipes.prepare import prepare
from tangora.recipes.recipe import Recipe
from tangora.recipes.targets import check_targets, wrapped

logger = logging.getLogger(__name__)

RANK, ALPHA = 8, 16
"""Of an adapter that is made without a configuration; those of the command line."""

# an image classifier's head is new as a text classifier's is, and PEFT has no task type of its own for it
_TASK_TYPES = {
    "SEQ_CLS": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES | MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "CAUSAL_LM": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_2_SEQ_LM": MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "TOKEN_CLS": MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "QUESTION_ANS": MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}


def adapted(entry: Recipe, model: Any, config: LoraConfig | None, *, seed: int) -> Any:
    """Return a model with the adapter that a recipe trains."""
    if not isinstance(model, nn.Module):
        raise InputError(
            f"with a recipe, model must be a loaded model; got {shown(model)}: load it by from_pretrained or "
            "tangora.load_model"
        )
    bare = unwrapped(model)
    has_adapter = isinstance(bare, PeftModel) or any(isinstance(m, BaseTunerLayer) for m in bare.modules())
    if entry.adapter is None:
        return _whole(entry, model, config, has_adapter=has_adapter)
    if has_adapter:
        if config is not None:
            raise InputError(
                "peft_config makes the adapter of a base model, and this model has one already: leave peft_config out"
            )
        _check_fit(entry, bare)
        return model
    if config is None:
        made = _with_default_adapter(entry, bare, seed)
        logger.warning(
            "recipe %r: the model gets a new adapter of rank %d with alpha %d on all linear layers; peft_config= sets "
            "another",
            entry.name,
            RANK,
            ALPHA,
        )
        return made
    config = _with_options(entry, config)
    if config.target_modules is not None:
        check_targets(bare, config.target_modules)
    with seeded(seed):
        return wrapped(bare, config)


def _whole(entry: Recipe, model: nn.Module, config: Any, *, has_adapter: bool) -> nn.Module:
    if has_adapter or config is not None:
        got = "a model with an adapter" if has_adapter else "peft_config"
        raise InputError(f"recipe {entry.name!r} trains all weights of a base model; got {got}")
    if frozen := [name for name, p in model.named_parameters() if not p.is_floating_point()]:
        raise InputError(
            f"recipe {entry.name!r} trains all weights, and {frozen[0]} is quantized: load the model without "
            "quantization, or use a recipe with an adapter"
        )
    return model.requires_grad_(True)


def _with_default_adapter(entry: Recipe, model: nn.Module, seed: int) -> nn.Module:
    name = type(model).__name__
    kinds = [kind for kind, names in _TASK_TYPES.items() if name in names.values()]
    if not kinds:
        raise InputError(
            f"recipe {entry.name!r} needs an adapter, and which head {name} has cannot be told from its class: pass "
            "peft_config=peft.LoraConfig(...), or make the model by peft.get_peft_model"
        )
    return prepare(
        entry,
        model,  # pyright: ignore[reportArgumentType]
        r=RANK,
        lora_alpha=ALPHA,
        task_type=kinds[0],
        total_steps=10,  # AdaLoRA's schedule is set when the number of steps is known
        seed=seed,
        target_modules="all-linear",
        lora_dropout=0.0,
        rank_plan=None,
    )


def _with_options(entry: Recipe, config: Any) -> LoraConfig:
    _check_kind(entry, config, "peft_config")
    config = copy.copy(config)  # others may be made from it
    for option, value in entry.options.items():
        setattr(config, option, value)
    _check_start(entry, config, "peft_config")
    return config


def _check_fit(entry: Recipe, model: nn.Module) -> None:
    if not isinstance(model, PeftModel):
        raise InputError(
            f"recipe {entry.name!r} needs a PeftModel; got {type(model).__name__} with an adapter: make it by "
            "peft.get_peft_model(base, config) instead of add_adapter or inject_adapter_in_model"
        )
    name = active_adapter(model)
    config: Any = model.peft_config[name]
    what = f"adapter {name!r}"
    _check_kind(entry, config, what)
    for option, value in entry.options.items():
        if getattr(config, option) != value:
            raise InputError(
                f"recipe {entry.name!r} needs an adapter with {option}={value}; {what} has "
                f"{getattr(config, option)}: make it by LoraConfig(..., {option}={value})"
            )
    _check_start(entry, config, what)
    if entry.start is None:
        return
    given = started_by(model, name)
    if given not in (None, entry.start):
        raise InputError(
            f"recipe {entry.name!r} begins with initialization {entry.start!r}, and {what} has {given!r}: leave out "
            f"tangora.initialize, or use a recipe with {given!r}"
        )
    if given is None and is_trained(model, name):
        raise InputError(
            f"recipe {entry.name!r} begins with initialization {entry.start!r}, which would erase {what}: it is "
            "trained, or initialized in another way (B A is not zero); give a new adapter, or go on with "
            f"dataclasses.replace(tangora.recipe({entry.name!r}), start=None)"
        )


def _check_kind(entry: Recipe, config: Any, what: str) -> None:
    # AdaLoRA's configuration is one of LoRA's, too
    wanted = AdaLoraConfig if entry.adapter == "adalora" else LoraConfig
    is_other = isinstance(config, AdaLoraConfig) and entry.adapter != "adalora"
    if not isinstance(config, wanted) or is_other:
        raise InputError(f"recipe {entry.name!r} needs {wanted.__name__}; {what} has {type(config).__name__}")


def _check_start(entry: Recipe, config: Any, what: str) -> None:
    if entry.start is not None and mutates_base(config):
        raise InputError(
            f"recipe {entry.name!r} begins with initialization {entry.start!r}, and {what} with PEFT's "
            f"{config.init_lora_weights!r}, which changes the base weights: leave out init_lora_weights"
        )
