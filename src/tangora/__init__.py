"""tangora: LoRA fine-tuning that follows full fine-tuning, shows how far it is from it, and proves it."""

from tangora import curvature
from tangora._checks import InputError
from tangora.adapters import (
    LoraPair,
    SavedAdapter,
    find_pairs,
    initial_factors,
    load_adapter,
    save_adapter,
    save_merged,
)
from tangora.diagnostics import Diagnosis, RankPlan, diagnose, plan_ranks
from tangora.experiments import CompareSettings, RunSettings, compare, export, train
from tangora.init import Start, initialize
from tangora.optim import (
    LoRAPro,
    ODELoRA,
    PreconditionedAdamW,
    TangentAdam,
    create_lora_pro,
    create_ode_lora,
    create_preconditioned_adamw,
    create_tangent_adam,
)
from tangora.recipes import Recipe, recipe, recipes
from tangora.training.trainer import Trainer, optimizer_factory

__all__ = [
    # pairs and adapters
    "LoraPair",
    "SavedAdapter",
    "find_pairs",
    "initial_factors",
    "load_adapter",
    "save_adapter",
    "save_merged",
    # starts
    "Start",
    "initialize",
    # measures
    "Diagnosis",
    "RankPlan",
    "diagnose",
    "plan_ranks",
    # Hessians and their spectra
    "curvature",
    # optimizers
    "LoRAPro",
    "ODELoRA",
    "PreconditionedAdamW",
    "TangentAdam",
    "create_lora_pro",
    "create_ode_lora",
    "create_preconditioned_adamw",
    "create_tangent_adam",
    # methods by name
    "Recipe",
    "recipe",
    "recipes",
    # training
    "Trainer",
    "optimizer_factory",
    "RunSettings",
    "train",
    "export",
    "CompareSettings",
    "compare",
    # errors
    "InputError",
]
