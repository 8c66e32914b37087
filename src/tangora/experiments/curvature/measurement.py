"""`tangora curvature`: the spectrum of the Hessian where a run ended, or of a model by name."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tangora._checks import InputError
from tangora._folders import OutputFolder
from tangora._names import SPACES, SpaceName
from tangora._types import Progress
from tangora.curvature import (
    CurvatureOperator,
    Eigenpairs,
    Hessian,
    SpectralDensity,
    batch_statistics,
    layer_curvatures,
)
from tangora.experiments.curvature.measured_model import MeasuredModel, load_measured
from tangora.experiments.folders import check_output, claimed
from tangora.experiments.measurement_settings import CURVATURE_RECORD, CurvatureSettings
from tangora.experiments.process import check_one_process, log_to
from tangora.experiments.provenance import provenance
from tangora.report import save_json
from tangora.report.curvature import (
    CurvatureRecord,
    Density,
    LandscapeRecord,
    Line,
    Plane,
    SharpnessRecord,
    Spectrum,
    save_curvature_pictures,
    write_curvature,
)
from tangora.report.curvature.record import OPERATORS, Operator
from tangora.report.setup_facts import SPLITS
from tangora.training.devices import check_device

PAGE, PICTURES = "curvature.html", "pictures"
_PEFT = "base_model.model."
# products that one largest eigenvalue is expected to take
_ITERATIONS = 12
# of the search for the largest loss in a ball: dimension of its Krylov space, and gradients from each start
_KRYLOV, _ASCENT = 4, 3


@dataclass(frozen=True)
class CurvatureFiles:
    """Files of a measurement in its output folder."""

    record: CurvatureRecord
    record_path: Path
    page: Path
    pictures: list[Path]


def measure_curvature(
    settings: CurvatureSettings, output: str | Path, *, command: str = "", progress: Progress | None = None
) -> CurvatureFiles:
    """Measure the curvature of a loss where a run ended, or of a model by name.

    The output folder holds ``settings.json``, ``curvature.json`` (everything), ``curvature.html`` and ``pictures/``.
    Called again it writes them anew.
    """
    check_one_process("curvature")
    folder = Path(output)
    check_output(folder)
    check_device(settings.device)
    if progress is not None:
        progress("loading", 0, 0)
    measured = load_measured(settings.source, settings.adapter, settings.model_dump(), settings.seed)
    spaces = _chosen_spaces(settings, measured)
    _check_sizes(settings, measured)
    with claimed(folder, settings), log_to(OutputFolder(folder).log):
        record = _measure(settings, measured, spaces, command, progress)
        return CurvatureFiles(record, save_json(record, folder / CURVATURE_RECORD), *rewrite(folder, record))


def rewrite(folder: Path, record: CurvatureRecord) -> tuple[Path, list[Path]]:
    """Write page and pictures of a record again."""
    return write_curvature(record, folder / PAGE), save_curvature_pictures(record, folder / PICTURES)


def _check_sizes(settings: CurvatureSettings, measured: MeasuredModel) -> None:
    # the default shrinks to what there is; what was asked for does not
    there = len(getattr(measured.task, settings.split))
    if "num_examples" in settings.model_fields_set and settings.num_examples > there:
        raise InputError(
            f"num_examples must be at most {there}, the number of {SPLITS[settings.split]} examples; got "
            f"{settings.num_examples}"
        )
    if settings.per_batch and there <= settings.batch_size:
        raise InputError(
            f"per_batch compares mini-batches, and {there} {SPLITS[settings.split]} examples with batch_size = "
            f"{settings.batch_size} are only one mini-batch; use a smaller batch_size"
        )


def _chosen_spaces(settings: CurvatureSettings, measured: MeasuredModel) -> list[SpaceName]:
    # those that do not depend on the choice of factors first
    if settings.over is None:
        return ["tangent", "factors"] if measured.ranks else ["weights"]
    if not measured.ranks and (wrong := [space for space in settings.over if space != "weights"]):
        raise InputError(
            f"over {wrong[0]} needs a LoRA adapter, but {settings.source} has none: pass a run with an "
            "adapter, --adapter, or --over weights"
        )
    wanted = set(settings.over)
    if wanted == {"factors"}:
        wanted.add("tangent")
    return [space for space in SPACES if space in wanted]


def _measure(
    settings: CurvatureSettings,
    measured: MeasuredModel,
    spaces: list[SpaceName],
    command: str,
    progress: Progress | None,
) -> CurvatureRecord:
    began = time.perf_counter()
    found = _Measurement(settings, measured, spaces)
    main, parts = found.main, found.parts()
    meter = _Meter(sum(part.products for part in parts), progress)
    for part in parts:
        operator = part.operator()
        with meter.stage(part.name, operator, part.products) as counted:
            part.measure(operator, counted)
    if settings.landscape:
        found.more["landscape"] = _landscape(main, found.pairs, settings.landscape_points, meter)
    return CurvatureRecord(
        title=measured.title,
        command=command,
        settings=settings.model_dump(mode="json") | {"data_fingerprint": measured.task.fingerprint},
        ranks=list(measured.ranks),
        loss=main.loss(),
        num_examples=sum(len(batch["labels"]) for batch in found.batches),
        num_batches=len(found.batches),
        split=SPLITS[settings.split],
        differentiation=main.differentiation,
        dtype=str(main.dtype).removeprefix("torch."),
        spectra=found.spectra,
        **found.more,
        products=meter.done,
        seconds=time.perf_counter() - began,
        **provenance(measured.loaded.name),
    )


@dataclass(frozen=True)
class _Part:
    """A part of the work: how many products it is expected to take, with what, and what makes them."""

    name: str
    products: int
    operator: Callable[[], CurvatureOperator]
    measure: Callable[[Any, Progress], None]


class _Measurement:
    """The parts of a measurement at a point, and their results."""

    pairs: Eigenpairs
    """Eigenpairs of the main operator, whose spectrum is the first part."""

    def __init__(self, settings: CurvatureSettings, measured: MeasuredModel, spaces: list[SpaceName]):
        self._settings, self._model, self._spaces = settings, measured.model, spaces
        self.batches = measured.batches(settings.split, settings.num_examples, settings.batch_size)
        self.main: Hessian = self._operator("hessian", spaces[0])
        self.spectra: list[Spectrum] = []
        self.more: dict[str, Any] = {}

    def parts(self) -> list[_Part]:
        """List what the settings ask for; what needs the eigenpairs stands behind the spectra."""
        settings, main = self._settings, self.main
        first, *others = self._spaces
        probes = max(2, settings.trace_products)
        each = settings.max_products + settings.probes * settings.steps + settings.trace_products
        beside: list[Operator] = [
            name for name, kind in OPERATORS.items() if kind.flag and getattr(settings, kind.flag)
        ]
        spectra: list[tuple[Operator, SpaceName]] = [
            *((name, first) for name in beside),
            *(("hessian", space) for space in others),
        ]
        parts = [_Part(f"{first}, hessian", each, lambda: main, partial(self._spectrum, "hessian", first))]
        for name, space in spectra:
            make, measure = partial(self._operator, name, space), partial(self._spectrum, name, space)
            parts.append(_Part(f"{space}, {name}", each, make, measure))
        per_layer = _ITERATIONS * (1 + len(main.space.layout) * settings.layer_eigenvalues) + probes
        # the products of all mini-batches together are counted as one
        per_batch = 2 * _ITERATIONS + probes + 1
        of_main = [
            (settings.per_layer or settings.layer_eigenvalues, "layers", per_layer, self._layers),
            (settings.per_batch, "mini-batches", per_batch, self._batch_noise),
            (settings.radius > 0, "sharpness", _KRYLOV, self._sharpness),
        ]
        parts += [
            _Part(name, products, lambda: main, measure)
            for wanted, name, products, measure in of_main
            if wanted
        ]
        return parts

    def _operator(self, name: Operator, space: SpaceName) -> Any:
        settings = self._settings
        options: dict[str, Any] = {"cache_graph": settings.cache_graph} if name == "hessian" else {}
        dtype = torch.float64 if settings.float64 else None
        return OPERATORS[name].make(
            self._model, self.batches, over=space, layers=settings.layers, dtype=dtype, **options
        )

    def _spectrum(
        self, name: Operator, space: SpaceName, operator: CurvatureOperator, progress: Progress
    ) -> None:
        settings, size = self._settings, operator.shape[0]
        began, before = time.perf_counter(), operator.num_products
        options: dict[str, Any] = {"seed": settings.seed, "progress": progress}
        gradient_norm = float(operator.gradient().double().norm())
        pairs = operator.top_eigenpairs(
            min(settings.top, size), tol=settings.tolerance, max_products=settings.max_products, **options
        )
        density = operator.spectral_density(
            probes=settings.probes, steps=min(settings.steps, size), **options
        )
        trace = operator.trace(products=settings.trace_products, **options)
        self.spectra.append(
            Spectrum(
                space=space,
                operator=name,
                size=size,
                num_layers=len(operator.space.layout),
                gradient_norm=gradient_norm,
                eigenvalues=pairs.eigenvalues,
                converged=pairs.converged,
                trace=trace,
                frobenius_norm=density.moment(2).scaled(size).root(),  # its probes have seen |H|^2 = n E[λ^2]
                density=_drawn(density),
                products=operator.num_products - before,
                seconds=time.perf_counter() - began,
            )
        )
        if operator is self.main:
            self.pairs = pairs
        if isinstance(operator, Hessian):
            operator.release()  # the graphs of two spaces need not be held at once

    def _layers(self, operator: CurvatureOperator, progress: Progress) -> None:
        settings = self._settings
        layers = layer_curvatures(
            operator,
            probes=max(2, settings.trace_products),
            eigenvalues=settings.layer_eigenvalues,
            tol=settings.tolerance,
            seed=settings.seed,
            progress=progress,
        )
        self.more["layers"] = [replace(layer, name=layer.name.removeprefix(_PEFT)) for layer in layers]

    def _batch_noise(self, operator: CurvatureOperator, progress: Progress) -> None:
        settings = self._settings
        options = {"probes": max(2, settings.trace_products), "tol": settings.tolerance}
        self.more["batch_noise"] = batch_statistics(
            operator, seed=settings.seed, progress=progress, **options
        )

    def _sharpness(self, operator: Hessian, progress: Progress) -> None:
        settings = self._settings
        options = {"steps": _ASCENT, "random_starts": 0, "krylov": _KRYLOV, "pairs": self.pairs}
        ball = operator.sharpness(settings.radius, seed=settings.seed, progress=progress, **options)
        self.more["sharpness"] = [SharpnessRecord.model_validate(ball, from_attributes=True)]


class _Meter:
    """Counts products with the Hessian as they are made."""

    def __init__(self, total: int, progress: Progress | None):
        self.done, self.total, self._progress = 0, total, progress

    @contextlib.contextmanager
    def stage(self, what: str, operator: CurvatureOperator, planned: int) -> Iterator[Progress]:
        """Follow an operator through a part of the work; what it did not need of its plan is expected no more."""
        before = operator.num_products
        yield lambda *_: self.tell(what, operator.num_products - before)
        used = operator.num_products - before
        self.done, self.total = self.done + used, max(self.total + used - planned, self.done + used)
        self.tell(what)

    def tell(self, what: str, more: int = 0) -> None:
        """Say how many products are done, those of the present part included."""
        if self._progress is not None:
            self._progress(what, self.done + more, self.total)


def _drawn(density: SpectralDensity) -> Density:
    x = density.grid()
    return Density(
        nodes=[list(nodes) for nodes in density.nodes],
        weights=[list(weights) for weights in density.weights],
        x=x.tolist(),
        smoothed=density.smoothed(x).tolist(),
    )


def _landscape(operator: Hessian, pairs: Eigenpairs, points: int, meter: _Meter) -> LandscapeRecord:
    # along the leading eigenvectors and the gradient, and over the plane of the former; all go as far as the parabola
    # of the largest eigenvalue needs to double the loss
    loss, top = operator.loss(), float(pairs.values[0])
    options: dict[str, Any] = {
        "span": math.sqrt(2 * loss / top) if loss > 0 and top > 0 else 1.0,
        "points": points,
        "progress": lambda what, done, total: meter.tell(f"{what}, {done} of {total}"),
    }
    vectors = {f"eigenvector {index + 1}": vector for index, vector in enumerate(pairs.vectors.mT[:2])}
    gradient = operator.gradient()
    directions = vectors | ({"gradient": gradient / gradient.norm()} if gradient.any() else {})
    lines = []
    for name, vector in directions.items():
        found = operator.landscape({name: vector}, **options)
        lines.append(Line(direction=name, steps=found.coordinates[0].tolist(), losses=found.losses.tolist()))
    plane = None
    if len(vectors) == 2:
        found = operator.landscape(vectors, **options)
        across, along = found.names
        x, y = (values.tolist() for values in found.coordinates)
        plane = Plane(directions=(across, along), x=x, y=y, losses=found.losses.mT.tolist())
    return LandscapeRecord(space=operator.space.kind, lines=lines, plane=plane)
