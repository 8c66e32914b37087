"""What a run measures on its way, by name: its trajectory, also against full fine-tuning, and its curvature."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from tangora._checks import InputError
from tangora.adapters import discover
from tangora.diagnostics import Reference, Trajectory, WeightTrack, find_tracks, fingerprint, write_snapshot
from tangora.experiments.run.loading import prepared_twin
from tangora.experiments.settings import RunSettings
from tangora.recipes import recipe
from tangora.report import load_record
from tangora.training.callbacks import TrajectoryRecorder, measured_steps, read_trajectory
from tangora.training.curvature import CurvatureCallback, read_curvature
from tangora.training.data import Task
from tangora.training.models import LoadedModel

TRAJECTORY, SNAPSHOTS, CURVATURE = "trajectory.jsonl", "snapshots", "curvature.jsonl"
# one batch by default, whose graph is kept from product to product
_CURVATURE_EXAMPLES = 16

# what makes two runs see the same examples in the same order
_SHARED = ("seed", "batch_size", "accumulate", "max_length")


def trajectory_recorder(
    settings: RunSettings,
    task: Task,
    loaded: LoadedModel,
    model: nn.Module,
    folder: Path,
    as_batches: Callable[[Sequence[Any]], list[Any]],
) -> TrajectoryRecorder | None:
    """Make what follows a run, before training."""
    if settings.measure_every is None or not recipe(settings.recipe).trains:
        return None
    whole = not isinstance(model, PeftModel)
    if whole and settings.measure_gradient:
        raise InputError(
            f"measure_gradient needs an adapter, and recipe {settings.recipe} has none; "
            f"got {settings.measure_gradient}"
        )
    tracks = find_tracks(model, target_layers(loaded, task, settings) if whole else None)
    reference = check_reference(settings, task)
    if reference is not None:
        reference.check_layers(tracks)
    batches = None
    if settings.measure_gradient:
        count = min(settings.measure_gradient, len(task.train))
        chosen = random.Random(settings.seed).sample(range(len(task.train)), count)
        batches = as_batches([task.train[index] for index in chosen])
    followed = Trajectory(model, tracks, reference=reference, batches=batches, seed=settings.seed)
    weights = [track for track in tracks if isinstance(track, WeightTrack)]
    base = fingerprint(weights) if weights else ""

    def save(step: int) -> None:
        write_snapshot(folder / SNAPSHOTS, step, weights, base)

    return TrajectoryRecorder(
        folder / TRAJECTORY, followed, settings.measure_every, save if weights else None
    )


def curvature_callback(
    settings: RunSettings,
    task: Task,
    loaded: LoadedModel,
    model: nn.Module,
    folder: Path,
    as_batches: Callable[[Sequence[Any]], list[Any]],
) -> CurvatureCallback | None:
    """Make what measures the curvature of a run, before training."""
    if settings.curvature_every is None or not recipe(settings.recipe).trains:
        return None
    whole = not isinstance(model, PeftModel)
    return CurvatureCallback(
        # the first ones, so that all methods and seeds are measured on the same
        as_batches(task.train[: settings.curvature_examples or _CURVATURE_EXAMPLES]),
        every=settings.curvature_every,
        path=folder / CURVATURE,
        over=("weights",) if whole else ("tangent", "factors"),
        layers=target_layers(loaded, task, settings) if whole else None,
        seed=settings.seed,
    )


def check_reference(settings: RunSettings, task: Task) -> Reference | None:
    """Check that the reference of a run is full fine-tuning on the same examples in the same order."""
    if settings.reference is None:
        return None
    folder = Path(settings.reference)
    if not (folder / "record.json").is_file():
        raise InputError(f"reference {folder} is no finished run: record.json is missing")
    record = load_record(folder / "record.json")
    if record.recipe != "full" or record.status != "finished":
        raise InputError(
            f"reference must be a finished run of recipe full; {folder} holds one of {record.recipe}, {record.status}"
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


def target_layers(loaded: LoadedModel, task: Task, settings: RunSettings) -> list[str]:
    """List the layers that an adapter of these settings would have, for a model that is trained whole."""
    # PEFT itself chooses
    plain = settings.model_copy(update={"rank": 1, "rank_plan": None})
    adapted = prepared_twin("lora", plain, task, loaded)
    return [pair.name.removeprefix("base_model.model.") for pair in discover(adapted).pairs]


def trajectory_points(folder: Path) -> list[dict[str, float]]:
    """Return the totals of a run's measured points."""
    return [{"step": point.step} | point.totals.known() for point in read_trajectory(folder / TRAJECTORY)]


def curvature_points(folder: Path) -> list[dict[str, float]]:
    """Return the curvature at a run's measured points."""
    return [{"step": point.step} | point.known() for point in read_curvature(folder / CURVATURE)]
