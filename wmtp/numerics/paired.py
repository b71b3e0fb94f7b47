"""Paired comparisons of two arms over seeds and documents: the mean difference, its interval, tests and power.

A matrix [S, U] of differences holds, for each of S seeds, the difference of two runs of that seed on each of U units
(documents of a held-out set, or tasks). Both are samples: the question is what other seeds and other documents would
have shown. So d_su = mean + seed_s + unit_u + rest_su, with crossed random effects. A test over documents alone takes
the luck of a seed, which moves all documents together, for a finding; a test over seeds alone that of the documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special, stats

from wmtp.errors import UserError
from wmtp.numerics.bootstrap import Interval

_RESAMPLES, _AT_ONCE = 10_000, 1000  # of a bootstrap; those drawn at once: bounds memory
_DRAWS = 4000  # of true and estimated errors: power is then right to about half a point
_MOST_SEEDS = 200


@dataclass(frozen=True)
class MeanDifference:
    """A mean difference with its standard errors: the statement that all of them allow is the one that holds.

    Attributes:
        mean: of all seeds and units.
        squares: MS_seed, MS_unit and MS_rest of the two-way layout; of one seed or one unit the only variance.
        seeds, units: S and U.
        units_freedom: degrees of freedom that MS_unit has by the units' kurtosis: few long documents make it less sure.
    """

    mean: float
    squares: tuple[float, ...]
    seeds: int
    units: int
    units_freedom: float | None = None

    @property
    def errors(self) -> list[tuple[float, float]]:
        """Returns the standard errors with their degrees of freedom: (mean - true) / error is t distributed."""
        pairs = _standard_errors(np.array(self.squares), self.seeds, self.units)
        return [(float(error), float(freedom)) for error, freedom in pairs]

    def interval(self, level: float = 0.95) -> Interval:
        """Returns the widest t interval."""
        half = max(error * special.stdtrit(freedom, (1 + level) / 2) for error, freedom in self.errors)
        return Interval(self.mean, float(self.mean - half), float(self.mean + half))

    def p_value(self) -> float:
        """Returns the two-sided p of no difference."""
        return min(1.0, 2 * min(self.p_above(0.0), self.p_below(0.0)))

    def p_below(self, bound: float) -> float:
        """Returns the one-sided p of a true mean of ``bound`` or more: small where it lies below."""
        return max(_cdf(self.mean - bound, *error) for error in self.errors)

    def p_above(self, bound: float) -> float:
        """Returns the one-sided p of a true mean of ``bound`` or less: small where it lies above."""
        return max(_cdf(bound - self.mean, *error) for error in self.errors)

    def p_equivalent(self, margin: float) -> float:
        """Returns the p of two one-sided tests (TOST, Schuirmann 1987): small where the mean is within +-margin."""
        return max(self.p_below(margin), self.p_above(-margin))

    def smallest_effect(self, power: float = 0.8, alpha: float = 0.05) -> float:
        """Returns the true difference that the same study, made anew, would find at ``alpha`` with this probability.

        Found is what is significant by all errors at once. The true errors are not known: they are drawn from what the
        mean squares leave open, and the new study's estimates of them from these. Taking the estimates for the true
        errors promises too much: with three seeds 0.8 was 0.7 (benchmarks/claims.py).
        """
        free, rng = _freedom(self.seeds, self.units).astype(float), np.random.default_rng(0)
        if len(free) == 3:
            free[1] = self.units_freedom
        true = np.array(self.squares) * free / rng.chisquare(free, (_DRAWS, len(free)))
        if len(free) == 3:
            true[:, 0] = _seeds_given(self.squares[0], free[0], true[:, 2], rng)
            true[:, 1] = np.maximum(true[:, 1], true[:, 2])  # units add to the rest
        again = _standard_errors(true * rng.chisquare(free, true.shape) / free, self.seeds, self.units)
        needed = np.max([error * special.stdtrit(freedom, 1 - alpha / 2) for error, freedom in again], axis=0)
        variance = true[:, 0] + true[:, 1] - true[:, 2] if len(free) == 3 else true[:, 0]
        error = np.sqrt(variance / (self.seeds * self.units))
        if not error.all():
            return 0.0

        def missing(effect: float) -> float:
            found = special.ndtr((effect - needed) / error) + special.ndtr((-effect - needed) / error)
            return float(found.mean()) - power

        return float(optimize.brentq(missing, 0.0, (needed + 10 * error).max(), xtol=1e-12, rtol=1e-6))


def _seeds_given(square: float, freedom: float, rest: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws the true MS_seed from its posterior, given an estimate and draws of the true MS_rest, which it includes.

    Two seeds more or less say little, so the prior matters: seeds that add nothing are as likely as seeds that add
    something, with a flat logarithm of MS_seed up to _MOST_SEEDS MS_rest.
    """
    with np.errstate(divide="ignore", invalid="ignore"):  # where nothing varies
        at_rest = square * freedom / rest
        below = special.chdtr(freedom, at_rest)
        nothing = np.log(_MOST_SEEDS) * at_rest * stats.chi2.pdf(at_rest, freedom)
        more = square * freedom / special.chdtri(freedom, 1 - rng.random(len(rest)) * below)
        return np.where(rng.random(len(rest)) * (nothing + below) < nothing, rest, np.fmax(more, rest))


