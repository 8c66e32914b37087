"""`transformers.Trainer` with a recipe."""

import contextlib
import copy
import inspect
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from accelerate.utils import DistributedType
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers.trainer_utils import TrainOutput

from tangora._checks import InputError, check_kind, check_number, shown
from tangora.adapters import is_adalora, unwrapped, warn_if_base_changed
from tangora.init import started_by
from tangora.optim import PairOptimizer
from tangora.probes.stillness import RandomState, preserved_randomness
from tangora.recipes import Recipe
from tangora.recipes import recipe as recipe_named
from tangora.recipes.prepare import adapted, kind_of
from tangora.training.devices import check_kept, check_steppable, single_gpu
from tangora.training.rank_allocation import AdaLoraAllocation, restored_adalora
from tangora.training.starting import expect_started, makes_inputs, start
from tangora.training.two_phases import check_two_phases, phase_of, train_in_two_phases

logger = logging.getLogger(__name__)

# by which Axolotl, LLaMA-Factory and Unsloth choose or split an optimizer, beside `optim`
_OPTIMIZER_OPTIONS = (
    *("loraplus_lr_ratio", "embedding_lr", "embedding_lr_scale", "lr_groups"),
    *("embedding_learning_rate", "q_galore_config"),
    *("use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon"),
)


class _MicroBatch(NamedTuple):
    """Arguments of one ``training_step`` and the random state it began with, to evaluate its gradient again."""

    inputs: Any
    num_items: Any
    random: RandomState


