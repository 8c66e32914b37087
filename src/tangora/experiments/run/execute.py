"""One run: load, prepare, train, evaluate, and say everything about it in one record."""

import contextlib
import logging
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from peft import PeftModel
from torch import nn
from transformers.trainer_utils import SaveStrategy

from tangora._folders import RunFolder
from tangora._types import Progress
from tangora.adapters.heads import head_names
from tangora.adapters.sharded import unshard_trained
from tangora.experiments.process import tell_user
from tangora.experiments.provenance import origin_of, provenance
from tangora.experiments.run.answering import answer_prompts
from tangora.experiments.run.machine import (
    load_average,
    machine_load,
    memory_use,
    peak_bytes,
    reset_peak,
)
from tangora.experiments.run.measurements import (
    curvature_callback,
    curvature_points,
    measure_flatness,
    trajectory_points,
    trajectory_recorder,
)
from tangora.experiments.run.preparing import (
    CHECKPOINTING,
    CHECKPOINTING_KWARGS,
    Run,
    check_recipes,
    load_base,
    prepare_run,
)
from tangora.experiments.run.saving import (
    check_space,
    data_format,
    read_whole,
    rescued,
    save_weights,
    save_with_logits,
)
from tangora.experiments.run.scoring import (
    NUM_UNRELATED,
    benchmark_results,
    example_losses,
    test_metrics,
    unrelated_loss,
    validation_metrics,
)
from tangora.experiments.settings import RunSettings
from tangora.report import EvaluationRecord, Record, StepRecord, TimeSplit
from tangora.report.run_records import Benchmark, Flatness, Forgetting, Stage
from tangora.training.callbacks import (
    DivergedError,
    Durations,
    Evaluations,
    History,
    SealedCheckpoints,
    StepTimer,
    last_checkpoint,
    read_history,
    trackers,
)
from tangora.training.data import Task
from tangora.training.data.packing import packing_collator
from tangora.training.devices import keep_to
from tangora.training.ranks import failing_as_one, from_first, is_first, num_ranks, rank
from tangora.training.split_batches import SplitBatchTrainer, share_of
from tangora.training.trainer import Trainer, bare_optimizer

logger = logging.getLogger(__name__)


@dataclass
class _Result:
    """Results of a run so far."""

    metrics: dict[str, dict[str, float]]
    status: Literal["finished", "diverged"] = "finished"
    error: str | None = None
    correct: list[bool] | None = None
    scores: list[float] | None = None
    evaluation_seconds: float = 0.0
    flatness: Flatness | None = None
    forgetting: Forgetting | None = None
    benchmarks: dict[str, Benchmark] = field(default_factory=dict)
    peak_bytes: int | None = None


