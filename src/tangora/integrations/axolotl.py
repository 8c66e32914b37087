"""Axolotl trains by a recipe: ``plugins: [tangora.integrations.axolotl.TangoraPlugin]`` and ``tangora_recipe: ...``."""

from typing import Any

from axolotl.integrations.base import BasePlugin  # pyright: ignore[reportMissingImports]  # Axolotl imports this file
from pydantic import BaseModel, Field, field_validator

import tangora
from tangora import InputError

# options of Axolotl that choose or split an optimizer, beside `optimizer`
_OPTIMIZER_OPTIONS = (
    *("optim_args", "loraplus_lr_ratio", "lr_groups", "embedding_lr", "embedding_lr_scale"),
    *("relora", "jagged_restart_steps"),
)
_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


class TangoraArgs(BaseModel):
    """Options of the plug-in, beside Axolotl's own in one YAML file."""

    tangora_recipe: str | None = None
    """Name of a recipe (``tangora list``): initialization, optimizer and PEFT options."""
    tangora_head_learning_rate: float | None = Field(default=None, ge=0)
    """Learning rate of a new head; default: the recipe's choice."""

    @field_validator("tangora_recipe")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        return name if name is None else tangora.recipe(name).name


class TangoraPlugin(BasePlugin):
    """Lets the trainer that Axolotl makes, of whatever kind, train by a recipe.

    The recipe's learning rate is ``learning_rate``; its initialization reads the trainer's own data and loss.
    """

    def get_input_args(self) -> str:
        """Name the class of the options."""
        return f"{__name__}.{TangoraArgs.__name__}"

    def register(self, cfg: Any) -> None:
        """Check the options against Axolotl's, and set what the recipe needs: PEFT's options and unfused layers."""
        known = TangoraArgs.model_fields
        for key in cfg:
            if str(key).startswith("tangora") and key not in known:
                raise InputError(f"{key} is not an option of tangora's plug-in; allowed: {', '.join(known)}")
        if not cfg.get("tangora_recipe"):
            raise InputError(
                "tangora's plug-in needs tangora_recipe: the name of a recipe, such as tangent-muon"
            )
        _check_optimizer(cfg)
        entry = tangora.recipe(cfg["tangora_recipe"])
        if (entry.adapter is None) == bool(cfg.get("adapter")):
            needed = "no adapter" if entry.adapter is None else "adapter: lora or adapter: qlora"
            raise InputError(
                f"tangora_recipe: {entry.name} needs {needed}; got adapter: {cfg.get('adapter')}"
            )
        needs: dict[str, Any] = {f"peft_{option}": value for option, value in entry.options.items()}
        if entry.start is not None:
            # Axolotl switches them on by itself; they compute past the layers that the initialization changes
            needs |= dict.fromkeys(_KERNELS, False)
        for key, value in needs.items():
            if cfg.get(key) not in (None, value):
                raise InputError(f"tangora_recipe: {entry.name} needs {key}: {value}; got {cfg[key]}")
            cfg[key] = value

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Give the trainer the recipe."""
        if not cfg.get("tangora_recipe"):  # Axolotl keeps the plug-ins of earlier configurations
            return
        tangora.apply_recipe(
            trainer,
            cfg["tangora_recipe"],
            learning_rate=trainer.args.learning_rate,
            head_learning_rate=cfg.get("tangora_head_learning_rate"),
        )


def _check_optimizer(cfg: Any) -> None:
    given = [key for key in _OPTIMIZER_OPTIONS if cfg.get(key)]
    if not str(cfg.get("optimizer") or "adamw_torch").startswith("adamw_torch"):
        given.append("optimizer")
    if given:
        raise InputError(
            f"{given[0]}: {cfg[given[0]]} and tangora_recipe both choose an optimizer: omit one of them"
        )