class Trainer(transformers.Trainer):
    """`transformers.Trainer` that trains by a recipe: its adapter, initialization, learning rate and optimizer.

    Every part of the recipe is applied; a part that does not fit the model or the arguments raises `InputError`.

    - *Adapter*: a base model gets a new one (``peft_config``); that of a PEFT model must fit the recipe.
    - *Initialization*: made once, together with the optimizer, from 32 examples of ``train_dataset`` by the Trainer's
      own collator and loss; random state and data order stay. It is not made again when training resumes from a
      checkpoint, nor where `tangora.initialize` has made it already.
    - *Learning rate*: ``learning_rate``; else that of ``TrainingArguments`` unless it is their default; else the
      recipe's. A log line says which.
    - *Optimizer*: weight decay, betas and eps are those of ``TrainingArguments``.

    Schedulers, clipping, accumulation and resuming are the Trainer's own. Optimizers that evaluate the gradient several
    times per step (`ODELoRA`) get all micro-batches of the update again for each further stage, with the same dropout,
    averaging over processes and clipping; the logged loss is that of the first stage. To train with another trainer's
    data handling, put this class in front of it: ``class SFT(tangora.Trainer, trl.SFTTrainer): ...``.

    Args:
        recipe: A name such as ``"tangent"``, or what ``tangora.recipe`` returns; ``None`` leaves everything as it is.
        learning_rate: Peak learning rate of the recipe's optimizer, in place of that of ``TrainingArguments``.
        head_learning_rate: Learning rate of a new head, whose weights are all trained; default: the recipe's choice,
            mostly that of the adapter. It follows the same schedule.
        peft_config: Configuration of a base model's new adapter, completed by the recipe (``use_rslora``,
            ``use_dora``); default: rank 8, alpha 16, all linear layers.

    A recipe that searches for ranks (``adalora+tangent-muon``) trains in two phases, each with a schedule of its own:
    AdaLoRA by AdamW, then plain LoRA of the ranks found, which takes the model's place in ``model``.

    Attributes:
        replay_seconds: Time spent on gradients of further stages, part of the time of ``optimizer.step``.
        conversion_seconds: Time spent on converting AdaLoRA to plain LoRA.

    Raises:
        InputError: If ``recipe`` is no recipe, does not fit the model, or comes together with ``optimizers`` or
            ``optimizer_cls_and_kwargs``; if another argument of this class comes without it; or if DeepSpeed or FSDP1
            would leave no LoRA pairs to train, or DeepSpeed would replace the optimizer that was given.

    Examples:
        >>> import tangora
        >>> trainer = tangora.Trainer(  # doctest: +SKIP
        ...     base_model, arguments, train_dataset=data, recipe="lora-ga", learning_rate=3e-4
        ... )
    """

    def __init__(
        self,
        model: Any = None,
        *args: Any,
        recipe: Recipe | str | None = None,
        learning_rate: float | None = None,
        head_learning_rate: float | None = None,
        peft_config: LoraConfig | None = None,
        **kwargs: Any,
    ):
        self.recipe = checked(recipe, kwargs)
        self.head_learning_rate = head_learning_rate
        self._peft_config, self._adapter_is_made = peft_config, False
        if self.recipe is None:
            if learning_rate is not None or head_learning_rate is not None:
                name = "head_learning_rate" if learning_rate is None else "learning_rate"
                raise InputError(f"{name} needs a recipe")
            if peft_config is not None:
                if "peft_config" not in inspect.signature(super().__init__).parameters:
                    raise InputError("peft_config needs a recipe, or another trainer that accepts it")
                kwargs["peft_config"] = peft_config
        if model is None and kwargs.get("model_init") is None:
            raise InputError("model must be a model, or model_init a function that returns one; got neither")
        known = transformers.TrainingArguments
        check_kind("args", kwargs.get("args"), (known, type(None)), "a transformers.TrainingArguments")
        given = (value for value in (*args, kwargs.get("args")) if isinstance(value, known))
        arguments = next(given, None)  # other trainers take them at another place
        self._adapter_seed = 42 if arguments is None else arguments.seed
        super().__init__(model if model is None else self._adapted(model), *args, **kwargs)
        self._take_up(learning_rate)

    def _take_up(self, learning_rate: float | None) -> None:
        """Finish what Transformers has made, here or in `apply_recipe`."""
        single_gpu(self)
        if self.recipe is not None or isinstance(self.optimizer, PairOptimizer):
            check_kept(given=self.optimizer is not None)
        if self.recipe is not None:
            _check_used(self)
            self._set_learning_rate(self.recipe, learning_rate)
            inner = unwrapped(self.model)
            other = started_by(inner) if isinstance(inner, PeftModel) else None
            if self.recipe.start is None and other is not None:
                logger.warning("recipe %r uses initialization %r", self.recipe.name, other)
            if self.recipe.search is not None:
                check_two_phases(self, self.recipe.name)
        self.replay_seconds = self.conversion_seconds = 0.0
        self._update: list[_MicroBatch] = []
        self._update_is_whole = False
        if is_adalora(self.model):
            schedule = "set" if self._adapter_is_made and self._peft_config is None else "check"
            search = self.recipe and self.recipe.search
            options = {"num_steps": search.num_steps} if search else {}
            allocation = AdaLoraAllocation(schedule if self.recipe else None, **options)
            # before all others, so that a timer among them counts its time
            self.callback_handler.callbacks.insert(0, allocation)

    def _adapted(self, model: Any) -> Any:
        if self.recipe is None:
            return model
        made = adapted(self.recipe, model, self._peft_config, seed=self._adapter_seed)
        self._adapter_is_made = made is not model
        return made

    def _set_learning_rate(self, recipe: Recipe, given: float | None) -> None:
        if self.head_learning_rate is not None:
            check_number("head_learning_rate", self.head_learning_rate, low=0)
        usual = {field.name: field.default for field in fields(self.args)}
        if self.args.optim != usual["optim"]:
            logger.warning(
                "recipe %r uses its own optimizer; optim of TrainingArguments is ignored", recipe.name
            )
        default = usual["learning_rate"]
        if given is None and self.args.learning_rate != default:
            logger.info(
                "recipe %r: learning rate %g, of TrainingArguments", recipe.name, self.args.learning_rate
            )
            return
        usual_rate = recipe.default_learning_rate(kind_of(self.model))
        if given is None:
            # the default of TrainingArguments cannot be told from the same number given
            logger.warning(
                "recipe %r: learning rate %g, the recipe's default; learning_rate= sets another",
                recipe.name,
                usual_rate,
            )
        else:
            check_number("learning_rate", given, low=0)
        self.args = copy.copy(self.args)  # the user may train another recipe with the same arguments
        self.args.learning_rate = usual_rate if given is None else given

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make a new model, with the recipe's adapter."""
        return self._adapted(super().call_model_init(trial))

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Train; a recipe without training (``one-step``) only initializes the adapter: no step, no loss."""
        if self.recipe is not None and self.recipe.search is not None:
            train = partial(super().train, *args, **kwargs)
            return train_in_two_phases(self, self.recipe.search, train, resume_from_checkpoint)
        if self.recipe is None or self.recipe.trains:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        if resume_from_checkpoint:
            raise InputError(f"recipe {self.recipe.name!r} does not train: omit resume_from_checkpoint")
        start(self, self.recipe)
        logger.warning("recipe %r has initialized the adapter; it takes no training steps", self.recipe.name)
        return TrainOutput(0, math.nan, {})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.recipe is not None:
            expect_started(self.model, self.recipe)  # pyright: ignore[reportArgumentType]
        if not (is_adalora(self.model) and restored_adalora(self.model, Path(resume_from_checkpoint))):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimizer = bare_optimizer(self.optimizer)
        # one process saves, and with shard_state no one has all; sharded models have checkpoints of their own
        parts = isinstance(optimizer, PairOptimizer) and not self.is_fsdp_enabled
        with optimizer.saved_whole() if parts else contextlib.nullcontext():
            super()._save_optimizer_and_scheduler(output_dir)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Make the optimizer; with a recipe its initialization of the adapter, too."""
        if self.recipe is None or self.optimizer is not None:
            optimizer = super().create_optimizer(model)
        else:
            start(self, self.recipe)
            arguments = self.args
            head = self.head_learning_rate
            own: dict[str, Any] = {} if head is None else {"head_lr": head}
            self.optimizer = optimizer = self.recipe.create_optimizer(
                model if model is not None else self.model,  # pyright: ignore[reportArgumentType]
                arguments.learning_rate,
                weight_decay=arguments.weight_decay,
                betas=(arguments.adam_beta1, arguments.adam_beta2),
                eps=arguments.adam_epsilon,
                **own,
            )
            check_steppable(optimizer)
        if not isinstance(bare_optimizer(optimizer), PairOptimizer):  # which say it themselves
            warn_if_base_changed(self.model)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Make the scheduler: of all steps, or of each phase of a recipe that has two."""
        if self.recipe is None or self.recipe.search is None:
            return super().create_scheduler(num_training_steps, optimizer)
        with phase_of(self, self.recipe.search, num_training_steps) as steps:
            return super().create_scheduler(steps, optimizer)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Evaluate the gradient of a micro-batch, and keep it for the further stages of the optimizer's step."""
        optimizer = bare_optimizer(self.optimizer)
        if getattr(optimizer, "multistage", False):
            self._check_multistage()
            optimizer.replay = self._evaluate_again
            self._update = [] if self._update_is_whole else self._update
            self._update.append(_MicroBatch(_copied(inputs), num_items_in_batch, RandomState.now()))
            self._update_is_whole = self.accelerator.sync_gradients
        return super().training_step(model, inputs, num_items_in_batch)

    def _evaluate_again(self) -> None:
        began = time.perf_counter()
        model: Any = self.model_wrapped
        last = self._update[-1]
        model.zero_grad()
        with preserved_randomness():
            for batch in self._update:
                # like the Trainer's own loop: processes average their gradients once, with the last micro-batch
                alone = contextlib.nullcontext() if batch is last else self.accelerator.no_sync(model)
                with alone:
                    batch.random.put_back()
                    super().training_step(model, _copied(batch.inputs), batch.num_items)
        if self.args.max_grad_norm and self.args.max_grad_norm > 0:
            self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
        self.replay_seconds += time.perf_counter() - began

    def _check_multistage(self) -> None:
        if self.accelerator.scaler is not None:
            raise InputError(
                "fp16 must be False for an optimizer with several gradients per step: GradScaler can "
                "scale only the first; use bf16"
            )
        if self.accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
            raise InputError(
                "an optimizer with several gradients per step must run on one device or with DistributedDataParallel; "
                f"got {self.accelerator.distributed_type.value}"
            )
        if makes_inputs(self):
            raise InputError(
                "an optimizer with several gradients per step needs the same inputs again, but "
                f"{type(self).__name__} generates its inputs during training: use a method with one "
                "gradient per step, such as tangent-muon"
            )


