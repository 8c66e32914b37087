"""Intervals and p-values for means over seeds and test examples, and for differences of such means."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import root_scalar
from scipy.special import stdtrit

Scores = NDArray[np.float64]
"""Seeds x test examples; one column when only the mean of each seed is known."""

Interval = tuple[float, float]

Over = Literal["seeds and examples", "examples", "seeds"]

ALPHA = 0.05
"""One minus the level of every interval, and the p-value below which a difference is more than noise."""

_SMALLEST_P = 1e-100  # SciPy's quantile has the wrong sign below about 1e-300


@dataclass(frozen=True)
class Estimate:
    """A mean, or a difference of means, and how well it is known.

    Attributes:
        value: The mean or difference.
        parts: The variance of `value` in parts that are estimated independently, each with its degrees of freedom.
        over: What would change if the study were repeated: seeds, test examples, or both.
    """

    value: float
    parts: tuple[tuple[float, int], ...]
    over: Over

    @property
    def standard_error(self) -> float:
        """The estimated standard deviation of `value`."""
        return math.sqrt(sum(variance for variance, _ in self.parts))

    @property
    def margin(self) -> float:
        """Half the width of the interval."""
        return self.standard_error * self._quantile(ALPHA)

    @property
    def interval(self) -> Interval:
        """The 95 % interval."""
        margin = self.margin
        return self.value - margin, self.value + margin

    @property
    def p_value(self) -> float | None:
        """The two-sided p-value of zero, below 0.05 exactly when the interval excludes zero; None for one seed."""
        if self.over == "examples":
            return None
        if self.standard_error == 0:
            return 1.0 if self.value == 0 else 0.0
        t = abs(self.value) / self.standard_error
        if self._quantile(_SMALLEST_P) < t:
            return 0.0
        bracket = (math.log10(_SMALLEST_P), 0.0)
        return 10 ** root_scalar(lambda x: self._quantile(10**x) - t, bracket=bracket, xtol=1e-12).root

    def _quantile(self, p: float) -> float:
        # Cochran's: the quantiles of the parts, weighted by their variances.
        total = sum(variance for variance, _ in self.parts)
        if total == 0:
            return 0.0
        return sum(-variance / total * float(stdtrit(df, p / 2)) for variance, df in self.parts)


def estimate(*groups: Scores) -> Estimate | None:
    r"""Estimate a mean over seeds and test examples, or a sum of several.

    With $\bar y$ a group's mean over its S seeds and E examples, both of which are drawn at random and crossed, and
    mean squares $M$ of the two-way analysis of variance,

    $\widehat{\mathrm{var}}(\bar y) = \frac{M_{\text{seeds}}}{SE} + \max\left(\frac{M_{\text{examples}} -
    M_{\text{rest}}}{SE}, 0\right)$.

    The first part has S - 1 degrees of freedom, the second about E - 1, and the quantile is the mean of Student's t
    of both, weighted by the parts. So the interval is Student's over seeds where seeds vary most, or where there is
    one column; Student's over examples where these vary most, and no wider for having few seeds. Satterthwaite's
    single number of degrees of freedom instead covers 87 % with two seeds and 92 % with three where a tenth of the
    variance is due to the examples, since a small sample underestimates the variance and overestimates its degrees
    of freedom at once; this one covers 94 to 98 % (tests/report/test_coverage.py). As any interval made of a mean and
    a variance it is too narrow for an accuracy with fewer than about five expected errors in all the test examples
    (82 % at an accuracy of 0.99 on 100 examples); differences of such accuracies hold theirs.

    Args:
        groups: Seeds x test examples. Examples are the same in all groups, seeds are not. What shares its seeds is
            one group: for a paired difference, the difference of both methods' scores.

    Returns:
        The estimate of the sum of the groups' means. Where a group has a single seed, seeds count as fixed; None if
        it has a single example too.

    Source:
        Variance: Obuchowski and Rockette's for readers and cases, as in Hillis (2007), Statistics in Medicine 26,
        596-619 (PMC1769324); here readers are seeds. Quantile: Cochran (1964), Biometrics 20, 191-195.
    """
    num_examples = groups[0].shape[1]
    one_seed = any(len(group) == 1 for group in groups)
    if one_seed and num_examples == 1:
        return None
    value = float(sum(group.mean() for group in groups))
    by_example = np.sum([group.mean(axis=0) for group in groups], axis=0)
    examples = float(by_example.var(ddof=1)) / num_examples if num_examples > 1 else 0.0
    if one_seed:
        return Estimate(value, ((examples, num_examples - 1),), "examples")
    seeds = [(float(group.mean(axis=1).var(ddof=1)) / len(group), len(group) - 1) for group in groups]
    if num_examples == 1:
        return Estimate(value, tuple(seeds), "seeds")
    examples = max(examples - sum(map(_rest, groups)), 0.0)
    return Estimate(value, (*seeds, (examples, num_examples - 1)), "seeds and examples")


def _rest(scores: Scores) -> float:
    # What neither seed nor example explains, as a part of the variance of the mean.
    num_seeds, num_examples = scores.shape
    residual = scores - scores.mean(axis=0) - scores.mean(axis=1, keepdims=True) + scores.mean()
    return float((residual**2).sum()) / ((num_seeds - 1) * (num_examples - 1)) / scores.size


def holm(p_values: list[float]) -> list[float]:
    """Correct p-values for how many there are.

    Args:
        p_values: Of one family of tests.

    Returns:
        Corrected p-values, in the same order: the chance of any below 0.05, if there is no effect, is at most 5 %.

    Source:
        Holm (1979), Scandinavian Journal of Statistics 6, 65-70.
    """
    order = np.argsort(p_values, kind="stable")
    factors = len(p_values) - np.arange(len(p_values))
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(factors * np.array(p_values)[order]), 1.0)
    return corrected.tolist()
