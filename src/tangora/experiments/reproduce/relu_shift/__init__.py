"""LoRA-One's ReLU model: preconditioned descent from the spectral start, with two kinds of gradient."""

import torch
from jaxtyping import Float
from torch import Tensor

from tangora.experiments.reproduce.experiment import Progress
from tangora.experiments.reproduce.relu_shift.measure import (
    KINDS,
    NEAR,
    Descent,
    GradientKind,
    ReluShiftSettings,
    Summary,
    draw_problem,
    run_descent,
    start_errors,
    summarize,
)
from tangora.experiments.reproduce.shift import slope
from tangora.report.drawing.panels import Figure, Panel, Series
from tangora.report.reproduction.records import Check, Result, Table

_PAPER = "LoRA-One (arXiv:2502.01235), theorem 4.3"


def run_relu_shift(settings: ReluShiftSettings, progress: Progress) -> Result:
    """Measure what theorem 4.3 states.

    Args:
        settings: Sizes and steps.
        progress: Hears of descents.

    Returns:
        Start errors, rates and bounds.
    """
    total = settings.num_seeds * len(KINDS) * len(settings.learning_rates)
    descents: list[Descent] = []
    found = []
    counts = [settings.examples >> power for power in range(settings.count_halvings, -1, -1)]
    for seed in range(settings.seed, settings.seed + settings.num_seeds):
        problem = draw_problem(settings, seed)
        found.append(torch.stack([start_errors(problem, kind, counts, settings.rank) for kind in KINDS]))
        for kind in KINDS:
            for learning_rate in settings.learning_rates:
                descents.append(run_descent(problem, kind, learning_rate, settings))
                progress(len(descents), total)
    starts = torch.stack(found, dim=-1)
    summaries = [
        summarize([d for d in descents if (d.kind, d.learning_rate) == (kind, learning_rate)])
        for kind in KINDS
        for learning_rate in settings.learning_rates
    ]
    return Result(
        findings=_findings(settings, summaries, starts),
        tables=(_rate_table(summaries), _start_table(settings, starts)),
        figures=(_error_figure(settings, summaries), _rate_figure(settings, summaries, counts, starts)),
        checks=_checks(summaries, counts, starts),
        data={"start_errors": starts, "examples": counts},
    )


def _of(kind: GradientKind, summaries: list[Summary]) -> list[Summary]:
    return [summary for summary in summaries if summary.kind == kind]


def _largest(values: list[float]) -> float:
    # a NaN must not hide
    return float(torch.tensor(values, dtype=torch.float64).max())


def _speeds(summaries: list[Summary]) -> Float[Tensor, "p k s"]:
    # in units of the expected GLM-tron descent's
    return torch.stack([each.factors.log() / torch.log(torch.tensor(each.expected)) for each in summaries])


def _checks(
    summaries: list[Summary], counts: list[int], starts: Float[Tensor, "g N k s"]
) -> tuple[Check, ...]:
    glm, true = (_of(kind, summaries) for kind in KINDS)
    speeds = _speeds(glm)
    logs = torch.tensor(counts, dtype=torch.float64).log()
    return (
        Check(
            "The spectral start is within λ_r/20 of the shift with the best-conditioned shift: largest error over λ_r.",
            float(starts[0, -1, 0].max()),
            None,
            NEAR,
            _PAPER,
        ),
        Check(
            "From starts within λ_r/20, GLM-tron's error stays below (1 − η/4)^t λ_r/20: largest ratio.",
            _largest([each.over_bound(near_only=True) for each in glm]),
            None,
            1.0,
            _PAPER,
        ),
        Check(
            "From all starts, GLM-tron's error stays below (1 − η/4)^t times the first: largest ratio.",
            _largest([each.over_bound(near_only=False) for each in glm]),
            None,
            1.0,
            _PAPER,
        ),
        Check(
            "So does the true gradient's.",
            _largest([each.over_bound(near_only=False) for each in true]),
            None,
            1.0,
            f"{_PAPER}, remark",
        ),
        Check(
            "The rate does not depend on the condition number: largest over smallest logarithmic rate, GLM-tron.",
            float((speeds.amax(1) / speeds.amin(1)).max()),
            None,
            1.1,
            _PAPER,
        ),
        Check(
            "The expected GLM-tron gradient is half the error: rate over that of 1 − η/2, mean.",
            float(speeds.mean()),
            0.9,
            1.1,
            f"{_PAPER}, proof",
        ),
        Check(
            "GLM-tron's start error falls like one over the root of N: slope in logarithms.",
            float(slope(logs, starts[0].mean((-2, -1)).log())),
            -0.65,
            -0.35,
            f"{_PAPER}, proof",
        ),
    )