def _check_used(trainer: transformers.Trainer) -> None:
    """Raise `InputError` if an option asks for another package's optimizer, which a recipe's would silently replace."""
    for holder in (trainer.args, getattr(trainer, "finetuning_args", None)):  # the second is LLaMA-Factory's
        for name in _OPTIMIZER_OPTIONS:
            if getattr(holder, name, None) not in (None, False):
                raise InputError(
                    f"{name} of {type(holder).__name__} selects another optimizer than the recipe's: "
                    "omit it, or omit the recipe; head_learning_rate sets the learning rate of a new "
                    "head"
                )


def checked(recipe: Any, options: dict[str, Any]) -> Recipe | None:
    """Look up a recipe, and refuse one beside a Trainer's options that name an optimizer, too."""
    if isinstance(recipe, str):
        recipe = recipe_named(recipe)
    if recipe is None:
        return None
    if isinstance(recipe, type) or not hasattr(recipe, "create_optimizer"):
        raise InputError(
            f"recipe must be a name such as 'tangent', or tangora.recipe('tangent'); got {shown(recipe)}"
        )
    for key in ("optimizers", "optimizer_cls_and_kwargs"):
        if options.get(key) not in (None, (None, None)):
            raise InputError(f"recipe and {key} both select an optimizer; pass only one of them")
    return recipe


def _copied(inputs: Any) -> Any:
    return dict(inputs) if isinstance(inputs, Mapping) else inputs  # the loss may take labels out of them


def bare_optimizer(optimizer: Any) -> Any:
    """Look through Accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
