"""`transformers.Trainer` with a recipe, and the two other ways of giving it one of our optimizers."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import transformers
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim import Optimizer

from tangora._checks import InputError
from tangora.optim import PairOptimizer
from tangora.recipes import Recipe
from tangora.recipes import recipe as recipe_named
from tangora.training.callbacks import AdaLoraAllocation
from tangora.training.devices import single_gpu
from tangora.training.engine import check_kept, check_steppable
from tangora.training.replay import MicroBatch


class Trainer(transformers.Trainer):
    """`transformers.Trainer` whose optimizer is made by a recipe.

    Learning rate, weight decay, betas and eps are those of ``TrainingArguments``; schedulers, clipping, accumulation
    and resuming are the Trainer's own. Optimizers that evaluate the gradient several times per step (`ODELoRA`) get all
    micro-batches of the update again for each further stage, with the same dropout, averaging over processes and
    clipping; the logged loss is that of the first stage. To train with another trainer's data handling, put this class
    in front of it: ``class SFT(tangora.Trainer, trl.SFTTrainer): ...``.

    Args:
        *args: As for ``transformers.Trainer``.
        recipe: What makes the optimizer: a name such as ``"tangent"``, or what ``tangora.recipe`` returns; ``None``
            leaves everything as it is.
        head_learning_rate: Of a new head, which the recipe's optimizer trains whole; default: the recipe's choice,
            mostly that of ``TrainingArguments``. It follows the same schedule.
        **kwargs: As for ``transformers.Trainer``.

    Attributes:
        replay_seconds: Time spent on gradients of further stages, which is part of that of ``optimizer.step``.

    Raises:
        InputError: If ``recipe`` is no recipe, or comes together with ``optimizers`` or ``optimizer_cls_and_kwargs``,
            or ``head_learning_rate`` comes without it; or if DeepSpeed or FSDP1 would leave no LoRA pairs to train, or
            DeepSpeed would put an optimizer of its own in place of the given one.

    Example:
        >>> import tangora
        >>> trainer = tangora.Trainer(  # doctest: +SKIP
        ...     model, arguments, train_dataset=data, recipe="tangent"
        ... )
    """

    def __init__(
        self,
        *args: Any,
        recipe: Recipe | str | None = None,
        head_learning_rate: float | None = None,
        **kwargs: Any,
    ):
        if isinstance(recipe, str):
            recipe = recipe_named(recipe)
        if recipe is not None and not hasattr(recipe, "create_optimizer"):
            raise InputError(
                f"recipe must be a name such as 'tangent', or tangora.recipe('tangent'); got {recipe!r}"
            )
        given = [
            key
            for key in ("optimizers", "optimizer_cls_and_kwargs")
            if kwargs.get(key) not in (None, (None, None))
        ]
        if recipe is not None and given:
            raise InputError(f"recipe and {given[0]} both name an optimizer; give one of them")
        if recipe is None and head_learning_rate is not None:
            raise InputError("head_learning_rate needs a recipe")
        super().__init__(*args, **kwargs)
        single_gpu(self)
        if recipe is not None or isinstance(self.optimizer, PairOptimizer):
            check_kept(given=self.optimizer is not None)
        self.recipe = recipe
        self.head_learning_rate = head_learning_rate
        self.replay_seconds = 0.0
        self._update: list[MicroBatch] = []
        self._update_is_whole = False
        if hasattr(getattr(self.model, "base_model", None), "update_and_allocate"):
            self.add_callback(AdaLoraAllocation())

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Make the optimizer, by the recipe when there is one.

        Args:
            model: The wrapped model; default the trainer's own.

        Returns:
            The optimizer, also kept in ``self.optimizer``.
        """
        if self.recipe is None or self.optimizer is not None:
            return super().create_optimizer(model)
        arguments = self.args
        own: dict[str, Any] = {} if self.head_learning_rate is None else {"head_lr": self.head_learning_rate}
        self.optimizer = self.recipe.create_optimizer(
            model if model is not None else self.model,  # pyright: ignore[reportArgumentType]
            arguments.learning_rate,
            weight_decay=arguments.weight_decay,
            betas=(arguments.adam_beta1, arguments.adam_beta2),
            eps=arguments.adam_epsilon,
            **own,
        )
        check_steppable(self.optimizer)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Evaluate the gradient of a micro-batch, and keep it for the further stages of the optimizer's step.

        Args:
            model: The wrapped model.
            inputs: Its inputs.
            num_items_in_batch: As for ``transformers.Trainer``.

        Returns:
            The loss.

        Raises:
            InputError: If the optimizer needs several gradients per step and the mode of training allows one.
        """
        optimizer = _unwrapped(self.optimizer)
        if getattr(optimizer, "multistage", False):
            self._check_multistage()
            optimizer.replay = self._evaluate_again
            self._update = [] if self._update_is_whole else self._update
            self._update.append(MicroBatch.of(inputs, num_items_in_batch))
            self._update_is_whole = self.accelerator.sync_gradients
        return super().training_step(model, inputs, num_items_in_batch)

    def _evaluate_again(self) -> None:
        began = time.perf_counter()
        model: Any = self.model_wrapped
        last = self._update[-1]
        model.zero_grad()
        for batch in self._update:
            # like the Trainer's own loop: processes average their gradients once, with the last micro-batch
            alone = contextlib.nullcontext() if batch is last else self.accelerator.no_sync(model)
            with alone, batch.again() as inputs:
                super().training_step(model, inputs, batch.num_items)
        if self.args.max_grad_norm and self.args.max_grad_norm > 0:
            self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
        self.replay_seconds += time.perf_counter() - began

    def _check_multistage(self) -> None:
        if self.accelerator.scaler is not None:
            raise InputError(
                "fp16 must be False for an optimizer with several gradients per step: GradScaler cannot scale those "
                "after the first; use bf16"
            )
        if self.accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
            raise InputError(
                "an optimizer with several gradients per step must run on one device or with DistributedDataParallel; "
                f"got {self.accelerator.distributed_type.value}"
            )


def _unwrapped(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it


def optimizer_factory(optimizer: Callable[..., Optimizer], **options: Any) -> tuple[type, dict[str, Any]]:
    """Wrap an optimizer for the ``optimizer_cls_and_kwargs`` of any Trainer.

    The Trainer then builds it from the whole model, which our optimizers need to see the pairs.

    Args:
        optimizer: `LoRAPro`, `TangentAdam`, `PreconditionedAdamW`, or any callable of a model.
        **options: Its options; ``lr`` is required, because the Trainer does not pass its own on.

    Returns:
        What ``optimizer_cls_and_kwargs`` takes.

    Raises:
        InputError: If ``lr`` is missing.

    Example:
        >>> import transformers, tangora
        >>> trainer = transformers.Trainer(  # doctest: +SKIP
        ...     model,
        ...     arguments,
        ...     optimizer_cls_and_kwargs=tangora.optimizer_factory(tangora.TangentAdam, lr=1e-4),
        ... )
    """
    if "lr" not in options:
        raise InputError("optimizer_factory needs lr=...: the Trainer does not pass its learning rate on")

    class Factory:
        """Called by the Trainer with the model."""

        def __call__(self, model: nn.Module, *_: Any, **kwargs: Any) -> Optimizer:
            made = optimizer(model, **kwargs)
            check_steppable(made)
            return made

    return Factory, options
