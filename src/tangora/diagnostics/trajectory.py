r"""A training run as a path of weights: its length, its end, and the gradient energy that adapters capture on it.

Call `Trajectory.advance` after every optimizer step; `measure` returns a `TrajectoryPoint`. Both only read: model,
gradients, training mode and random states stay as they were.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean
from typing import Any

import torch
from torch import nn

from tangora.diagnostics.alignment import captured_share, condition_number, effective_rank, imbalance_norms
from tangora.diagnostics.gradient_views import GradientView, gradient_views, weight_views
from tangora.diagnostics.motion import AdapterTrack, Overlap, Track, overlap
from tangora.diagnostics.snapshots import Reference


@dataclass(frozen=True)
class Measures:
    r"""The measures of one layer, or of all, at one step.

    All norms are Frobenius norms of weights ($m \times n$), those over all layers of all of them together. Of condition
    numbers and largest angles the total is the largest, of relative imbalance and ranks the mean. A value is ``None``
    where it is not defined or was not asked for.
    """

    path_length: float
    r"""$\sum_t \|W_{t+1} - W_t\|_F$ over every optimizer step so far."""
    change: float
    r"""$\|W_t - W_0\|_F$ with the base weight $W_0$ (an initialization that moves it has a change at step 0)."""
    imbalance: float | None = None
    r"""$\|B^\top B - A A^\top\|_F$."""
    relative_imbalance: float | None = None
    r"""The same over $\|B^\top B\|_F + \|A A^\top\|_F$, in [0, 1]."""
    condition_A: float | None = None
    r"""Ratio of the extreme eigenvalues of $A A^\top$; ``None`` for a factor without full rank."""
    condition_B: float | None = None
    effective_rank: float | None = None
    """Exponential of the entropy of the singular values of $W_t - W_0$ (without DoRA's $D$)."""
    distance: float | None = None
    r"""$\|W_t - W_t^{\text{full}}\|_F$ to full fine-tuning at the same step."""
    relative_distance: float | None = None
    r"""The same over $\|W_t^{\text{full}} - W_0\|_F$; 1 for a weight that has not moved."""
    cosine: float | None = None
    r"""Between $W_t - W_0$ and $W_t^{\text{full}} - W_0$, in [-1, 1]."""
    gradient_norm: float | None = None
    r"""$\|G\|_F$ at $W_t$, on the examples given; $G = \partial L/\partial W$, the same quantity for every method."""
    gradient_stable_rank: float | None = None
    r"""$\|G\|_F^2 / \|G\|_2^2$."""
    gradient_effective_rank: float | None = None
    """Exponential of the entropy of the singular values of $G$; where dense gradients fit into 1 GiB together."""
    gradient_norm_A: float | None = None
    r"""$\|\partial L/\partial A\|_F$, which changes with the gauge."""
    gradient_norm_B: float | None = None
    reachable_energy: float | None = None
    r"""Most that an adapter of the rank could capture, $\sum_{i \le 2r} \sigma_i^2 / \|G\|_F^2$."""
    captured_energy: float | None = None
    r"""$\kappa = \|P_T(G)\|_F^2 / \|G\|_F^2$, in [0, 1]."""
    alignment_error: float | None = None
    r"""$\varepsilon = \|G - P_T(G)\|_F$."""
    left_angle: float | None = None
    """Largest principal angle of $B$'s columns and the $r$ leading left singular vectors of $G$, in degrees."""
    mean_left_angle: float | None = None
    right_angle: float | None = None
    """The same of $A$'s rows and the right singular vectors."""
    mean_right_angle: float | None = None

    def known(self) -> dict[str, float]:
        """Return the measured values, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class TrajectoryPoint:
    """One measured step; 0 is the start."""

    step: int
    totals: Measures
    layers: dict[str, Measures]
    """By path in the base model."""
    gradient_loss: float | None = None
    """Mean loss on the examples whose gradient was read."""


class Trajectory:
    """Measures the path of a model's weights during training.

    Call `begin` before the first step, `advance` after each, and `measure` whenever a point is wanted.

    Args:
        tracks: From `find_tracks`.
        reference: Full fine-tuning from the same base, whose weights at a measured step are compared with; their
            layers must have been checked.
        batches: Examples whose gradient is read at every measured step; see `gradient_views`.
        rank: Rank of the adapters that a model without them could have, for `Measures.reachable_energy`.
        seed: Seed of the random vectors for that.
    """

    def __init__(
        self,
        model: nn.Module,
        tracks: Sequence[Track],
        *,
        reference: Reference | None = None,
        batches: Iterable[Any] | None = None,
        rank: int = 8,
        seed: int = 0,
    ):
        self.tracks = tracks
        self._model = model
        self._reference = reference
        self._batches = batches
        self._rank = rank
        self._seed = seed
        self._whole = 0.0
        self._paths = {track.name: 0.0 for track in tracks}

    @property
    def path_length(self) -> float:
        """Length of the path of all weights so far."""
        return self._whole

    def state(self) -> dict[str, Any]:
        """Return the state that a resumed run passes to `begin`, as JSON can hold it."""
        return {"whole": self._whole, "layers": dict(self._paths)}

    @torch.no_grad()
    def begin(self, state: Mapping[str, Any] | None = None) -> None:
        """Start from where the model is, with the `state` it had there; default the start of training."""
        self._whole = state["whole"] if state else 0.0
        self._paths = {track.name: state["layers"][track.name] if state else 0.0 for track in self.tracks}
        for track in self.tracks:
            track.remember()

    @torch.no_grad()
    def advance(self) -> None:
        """Add the step that has just been taken to the path."""
        steps = torch.stack(
            [track.advance().double() for track in self.tracks]
        ).tolist()  # one synchronisation
        self._whole += math.hypot(*steps)
        for track, step in zip(self.tracks, steps, strict=True):
            self._paths[track.name] += step

    def measure(self, step: int) -> TrajectoryPoint:
        """Measure where the model is."""
        with torch.no_grad():
            changes = torch.stack([track.change_norm().double() for track in self.tracks]).tolist()
            overlaps = [self._overlap(track, step) for track in self.tracks] if self._reference else None
            factors = [_factors(track) for track in self.tracks if isinstance(track, AdapterTrack)]
        views, loss = self._gradient()
        layers = {
            track.name: Measures(
                self._paths[track.name],
                changes[index],
                **(factors[index] if factors else {}),
                **_of_overlap(overlaps[index] if overlaps else None),
                **_of_views([view] if (view := views.get(track.name)) else []),
            )
            for index, track in enumerate(self.tracks)
        }
        totals = Measures(
            self._whole,
            math.hypot(*changes),
            **_over_layers(factors),
            **_of_overlap(sum(overlaps, Overlap()) if overlaps else None),
            **_of_views([*views.values()]),
        )
        return TrajectoryPoint(step, totals, layers, loss)

    def _overlap(self, track: Track, step: int) -> Overlap:
        base = track.base()
        if step == 0:
            return overlap(track.change(), lambda rows: torch.zeros_like(base(rows)), track.shape[0])
        assert self._reference is not None
        weight = self._reference.weight(step, track.name)

        def other(rows: slice) -> Any:
            first = base(rows)
            return weight[rows].to(first) - first

        return overlap(track.change(), other, track.shape[0])

    def _gradient(self) -> tuple[dict[str, GradientView], float | None]:
        # by path in the base model
        if self._batches is None:
            return {}, None
        pairs = [track.pair for track in self.tracks if isinstance(track, AdapterTrack)]
        if not pairs:
            return weight_views(self._model, self.tracks, self._batches, rank=self._rank, seed=self._seed)
        views, loss = gradient_views(self._model, pairs, self._batches, seed=self._seed)
        return {pair.path: views[pair.name] for pair in pairs if pair.name in views}, loss


def _factors(track: AdapterTrack) -> dict[str, Any]:
    A, B = track.pair.factors()
    imbalance, relative = imbalance_norms(A, B)
    update = track.place().update
    return {
        "imbalance": imbalance,
        "relative_imbalance": relative,
        "condition_A": condition_number(A),
        "condition_B": condition_number(B.mT),
        "effective_rank": effective_rank(*update),
    }


def _over_layers(factors: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if not factors:
        return {}

    def each(key: str) -> list[Any]:
        return [layer[key] for layer in factors]

    def worst(key: str) -> float | None:
        return None if None in each(key) else max(each(key))

    return {
        "imbalance": math.hypot(*each("imbalance")),
        "relative_imbalance": fmean(each("relative_imbalance")),
        "condition_A": worst("condition_A"),
        "condition_B": worst("condition_B"),
        "effective_rank": fmean(each("effective_rank")),
    }


def _of_overlap(sums: Overlap | None) -> dict[str, Any]:
    if sums is None:
        return {}
    keys = ("distance", "relative_distance", "cosine")
    return {key: getattr(sums, key) for key in keys}


def _of_views(views: Sequence[GradientView]) -> dict[str, Any]:
    if not views:
        return {}
    energy = math.fsum(view.energy for view in views)
    found: dict[str, Any] = {
        "gradient_norm": math.sqrt(energy),
        "gradient_stable_rank": fmean(view.stable_rank for view in views),
        "gradient_effective_rank": _over(views, "effective_rank", fmean),
        "gradient_norm_A": _over(views, "norm_A", _hypot),
        "gradient_norm_B": _over(views, "norm_B", _hypot),
        "alignment_error": _over(views, "alignment_error", _hypot),
    }
    for share, part in (("captured_energy", "captured"), ("reachable_energy", "reachable")):
        total = _over(views, part, math.fsum)
        found[share] = None if total is None else captured_share(total, energy)
    for side in ("left", "right"):
        angles = [angle for view in views if (angle := getattr(view, side)) is not None]
        if angles:
            found[f"{side}_angle"] = max(angle.largest for angle in angles)
            found[f"mean_{side}_angle"] = fmean(angle.mean for angle in angles)
    return found


def _over(views: Sequence[GradientView], key: str, join: Callable[[list[float]], float]) -> float | None:
    # None where some layer has none
    values = [getattr(view, key) for view in views]
    return None if None in values else join(values)


def _hypot(values: Iterable[float]) -> float:
    return math.hypot(*values)
