"""Claim lines: what a study of several arms may say, and nothing else.

    rho1 better than uniform by 0.0123 nats [0.0071, 0.0175], p 0.002 after Holm over 11 comparisons,
        5 seeds x 200 documents
    no difference found between dft and uniform: -0.0010 nats [-0.0062, 0.0042], p 1.000 after Holm over 11 comparisons,
        5 seeds x 200 documents; 0.0071 would have been found with a probability of 0.8
    rho1 better than uniform in mbpp pass@1 by 0.0310 [0.0102, 0.0518], p 0.010 after Holm over 22 comparisons,
        5 seeds x 500 tasks

A claim is made where the p of the mean difference over seeds and documents (:mod:`wmtp.numerics.paired`), adjusted for
all comparisons of the study, is at most 0.05. A weighting that wins without its controls in the same study, and
without being held against them, is called uncontrolled: sparser or merely different weights may do the same.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from wmtp.errors import UserError
from wmtp.numerics.bootstrap import Interval
from wmtp.numerics.paired import (
    MeanDifference,
    crossed_bootstrap,
    effect_size,
    holm,
    mean_difference,
    sign_flip,
    signed_rank,
)

_ALPHA = 0.05  # the probability of any false finding in a study without true differences
_POWER = 0.8  # of `Comparison.smallest`
_SHOWN_AS_SMALL = 0.001


@dataclass(frozen=True)
class Comparison:
    """Two arms of a study, on the same seeds and units.

    Attributes:
        arm, baseline: their names.
        difference: the mean of arm minus baseline.
        p: after Holm's adjustment over all of the study's comparisons.
        comparisons: how many these are.
        differences: [S, U] of each seed and unit.
        weights: [U], as in :func:`~wmtp.numerics.paired.mean_difference`; None for all alike.
        seeds_left_out: that only one of the two has.
        missing_controls: of the arm, that the study does not hold it against.
        metric: named in the claim, such as ``mbpp pass@1``; "" where it needs no name.
        unit: of the metric, such as ``nats``.
        sample: what a unit is, ``document`` or ``task``; "" where runs keep totals, so that seeds alone are compared.
        lower_is_better: of the metric.
        margin: of the study; differences up to it do not matter; None tests no equivalence.
    """

    arm: str
    baseline: str
    difference: MeanDifference
    p: float
    comparisons: int
    differences: np.ndarray = field(repr=False, compare=False)
    weights: np.ndarray | None = field(repr=False, compare=False)
    seeds_left_out: int
    missing_controls: tuple[str, ...]
    metric: str
    unit: str
    sample: str
    lower_is_better: bool
    margin: float | None

    @property
    def interval(self) -> Interval:
        """Returns the interval of the difference, without adjustment."""
        return self.difference.interval(1 - _ALPHA)

    @cached_property
    def smallest(self) -> float:
        """Returns the true difference that would have been found with a probability of 0.8, at the adjusted level."""
        return self.difference.smallest_effect(_POWER, _ALPHA / self.comparisons)

    @property
    def p_equivalent(self) -> float | None:
        """Returns the p of TOST; None where the study names no margin."""
        return None if self.margin is None else self.difference.p_equivalent(self.margin)

    def statistics(self, groups: Sequence[str] | None = None) -> dict[str, Any]:
        """Returns all that is computed of a comparison, as JSON values.

        Args:
            groups: [U] the cluster of each unit, such as its file: the bootstrap draws these.

        Tests beside the claim's see the units alone, averaged over seeds, or the seeds alone: what they find is no
        finding over both.
        """
        over_units = self.differences.mean(axis=0)
        over_seeds = np.average(self.differences, axis=1, weights=self.weights)
        bootstrap = crossed_bootstrap(self.differences, weights=self.weights, groups=groups)
        found = {
            "arm": self.arm, "baseline": self.baseline, "claim": str(self), "found": self.found, "metric": self.metric,
            "unit": self.unit, "seeds": self.difference.seeds, "units": self.difference.units,
            "difference": self.difference.mean,
            "interval": [self.interval.low, self.interval.high], "p": self.difference.p_value(), "p_holm": self.p,
            "comparisons": self.comparisons, "errors_and_freedom": self.difference.errors,
            "smallest_found": self.smallest, "power": _POWER, "margin": self.margin, "p_tost": self.p_equivalent,
            "bootstrap_interval": [bootstrap.low, bootstrap.high],
            "difference_by_seed": over_seeds.tolist(), "missing_controls": list(self.missing_controls),
        }  # fmt: skip
        for name, values in (("units", over_units), ("seeds", over_seeds)):
            if len(values) > 1:
                found[f"wilcoxon_p_over_{name}"] = signed_rank(values)
                found[f"sign_flip_p_over_{name}"] = sign_flip(values)
                found[f"effect_size_over_{name}"] = effect_size(values)
        return {key: None if isinstance(value, float) and np.isnan(value) else value for key, value in found.items()}

    @property
    def found(self) -> bool:
        """Whether the study may claim a difference."""
        return self.p <= _ALPHA

    @property
    def better(self) -> bool:
        """Whether the arm is the better one by the sign of the difference."""
        return (self.difference.mean < 0) == self.lower_is_better

    def __str__(self) -> str:
        d, unit = self.difference, f" {self.unit}" if self.unit else ""
        metric = f" in {self.metric}" if self.metric else ""
        p = f"p {self.p:.3f}" if self.p >= _SHOWN_AS_SMALL else f"p < {_SHOWN_AS_SMALL}"
        if self.comparisons > 1:
            p += f" after Holm over {self.comparisons} comparisons"
        of_units = f" x {d.units} {self.sample}{'s' * (d.units != 1)}" if self.sample else " alone"
        sample = f"{p}, {d.seeds} seed{'s' * (d.seeds != 1)}{of_units}"
        if self.seeds_left_out:
            sample += f" ({self.seeds_left_out} more seed{'s' * (self.seeds_left_out != 1)} that only one of them has)"
        low, high = self.interval.low, self.interval.high
        if self.found:
            size = abs(d.mean)
            low, high = (low, high) if d.mean > 0 else (-high, -low)
            word = "better" if self.better else "worse"
            line = f"{self.arm} {word} than {self.baseline}{metric} by {size:.4f}{unit} "
            line += f"[{low:.4f}, {high:.4f}], {sample}"
            if self.better and self.missing_controls:
                line += f"; uncontrolled: the study lacks {' and '.join(self.missing_controls)}"
        else:
            line = f"no difference found between {self.arm} and {self.baseline}{metric}: {d.mean:.4f}{unit} "
            line += f"[{low:.4f}, {high:.4f}], {sample}; "
            seen = f"{self.smallest:.4f} would have been found with a probability of {_POWER:g}"
            line += seen if self.smallest else "they never differ, so what would have been found is not known"
        if self.p_equivalent is not None and self.p_equivalent <= _ALPHA:
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
    metric: str = "",
    unit: str = "nats",
    sample: str = "document",
    lower_is_better: bool = True,
    margin: float | None = None,
) -> list[Comparison]:
    """Makes a study's comparisons, all at once: the adjustment needs their number, so none may be left out of it.

    Args:
        arms: name to [S, U], the metric of each seed and unit; seeds and units of two arms are paired by their place. A
            seed that an arm lacks is a row of NaN, and left out of its comparisons.
        comparisons: (arm, baseline) by name.
        weights: [U], as in :func:`~wmtp.numerics.paired.mean_difference`.
        controls: arm to the names of its controls; what wins is controlled only if it is compared with each of them.
        metric, unit, sample, lower_is_better, margin: as in :class:`Comparison`.

    Raises:
        UserError: no comparison, a name that no arm has, or arms that are not paired or have no seed in common.
    """
    if not comparisons:
        raise UserError("a study needs at least one comparison (arm, baseline)")
    differences, left_out = [], []
    for arm, baseline in comparisons:
        for name in (arm, baseline):
            if name not in arms:
                raise UserError(f"no arm is named {name!r}; there are {', '.join(sorted(arms))}")
        a, b = (np.atleast_2d(np.asarray(arms[name], dtype=np.float64)) for name in (arm, baseline))
        if a.shape != b.shape:
            raise UserError(f"{arm} has [seeds, documents] {a.shape} and {baseline} {b.shape}: pair them first")
        ours, theirs = (~np.isnan(values).all(axis=1) for values in (a, b))
        if not (ours & theirs).any():
            raise UserError(f"{arm} and {baseline} have no seed in common: run both with the same seeds")
        differences.append((a - b)[ours & theirs])
        left_out.append(int((ours ^ theirs).sum()))
    of_metric = (metric, unit, sample, lower_is_better, margin)
    made, found = set(comparisons), []
    for (arm, baseline), d, lacking in zip(comparisons, differences, left_out, strict=True):
        needed = (controls or {}).get(arm, ())
        missing = tuple(name for name in needed if name != baseline and (arm, name) not in made)
        estimate = mean_difference(d, weights)
        found.append(
            Comparison(arm, baseline, estimate, estimate.p_value(), 1, d, weights, lacking, missing, *of_metric)
        )
    return adjust(found)


def adjust(comparisons: Iterable[Comparison]) -> list[Comparison]:
    """Returns comparisons, of one metric or of several, with their p adjusted for all of them together."""
    found = list(comparisons)
    p_values = holm([c.difference.p_value() for c in found])
    return [replace(c, p=p, comparisons=len(found)) for c, p in zip(found, p_values, strict=True)]
