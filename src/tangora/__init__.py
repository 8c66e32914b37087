"""tangora: optimizers and initializations for LoRA beside PEFT; fair comparisons, diagnosis and curvature."""

import logging
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from tangora._checks import InputError
from tangora.recipes import Recipe, recipe, recipes  # now: the package has the name of the function

if TYPE_CHECKING:
    from tangora import curvature
    from tangora.adapters import (
        LoraPair,
        SavedAdapter,
        find_pairs,
        from_adalora,
        initial_factors,
        load_adapter,
        save_adapter,
        save_merged,
    )
    from tangora.diagnostics import Diagnosis, RankPlan, diagnose, plan_ranks
    from tangora.experiments.compare import compare
    from tangora.experiments.comparison.plan import CompareSettings
    from tangora.experiments.comparison.resources import Resources
    from tangora.experiments.export_run import export
    from tangora.experiments.settings import RunSettings
    from tangora.experiments.train import train
    from tangora.init import Start, initialize
    from tangora.optim import (
        LoRAPro,
        ODELoRA,
        PreconditionedAdamW,
        TangentAdam,
        TangentMuon,
        create_lora_pro,
        create_ode_lora,
        create_preconditioned_adamw,
        create_tangent_adam,
        create_tangent_muon,
    )
    from tangora.training.data.task import load_task
    from tangora.training.models.base_model import load_model
    from tangora.training.other_trainers import apply_recipe, optimizer_factory
    from tangora.training.trainer import Trainer

__all__ = [
    # pairs and adapters
    "LoraPair",
    "SavedAdapter",
    "find_pairs",
    "from_adalora",
    "initial_factors",
    "load_adapter",
    "save_adapter",
    "save_merged",
    # initialization
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
    "TangentMuon",
    "create_lora_pro",
    "create_ode_lora",
    "create_preconditioned_adamw",
    "create_tangent_adam",
    "create_tangent_muon",
    # methods by name
    "Recipe",
    "recipe",
    "recipes",
    # models and data by name
    "load_model",
    "load_task",
    # training
    "Trainer",
    "apply_recipe",
    "optimizer_factory",
    "RunSettings",
    "train",
    "export",
    "CompareSettings",
    "Resources",
    "compare",
    # errors
    "InputError",
]

# imported when they are first used, so that an optimizer costs neither plots nor data sets
_MODULES = {
    "tangora.adapters": "LoraPair SavedAdapter find_pairs from_adalora initial_factors load_adapter "
    "save_adapter save_merged",
    "tangora.diagnostics": "Diagnosis RankPlan diagnose plan_ranks",
    "tangora.experiments.compare": "compare",
    "tangora.experiments.comparison.plan": "CompareSettings",
    "tangora.experiments.comparison.resources": "Resources",
    "tangora.experiments.export_run": "export",
    "tangora.experiments.settings": "RunSettings",
    "tangora.experiments.train": "train",
    "tangora.init": "Start initialize",
    "tangora.optim": "LoRAPro ODELoRA PreconditionedAdamW TangentAdam TangentMuon "
    "create_lora_pro create_ode_lora create_preconditioned_adamw create_tangent_adam "
    "create_tangent_muon",
    "tangora.training.data.task": "load_task",
    "tangora.training.models.base_model": "load_model",
    "tangora.training.other_trainers": "apply_recipe optimizer_factory",
    "tangora.training.trainer": "Trainer",
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names.split()}


# PEFT imports bitsandbytes, which warns on some CPUs, with or without 4-bit layers, that it will do without a faster
# kernel from the hub. The record is dropped at its logger; what fails while 4-bit layers are used is raised as ever.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: (
        not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward from kernels-community")
    )
)


def __getattr__(name: str) -> Any:
    # an exported name, a package such as `tangora.curvature`, or the version
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    elif not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        value = import_module(f"{__name__}.{name}")
    elif name == "__version__":
        value = import_module("importlib.metadata").version(__name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__]
