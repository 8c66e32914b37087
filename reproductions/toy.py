"""LoRA-One's toy: two numbers times one number, where trajectories can be seen."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from reproductions.result import Check, Progress, Result, Table, at_most, outcomes
from reproductions.shift import LORA_ONE
from tangora.experiments.values import Settings as BaseSettings
from tangora.geometry.sketch import LowRankSVD
from tangora.init import lora_one, one_step
from tangora.report.drawing.panels import Figure, Heatmap, Panel, Series

_SLIDES = f"{LORA_ONE}, toy example of the slides"
_LORA, _SPECTRAL = "LoRA start (b = 0)", "spectral start"
_SHOWN = 4.0
_TARGET = torch.tensor([2.0, 1.0], dtype=torch.float64)
"""The row that b (a1, a2) should become."""
_NAN = torch.tensor([torch.nan], dtype=torch.float64)

STAND_INS = (
    "Step size, number of steps and random starts are not given in the source.",
    "The figure of the source is in three dimensions; here it is shown in planes.",
)
QUICK = {"num_starts": 4, "steps": 1000, "grid": 61}


class Settings(BaseSettings):
    """Starts and descent."""

    seed: int = Field(default=0, ge=0, description="Seed of the first random start.")
    num_starts: int = Field(default=8, ge=1, description="Random LoRA starts.")
    learning_rate: float = Field(default=0.05, gt=0, le=0.2, description="Step of gradient descent.")
    steps: int = Field(default=2000, ge=1, description="Steps of gradient descent.")
    start_size: float = Field(default=1.0, gt=0, description="Standard deviation of A's entries.")
    gamma: float = Field(
        default=128.0, gt=0, description="LoRA-One's gamma: the spectral start is 1/gamma long."
    )
    grid: int = Field(default=81, ge=2, description="Points along each axis of the phase portrait.")


class Trajectory(NamedTuple):
    """The path of one start."""

    kind: str
    points: Float[Tensor, "t 3"]
    """``(a1, a2, b)`` after each step, the start first."""

    @property
    def across(self) -> Float[Tensor, " t"]:
        """A's part across the direction of the target."""
        return _along_and_across(self.points)[1]


class Found(NamedTuple):
    """Trajectories, the spectral one last, and where they end."""

    paths: list[Trajectory]
    ends: list[float]
    """Distances of their ends to the set of minimisers."""
    steps: list[int | None]
    """Steps to a loss of 1e-6."""
    landed: float
    """Distance of one full step, cut to rank one, to the set of minimisers."""


CHECKS = (
    Check[Found](
        "Every trajectory ends on the set of minimisers (2/t, 1/t, t): largest distance.",
        at_most(1e-6),
        lambda found: max(found.ends),
        f"{_SLIDES}, figure 2",
    ),
    Check[Found](
        "One full step, cut to rank one, is already a minimiser: distance to the set.",
        at_most(1e-12),
        lambda found: found.landed,
        _SLIDES,
    ),
    Check[Found](
        "The spectral start needs no turn: part of its path across the direction of (2, 1).",
        at_most(1e-12),
        lambda found: float(found.paths[-1].across.abs().max()),
        f"{_SLIDES}, figure 2",
    ),
)


def run(settings: Settings, progress: Progress) -> Result:
    """Follow gradient descent from LoRA's starts and from the spectral one."""
    paths, starts = [], _starts(settings)
    for done, (kind, start) in enumerate(starts, start=1):
        paths.append(Trajectory(kind, descend(start, settings.learning_rate, settings.steps)))
        progress(done, len(starts))
    found = Found(
        paths,
        [distance_to_minimisers(path.points[-1]) for path in paths],
        [_steps_to(path, 1e-6) for path in paths],
        distance_to_minimisers(_point(*one_step(_gradient(), 1, 1.0, step=1.0))),
    )
    return Result(
        findings=_findings(found),
        tables=[_table(found)],
        figures=[_trajectory_figure(paths), _phase_figure(paths, settings)],
        checks=outcomes(CHECKS, found),
        data={"end_distances": found.ends, "steps_to_loss_1e-6": found.steps},
    )


def toy_loss(points: Float[Tensor, "*t 3"]) -> Float[Tensor, "*t"]:
    r"""Evaluate $L = \frac12 \|b\,(a_1, a_2) - (2, 1)\|^2$ at $(a_1, a_2, b)$."""
    return 0.5 * (points[..., 2:] * points[..., :2] - _TARGET).square().sum(-1)


