"""What a few runs of one setting, each with another seed, tell about it, and how surely.

Samples are sequences of one number per seed. Intervals are 95 % bootstrap intervals (percentiles) over seeds; with one
seed there is none, and with fewer than about five they are narrower than they should be. As in Agarwal et al. (2021),
"Deep reinforcement learning at the edge of the statistical precipice".
"""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

RESAMPLES = 5000
SPLITS = 20_000  # more of them are sampled, not counted through

Sample = Sequence[float]
Interval = tuple[float, float]


def iqm(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Interquartile mean: a quarter of the values is left out at either end; with fewer than four, it is the mean."""
    return stats.trim_mean(values, 0.25, axis=axis)


def interval(values: Sample | np.ndarray) -> Interval | None:
    """Of the interquartile mean over the first axis, which holds seeds; arrays [...] for values [seeds, ...]."""
    return _bootstrap([values], iqm)


def pooled_iqm(samples: Sequence[Sample]) -> tuple[float, Interval | None]:
    """Interquartile mean of the runs of all tasks, a sample each, and its interval: seeds are drawn within a task."""

    def statistic(*drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        return iqm(np.concatenate(drawn, axis), axis)

    return float(statistic(*map(np.asarray, samples))), _bootstrap(samples, statistic)


def beats(pairs: Sequence[tuple[Sample, Sample]]) -> tuple[float, Interval | None]:
    """The probability that a run of the first beats one of the second, P(X > Y) with ties as half: over all pairs of
    seeds, then averaged over tasks. `pairs` are a task's two samples each; the interval is stratified by them.
    """

    def statistic(*drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.mean([_wins(x, y) for x, y in zip(drawn[::2], drawn[1::2], strict=True)], axis=0)

    samples = [np.asarray(sample, float) for pair in pairs for sample in pair]
    return float(statistic(*samples)), _bootstrap(samples, statistic)


def _wins(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """P(X > Y) [...] for x [..., n] and y [..., m]."""
    x, y = x[..., :, None], y[..., None, :]
    return ((x > y) + 0.5 * (x == y)).mean((-2, -1))


def _bootstrap(samples: Sequence[Sample], statistic: Callable) -> Interval | None:
    if min(map(len, samples)) < 2:
        return None
    arrays = [np.asarray(sample, float) for sample in samples]
    rng = np.random.default_rng(0)
    options = {"n_resamples": RESAMPLES, "method": "percentile", "vectorized": True, "axis": 0, "rng": rng}
    found = stats.bootstrap(arrays, statistic, **options).confidence_interval
    return found.low, found.high


def permutation_p(pairs: Sequence[tuple[Sample, Sample]]) -> float | None:
    """Two-sided p-value that the two arms' means are equal, averaged over tasks: runs change arms within a task.

    Exact where there are few enough ways to deal them out. None where an arm has a single seed.
    """
    if min(len(sample) for pair in pairs for sample in pair) < 2:
        return None
    observed = sum(np.mean(x) - np.mean(y) for x, y in pairs)
    ways = math.prod(math.comb(len(x) + len(y), len(x)) for x, y in pairs)
    exact, rng = ways <= SPLITS, np.random.default_rng(0)
    dealt = np.zeros(1) if exact else np.zeros(SPLITS)
    for x, y in pairs:
        both, size = np.concatenate([x, y]).astype(float), len(x)
        if exact:
            chosen = np.array(list(itertools.combinations(range(len(both)), size)))
            sums = both[chosen].sum(1)
        else:
            sums = rng.permuted(np.tile(both, (SPLITS, 1)), axis=1)[:, :size].sum(1)
        differences = sums / size - (both.sum() - sums) / (len(both) - size)
        dealt = np.add.outer(dealt, differences).ravel() if exact else dealt + differences
    slack = 1e-9 * max(1e-300, np.abs(dealt).max())  # equal but for rounding
    beyond = min((dealt >= observed - slack).sum(), (dealt <= observed + slack).sum())
    share = beyond / len(dealt) if exact else (beyond + 1) / (len(dealt) + 1)
    return min(1.0, 2 * float(share))
