"""Estimators of an evaluation: pass@k, n@k, paired differences, and the choice of a temperature. Pure."""

import math
from collections.abc import Mapping
from math import comb

import numpy as np

from wmtp.errors import UserError
from wmtp.numerics.bootstrap import Interval, bootstrap_interval


def pass_at_k(n: int, c: int, k: int) -> float:
    """Estimates without bias the chance that one of k samples is right; c of n samples are (Chen et al. 2021).

    1 - C(n-c, k) / C(n, k) = 1 - prod_{i<min(c, k)} (1 - max(c, k) / (n - i)), summed as logarithms: right to the last
    few bits for any n, also where the chance is tiny.

    Raises:
        ValueError: not 0 <= c <= n, or not 1 <= k <= n.
    """
    if not 0 <= c <= n:
        raise ValueError(f"the number of right samples must be between 0 and n = {n}, got {c}")
    if not 1 <= k <= n:
        raise UserError(f"pass@k needs 1 <= k <= n, got k = {k} with n = {n} samples of a task; draw more or lower k")
    if c + k > n:
        return 1.0
    factors = np.log1p(-max(c, k) / (n - np.arange(min(c, k), dtype=np.float64)))
    return -math.expm1(math.fsum(factors))


def n_at_k(num_samples: int, num_public_passes: int, num_correct: int, n: int, k: int) -> float:
    """Computes exactly the chance to solve a task with n submissions out of k samples (Li et al. 2022, n@k).

    k of the N samples are drawn without replacement. The f of them that pass the public tests are candidates, of which
    min(n, f) are submitted at random. With F public passes among all N and C correct ones among these,

        n@k = 1 - sum_f P(f) C(F - C, m) / C(F, m),    m = min(n, f),    P(f) = C(F, f) C(N - F, k - f) / C(N, k).

    Args:
        num_samples: N.
        num_public_passes: F <= N, samples that pass the public tests.
        num_correct: C <= F, samples that pass all tests.
        n: submissions.
        k: samples drawn.

    Raises:
        ValueError: not 0 <= C <= F <= N, not 1 <= k <= N, or n < 1.
    """
    if not 0 <= num_correct <= num_public_passes <= num_samples:
        raise ValueError(
            "needs 0 <= correct <= passing the public tests <= samples, "
            f"got {num_correct}, {num_public_passes}, {num_samples}"
        )
    if not 1 <= k <= num_samples or n < 1:
        raise UserError(f"{n}@{k} needs n >= 1 and 1 <= k <= the number of samples a task, which is {num_samples}")
    if num_correct == 0:
        return 0.0
    n = min(n, k, num_public_passes)
    draws = comb(num_samples, k)
    # Draws with f < n candidates; all others submit n.
    few = [comb(num_public_passes, f) * comb(num_samples - num_public_passes, k - f) for f in range(n)]
    terms = [ways / draws * pass_at_k(num_public_passes, num_correct, f) for f, ways in enumerate(few) if f]
    return math.fsum([*terms, (draws - sum(few)) / draws * pass_at_k(num_public_passes, num_correct, n)])


def paired_difference(
    ours: Mapping[str, float], theirs: Mapping[str, float], seed: int = 0, *, resamples: int = 10_000
) -> Interval:
    """Estimates the mean of `ours - theirs` over tasks; the bootstrap is paired: both runs are resampled alike.

    Far narrower than two separate intervals where the same tasks are hard for both. An interval that holds 0 is a null
    result.

    Args:
        ours, theirs: task id to value, of the same tasks.

    Raises:
        ValueError: the runs are not of the same tasks.
    """
    unpaired = sorted(ours.keys() ^ theirs.keys())
    if unpaired:
        raise UserError(
            f"a paired comparison needs the same tasks in both runs, which have {len(ours)} and {len(theirs)}: "
            f"task {unpaired[0]} is in one of them only"
        )
    return bootstrap_interval([ours[i] - theirs[i] for i in sorted(ours)], seed, resamples=resamples)


def oracle_temperature(scores: Mapping[float | None, float]) -> float | None:
    """Returns the temperature with the best test score; of equal ones the lowest.

    Chosen on the very score that is reported (as in Gloeckle et al. 2024), it is an optimistic estimate: an oracle, to
    be labelled as one and never compared with a temperature fixed beforehand.

    Raises:
        ValueError: no temperatures.
    """
    if not scores:
        raise ValueError("the oracle needs the scores of at least one temperature, got none")
    return max(scores, key=lambda t: (scores[t], -math.inf if t is None else -t))
