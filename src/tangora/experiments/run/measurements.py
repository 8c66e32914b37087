"""Measurements of a run: trajectory and curvature through training, and flatness at its end."""

import time
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from peft import PeftModel
from torch import nn

from tangora._checks import InputError, no_such_path
from tangora._folders import RunFolder
from tangora.curvature import Hessian
from tangora.curvature.adapted import chosen
from tangora.curvature.space_curvature import space_curvature
from tangora.diagnostics import (
    Reference,
    Trajectory,
    TrajectoryPoint,
    WeightTrack,
    find_tracks,
    fingerprint,
    write_snapshot,
)
from tangora.experiments.run.preparing import Run, target_layers
from tangora.experiments.run.scoring import metrics_on
from tangora.experiments.settings import RunSettings
from tangora.report import load_record
from tangora.report.run_records import SPREAD_OVER_LAYERS, Flatness
from tangora.training.callbacks import TrajectoryRecorder, measured_steps, read_trajectory
from tangora.training.curvature import TOP_PRODUCTS, CurvatureCallback, read_curvature
from tangora.training.data import Task

_NUM_DURING, _NUM_AT_THE_END = 16, 32
"""Examples for the Hessian: during training one batch by default, whose graph is kept from product to product."""

_SHARED = ("seed", "batch_size", "accumulate", "max_length")
"""Settings that fix the examples of a run and their order."""

_RADIUS = 0.05
"""Radius of the ball, as in Foret et al. (2021, arXiv:2010.01412)."""

_BUDGET = {"top_products": 20, "trace_products": 12}
_ASCENT, _KRYLOV = 3, 4

PRODUCTS_DURING, PRODUCTS_AT_THE_END = TOP_PRODUCTS + _BUDGET["trace_products"], sum(_BUDGET.values())
"""Most Hessian-vector products for one space, at a measured step and at the end of a run."""


def trajectory_recorder(run: Run, model: nn.Module) -> TrajectoryRecorder | None:
    """Make the callback that measures where training leads; ``None`` if that is not asked for."""
    settings, task = run.settings, run.task
    if settings.measure_every is None or not settings.chosen_recipe.trains:
        return None
    whole = not isinstance(model, PeftModel)
    tracks = find_tracks(model, target_layers(settings, task, run.loaded) if whole else None)
    reference = check_reference(settings, task)
    if reference is not None:
        reference.check_layers(tracks)
    batches = None
    if settings.measure_gradient:
        batches = run.dealt(run.sampled(settings.measure_gradient))
    followed = Trajectory(
        model, tracks, reference=reference, batches=batches, rank=settings.rank, seed=settings.seed
    )
    weights = [track for track in tracks if isinstance(track, WeightTrack)] if settings.snapshots else []
    base = fingerprint(weights) if weights else ""

    def save(step: int) -> None:
        write_snapshot(run.folder.snapshots, step, weights, base)

    return TrajectoryRecorder(
        run.folder.trajectory, followed, settings.measure_every, save if weights else None
    )


def curvature_callback(run: Run, model: nn.Module) -> CurvatureCallback | None:
    """Make the callback that measures the curvature during training; ``None`` if that is not asked for."""
    settings = run.settings
    if settings.curvature_every is None or not settings.chosen_recipe.trains:
        return None
    whole = not isinstance(model, PeftModel)
    layers = None if settings.curvature_layers is None else [settings.curvature_layers]
    if whole:  # looked at in the layers that an adapter would have
        layers = chosen(target_layers(settings, run.task, run.loaded), layers)
    return CurvatureCallback(
        # the first ones, so that all methods and seeds are measured on the same
        run.dealt(run.batches(run.task.train[: settings.curvature_examples or _NUM_DURING])),
        every=settings.curvature_every,
        path=run.folder.curvature,
        over=("weights",) if whole else settings.curvature_spaces or ("tangent", "factors"),
        layers=layers,
        trace_products=_BUDGET["trace_products"],
        seed=settings.seed,
    )


