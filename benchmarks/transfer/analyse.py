"""Does one learning rate serve? Per method: the best rate of each setting, and what one rate for all of them costs.

    python benchmarks/transfer/analyse.py benchmarks/transfer/*.json --pictures results/transfer-pictures

The best rate of a setting is the one with the lowest mean validation loss. The regret of a rate is the relative excess
of the test loss over that of the best rate, mean over seeds of the difference of logarithms; its interval pools the
variance between seeds over all settings of the method. A method's default is its recipe's, or `--default RECIPE=RATE`,
or the one rate with the least mean regret over all settings, which no user knows beforehand.
"""

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, variance

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator
from scipy import stats

from tangora.report import Comparison, Record

sys.path.insert(0, str(Path(__file__).parents[1]))
from compact import read_study

_TOLERATED = 0.02


@dataclass(frozen=True)
class Curve:
    """A method in one setting: the logarithm of its losses by rate and seed; ``None`` where a run diverged."""

    setting: str
    validation: Mapping[float, list[float]]
    test: Mapping[float, list[float]]

    @property
    def best(self) -> float:
        """The rate with the lowest mean validation loss."""
        return min(self.validation, key=lambda rate: fmean(self.validation[rate]))

    def regrets(self, rate: float) -> list[float]:
        """Return the differences of the logarithms of the test losses at a rate and at the best, seed by seed."""
        return [ours - best for ours, best in zip(self.test[rate], self.test[self.best], strict=True)]


@dataclass(frozen=True)
class Regret:
    """Cost of one rate in one setting, as a share of the loss."""

    setting: str
    best: float
    edge: bool
    mean: float
    half_width: float

    @property
    def passed(self) -> bool:
        """Whether it is at most two percent, or its interval holds zero."""
        return self.mean <= _TOLERATED or self.mean - self.half_width <= 0


def curves(study: Mapping[str, Comparison]) -> dict[str, list[Curve]]:
    """Find the curves of all methods."""
    found: dict[str, list[Curve]] = defaultdict(list)
    for setting, comparison in study.items():
        for recipe in dict.fromkeys(run.recipe for run in comparison.records):
            runs = sorted(
                (run for run in comparison.records if run.recipe == recipe), key=lambda run: run.seed
            )
            found[recipe].append(Curve(setting, _losses(runs, "validation"), _losses(runs, "test")))
    return found


def _losses(runs: list[Record], split: str) -> dict[float, list[float]]:
    losses: dict[float, list[float]] = defaultdict(list)
    for run in runs:
        finished = run.status == "finished"
        losses[run.learning_rate].append(math.log(run.metrics[split]["loss"]) if finished else math.inf)
    return dict(sorted(losses.items()))


def regrets(method: list[Curve], rate: float) -> list[Regret]:
    """Return what a rate costs in every setting that tried it."""
    tried = [curve for curve in method if rate in curve.test]
    differences = {curve.setting: curve.regrets(rate) for curve in tried}
    finite = [each for each in differences.values() if all(map(math.isfinite, each)) and len(each) > 1]
    moving = [
        each for each in finite if any(each)
    ]  # where the best rate is this one there is nothing to vary
    pooled = fmean([variance(each) for each in moving]) if moving else 0.0
    freedom = sum(len(each) - 1 for each in moving)
    made = []
    for curve in tried:
        each = differences[curve.setting]
        width = stats.t.ppf(0.975, freedom) * math.sqrt(pooled / len(each)) if freedom else math.inf
        rates = list(curve.test)
        edge = curve.best in (rates[0], rates[-1])
        made.append(Regret(curve.setting, curve.best, edge, fmean(each), width))
    return made


def hindsight(method: list[Curve]) -> float:
    """Return the rate with the least mean regret among those that all settings tried."""
    shared = set.intersection(*(set(curve.test) for curve in method))
    return min(sorted(shared), key=lambda rate: fmean(fmean(curve.regrets(rate)) for curve in method))


def picture(name: str, method: list[Curve], default: float) -> Figure:
    """Draw the test loss over the rate, one line per setting, on axes of the same extent for every method."""
    drawing = Figure(figsize=(7.5, 4), layout="constrained")
    axes = drawing.subplots()
    for curve, color in zip(
        method, colormaps["turbo"].resampled(len(method))(range(len(method))), strict=True
    ):
        rates = [rate for rate, values in curve.test.items() if all(map(math.isfinite, values))]
        best = fmean(curve.test[curve.best])
        excess = [math.exp(fmean(curve.test[rate]) - best) for rate in rates]
        axes.plot(
            [rate / default for rate in rates],
            excess,
            marker=".",
            linewidth=1,
            color=color,
            label=curve.setting,
        )
    axes.axvline(1, color="black", linestyle=":", linewidth=1)
    axes.set(
        xscale="log", yscale="log", xlim=(1 / 9, 9), ylim=(0.85, 5), title=f"{name}, one rate: {default:g}"
    )
    axes.set(xlabel="learning rate / the one rate", ylabel="test loss / that at the setting's best rate")
    for axis, ticks in ((axes.xaxis, (0.125, 0.25, 0.5, 1, 2, 4, 8)), (axes.yaxis, (1, 1.5, 2, 3, 4, 5))):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FormatStrFormatter("%g"))
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.01, 0.5))
    return drawing


def main() -> None:
    """Print the tables and draw the pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "studies", type=Path, nargs="+", help="output folders of tangora compare, or compact.py's files"
    )
    parser.add_argument("--default", action="append", default=[], metavar="RECIPE=RATE")
    parser.add_argument("--pictures", type=Path, help="folder for one picture per method")
    arguments = parser.parse_args()
    study: dict[str, Comparison] = {}
    for path in arguments.studies:
        for setting, comparison in read_study(path).items():
            known = study.get(setting)
            records = [*(known.records if known else []), *comparison.records]
            study[setting] = comparison.model_copy(update={"records": records})
    defaults = {name: float(rate) for name, _, rate in (each.rpartition("=") for each in arguments.default)}
    found = curves(study)
    summary = [
        "| recipe | settings | best rates | spread | rate | mean regret | within 2 % or noise |",
        "|" + "---|" * 7,
    ]
    for name, method in found.items():
        default = defaults.get(name) or hindsight(method)
        print(
            f"\n{name} at {default:g}\n\n| setting | best rate | test loss there | regret | 95 % interval | |"
        )
        print("|---|---|---|---|---|---|")
        rows = regrets(method, default)
        for curve, row in zip((each for each in method if default in each.test), rows, strict=True):
            loss = math.exp(fmean(curve.test[curve.best]))
            low, high = row.mean - row.half_width, row.mean + row.half_width
            print(
                f"| {row.setting} | {row.best:g}{' (end)' if row.edge else ''} | {loss:.3f} | {row.mean:+.1%} "
                f"| {low:+.1%} to {high:+.1%} | {'yes' if row.passed else 'no'} |"
            )
        best = [row.best for row in rows]
        finite = [row.mean for row in rows if math.isfinite(row.mean)]
        passed = sum(row.passed for row in rows)
        chosen = "given" if name in defaults else "in hindsight"
        summary.append(
            f"| {name} | {len(rows)} | {min(best):g} to {max(best):g} | {max(best) / min(best):.1f} "
            f"| {default:g} ({chosen}) | {fmean(finite):+.1%} | {passed} of {len(rows)} |"
        )
        if arguments.pictures:
            arguments.pictures.mkdir(parents=True, exist_ok=True)
            picture(name, method, default).savefig(arguments.pictures / f"{name}.png", dpi=110)
    print("\n" + "\n".join(summary))


if __name__ == "__main__":
    main()
