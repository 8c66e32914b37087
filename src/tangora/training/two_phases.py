"""Training in two phases: AdaLoRA finds the ranks, then the recipe's own optimizer trains plain LoRA of these ranks.

The second phase goes on as a training does that resumes from a checkpoint without an optimizer's state: it sees the
examples that follow, and steps are counted on.
"""

import contextlib
import copy
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import transformers
from peft import PeftModel
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import TrainOutput, get_last_checkpoint

from tangora._checks import InputError
from tangora.adapters import from_adalora, is_adalora
from tangora.adapters.adalora import with_saved_ranks
from tangora.probes.stillness import preserved_randomness
from tangora.recipes import RankSearch
from tangora.training.rank_allocation import AdaLoraAllocation, restored_adalora

_STATE = "trainer_state.json"


class _EndOfSearch(TrainerCallback):
    """Stops training where the first phase ends."""

    def __init__(self, search: RankSearch):
        self._search = search

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any):
        if state.global_step >= self._search.num_steps(state.max_steps):
            control.should_training_stop = True


def check_two_phases(trainer: transformers.Trainer, name: str) -> None:
    """Raise `InputError` if a Trainer cannot change its model between two phases of a recipe."""
    cannot = {
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "FSDP": trainer.is_fsdp_enabled,
        "load_best_model_at_end": trainer.args.load_best_model_at_end,
        "model_init": trainer.model_init is not None,
    }
    for what in (key for key, used in cannot.items() if used):
        raise InputError(
            f"{what} cannot be used with recipe {name!r}, whose first phase trains another adapter than the second: "
            "leave one of them out"
        )


def train_in_two_phases(
    trainer: Any, search: RankSearch, train: Callable[..., TrainOutput], resume: str | bool | None
) -> TrainOutput:
    """Train both phases, or what a checkpoint has left of them."""
    if not is_adalora(trainer.model):
        raise InputError("the ranks have been found by an earlier train(): make a new Trainer to train again")
    checkpoint = _resolved(trainer, resume)
    state = TrainerState.load_from_json(str(checkpoint / _STATE)) if checkpoint else None
    done = state.global_step if state else 0
    if state and checkpoint and done > search.num_steps(state.max_steps):
        _take(trainer, with_saved_ranks(trainer.model, checkpoint))
        return train(str(checkpoint))
    if state and checkpoint and done == search.num_steps(state.max_steps):
        restored_adalora(trainer.model, checkpoint)
        trainer._load_rng_state(str(checkpoint))
        trainer.state = state
    else:
        output = _search(trainer, search, lambda: train(str(checkpoint) if checkpoint else None))
        if trainer.state.global_step < search.num_steps(
            trainer.state.max_steps
        ):  # a callback has ended training
            return output
    with tempfile.TemporaryDirectory() as folder:  # of every process its own
        began = time.perf_counter()
        with preserved_randomness():
            plain = from_adalora(trainer.model)
        _take(trainer, plain)
        trainer.conversion_seconds += time.perf_counter() - began
        plain.save_pretrained(folder, save_embedding_layers=False)
        trainer.state.save_to_json(str(Path(folder) / _STATE))
        trainer._save_rng_state(folder)
        return train(folder)


@contextlib.contextmanager
def phase_of(trainer: Any, search: RankSearch, total: int) -> Iterator[int]:
    """Give the number of steps of the phase that begins; the Trainer's warm-up has the same share of it as of all."""
    first = search.num_steps(total)
    steps = first if is_adalora(trainer.model) else total - first
    whole = trainer.args
    warmup = math.ceil(whole.get_warmup_steps(total) * steps / total)
    trainer.args = copy.copy(whole)
    trainer.args.warmup_steps = min(warmup, steps - 1)
    try:
        yield steps
    finally:
        trainer.args = whole


def _resolved(trainer: transformers.Trainer, resume: str | bool | None) -> Path | None:
    if not resume:
        return None
    found = get_last_checkpoint(str(trainer.args.output_dir)) if resume is True else resume
    if found is None:
        raise InputError(f"{trainer.args.output_dir} holds no checkpoint: leave resume_from_checkpoint out")
    return Path(found)


def _search(
    trainer: transformers.Trainer, search: RankSearch, train: Callable[[], TrainOutput]
) -> TrainOutput:
    end, handler = _EndOfSearch(search), vars(trainer.callback_handler)
    trainer.add_callback(end)
    handler["on_train_end"] = lambda *passed: passed[-1]  # training goes on: trackers stay open
    try:
        return train()
    finally:
        del handler["on_train_end"]
        trainer.remove_callback(end)


def _take(trainer: Any, plain: PeftModel) -> None:
    trainer.remove_callback(AdaLoraAllocation)
    trainer.model = trainer.model_wrapped = plain
    trainer.optimizer = trainer.lr_scheduler = None
