r"""Growth with the width of a step's effect on a layer's output, at one learning rate.

Stable feature learning means that the effect neither vanishes nor explodes as the layer grows: slope 0 in log-log.
With inputs $h$ of order one per coordinate, $\|h\|^2 \propto n$, and (``standard`` readout) a gradient
$g = \delta h^\top$ with $\delta \propto n^{-1/2}$ per coordinate, the first step of plain descent changes $W h$ by

- $g h = \delta \|h\|^2 \propto n^{1/2}$ in full fine-tuning, and wherever $P_T(g) = g$;
- $g P_A h \propto n^{-1/2}$ from a random $A$ and $B = 0$, because $h^\top P_A h \propto r$ instead of $n$;
- $P_B g h \propto n^0$ more from a random $B$, because $\|P_B \delta\|^2 \approx (r/n) \|\delta\|^2$.

Adam's first step of the weight is $\mathrm{sign}(g)$, so that $\Delta W h \propto n$; LoRA's from $B = 0$ is
$\mathrm{sign}(g_B) A h \propto n^0$.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import Field, field_validator
from scipy import stats
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from reproductions.result import Check, Progress, Result, Table, near, outcomes
from tangora._checks import check_choice
from tangora.adapters import find_pairs
from tangora.experiments.values import Settings as BaseSettings
from tangora.init import initialize
from tangora.optim import ODELoRA
from tangora.recipes import recipe
from tangora.report.drawing.panels import Figure, Panel, Series

STARTS = {"plain": "lora", "orthogonal": "orthogonal", "lora-ga": "lora-ga"}
"""Initializations by name."""
_NO_START = "none"
# the same for all; decay would shrink the weights and blur what a gradient step does
_ADAM: dict[str, Any] = {"weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8}
_ESTIMATE = "this project's estimate; ODELoRA's own theorem could not be read"

STAND_INS = (
    (
        "Only ODELoRA's abstract could be read: which quantity its claim is about and at which scaling is not known, "
        "so no claim of the paper is asserted and the exponents are reported as measured."
    ),
    "A three-layer tanh network with LoRA on its square layer, one fixed batch, random targets.",
)
QUICK = {"widths": [64, 512], "num_seeds": 3, "steps": 2, "starts": ["plain"]}


class Settings(BaseSettings):
    """Network, methods and steps."""

    widths: list[int] = Field(
        default=[128, 256, 512, 1024, 2048, 4096], description="Widths of the hidden layers."
    )
    num_seeds: int = Field(default=3, ge=1, description="Networks per width.")
    seed: int = Field(default=0, ge=0, description="Seed of the first network; the others follow.")
    steps: int = Field(default=5, ge=1, description="Optimizer steps on one batch.")
    starts: list[str] = Field(default=list(STARTS), description="LoRA starts: plain, orthogonal, lora-ga.")
    rank: int = Field(default=8, ge=1, description="LoRA's r.")
    alpha: float = Field(default=16.0, gt=0, description="LoRA's alpha.")
    inputs: int = Field(default=32, ge=1, description="Input features.")
    outputs: int = Field(default=16, ge=1, description="Outputs.")
    num_examples: int = Field(default=32, ge=1, description="Examples in the batch.")
    readout: Literal["standard", "mean-field"] = Field(
        default="standard",
        description="Last layer's weights of size width^-1/2 (standard) or 1/width (mean-field).",
    )
    full_rate: float = Field(
        default=3e-5, gt=0, description="Learning rate of Adam-like methods in full fine-tuning's units."
    )
    lora_rate: float = Field(
        default=3e-4, gt=0, description="Learning rate of Adam-like methods in LoRA's units."
    )
    sgd_rate: float = Field(default=3e-3, gt=0, description="Learning rate of methods without moments.")

    @field_validator("widths")
    @classmethod
    def _several(cls, widths: list[int]) -> list[int]:
        if len(set(widths)) < 2 or min(widths) < 1:
            raise ValueError(f"widths must be at least two different positive numbers; got {widths}")
        return sorted(set(widths))

    @field_validator("starts")
    @classmethod
    def _known(cls, starts: list[str]) -> list[str]:
        for start in starts:
            check_choice("starts", start, STARTS)
        return starts


class Trainer(NamedTuple):
    """A method that trains the hidden layer."""

    make: Callable[[nn.Module, float], Optimizer]
    """``make(model, lr)`` -> optimizer of the trainable parameters."""
    rate: Literal["full_rate", "lora_rate", "sgd_rate"]
    """Setting that holds its learning rate, the same at all widths."""
    adapts: bool = True
    """Whether it trains LoRA factors; else the weight itself."""


def _by_recipe(name: str) -> Callable[[nn.Module, float], Optimizer]:
    return lambda model, lr: recipe(name).create_optimizer(model, lr, **_ADAM)


def _sgd(model: nn.Module, lr: float) -> Optimizer:
    return SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=lr)


TRAINERS = {
    "full (SGD)": Trainer(_sgd, "sgd_rate", adapts=False),
    "full (Adam)": Trainer(_by_recipe("full"), "full_rate", adapts=False),
    "LoRA (SGD)": Trainer(_sgd, "sgd_rate"),
    "LoRA (Adam)": Trainer(_by_recipe("lora"), "lora_rate"),
    "LoRA+": Trainer(_by_recipe("lora+"), "full_rate"),
    "P-LoRA": Trainer(_by_recipe("p-lora"), "lora_rate"),
    "LoRA-Pro (SGD)": Trainer(_by_recipe("lora-pro-sgd"), "sgd_rate"),
    "LoRA-Pro (Adam)": Trainer(_by_recipe("lora-pro"), "full_rate"),
    "TangentAdam": Trainer(_by_recipe("tangent"), "full_rate"),
    "ODELoRA (Euler)": Trainer(lambda model, lr: ODELoRA(model, lr, scheme="euler"), "sgd_rate"),
}
"""Methods by name."""

_EXPONENTS = {
    ("full (SGD)", _NO_START): 0.5,
    ("full (Adam)", _NO_START): 1.0,
    ("LoRA (SGD)", "plain"): -0.5,
    ("LoRA (Adam)", "plain"): 0.0,
    ("LoRA-Pro (SGD)", "plain"): -0.5,
    ("ODELoRA (Euler)", "plain"): -0.5,
    ("LoRA-Pro (SGD)", "orthogonal"): 0.0,
    ("ODELoRA (Euler)", "orthogonal"): 0.0,
}
"""Exponents of the first step with a standard readout, by method and start, as estimated above."""


class Slope(NamedTuple):
    """A slope in log-log, its mean over seeds and a 95 % interval (``None`` with one seed)."""

    mean: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.low is None else f" [{self.low:.2f}, {self.high:.2f}]")


Key = tuple[str, str]
"""Method and start."""
Slopes = Mapping[Key, Slope | None]


@dataclass(frozen=True)
class Found:
    """Sizes of the change of the output by method and start, and their exponents after the first and the last step."""

    sizes: Mapping[Key, np.ndarray]
    """Seeds x widths x steps, in units of the learning rate."""
    first: Slopes
    last: Slopes


def checks(settings: Settings) -> list[Check[Found]]:
    """Declare the exponents of the first step; a gradient smaller by n^-1/2 lowers those without moments by 1/2."""
    declared = []
    for key, exponent in _EXPONENTS.items():
        method, start = key
        lowered = settings.readout == "mean-field" and TRAINERS[method].rate == "sgd_rate"
        expected = exponent - 0.5 * lowered
        where = "" if start == _NO_START else f" from the {start} start"
        if start in (_NO_START, *settings.starts):
            declared.append(
                Check[Found](
                    f"{method}{where}: exponent {expected:g} at the first step",
                    near(expected, tolerance=0.25),
                    lambda found, key=key: slope.mean if (slope := found.first[key]) else None,
                    _ESTIMATE,
                )
            )
    return declared


def run(settings: Settings, progress: Progress) -> Result:
    """Measure all methods at all widths: sizes of steps and their slopes."""
    sizes = _measure(settings, progress)
    first, last = (
        {key: loglog_slope(settings.widths, each[:, :, step]) for key, each in sizes.items()}
        for step in (0, -1)
    )
    found = Found(sizes, first, last)
    return Result(
        findings=_findings(settings, found),
        tables=[_table(settings, found)],
        figures=[_figure(settings, found, start) for start in settings.starts],
        checks=outcomes(checks(settings), found),
        data={
            "widths": settings.widths,
            "sizes": {f"{method}, {start}": each for (method, start), each in sizes.items()},
            "axes": "seed, width, step; change of the output divided by the learning rate",
        },
    )


def loglog_slope(widths: Sequence[int], sizes: np.ndarray) -> Slope | None:
    """Fit a power law to each seed (rows) by least squares in the logarithms.

    Returns the mean of the seeds' exponents and Student's 95 % interval for it; ``None`` unless all sizes are positive
    and finite.
    """
    if not (np.isfinite(sizes).all() and (sizes > 0).all()):
        return None
    slopes = np.polyfit(np.log(widths), np.log(sizes).T, 1)[0]
    mean = float(slopes.mean())
    if len(slopes) < 2:
        return Slope(mean, None, None)
    half = float(stats.t.ppf(0.975, len(slopes) - 1) * stats.sem(slopes))
    return Slope(mean, mean - half, mean + half)


class HiddenLayer:
    r"""A tanh network $d \to n \to n \to c$ without biases, of the given width, whose square layer is trained.

    The first layer is frozen, so the trained layer's input $h$ is fixed; its entries are of order one at every width.
    """

    def __init__(self, width: int, settings: Settings, seed: int):
        generator = torch.Generator().manual_seed(seed)
        last = width**-0.5 if settings.readout == "standard" else 1 / width
        layers = [
            _linear(settings.inputs, width, settings.inputs**-0.5, generator),
            nn.Tanh(),
            _linear(width, width, width**-0.5, generator),
            nn.Tanh(),
            _linear(width, settings.outputs, last, generator),
        ]
        x = torch.randn(settings.num_examples, settings.inputs, generator=generator)
        self._batch = (x, torch.randn(settings.num_examples, settings.outputs, generator=generator))
        self._seed = seed
        self._plain = nn.Sequential(*layers)
        with torch.no_grad():
            self.h = self._plain[:2](x)
        config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=["2"])  # pyright: ignore[reportArgumentType]
        with torch.random.fork_rng(devices=[]):
            # PEFT wraps the layer in this second container only; its factors get their values from `initialize`
            adapted = get_peft_model(nn.Sequential(*layers), config)  # pyright: ignore[reportArgumentType]
        assert isinstance(adapted, PeftModel)
        self._adapted = adapted

    def changes(self, trainer: Trainer, start: str, lr: float, steps: int) -> list[float]:
        r"""Train the layer from a start, all steps on the same batch, and measure how far its output has moved.

        Returns $\|\Delta W h\|$ after each step, root mean square over examples and coordinates; NaN from the first
        step on that could not be taken because a gradient was not finite.
        """
        if not trainer.adapts:
            return self._full(trainer, lr, steps)
        model = self._adapted
        batches = [self._batch] if start == "lora-ga" else None
        (pair,) = find_pairs(model)
        nn.init.zeros_(pair.B)  # no trace of the last method
        initialize(model, STARTS[start], batches, loss_fn=_loss, seed=self._seed, progress=False)  # pyright: ignore[reportArgumentType]

        def output() -> Tensor:
            A, B = pair.factors()
            return pair.scaling * ((self.h @ A.mT) @ B.mT)

        return self._train(model, trainer.make(model, lr), steps, output)

    def _full(self, trainer: Trainer, lr: float, steps: int) -> list[float]:
        weight = self._plain[2].weight
        assert isinstance(weight, nn.Parameter)
        kept = weight.detach().clone()
        weight.requires_grad_(True)
        try:
            optimizer = trainer.make(self._plain, lr)
            return self._train(self._plain, optimizer, steps, lambda: self.h @ (weight.detach() - kept).mT)
        finally:
            weight.requires_grad_(False)
            weight.data.copy_(kept)
            weight.grad = None

    def _train(
        self, model: nn.Module, optimizer: Optimizer, steps: int, output: Callable[[], Tensor]
    ) -> list[float]:
        def closure() -> float:
            optimizer.zero_grad()
            loss = _loss(model, self._batch)
            loss.backward()
            return loss.item()

        before, sizes = output(), []
        with warnings.catch_warnings():
            # LoRA-Pro warns of its jump from B = 0, which is among the things measured here
            warnings.filterwarnings("ignore", message="step .* changes A of", category=UserWarning)
            for _ in range(steps):
                try:
                    optimizer.step(closure)
                except FloatingPointError:
                    break
                sizes.append(float((output() - before).square().mean().sqrt()))
        return sizes + [math.nan] * (steps - len(sizes))


def _linear(inputs: int, outputs: int, size: float, generator: torch.Generator) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False, device="meta").to_empty(device="cpu")
    torch.nn.init.normal_(layer.weight, std=size, generator=generator)
    return layer.requires_grad_(False)


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (model(x) - y).square().sum(-1).mean() / 2


def _measure(settings: Settings, progress: Progress) -> dict[Key, np.ndarray]:
    keys = [
        (method, start)
        for method, trainer in TRAINERS.items()
        for start in (settings.starts if trainer.adapts else [_NO_START])
    ]
    sizes = np.full((len(keys), settings.num_seeds, len(settings.widths), settings.steps), np.nan)
    done = 0
    for column, width in enumerate(settings.widths):
        for seed in range(settings.num_seeds):
            layer = HiddenLayer(width, settings, settings.seed + seed)
            for index, (method, start) in enumerate(keys):
                trainer = TRAINERS[method]
                lr = getattr(settings, trainer.rate)
                sizes[index, seed, column] = np.array(layer.changes(trainer, start, lr, settings.steps)) / lr
                done += 1
                progress(done, sizes[..., 0].size)
    return dict(zip(keys, sizes, strict=True))


def _table(settings: Settings, found: Found) -> Table:
    steps = f"{settings.steps} steps"
    ends = [np.array([np.median(each[:, at, -1]) for each in found.sizes.values()]) for at in (0, -1)]
    return Table.of(
        "Exponent of the width in the change of the layer's output",
        {
            "method": [method for method, _ in found.sizes],
            "start": [start for _, start in found.sizes],
            "slope, step 1": [str(slope or "diverged") for slope in found.first.values()],
            f"slope, {steps}": [str(slope or "diverged") for slope in found.last.values()],
            f"{steps}, n = {settings.widths[0]}": ends[0],
            f"{steps}, n = {settings.widths[-1]}": ends[1],
        },
        "Zero is stable feature learning. Mean over seeds and 95 % interval of the fitted exponent; the last two "
        "columns are the change itself in units of the learning rate, median over seeds.",
    )


def _figure(settings: Settings, found: Found, start: str) -> Figure:
    def series(method: str, sizes: np.ndarray) -> Series:
        style = "line" if TRAINERS[method].adapts else "dashed"
        return Series(method, settings.widths, np.median(sizes, 0), sizes.min(0), sizes.max(0), style=style)

    shown = {method: each for (method, of), each in found.sizes.items() if of in (start, _NO_START)}
    panels = [
        Panel(
            "after 1 step" if step == 0 else f"after {settings.steps} steps",
            "width n",
            "RMS change of the output / learning rate",
            [series(method, each[:, :, step]) for method, each in shown.items()],
            xscale="log",
            yscale="log",
        )
        for step in dict.fromkeys((0, settings.steps - 1))
    ]
    return Figure(
        f"width-{start}",
        f"Change of the layer's output, {start} start",
        "A level curve is stable feature learning. Median over seeds, band from the smallest to the largest seed.",
        panels,
    )


def _findings(settings: Settings, found: Found) -> list[str]:
    first, steps, sentences = found.first, settings.steps, []
    for method in (name for name, trainer in TRAINERS.items() if trainer.adapts):
        by_start = {start: slope.mean for start in settings.starts if (slope := first[method, start])}
        if len(by_start) > 1 and max(by_start.values()) - min(by_start.values()) > 0.3:
            listed = ", ".join(f"{mean:.2f} from {start}" for start, mean in by_start.items())
            sentences.append(f"First step of {method}: the exponent depends on the start, {listed}.")
    for start in settings.starts:
        named = {method: slope.mean for (method, of), slope in found.last.items() if of == start and slope}
        level = [f"{method} ({mean:.2f})" for method, mean in named.items() if abs(mean) < 0.1]
        sentences.append(
            f"From the {start} start the exponent after {steps} steps is within 0.1 of zero for "
            f"{', '.join(level) if level else 'no method'}."
        )
        parted = [
            f"{method} ({before.mean:.2f} to {mean:.2f})"
            for method, mean in named.items()
            if (before := first[method, start]) and abs(mean - before.mean) > 0.3
        ]
        if parted:
            sentences.append(
                f"From the {start} start the exponent moves by more than 0.3 between step 1 and step {steps} for "
                f"{', '.join(parted)}."
            )
    return sentences
