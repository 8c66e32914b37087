"""`tangora curvature`: the spectrum of the Hessian where a run ended, or of a model by name."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tangora._checks import InputError
from tangora._names import SPACES, Space
from tangora.curvature import CurvatureOperator, Eigenpairs, Hessian
from tangora.curvature.gauss_newton import GaussNewton
from tangora.experiments.curvature.settings import RECORD, CurvatureSettings
from tangora.experiments.curvature.spectra import (
    Budget,
    Meter,
    batch_noise_of,
    landscape_of,
    layers_of,
    sharpness_of,
    spectrum_of,
)
from tangora.experiments.curvature.subject import Subject, load_subject
from tangora.experiments.folders import LOG, check_output, claimed
from tangora.experiments.launcher import check_one_process
from tangora.experiments.logs import log_to
from tangora.experiments.provenance import provenance
from tangora.report import save_json
from tangora.report.curvature import CurvatureRecord, save_curvature_pictures, write_curvature
from tangora.report.curvature.record import Operator
from tangora.training.devices import check_device

PAGE, PICTURES = "curvature.html", "pictures"
_SPLITS = {"train": "training", "validation": "validation", "test": "test"}


@dataclass(frozen=True)
class CurvatureFiles:
    """What a measurement leaves in its output folder."""

    record: CurvatureRecord
    record_path: Path
    page: Path
    pictures: list[Path]


def measure_curvature(
    settings: CurvatureSettings,
    output: str | Path,
    *,
    command: str = "",
    phase: Callable[[str], None] = lambda _: None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> CurvatureFiles:
    """Measure the curvature of a loss where a run ended, or of a model by name.

    The output folder holds ``settings.json``, ``curvature.json`` (everything), ``curvature.html`` and ``pictures/``.
    Called again it writes them anew.
    """
    check_one_process("curvature")
    folder = Path(output)
    check_output(folder)
    check_device(settings.device)
    phase("loading")
    subject = load_subject(settings.source, settings.adapter, settings.model_dump(), settings.seed)
    spaces = chosen_spaces(settings, subject)
    _check_sizes(settings, subject)
    with claimed(folder, settings), log_to(folder / LOG):
        record = _measure(settings, subject, spaces, command, phase, progress)
        return CurvatureFiles(
            record,
            save_json(record, folder / RECORD),
            write_curvature(record, folder / PAGE),
            save_curvature_pictures(record, folder / PICTURES),
        )


def _check_sizes(settings: CurvatureSettings, subject: Subject) -> None:
    # the default shrinks to what there is; what was asked for does not
    there = len(getattr(subject.task, settings.split))
    if "num_examples" in settings.model_fields_set and settings.num_examples > there:
        raise InputError(
            f"num_examples must be at most {there}, the number of {_SPLITS[settings.split]} examples; got "
            f"{settings.num_examples}"
        )
    if settings.per_batch and there <= settings.batch_size:
        raise InputError(
            f"per_batch compares mini-batches, and {there} {_SPLITS[settings.split]} examples with batch_size = "
            f"{settings.batch_size} give one; give a smaller batch_size"
        )


def rewrite(folder: Path, record: CurvatureRecord) -> tuple[Path, list[Path]]:
    """Write page and pictures of a record again."""
    return write_curvature(record, folder / PAGE), save_curvature_pictures(record, folder / PICTURES)


def chosen_spaces(settings: CurvatureSettings, subject: Subject) -> list[Space]:
    """Choose the spaces of directions, those that do not depend on the choice of factors first."""
    if settings.over is None:
        return ["tangent", "factors"] if subject.ranks else ["weights"]
    if not subject.ranks and (wrong := [space for space in settings.over if space != "weights"]):
        raise InputError(
            f"over {wrong[0]} needs a LoRA adapter, and {settings.source} has none: give a run with one, --adapter, or "
            "--over weights"
        )
    wanted = set(settings.over)
    if wanted == {"factors"}:
        wanted.add("tangent")
    return [space for space in SPACES if space in wanted]


def _measure(
    settings: CurvatureSettings,
    subject: Subject,
    spaces: list[Space],
    command: str,
    phase: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> CurvatureRecord:
    began = time.perf_counter()
    batches = subject.batches(settings.split, settings.num_examples, settings.batch_size)
    main = _operator(Hessian, spaces[0], settings, subject, batches)
    meter = Meter(_expected(settings, spaces, len(main.space.layout)), progress)
    spectra, pairs = [], None
    for operator, space, kind in _operators(main, settings, subject, spaces, batches):
        phase(f"{space}, {kind}")
        budget = _budget(settings)
        with meter.stage(operator, budget.products) as tick:
            spectrum, found = spectrum_of(operator, space, kind, budget, tick)
        if isinstance(operator, Hessian):
            operator.release()  # the graphs of two spaces need not be held at once
        spectra.append(spectrum)
        pairs = pairs or found
    assert pairs is not None
    more = _more(settings, main, spaces[0], pairs, meter, phase)
    if settings.landscape:
        more["landscape"] = landscape_of(
            main,
            spaces[0],
            pairs,
            settings.landscape_points,
            lambda done, total: phase(f"landscape, {done} of {total}"),
        )
    return CurvatureRecord(
        title=subject.title,
        command=command,
        settings=settings.model_dump(mode="json") | {"data_fingerprint": subject.task.fingerprint},
        ranks=list(subject.ranks),
        loss=main.loss(),
        num_examples=sum(len(batch["labels"]) for batch in batches),
        num_batches=len(batches),
        split=_SPLITS[settings.split],
        differentiation=main.differentiation,
        dtype=str(main.dtype).removeprefix("torch."),
        spectra=spectra,
        **more,
        products=meter.done,
        seconds=time.perf_counter() - began,
        **provenance(subject.loaded.name),
    )


def _budget(settings: CurvatureSettings) -> Budget:
    return Budget(
        settings.top,
        settings.tolerance,
        settings.max_products,
        settings.probes,
        settings.steps,
        settings.trace_products,
        settings.seed,
    )


def _operators(
    main: CurvatureOperator,
    settings: CurvatureSettings,
    subject: Subject,
    spaces: list[Space],
    batches: list[dict[str, Tensor]],
) -> Iterator[tuple[CurvatureOperator, Space, Operator]]:
    yield main, spaces[0], "hessian"
    if settings.gauss_newton:
        yield _operator(GaussNewton, spaces[0], settings, subject, batches), spaces[0], "gauss-newton"
    for space in spaces[1:]:
        yield _operator(Hessian, space, settings, subject, batches), space, "hessian"


def _operator(
    kind: Any, space: Space, settings: CurvatureSettings, subject: Subject, batches: list[dict[str, Tensor]]
) -> Any:
    options: dict[str, Any] = {"cache_graph": settings.cache_graph} if kind is Hessian else {}
    return kind(
        subject.model,
        batches,
        over=space,
        layers=settings.layers,
        dtype=torch.float64 if settings.float64 else None,
        **options,
    )


def _more(
    settings: CurvatureSettings,
    main: Any,
    space: Space,
    pairs: Eigenpairs,
    meter: Meter,
    phase: Callable[[str], None],
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    budget = _budget(settings)
    if settings.per_layer or settings.layer_eigenvalues:
        phase("layers")
        planned = budget.layer_products(len(main.space.layout) if settings.layer_eigenvalues else 0)
        with meter.stage(main, planned) as tick:
            found["layers"] = layers_of(main, space, budget, settings.layer_eigenvalues, tick)
    if settings.per_batch:
        phase("mini-batches")
        with meter.stage(main, budget.batch_products) as tick:
            found["batch_noise"] = batch_noise_of(main, space, budget, tick)
    if settings.radius:
        phase("sharpness")
        with meter.stage(main, budget.sharpness_products) as tick:
            found["sharpness"] = [sharpness_of(main, space, pairs, settings.radius, budget, tick)]
    return found


def _expected(settings: CurvatureSettings, spaces: list[Space], num_layers: int) -> int:
    budget = _budget(settings)
    total = budget.products * (len(spaces) + settings.gauss_newton)
    if settings.per_layer or settings.layer_eigenvalues:
        total += budget.layer_products(num_layers if settings.layer_eigenvalues else 0)
    if settings.per_batch:
        total += budget.batch_products
    return total + (budget.sharpness_products if settings.radius else 0)