def execute(
    settings: RunSettings,
    task: Task,
    folder: Path,
    *,
    run_id: str,
    stage: Stage = "final",
    before: Literal["never", "always", "if it has no new head"] = "never",
    keep_model: bool = False,
    is_checked: bool = False,
    progress: Progress | None = None,
) -> Record:
    """Train and evaluate one method, in a folder of its own.

    Checkpoints of an earlier, interrupted call are continued. The folder then holds ``metrics.jsonl``, the adapter (or
    for full fine-tuning the model), ``logits.pt`` for `verify_adapter`, and ``trajectory.jsonl``, ``snapshots/``
    and ``curvature.jsonl`` of a run that is measured. Checkpoints stay: they may go when the record is written.

    ``before`` says when the base model is evaluated on the test examples: with a new head it knows nothing of them.
    """
    if is_first():
        folder.mkdir(parents=True, exist_ok=True)
    load = load_average()
    if progress is not None:
        progress("start", 0, settings.num_steps(len(task.train)))
    # parts of a sharded model are loaded by all processes together
    with contextlib.nullcontext() if settings.fsdp else failing_as_one():
        loaded = load_base(settings, task)
        task = task if is_checked else check_recipes([settings], task, loaded)
    tell_user(*task.notes, *_sharing(settings))
    run = Run(settings, task, loaded, RunFolder(folder), progress)
    measured = before == "always" or (before != "never" and not head_names(loaded.model))
    result = _Result(metrics={"before": test_metrics(run, loaded.model)[0]} if measured else {})
    known = unrelated_loss(run, loaded.model) if settings.forgetting else None
    began = time.perf_counter()
    model = _prepared(run)
    start_seconds, timer = time.perf_counter() - began, StepTimer()
    watched = [observer(run, model) for observer in (trajectory_recorder, curvature_callback)]
    observers = [observer for observer in watched if observer is not None]
    durations = Durations(
        lambda: (
            _spent(timer, trainer, evaluations)
            | {"measurements": sum(each.watch.seconds for each in observers)}
        )
    )
    trainer = _trainer(run, model, [timer, durations, *observers])
    evaluations = _evaluations(run, trainer)
    from_first(
        lambda: check_space(
            folder, model, keeps_model=keep_model, checkpoints=settings.save_every is not None
        )
    )
    try:
        with rescued(run, lambda: _model_of(trainer)) if keep_model else contextlib.nullcontext():
            run.tell("training", 0)
            result.peak_bytes = _train(run, trainer) if settings.chosen_recipe.trains else None
            model = _model_of(trainer)
            _check_finite(model)
            # first of all, what nothing could bring back
            if isinstance(model, PeftModel):
                save_with_logits(run, model)
            elif keep_model:
                from_first(lambda: save_weights(run, model, run.folder))
        _evaluate(run, model, result, stage, known)
    except (DivergedError, FloatingPointError) as problem:
        result.status, result.error = "diverged", str(problem)
    spent = durations.total()
    logger.info("%s: %s in %.0f s", run_id, result.status, time.perf_counter() - began)
    history = read_steps(run.folder)
    return Record(
        **identity(settings, task, run_id, stage, data_format=data_format(run)),
        status=result.status,
        error=result.error,
        notes=list(task.notes),
        num_examples={name: len(getattr(task, name)) for name in ("train", "validation", "test")},
        metrics=result.metrics,
        history=history,
        evaluations=[*read_evaluations(run.folder), *_last(history, result.metrics)],
        time=TimeSplit(
            start=start_seconds + spent["start"],
            forward_backward=spent["forward_backward"],
            optimizer=spent["optimizer"],
            evaluation=spent["evaluation"] + result.evaluation_seconds,
        ),
        load=machine_load(load),
        memory=memory_use(trainer.optimizer, model, None if observers else result.peak_bytes),
        gradient_evaluations=getattr(bare_optimizer(trainer.optimizer), "evaluations", len(history)),
        trajectory=trajectory_points(run.folder),
        curvature=curvature_points(run.folder),
        measurement_seconds=spent["measurements"],
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        correct=result.correct,
        scores=result.scores,
        flatness=result.flatness,
        forgetting=result.forgetting,
        benchmarks=result.benchmarks,
    )


def identity(settings: RunSettings, task: Task, run_id: str, stage: Stage, **facts: str) -> dict[str, Any]:
    """Say of which run a record is, where it was made and of what; the facts go among its settings."""
    return {
        "id": run_id,
        "recipe": settings.recipe,
        "learning_rate": settings.peak_learning_rate,
        "seed": settings.seed,
        "stage": stage,
        "settings": settings.model_dump(mode="json") | origin_of(settings, task) | facts,
        **provenance(settings.model),
    }


def read_steps(folder: RunFolder) -> list[StepRecord]:
    """Read the training steps of a run, ended or cut off."""
    return [StepRecord(**line) for line in read_history(folder.metrics)]


def read_evaluations(folder: RunFolder) -> list[EvaluationRecord]:
    """Read the evaluations during a run, ended or cut off."""
    return [EvaluationRecord(**line) for line in read_history(folder.evaluations)]


def _last(history: list[StepRecord], metrics: dict[str, dict[str, float]]) -> list[EvaluationRecord]:
    found = metrics.get("validation")
    return [EvaluationRecord(step=len(history), metrics=found)] if found else []


def _sharing(settings: RunSettings) -> list[str]:
    if num_ranks() == 1:
        return []
    share = f"{settings.batch_size // num_ranks()} of the {settings.batch_size} examples of each batch"
    return [f"{num_ranks()} processes train together, each with {share}"]


def _prepared(run: Run) -> nn.Module:
    settings, task = run.settings, run.task
    model = prepare_run(settings, task, run.loaded.model)
    if settings.fsdp:
        unshard_trained(model)
    batches = held_out = None
    if settings.chosen_recipe.reads_gradients:
        batches = run.dealt(run.sampled(settings.start_examples))
        held_out = run.dealt(run.batches(task.validation))
    settings.chosen_recipe.initialize(model, batches, held_out=held_out, seed=settings.seed)
    return model


