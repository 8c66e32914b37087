"""LoRA-One's toy: two numbers times one number, where trajectories can be seen."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tangora.experiments.reproduce.experiment import Progress
from tangora.experiments.reproduce.parts.toy import ToySettings
from tangora.geometry.sketch import LowRankSVD
from tangora.init import lora_one, one_step
from tangora.report.drawing.panels import Figure, Heatmap, Panel, Series
from tangora.report.reproduction.records import Check, Result, Table

_PAPER = "LoRA-One (arXiv:2502.01235), toy example of the slides"
_LORA, _SPECTRAL = "LoRA start (b = 0)", "spectral start"
_SHOWN = 4.0


class Trajectory(NamedTuple):
    """The path of one start."""

    kind: str
    points: Float[Tensor, "t 3"]
    """``(a1, a2, b)`` after each step, the start first."""


def target() -> Float[Tensor, "2"]:
    r"""Return the row that $b\,(a_1, a_2)$ should become.

    Returns:
        $(2, 1)$.
    """
    return torch.tensor([2.0, 1.0], dtype=torch.float64)


def toy_loss(points: Float[Tensor, "*t 3"]) -> Float[Tensor, "*t"]:
    r"""Evaluate $L = \frac12 \|b\,(a_1, a_2) - (2, 1)\|^2$.

    Args:
        points: $(a_1, a_2, b)$.

    Returns:
        The loss.
    """
    return 0.5 * (points[..., 2:] * points[..., :2] - target()).square().sum(-1)


def descend(start: Float[Tensor, "3"], learning_rate: float, steps: int) -> Float[Tensor, "t 3"]:
    """Run gradient descent.

    Args:
        start: $(a_1, a_2, b)$.
        learning_rate: Step size.
        steps: How many.

    Returns:
        All points, the start first.
    """
    points = [start]
    for _ in range(steps):
        a, b = points[-1][:2], points[-1][2]
        g = b * a - target()
        points.append(points[-1] - learning_rate * torch.cat([b * g, (g @ a)[None]]))
    return torch.stack(points)


def distance_to_minimisers(point: Float[Tensor, "3"]) -> float:
    r"""Measure how far a point is from the curve $(2/t, 1/t, t)$.

    Stationary points of the squared distance are roots of $t^4 - b t^3 + (2 a_1 + a_2) t - 5$.

    Args:
        point: $(a_1, a_2, b)$.

    Returns:
        The Euclidean distance.
    """
    a1, a2, b = point.tolist()
    roots = np.roots([1.0, -b, 0.0, 2 * a1 + a2, -5.0])
    t = roots[np.abs(roots.imag) < 1e-9 * np.abs(roots)].real
    return float(np.sqrt((2 / t - a1) ** 2 + (1 / t - a2) ** 2 + (t - b) ** 2).min())


def run_toy(settings: ToySettings, progress: Progress) -> Result:
    """Follow gradient descent from LoRA's starts and from the spectral one.

    Args:
        settings: Starts and descent.
        progress: Hears of trajectories.

    Returns:
        Trajectories, phase portrait, and whether they end on the minimisers.
    """
    paths = []
    starts = _starts(settings)
    for done, (kind, start) in enumerate(starts, start=1):
        paths.append(Trajectory(kind, descend(start, settings.learning_rate, settings.steps)))
        progress(done, len(starts))
    ends = [distance_to_minimisers(path.points[-1]) for path in paths]
    landed = distance_to_minimisers(_factors_as_point(*one_step(_gradient(), 1, 1.0, step=1.0)))
    steps = [_steps_to(path, 1e-6) for path in paths]
    return Result(
        findings=_findings(paths, ends, steps, landed),
        tables=(_table(paths, ends, steps),),
        figures=(_trajectory_figure(paths), _phase_figure(paths, settings)),
        checks=(
            Check(
                "Every trajectory ends on the set of minimisers (2/t, 1/t, t): largest distance.",
                max(ends),
                None,
                1e-6,
                _PAPER + ", figure 2",
            ),
            Check(
                "One full step, cut to rank one, is already a minimiser: distance to the set.",
                landed,
                None,
                1e-12,
                _PAPER,
            ),
            Check(
                "The spectral start needs no turn: part of its path across the direction of (2, 1).",
                _turn(next(path for path in paths if path.kind == _SPECTRAL)),
                None,
                1e-12,
                _PAPER + ", figure 2",
            ),
        ),
        data={
            "end_distances": ends,
            "steps_to_loss_1e-6": steps,
        },
    )


def _gradient() -> LowRankSVD:
    # at b (a1, a2) = 0 the gradient with respect to the product is -(2, 1)
    U, S, Vh = torch.linalg.svd(-target()[None], full_matrices=False)
    return LowRankSVD(U, S, Vh)


def _factors_as_point(A: Float[Tensor, "1 2"], B: Float[Tensor, "1 1"]) -> Float[Tensor, "3"]:
    return torch.cat([A[0], B[0]])


def _starts(settings: ToySettings) -> list[tuple[str, Float[Tensor, "3"]]]:
    generator = torch.Generator().manual_seed(settings.seed)
    rows = settings.start_size * torch.randn(settings.num_starts, 2, generator=generator, dtype=torch.float64)
    random = [(_LORA, torch.cat([row, torch.zeros(1, dtype=row.dtype)])) for row in rows]
    return [*random, (_SPECTRAL, _factors_as_point(*lora_one(_gradient(), 1, gamma=settings.gamma)))]


def _steps_to(path: Trajectory, loss: float) -> int | None:
    below = (toy_loss(path.points) <= loss).nonzero()
    return int(below[0, 0]) if len(below) else None


def _along_and_across(points: Float[Tensor, "t 3"]) -> tuple[Float[Tensor, " t"], Float[Tensor, " t"]]:
    along = target() / target().norm()
    return points[:, :2] @ along, points[:, :2] @ torch.stack([-along[1], along[0]])


def _turn(path: Trajectory) -> float:
    return float(_along_and_across(path.points)[1].abs().max())


def _findings(
    paths: list[Trajectory], ends: list[float], steps: list[int | None], landed: float
) -> tuple[str, ...]:
    across = [_turn(path) for path in paths if path.kind == _LORA]
    lora = [number for path, number in zip(paths, steps, strict=True) if path.kind == _LORA]
    spectral = steps[-1]
    reached = sorted(number for number in lora if number is not None)
    counts = f"{reached[0]} to {reached[-1]}" if reached else "more than all"
    return (
        f"All {len(paths)} trajectories end on the minimisers, the farthest at {max(ends):.1e} from them."
        if max(ends) <= 1e-6
        else f"{sum(end > 1e-6 for end in ends)} of {len(paths)} trajectories do not reach the minimisers.",
        (
            f"LoRA starts need {counts} steps to a loss of 1e-6, and lie up to {max(across):.2g} off the direction of "
            f"(2, 1) at first; the spectral start needs {spectral if spectral is not None else 'more'} steps and never "
            "leaves it."
        ),
        (
            f"One full step cut to rank one lands {landed:.0e} from the minimisers: with an identity Hessian there is "
            "nothing left to train."
        ),
    )


def _table(paths: list[Trajectory], ends: list[float], steps: list[int | None]) -> Table:
    rows = [
        (
            path.kind,
            *(float(value) for value in path.points[0]),
            *(float(value) for value in path.points[-1]),
            number,
            end,
        )
        for path, number, end in zip(paths, steps, ends, strict=True)
    ]
    columns = (
        "start",
        "a1",
        "a2",
        "b",
        "a1 at the end",
        "a2 at the end",
        "b at the end",
        "steps to 1e-6",
        "distance",
    )
    return Table(
        "Where they begin and end",
        columns,
        tuple(rows),
        "Steps to a loss of 1e-6, and the distance of the end to the curve of minimisers (2/t, 1/t, t).",
    )


def _trajectory_figure(paths: list[Trajectory]) -> Figure:
    t = torch.linspace(0.4, 2 * _SHOWN, 200, dtype=torch.float64)
    t = torch.cat([-t.flip(0), torch.tensor([torch.nan], dtype=t.dtype), t])
    panels = []
    for index, name, numerator in ((0, "a1", 2.0), (1, "a2", 1.0)):
        both = (t.abs() <= 3.2) & ((numerator / t).abs() <= _SHOWN) | t.isnan()
        curve = Series("minimisers", (numerator / t)[both], t[both], style="dashed")
        panels.append(
            Panel(f"{name} and b", name, "b", [curve, *_joined(paths, lambda p, i=index: (p[:, i], p[:, 2]))])
        )
    losses = [
        _joined_series(kind, [(torch.arange(len(p))[::4], toy_loss(p[::4]).clamp(min=1e-16)) for p in group])
        for kind, group in _by_kind(paths, length=500).items()
    ]
    panels.append(Panel("Loss", "step", "loss", losses, yscale="log"))
    return Figure(
        "trajectories",
        "Gradient descent on ½‖b (a1, a2) − (2, 1)‖²",
        "From b = 0 the paths bend towards the curve of minimisers, to either branch; the spectral start lies on the "
        "line that leads to the balanced one. Losses below 1e-16 are drawn there.",
        panels,
    )


def _phase_figure(paths: list[Trajectory], settings: ToySettings) -> Figure:
    axis = torch.linspace(-_SHOWN, _SHOWN, settings.grid, dtype=torch.float64)
    length = float(target().norm())
    loss = 0.5 * (axis[:, None] * axis[None, :] - length).square()
    heat = Heatmap(axis, axis, loss.clamp(min=1e-6).log10().round(decimals=3), "log₁₀ of the loss")
    b = torch.linspace(length / _SHOWN, _SHOWN, 100, dtype=torch.float64)
    gap = torch.tensor([torch.nan], dtype=b.dtype)
    b = torch.cat([-b.flip(0), gap, b])
    series = [
        Series("minimisers", length / b, b, style="dashed"),
        *_joined(paths, lambda p: (_along_and_across(p)[0], p[:, 2])),
        _joined_series("gradient flow", _flow_lines(length)),
    ]
    off = [
        _joined_series(kind, [(torch.arange(len(p))[::2], _along_and_across(p[::2])[1]) for p in group])
        for kind, group in _by_kind(paths, length=120).items()
    ]
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
    edge = torch.linspace(-_SHOWN, _SHOWN, 9, dtype=torch.float64)
    far = torch.full_like(edge, _SHOWN)
    begins = torch.cat(
        [torch.stack(pair, -1) for pair in ((edge, far), (edge, -far), (far, edge), (-far, edge))]
    )
    for begin in begins:
        c, b = begin.tolist()
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


def _by_kind(paths: list[Trajectory], length: int | None = None) -> dict[str, list[Tensor]]:
    groups: dict[str, list[Tensor]] = {}
    for path in paths:
        groups.setdefault(path.kind, []).append(path.points[:length])
    return groups


def _joined(paths: list[Trajectory], axes: Callable[[Tensor], tuple[Tensor, Tensor]]) -> list[Series]:
    return [
        _joined_series(kind, [axes(_thin(points)) for points in group])
        for kind, group in _by_kind(paths).items()
    ]


def _thin(points: Tensor) -> Tensor:
    # the first steps show the path, and the end where it goes
    return torch.cat([points[:80:2], points[80:400:10], points[-1:]])


def _joined_series(name: str, lines: list[tuple[Tensor, Tensor]]) -> Series:
    # one entry in the legend for many lines: a gap between each two
    gap = torch.tensor([torch.nan], dtype=torch.float64)
    parts = [(torch.cat([x.double(), gap]), torch.cat([y.double(), gap])) for x, y in lines]
    return Series(name, torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]))
