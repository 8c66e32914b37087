"""Validated settings of a run: every error names the key, the value and the allowed values."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from tangora._checks import InputError, check_installed
from tangora._names import Tracker
from tangora.experiments.data_settings import DataSettings, ModelSettings
from tangora.experiments.evaluation_settings import EvaluationSettings
from tangora.experiments.values import (
    Seed,
    Separated,
    Targets,
    checked_rank_plan,
    read_rank_plan,
)
from tangora.recipes import Recipe, recipe


class TaskSettings(DataSettings, ModelSettings, EvaluationSettings):
    """Model, data and training budget: what all methods of a comparison share."""

    groups: ClassVar[Mapping[str, str]] = {
        "benchmarks": "Evaluation",
        "model": "Model and data",
        "device": "Output and resources",
        "test_data": "Model and data",
        "rank": "Adapter",
        "steps": "Optimization",
        "forgetting": "Evaluation",
        "measure_every": "Measurements",
        "save_every": "Output and resources",
    }
    aliases: ClassVar[Mapping[str, str]] = {
        **DataSettings.aliases,
        **EvaluationSettings.aliases,
        "r": "rank",
        "lora_r": "rank",
        "lora_alpha": "alpha",
        "dropout": "lora_dropout",
        "max_steps": "steps",
        "num_train_epochs": "epochs",
        "per_device_train_batch_size": "batch_size",
        "padding_free": "packing",
        "gradient_accumulation_steps": "accumulate",
        "lr_scheduler_type": "schedule",
        "warmup_ratio": "warmup",
        "max_grad_norm": "clip",
        "torch_dtype": "dtype",
        "eval_steps": "evaluate_every",
        "save_steps": "save_every",
    }

    test_data: str | None = Field(
        default=None,
        description="Separate test data: its test split, or all of it. Default: split off from data.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Dtype of the frozen base weights; trainable parameters are always float32.",
    )
    load_in_4bit: bool = Field(
        default=False,
        description="Quantize the frozen base to 4 bits (NF4, needs bitsandbytes), as in QLoRA.",
    )
    rank: int = Field(default=8, ge=1, description="LoRA rank (r).")
    alpha: float = Field(default=16.0, gt=0, description="LoRA alpha (lora_alpha).")
    lora_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Dropout probability of the adapter's input (lora_dropout)."
    )
    target_modules: Targets = "all-linear"
    start_examples: int = Field(
        default=32,
        ge=1,
        description="Training examples for the gradient of a data-driven initialization, such as lora-ga's.",
    )
    rank_plan: dict[str, Any] | None = Field(
        default=None,
        description="rank_plan.json of tangora diagnose: a rank for every layer; sets rank and alpha.",
    )
    steps: int | None = Field(default=100, ge=1, description="Optimizer steps (max_steps).")
    epochs: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Passes over the training data (num_train_epochs), instead of steps.",
    )
    batch_size: int = Field(
        default=16,
        ge=1,
        description="Examples per micro-batch (per_device_train_batch_size), of all processes of a launcher together.",
    )
    accumulate: int = Field(
        default=1, ge=1, description="Micro-batches per optimizer step (gradient_accumulation_steps)."
    )
    packing: bool = Field(
        default=False,
        description="Write the examples of a micro-batch one after another, without padding (padding_free); they do "
        "not attend to each other (causal models).",
    )
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay (weight_decay).")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="Learning-rate schedule after the warm-up (lr_scheduler_type)."
    )
    warmup: float = Field(
        default=0.03, ge=0, lt=1, description="Fraction of the steps used for warm-up (warmup_ratio)."
    )
    head_learning_rate: float | None = Field(
        default=None,
        gt=0,
        description="Peak learning rate of a new classification head. Default: the recipe's, mostly --learning-rate.",
    )
    clip: float = Field(default=1.0, gt=0, description="Gradient-clipping norm (max_grad_norm).")
    gradient_checkpointing: bool = Field(
        default=False,
        description="Recompute activations in the backward pass: less memory, more time (gradient_checkpointing).",
    )
    forgetting: bool = Field(
        default=False,
        description="Measure the loss on unrelated text before and after training (causal models).",
    )
    evaluate_every: int | None = Field(
        default=None,
        ge=1,
        description="Steps between evaluations on validation data (eval_steps). Default: only at the end.",
    )
    measure_every: int | None = Field(
        None,
        ge=1,
        description="Steps between measured points of the trajectory. Default: none.",
    )
    measure_gradient: int | None = Field(
        None, ge=1, description="Training examples for the gradient at every measured step."
    )
    curvature_every: int | None = Field(
        None,
        ge=1,
        description="Steps between measurements of the Hessian (largest eigenvalue, trace). Default: none.",
    )
    curvature_spaces: Annotated[list[Literal["weights", "tangent", "factors"]] | None, Separated] = Field(
        default=None,
        min_length=1,
        description="Spaces of the Hessian during training, separated by commas: weights, tangent, factors. Default: "
        "tangent,factors. Without an adapter: always weights.",
    )
    curvature: bool | None = Field(
        default=None,
        description="Measure the curvature of the loss at the end of training, and the generalisation gap.",
    )
    curvature_examples: int | None = Field(
        default=None,
        ge=1,
        description="Training examples for the Hessian. Default: 32 at the end, 16 during training.",
    )
    curvature_layers: str | None = Field(
        default=None,
        description="Pattern of the layers that the Hessian covers, at the end over weights only, such as "
        "*.layers.29.*. Default: all adapted layers.",
    )
    save_every: int | None = Field(
        default=None,
        ge=1,
        description="Steps between checkpoints (save_steps); an interrupted run resumes from the last. Default: none.",
    )
    report_to: Annotated[list[Tracker] | None, Separated] = Field(
        default=None,
        description="Experiment trackers, separated by commas (report_to); tensorboard writes to the run's folder.",
    )

    @classmethod
    def completed(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Read the rank plan, whose rank and alpha hold unless others are given; the record keeps what it says."""
        values = super().completed(values)
        if values.get("epochs") is not None:
            values = {"steps": None} | values
        plan = values.get("rank_plan")
        if isinstance(plan, dict):
            return values | {"rank_plan": checked_rank_plan(plan)}
        if not isinstance(plan, str):
            return values
        plan = read_rank_plan(plan)
        own = {
            key: plan[made_for]
            for key, made_for in (("rank", "r"), ("alpha", "lora_alpha"))
            if made_for in plan
        }
        return own | values | {"rank_plan": plan}

    @field_validator("load_in_4bit")
    @classmethod
    def _quantizable(cls, wanted: bool) -> bool:
        if wanted:
            check_installed("bitsandbytes", "load_in_4bit")
        return wanted

    @model_validator(mode="after")
    def _consistent(self) -> "TaskSettings":
        if self.steps is None and self.epochs is None:
            raise ValueError("steps must be a number if epochs is not set; got None")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"steps and epochs exclude each other; got steps = {self.steps} and epochs = {self.epochs:g}"
            )
        if self.measure_gradient is not None and self.measure_every is None:
            raise ValueError(
                f"measure_gradient needs measure_every; got only measure_gradient = {self.measure_gradient}"
            )
        for key in ("curvature_examples", "curvature_layers"):
            if (value := getattr(self, key)) is not None and not (self.curvature or self.curvature_every):
                raise ValueError(f"{key} needs curvature or curvature_every; got only {key} = {value!r}")
        if self.curvature_spaces is not None and self.curvature_every is None:
            raise ValueError(
                f"curvature_spaces needs curvature_every; got only {','.join(self.curvature_spaces)}"
            )
        return self

    def num_steps(self, num_train: int) -> int:
        """Return the number of optimizer steps."""
        if self.epochs is None:
            assert self.steps is not None
            return self.steps
        per_epoch = math.ceil(math.ceil(num_train / self.batch_size) / self.accumulate)
        return max(1, math.ceil(self.epochs * per_epoch))


