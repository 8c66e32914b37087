"""How often is one of several equal methods called different, and how often do intervals hold the truth?

Simulated comparisons with LoRA: right and wrong answers of known accuracy, part of the test examples so easy that all
methods agree on them, and losses with heavy tails; in each the seeds matter not at all, a little, and much. Beside the
errors stands the power: how often a method that does differ is found. Also the percentile bootstrap's coverage, on
normal differences. Shares, not times: any machine gives the same.

    python benchmarks/intervals.py --output benchmarks/intervals.json
    python benchmarks/intervals.py --quick          # does it run? (few simulations, numbers mean nothing)
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from record import Target, environment, print_table, print_targets, save_record, target_records
from tangora.report.statistics.intervals import ALPHA, estimate, mixture, tail

Array = NDArray[np.float64]

SEEDS = (2, 3, 5)
EXAMPLES = (60, 100, 200, 500)
METHODS = (2, 4, 14)
ACCURACIES = (0.5, 0.9, 0.98)
SHARED = (0.0, 0.5, 0.9)
SEED_EFFECTS = {"none": 0.0, "small": 0.1, "medium": 0.3, "large": 0.5, "extreme": 1.0}
SKEWED = "extreme"  # seeds of 98 % accuracy then reach from 80 to 100 %: judged by differences of equal methods alone
EFFECT = 0.5  # of the method that does differ, in standard deviations of what decides an answer or a loss

FAMILY_WISE, LOWEST = 0.06, 0.93
NAMES = ("coverage", "coverage of an effect", "coverage of the mean", "power")

LONGER = 10  # times as many simulations of what looks worse than nominal, so that chance does not decide
RESAMPLES = 2000
REGIMES = {  # shares of the variance of the mean: seeds, examples, neither
    "seeds": (0.96, 0.02, 0.02),
    "examples": (0.02, 0.96, 0.02),
    "seeds and examples": (0.5, 0.5, 0.0),
    "neither": (0.0, 0.0, 1.0),
    "all three": (1 / 3, 1 / 3, 1 / 3),
}


class Answers:
    """Right and wrong answers; on a part of the examples all methods and seeds agree."""

    def __init__(self, rng: np.random.Generator, shape: tuple[int, int, int], accuracy: float, shared: float):
        self.rng, self.accuracy, self.shared = rng, accuracy, shared
        simulations, self.seeds, examples = shape
        agreed = round(shared * examples)
        self.easy = np.repeat(
            (rng.random((simulations, 1, agreed)) < accuracy).astype(float), self.seeds, axis=1
        )
        self.hard = (simulations, self.seeds, examples - agreed)

    def truth(self, effect: float) -> float:
        """Return the expected accuracy."""
        agreed = self.easy.shape[-1] / (self.easy.shape[-1] + self.hard[-1])
        return agreed * self.accuracy + (1 - agreed) * float(ndtr(ndtri(self.accuracy) - effect))

    def draw(self, seed_effect: float, effect: float = 0.0) -> Array:
        """Return a method's scores; its expected accuracy does not depend on the effect of its seeds."""
        threshold = (ndtri(self.accuracy) - effect) * np.sqrt(1 + seed_effect**2)
        threshold = threshold + seed_effect * self.rng.standard_normal((*self.hard[:2], 1))
        hard = self.rng.standard_normal(self.hard, dtype=np.float32) < threshold
        return np.concatenate([self.easy, hard.astype(float)], axis=-1)


class Losses:
    """Losses with heavy tails: of the examples, of how each method meets them, and of single runs."""

    def __init__(self, rng: np.random.Generator, shape: tuple[int, int, int]):
        self.rng, self.shape = rng, shape
        self.easy = self._heavy((shape[0], 1, shape[2]))

    def _heavy(self, shape: tuple[int, ...]) -> Array:
        return self.rng.standard_t(3, shape) / np.sqrt(3)

    def truth(self, effect: float) -> float:
        """Return the expected loss."""
        return effect

    def draw(self, seed_effect: float, effect: float = 0.0) -> Array:
        """Return a method's scores."""
        simulations, seeds, examples = self.shape
        by_seed = seed_effect * self.rng.standard_normal((simulations, seeds, 1))
        return (
            effect
            + self.easy
            + by_seed
            + 0.5 * self._heavy((simulations, 1, examples))
            + self._heavy(self.shape)
        )


