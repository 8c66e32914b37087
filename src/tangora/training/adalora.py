"""AdaLoRA's schedule and rank allocation, which PEFT leaves to the training loop."""

from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tangora._checks import InputError
from tangora.recipes.prepare import adalora_schedule


class AdaLoraAllocation(TrainerCallback):
    """Calls AdaLoRA's rank allocation after every optimizer step."""

    def __init__(self, schedule: Literal["set", "check"] | None = None):
        self._schedule = schedule

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ):
        """Set the schedule, or refuse another."""
        for config in model.peft_config.values():
            given = getattr(config, "total_step", state.max_steps)
            if self._schedule == "set":
                vars(config).update(adalora_schedule(state.max_steps))
            elif self._schedule == "check" and given != state.max_steps:
                raise InputError(
                    f"AdaLoRA's schedule ends at step {given}, and training has {state.max_steps} steps: make the "
                    f"adapter by AdaLoraConfig(total_step={state.max_steps}, ...), or set max_steps"
                )

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ):
        """Let AdaLoRA see the gradients of this step."""
        model.base_model.update_and_allocate(state.global_step)
