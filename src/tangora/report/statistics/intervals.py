"""Intervals and p-values for means over seeds and test examples, and for differences of such means."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import root_scalar
from scipy.special import stdtr

Scores = NDArray[np.float64]
"""Seeds x test examples; one column when only the mean of each seed is known."""

_PerSimulation = Scores | np.float64

Interval = tuple[float, float]

Over = Literal["seeds and examples", "examples", "seeds"]

_Key = TypeVar("_Key", bound=Hashable)

ALPHA = 0.05
"""One minus the level of every interval, and the corrected p-value below which a difference is significant."""

_FURTHER = 2.0  # further examples, one each way: Bonett and Price
_SMALLEST_P = 1e-300
_EQUAL = 1e-5  # means of seeds that differ by a smaller share are equal but for rounding
_ROUNDING = 2e-7  # of float32
_LARGEST_RATIO = 1e10  # a residual below this share of the mean square of seeds counts as none
_NODES = {1: 48, 2: 24, 3: 12}  # by the number of groups, whose nodes are combined


@dataclass(frozen=True)
class Estimate:
    """A mean, or a difference of means, and how well it is known."""

    value: float
    variances: tuple[float, ...]
    """Values that the variance of `value` may have."""
    weights: tuple[float, ...]
    """Probability of each value."""
    df: float
    """Degrees of freedom of the part of the variance that is due to the test examples."""
    over: Over
    """The random parts of the comparison that a repetition would draw anew."""
    bounds: Interval = (-math.inf, math.inf)
    """The smallest and the largest possible value."""
    proportion: bool = False
    """Whether it is a share of right answers, whose noise depends on the share itself."""

    @property
    def margin(self) -> float:
        """Half the width of the interval."""
        variances, weights = np.array(self.variances), np.array(self.weights)

        def excess(log_margin: float) -> float:
            return math.log(float(tail(math.exp(log_margin), variances, weights, self.df)) / ALPHA)

        # between a standard error and what the least precise possibility asks for
        ends = 0.5 * math.log(variances.min()), 0.5 * math.log(variances.max()) + math.log(1e4)
        return math.exp(root_scalar(excess, bracket=ends, xtol=1e-10).root)

    @property
    def interval(self) -> Interval:
        """The 95 % interval, within the bounds."""
        centre, margin = self.value, self.margin
        if self.proportion:
            centre, margin = _wilson(centre, margin, self.df + 1)
        return max(centre - margin, self.bounds[0]), min(centre + margin, self.bounds[1])

    @property
    def p_value(self) -> float | None:
        """The two-sided p-value of zero, below 0.05 exactly when the interval excludes zero; None for one seed."""
        if self.over == "examples":
            return None
        return float(tail(abs(self.value), np.array(self.variances), np.array(self.weights), self.df))


def estimate(*groups: Scores, unit: float = 0.0) -> Estimate | None:
    r"""Estimate a mean over seeds and test examples, or a sum of several.

    Seeds and examples are both drawn at random and crossed. With mean squares $M$ of the two-way analysis of variance
    over S seeds and E examples, the variance of the mean is

    $v + \max\left(\frac{M_{\text{examples}} - M_{\text{rest}}}{SE}, 0\right)$, where $v$, the seeds' part, is at
    least $v_0 = \frac{M_{\text{rest}}}{SE}$.

    Two or three seeds hardly tell $v$: right answers are counted in whole numbers, so seeds often agree by chance.
    Hence all values from $v_0$ on are weighed by how well they explain $M_{\text{seeds}}$ (S - 1 degrees of freedom),
    and p-value and interval are those of the resulting mixture of Student's t with E - 1 degrees of freedom. If seeds
    differ much this is Student's t over seeds; if only the examples matter, Student's t over examples.

    Two further examples are counted in, one each way and as large as the others that are not zero, as differences
    that are rare or all the same ask for.

    Source:
        Variance: Obuchowski and Rockette's for readers and cases, as in Hillis (2007), Statistics in Medicine 26,
        596-619 (PMC1769324); here readers are seeds. Weights: the posterior of Tiao and Tan (1965), Biometrika 52,
        37-53, with the prior $v^{-1} (1 - v_0 / v)^{-1/2}$. Further examples: Bonett and Price (2012), Journal of
        Educational and Behavioral Statistics 37, 479-488.
    """
    num_examples = groups[0].shape[-1]
    value = float(sum(group.mean() for group in groups))
    one_seed = any(len(group) == 1 for group in groups)
    if num_examples == 1 and (one_seed or all(_agree(group, unit) for group in groups)):
        return None
    variances, weights = mixture(*groups, unit=unit)
    over = "examples" if one_seed else "seeds" if num_examples == 1 else "seeds and examples"
    df = num_examples - 1 if num_examples > 1 else math.inf
    return Estimate(value, tuple(variances.tolist()), tuple(weights.tolist()), df, over)


def mixture(*groups: Scores, unit: float = 0.0) -> tuple[Scores, Scores]:
    """Weigh the variances that the sum of the groups' means may have."""
    num_examples, nodes = groups[0].shape[-1], _NODES[len(groups)]
    if num_examples == 1:
        return _combined([_over_seeds(group, np.zeros(group.shape[:-2]), nodes) for group in groups])
    by_example = np.sum([group.mean(axis=-2) for group in groups], axis=0)
    examples = by_example.var(axis=-1) / (num_examples - 1)
    further = _further(by_example, unit)
    if any(group.shape[-2] == 1 for group in groups):
        return (examples + further)[..., None], np.ones_like(examples[..., None])
    rests = [_rest(group) for group in groups]
    variances, weights = _combined(
        [_over_seeds(group, rest, nodes) for group, rest in zip(groups, rests, strict=True)]
    )
    return variances + (np.maximum(examples - sum(rests), 0.0) + further)[..., None], weights


