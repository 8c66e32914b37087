"""Refuses what Accelerate's engines (DeepSpeed, FSDP1) would silently do to an optimizer of LoRA pairs."""

from typing import Any

from accelerate.state import AcceleratorState
from torch.optim import Optimizer

from tangora._checks import InputError
from tangora.optim import PairOptimizer

_INSTEAD = (
    "use DistributedDataParallel, or shard the base only: from_pretrained(..., "
    "distributed_config=DistributedConfig(fsdp_size=N)), then get_peft_model"
)


def check_kept(*, given: bool) -> None:
    """Raise `InputError` if DeepSpeed would replace the Trainer's optimizer without a word."""
    plugin = _plugin("deepspeed_plugin")
    if plugin is None:
        return
    if given:
        raise InputError(
            "under DeepSpeed the Trainer replaces `optimizers=` by torch's AdamW: pass recipe=, or "
            "optimizer_cls_and_kwargs=tangora.optimizer_factory(...)"
        )
    if "optimizer" in plugin.deepspeed_config:
        raise InputError(
            "the DeepSpeed configuration names an optimizer, which would replace the recipe's: remove its 'optimizer'"
        )


def check_steppable(optimizer: Optimizer) -> None:
    """Raise `InputError` if an engine would flatten or partition the parameters of a pair optimizer."""
    if not isinstance(optimizer, PairOptimizer):
        return
    deepspeed, fsdp = _plugin("deepspeed_plugin"), _plugin("fsdp_plugin")
    if deepspeed is not None and deepspeed.zero_stage:
        raise InputError(
            f"DeepSpeed ZeRO-{deepspeed.zero_stage} partitions flattened parameters, which leaves no LoRA pairs for "
            f"{type(optimizer).__name__}: use ZeRO stage 0, {_INSTEAD}"
        )
    if fsdp is not None and fsdp.fsdp_version == 1:
        raise InputError(
            f"FSDP1 flattens parameters, which leaves no LoRA pairs for {type(optimizer).__name__}: {_INSTEAD}"
        )


def _plugin(name: str) -> Any:
    return getattr(AcceleratorState(), name, None) if AcceleratorState._shared_state else None
