"""Which devices a Trainer uses."""

import warnings

import transformers


def single_gpu(trainer: transformers.Trainer) -> None:
    """Keep a Trainer from spreading each batch over all visible GPUs by ``nn.DataParallel``.

    transformers does so by itself where no launcher is used, and multiplies the batch by their number. Processes of a
    launcher, and models that already lie on several devices, have one GPU each here and are left alone.

    Args:
        trainer: Just made; trains and evaluates on its first GPU from now on, with ``per_device_train_batch_size``.
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