def check_reference(settings: RunSettings, task: Task) -> Reference | None:
    """Check that the reference of a run is full fine-tuning on the same examples in the same order."""
    if settings.reference is None:
        return None
    folder = Path(settings.reference)
    path = RunFolder(folder).record
    if not path.is_file():
        missing = "record.json is missing" if folder.exists() else no_such_path(folder)
        raise InputError(f"reference {folder} is not a finished run: {missing}")
    record = load_record(path)
    if record.recipe != "full" or record.status != "finished":
        raise InputError(
            f"reference must be a finished run of recipe full; {folder} contains a run of "
            f"{record.recipe}, {record.status}"
        )
    ours = settings.model_dump(mode="json") | {"data_fingerprint": task.fingerprint}
    if record.settings.get("data_fingerprint") != task.fingerprint:
        raise InputError(
            f"reference {folder} was trained on other examples: data is {record.settings.get('data')!r} there and "
            f"{settings.data!r} here, num_train {record.settings.get('num_train')} and {settings.num_train}"
        )
    for key in _SHARED:
        if record.settings.get(key) != ours[key]:
            raise InputError(
                f"reference {folder} is of another run: {key} is {record.settings.get(key)!r} there and "
                f"{ours[key]!r} here"
            )
    reference = Reference(folder)
    assert settings.measure_every is not None
    reference.check_steps(measured_steps(settings.num_steps(len(task.train)), settings.measure_every))
    return reference


def trajectory_points(folder: RunFolder) -> list[dict[str, float]]:
    """Return the totals of a run's measured points, with the spread over layers of what each layer has."""
    return [
        {"step": point.step, **_loss(point), **point.totals.known(), **_spread(point)}
        for point in read_trajectory(folder.trajectory)
    ]


def _loss(point: TrajectoryPoint) -> dict[str, float]:
    return {} if point.gradient_loss is None else {"gradient_loss": point.gradient_loss}


def _spread(point: TrajectoryPoint) -> dict[str, float]:
    # mean, and the 10th and the 90th percentile
    found = {}
    for key in SPREAD_OVER_LAYERS:
        values = [value for layer in point.layers.values() if (value := getattr(layer, key)) is not None]
        if values:
            low, high = np.quantile(values, [0.1, 0.9]).tolist()
            found |= {f"{key}_mean": fmean(values), f"{key}_low": low, f"{key}_high": high}
    return found


def curvature_points(folder: RunFolder) -> list[dict[str, float]]:
    """Return the curvature at a run's measured points."""
    return [{"step": point.step} | point.known() for point in read_curvature(folder.curvature)]


def measure_flatness(run: Run, model: nn.Module, test_loss: float) -> Flatness:
    """Measure how flat the loss is where a run ended, and how far the test loss lies above it.

    The examples are the first of the task, so that all methods and seeds are measured on the same.
    """
    began = time.perf_counter()
    settings, task = run.settings, run.task
    examples = task.train[: settings.curvature_examples or _NUM_AT_THE_END]
    values: dict[str, Any] = {
        "train_loss": metrics_on(run, model, task.train[: len(task.test)])["loss"],
        "test_loss": test_loss,
        "num_examples": len(examples),
        "spaces": {},
        "products": 0,
    }
    try:
        values |= _curvature(run, model, run.dealt(run.batches(examples)))
    except InputError as problem:  # a method without second derivatives must not end the comparison
        values["missing"] = f"{settings.recipe}: {problem}"
    return Flatness(**values, seconds=time.perf_counter() - began)


def _curvature(run: Run, model: nn.Module, batches: list[Any]) -> dict[str, Any]:
    adapted = isinstance(model, PeftModel)
    layers: Any = run.settings.curvature_layers
    if not adapted:  # looked at in the layers that an adapter would have
        layers = chosen(target_layers(run.settings, run.task, run.loaded), layers)
    weights = Hessian(model, batches, over="weights", layers=layers, cache_graph=True)
    found, pairs = space_curvature(weights, **_BUDGET)
    ball = weights.sharpness(_RADIUS, steps=_ASCENT, random_starts=0, krylov=_KRYLOV, pairs=pairs)
    weights.release()
    spaces = {"weights": found}
    for space in ("tangent", "factors") if adapted else ():
        operator = Hessian(model, batches, over=space, cache_graph=True)
        spaces[space], _ = space_curvature(operator, **_BUDGET)
    return {
        "spaces": spaces,
        "weight_layers": run.settings.curvature_layers,
        "radius": _RADIUS,
        "rise": ball.rise,
        "products": sum(found.products for found in spaces.values()) + ball.products,
    }
