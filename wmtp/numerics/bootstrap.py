"""Bootstrap confidence intervals of a mean over tasks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wmtp.errors import UserError

_AT_ONCE = 1000  # resamples drawn at once: bounds memory; another number gives other intervals for the same seed


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval."""

    estimate: float
    low: float
    high: float


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    seed: int = 0,
    *,
    groups: Sequence[str] | np.ndarray | None = None,
    resamples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """Returns the percentile bootstrap interval of a mean (Efron 1979): its spread over other tasks of the same kind.

    Args:
        values: [T] one value per task, such as its pass@k.
        seed: equal seeds give equal intervals; two runs with T tasks are resampled alike.
        groups: [T] the problem of each value, if several share one: values of one problem are not independent, so
            problems are drawn instead of values (Efron and Tibshirani 1993, chapter 13).
        resamples: number of bootstrap samples.
        level: share of the resampled means inside the interval.

    An interval of width zero (all values equal, or one group) means that the bootstrap cannot estimate the error, not
    that there is none.

    Raises:
        ValueError: no tasks, a value that is not finite, level outside (0, 1), or resamples < 1.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"needs a finite value for each of at least one task, got {values!r:.80}")
    if not 0 < level < 1 or resamples < 1:
        raise UserError(f"level must be in (0, 1) and resamples >= 1, got {level} and {resamples}")
    sums, sizes = values, None
    if groups is not None:
        _, group = np.unique(groups, return_inverse=True)
        sums, sizes = np.bincount(group, weights=values), np.bincount(group)
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, _AT_ONCE):
        drawn = rng.integers(len(sums), size=(min(_AT_ONCE, resamples - start), len(sums)))
        means.append(sums[drawn].mean(axis=1) if sizes is None else sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high))
