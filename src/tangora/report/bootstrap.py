"""Percentile-bootstrap intervals over seeds and test examples."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]
"""Seeds x test examples; one column when only the mean of each seed is known."""

Interval = tuple[float, float]

NUM_RESAMPLES = 5_000
LEVEL = 0.95
_CHUNK = 2_000_000  # resampled examples held at once: 32 MB of indices and values


def mean_interval(scores: Scores, *, seed: int = 0) -> Interval | None:
    """Bound the mean of a method's scores.

    Args:
        scores: Seeds x test examples.
        seed: Of the bootstrap; the same seed gives the same interval.

    Returns:
        The 95 % interval, or None when a single number leaves nothing to resample.
    """
    if scores.size < 2:
        return None
    return _percentiles(_resampled_means(scores, np.random.default_rng(seed)))


def difference_interval(ours: Scores, theirs: Scores, *, paired: bool, seed: int = 0) -> Interval | None:
    """Bound the difference of two methods' mean scores.

    Args:
        ours: Seeds x test examples.
        theirs: The same for the method to subtract.
        paired: Whether rows and columns of both mean the same seeds and examples: then both are resampled
            together, and what a seed or an example does to both methods cancels.
        seed: Of the bootstrap; the same seed gives the same interval.

    Returns:
        The 95 % interval of ``ours - theirs``, or None when there is nothing to resample.
    """
    if paired:
        return mean_interval(ours - theirs, seed=seed)
    if ours.size < 2 or theirs.size < 2:
        return None
    rng = np.random.default_rng(seed)
    return _percentiles(_resampled_means(ours, rng) - _resampled_means(theirs, rng))


def _resampled_means(scores: Scores, rng: np.random.Generator) -> Scores:
    # Draw seeds and examples independently: a test set is shared by all seeds, so the two are crossed.
    return np.concatenate([_draw_means(scores, size, rng) for size in _chunk_sizes(scores.shape[1])])


def _draw_means(scores: Scores, size: int, rng: np.random.Generator) -> Scores:
    num_seeds, num_examples = scores.shape
    seeds = rng.integers(num_seeds, size=(size, num_seeds))
    # The mean over a draw of seeds and examples needs, per draw, only how often each seed was drawn.
    weights = np.stack([(seeds == index).mean(axis=1) for index in range(num_seeds)], axis=1)
    if num_examples == 1:
        return weights @ scores[:, 0]
    examples = rng.integers(num_examples, size=(size, num_examples))
    return np.take_along_axis(weights @ scores, examples, axis=1).mean(axis=1)


def _chunk_sizes(num_examples: int) -> Iterator[int]:
    left = NUM_RESAMPLES
    while left > 0:
        size = min(left, max(1, _CHUNK // num_examples))
        yield size
        left -= size


def _percentiles(means: Scores) -> Interval:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
