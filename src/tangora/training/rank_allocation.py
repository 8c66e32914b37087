"""AdaLoRA in the Trainer: its schedule, the ranks after every step, and both in checkpoints. PEFT leaves that to us."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainerCallback, TrainerState

from tangora._checks import InputError
from tangora.adapters import unwrapped
from tangora.recipes.prepare import adalora_schedule
from tangora.training.callbacks import checkpoint_folder
from tangora.training.ranks import is_first

_FILE = "adalora.pt"
_SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class AdaLoraAllocation(TrainerCallback):
    """Sets or checks AdaLoRA's schedule, allocates ranks after every step, and keeps both with checkpoints.

    Put this callback before `SealedCheckpoints`.
    """

    def __init__(
        self,
        schedule: Literal["set", "check"] | None = None,
        num_steps: Callable[[int], int] = lambda total: total,
    ):
        self._schedule = schedule
        self._num_steps = num_steps  # of AdaLoRA, by those of the whole training

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, model: Any = None, **_: Any):
        """Set the schedule, or refuse another."""
        if self._schedule is None:
            return
        steps = self._num_steps(state.max_steps)
        for config in model.peft_config.values():
            given = getattr(config, "total_step", steps)
            if self._schedule == "set":
                vars(config).update(adalora_schedule(steps))
            elif given != steps:
                raise InputError(
                    f"AdaLoRA's schedule ends at step {given}, and its training has {steps} steps: make the "
                    f"adapter by AdaLoraConfig(total_step={steps}, ...), or set max_steps"
                )

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, model: Any = None, **_: Any):
        """Let AdaLoRA see the gradients of this step."""
        model.base_model.update_and_allocate(state.global_step)

    def on_save(self, args: Any, state: TrainerState, control: Any, model: Any = None, **_: Any):
        """Keep the whole factors, which PEFT cuts to the ranks so far, and the scores that decide the next ranks."""
        if not is_first():
            return
        config, allocator = model.active_peft_config, model.base_model.rankallocator
        content = {
            "parameters": {name: p.detach() for name, p in model.named_parameters() if p.requires_grad},
            "scores": {key: getattr(allocator, key) for key in _SCORES},
            "rank_pattern": config.rank_pattern,
        }
        torch.save(content, checkpoint_folder(args, state) / _FILE)


@torch.no_grad()
def restored_adalora(model: Any, checkpoint: Path) -> bool:
    """Bring AdaLoRA back to where a checkpoint was written; say whether that has what it takes."""
    bare = unwrapped(model)
    if not (checkpoint / _FILE).is_file():
        return False
    content = torch.load(checkpoint / _FILE, map_location="cpu", weights_only=True)
    parameters = dict(bare.named_parameters())
    for name, value in content["parameters"].items():
        parameters[name].copy_(value)
    inner = dict(bare.base_model.model.named_parameters())
    for key, scores in content["scores"].items():
        held = {name: value.to(inner[name].device) for name, value in scores.items()}
        setattr(bare.base_model.rankallocator, key, held)
    bare.active_peft_config.rank_pattern = content["rank_pattern"]
    return True
