"""The network, its loss, its pretraining and its error on a grid."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from tangora.experiments.reproduce.pinn.equations import Equation, Points
from tangora.experiments.reproduce.pinn.reference import Solution


class PeriodicMLP(nn.Module):
    r"""A tanh network that satisfies the periodic boundary and the initial condition whatever its weights.

    $u(x, t) = u_0(x) + t N(\cos x, \sin x, 2t - 1)$, so that the residual is the only loss.

    Args:
        equation: Whose initial condition $u_0$ is built in.
        width: Units of a hidden layer.
        depth: Number of hidden layers.
        seed: Of the weights; the global random state is untouched.
        dtype: Of the weights.
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
        """Return u at points.

        Args:
            x: Places.
            t: Times.

        Returns:
            One value per point.
        """
        hidden = torch.stack([x.cos(), x.sin(), 2 * t - 1], dim=-1)
        for layer in self.layers[:-1]:
            hidden = torch.tanh(layer(hidden))
        return self._initial(x) + t * self.layers[-1](hidden).squeeze(-1)


def residual_loss(
    model: nn.Module, equation: Equation, coefficient: float, points: tuple[Points, Points]
) -> Tensor:
    """Return the mean squared residual.

    Args:
        model: The network, plain or adapted.
        equation: Which.
        coefficient: Its coefficient.
        points: Collocation points.

    Returns:
        A scalar.
    """
    return equation.residual(model, *points, coefficient).square().mean()


@torch.no_grad()
def field_on(model: nn.Module, solution: Solution) -> Tensor:
    """Evaluate a network on a solution's grid.

    Args:
        model: The network, plain or adapted.
        solution: Whose grid.

    Returns:
        Values in float64, one row per time.
    """
    t, x = torch.meshgrid(solution.t, solution.x, indexing="ij")
    dtype = next(model.parameters()).dtype
    return model(x.flatten().to(dtype), t.flatten().to(dtype)).reshape(t.shape).double()


def pretrain(
    model: nn.Module,
    equation: Equation,
    coefficient: float,
    points: tuple[Points, Points],
    *,
    adam_steps: int,
    lbfgs_steps: int,
) -> float:
    """Train all weights on one coefficient: Adam with a cosine schedule, then L-BFGS with a line search.

    Args:
        model: The network, trained in place.
        equation: Which.
        coefficient: Its coefficient.
        points: Collocation points.
        adam_steps: Steps of Adam from a learning rate of 3e-3 to zero.
        lbfgs_steps: Iterations of L-BFGS.

    Returns:
        The last loss.
    """
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
    return float(residual_loss(model, equation, coefficient, points).detach())