def p_values(scores: Array, truth: float = 0.0, *, share: bool = False) -> Array:
    """Return the p-values of a true mean, or difference, in each simulation.

    Args:
        scores: Simulations x seeds x examples.
        truth: The mean.
        share: Whether it is one of right answers, whose interval is Wilson's.

    Returns:
        One number per simulation, below 0.05 exactly when the interval does not hold the truth.
    """
    variances, weights = mixture(scores)
    means, examples = scores.mean(axis=(-2, -1)), scores.shape[-1]
    distances = np.abs(means - truth)
    if share:
        smoothed = (means * examples + 2) / (examples + 4)
        distances *= np.sqrt(smoothed * (1 - smoothed) / (truth * (1 - truth)))
    return tail(distances, variances, weights, examples - 1)


def measure(task: Answers | Losses, seed_effect: float) -> dict[str, float]:
    """Simulate comparisons of one kind.

    Args:
        task: Draws the scores.
        seed_effect: How much seeds matter.

    Returns:
        Shares of the simulations.
    """
    lora = task.draw(seed_effect)
    equal = np.stack([p_values(task.draw(seed_effect) - lora) for _ in range(max(METHODS) - 1)])
    other = task.draw(seed_effect, EFFECT) - lora
    truth = task.truth(EFFECT) - task.truth(0.0)
    mean = p_values(lora, task.truth(0.0), share=isinstance(task, Answers))
    held = (equal >= ALPHA, p_values(other, truth) >= ALPHA, mean >= ALPHA, p_values(other) < ALPHA)
    family = {f"family-wise error, {count} methods": _family_wise(equal, count - 1) for count in METHODS}
    return family | {name: float(np.mean(one)) for name, one in zip(NAMES, held, strict=True)}


