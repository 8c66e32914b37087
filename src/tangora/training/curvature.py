r"""The curvature of the loss while a model trains: $\lambda_{\max}$, trace and $\kappa$ every few steps."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tangora._checks import InputError, check_choice, check_whole
from tangora._folders import RunFolder
from tangora._names import SPACES
from tangora._types import LossFn
from tangora.curvature import Hessian
from tangora.curvature.displaced_loss import Over
from tangora.curvature.space_curvature import SpaceCurvature, space_curvature
from tangora.probes import as_batches, gradient_norms, probed_layers
from tangora.training.callbacks import DivergedError, JsonLines, Stopwatch, read_history

TOP_PRODUCTS = 40


@dataclass(frozen=True)
class CurvaturePoint:
    r"""One measured step.

    Attributes:
        step: Optimizer steps done; 0 is the start.
        loss: Mean loss on the examples, in evaluation mode.
        gradient_norm: $\|G\|_F$ of the weights' gradient, over all adapted layers together.
        captured_energy: $\kappa = \|P_T(G)\|_F^2 / \|G\|_F^2$, in [0, 1]; ``None`` over weights alone.
        spaces: By kind of coordinates. Those of ``factors`` change with the gauge $(B R, R^{-1} A)$ and compare only
            with themselves.
    """

    step: int
    loss: float
    gradient_norm: float
    captured_energy: float | None
    spaces: dict[str, SpaceCurvature]

    def known(self) -> dict[str, float]:
        """Return the measured values, by name; those of a space after its name."""
        own: dict[str, Any] = {"loss": self.loss, "gradient_norm": self.gradient_norm}
        if self.captured_energy is not None:
            own["captured_energy"] = self.captured_energy
        keys = "top_eigenvalue", "trace", "trace_error"
        return own | {
            f"{name}_{key}": getattr(space, key) for name, space in self.spaces.items() for key in keys
        }


def curvature_point(
    model: nn.Module,
    batches: Iterable[Any],
    step: int,
    *,
    over: Sequence[Over] = ("tangent", "factors"),
    layers: Iterable[str] | None = None,
    loss_fn: LossFn | None = None,
    trace_products: int = 30,
    seed: int = 0,
) -> CurvaturePoint:
    r"""Measure the curvature where a model is; the model, its gradients and all random states stay as they are."""
    batches = as_batches(batches)
    how: dict[str, Any] = {"layers": None if layers is None else list(layers), "loss_fn": loss_fn}
    operators = {name: Hessian(model, batches, over=name, **how) for name in over}
    budget: dict[str, Any] = {"top_products": TOP_PRODUCTS, "trace_products": trace_products, "seed": seed}
    spaces = {name: space_curvature(operator, **budget)[0] for name, operator in operators.items()}
    first = next(iter(operators.values()))
    if "tangent" not in operators and "factors" not in operators:
        return CurvaturePoint(step, first.loss(), float(first.gradient().double().norm()), None, spaces)
    tangent = operators.get("tangent") or Hessian(model, batches, over="tangent", **how)
    probed = [layer for layer in probed_layers(model) if layer.name in tangent.space.layout]
    norms = gradient_norms(model, batches, layers=probed, loss_fn=loss_fn, progress=False)
    norm = math.hypot(*norms.values())
    captured = float(tangent.gradient().double().norm())
    return CurvaturePoint(
        step, first.loss(), norm, min((captured / norm) ** 2, 1.0) if norm > 0 else 0.0, spaces
    )


class CurvatureCallback(TrainerCallback):
    """Appends a `CurvaturePoint` as a JSON line to a file every few steps; training stays what it is.

    Points are measured at the start, every ``every`` steps and at the end. Works with any Hugging Face Trainer. Under
    ``torch.distributed`` every rank reads its own batches, and the first one writes.

    Examples:
        >>> trainer.add_callback(CurvatureCallback(batches, every=50))  # doctest: +SKIP
    """

    def __init__(
        self,
        batches: Iterable[Any],
        *,
        every: int,
        path: str | Path | None = None,
        over: Sequence[Over] = ("tangent", "factors"),
        layers: Iterable[str] | None = None,
        loss_fn: LossFn | None = None,
        trace_products: int = 30,
        seed: int = 0,
        on_point: Callable[[CurvaturePoint], object] | None = None,
    ):
        check_whole("every", every, low=1)
        check_whole("trace_products", trace_products, low=6)
        if isinstance(over, str) or not over:
            raise InputError(f"over must be a list of {', '.join(SPACES)}; got {over!r}")
        for name in over:
            check_choice("over", name, SPACES)
        self._batches = as_batches(batches)
        self._every = every
        self._path = None if path is None else Path(path)
        self._how: dict[str, Any] = {
            "over": tuple(over),
            "layers": layers if layers is None else list(layers),
            "loss_fn": loss_fn,
            "trace_products": trace_products,
            "seed": seed,
        }
        self._on_point = on_point
        self.watch = Stopwatch()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ):
        """Measure the initial state, or continue from a checkpoint."""
        self._lines = JsonLines(self._path or RunFolder(Path(str(args.output_dir))).curvature)
        self._lines.begin(state.global_step)
        if not state.global_step:
            self._append(model, state)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ):
        """Measure where the step led, if its turn has come."""
        step = state.global_step
        if step % self._every and step != state.max_steps:
            return
        try:
            self._append(model, state)
        except InputError as problem:  # the same examples were fine at the start
            raise DivergedError(f"step {step}: {problem}") from problem

    def _append(self, model: nn.Module, state: TrainerState) -> None:
        with self.watch:
            point = curvature_point(model, self._batches, state.global_step, **self._how)
        self._lines.append(asdict(point))
        if self._on_point is not None:
            self._on_point(point)


def read_curvature(path: str | Path) -> list[CurvaturePoint]:
    """Read the points that `CurvatureCallback` wrote."""
    return TypeAdapter(list[CurvaturePoint]).validate_python(read_history(Path(path)))