class RunSettings(TaskSettings):
    """One run."""

    groups: ClassVar[Mapping[str, str]] = {
        **TaskSettings.groups,
        "recipe": "Method",
        "learning_rate": "Optimization",
        "fsdp": "Output and resources",
        "reference": "Measurements",
    }
    aliases: ClassVar[Mapping[str, str]] = {**TaskSettings.aliases, "lr": "learning_rate", "method": "recipe"}

    recipe: str = Field(
        default="tangent-muon",
        description="Method: initialization, optimizer and PEFT configuration; see tangora list.",
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="Peak learning rate. Default: the second-smallest value of the recipe's search grid.",
    )
    seed: Seed = Field(
        default=0, description="Seed of the initialization, the order of the data and dropout (seed)."
    )
    fsdp: bool = Field(
        default=False,
        description="Shard the frozen base over the processes of torchrun or accelerate launch (FSDP2); adapters stay "
        "whole.",
    )
    snapshots: bool = Field(
        default=True,
        description="Save the weights of full fine-tuning at every measured point, for --reference of other runs.",
    )
    reference: str | None = Field(
        default=None,
        description="Output folder of full fine-tuning with snapshots, to measure distances to it.",
    )

    @field_validator("recipe", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        check_named("recipe", value)
        return value

    @field_validator("recipe")
    @classmethod
    def _known(cls, name: str) -> str:
        return recipe(name).name

    @model_validator(mode="after")
    def _fits_the_recipe(self) -> "RunSettings":
        if self.reference is not None and self.measure_every is None:
            raise ValueError(f"reference needs measure_every; got only reference = {self.reference!r}")
        if self.dtype != "float32" and self.chosen_recipe.adapter is None:
            raise ValueError(f"dtype must be float32 if all weights are trained; got {self.dtype!r}")
        check_adapted(self, self.chosen_recipe)
        if self.fsdp:
            _check_sharded(self, self.chosen_recipe)
        return self

    @property
    def chosen_recipe(self) -> Recipe:
        """The recipe that is named."""
        return recipe(self.recipe)

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate, with the recipe's default for the kind of model filled in."""
        return self.learning_rate or self.chosen_recipe.default_learning_rate(self.kind)


def check_named(key: str, value: Any) -> None:
    """Raise `InputError` for a recipe in place of its name: the processes of runs find recipes by name."""
    if isinstance(value, Recipe):
        raise InputError(
            f"{key}: runs and comparisons take names of recipes, as tangora list shows them; got the "
            f"recipe {value.name!r}; train a recipe of your own with tangora.Trainer"
        )


def check_adapted(settings: TaskSettings, chosen: Recipe) -> None:
    """Raise `InputError` if settings ask for something of an adapter that a recipe does not have, or not throughout."""
    for key in ("measure_every", "curvature_every") if chosen.search else ():
        if getattr(settings, key):
            raise InputError(
                f"{key} cannot be used with recipe {chosen.name}, whose ranks change in training; omit one"
            )
    if chosen.adapter is not None:
        return
    if settings.load_in_4bit:
        raise InputError(
            f"load_in_4bit cannot be used with recipe {chosen.name}: quantized weights cannot be trained; omit one"
        )
    if settings.lora_dropout:
        raise InputError(
            f"lora_dropout cannot be used with recipe {chosen.name}, which has no adapter; got "
            f"{settings.lora_dropout:g}"
        )


def _check_sharded(settings: RunSettings, chosen: Recipe) -> None:
    if chosen.adapter is None:
        raise InputError(f"fsdp shards the frozen base, but recipe {chosen.name} trains it; omit one")
    if chosen.search is not None:
        raise InputError(
            f"fsdp cannot be used with recipe {chosen.name}, which changes its adapter in training; omit one"
        )
    if chosen.reads_weight:
        raise InputError(
            f"fsdp cannot be used with recipe {chosen.name}, which needs whole base weights; omit one"
        )
    for key in ("load_in_4bit", "measure_every", "curvature_every", "curvature", "benchmarks"):
        if getattr(settings, key):
            raise InputError(f"fsdp cannot be used with {key}, which needs whole base weights; omit one")
