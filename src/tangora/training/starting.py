"""Batches for a recipe's initialization in a Trainer: a few of its own examples, with its own collator and loss."""

import contextlib
import copy
import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import torch.utils.data
import transformers
from peft import PeftModel
from torch import Tensor, nn

from tangora._checks import InputError
from tangora._types import LossFn
from tangora.adapters import active_adapter, attach_offset, has_offset, unwrapped
from tangora.init import mark_started, start_method, started_by
from tangora.probes.stillness import preserved_randomness
from tangora.recipes import Recipe

NUM_EXAMPLES = 32  # whose gradient is read, the default of the command line's ``--start-examples``
NUM_HELD_OUT = 200  # on which ``one-step`` searches its step size, the command line's ``--num-validation``
_COUNTERS = ("_metrics", "_total_train_tokens")  # of TRL's losses


def start(trainer: transformers.Trainer, recipe: Recipe) -> None:
    """Give the Trainer's model the initialization of a recipe, unless it has it; random state and data stay."""
    model: Any = trainer.model
    if recipe.start is None or started_by(model) == recipe.start:
        return
    batches = held_out = loss_fn = None
    with preserved_randomness(), _uncounted(trainer):
        if recipe.reads_gradients:
            loss_fn = _loss_fn(trainer)
            batches = _batches(trainer, whole=loss_fn is not None)
        if recipe.searches_step:
            held_out = _held_out(trainer, recipe, whole=loss_fn is not None)
        seed = trainer.args.seed
        recipe.initialize(model, batches, held_out=held_out, loss_fn=loss_fn, seed=seed)


def makes_inputs(trainer: transformers.Trainer) -> bool:
    """Say whether a Trainer makes its inputs while it trains, as GRPO's generates what it trains on."""
    return type(trainer)._prepare_inputs is not transformers.Trainer._prepare_inputs


def expect_started(model: nn.Module, recipe: Recipe) -> None:
    """Make room for a checkpoint of a training that began with a recipe's initialization; it brings all factors."""
    bare = unwrapped(model)
    if recipe.start is None or not isinstance(bare, PeftModel):
        return
    adapter = active_adapter(bare)
    if start_method(recipe.start).offset and not has_offset(bare, adapter):
        attach_offset(bare, adapter, {})
    mark_started(bare, adapter, recipe.start)


@contextlib.contextmanager
def _uncounted(trainer: transformers.Trainer) -> Iterator[None]:
    # losses add to the next log, and Accelerate keeps every data loader
    counters = {key: copy.deepcopy(vars(trainer)[key]) for key in _COUNTERS if key in vars(trainer)}
    loaders = list(trainer.accelerator._dataloaders)
    try:
        yield
    finally:
        vars(trainer).update(counters)
        trainer.accelerator._dataloaders[:] = loaders


def _loss_fn(trainer: transformers.Trainer) -> LossFn | None:
    if makes_inputs(trainer):
        raise InputError(
            f"the initialization needs gradients of the training loss, but {type(trainer).__name__} "
            "generates its inputs during training: call tangora.initialize(model, method, batches, "
            "loss_fn=...) first, or use a recipe whose initialization needs no gradients"
        )
    computes = getattr(trainer.compute_loss, "__func__", None)
    smoothed = trainer.label_smoother is not None or trainer.compute_loss_func is not None
    if computes is transformers.Trainer.compute_loss and not smoothed:
        return None  # the model's own, which is weighted by the number of labels

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        inputs = trainer._prepare_inputs(dict(batch))  # losses take labels out of them
        loss: Any = trainer.compute_loss(model, inputs)
        return loss.mean()

    return loss_fn


def _batches(trainer: transformers.Trainer, *, whole: bool) -> list[Any]:
    if trainer.train_dataset is None:
        raise InputError("the initialization needs gradients of training examples: pass train_dataset")
    loader = trainer.get_train_dataloader()
    processes, index = trainer.args.world_size, trainer.args.process_index
    if isinstance(loader.dataset, torch.utils.data.IterableDataset):
        # each process reads its own part, or all the same
        examples = list(itertools.islice(loader.dataset, math.ceil(NUM_EXAMPLES / processes)))
    else:
        chosen = _sample(loader.dataset, NUM_EXAMPLES, trainer.args.seed)
        examples = [loader.dataset[number] for number in chosen[index::processes] or chosen[:1]]
    return _collated(loader, examples, trainer._train_batch_size, whole=whole)


def _held_out(trainer: transformers.Trainer, recipe: Recipe, *, whole: bool) -> list[Any]:
    data = trainer.eval_dataset
    if data is None or isinstance(data, (dict, torch.utils.data.IterableDataset)):
        got = "none" if data is None else type(data).__name__
        raise InputError(
            f"recipe {recipe.name!r} searches its step size on other examples: pass one eval_dataset "
            f"with a length; got {got}"
        )
    loader = trainer.get_eval_dataloader()
    size = trainer.args.per_device_eval_batch_size
    chosen = _sample(loader.dataset, NUM_HELD_OUT, trainer.args.seed)
    return _collated(loader, [loader.dataset[number] for number in sorted(chosen)], size, whole=whole)


def _sample(data: Any, most: int, seed: int) -> list[int]:
    return random.Random(seed).sample(range(len(data)), min(most, len(data)))


def _collated(loader: Any, examples: list[Any], size: int, *, whole: bool) -> list[Any]:
    # a loss of the user's weighs all batches alike, so they must be of one size
    if not examples:
        raise InputError("train_dataset must hold at least one example; it is empty")
    ends = len(examples) - len(examples) % size if whole and len(examples) > size else len(examples)
    return [loader.collate_fn(examples[first : min(first + size, ends)]) for first in range(0, ends, size)]