def tail(difference: Scores | float, variances: Scores, weights: Scores, df: float) -> _PerSimulation:
    """Return the probability of a larger difference, on either side, if there is none."""
    t = np.asarray(difference)[..., None] / np.sqrt(variances)
    return np.clip((2.0 * stdtr(df, -t) * weights).sum(axis=-1), _SMALLEST_P, 1.0)


def _further(by_example: Scores, unit: float) -> _PerSimulation:
    """Return what the further examples add to the variance."""
    number = np.count_nonzero(by_example, axis=-1)
    square = (by_example**2).sum(axis=-1) / np.maximum(number, 1)
    return _FURTHER * np.where(number > 0, square, (unit or 1.0) ** 2) / by_example.shape[-1] ** 2


def _rest(scores: Scores) -> _PerSimulation:
    """Return what neither seed nor example explains, as a part of the variance of the mean."""
    num_seeds, num_examples = scores.shape[-2:]
    mean = scores.mean(axis=(-2, -1), keepdims=True)
    residual = scores - scores.mean(axis=-2, keepdims=True) - scores.mean(axis=-1, keepdims=True) + mean
    degrees = (num_seeds - 1) * (num_examples - 1)
    return (residual**2).sum(axis=(-2, -1)) / (degrees * num_seeds * num_examples)


def _over_seeds(scores: Scores, rest: _PerSimulation, nodes: int) -> tuple[Scores, Scores]:
    """Return variances that a mean over seeds may have, none below the rest, and their weights."""
    num_seeds = scores.shape[-2]
    seeds = scores.mean(axis=-1).var(axis=-1, ddof=1)[..., None] / num_seeds
    rest = np.maximum(np.asarray(rest)[..., None], np.maximum(seeds / _LARGEST_RATIO, _SMALLEST_P))
    ratio = (num_seeds - 1) / 2 * seeds / rest
    # As a function of the angle, with variance = rest / sin(angle)^2, the posterior has no singularity; beyond `reach`
    # it vanishes. The points lie closest where the variance is largest, on which small p-values depend.
    points, widths = _points(nodes)
    reach = np.minimum((6 + math.sqrt(num_seeds)) / np.sqrt(np.maximum(ratio, 1.0)), math.pi / 2)
    sine = np.sin(reach * points)
    weights = widths * sine ** (num_seeds - 2) * np.exp(-ratio * sine**2)
    return rest / sine**2, weights / weights.sum(axis=-1, keepdims=True)


@cache
def _points(number: int) -> tuple[Scores, Scores]:
    """Return points in [0, 1], denser towards 0, and their weights."""
    points, widths = np.polynomial.legendre.leggauss(number)
    points = (points + 1) / 2
    return points**4, points**3 * widths


def _combined(parts: Sequence[tuple[Scores, Scores]]) -> tuple[Scores, Scores]:
    """Return the sums of the independent variances of all groups, each with each, and their weights."""
    variances, weights = parts[0]
    for more, their_weights in parts[1:]:
        variances = (variances[..., :, None] + more[..., None, :]).reshape(*variances.shape[:-1], -1)
        weights = (weights[..., :, None] * their_weights[..., None, :]).reshape(variances.shape)
    return variances, weights


def _wilson(share: float, margin: float, num_examples: float) -> Interval:
    """Return the centre and half the width of Wilson's interval, for the noise that `margin` stands for."""
    # As Agresti and Coull count: near 0 and 1 the share observed says too little of the noise.
    smoothed = (share * num_examples + 2) / (num_examples + 4)
    excess = margin**2 / (smoothed * (1 - smoothed))
    half = math.sqrt(excess * share * (1 - share) + excess**2 / 4)
    return (share + excess / 2) / (1 + excess), half / (1 + excess)


def _agree(scores: Scores, unit: float) -> bool:
    """Return whether single numbers per seed are equal but for rounding."""
    rounding = max(_EQUAL * float(np.abs(scores).max()), _ROUNDING * unit)
    return float(np.ptp(scores)) <= rounding


def holm(p_values: list[float]) -> list[float]:
    """Correct p-values for how many there are.

    Source:
        Holm (1979), Scandinavian Journal of Statistics 6, 65-70.
    """
    order = np.argsort(p_values, kind="stable")
    factors = len(p_values) - np.arange(len(p_values))
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(factors * np.array(p_values)[order]), 1.0)
    return corrected.tolist()


def corrected_p_values(p_values: Mapping[_Key, float | None]) -> dict[_Key, float]:
    """Correct p-values by their keys; those that are not known take no part."""
    known = {key: p_value for key, p_value in p_values.items() if p_value is not None}
    return dict(zip(known, holm(list(known.values())), strict=True))
