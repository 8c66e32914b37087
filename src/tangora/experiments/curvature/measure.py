"""`tangora curvature`: the spectrum of the Hessian where a run ended, or of a model by name."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from tangora._checks import InputError, check_choice
from tangora.curvature import CurvatureOperator, Eigenpairs, Hessian
from tangora.curvature.gauss_newton import GaussNewton
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
from tangora.experiments.logs import log_to
from tangora.experiments.provenance import provenance
from tangora.experiments.settings import Settings, claim_folder
from tangora.report import save_json
from tangora.report.curvature import CurvatureRecord, save_curvature_pictures, write_curvature
from tangora.report.curvature.record import SPACES, Operator, Space
from tangora.training.models import Kind

RECORD, PAGE, PICTURES = "curvature.json", "curvature.html", "pictures"
_SPLITS = {"train": "training", "validation": "validation", "test": "test"}


class CurvatureSettings(Settings):
    """Whose curvature, on what data, and how much of it; what is not given is the run's own."""

    source: str = Field(
        default="minilm-l6", description="Run folder, or a model: packaged name, folder, hub name."
    )
    data: str | None = Field(
        default=None,
        description="Packaged name, reasoning-gym:<name>, local file or hub name; default: the run's, or bbc-news.",
    )
    kind: Kind | None = Field(
        default=None, description="classification or causal; default: what the data is."
    )
    text_column: str | None = Field(default=None, description="Column of the text.")
    label_column: str | None = Field(default=None, description="Column of the label.")
    prompt_column: str | None = Field(default=None, description="Column of the prompt.")
    completion_column: str | None = Field(default=None, description="Column of the completion.")
    num_train: int | None = Field(default=None, ge=1, description="Training examples, as in train.")
    num_validation: int | None = Field(default=None, ge=1, description="Examples kept apart, as in train.")
    num_test: int | None = Field(default=None, ge=1, description="Examples kept apart, as in train.")
    max_length: int | None = Field(
        default=None, ge=2, description="Tokens per example; default: the run's, or 128."
    )
    adapter: str | None = Field(default=None, description="Folder of a saved adapter, for a model.")
    split: Literal["train", "validation", "test"] = Field(
        default="train", description="Whose loss: train, validation or test."
    )
    num_examples: int = Field(default=32, ge=1, description="Examples, the first of the split.")
    batch_size: int = Field(
        default=8, ge=1, description="Examples at once, and in a mini-batch of --per-batch."
    )
    over: list[Space] | None = Field(
        default=None,
        min_length=1,
        description="tangent, factors, weights, separated by commas; default: tangent,factors with an adapter, "
        "weights without.",
    )
    layers: list[str] | None = Field(
        default=None,
        min_length=1,
        description="Names or patterns of layers, separated by commas; default: all.",
    )
    top: int = Field(default=5, ge=1, description="Largest eigenvalues.")
    tolerance: float = Field(default=1e-2, gt=0, lt=1, description="Relative residual of an eigenvalue.")
    max_products: int = Field(default=20, ge=2, description="Products that the eigenvalues may take.")
    probes: int = Field(default=2, ge=1, description="Random vectors of the spectral density.")
    steps: int = Field(default=10, ge=2, description="Lanczos steps for each.")
    trace_products: int = Field(default=9, ge=6, description="Products that the trace may take.")
    radius: float = Field(
        default=0.05, ge=0, description="Radius of the ball in which the largest loss is looked for; 0: none."
    )
    gauss_newton: bool = Field(default=False, description="The Gauss-Newton matrix beside the Hessian.")
    per_layer: bool = Field(
        default=False, description="Trace and part in the top eigenvector of every layer."
    )
    layer_eigenvalues: bool = Field(
        default=False, description="Also every layer's own largest eigenvalue, an iteration for each."
    )
    per_batch: bool = Field(default=False, description="Largest eigenvalue and trace of every mini-batch.")
    landscape: bool = Field(default=False, description="The loss along and across the top eigenvectors.")
    landscape_points: int = Field(default=11, ge=3, description="Points along each direction, odd.")
    cache_graph: bool | None = Field(
        default=None,
        description="Keep the graph of every batch: half the time, much memory; default: where there is one batch.",
    )
    float64: bool = Field(default=False, description="Compute in float64.")
    seed: int = Field(default=0, ge=0, description="Seed of random vectors and of a new head.")

    @field_validator("layers", mode="before")
    @classmethod
    def _layer_names(cls, value: object) -> object:
        return _separated(value)

    @field_validator("over", mode="before")
    @classmethod
    def _space_names(cls, value: object) -> object:
        names = _separated(value)
        for name in names if isinstance(names, list) else ():
            check_choice("over", name, SPACES)
        return names

    @field_validator("landscape_points")
    @classmethod
    def _odd(cls, points: int) -> int:
        if points % 2 == 0:
            raise ValueError(
                f"landscape_points must be odd, so that the point itself is one of them; got {points}"
            )
        return points

    def budget(self) -> Budget:
        """Return what a spectrum may cost."""
        return Budget(
            self.top,
            self.tolerance,
            self.max_products,
            self.probes,
            self.steps,
            self.trace_products,
            self.seed,
        )


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

    Args:
        settings: What to measure.
        output: Output folder.
        command: The command line, for the record.
        phase: Called with the name of what begins.
        progress: Hears of products with the matrix that were made, and how many are expected at most.

    Returns:
        The record, and where the files are.

    Raises:
        InputError: If something in the settings cannot be used, or the folder belongs to another configuration.
    """
    folder = Path(output)
    phase("loading")
    subject = load_subject(settings.source, settings.adapter, settings.model_dump(), settings.seed)
    spaces = chosen_spaces(settings, subject)
    claim_folder(folder, settings)
    with log_to(folder / "log.txt"):
        record = _measure(settings, subject, spaces, command, phase, progress)
    return CurvatureFiles(
        record,
        save_json(record, folder / RECORD),
        write_curvature(record, folder / PAGE),
        save_curvature_pictures(record, folder / PICTURES),
    )


def rewrite(folder: Path, record: CurvatureRecord) -> tuple[Path, list[Path]]:
    """Write page and pictures of a record again.

    Args:
        folder: Its folder.
        record: The record.

    Returns:
        The page, and the pictures.
    """
    return write_curvature(record, folder / PAGE), save_curvature_pictures(record, folder / PICTURES)


def chosen_spaces(settings: CurvatureSettings, subject: Subject) -> list[Space]:
    """Choose the spaces of directions, those that do not depend on the choice of factors first.

    Args:
        settings: What was asked for.
        subject: What is measured.

    Returns:
        The spaces; with factors always the tangent space or the weights, beside which alone they are shown.

    Raises:
        InputError: If a space needs an adapter that there is not.
    """
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
        budget = settings.budget()
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
        **provenance(),
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
    budget = settings.budget()
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
    budget = settings.budget()
    total = budget.products * (len(spaces) + settings.gauss_newton)
    if settings.per_layer or settings.layer_eigenvalues:
        total += budget.layer_products(num_layers if settings.layer_eigenvalues else 0)
    if settings.per_batch:
        total += budget.batch_products
    return total + (budget.sharpness_products if settings.radius else 0)


def _separated(value: object) -> object:
    # names come separated by commas from the command line
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value
