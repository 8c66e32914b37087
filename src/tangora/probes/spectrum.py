r"""Singular values and vectors of the full gradient, by randomized subspace iteration through probes.

$Y = G\,\Omega \to Q = \mathrm{qr}(Y) \to C = Q^\top G$, optionally with power iterations in between. The same
$\Omega$ serves all batches, so that the products are those of the mean gradient; every pass replays the batches.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tangora._checks import InputError, check_whole
from tangora._types import LossFn
from tangora.geometry.sketch import (
    LowRankSVD,
    orthonormalize,
    outside_energy,
    svd_from_one_pass,
    svd_from_range,
)
from tangora.probes.batches import as_batches, num_batches
from tangora.probes.gradient import GradientProbe, Request
from tangora.probes.layers import ProbedLayer, probed_layers
from tangora.probes.ranks import collective

Report = bool | Callable[[int, int | None], None]
"""Whether to draw a progress bar, or what hears of it: batches read, and their total where it is known."""


@dataclass(frozen=True)
class GradientSpectrum:
    """The leading part of one layer's gradient.

    Attributes:
        svd: Leading singular triplets; the last few of them (the oversampling) are rough.
        energy: Estimate of the squared Frobenius norm of the whole gradient.
        energy_error: Its standard error; 0 where nothing lies outside the triplets.
    """

    svd: LowRankSVD
    energy: float
    energy_error: float


@collective
def gradient_spectra(
    model: nn.Module,
    batches: Iterable[Any],
    rank: int | Mapping[str, int],
    *,
    layers: Sequence[ProbedLayer] | None = None,
    oversampling: int = 8,
    power_iterations: int = 1,
    one_pass: bool = False,
    tail_probes: int = 8,
    seed: int = 0,
    loss_fn: LossFn | None = None,
    progress: Report = True,
) -> dict[str, GradientSpectrum]:
    r"""Estimate the leading singular triplets of the mean gradient of many layers at once.

    Takes ``2 (power_iterations + 1)`` passes over the batches, or one. No gradient of a weight's size is formed.

    Args:
        model: PEFT or plain model, also quantized; left as it was found.
        batches: List, DataLoader or iterator of model inputs; 8 to 64 examples do.
        rank: Number of triplets wanted, for all layers or by name; at most ``min(m, n)`` are returned.
        layers: Which; default all adapted layers of a PEFT model, all linear layers of a plain one.
        oversampling: Additional directions, which make the wanted ones accurate.
        power_iterations: Each takes two more passes and squares the decay of the spectrum.
        one_pass: Read the gradient once only (no replay of batches), at a larger error; no power iterations.
        tail_probes: Random vectors that estimate the energy outside the triplets; at least 2.
        seed: Seed of the random vectors; the global random state is neither used nor changed.
        loss_fn: ``loss_fn(model, batch)``; default the model's own loss.
        progress: See `Report`.

    Returns:
        By name of the layer, on the model's device, in float32 (float64 for a float64 model); without layers that the
        model does not call with gradients on these batches.

    Raises:
        InputError: If there are no batches, or a number is out of range.
    """
    for name, value, low in (
        ("oversampling", oversampling, 0),
        ("power_iterations", power_iterations, 0),
        ("tail_probes", tail_probes, 2),
    ):
        check_whole(name, value, low=low)
    batches = as_batches(batches)
    layers = probed_layers(model) if layers is None else layers
    wanted = {name: r + oversampling for name, r in _ranks(layers, rank).items()}
    passes = 1 if one_pass else 2 * (power_iterations + 1)
    with (
        reporting(progress, batches, passes) as heard,
        GradientProbe(model, layers, loss_fn=loss_fn, progress=heard) as probe,
    ):
        draw = _Gaussian(probe, seed)
        if one_pass:
            spectra = _one_pass(probe, batches, draw, wanted, tail_probes)
        else:
            spectra = _several_passes(probe, batches, draw, wanted, tail_probes, power_iterations)
        return {name: spectrum for name, spectrum in spectra.items() if name in probe.reached}


@collective
def gradient_norms(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    layers: Sequence[ProbedLayer] | None = None,
    memory: int = 256 * 2**20,
    loss_fn: LossFn | None = None,
    progress: Report = True,
) -> dict[str, float]:
    r"""Compute $\|G\|_F$ of the mean gradient exactly, a few layers at a time.

    Args:
        model: PEFT or plain model; left as it was found.
        batches: List, DataLoader or iterator of model inputs.
        layers: Which; default as for `gradient_spectra`.
        memory: Bytes of gradients held at once; a layer that needs more is read alone. One pass for each group.
        loss_fn: ``loss_fn(model, batch)``; default the model's own loss.
        progress: See `Report`.

    Returns:
        Frobenius norms by name of the layer, without layers that the model does not call with gradients.
    """
    batches = as_batches(batches)
    layers = probed_layers(model) if layers is None else layers
    groups = list(grouped(layers, memory))
    norms: dict[str, float] = {}
    with (
        reporting(progress, batches, len(groups)) as heard,
        GradientProbe(model, layers, loss_fn=loss_fn, progress=heard) as probe,
    ):
        for group in groups:
            readings = probe.read(batches, {layer.name: Request(dense=True) for layer in group})
            for name, reading in readings.items():
                if name in probe.reached:
                    norms[name] = float(torch.linalg.matrix_norm(reading.dense))
    return norms


def _several_passes(
    probe: GradientProbe,
    batches: Iterable[Any],
    draw: "_Gaussian",
    wanted: dict[str, int],
    tail_probes: int,
    power_iterations: int,
) -> dict[str, GradientSpectrum]:
    right = {name: draw.right(name, width) for name, width in wanted.items()}
    for _ in range(power_iterations):
        basis = _bases(probe, batches, right)
        readings = probe.read(batches, {name: Request(left=Q) for name, Q in basis.items()})
        right = {name: orthonormalize(reading.left.T) for name, reading in readings.items()}
    basis = _bases(probe, batches, right)
    requests = {
        name: Request(right=draw.tail(name, tail_probes), left=Q)  # fresh vectors, independent of Q
        for name, Q in basis.items()
    }
    spectra = {}
    for name, reading in probe.read(batches, requests).items():
        svd = svd_from_range(basis[name], reading.left)
        tail, error = outside_energy(basis[name], reading.right)
        spectra[name] = GradientSpectrum(svd, float(svd.S.square().sum() + tail), float(error))
    return spectra


def _bases(probe: GradientProbe, batches: Iterable[Any], right: dict[str, Tensor]) -> dict[str, Tensor]:
    readings = probe.read(batches, {name: Request(right=omega) for name, omega in right.items()})
    return {name: orthonormalize(reading.right) for name, reading in readings.items()}


def _one_pass(
    probe: GradientProbe,
    batches: Iterable[Any],
    draw: "_Gaussian",
    wanted: dict[str, int],
    tail_probes: int,
) -> dict[str, GradientSpectrum]:
    requests = {
        name: Request(
            right=torch.cat([draw.right(name, width), draw.tail(name, tail_probes)], dim=1),
            left=draw.left(name, 2 * width),
        )
        for name, width in wanted.items()
    }
    spectra = {}
    for name, reading in probe.read(batches, requests).items():
        probes = requests[name].left
        assert probes is not None
        svd = svd_from_one_pass(reading.right[:, :-tail_probes], reading.left, probes.T)
        energies = reading.right[:, -tail_probes:].square().sum(0)  # unbiased, each of them
        error = energies.std() / tail_probes**0.5
        spectra[name] = GradientSpectrum(svd, float(energies.mean()), float(error))
    return spectra


def _ranks(layers: Sequence[ProbedLayer], rank: int | Mapping[str, int]) -> dict[str, int]:
    ranks = {layer.name: rank if isinstance(rank, int) else rank.get(layer.name, 0) for layer in layers}
    if low := next((name for name, r in ranks.items() if r < 1), None):
        raise InputError(f"rank must be at least 1 for every layer; got {ranks[low]} for {low}")
    return ranks


class _Gaussian:
    """Standard normal vectors, the same ones on every device and rank."""

    def __init__(self, probe: GradientProbe, seed: int):
        self._probe = probe
        self._generators = {
            name: torch.Generator().manual_seed((seed << 20) + index)
            for index, name in enumerate(probe.layers)
        }

    def right(self, name: str, width: int) -> Tensor:
        layer = self._probe.layers[name]
        return self._draw(name, layer.n, min(width, layer.m, layer.n))

    def left(self, name: str, width: int) -> Tensor:
        layer = self._probe.layers[name]
        return self._draw(name, layer.m, min(width, layer.m))

    def tail(self, name: str, count: int) -> Tensor:
        return self._draw(name, self._probe.layers[name].n, count)

    def _draw(self, name: str, rows: int, columns: int) -> Tensor:
        drawn = torch.randn(rows, columns, generator=self._generators[name], dtype=self._probe.dtype)
        return drawn.to(self._probe.device)


def grouped(layers: Sequence[ProbedLayer], memory: int) -> Iterator[list[ProbedLayer]]:
    """Split layers into groups whose dense gradients fit into memory together.

    Args:
        layers: The layers.
        memory: Bytes for float32 gradients; a layer that needs more gets a group of its own.

    Yields:
        Neighbouring layers.
    """
    group: list[ProbedLayer] = []
    held = 0
    for layer in layers:
        size = 4 * layer.m * layer.n
        if group and held + size > memory:
            yield group
            group, held = [], 0
        group.append(layer)
        held += size
    yield group


@contextlib.contextmanager
def reporting(progress: Report, batches: Iterable[Any], passes: int) -> Iterator[Callable[[int], None]]:
    """Count batches over several passes, on a bar or for whoever listens.

    Args:
        progress: See `Report`.
        batches: What each pass reads.
        passes: How many there will be.

    Yields:
        What to call after each batch.
    """
    count_of_all = num_batches(batches)
    total = None if count_of_all is None else passes * count_of_all
    done = 0

    def count(_: int) -> None:
        nonlocal done
        done += 1
        if callable(progress):
            progress(done, total)
        else:
            bar.update()

    # drawn on terminals only
    with tqdm(
        total=total, desc="gradient", unit="batch", leave=False, disable=None if progress is True else True
    ) as bar:
        yield count
