"""A Trainer whose processes share every batch of one process, so that all of them together train what one would."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tangora.probes.losses import IGNORED
from tangora.training.data import Encoding
from tangora.training.data.encoding import Collator
from tangora.training.ranks import num_ranks, rank
from tangora.training.trainer import Trainer


class SplitBatchTrainer(Trainer):
    """`Trainer` whose ``per_device_train_batch_size`` counts the examples of all processes together.

    Order and number of batches are those of one process, also at the end of an epoch. ``data_collator`` must give the
    share of this process (`share_of`).
    """

    def get_train_dataloader(self) -> DataLoader:
        """Let every process go through the batches of one."""
        loader = super().get_train_dataloader()
        shard: Any = loader.batch_sampler
        if isinstance(shard, BatchSamplerShard):  # which would deal whole batches, and fill up the last ones
            shard.num_processes, shard.process_index, shard.even_batches = 1, 0, False
        return loader

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Weigh a mean over this process's share, which all processes average, by the size of the share."""
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            with _regularized_once(
                self.model
            ):  # a sum, divided by the number of labels in all shares already
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if num_ranks() == 1:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        own = (labels[..., 1:] if self._loss_shifts_labels else labels).ne(IGNORED).sum()
        everywhere = own.clone()
        dist.all_reduce(everywhere)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        logits: Any = outputs["logits"]  # pyright: ignore[reportArgumentType]
        # the mean over no label is no number
        loss = loss * (own * num_ranks() / everywhere) if own else 0 * logits.sum()
        return (loss, outputs) if return_outputs else loss


@contextlib.contextmanager
def _regularized_once(model: Any) -> Iterator[None]:
    # AdaLoRA adds a term of its own to the loss, which would be added up over processes, too
    configs = [
        each for each in getattr(model, "peft_config", {}).values() if hasattr(each, "orth_reg_weight")
    ]
    weights = [each.orth_reg_weight for each in configs]
    for config, weight in zip(configs, weights, strict=True):
        config.orth_reg_weight = weight / num_ranks()
    try:
        yield
    finally:
        for config, weight in zip(configs, weights, strict=True):
            config.orth_reg_weight = weight


def share_of(collate: Collator) -> Collator:
    """Make a collator that takes the batch of all processes, and makes a batch of every n-th example of it.

    Where no example is left for this process, one without labels takes part in the passes of all.
    """

    def collated(examples: Sequence[Encoding]) -> Mapping[str, Tensor]:
        if num_ranks() == 1:
            return collate(examples)
        own = examples[rank() :: num_ranks()]
        batch = dict(collate(own or examples[:1]))
        return batch if own else batch | {"labels": torch.full_like(batch["labels"], IGNORED)}

    return collated