def _cdf(distance: float, error: float, freedom: float) -> float:
    if error == 0:
        return 0.5 if distance == 0 else float(distance > 0)
    return float(special.stdtr(freedom, distance / error))


def _freedom(seeds: int, units: int) -> np.ndarray:
    if seeds == 1 or units == 1:
        return np.array([seeds * units - 1])
    return np.array([seeds - 1, units - 1, (seeds - 1) * (units - 1)])


def _standard_errors(squares: np.ndarray, seeds: int, units: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the errors of :func:`mean_difference` with their degrees of freedom, from [..., 1 or 3] mean squares."""
    free = _freedom(seeds, units)
    of_seeds, over_seeds = squares[..., 0], np.full(squares.shape[:-1], free[0])
    if len(free) == 1:
        return [(np.sqrt(of_seeds / (seeds * units)), over_seeds)]
    both, larger = of_seeds + squares[..., 1] - squares[..., 2], squares[..., :2].max(axis=-1)
    with np.errstate(invalid="ignore"):  # 0 / 0 where nothing varies: not used
        satterthwaite = both**2 / (squares**2 / free).sum(axis=-1)
    freedom = np.where(both > larger, satterthwaite, free[squares[..., :2].argmax(axis=-1)])
    both, freedom = np.maximum(both, larger), np.minimum(freedom, 2 * free[0])
    return [(np.sqrt(part / (seeds * units)), of) for part, of in ((both, freedom), (of_seeds, over_seeds))]


def mean_difference(differences: np.ndarray, weights: np.ndarray | None = None) -> MeanDifference:
    """Estimates the mean of crossed seeds and units, and its errors, from the mean squares of a two-way layout.

    Two errors, of which each statement takes the more cautious one:

    - over seeds and units, var(mean) = (MS_seed + MS_unit - MS_rest) / (S U), never less than one of the first two
      alone, with Satterthwaite's degrees of freedom: the quasi-F of Clark (1973, "The language-as-fixed-effect
      fallacy"). With few seeds these are estimated too high just where MS_seed came out too low, so they are at most
      2 (S - 1);
    - over seeds alone, MS_seed / (S U) with S - 1: the paired t test of the runs' means.

    Either alone claims too much, in up to 27 % and 15 % of studies under the null; both together in 5
    (benchmarks/claims.py). With one seed, or one unit, the error is the paired t test's over the other.

    Args:
        differences: [S, U], S * U >= 2.
        weights: [U], how much each unit counts, such as its number of target tokens: the mean is then that of all
            tokens, and the error that of a ratio (linearised).

    Raises:
        UserError: fewer than two differences, or one that is not finite.
    """
    d = np.atleast_2d(np.asarray(differences, dtype=np.float64))
    if d.ndim != 2 or d.size < 2 or not np.isfinite(d).all():
        raise UserError(f"a comparison needs finite differences [seeds, units] of two pairs or more, got {d.shape}")
    num_seeds, num_units = d.shape
    if weights is not None:
        share = np.asarray(weights, dtype=np.float64) / np.mean(weights)
        mean = float((d * share).mean())
        d = mean + (d - mean) * share
    mean = float(d.mean())
    rows, columns = d.mean(axis=1), d.mean(axis=0)
    if num_seeds == 1 or num_units == 1:
        return MeanDifference(mean, (float(np.var(d, ddof=1)),), num_seeds, num_units)
    rest = (d - rows[:, None] - columns + mean) ** 2
    of_rest = rest.sum() / ((num_seeds - 1) * (num_units - 1))
    squares = (num_units * np.var(rows, ddof=1), num_seeds * np.var(columns, ddof=1), of_rest)
    spread = columns - mean
    kurtosis = (spread**4).mean() / ((spread**2).mean() ** 2 or 1.0)
    units_freedom = 2 * (num_units - 1) / max(2.0, kurtosis - 1)
    return MeanDifference(mean, tuple(map(float, squares)), num_seeds, num_units, float(units_freedom))


def crossed_bootstrap(
    differences: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    groups: Sequence | np.ndarray | None = None,
) -> Interval:
    """Returns the 95 % percentile interval of the mean, with seeds and units drawn anew, each by itself (Owen 2007).

    Args:
        differences, weights: as in :func:`mean_difference`.
        groups: [U] the cluster of each unit, drawn instead of units: documents of one repository, tasks of one problem.

    With few seeds it is too narrow, by about sqrt((S - 1) / S) and the tails of t: a claim uses
    :func:`mean_difference`.
    """
    d = np.atleast_2d(np.asarray(differences, dtype=np.float64))
    size = np.ones(d.shape[1]) if weights is None else np.asarray(weights, dtype=np.float64)
    total = d * size
    if groups is not None:
        _, group = np.unique(groups, return_inverse=True)
        total = np.stack([np.bincount(group, weights=row) for row in total])
        size = np.bincount(group, weights=size).astype(np.float64)
    num_seeds, num_units = total.shape
    rng = np.random.default_rng(0)  # equal differences give equal intervals
    means = []
    for _ in range(_RESAMPLES // _AT_ONCE):
        of_seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=_AT_ONCE)
        of_units = rng.multinomial(num_units, np.full(num_units, 1 / num_units), size=_AT_ONCE)
        means.append(((of_seeds @ total) * of_units).sum(axis=1) / (num_seeds * (of_units @ size)))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Interval(float(total.sum() / (num_seeds * size.sum())), float(low), float(high))


def sign_flip(values: np.ndarray) -> float:
    """Returns the two-sided p of a mean of zero if both signs are equally likely; exact for up to 13 values."""
    values = np.asarray(values, dtype=np.float64)
    found = stats.permutation_test(
        (values,),
        lambda x, axis: x.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=_RESAMPLES,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


def signed_rank(values: np.ndarray) -> float:
    """Returns Wilcoxon's two-sided p (1945) of a distribution symmetric around zero; 1 where all values are zero."""
    values = np.asarray(values, dtype=np.float64)
    return float(stats.wilcoxon(values).pvalue) if values.any() else 1.0


def effect_size(values: np.ndarray) -> float:
    """Returns Cohen's d of paired differences (1988): their mean in standard deviations; nan where they do not vary."""
    spread = np.std(values, ddof=1)
    return float(np.mean(values) / spread) if spread else float("nan")


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusts p values so that a study's false findings, any at all, stay below the level (Holm 1979)."""
    from statsmodels.stats.multitest import multipletests

    return multipletests(p_values, method="holm")[1].tolist() if len(p_values) else []
