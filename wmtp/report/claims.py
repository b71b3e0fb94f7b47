"""Claim lines: what a study of several arms may say, and nothing else.

    rho1 better than uniform by 0.0123 nats [0.0071, 0.0175], p 0.002 after Holm over 11 comparisons,
        5 seeds x 200 documents
    no difference found between dft and uniform: -0.0010 nats [-0.0062, 0.0042], p 1.000 after Holm over 11 comparisons,
        5 seeds x 200 documents; 0.0071 would have been found with a probability of 0.8

A claim is made where the p of the mean difference over seeds and documents (:mod:`wmtp.numerics.paired`), adjusted for
all comparisons of the study, is at most alpha. A weighting that wins without its controls in the same study, and
without being held against them, is called uncontrolled: sparser or merely different weights may do the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from wmtp.errors import UserError
from wmtp.numerics.bootstrap import Interval
from wmtp.numerics.paired import MeanDifference, effect_size, holm, mean_difference

_SHOWN_AS_SMALL = 0.001


@dataclass(frozen=True)
class Comparison:
    """Two arms of a study, on the same seeds and units.

    Attributes:
        arm, baseline: their names.
        difference: the mean of arm minus baseline.
        p: after Holm's adjustment over all of the study's comparisons.
        comparisons: how many these are.
        interval: of the difference; without adjustment.
        effect: Cohen's d of the units' differences, averaged over seeds.
        smallest: the true difference that would have been found, at the level adjusted for all, with ``power``.
        p_equivalent: of TOST, where the study names a margin.
        missing_controls: of the arm, that the study does not hold it against.
        unit: of the metric, such as ``nats``.
        lower_is_better: of the metric.
        alpha, power, margin: of the study.
    """

    arm: str
    baseline: str
    difference: MeanDifference
    p: float
    comparisons: int
    interval: Interval
    effect: float
    smallest: float
    p_equivalent: float | None
    missing_controls: tuple[str, ...]
    unit: str
    lower_is_better: bool
    alpha: float
    power: float
    margin: float | None

    @property
    def found(self) -> bool:
        """Whether the study may claim a difference."""
        return self.p <= self.alpha

    @property
    def better(self) -> bool:
        """Whether the arm is the better one by the sign of the difference."""
        return (self.difference.mean < 0) == self.lower_is_better

    def __str__(self) -> str:
        d, unit = self.difference, f" {self.unit}" if self.unit else ""
        p = f"p {self.p:.3f}" if self.p >= _SHOWN_AS_SMALL else f"p < {_SHOWN_AS_SMALL}"
        if self.comparisons > 1:
            p += f" after Holm over {self.comparisons} comparisons"
        units = "documents" if d.units != 1 else "document"
        sample = f"{p}, {d.seeds} seed{'s' * (d.seeds != 1)} x {d.units} {units}"
        low, high = self.interval.low, self.interval.high
        if self.found:
            size = abs(d.mean)
            low, high = (low, high) if d.mean > 0 else (-high, -low)
            word = "better" if self.better else "worse"
            line = f"{self.arm} {word} than {self.baseline} by {size:.4f}{unit} [{low:.4f}, {high:.4f}], {sample}"
            if self.better and self.missing_controls:
                line += f"; uncontrolled: the study lacks {' and '.join(self.missing_controls)}"
        else:
            line = f"no difference found between {self.arm} and {self.baseline}: {d.mean:.4f}{unit} "
            line += (
                f"[{low:.4f}, {high:.4f}], {sample}; {self.smallest:.4f} would have been found with a probability of "
            )
            line += f"{self.power:g}"
        if self.p_equivalent is not None and self.p_equivalent <= self.alpha:
            line += f"; within +-{self.margin:g} of each other (TOST, p {self.p_equivalent:.3f})"
        if d.seeds == 1:
            line += "; one seed: its luck is part of the difference"
        return line


def compare_all(
    arms: Mapping[str, np.ndarray],
    comparisons: Sequence[tuple[str, str]],
    *,
    weights: np.ndarray | None = None,
    controls: Mapping[str, Sequence[str]] | None = None,
    unit: str = "nats",
    lower_is_better: bool = True,
    alpha: float = 0.05,
    power: float = 0.8,
    margin: float | None = None,
) -> list[Comparison]:
    """Makes a study's comparisons, all at once: the adjustment needs their number, so none may be left out of it.

    Args:
        arms: name to [S, U], the metric of each seed and unit; seeds and units of two arms are paired by their place.
        comparisons: (arm, baseline) by name.
        weights: [U], as in :func:`~wmtp.numerics.paired.mean_difference`.
        controls: arm to the names of its controls; what wins is controlled only if it is compared with each of them.
        unit, lower_is_better: of the metric.
        alpha: the probability of any false finding in a study without true differences.
        power: of :attr:`Comparison.smallest`.
        margin: differences up to it do not matter; None tests no equivalence.

    Raises:
        UserError: no comparison, a name that no arm has, or arms that are not paired.
    """
    if not comparisons:
        raise UserError("a study needs at least one comparison (arm, baseline)")
    differences = []
    for arm, baseline in comparisons:
        for name in (arm, baseline):
            if name not in arms:
                raise UserError(f"no arm is named {name!r}; there are {', '.join(sorted(arms))}")
        a, b = (np.atleast_2d(np.asarray(arms[name], dtype=np.float64)) for name in (arm, baseline))
        if a.shape != b.shape:
            raise UserError(f"{arm} has [seeds, documents] {a.shape} and {baseline} {b.shape}: pair them first")
        differences.append(a - b)
    estimates = [mean_difference(d, weights) for d in differences]
    adjusted = holm([estimate.p_value() for estimate in estimates])
    made = set(comparisons)
    found = []
    for (arm, baseline), d, estimate, p in zip(comparisons, differences, estimates, adjusted, strict=True):
        needed = (controls or {}).get(arm, ())
        found.append(
            Comparison(
                arm,
                baseline,
                estimate,
                p,
                len(comparisons),
                estimate.interval(1 - alpha),
                effect_size(d.mean(axis=0)) if d.shape[1] > 1 else effect_size(d[:, 0]),
                estimate.smallest_effect(power, alpha / len(comparisons)),
                None if margin is None else estimate.p_equivalent(margin),
                tuple(name for name in needed if name != baseline and (arm, name) not in made),
                unit,
                lower_is_better,
                alpha,
                power,
                margin,
            )
        )
    return found