def _family_wise(p: Array, size: int) -> float:
    """Return how often any of so many equal methods is called different, as a mean over disjoint families."""
    families = p[: len(p) // size * size].reshape(-1, size, p.shape[-1])
    # Holm's correction finds something exactly when Bonferroni's does
    return float((families.min(axis=1) * size < ALPHA).mean())


def cells(simulations: int, examples: Sequence[int]) -> Iterable[tuple[str, str, dict[str, float]]]:
    """Simulate all kinds of comparisons, and those again, longer and with other numbers, that look worse than nominal.

    Args:
        simulations: Of each kind.
        examples: Sizes of the test set.

    Yields:
        Group, kind and what was measured.
    """
    rng = np.random.default_rng(0)
    kinds: dict[str, Callable[[tuple[int, int, int]], Answers | Losses]] = {
        f"accuracy {accuracy:g}, {100 * shared:g} % shared": (
            lambda shape, accuracy=accuracy, shared=shared: Answers(rng, shape, accuracy, shared)
        )
        for accuracy, shared in product(ACCURACIES, SHARED)
    }
    kinds["losses"] = lambda shape: Losses(rng, shape)
    for seeds, (name, effect) in product(SEEDS, SEED_EFFECTS.items()):
        for size, (kind, task) in product(examples, kinds.items()):
            shape = (simulations, seeds, size)
            found = measure(task(shape), effect)
            if _suspicious(found):
                again = [measure(task(shape), effect) for _ in range(LONGER)]
                found = {key: float(np.mean([one[key] for one in again])) for key in found}
            yield f"{seeds} seeds, seed effect {name}", f"{size} examples, {kind}", found


def _suspicious(found: dict[str, float]) -> bool:
    family = max(value for name, value in found.items() if name.startswith("family"))
    return family > ALPHA or any(found[name] < LOWEST + 0.01 * (name == NAMES[0]) for name in NAMES[:3])


def summary(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """Summarise cells.

    Args:
        found: From `measure`.

    Returns:
        The worst family-wise error, the range of each coverage, the mean power.
    """
    columns = {name: [one[name] for one in found] for name in found[0]}
    ranges = {
        f"{bound} {name}": pick(columns[name])
        for name in NAMES[:3]
        for bound, pick in (("lowest", min), ("highest", max))
    }
    family = {f"highest {name}": max(values) for name, values in columns.items() if name.startswith("family")}
    return family | ranges | {"mean power": float(np.mean(columns["power"]))}


def bootstrap(rng: np.random.Generator, scores: Array) -> tuple[float, float]:
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
    low, high = np.quantile(means, [ALPHA / 2, 1 - ALPHA / 2])
    return float(low), float(high)


def against_bootstrap(
    shares: Any, simulations: int, num_seeds: int = 3, num_examples: int = 100
) -> dict[str, float]:
    """Simulate normal differences of mean 0 with one source of noise or several.

    Args:
        shares: Of `REGIMES`.
        simulations: How many.
        num_seeds: Seeds.
        num_examples: Test examples.

    Returns:
        Coverage of both intervals.
    """
    rng = np.random.default_rng(0)
    seeds, examples, rest = np.sqrt(shares)
    held = []
    for _ in range(simulations):
        scores = (
            seeds * rng.normal(0, np.sqrt(num_seeds), (num_seeds, 1))
            + examples * rng.normal(0, np.sqrt(num_examples), (1, num_examples))
            + rest * rng.normal(0, np.sqrt(num_seeds * num_examples), (num_seeds, num_examples))
        )
        found = estimate(scores)
        assert found is not None
        held.append([low <= 0 <= high for low, high in (found.interval, bootstrap(rng, scores))])
    ours, theirs = np.mean(held, axis=0).tolist()
    return {"coverage": ours, "bootstrap_coverage": theirs}


def main(
    simulations: Annotated[int, typer.Option(min=1, help="Simulated comparisons of each kind.")] = 500,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="20 simulations: does it run?")] = False,
) -> None:
    """Measure how often equal methods are called different, and how often intervals hold the truth."""
    simulations = 20 if quick else simulations
    facts = environment("cpu")
    found: dict[str, dict[str, dict[str, float]]] = {}
    for group, kind, shares in cells(simulations, EXAMPLES[:2] if quick else EXAMPLES):
        found.setdefault(group, {})[kind] = shares
    groups = {group: summary(list(kinds.values())) for group, kinds in found.items()}
    normal = {name: against_bootstrap(shares, simulations) for name, shares in REGIMES.items()}
    for part in ("family-wise error", *NAMES):
        names = [name for name in next(iter(groups.values())) if part in name.split(", ")[0].split(" ", 1)]
        rows = [(group, *(f"{100 * row[name]:.1f} %" for name in names)) for group, row in groups.items()]
        heads = [name.removeprefix("highest family-wise error, ").removesuffix(f" {part}") for name in names]
        print_table(part, ("comparisons", *heads), rows)
    worst = summary([shares for kinds in found.values() for shares in kinds.values()])
    usual = summary(
        [shares for group, kinds in found.items() if SKEWED not in group for shares in kinds.values()]
    )
    judged = [Target(name, value, FAMILY_WISE) for name, value in worst.items() if "family" in name]
    judged.append(Target("lowest coverage", worst["lowest coverage"], LOWEST, at_least=True))
    judged += [
        Target(f"lowest {name}, no {SKEWED} seeds", usual[f"lowest {name}"], LOWEST, at_least=True)
        for name in NAMES[1:3]
    ]
    print_targets(judged, judged=not quick)
    if output is not None:
        record = {
            "benchmark": "intervals",
            "environment": facts,
            "settings": {
                "simulations": simulations,
                "seeds": SEEDS,
                "examples": EXAMPLES,
                "methods": METHODS,
                "accuracies": ACCURACIES,
                "shared": SHARED,
                "seed_effects": SEED_EFFECTS,
                "effect": EFFECT,
                "longer": LONGER,
                "resamples": RESAMPLES,
                "regimes": REGIMES,
            },
            "results": {"groups": groups, "cells": found, "normal differences, 3 seeds": normal},
            "targets": target_records(judged),
        }
        typer.echo(f"wrote {save_record(output, record).name}")


if __name__ == "__main__":
    typer.run(main)