def _findings(
    settings: ReluShiftSettings, summaries: list[Summary], starts: Float[Tensor, "g N k s"]
) -> tuple[str, ...]:
    glm, true = (_speeds(_of(kind, summaries)) for kind in KINDS)
    last = starts[:, -1].mean(-1)
    near = starts[0, -1] <= NEAR
    gain = starts[:, 0, 0].mean(-1) / last[:, 0]
    return (
        (
            f"GLM-tron's error shrinks like (1 − η/2)^t, not just like the theorem's (1 − η/4)^t: its logarithmic "
            f"rate is {glm.min():.2f} to {glm.max():.2f} times that of 1 − η/2, whatever the condition number."
        ),
        (
            f"The true gradient is as fast ({true.min():.2f} to {true.max():.2f} times), but starts farther away: "
            f"{last[1, 0]:.2g} λ_r against {last[0, 0]:.2g} λ_r at condition number {settings.conditions[0]:g}. "
            f"{2**settings.count_halvings} times as many examples divided GLM-tron's start error by {gain[0]:.2g} and "
            f"the true gradient's by {gain[1]:.2g}."
        ),
        (
            f"{int(near.sum())} of {near.numel()} GLM-tron starts are within the theorem's λ_r/20; the others, up to "
            f"{starts[0, -1].max():.2g} λ_r, converge at the same rate."
        ),
    )


def _curves(name: str, errors: Float[Tensor, "t s"]) -> Series:
    return Series(name, torch.arange(len(errors)), errors.mean(-1), errors.amin(-1), errors.amax(-1))


def _error_figure(settings: ReluShiftSettings, summaries: list[Summary]) -> Figure:
    eta = min(settings.learning_rates, key=lambda each: abs(each - 0.5))
    panels = []
    for kind in KINDS:
        (summary,) = (each for each in _of(kind, summaries) if each.learning_rate == eta)
        steps = torch.arange(len(summary.errors), dtype=torch.float64)
        curves = [
            _curves(f"κ = {condition:g}", summary.errors[:, k])
            for k, condition in enumerate(settings.conditions)
        ]
        theory = [
            Series("(1 − η/4)^t / 20", steps, NEAR * summary.bound**steps, style="dashed"),
            Series("(1 − η/2)^t / 20", steps, NEAR * summary.expected**steps, style="dashed"),
        ]
        title = f"{kind} gradient" if kind != "true" else "True gradient"
        panels.append(Panel(title, "step", "‖BA − Δ‖ / λ_r", [*curves, *theory], yscale="log"))
    return Figure(
        "errors",
        f"Preconditioned descent from the spectral start, η = {eta:g}",
        "κ: condition number of the shift. The theorem is about GLM-tron's gradient and starts below 1/20.",
        panels,
    )


def _rate_figure(
    settings: ReluShiftSettings,
    summaries: list[Summary],
    counts: list[int],
    starts: Float[Tensor, "g N k s"],
) -> Figure:
    measured = []
    for kind in KINDS:
        factors = torch.stack([each.factors.flatten() for each in _of(kind, summaries)])
        measured.append(
            Series(kind, settings.learning_rates, factors.mean(1), factors.amin(1), factors.amax(1))
        )
    etas = torch.linspace(min(settings.learning_rates), max(settings.learning_rates), 20)
    theory = [
        Series("1 − η/4 (theorem)", etas, 1 - etas / 4, style="dashed"),
        Series("1 − η/2 (expectation)", etas, 1 - etas / 2, style="dashed"),
    ]
    by_count = [
        Series(kind, counts, starts[i, :, 0].mean(-1), starts[i, :, 0].amin(-1), starts[i, :, 0].amax(-1))
        for i, kind in enumerate(KINDS)
    ]
    edge = Series("1/20", [counts[0], counts[-1]], [NEAR, NEAR], style="dashed")
    return Figure(
        "rates",
        "Rates and starts",
        "Left: factor by which the error shrinks in each step, over all condition numbers and seeds. Right: error of "
        f"the spectral start at condition number {settings.conditions[0]:g}; the theorem wants it below 1/20.",
        (
            Panel("Factor per step", "step size η", "factor", [*measured, *theory]),
            Panel(
                "Spectral start",
                "examples N",
                "‖B₀A₀ − Δ‖ / λ_r",
                [*by_count, edge],
                xscale="log",
                yscale="log",
            ),
        ),
    )


def _rate_table(summaries: list[Summary]) -> Table:
    rows = tuple(
        (
            each.kind,
            each.learning_rate,
            float(each.factors.mean()),
            float(each.factors.max()),
            each.expected,
            each.bound,
            each.over_bound(near_only=True),
            each.over_bound(near_only=False),
        )
        for each in summaries
    )
    columns = (
        "gradient",
        "η",
        "factor, mean",
        "factor, largest",
        "1 − η/2",
        "1 − η/4",
        "over the theorem's bound",
        "over (1 − η/4)^t of its start",
    )
    return Table(
        "Factor by which the error shrinks in each step",
        columns,
        rows,
        "Over all condition numbers and seeds. Over the bound: largest ratio over all steps; the theorem's bound is "
        "for starts within λ_r/20 only, a dash where there is none.",
    )


def _start_table(settings: ReluShiftSettings, starts: Float[Tensor, "g N k s"]) -> Table:
    rows = tuple(
        (condition, *(float(value) for kind in range(len(KINDS)) for value in _range(starts[kind, -1, k])))
        for k, condition in enumerate(settings.conditions)
    )
    columns = ("condition number", *(f"{kind}, {end}" for kind in KINDS for end in ("smallest", "largest")))
    return Table(
        "Error of the spectral start in units of λ_r",
        columns,
        rows,
        f"Over seeds, with {settings.examples} examples. The theorem wants at most {NEAR:g}.",
    )


def _range(values: Tensor) -> tuple[float, float]:
    return float(values.min()), float(values.max())
