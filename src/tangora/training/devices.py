"""Which device a run uses, and which of them a Trainer."""

import warnings

import torch
import transformers

from tangora._checks import InputError


def check_device(name: str | None) -> None:
    """Raise `InputError` unless a device is there; asks without starting CUDA, which forbids to fork."""
    kind, _, index = (name or "cpu").partition(":")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise InputError("device 'mps' is not available on this machine; leave it out or give cpu")
    count = torch.cuda.device_count() if kind == "cuda" else 0
    if kind == "cuda" and int(index or 0) >= count:
        there = f"cuda:0 to cuda:{count - 1} are" if count > 1 else "cuda:0 is" if count else "no GPU is"
        raise InputError(f"device {name!r} is not available: {there} visible; leave it out or give cpu")


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
        f"{arguments.n_gpu} GPUs are visible; only {arguments.device} is used, so that the batch keeps its size. "
        "CUDA_VISIBLE_DEVICES chooses another; under torchrun a script with tangora.Trainer uses all",
        stacklevel=3,
    )
    arguments._n_gpu = 1
    trainer._train_batch_size = arguments.train_batch_size