def descend(start: Float[Tensor, "3"], learning_rate: float, steps: int) -> Float[Tensor, "t 3"]:
    """Run gradient descent; return all points, the start first."""
    points = [start]
    for _ in range(steps):
        a, b = points[-1][:2], points[-1][2]
        g = b * a - _TARGET
        points.append(points[-1] - learning_rate * torch.cat([b * g, (g @ a)[None]]))
    return torch.stack(points)


def distance_to_minimisers(point: Float[Tensor, "3"]) -> float:
    r"""Return the Euclidean distance of a point from the curve $(2/t, 1/t, t)$.

    Stationary points of the squared distance are roots of $t^4 - b t^3 + (2 a_1 + a_2) t - 5$.
    """
    a1, a2, b = point.tolist()
    roots = np.roots([1.0, -b, 0.0, 2 * a1 + a2, -5.0])
    t = roots[np.abs(roots.imag) < 1e-9 * np.abs(roots)].real
    return float(np.sqrt((2 / t - a1) ** 2 + (1 / t - a2) ** 2 + (t - b) ** 2).min())


def _gradient() -> LowRankSVD:
    # at b (a1, a2) = 0 the gradient with respect to the product is -(2, 1)
    U, S, Vh = torch.linalg.svd(-_TARGET[None], full_matrices=False)
    return LowRankSVD(U, S, Vh)


def _point(A: Float[Tensor, "1 2"], B: Float[Tensor, "1 1"]) -> Float[Tensor, "3"]:
    return torch.cat([A[0], B[0]])


def _starts(settings: Settings) -> list[tuple[str, Float[Tensor, "3"]]]:
    generator = torch.Generator().manual_seed(settings.seed)
    rows = settings.start_size * torch.randn(settings.num_starts, 2, generator=generator, dtype=torch.float64)
    random = [(_LORA, torch.cat([row, torch.zeros(1, dtype=row.dtype)])) for row in rows]
    return [*random, (_SPECTRAL, _point(*lora_one(_gradient(), 1, gamma=settings.gamma)))]


def _steps_to(path: Trajectory, loss: float) -> int | None:
    below = (toy_loss(path.points) <= loss).nonzero()
    return int(below[0, 0]) if len(below) else None


def _along_and_across(points: Float[Tensor, "t 3"]) -> tuple[Float[Tensor, " t"], Float[Tensor, " t"]]:
    along = _TARGET / _TARGET.norm()
    return points[:, :2] @ along, points[:, :2] @ torch.stack([-along[1], along[0]])


def _findings(found: Found) -> list[str]:
    ends, landed = found.ends, found.landed
    *lora, spectral = found.steps
    across = max(float(path.across.abs().max()) for path in found.paths[:-1])
    reached = sorted(number for number in lora if number is not None)
    counts = f"{reached[0]} to {reached[-1]}" if reached else "more than all"
    arrived = (
        f"All {len(ends)} trajectories end on the minimisers, the farthest at {max(ends):.1e} from them."
        if max(ends) <= 1e-6
        else f"{sum(end > 1e-6 for end in ends)} of {len(ends)} trajectories do not reach the minimisers."
    )
    return [
        arrived,
        (
            f"LoRA starts need {counts} steps to a loss of 1e-6, and lie up to {across:.2g} off the direction of "
            f"(2, 1) at first; the spectral start needs {spectral if spectral is not None else 'more'} steps and never "
            "leaves it."
        ),
        (
            f"One full step cut to rank one lands {landed:.0e} from the minimisers: with an identity Hessian there is "
            "nothing left to train."
        ),
    ]


def _table(found: Found) -> Table:
    begins, ends = (torch.stack([path.points[at] for path in found.paths]) for at in (0, -1))
    names = ("a1", "a2", "b")
    return Table.of(
        "Where they begin and end",
        {
            "start": [path.kind for path in found.paths],
            **dict(zip(names, begins.T, strict=True)),
            **{f"{name} at the end": column for name, column in zip(names, ends.T, strict=True)},
            "steps to 1e-6": found.steps,
            "distance": found.ends,
        },
        "Steps to a loss of 1e-6, and the distance of the end to the curve of minimisers (2/t, 1/t, t).",
    )


