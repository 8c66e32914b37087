"""LoRA-One's ReLU model: preconditioned descent from the spectral start, with two kinds of gradient."""

from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from reproductions.result import Check, Progress, Result, Table, at_most, near, outcomes
from reproductions.shift import (
    LORA_ONE,
    Factors,
    contraction,
    draw_inputs,
    draw_shift,
    errors_of_descent,
    preconditioned_step,
    slope,
    spectral_start,
)
from tangora._types import Weight
from tangora.experiments.values import Settings as BaseSettings
from tangora.report.drawing.panels import Figure, Panel, Series

GradientKind: TypeAlias = Literal["GLM-tron", "true"]
KINDS: tuple[GradientKind, ...] = get_args(GradientKind)

START_STEP = 2.0
"""The expected GLM-tron gradient is half the error, so two of it make the shift."""
NEAR = 1 / 20
"""The theorem's largest start error, in units of the smallest singular value of the shift."""
_ENOUGH = 1e-9
_THEOREM = f"{LORA_ONE}, theorem 4.3"

STAND_INS = (
    "The source's sizes, number of examples and step sizes were not available: those in the settings are ours.",
    "The pre-trained weights are random with rows of norm one; the source says nothing of them.",
    "With the true gradient the spectral start is made from it too, since that is what training can read.",
)
QUICK = {
    "num_seeds": 2,
    "m": 6,
    "n": 6,
    "examples": 24_000,
    "conditions": (1.0, 2.0),
    "learning_rates": (0.5, 0.9),
    "count_halvings": 4,
}


class Settings(BaseSettings):
    """Sizes and steps."""

    seed: int = Field(default=0, ge=0, description="First seed.")
    num_seeds: int = Field(default=3, ge=1, description="Seeds of weights, shift and inputs.")
    m: int = Field(default=12, ge=1, description="Outputs.")
    n: int = Field(default=16, ge=2, description="Inputs.")
    rank: int = Field(default=2, ge=1, description="Rank of the shift and of the adapter.")
    shift_size: float = Field(
        default=1.0, gt=0, description="Largest singular value of the shift; the weights' rows have norm one."
    )
    examples: int = Field(default=2**15, ge=64, description="Number of Gaussian inputs.")
    conditions: tuple[float, ...] = Field(
        default=(1.0, 2.0, 4.0), min_length=1, description="Condition numbers of the shift."
    )
    learning_rates: tuple[float, ...] = Field(
        default=(0.25, 0.5, 0.9), min_length=1, description="Steps of preconditioned descent, below 1."
    )
    steps: int = Field(default=200, ge=4, description="Most steps of descent.")
    damping: float = Field(default=1e-6, gt=0, description="Damping of the preconditioner; LoRA-One's.")
    count_halvings: int = Field(
        default=6, ge=2, description="The start error is measured with examples / 2^0 ... 2^this."
    )


class Problem(NamedTuple):
    """One seed's problems, which differ in the shift."""

    inputs: Float[Tensor, "N n"]
    outputs: Float[Tensor, "k N m"]
    weight: Float[Tensor, "m n"]
    shift: Float[Tensor, "k m n"]

    def gradient(self, update: Weight, kind: GradientKind) -> Weight:
        r"""Return a full gradient at an update of each shift's weight.

        The true one is that of $\frac{1}{2N}\|\sigma(X W^\top) - \sigma(X W_*^\top)\|_F^2$; GLM-tron's leaves out the
        factor $\sigma'(X W^\top)$ and is no gradient of it.
        """
        X = self.inputs
        before = X @ (self.weight + update).mT
        residual = before.relu() - self.outputs
        if kind == "true":
            residual = residual * (before > 0)
        return residual.mT @ X / len(X)

    def error(self, update: Weight, rank: int) -> Float[Tensor, " k"]:
        r"""Return $\|Y - \Delta\|_F / \lambda_r(\Delta)$ for each shift."""
        smallest = torch.linalg.svdvals(self.shift)[:, rank - 1]
        return torch.linalg.matrix_norm(update - self.shift) / smallest

    def start(self, kind: GradientKind, rank: int) -> Factors:
        """Build the spectral start for each shift."""
        gradient = self.gradient(torch.zeros_like(self.shift), kind)
        return spectral_start(gradient, rank, step=START_STEP)

    def start_errors(self, kind: GradientKind, counts: list[int], rank: int) -> Float[Tensor, "N k"]:
        """Return the errors of the spectral starts from the first examples, by their number."""
        parts = (
            self._replace(inputs=self.inputs[:count], outputs=self.outputs[:, :count]) for count in counts
        )
        return torch.stack([self.error(part.start(kind, rank).product, rank) for part in parts])


