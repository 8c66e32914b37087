"""A base model made ready for training with a recipe."""

import re
from collections.abc import Mapping
from typing import Any

from peft import AdaLoraConfig, LoraConfig, PeftModel, TaskType
from torch import nn
from transformers import PreTrainedModel

from tangora._checks import InputError, check_choice, check_kind, check_number, check_seed, check_whole
from tangora.adapters import discover
from tangora.init.methods import seeded
from tangora.recipes.head import head_options
from tangora.recipes.recipe import Recipe
from tangora.recipes.targets import check_targets, wrapped


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
        raise InputError(f"rank_plan cannot be used with recipe {entry.name}, which chooses its ranks itself")
    check_targets(model, target_modules)
    common = {
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "target_modules": target_modules,
        "task_type": task_type,
    }
    if task_type == "SEQ_CLS":
        common |= head_options(model)
    if entry.adapter == "adalora":
        config = _adalora_config(r, total_steps, common | dict(entry.options))
    else:
        scaled = {"use_rslora": False} | dict(entry.options)
        plan = _single_layers(rank_plan or {}, {"r": r, "lora_alpha": lora_alpha} | scaled)
        config = LoraConfig(r=r, **common, **entry.options, **plan)
    with seeded(seed):
        adapted = wrapped(model, config)
    _check_plan(adapted, rank_plan or {})
    _check_rank(adapted, r)
    return adapted


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
    names = [pair.name.removeprefix("base_model.model.") for pair in discover(model).pairs]
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
