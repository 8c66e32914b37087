"""Preparation of a model for a recipe: a base model, or a model with an adapter."""

import copy
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

from tangora._checks import (
    InputError,
    check_choice,
    check_kind,
    check_number,
    check_seed,
    check_whole,
    near_hint,
    on_one_line,
    shown,
)
from tangora._names import Kind
from tangora.adapters import (
    active_adapter,
    discover,
    has_adapter,
    head_names,
    head_options,
    mutates_base,
    unwrapped,
)
from tangora.init import is_trained, started_by
from tangora.probes.stillness import seeded
from tangora.recipes.recipe import Recipe

logger = logging.getLogger(__name__)

RANK, ALPHA = 8, 16
"""Rank and alpha of an adapter without a configuration, as on the command line."""

# an image classifier's head is new as a text classifier's is, and PEFT has no task type of its own for it
_TASK_TYPES = {
    "SEQ_CLS": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES | MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "CAUSAL_LM": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_2_SEQ_LM": MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "TOKEN_CLS": MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "QUESTION_ANS": MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}
_USUAL = (nn.Linear, nn.Conv2d, Conv1D)


def kind_of(model: Any) -> Kind:
    """Tell by its adapter and its class whether a model predicts tokens; all others count as classifiers."""
    inner = unwrapped(model)
    if isinstance(inner, PeftModel):
        if any(config.task_type == "CAUSAL_LM" for config in inner.peft_config.values()):
            return "causal"
        inner = inner.get_base_model()
    causal = type(inner).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return "causal" if causal else "classification"


def prepare(
    entry: Recipe,
    model: PreTrainedModel,
    *,
    r: int,
    lora_alpha: float | int,
    task_type: str,
    total_steps: int,
    seed: int,
    target_modules: str | list[str],
    lora_dropout: float,
    rank_plan: Mapping[str, Any] | None,
) -> nn.Module:
    """Make a base model ready for training; the arguments are those of `Recipe.prepare`."""
    check_kind("model", model, nn.Module, "a loaded base model")
    if entry.adapter is None:
        return model.requires_grad_(True)
    check_whole("rank", r, low=1)
    check_number("lora_alpha", lora_alpha, low=0, open_low=True)
    check_choice("task_type", task_type, [each.value for each in TaskType])
    check_whole("total_steps", total_steps, low=1)
    check_seed(seed)
    check_kind("rank_plan", rank_plan, (Mapping, type(None)), "a rank plan, as tangora diagnose writes it")
    if rank_plan and entry.adapter != "lora":
        raise InputError(f"rank_plan cannot be used with recipe {entry.name}, which chooses the ranks itself")
    _check_targets(model, target_modules)
    common = {
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "target_modules": target_modules,
        "task_type": task_type,
    }
    if task_type == "SEQ_CLS":
        common |= head_options(model)
    if entry.adapter == "adalora":
        steps = total_steps if entry.search is None else entry.search.num_steps(total_steps)
        config = _adalora_config(r, steps, common | dict(entry.options))
    else:
        scaled = {"use_rslora": False} | dict(entry.options)
        plan = _single_layers(rank_plan or {}, {"r": r, "lora_alpha": lora_alpha} | scaled)
        config = LoraConfig(r=r, **common, **entry.options, **plan)
    with seeded(seed):
        made = _wrapped(model, config)
    _check_plan(made, rank_plan or {})
    _check_rank(made, r)
    return made


def _adalora_config(r: int, total_steps: int, options: dict[str, Any]) -> AdaLoraConfig:
    # the paper starts with 1.5 times the target rank, and reshuffles it between a tenth and two thirds of training
    return AdaLoraConfig(init_r=(3 * r + 1) // 2, target_r=r, **adalora_schedule(total_steps), **options)


def adalora_schedule(total_steps: int) -> dict[str, int]:
    """Return the steps between which AdaLoRA moves ranks, as options of PEFT's configuration."""
    return {"total_step": total_steps, "tinit": total_steps // 10, "tfinal": total_steps // 3}


def _single_layers(plan: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    # the plan leaves layers out that keep the common rank: under another one they would silently get that
    for key in ("r", "lora_alpha", "use_rslora"):
        if key in plan and plan[key] != config[key]:
            raise InputError(f"rank_plan was made for {key} = {plan[key]}; got {key} = {config[key]}")
    return {key: dict(plan[key]) for key in ("rank_pattern", "alpha_pattern") if key in plan}


def _check_plan(model: PeftModel, plan: Mapping[str, Any]) -> None:
    # PEFT would leave a layer that is not there out without a word
    names = [pair.path for pair in discover(model).pairs]
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in plan.get(key, {}):
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
                raise InputError(
                    f"rank_plan is of another model: {key} names {pattern}, which is not adapted here"
                )


def _check_rank(model: PeftModel, r: int) -> None:
    for pair in discover(model).pairs:
        m, n, rank = pair.shape
        if rank > min(m, n):
            raise InputError(
                f"rank must be at most {min(m, n)}, the smaller side of layer {pair.name} ({m} x {n}); got {r}"
            )


def adapted(entry: Recipe, model: Any, config: LoraConfig | None, *, seed: int) -> Any:
    """Return a model with the adapter that a recipe trains."""
    if not isinstance(model, nn.Module):
        raise InputError(
            f"with a recipe, model must be a loaded model; got {shown(model)}: load it with "
            "from_pretrained or tangora.load_model"
        )
    bare = unwrapped(model)
    adapter_is_there = has_adapter(bare)
    if entry.adapter is None:
        return _whole(entry, model, config, has_adapter=adapter_is_there)
    if adapter_is_there:
        if config is not None:
            raise InputError(
                "peft_config adds an adapter to a base model, but this model already has one: omit "
                "peft_config"
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
        _check_targets(bare, config.target_modules)
    with seeded(seed):
        return _wrapped(bare, config)


def check_fit(entry: Recipe, model: Any) -> None:
    """Raise `InputError` unless a model fits a recipe, including its adapter."""
    check_kind("model", model, nn.Module, "a loaded model")
    bare = unwrapped(model)
    there = has_adapter(bare)
    if entry.adapter is None:
        _whole(entry, model, None, has_adapter=there)
        return
    if not there:
        raise InputError(
            f"recipe {entry.name!r} trains an adapter, but {type(bare).__name__} has none: pass "
            "peft_config=, or a model from peft.get_peft_model"
        )
    _check_fit(entry, bare)


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
            f"recipe {entry.name!r} needs an adapter, but the class {name} does not show which layer is "
            "the head: pass "
            "peft_config=peft.LoraConfig(...), or create the model with peft.get_peft_model"
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
            f"recipe {entry.name!r} needs a PeftModel; got {type(model).__name__} with an adapter: "
            "create it with peft.get_peft_model(base, config) instead of add_adapter or "
            "inject_adapter_in_model"
        )
    name = active_adapter(model)
    config: Any = model.peft_config[name]
    what = f"adapter {name!r}"
    _check_kind(entry, config, what)
    for option, value in entry.options.items():
        if getattr(config, option) != value:
            raise InputError(
                f"recipe {entry.name!r} needs an adapter with {option}={value}; {what} has "
                f"{getattr(config, option)}: create it with LoraConfig(..., {option}={value})"
            )
    _check_start(entry, config, what)
    if entry.start is None:
        return
    given = started_by(model, name)
    if given not in (None, entry.start):
        raise InputError(
            f"recipe {entry.name!r} begins with initialization {entry.start!r}, but {what} has {given!r}: omit "
            f"tangora.initialize, or use a recipe with {given!r}"
        )
    if given is None and is_trained(model, name):
        raise InputError(
            f"recipe {entry.name!r} begins with initialization {entry.start!r}, which would overwrite "
            f"{what}: it has been trained or initialized (B A is not zero); pass a new adapter, or "
            "continue with "
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
            f"{config.init_lora_weights!r}, which changes the base weights: omit init_lora_weights"
        )


def _check_targets(model: nn.Module, targets: str | Iterable[str]) -> None:
    """Raise unless every target names a layer of the model."""
    check_kind("target_modules", targets, (str, list, tuple, set), "names of layers, or all-linear")
    if targets == "all-linear":
        return
    names = [name for name, _ in model.named_modules()]
    try:
        pattern = re.compile(targets) if isinstance(targets, str) else None
    except re.error as error:
        raise InputError(
            f"target_modules must be names or a regular expression ({error}); got {targets!r}"
        ) from None
    for target in [targets] if isinstance(targets, str) else targets:
        check_kind("target_modules", target, str, "names of layers, or all-linear")
        found = [
            name
            for name in names
            if (pattern.fullmatch(name) if pattern else name == target or name.endswith(f".{target}"))
        ]
        if not target or not found:
            raise InputError(_unknown(target, model))


def _unknown(target: str, model: nn.Module) -> str:
    head = head_names(model)
    paths = [path.split(".") for path, module in model.named_modules() if isinstance(module, _USUAL)]
    names = sorted({path[-1] for path in paths if path[0] not in head and not path[-1].isdecimal()})
    hint = near_hint(target, names)
    return f"target_modules must name layers of the model, such as {', '.join(names)}; got {target!r}{hint}"


def _wrapped(model: nn.Module, config: PeftConfig) -> PeftModel:
    """Wrap a model with an adapter."""
    try:
        made = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    except NoMatchingPeftModuleError as error:  # the head, which is trained whole
        raise InputError(
            f"target_modules must name layers other than the head; got {_written(config)}"
        ) from error
    except (ValueError, TypeError, NotImplementedError) as error:
        said = on_one_line(error, 160)
        raise InputError(f"target_modules {_written(config)} cannot be adapted: {said}") from error
    assert isinstance(made, PeftModel)
    return made


def _written(config: Any) -> str:
    targets = config.target_modules  # PEFT keeps a list of names as a set
    return repr(targets) if isinstance(targets, (str, type(None))) else ", ".join(sorted(targets))
