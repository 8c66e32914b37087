"""Adapting a pretrained network: the methods, one run, and the sweep of a method."""

import copy
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import Optimizer

from reproductions.pinn.equations import collocation
from reproductions.pinn.network import Problem, field_on, residual_loss
from tangora.init import initialize
from tangora.optim import LoRAPro, ODELoRA, PreconditionedAdamW, TangentAdam
from tangora.optim.ode_steps import Scheme

DIVERGED_AT = 1e3
"""A run whose loss exceeds this multiple of its first loss is stopped and counts as diverged."""
_CHECKPOINTS = 12

Make = Callable[[nn.Module, float], Optimizer]


@dataclass(frozen=True)
class Method:
    """A way to adapt.

    Attributes:
        name: Its name in tables and figures.
        family: ``full`` (all weights), ``baseline`` (LoRA as it was before), ``ode`` or ``other``.
        make: ``(model, lr)`` -> optimizer.
        center: Middle of the first learning rates, as a power of ten.
        start: Initialization of the adapter, ``None`` for PEFT's own.
        gradients_per_step: Gradients that a step of the optimizer takes.
        moments: Whether it keeps any: plain descent and flows do not.
    """

    name: str
    family: Literal["full", "baseline", "other", "ode"]
    make: Make
    center: float
    start: Literal["orthogonal"] | None = None
    gradients_per_step: int = 1
    moments: bool = True


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _adam(model: nn.Module, lr: float) -> Optimizer:
    return torch.optim.AdamW(_trainable(model), lr=lr, weight_decay=0.0)


def _descent(model: nn.Module, lr: float) -> Optimizer:
    return torch.optim.SGD(_trainable(model), lr=lr)


def _ode(scheme: Scheme) -> Make:
    return lambda model, lr: ODELoRA(model, lr, scheme=scheme)


# Factor schemes and LoRA-Pro divide by the Gram matrices of the factors, which B = 0 leaves without inverse; orthogonal
# factors are balanced, well-conditioned and need no data. LoRA runs from both, so that start and optimizer can be told
# apart; plain descent shows what Adam's moments alone are worth.
_METHODS = (
    Method("full (Adam)", "full", _adam, -2.5),
    Method("full (descent)", "full", _descent, -2.0, moments=False),
    Method("LoRA", "baseline", _adam, -2.0),
    Method("LoRA (orthogonal start)", "baseline", _adam, -2.0, "orthogonal"),
    Method("LoRA (descent)", "baseline", _descent, -1.0, "orthogonal", moments=False),
    Method("P-LoRA", "baseline", PreconditionedAdamW, -2.0),
    Method("LoRA-Pro", "baseline", LoRAPro, -2.5, "orthogonal"),
    Method("TangentAdam", "other", TangentAdam, -2.5),
    Method("ODELoRA Euler", "ode", _ode("euler"), -1.5, "orthogonal", moments=False),
    Method("ODELoRA Heun", "ode", _ode("heun"), -1.5, "orthogonal", 2, moments=False),
    Method("ODELoRA RK4", "ode", _ode("rk4"), -1.0, "orthogonal", 4, moments=False),
    Method("ODELoRA BUG", "ode", _ode("bug"), -1.5, "orthogonal", moments=False),
)
METHODS = {method.name: method for method in _METHODS}


def rate(power: float) -> float:
    """Return ten to a power with three figures, without rounding noise: the learning rates are half decades."""
    return float(f"{10**power:.2e}")


