"""Recipes and optimizers in Trainers that other packages have written: TRL, Axolotl, LLaMA-Factory, Unsloth."""

from collections.abc import Callable
from functools import cache
from typing import Any

import transformers
from torch import nn
from torch.optim import Optimizer

from tangora._checks import InputError, check_kind, shown
from tangora.recipes import Recipe
from tangora.training.devices import check_steppable
from tangora.training.trainer import Trainer, checked


def apply_recipe(
    trainer: transformers.Trainer,
    recipe: Recipe | str,
    *,
    learning_rate: float | None = None,
    head_learning_rate: float | None = None,
) -> Trainer:
    """Make an existing Trainer, such as one of TRL or Axolotl, train by a recipe.

    It becomes what ``class Its(tangora.Trainer, TheirTrainer)`` would have made, with the same initialization, learning
    rate and optimizer; its data, loss, arguments and callbacks stay.

    Args:
        trainer: A Trainer that has no optimizer yet, of a PEFT model (or a base model for full fine-tuning). It is
            changed in place: its class becomes a subclass of its own and of `Trainer`.
        recipe: A name such as ``"tangent-muon"``, or what ``tangora.recipe`` returns.
        learning_rate: Peak learning rate of the recipe's optimizer; default: as for `Trainer`.
        head_learning_rate: Learning rate of a new head; default: the recipe's choice.

    Returns:
        The same object.

    Raises:
        InputError: If ``trainer`` is no Trainer, has an optimizer or a recipe already, or has a base model where the
            recipe needs an adapter; else as `Trainer` does. The Trainer is then as it was.

    Examples:
        >>> import trl, tangora  # doctest: +SKIP
        >>> trainer = trl.DPOTrainer(model, args=config, train_dataset=pairs)  # doctest: +SKIP
        >>> tangora.apply_recipe(trainer, "tangent-muon").train()  # doctest: +SKIP
    """
    check_kind("trainer", trainer, transformers.Trainer, "a transformers.Trainer, such as those of TRL")
    kind = type(trainer)
    if issubclass(kind, Trainer):
        raise InputError(f"{kind.__name__} is already a tangora.Trainer: pass recipe= to its constructor")
    if trainer.optimizer is not None:
        raise InputError(
            "the trainer already has an optimizer: omit optimizers=, and apply the recipe before train()"
        )
    entry = checked(recipe, {"optimizer_cls_and_kwargs": trainer.optimizer_cls_and_kwargs})
    if entry is None:
        raise InputError(
            "recipe must be a name such as 'tangent-muon', or tangora.recipe('tangent-muon'); got None"
        )
    made: Any = trainer
    entry.check_fit(made.model)
    before = dict(vars(made))
    made.__class__ = _in_front_of(kind)
    made.recipe, made.head_learning_rate = entry, head_learning_rate
    made._peft_config, made._adapter_is_made, made._adapter_seed = None, False, made.args.seed
    try:
        made._take_up(learning_rate)
    except InputError:
        made.__class__ = kind
        vars(made).clear()
        vars(made).update(before)
        raise
    return made


@cache
def _in_front_of(kind: type[transformers.Trainer]) -> type[Trainer]:
    return type(kind.__name__, (Trainer, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def optimizer_factory(optimizer: Callable[..., Optimizer], **options: Any) -> tuple[type, dict[str, Any]]:
    """Wrap an optimizer for the ``optimizer_cls_and_kwargs`` of any Trainer.

    The Trainer then builds it from the whole model, in which tangora's optimizers find the LoRA pairs.

    Args:
        optimizer: `LoRAPro`, `TangentAdam`, `PreconditionedAdamW`, or any callable of a model.
        **options: Its options; ``lr`` is required, because the Trainer does not pass its own on.

    Returns:
        Value for ``optimizer_cls_and_kwargs``.

    Raises:
        InputError: If ``lr`` is missing.

    Examples:
        >>> import transformers, tangora
        >>> trainer = transformers.Trainer(  # doctest: +SKIP
        ...     model,
        ...     arguments,
        ...     optimizer_cls_and_kwargs=tangora.optimizer_factory(tangora.TangentAdam, lr=1e-4),
        ... )
    """
    if "lr" not in options:
        raise InputError(
            "optimizer_factory needs lr=...: the Trainer does not pass its learning rate to the optimizer"
        )

    class Factory:
        """Called by the Trainer with the model."""

        def __init__(self, *groups: Any, **_: Any):
            if groups:  # Unsloth makes groups for its embedding_learning_rate and loraplus_lr_ratio
                raise InputError(
                    f"{shown(optimizer)} needs the model, but this trainer passes parameter groups: "
                    "omit the options that create them, such as Unsloth's embedding_learning_rate or "
                    "loraplus_lr_ratio"
                )

        def __call__(self, model: nn.Module, *_: Any, **kwargs: Any) -> Optimizer:
            made = optimizer(model, **kwargs)
            check_steppable(made)
            return made

    return Factory, options
