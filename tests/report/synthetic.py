"""Comparisons made of formulas: what a real run would leave behind, in a millisecond."""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tangora._folders import ComparisonFolder
from tangora.report import (
    Comparison,
    EvaluationRecord,
    MemoryUse,
    Record,
    Row,
    StepRecord,
    TimeSplit,
    save_json,
)
from tangora.report.statistics.judgement import Judgement, judge

CREATED = "2026-01-02T03:04:05+00:00"
HOSTILE = '<script>alert("x")</script> & %{y} $x$ [bold]'

# Best learning rate and test accuracy there.
RECIPES = {
    "full": (1e-4, 0.965),
    "lora": (4e-4, 0.930),
    "lora-ga": (4e-4, 0.944),
    "lora-pro": (1e-4, 0.950),
    "tangent": (2e-4, 0.961),
    "dora": (8e-4, 0.934),
}
GRID = (5e-5, 1e-4, 2e-4, 4e-4, 8e-4)
NUM_EXAMPLES = 200
NUM_STEPS = 120


def make_record(
    recipe: str = "lora",
    learning_rate: float = 1e-4,
    seed: int = 0,
    *,
    validation: float = 0.9,
    test: float = 0.9,
    **changes: Any,
) -> Record:
    """A finished run; `changes` replaces any field."""
    stage = changes.get("stage", "sweep")
    fields: dict[str, Any] = {
        "id": f"{abs(hash_text(recipe))}-{learning_rate:g}-{seed}-{stage}",
        "recipe": recipe,
        "learning_rate": learning_rate,
        "seed": seed,
        "stage": stage,
        "status": "finished",
        "error": None,
        "settings": {"recipe": recipe, "learning_rate": learning_rate, "r": 8, "betas": [0.9, 0.999]},
        "metrics": {
            "validation": {"accuracy": validation, "loss": 1 - validation},
            "test": {"accuracy": test, "loss": 1 - test},
            "before": {"accuracy": 0.2, "loss": 1.6},
        },
        "history": [StepRecord(step=s, loss=1 / s, learning_rate=learning_rate) for s in (1, 2, 3, 4)],
        "evaluations": [EvaluationRecord(step=4, metrics={"accuracy": validation})],
        "time": TimeSplit(start=1.0, forward_backward=8.0, optimizer=0.4, evaluation=2.0),
        "memory": MemoryUse(peak_bytes=None, optimizer_state_bytes=2_000_000, adapter_bytes=1_000_000),
        "trainable_parameters": 250_000,
        "correct": None,
        "versions": {"torch": "2.13.0", "peft": "0.21.0"},
        "machine": "a machine with two cores",
        "commit": "abc123",
        "created": CREATED,
    }
    return Record(**fields | changes)


def hash_text(text: str) -> int:
    """A hash that, unlike `hash`, is the same in every process."""
    return sum((index + 1) * ord(letter) for index, letter in enumerate(text))


def diverged(recipe: str, learning_rate: float, seed: int = 0, **changes: Any) -> Record:
    """A run whose loss became NaN; its metrics look good, to tempt a careless reader."""
    history = [
        StepRecord(step=1, loss=2.0, learning_rate=learning_rate, grad_norm=math.inf),
        StepRecord(step=2, loss=math.nan, learning_rate=learning_rate, grad_norm=math.nan),
    ]
    fields = {"status": "diverged", "error": "the loss is NaN at step 2", "history": history}
    return make_record(recipe, learning_rate, seed, validation=0.999, test=0.999, **fields | changes)


def make_comparison(records: Sequence[Record], **changes: Any) -> Comparison:
    """A comparison on accuracy; `changes` replaces any field."""
    fields: dict[str, Any] = {
        "title": "MiniLM on BBC News",
        "command": "tangora compare --preset quickstart --seed 0",
        "metric": "accuracy",
        "higher_is_better": True,
        "settings": {"data": "bbc-news", "training": {"steps": 120, "batch_size": 16}},
        "records": list(records),
        "created": CREATED,
    }
    return Comparison(**fields | changes)


def save_comparison(comparison: Comparison, folder: Path) -> Path:
    """Write a comparison as `load_comparison` reads it: one file for what is shared, one per run."""
    for record in comparison.records:
        save_json(record, ComparisonFolder(folder).record_of(record.id))
    save_json(comparison.model_copy(update={"records": []}), ComparisonFolder(folder).comparison)
    return folder


@cache
def realistic() -> Comparison:
    """Sweeps of one seed, final runs of two more, one learning rate that diverges, and one failed run."""
    rng = np.random.default_rng(0)
    records = []
    difficulty = rng.random(NUM_EXAMPLES)  # of the test examples: the same for every recipe
    for recipe, (best, accuracy) in RECIPES.items():
        for rate in GRID:
            if recipe == "lora-pro" and rate >= 8e-4:
                records.append(diverged(recipe, rate))
                continue
            seeds = (0, 1, 2) if rate == best else (0,)
            records += [_run(rng, difficulty, recipe, rate, seed, best, accuracy) for seed in seeds]
    failed = {
        "status": "failed",
        "error": "Traceback …\n  File x\nRuntimeError: out of memory",
        "history": [],
    }
    records.append(make_record("dora", 1.6e-3, metrics={}, evaluations=[], **failed))
    return make_comparison(records)


@cache
def realistic_judged() -> Judgement:
    """`realistic`, judged."""
    return judge(realistic())


def realistic_rows() -> list[Row]:
    """The summary of `realistic`."""
    return realistic_judged().rows


def _run(
    rng: np.random.Generator,
    difficulty: np.ndarray,
    recipe: str,
    rate: float,
    seed: int,
    best: float,
    accuracy: float,
) -> Record:
    quality = accuracy - 0.03 * math.log2(rate / best) ** 2
    correct = (difficulty + rng.normal(0, 0.01, NUM_EXAMPLES) < quality).tolist()
    test = sum(correct) / NUM_EXAMPLES
    steps = np.arange(1, NUM_STEPS + 1)
    losses = 1.6 * np.exp(-steps * quality / 40) + (1 - quality) + rng.normal(0, 0.05, NUM_STEPS)
    validation = quality + rng.normal(0, 0.003)
    return make_record(
        recipe,
        rate,
        seed,
        validation=validation,
        test=test,
        stage="sweep" if seed == 0 else "final",
        correct=correct,
        history=[
            StepRecord(step=int(step), loss=float(loss), learning_rate=rate, grad_norm=1.0)
            for step, loss in zip(steps, losses, strict=True)
        ],
        evaluations=[EvaluationRecord(step=NUM_STEPS, metrics={"accuracy": validation})],
        time=TimeSplit(
            start=3.0 if recipe == "lora-ga" else 0.1,
            forward_backward=30.0 + 20.0 * (recipe == "full"),
            optimizer=0.5 + len(recipe) / 4,
            evaluation=4.0,
        ),
    )