class Summary(NamedTuple):
    """The descents with one kind of gradient and one step size, over all seeds."""

    kind: GradientKind
    learning_rate: float
    errors: Float[Tensor, "t k s"]
    r"""$\|B A - \Delta\|_F / \lambda_r(\Delta)$ by step, padded with NaN."""
    factors: Float[Tensor, "k s"]
    """Factors by which the error shrinks in each step."""

    @property
    def bound(self) -> float:
        """The theorem's factor."""
        return 1 - self.learning_rate / 4

    @property
    def expected(self) -> float:
        """The factor of the expected GLM-tron gradient, half the error."""
        return 1 - self.learning_rate / 2

    @property
    def speeds(self) -> Float[Tensor, "k s"]:
        """Logarithmic rates in units of that of the expected GLM-tron gradient."""
        return self.factors.log() / torch.log(torch.tensor(self.expected))

    def over_bound(self, *, near_only: bool) -> float:
        """Return the largest ratio of an error after the start to its bound, at most 1 where the theorem holds.

        Args:
            near_only: Only starts within the theorem's condition, with its bound on the start; else each start with
                its own error. NaN without a start.
        """
        decay = self.bound ** torch.arange(len(self.errors), dtype=torch.float64)[:, None, None]
        first = self.errors[0]
        over = self.errors / decay / (NEAR if near_only else first)
        kept = over[1:, first <= NEAR] if near_only else over[1:]
        kept = kept[~kept.isnan()]
        return float(kept.max()) if kept.numel() else float("nan")


class Found(NamedTuple):
    """All that was measured."""

    summaries: list[Summary]
    counts: list[int]
    """Numbers of examples of the spectral starts."""
    starts: Float[Tensor, "g N k s"]
    """Errors of the spectral starts, by kind of gradient and number of examples."""

    def of(self, kind: GradientKind) -> list[Summary]:
        """Return the descents with one kind of gradient, by step size."""
        return [summary for summary in self.summaries if summary.kind == kind]

    def speeds(self, kind: GradientKind) -> Float[Tensor, "p k s"]:
        """Return `Summary.speeds` by step size."""
        return torch.stack([each.speeds for each in self.of(kind)])

    def over_bound(self, kind: GradientKind, *, near_only: bool = False) -> float:
        """Return the largest `Summary.over_bound`; a NaN does not hide."""
        ratios = [each.over_bound(near_only=near_only) for each in self.of(kind)]
        return float(torch.tensor(ratios, dtype=torch.float64).max())

    def spread(self) -> float:
        """Return the largest over the smallest logarithmic rate of the condition numbers, with GLM-tron."""
        speeds = self.speeds("GLM-tron")
        return float((speeds.amax(1) / speeds.amin(1)).max())

    def start_slope(self) -> float:
        """Return the exponent of the number of examples in GLM-tron's start error."""
        logs = torch.tensor(self.counts, dtype=torch.float64).log()
        return float(slope(logs, self.starts[0].mean((-2, -1)).log()))


CHECKS = (
    Check[Found](
        "The spectral start is within λ_r/20 of the shift with the best-conditioned shift: largest error over λ_r.",
        at_most(NEAR),
        lambda found: float(found.starts[0, -1, 0].max()),
        _THEOREM,
    ),
    Check[Found](
        "From starts within λ_r/20, GLM-tron's error stays below (1 − η/4)^t λ_r/20: largest ratio.",
        at_most(1.0),
        lambda found: found.over_bound("GLM-tron", near_only=True),
        _THEOREM,
    ),
    Check[Found](
        "From all starts, GLM-tron's error stays below (1 − η/4)^t times the first: largest ratio.",
        at_most(1.0),
        lambda found: found.over_bound("GLM-tron"),
        _THEOREM,
    ),
    Check[Found](
        "So does the true gradient's.",
        at_most(1.0),
        lambda found: found.over_bound("true"),
        f"{_THEOREM}, remark",
    ),
    Check[Found](
        "The rate does not depend on the condition number: largest over smallest logarithmic rate, GLM-tron.",
        at_most(1.1),
        Found.spread,
        _THEOREM,
    ),
    Check[Found](
        "The expected GLM-tron gradient is half the error: rate over that of 1 − η/2, mean.",
        near(1.0, tolerance=0.1),
        lambda found: float(found.speeds("GLM-tron").mean()),
        f"{_THEOREM}, proof",
    ),
    Check[Found](
        "GLM-tron's start error falls like one over the root of N: slope in logarithms.",
        near(-0.5, tolerance=0.15),
        Found.start_slope,
        f"{_THEOREM}, proof",
    ),
)


