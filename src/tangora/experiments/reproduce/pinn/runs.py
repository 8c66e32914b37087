"""Adapting a pretrained network: one run, and the sweep of a method."""

import copy
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from tangora.experiments.reproduce.pinn.equations import Equation, collocation
from tangora.experiments.reproduce.pinn.methods import Method, first_powers, rate
from tangora.experiments.reproduce.pinn.network import PeriodicMLP, field_on, residual_loss
from tangora.experiments.reproduce.pinn.reference import Solution
from tangora.init import initialize

DIVERGED_AT = 1e3
"""A run whose loss exceeds this multiple of its first loss is stopped and counts as diverged."""
_CHECKPOINTS = 12

Status = Literal["better", "worse", "diverged"]


@dataclass(frozen=True)
class Problem:
    """A pretrained network and what it is to learn.

    Attributes:
        equation: Which.
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


@dataclass(frozen=True)
class Budget:
    """What all methods of a problem share.

    Attributes:
        evaluations: Gradient evaluations.
        num_points: Collocation points of the loss, and as many others that choose the learning rate.
        rank: LoRA's r; alpha is the same.
    """

    evaluations: int
    num_points: int
    rank: int


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        method: Name.
        rate: Peak learning rate.
        seed: Of the start and of the collocation points.
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
    status: Status
    reason: str
    evaluations: int
    losses: tuple[float, ...]
    errors: tuple[tuple[int, float], ...]
    held_out: float
    error: float
    field: Tensor | None
    seconds: float


@dataclass(frozen=True)
class Sweep:
    """All runs of a method on a problem.

    Attributes:
        method: Which.
        runs: One per rate with the first seed, in rising order of rates.
        best: The runs at the best rate, one per seed.
    """

    method: Method
    runs: tuple[Run, ...]
    best: tuple[Run, ...]


def adapted(problem: Problem, method: Method, rank: int, seed: int) -> nn.Module:
    """Return a copy of the pretrained network that a method can train.

    Args:
        problem: Whose network.
        method: Full fine-tuning trains all; others a PEFT adapter on all hidden-to-hidden layers.
        rank: LoRA's r.
        seed: Of the adapter's start.

    Returns:
        The model; its output is the pretrained network's.
    """
    model = copy.deepcopy(problem.model)
    if method.family == "full":
        return model
    hidden = [f"layers.{index}" for index in range(1, len(model.layers) - 1)]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=hidden)
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=False)  # pyright: ignore[reportArgumentType]
    initialize(peft_model, method.start or "lora", seed=seed, progress=False)  # pyright: ignore[reportArgumentType]
    return peft_model


def run(problem: Problem, method: Method, lr: float, budget: Budget, seed: int) -> Run:
    """Adapt the network once, with a cosine schedule from the rate to zero.

    Args:
        problem: What to learn.
        method: How.
        lr: Peak learning rate.
        budget: Shared by all methods.
        seed: Of the start and of the collocation points.

    Returns:
        The run, whether it went well or not.
    """
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
        # LoRA-Pro warns of steps as large as the factors: what a sweep is there to find out
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
    heard: Callable[[], None] = lambda: None,
) -> Sweep:
    """Try learning rates, then the best one with more seeds.

    The best rate has the smallest held-out residual, which takes no reference solution. Rates are added below while the
    best one is the smallest, and above until one makes matters worse.

    Args:
        problem: What to learn.
        method: How.
        budget: Shared by all methods.
        seeds: The first one for the sweep.
        num_rates: Rates to begin with, half a decade apart.
        max_rates: Most rates, so that it ends.
        heard: Called after each run.

    Returns:
        All runs.
    """

    def at(power: float, seed: int) -> Run:
        done = run(problem, method, rate(power), budget, seed)
        heard()
        return done

    found = {power: at(power, seeds[0]) for power in first_powers(method, num_rates)}
    while len(found) < max_rates:
        best, low, high = best_power(found), min(found), max(found)
        if best == low:
            power = low - 0.5
        elif found[high].status == "better":
            power = high + 0.5
        else:
            break
        found[power] = at(power, seeds[0])
    best = best_power(found)
    runs = tuple(found[power] for power in sorted(found))
    return Sweep(method, runs, (found[best], *(at(best, seed) for seed in seeds[1:])))


def best_power(found: dict[float, Run]) -> float:
    """Return the key of the run with the smallest held-out residual.

    Args:
        found: Runs by the power of ten of their rate.

    Returns:
        Its key, the smallest of them if all diverged.
    """
    return min(sorted(found), key=lambda power: found[power].held_out)


def _step(optimizer: torch.optim.Optimizer, closure: Callable[[], Tensor], losses: list[float]) -> str:
    # one step; why the run diverged, or nothing
    try:
        loss = float(optimizer.step(closure).detach())  # pyright: ignore[reportArgumentType, reportCallIssue]
    except (FloatingPointError, torch.linalg.LinAlgError) as error:
        return str(error)
    losses.append(loss)
    if not loss <= DIVERGED_AT * losses[0]:
        return _too_large(loss)
    return ""


def _too_large(loss: float) -> str:
    return f"loss {loss:.3g}, beyond {DIVERGED_AT:g} times the first one"
