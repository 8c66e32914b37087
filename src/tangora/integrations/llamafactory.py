"""Recipes in LLaMA-Factory: ``python -m tangora.integrations.llamafactory config.yaml``.

Its trainers have no hook for optimizers (v0), or one that must be registered in their process (v1), so that this
command takes the place of ``llamafactory-cli train``. As there, ``USE_V1=1`` chooses v1. Several processes:
``torchrun --nproc-per-node 2 -m tangora.integrations.llamafactory config.yaml``.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError
from torch import nn
from torch.optim import Optimizer

import tangora
from tangora import InputError

# where each stage of v0 looks up its trainer
_TRAINERS = {
    "pt": "pt.workflow.CustomTrainer",
    "sft": "sft.workflow.CustomSeq2SeqTrainer",
    "rm": "rm.workflow.PairwiseTrainer",
    "dpo": "dpo.trainer.CustomDPOTrainer",
    "kto": "kto.workflow.CustomKTOTrainer",
}
# engines of v0 with loops or processes of their own
_ENGINES = ("use_hyper_parallel", "use_mca", "use_ray", "use_kt")


def train(args: dict[str, Any] | None = None, callbacks: list[Any] | None = None) -> None:
    """Train with LLaMA-Factory v0 and a recipe, as ``llamafactory.train.tuner.run_exp`` does.

    Args:
        args: Options of LLaMA-Factory and, beside them, ``tangora_recipe`` and perhaps
            ``tangora_head_learning_rate``; default: the file that the command line names. Its ``learning_rate`` is that
            of the recipe.
        callbacks: Callbacks of transformers.

    Raises:
        InputError: If there is no ``tangora_recipe``, or a stage or engine has no trainer that can take it, or an
            option chooses another optimizer.
    """
    from llamafactory.hparams import read_args  # pyright: ignore[reportMissingImports]
    from llamafactory.train.tuner import run_exp  # pyright: ignore[reportMissingImports]

    given = read_args(args)
    if not isinstance(given, dict):
        raise InputError("pass LLaMA-Factory's options in a YAML file that contains tangora_recipe")
    given = dict(given)
    name, head = given.pop("tangora_recipe", None), given.pop("tangora_head_learning_rate", None)
    for key in given:
        if key.startswith("tangora"):
            raise InputError(f"{key} is not an option; allowed: tangora_recipe, tangora_head_learning_rate")
    entry = _recipe(name)
    stage = given.get("stage", "sft")
    if stage not in _TRAINERS:
        raise InputError(f"stage must be one of {', '.join(_TRAINERS)} with a recipe; got {stage}")
    for engine in _ENGINES:
        if given.get(engine) or _is_on(engine.upper()):
            raise InputError(f"{engine} does not use the trainer that a recipe needs: omit it")
    kind = given.get("finetuning_type", "lora")
    if kind != ("full" if entry.adapter is None else "lora"):
        raise InputError(f"tangora_recipe {entry.name} does not fit finetuning_type {kind}")
    for option, value in entry.options.items():
        if given.setdefault(option, value) != value:
            raise InputError(f"tangora_recipe {entry.name} needs {option}: {value}; got {given[option]}")
    rates = {"learning_rate": given.get("learning_rate"), "head_learning_rate": head}
    with _trained_by(entry, _TRAINERS[stage], rates):
        run_exp(given, callbacks)


@contextmanager
def _trained_by(entry: tangora.Recipe, place: str, rates: dict[str, Any]) -> Iterator[None]:
    module, name = f"llamafactory.train.{place}".rsplit(".", 1)
    theirs = getattr(import_module(module), name)

    def made(*args: Any, **kwargs: Any) -> tangora.Trainer:
        return tangora.apply_recipe(theirs(*args, **kwargs), entry, **rates)

    setattr(import_module(module), name, made)
    try:
        yield
    finally:
        setattr(import_module(module), name, theirs)


class OptimConfig(BaseModel, extra="forbid"):
    """The options in ``optim_config`` of LLaMA-Factory v1."""

    name: str
    recipe: str
    """Name of a recipe whose initialization reads no gradients: v1 gives its optimizers no data."""
    lr: float = Field(gt=0)
    """Peak learning rate; v1 does not pass its ``learning_rate`` on."""
    head_lr: float | None = Field(default=None, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, ge=0)
    seed: int = 0
    """Seed of a random initialization."""


def register() -> None:
    """Make ``optim_config: {name: tangora, recipe: ..., lr: ...}`` known to LLaMA-Factory v1."""
    from llamafactory.v1.plugins.trainer_plugins.optimizer import (  # pyright: ignore[reportMissingImports]
        OptimizerPlugin,
    )

    OptimizerPlugin("tangora").register()(_optimizer)


def _optimizer(model: nn.Module, config: dict[str, Any]) -> Optimizer:
    try:
        options = OptimConfig(**config)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(
            f"optim_config.{where}: {first['msg'].lower()}; it takes {', '.join(OptimConfig.model_fields)}"
        ) from None
    entry = _recipe(options.recipe)
    if entry.reads_gradients or not entry.trains:
        raise InputError(
            f"LLaMA-Factory v1 gives its optimizers no data, which recipe {entry.name} needs: use a "
            "recipe whose initialization needs no gradients, such as orthogonal+tangent-muon, or use "
            "LLaMA-Factory v0"
        )
    entry.check_fit(model)
    entry.initialize(model, seed=options.seed)
    rest = options.model_dump(include={"weight_decay", "betas", "eps"})
    made = entry.create_optimizer(model, options.lr, head_lr=options.head_lr, **rest)
    if getattr(made, "multistage", False):
        raise InputError(
            f"recipe {entry.name} evaluates several gradients per step, which LLaMA-Factory v1 does not "
            "support: use v0"
        )
    return made


def _recipe(name: str | None) -> tangora.Recipe:
    if name is None:
        raise InputError("tangora_recipe is missing: name a recipe such as tangent-muon (`tangora list`)")
    return tangora.recipe(name)


def _is_on(variable: str) -> bool:
    """Read a switch of the environment as LLaMA-Factory does."""
    return os.environ.get(variable, "0").lower() in {"1", "y", "true"}


def main() -> None:
    """Train by the file that the command line names; invalid input ends with one line and exit code 2."""
    try:
        _check_command()
        if not _is_on("USE_V1"):
            train()
            return
        from llamafactory.v1.trainers.sft_trainer import run_sft  # pyright: ignore[reportMissingImports]

        register()
        run_sft()
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None


def _check_command() -> None:
    if len(sys.argv) < 2:
        raise InputError("name a YAML file: python -m tangora.integrations.llamafactory config.yaml")
    if sys.argv[1].endswith((".yaml", ".yml", ".json")) and not Path(sys.argv[1]).is_file():
        raise InputError(f"there is no file {sys.argv[1]}")
    try:
        import_module("llamafactory")
    except ModuleNotFoundError as error:
        if error.name != "llamafactory":  # something that it needs itself
            raise
        raise InputError(
            "LLaMA-Factory is not installed; run: pip install llamafactory, then tangora (docs/guides/integrations.md)"
        ) from None


if __name__ == "__main__":
    main()
