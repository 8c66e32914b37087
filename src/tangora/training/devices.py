"""The device of a run and of a Trainer, and checks of Accelerate's engines (DeepSpeed, FSDP1) for LoRA pairs."""

import os
import warnings
from typing import Any

import torch
import transformers
from accelerate.state import AcceleratorState
from torch.optim import Optimizer

from tangora._checks import InputError
from tangora.optim import PairOptimizer

_INSTEAD = (
    "use DistributedDataParallel, or shard the base only: from_pretrained(..., "
    "distributed_config=DistributedConfig(fsdp_size=N)), then get_peft_model"
)


def visible_gpus() -> list[str]:
    """Name the GPUs that this process may use, as CUDA_VISIBLE_DEVICES does (numbers, UUIDs, parts of one by MIG).

    Asks without starting CUDA, so that a process that is started afterwards can be given one of them.
    """
    count = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(index) for index in range(count)] if given is None else given.split(",")
    return [name.strip() for name in names[:count]]


def check_device(name: str | None) -> None:
    """Raise `InputError` unless a device is there; asks without starting CUDA, which forbids to fork."""
    kind, _, index = (name or "cpu").partition(":")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise InputError("device 'mps' is not available on this machine; omit it or pass cpu")
    count = torch.cuda.device_count() if kind == "cuda" else 0
    if kind == "cuda" and int(index or 0) >= count:
        there = f"cuda:0 to cuda:{count - 1} are" if count > 1 else "cuda:0 is" if count else "no GPU is"
        raise InputError(f"device {name!r} is not available: {there} visible; omit it or pass cpu")


def device_named(name: str | None) -> torch.device:
    """Return a device, by default the first GPU if there is one, and let ``cuda`` mean it from now on."""
    check_device(name)
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def keep_to(arguments: transformers.TrainingArguments, name: str | None) -> None:
    """Let a Trainer use a GPU other than the first, which is the one that transformers takes."""
    device = torch.device(name or "cpu")
    if not device.index:
        return
    vars(arguments)["_setup_devices"] = device
    arguments._n_gpu = 1
    if arguments.distributed_state is not None:
        arguments.distributed_state.device = device
    torch.cuda.set_device(device)


def single_gpu(trainer: transformers.Trainer) -> None:
    """Keep a Trainer from spreading each batch over all visible GPUs by ``nn.DataParallel``.

    transformers does so by itself where no launcher is used, and multiplies the batch by their number. Processes of a
    launcher, and models that already lie on several devices, have one GPU each here and are left alone.
    """
    arguments = trainer.args
    if arguments.n_gpu <= 1:
        return
    warnings.warn(
        f"{arguments.n_gpu} GPUs are visible; only {arguments.device} is used, so that the batch size "
        "does not change. Select another GPU with CUDA_VISIBLE_DEVICES; torchrun --nproc-per-node N "
        "and accelerate launch use all GPUs",
        stacklevel=3,
    )
    arguments._n_gpu = 1
    trainer._train_batch_size = arguments.train_batch_size


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
            "the DeepSpeed configuration has an optimizer, which would replace the recipe's: remove "
            "its 'optimizer'"
        )


def check_steppable(optimizer: Optimizer) -> None:
    """Raise `InputError` if an engine would flatten or partition the parameters of a pair optimizer."""
    if not isinstance(optimizer, PairOptimizer):
        return
    deepspeed, fsdp = _plugin("deepspeed_plugin"), _plugin("fsdp_plugin")
    if deepspeed is not None and deepspeed.zero_stage:
        raise InputError(
            f"DeepSpeed ZeRO-{deepspeed.zero_stage} partitions flattened parameters, so there are no "
            "LoRA pairs for "
            f"{type(optimizer).__name__}: use ZeRO stage 0, {_INSTEAD}"
        )
    if fsdp is not None and fsdp.fsdp_version == 1:
        raise InputError(
            f"FSDP1 flattens parameters, so there are no LoRA pairs for {type(optimizer).__name__}: "
            f"{_INSTEAD}"
        )


def _plugin(name: str) -> Any:
    return getattr(AcceleratorState(), name, None) if AcceleratorState._shared_state else None
