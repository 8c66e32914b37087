"""When does alignment pay? Every rank and budget of the plans beside this file, with what might explain it.

    python benchmarks/when_alignment_pays/analyse.py benchmarks/when_alignment_pays/digits.json

Full fine-tuning knows no rank: its runs of a budget join the cell of every rank.
"""

import argparse
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from scipy import stats

from tangora.report import Comparison, summarize
from tangora.report.statistics.intervals import Interval
from tangora.report.statistics.selection import judged_runs

sys.path.insert(0, str(Path(__file__).parents[1]))
from compact import TRAINING, read_study

_CELL = re.compile(r"r(?P<rank>\d+)-(?P<steps>\d+)")


@dataclass(frozen=True)
class Method:
    """A recipe in one cell, at its best learning rate.

    Attributes:
        recipe: Its name.
        learning_rate: The best one.
        edge: The end of the grid where it lies, if it does.
        test: Test metric, mean over the seeds.
        interval: Its 95 % interval.
        minus_lora: Difference from LoRA.
        minus_lora_interval: Its 95 % interval.
        p_corrected: Of no difference, by Holm over the cell.
        minus_full: Difference from full fine-tuning.
        training_loss: Mean over the last tenth of the steps and the seeds.
        captured_start: Share of the gradient's energy that the adapter can follow before the first step.
        captured: The same, mean over all measured points after it.
        imbalance: Of the factors, at the end.
    """

    recipe: str
    learning_rate: float | None
    edge: str | None
    test: float | None
    interval: Interval | None
    minus_lora: float | None
    minus_lora_interval: Interval | None
    p_corrected: float | None
    minus_full: float | None
    training_loss: float
    captured_start: float | None
    captured: float | None
    imbalance: float | None


@dataclass(frozen=True)
class Cell:
    """A rank and a budget."""

    rank: int
    steps: int
    methods: list[Method]

    def of(self, recipe: str) -> Method | None:
        """Return a recipe's result."""
        return next((method for method in self.methods if method.recipe == recipe), None)


def cells(study: Mapping[str, Comparison]) -> list[Cell]:
    """Find all cells, by budget and rank."""
    found = []
    for name, comparison in study.items():
        if cell := _CELL.fullmatch(name):
            full = study.get(f"full-{cell['steps']}")
            records = [*comparison.records, *(full.records if full else [])]
            methods = _methods(comparison.model_copy(update={"records": records}))
            found.append(Cell(int(cell["rank"]), int(cell["steps"]), methods))
    return sorted(found, key=lambda cell: (cell.steps, cell.rank))


def _methods(comparison: Comparison) -> list[Method]:
    made = []
    for row in summarize(comparison):
        records = [record for record in comparison.records if record.recipe == row.recipe]
        runs = judged_runs(records, row.learning_rate)
        made.append(
            Method(
                row.recipe,
                row.learning_rate,
                row.edge,
                row.test,
                row.interval,
                row.difference,
                row.difference_interval,
                row.p_corrected,
                row.versus_full,
                fmean(run.metrics[TRAINING]["loss"] for run in runs),
                _mean([point["captured_energy"] for run in runs for point in run.trajectory[:1]]),
                _mean([point["captured_energy"] for run in runs for point in run.trajectory[1:]]),
                _mean([point["relative_imbalance"] for run in runs for point in run.trajectory[-1:]]),
            )
        )
    return made


def _mean(values: list[float]) -> float | None:
    return fmean(values) if values else None


def over_cells(found: list[Cell]) -> list[str]:
    """Compare every two methods over the cells, each counted once: mean difference, t interval over cells, p."""
    names = sorted({m.recipe for cell in found for m in cell.methods} - {"full"})
    lines = []
    for ours, theirs in combinations(names, 2):
        pairs = [(a.test, b.test) for cell in found if (a := cell.of(ours)) and (b := cell.of(theirs))]
        differences = [a - b for a, b in pairs if a is not None and b is not None]
        if len(differences) >= 4:
            test = stats.ttest_1samp(differences, 0)
            low, high = test.confidence_interval()
            lines.append(
                f"{ours} minus {theirs} over {len(differences)} cells: {fmean(differences):+.3f} "
                f"({low:+.3f} to {high:+.3f}, p {test.pvalue:.3f})"
            )
    return lines


def explained(found: list[Cell]) -> list[dict[str, Any]]:
    """Correlate what each method gains over LoRA with what might explain it, over the cells."""
    lines = []
    for recipe in sorted({m.recipe for cell in found for m in cell.methods} - {"lora", "full"}):
        pairs = [
            (cell, ours, lora) for cell in found if (ours := cell.of(recipe)) and (lora := cell.of("lora"))
        ]
        gains = [ours.minus_lora for _, ours, _ in pairs]
        facts = [_facts(*pair) for pair in pairs]
        for name in facts[0] if len(facts) >= 4 else ():
            against = [each[name] for each in facts]
            if None not in against and len(set(against)) > 1:
                rho, p_value = stats.spearmanr(gains, against)
                numbers = {"spearman": float(rho), "p_value": float(p_value), "cells": len(pairs)}
                lines.append({"recipe": recipe, "against": name} | numbers)
    return lines


def _facts(cell: Cell, ours: Method, lora: Method) -> dict[str, float | None]:
    return {
        "rank": cell.rank,
        "steps": cell.steps,
        "gap: full minus lora": None if lora.minus_full is None else -lora.minus_full,
        "lora's captured energy": lora.captured,
        "captured energy above lora's": _minus(ours.captured, lora.captured),
        "training loss above lora's": _minus(ours.training_loss, lora.training_loss),
    }


def _minus(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or theirs is None else ours - theirs


def main() -> None:
    """Print all cells, and what goes with the gains."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, help="output folder of tangora compare, or a file of compact.py")
    found = cells(read_study(parser.parse_args().study))
    print(
        "| steps | rank | recipe | rate | test | minus lora | interval | minus full | training loss | captured |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for cell in found:
        for m in cell.methods:
            low, high = m.minus_lora_interval or (None, None)
            star = " *" if m.p_corrected is not None and m.p_corrected < 0.05 else ""
            print(
                f"| {cell.steps} | {cell.rank} | {m.recipe} | {m.learning_rate:g}{f' ({m.edge})' if m.edge else ''} "
                f"| {_text(m.test, '.3f')} | {_text(m.minus_lora)}{star} | {_text(low)} to {_text(high)} "
                f"| {_text(m.minus_full)} | {_text(m.training_loss, '.3g')} "
                f"| {_text(m.captured_start, '.2f')} → {_text(m.captured, '.2f')} |"
            )
    for line in over_cells(found):
        print(line)
    for line in explained(found):
        print(
            f"{line['recipe']}: gain against {line['against']}: {line['spearman']:+.2f} (p {line['p_value']:.2f})"
        )


def _text(value: float | None, how: str = "+.3f") -> str:
    return "" if value is None else format(value, how)


if __name__ == "__main__":
    main()