def run(settings: Settings, progress: Progress) -> Result:
    """Measure what theorem 4.3 states: start errors, rates and bounds."""
    pairs: list[tuple[GradientKind, float]] = [
        (kind, eta) for kind in KINDS for eta in settings.learning_rates
    ]
    errors: dict[tuple[GradientKind, float], list[Tensor]] = {pair: [] for pair in pairs}
    counts = [settings.examples >> power for power in range(settings.count_halvings, -1, -1)]
    starts, done = [], 0
    for seed in range(settings.seed, settings.seed + settings.num_seeds):
        problem = draw_problem(settings, seed)
        starts.append(torch.stack([problem.start_errors(kind, counts, settings.rank) for kind in KINDS]))
        for kind, eta in pairs:
            errors[kind, eta].append(
                errors_of_descent(
                    problem.start(kind, settings.rank),
                    lambda update, p=problem, kind=kind: p.gradient(update, kind),
                    preconditioned_step(settings.damping),
                    eta,
                    settings.steps,
                    lambda update, p=problem: p.error(update, settings.rank),
                    _ENOUGH,
                )
            )
            done += 1
            progress(done, settings.num_seeds * len(pairs))
    summaries = [_summary(kind, eta, errors[kind, eta]) for kind, eta in pairs]
    found = Found(summaries, counts, torch.stack(starts, dim=-1))
    return Result(
        findings=_findings(settings, found),
        tables=[_rate_table(found), _start_table(settings, found)],
        figures=[_error_figure(settings, found), _rate_figure(settings, found)],
        checks=outcomes(CHECKS, found),
        data={"start_errors": found.starts, "examples": counts},
    )


def draw_problem(settings: Settings, seed: int) -> Problem:
    """Draw weights, inputs, and one shift for each condition number, all with the same singular spaces."""
    shifts = []
    for condition in settings.conditions:
        generator = torch.Generator().manual_seed(seed)
        drawn = draw_shift(settings.m, settings.n, settings.rank, condition, generator)
        shifts.append(settings.shift_size * drawn)
    generator = torch.Generator().manual_seed(10_000 + seed)
    weight = torch.randn(settings.m, settings.n, generator=generator, dtype=torch.float64)
    inputs = draw_inputs(settings.examples, settings.n, "gaussian", generator)
    weight = weight / weight.norm(dim=1, keepdim=True)
    shift = torch.stack(shifts)
    return Problem(inputs, (inputs @ (weight + shift).mT).relu(), weight, shift)


def _summary(kind: GradientKind, learning_rate: float, by_seed: list[Tensor]) -> Summary:
    errors = torch.full((max(map(len, by_seed)), by_seed[0].shape[1], len(by_seed)), torch.nan).double()
    for i, each in enumerate(by_seed):
        errors[: len(each), :, i] = each
    factors = [[contraction(each[:, k], 1e-8, 1.0) for each in by_seed] for k in range(errors.shape[1])]
    return Summary(kind, learning_rate, errors, torch.tensor(factors))


def _findings(settings: Settings, found: Found) -> list[str]:
    glm, true = (found.speeds(kind) for kind in KINDS)
    last = found.starts[:, -1].mean(-1)
    near_starts = found.starts[0, -1] <= NEAR
    gain = found.starts[:, 0, 0].mean(-1) / last[:, 0]
    return [
        (
            f"GLM-tron's error shrinks like (1 − η/2)^t, not just like the theorem's (1 − η/4)^t: its logarithmic rate "
            f"is {glm.min():.2f} to {glm.max():.2f} times that of 1 − η/2, whatever the condition number."
        ),
        (
            f"The true gradient is as fast ({true.min():.2f} to {true.max():.2f} times), but starts farther away: "
            f"{last[1, 0]:.2g} λ_r against {last[0, 0]:.2g} λ_r at condition number {settings.conditions[0]:g}. "
            f"{2**settings.count_halvings} times as many examples divided GLM-tron's start error by {gain[0]:.2g} and "
            f"the true gradient's by {gain[1]:.2g}."
        ),
        (
            f"{int(near_starts.sum())} of {near_starts.numel()} GLM-tron starts are within the theorem's λ_r/20; the "
            f"others, up to {found.starts[0, -1].max():.2g} λ_r, converge at the same rate."
        ),
    ]