def _trajectory_figure(paths: list[Trajectory]) -> Figure:
    t = torch.linspace(0.4, 2 * _SHOWN, 200, dtype=torch.float64)
    t = torch.cat([-t.flip(0), _NAN, t])
    panels = []
    for index, name in enumerate(("a1", "a2")):
        curve = _TARGET[index] / t
        both = (t.abs() <= 3.2) & (curve.abs() <= _SHOWN) | t.isnan()
        minimisers = Series("minimisers", curve[both], t[both], style="dashed")
        seen = _by_kind(paths, lambda points, i=index: (_thin(points)[:, i], _thin(points)[:, 2]))
        panels.append(Panel(f"{name} and b", name, "b", [minimisers, *seen]))
    losses = _by_kind(
        paths,
        lambda points: (torch.arange(len(points[:500]))[::4], toy_loss(points[:500:4]).clamp(min=1e-16)),
    )
    panels.append(Panel("Loss", "step", "loss", losses, yscale="log"))
    return Figure(
        "trajectories",
        "Gradient descent on ½‖b (a1, a2) − (2, 1)‖²",
        "From b = 0 the paths bend towards the curve of minimisers, to either branch; the spectral start lies on the "
        "line that leads to the balanced one. Losses below 1e-16 are drawn there.",
        panels,
    )


def _phase_figure(paths: list[Trajectory], settings: Settings) -> Figure:
    axis = torch.linspace(-_SHOWN, _SHOWN, settings.grid, dtype=torch.float64)
    length = float(_TARGET.norm())
    loss = 0.5 * (axis[:, None] * axis[None, :] - length).square()
    heat = Heatmap(axis, axis, loss.clamp(min=1e-6).log10().round(decimals=3), "log₁₀ of the loss")
    b = torch.linspace(length / _SHOWN, _SHOWN, 100, dtype=torch.float64)
    b = torch.cat([-b.flip(0), _NAN, b])
    series = [
        Series("minimisers", length / b, b, style="dashed"),
        *_by_kind(paths, lambda points: (_along_and_across(_thin(points))[0], _thin(points)[:, 2])),
        _joined("gradient flow", _flow_lines(length)),
    ]
    off = _by_kind(
        paths, lambda points: (torch.arange(len(points[:120]))[::2], _along_and_across(points[:120:2])[1])
    )
    return Figure(
        "phase-portrait",
        "Phase portrait",
        "Left: the plane of b and of A's part along (2, 1), where the loss is ½(b c − √5)²; lines of the gradient flow "
        "that lie in the plane, and the trajectories seen from above. Right: how far A is from that plane.",
        (
            Panel("Along (2, 1)", "A along (2, 1)", "b", series, heatmap=heat),
            Panel("Across (2, 1)", "step", "A across (2, 1)", off),
        ),
    )


def _flow_lines(length: float) -> list[tuple[Tensor, Tensor]]:
    # c' = -(bc - l) b and b' = -(bc - l) c keep c^2 - b^2; small normalised steps of both signs of time
    lines = []
    edge = torch.linspace(-_SHOWN, _SHOWN, 9, dtype=torch.float64).tolist()
    begins = [(along, end) for end in (_SHOWN, -_SHOWN) for along in edge]
    for begin in begins + [pair[::-1] for pair in begins]:
        c, b = begin
        xs, ys = [c], [b]
        for _ in range(400):
            pull = length - b * c
            speed = abs(pull) * (b * b + c * c) ** 0.5
            if speed < 0.05:
                break
            c, b = c + 0.02 * pull * b / speed, b + 0.02 * pull * c / speed
            xs.append(c)
            ys.append(b)
        lines.append((torch.tensor(xs[::4]), torch.tensor(ys[::4])))
    return lines


def _thin(points: Tensor) -> Tensor:
    # the first steps show the path, and the end where it goes
    return torch.cat([points[:80:2], points[80:400:10], points[-1:]])


def _by_kind(paths: list[Trajectory], axes: Callable[[Tensor], tuple[Tensor, Tensor]]) -> list[Series]:
    kinds = dict.fromkeys(path.kind for path in paths)
    return [_joined(kind, [axes(path.points) for path in paths if path.kind == kind]) for kind in kinds]


def _joined(name: str, lines: list[tuple[Tensor, Tensor]]) -> Series:
    # one entry in the legend for many lines: a gap after each
    x, y = (
        torch.cat([part for line in axis for part in (line.double(), _NAN)])
        for axis in zip(*lines, strict=True)
    )
    return Series(name, x, y)
