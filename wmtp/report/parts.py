"""What the parts of a report are made of: tables, figures with their numbers, curves over seeds."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wmtp.numerics.bootstrap import Interval
from wmtp.report.costs import Cost
from wmtp.report.figures import Curve
from wmtp.report.studies import Study, parse_ce

NAMED = 6  # cells that figures name; the others are thin lines or dots
_POINTS = 60  # of a curve

Cell = str | tuple[str, float | None]  # a text, and the number it is sorted by


@dataclass(frozen=True)
class Table:
    """Rows below a head; the first column names the row."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Shown:
    """A figure, what to see in it, and its numbers."""

    svg: str
    caption: str
    table: Table


@dataclass(frozen=True)
class Part:
    """One part of the page.

    Attributes:
        key: names it in links.
        lead: a sentence or two before the figures.
        lines: each a paragraph of its own, such as a claim: (kind, text).
        missing: why there is nothing; "" where there is something.
    """

    key: str
    title: str
    lead: str = ""
    lines: Sequence[tuple[str, str]] = ()
    shown: Sequence[Shown] = ()
    table: Table | None = None
    missing: str = ""
    extra: Any = None


def number(value: float | None, digits: int = 4) -> Cell:
    """Returns a table's cell of a number; a dash where there is none."""
    if value is None:
        return "\u2013", None
    return f"{value:.{digits}f}", value if math.isfinite(value) else None


def interval(found: Interval | None, digits: int = 4) -> Cell:
    """Returns a table's cell of an estimate with its ends."""
    if found is None:
        return number(None)
    estimate, low, high = (f"{x:.{digits}f}" for x in (found.estimate, found.low, found.high))
    sorted_by = found.estimate if math.isfinite(found.estimate) else None
    return (estimate if low == high else f"{estimate} [{low}, {high}]", sorted_by)


def ce_name(metric: str) -> str:
    held_out_set, head = parse_ce(metric) or ("", 1)
    return f"CE {held_out_set} head {head}" if held_out_set else f"CE head {head}"


def curves(study: Study, metric: str) -> dict[str, Curve]:
    drawn = {cell: curve_of([run.metrics.get(metric, ()) for run in runs]) for cell, runs in study.cells.items()}
    return {cell: curve for cell, curve in drawn.items() if curve}


def curve_of(series: Iterable[Sequence[tuple[int, float]]]) -> Curve | None:
    """Returns mean and range of series of (step, value), at so many points at most, each the mean of its steps."""
    values: dict[int, list[float]] = defaultdict(list)
    for one in series:
        for step, value in one:
            values[step].append(value)
    if not values:
        return None
    steps = sorted(values)
    parts = np.array_split(np.arange(len(steps)), min(_POINTS, len(steps)))
    found = np.array([[f(values[step]) for f in (np.mean, min, max)] for step in steps])
    means = [found[part].mean(axis=0) for part in parts]
    mean, low, high = np.array(means).T.tolist()
    return Curve([steps[part[-1]] for part in parts], mean, low, high)


def curve_table(of: Mapping[str, Curve]) -> Table:
    """Returns the numbers of curves at their first, middle and last points."""
    names, shares = ("first", "¼", "½", "¾", "last"), (0, 0.25, 0.5, 0.75, 1)
    rows, steps = [], []
    for cell, curve in of.items():
        at = [round(share * (len(curve.x) - 1)) for share in shares]
        rows.append([cell, *(interval(Interval(curve.mean[i], curve.low[i], curve.high[i])) for i in at)])
        steps.append([f"{curve.x[i]:g}" for i in at])
    if all(of_cell == steps[0] for of_cell in steps):
        return Table(["cell", *(f"{name} (step {step})" for name, step in zip(names, steps[0], strict=True))], rows)
    rows = [[*row, ", ".join(of_cell)] for row, of_cell in zip(rows, steps, strict=True)]
    return Table(["cell", *names, "at steps"], rows)


def cost_cells(found: Cost) -> list[Cell]:
    cells: list[Cell] = []
    for value, form in ((found.tokens, ",.0f"), (found.seconds, ",.1f"), (found.flops, ".2e"), (found.hours, ".3f")):
        cells.append(number(None) if value is None else (f"{value:{form}}", value))
    return cells
