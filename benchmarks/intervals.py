"""How often do intervals over seeds and test examples hold the truth? tangora's, and the percentile bootstrap's.

Simulated paired differences of two methods, seeds x test examples, with known parts of variance. Both intervals see the
same numbers. Shares, not times: any machine gives the same.

    python benchmarks/intervals.py --output benchmarks/intervals.json
    python benchmarks/intervals.py --quick          # does it run? (few simulations, numbers mean nothing)
"""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from record import Target, environment, print_table, print_targets, save_record, target_records
from tangora.report.statistics.intervals import estimate

LEVEL = 0.95
LOWEST, HIGHEST = 0.92, 0.98
NUM_EXAMPLES = 100
RESAMPLES = 2000
REGIMES = {  # shares of the variance of the mean: seeds, examples, neither
    "seeds": (0.96, 0.02, 0.02),
    "examples": (0.02, 0.96, 0.02),
    "seeds and examples": (0.5, 0.5, 0.0),
    "neither": (0.0, 0.0, 1.0),
    "all three": (1 / 3, 1 / 3, 1 / 3),
}


def draw(rng: np.random.Generator, num_seeds: int, num_examples: int, shares: Any) -> NDArray[np.float64]:
    """Draw differences of mean 0, with a standard error of the mean of 1.

    Args:
        rng: Where randomness comes from.
        num_seeds: Rows.
        num_examples: Columns.
        shares: Of `REGIMES`.

    Returns:
        Seeds x examples.
    """
    seeds, examples, rest = np.sqrt(shares)
    return (
        seeds * rng.normal(0, np.sqrt(num_seeds), (num_seeds, 1))
        + examples * rng.normal(0, np.sqrt(num_examples), (1, num_examples))
        + rest * rng.normal(0, np.sqrt(num_seeds * num_examples), (num_seeds, num_examples))
    )


def bootstrap(rng: np.random.Generator, scores: NDArray[np.float64]) -> tuple[float, float]:
    """Return the percentile bootstrap's interval of the mean: seeds and examples drawn again, independently.

    Args:
        rng: Where randomness comes from.
        scores: Seeds x examples.

    Returns:
        Its ends.
    """
    num_seeds, num_examples = scores.shape
    rows = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), RESAMPLES) / num_seeds
    columns = rng.multinomial(num_examples, np.full(num_examples, 1 / num_examples), RESAMPLES) / num_examples
    means = ((rows @ scores) * columns).sum(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def measure(num_seeds: int, num_examples: int, shares: Any, simulations: int) -> dict[str, float]:
    """Simulate one regime.

    Args:
        num_seeds: Seeds.
        num_examples: Test examples; 1 where only a loss per seed is known.
        shares: Of `REGIMES`.
        simulations: How many.

    Returns:
        Coverage and mean width of both intervals.
    """
    rng = np.random.default_rng(0)
    held, width = np.zeros((simulations, 2)), np.zeros((simulations, 2))
    for index in range(simulations):
        scores = draw(rng, num_seeds, num_examples, shares)
        found = estimate(scores)
        assert found is not None
        for column, (low, high) in enumerate((found.interval, bootstrap(rng, scores))):
            held[index, column], width[index, column] = low <= 0 <= high, high - low
    names = ("coverage", "bootstrap_coverage")
    return dict(zip(names, held.mean(axis=0).tolist(), strict=True)) | dict(
        zip(("width", "bootstrap_width"), width.mean(axis=0).tolist(), strict=True)
    )


def main(
    simulations: Annotated[int, typer.Option(min=1, help="Simulated comparisons of each kind.")] = 1000,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="20 simulations: does it run?")] = False,
) -> None:
    """Measure how often intervals hold the truth."""
    simulations = 20 if quick else simulations
    facts = environment("cpu")
    results: dict[str, dict[str, float]] = {}
    for num_seeds in (3, 5):
        for name, shares in REGIMES.items():
            key = f"{num_seeds} seeds, noise from {name}"
            results[key] = measure(num_seeds, NUM_EXAMPLES, shares, simulations)
        results[f"{num_seeds} seeds, one number each"] = measure(num_seeds, 1, (1.0, 0.0, 0.0), simulations)
    rows = [
        (key, f"{100 * found['coverage']:.1f} %", f"{100 * found['bootstrap_coverage']:.1f} %")
        for key, found in results.items()
    ]
    print_table("coverage of 95 % intervals", ("regime", "tangora", "percentile bootstrap"), rows)
    worst = min(found["coverage"] for found in results.values())
    best = max(found["coverage"] for found in results.values())
    judged = [
        Target("lowest coverage", worst, LOWEST, at_least=True),
        Target("highest coverage", best, HIGHEST),
    ]
    print_targets(judged, judged=not quick)
    if output is not None:
        record = {
            "benchmark": "intervals",
            "environment": facts,
            "settings": {
                "simulations": simulations,
                "examples": NUM_EXAMPLES,
                "resamples": RESAMPLES,
                "regimes": REGIMES,
            },
            "results": results,
            "targets": target_records(judged),
        }
        typer.echo(f"wrote {save_record(output, record).name}")


if __name__ == "__main__":
    typer.run(main)
