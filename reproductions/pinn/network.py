"""The network, its loss, its pretraining and its error on a grid."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from reproductions.pinn.equations import EQUATIONS, Equation, Points, Solution, collocation, solve

_SEED_OF_PRETRAINING = 2602


class PeriodicMLP(nn.Module):
    r"""A tanh network that satisfies the periodic boundary and the initial condition whatever its weights.

    $u(x, t) = u_0(x) + t N(\cos x, \sin x, 2t - 1)$, so that the residual is the only loss. ``width`` is the number of
    units of each of ``depth`` hidden layers; the global random state is untouched.
    """

    def __init__(self, equation: Equation, width: int, depth: int, *, seed: int, dtype: torch.dtype):
        super().__init__()
        sizes = [3, *[width] * depth, 1]
        self._initial = equation.initial
        self.layers = nn.ModuleList(nn.Linear(n, m, dtype=dtype) for n, m in pairwise(sizes))
        generator = torch.Generator().manual_seed(seed)
        for layer in self.layers:
            nn.init.xavier_normal_(layer.weight, generator=generator)  # pyright: ignore[reportArgumentType]
            nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Points, t: Points) -> Points:
        """Return u at points."""
        hidden = torch.stack([x.cos(), x.sin(), 2 * t - 1], dim=-1)
        for layer in self.layers[:-1]:
            hidden = torch.tanh(layer(hidden))
        return self._initial(x) + t * self.layers[-1](hidden).squeeze(-1)


def residual_loss(
    model: nn.Module, equation: Equation, coefficient: float, points: tuple[Points, Points]
) -> Tensor:
    """Return the mean squared residual of a network, plain or adapted, at collocation points."""
    return equation.residual(model, *points, coefficient).square().mean()


@torch.no_grad()
def field_on(model: nn.Module, solution: Solution) -> Tensor:
    """Evaluate a network on a solution's grid, in float64, one row per time."""
    t, x = torch.meshgrid(solution.t, solution.x, indexing="ij")
    dtype = next(model.parameters()).dtype
    return model(x.flatten().to(dtype), t.flatten().to(dtype)).reshape(t.shape).double()


@dataclass(frozen=True)
class Problem:
    """A pretrained network and what it is to learn.

    Attributes:
        equation: Family of equations.
        source: Coefficient of the pretraining.
        target: Coefficient to adapt to.
        model: The network; it is copied, never changed.
        pretrained_error: Relative L2 error at ``source``.
        solution: The reference solution at ``target``.
    """

    equation: Equation
    source: float
    target: float
    model: PeriodicMLP
    pretrained_error: float
    solution: Solution

    @property
    def label(self) -> str:
        """Its name with both coefficients, for example "convection, β 2 → 4"."""
        return f"{self.equation.name}, {self.equation.symbol} {self.source:g} → {self.target:g}"


def pretrained(
    name: str,
    source: float,
    target: float,
    *,
    width: int,
    depth: int,
    num_points: int,
    adam_steps: int,
    lbfgs_steps: int,
) -> Problem:
    """Train a network for one coefficient of an equation, to be adapted to another."""
    equation = EQUATIONS[name]
    # float32, as networks are trained: the errors reached, 1e-3 and more, are far above its rounding, and it takes
    # about half the time of float64
    model = PeriodicMLP(equation, width, depth, seed=_SEED_OF_PRETRAINING, dtype=torch.float32)
    generator = torch.Generator().manual_seed(_SEED_OF_PRETRAINING)
    points = collocation(num_points, generator, torch.float32)
    _pretrain(model, equation, source, points, adam_steps, lbfgs_steps)
    before = solve(equation, source)
    error = before.error_of(field_on(model, before))
    return Problem(equation, source, target, model, error, solve(equation, target))


def _pretrain(
    model: nn.Module,
    equation: Equation,
    coefficient: float,
    points: tuple[Points, Points],
    adam_steps: int,
    lbfgs_steps: int,
) -> None:
    """Train all weights: Adam with a cosine schedule from 3e-3, then L-BFGS with a line search."""
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(1, adam_steps))
    for _ in range(adam_steps):
        adam.zero_grad()
        residual_loss(model, equation, coefficient, points).backward()
        adam.step()
        schedule.step()
    lbfgs = torch.optim.LBFGS(
        model.parameters(), max_iter=lbfgs_steps, history_size=50, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        lbfgs.zero_grad()
        loss = residual_loss(model, equation, coefficient, points)
        loss.backward()
        return loss

    if lbfgs_steps:
        lbfgs.step(closure)