def first_powers(method: Method, num: int) -> list[float]:
    """Return the powers of ten of the first learning rates: half decades around the method's center."""
    return [method.center + (index - num // 2) / 2 for index in range(num)]


class Budget(NamedTuple):
    """Settings that all methods of a problem share."""

    evaluations: int
    """Gradient evaluations."""
    num_points: int
    """Collocation points of the loss, and as many others that choose the learning rate."""
    rank: int
    """LoRA's r; alpha is the same."""


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        method: Name of the method.
        rate: Peak learning rate.
        seed: Seed of the initialization and of the collocation points.
        status: ``diverged``: not finite, refused by the optimizer, or a loss beyond `DIVERGED_AT` times the first one;
            ``worse``: it ended above the error that it began with.
        reason: Why it diverged.
        evaluations: Gradient evaluations made.
        losses: Residual loss before each step.
        errors: ``(gradient evaluations, relative L2 error)`` along the way.
        held_out: Residual loss at other points, at the end; infinite if diverged.
        error: Relative L2 error at the end; infinite if diverged.
        field: u on the reference grid at the end; ``None`` if diverged.
        seconds: Processor time.
    """

    method: str
    rate: float
    seed: int
    status: Literal["better", "worse", "diverged"]
    reason: str
    evaluations: int
    losses: tuple[float, ...]
    errors: tuple[tuple[int, float], ...]
    held_out: float
    error: float
    field: Tensor | None
    seconds: float


class Sweep(NamedTuple):
    """All runs of a method on a problem."""

    method: Method
    runs: tuple[Run, ...]
    """One per learning rate with the first seed, in rising order."""
    best: tuple[Run, ...]
    """The runs at the best learning rate, one per seed."""


def adapted(problem: Problem, method: Method, rank: int, seed: int) -> nn.Module:
    """Return a copy of the pretrained network, with a PEFT adapter on all hidden-to-hidden layers unless full."""
    model = copy.deepcopy(problem.model)
    if method.family == "full":
        return model
    hidden = [f"layers.{index}" for index in range(1, len(model.layers) - 1)]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=hidden)
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=False)  # pyright: ignore[reportArgumentType]
    initialize(peft_model, method.start or "lora", seed=seed, progress=False)
    return peft_model


def run(problem: Problem, method: Method, lr: float, budget: Budget, seed: int) -> Run:
    """Adapt the network once, with a cosine schedule from a peak learning rate to zero, whether it goes well or not."""
    began = time.process_time()
    generator = torch.Generator().manual_seed(seed)
    dtype = next(problem.model.parameters()).dtype
    points, others = (collocation(budget.num_points, generator, dtype) for _ in range(2))
    model = adapted(problem, method, budget.rank, seed)
    optimizer = method.make(model, lr)
    steps = budget.evaluations // method.gradients_per_step
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses: list[float] = []
    errors: list[tuple[int, float]] = []
    evaluations = 0

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        loss = residual_loss(model, problem.equation, problem.target, points)
        loss.backward()
        return loss

    reason = ""
    with warnings.catch_warnings():
        # LoRA-Pro warns of steps as large as the factors, which a sweep is there to find out
        warnings.filterwarnings("ignore", message="step .* changes A of")
        for step in range(steps):
            if step % max(1, steps // _CHECKPOINTS) == 0:
                errors.append((evaluations, problem.solution.error_of(field_on(model, problem.solution))))
            reason = _step(optimizer, closure, losses)
            if reason:
                break
            schedule.step()
    field = field_on(model, problem.solution)
    error = problem.solution.error_of(field)
    held_out = float(residual_loss(model, problem.equation, problem.target, others).detach())
    if not reason and not (math.isfinite(error) and math.isfinite(held_out)):
        reason = "the network is not finite at the end"
    if not reason and held_out > DIVERGED_AT * losses[0]:
        reason = _too_large(held_out)
    if reason:
        error, held_out = math.inf, math.inf
    errors.append((evaluations, error))
    return Run(
        method=method.name,
        rate=lr,
        seed=seed,
        status="diverged" if reason else "better" if error < errors[0][1] else "worse",
        reason=reason,
        evaluations=evaluations,
        losses=tuple(losses),
        errors=tuple(errors),
        held_out=held_out,
        error=error,
        field=None if reason else field,
        seconds=time.process_time() - began,
    )


def sweep(
    problem: Problem,
    method: Method,
    budget: Budget,
    seeds: Sequence[int],
    *,
    num_rates: int,
    max_rates: int,
    after_run: Callable[[], None] = lambda: None,
) -> Sweep:
    """Try learning rates half a decade apart with the first seed, then the best one with the others.

    The best one has the smallest held-out residual, which takes no reference solution. Beyond the first ``num_rates``,
    learning rates are added below while the best one is the smallest, and above until one makes matters worse.
    """

    def at(power: float, seed: int) -> Run:
        done = run(problem, method, rate(power), budget, seed)
        after_run()
        return done

    def best() -> float:
        return min(sorted(found), key=lambda power: found[power].held_out)

    found = {power: at(power, seeds[0]) for power in first_powers(method, num_rates)}
    while len(found) < max_rates:
        low, high = min(found), max(found)
        if best() == low:
            power = low - 0.5
        elif found[high].status == "better":
            power = high + 0.5
        else:
            break
        found[power] = at(power, seeds[0])
    runs = tuple(found[power] for power in sorted(found))
    return Sweep(method, runs, (found[best()], *(at(best(), seed) for seed in seeds[1:])))


def _step(optimizer: Optimizer, closure: Callable[[], Tensor], losses: list[float]) -> str:
    # one step; why the run diverged, or nothing
    try:
        loss = float(optimizer.step(closure).detach())  # pyright: ignore[reportArgumentType, reportCallIssue]
    except (FloatingPointError, torch.linalg.LinAlgError) as error:
        return str(error)
    losses.append(loss)
    return "" if loss <= DIVERGED_AT * losses[0] else _too_large(loss)


def _too_large(loss: float) -> str:
    return f"loss {loss:.3g}, beyond {DIVERGED_AT:g} times the first one"