def _banded(name: str, x: object, values: Float[Tensor, "x s"]) -> Series:
    return Series(name, x, values.mean(1), values.amin(1), values.amax(1))


def _error_figure(settings: Settings, found: Found) -> Figure:
    eta = min(settings.learning_rates, key=lambda each: abs(each - 0.5))
    panels = []
    for kind in KINDS:
        (summary,) = (each for each in found.of(kind) if each.learning_rate == eta)
        steps = torch.arange(len(summary.errors), dtype=torch.float64)
        series = [
            *(
                _banded(f"κ = {condition:g}", steps.long(), summary.errors[:, k])
                for k, condition in enumerate(settings.conditions)
            ),
            Series("(1 − η/4)^t / 20", steps, NEAR * summary.bound**steps, style="dashed"),
            Series("(1 − η/2)^t / 20", steps, NEAR * summary.expected**steps, style="dashed"),
        ]
        title = f"{kind[0].upper()}{kind[1:]} gradient"
        panels.append(Panel(title, "step", "‖BA − Δ‖ / λ_r", series, yscale="log"))
    return Figure(
        "errors",
        f"Preconditioned descent from the spectral start, η = {eta:g}",
        "κ: condition number of the shift. The theorem is about GLM-tron's gradient and starts below 1/20.",
        panels,
    )


def _rate_figure(settings: Settings, found: Found) -> Figure:
    factors = [
        _banded(
            kind, settings.learning_rates, torch.stack([each.factors.flatten() for each in found.of(kind)])
        )
        for kind in KINDS
    ]
    etas = torch.linspace(min(settings.learning_rates), max(settings.learning_rates), 20)
    theory = [
        Series("1 − η/4 (theorem)", etas, 1 - etas / 4, style="dashed"),
        Series("1 − η/2 (expectation)", etas, 1 - etas / 2, style="dashed"),
    ]
    counts = found.counts
    starts = [_banded(kind, counts, found.starts[i, :, 0]) for i, kind in enumerate(KINDS)]
    edge = Series("1/20", [counts[0], counts[-1]], [NEAR, NEAR], style="dashed")
    return Figure(
        "rates",
        "Rates and starts",
        "Left: factor by which the error shrinks in each step, over all condition numbers and seeds. Right: error of "
        f"the spectral start at condition number {settings.conditions[0]:g}; the theorem wants it below 1/20.",
        (
            Panel("Factor per step", "step size η", "factor", [*factors, *theory]),
            Panel(
                "Spectral start",
                "examples N",
                "‖B₀A₀ − Δ‖ / λ_r",
                [*starts, edge],
                xscale="log",
                yscale="log",
            ),
        ),
    )


def _rate_table(found: Found) -> Table:
    each = found.summaries
    return Table.of(
        "Factor by which the error shrinks in each step",
        {
            "gradient": [one.kind for one in each],
            "η": [one.learning_rate for one in each],
            "factor, mean": [one.factors.mean() for one in each],
            "factor, largest": [one.factors.max() for one in each],
            "1 − η/2": [one.expected for one in each],
            "1 − η/4": [one.bound for one in each],
            "over the theorem's bound": [one.over_bound(near_only=True) for one in each],
            "over (1 − η/4)^t of its start": [one.over_bound(near_only=False) for one in each],
        },
        "Over all condition numbers and seeds. Over the bound: largest ratio over all steps; the theorem's bound is "
        "for starts within λ_r/20 only, a dash where there is none.",
    )


def _start_table(settings: Settings, found: Found) -> Table:
    ends: dict[str, object] = {"condition number": settings.conditions}
    for errors, kind in zip(found.starts[:, -1], KINDS, strict=True):
        ends |= {f"{kind}, smallest": errors.amin(-1), f"{kind}, largest": errors.amax(-1)}
    caption = f"Over seeds, with {settings.examples} examples. The theorem wants at most {NEAR:g}."
    return Table.of("Error of the spectral start in units of λ_r", ends, caption)