def _trainer(run: Run, model: nn.Module, callbacks: list[transformers.TrainerCallback]) -> Trainer:
    settings, steps = run.settings, run.num_steps
    data, collate = run.encoded(run.task.train)
    if settings.packing:
        collate = packing_collator()
    checkpointing: dict[str, Any] = {}
    if settings.gradient_checkpointing:
        checkpointing = {CHECKPOINTING: True} | CHECKPOINTING_KWARGS
    arguments = transformers.TrainingArguments(
        output_dir=str(run.folder.checkpoints),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        weight_decay=settings.weight_decay,
        lr_scheduler_type=settings.schedule if settings.schedule != "constant" else "constant_with_warmup",
        # the first step of a warm-up has the rate 0: at least one other must follow, or nothing is trained
        warmup_steps=min(math.ceil(settings.warmup * steps), steps - 1),
        max_grad_norm=settings.clip,
        **checkpointing,
        use_cpu=settings.device == "cpu" or (num_ranks() > 1 and not torch.cuda.is_available()),
        seed=settings.seed,
        data_seed=settings.seed,
        save_strategy="no",
        save_steps=settings.save_every or 500,
        save_total_limit=2,
        logging_steps=1,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to=[],  # trackers are ours to make: their files belong into the run's folder
        run_name=run.folder.path.name,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        log_level="error",
    )
    keep_to(arguments, settings.device)
    trainer = SplitBatchTrainer(
        model=model,  # pyright: ignore[reportArgumentType]
        args=arguments,
        train_dataset=data,
        data_collator=share_of(collate),
        recipe=settings.chosen_recipe,
        learning_rate=settings.peak_learning_rate,
        head_learning_rate=settings.head_learning_rate,
        callbacks=[
            *callbacks,
            *trackers(settings.report_to or (), run.folder.path),
            History(run.folder.metrics, lambda step, loss: run.tell(f"loss {loss:.3f}", step)),
            SealedCheckpoints(),
        ],
    )
    if run.task.kind == "classification":
        # the Trainer trusts a model with **kwargs to divide by the size of the whole batch, but classifiers take the
        # mean of each micro-batch: their losses and gradients would be added up, not averaged
        trainer.model_accepts_loss_kwargs = False
    if (
        settings.save_every
    ):  # refused above for a sharded base, whose adapters and their states are whole here
        trainer.args.save_strategy = SaveStrategy.STEPS
    # the run's own files say it all; the Trainer's printer would write a line of raw dictionaries per step
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _model_of(trainer: Trainer) -> nn.Module:
    # another one than at the start, where a first phase has found the ranks
    model: Any = trainer.model
    return model


def _evaluations(run: Run, trainer: Trainer) -> Evaluations | None:
    if run.settings.evaluate_every is None:
        return None
    evaluations = Evaluations(
        run.folder.evaluations,
        run.settings.evaluate_every,
        lambda: validation_metrics(run, _model_of(trainer)),
        trainer.log,
    )
    trainer.add_callback(evaluations)
    return evaluations


def _spent(timer: StepTimer, trainer: Trainer, evaluations: Evaluations | None) -> dict[str, float]:
    # gradients of further stages are evaluated inside of the optimizer's step
    return {
        "start": trainer.conversion_seconds,
        "forward_backward": timer.forward_backward + trainer.replay_seconds,
        "optimizer": max(0.0, timer.optimizer - trainer.replay_seconds),
        "evaluation": evaluations.seconds if evaluations else 0.0,
    }


def _train(run: Run, trainer: Trainer) -> int | None:
    watched = reset_peak()
    checkpoint = from_first(lambda: last_checkpoint(run.folder.checkpoints))
    if rank() > 0:  # other dropout for other examples
        torch.manual_seed(run.settings.seed + rank())
    with read_whole(checkpoint, lambda: trainer.state.global_step):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return peak_bytes() if watched else None


def _check_finite(model: nn.Module) -> None:
    if not all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad):
        raise DivergedError("the weights are not finite after the last step")


def _evaluate(run: Run, model: nn.Module, result: _Result, stage: Stage, known: float | None) -> None:
    """Measure all that a run reports of its end; ``known`` is the loss on unrelated text before training."""
    run.tell("evaluation", run.num_steps)
    began = time.perf_counter()
    result.metrics["validation"] = validation_metrics(run, model, answers=True)
    result.metrics["test"], each = test_metrics(run, model)
    result.scores = example_losses(each)
    if "right" in each:
        result.correct = each["right"].tolist()
    result.evaluation_seconds += time.perf_counter() - began
    if run.settings.prompts is not None and stage != "trial":
        run.tell("answers", run.num_steps)
        result.evaluation_seconds += answer_prompts(run, model)
    if known is not None:
        after = unrelated_loss(run, model)
        assert after is not None
        result.forgetting = Forgetting(before=known, after=after, num_texts=NUM_UNRELATED)
    if stage != "trial":  # those choose by validation data, and are not reported
        result.benchmarks = _benchmarks(run, model, result)
    if run.settings.curvature:
        run.tell("curvature", run.num_steps)
        result.flatness = measure_flatness(run, model, result.metrics["test"]["loss"])


def _benchmarks(run: Run, model: nn.Module, result: _Result) -> dict[str, Benchmark]:
    if not run.settings.benchmarks:
        return {}
    run.tell("benchmarks", run.num_steps)
    began = time.perf_counter()
    found = benchmark_results(run, model)
    result.evaluation_seconds += time.perf_counter() - began
    return found
