"""Runs beside each other: a table of their cells, and what of it is a finding. A cell is a config without its seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from wmtp.config import differences
from wmtp.errors import UserError
from wmtp.numerics.bootstrap import Interval
from wmtp.numerics.paired import mean_difference
from wmtp.report.claims import Comparison, compare_all
from wmtp.report.runs import Run
from wmtp.tracking.environment import config_sha256

CONTROLS = ("shuffled", "random_matched")
PLAIN = ("uniform", *CONTROLS, "eval", "")  # methods that need no control


@dataclass(frozen=True)
class HeldOutArms:
    """The CE of one head on one set, by cell.

    Attributes:
        arms: cell to [S, U]: its seeds, with NaN for those that only others have, on all documents of the set.
        seeds: [S].
        targets: [U] target tokens of each document.
        documents: [U] their ids.
    """

    arms: dict[str, np.ndarray]
    seeds: tuple[int, ...]
    targets: np.ndarray
    documents: tuple[str, ...]

    def interval(self, cell: str) -> Interval:
        """Returns a cell's mean CE over its seeds and all target tokens, with its interval over both."""
        values = self.arms[cell]
        values = values[~np.isnan(values).all(axis=1)]
        if values.size == 1:  # nothing that it could vary over
            return Interval(*3 * (float(values.item()),))
        return mean_difference(values, self.targets).interval()


def cells_of(runs: Sequence[Run]) -> dict[str, dict[int, Run]]:
    """Returns runs by cell and seed.

    Raises:
        UserError: two runs of one cell have one seed.
    """
    cells: dict[str, dict[int, Run]] = {}
    for run in runs:
        other = cells.setdefault(run.cell, {}).setdefault(run.seed, run)
        if other is not run:
            raise UserError(
                f"{other.name} and {run.name} are both of {run.cell} with seed {run.seed}; give one of them"
            )
    return {cell: dict(sorted(seeds.items())) for cell, seeds in cells.items()}


def require_one_config(runs: Sequence[Run]) -> None:
    """Refuses runs of one cell whose configs differ by more than their seeds, as those of two sweeps may.

    Raises:
        UserError: it names two such runs, and a key.
    """
    for cell, of_seed in cells_of(runs).items():
        first, *others = of_seed.values()
        for run in others:
            for line in differences(first.settings, run.settings):
                raise UserError(
                    f"{first.name} and {run.name} are both of {cell}, but differ by more than their seeds: {line}; "
                    "compare them in calls of their own"
                )


def held_out_arms(runs: Sequence[Run], set_name: str = "", head: int = 1) -> HeldOutArms:
    """Pairs runs that may be compared (:func:`~wmtp.report.runs.require_comparable`), by seeds and documents.

    Raises:
        UserError: no run has this set, or this head.
    """
    cells = cells_of(runs)
    seeds = sorted({run.seed for run in runs})
    arms, documents, targets = {}, (), np.array([])
    for cell, of_seed in cells.items():
        found = {}
        for seed, run in of_seed.items():
            rows = run.documents[(run.documents["set"] == set_name) & (run.documents["head"] == head)]
            if len(rows):
                found[seed] = rows["ce"].to_numpy()
                documents, targets = tuple(rows["document"]), rows["targets"].to_numpy()
        if found:
            arms[cell] = np.stack([found.get(seed, np.full(len(documents), np.nan)) for seed in seeds])
    if not arms:
        shown = ", ".join(f"head {k}" + (f" of set {name}" if name else "") for name, k in _sets_and_heads(runs))
        raise UserError(f"no run has the CE of head {head} of set {set_name!r}; there are {shown}")
    return HeldOutArms(arms, tuple(seeds), targets, documents)


def _sets_and_heads(runs: Sequence[Run]) -> list[tuple[str, int]]:
    both = (run.documents[["set", "head"]].drop_duplicates() for run in runs)
    return sorted({(name, int(head)) for of_run in both for name, head in of_run.itertuples(index=False)})


def default_baseline(cells: Mapping[str, Mapping[int, Run]]) -> str:
    """Returns the first cell whose method is uniform, else the first."""
    uniform = (cell for cell, runs in cells.items() if next(iter(runs.values())).method == "uniform")
    return next(uniform, next(iter(cells)))


def controls_of(cells: Mapping[str, Mapping[int, Run]]) -> dict[str, list[str]]:
    """Returns the control cells of each weighted cell: those that differ by the control around its weighting alone.

    A control that no run is of has its method's name.
    """
    controls = {}
    first = {cell: next(iter(runs.values())) for cell, runs in cells.items()}
    by_weighting = {(_rest(run), _weighting_key(run.config.get("weighting"))): cell for cell, run in first.items()}
    for cell, run in first.items():
        if run.method not in PLAIN:
            wrapped = (
                {"_component_": f"wmtp.weighting.{kind}", "method": run.config.get("weighting")} for kind in CONTROLS
            )
            found = (by_weighting.get((_rest(run), _weighting_key(section))) for section in wrapped)
            controls[cell] = [there or kind for there, kind in zip(found, CONTROLS, strict=True)]
    return controls


def _rest(run: Run) -> str:
    return config_sha256({key: value for key, value in run.settings.items() if key != "weighting"})


def _weighting_key(section: object) -> str:
    return config_sha256({"weighting": section})


def compare_runs(
    runs: Sequence[Run],
    *,
    baseline: str | None = None,
    set_name: str = "",
    head: int = 1,
    margin: float | None = None,
    controls: Mapping[str, Sequence[str]] | None = None,
) -> list[Comparison]:
    """Compares each cell with the baseline, and what has controls with these, by seeds and documents at once.

    Args:
        runs: that may be compared (:func:`~wmtp.report.runs.require_comparable`).
        baseline: a cell, or the name of a run of it; None for :func:`default_baseline`.
        set_name, head: whose CE.
        margin: of equivalence, in nats.
        controls: cell to its controls; None for :func:`controls_of`.

    Raises:
        UserError: an unknown baseline, or two cells without a seed in common.
    """
    cells = cells_of(runs)
    of_run = {run.name: run.cell for run in runs}
    base = default_baseline(cells) if baseline is None else of_run.get(baseline, baseline)
    if base not in cells:
        raise UserError(f"baseline {baseline!r} is no run and no cell of these; there are {', '.join(cells)}")
    found = held_out_arms(runs, set_name, head)
    controls = controls_of(cells) if controls is None else controls
    pairs = [(cell, base) for cell in found.arms if cell != base and base in found.arms]
    pairs += [
        (cell, control)
        for cell in found.arms
        for control in controls.get(cell, ())
        if control in found.arms and control != base and cell != base
    ]
    if not pairs:
        return []
    return compare_all(found.arms, pairs, weights=found.targets, controls=controls, margin=margin)


def table(runs: Sequence[Run]) -> list[dict]:
    """Returns a row for each cell: ``cell``, ``method``, ``seeds``, ``targets`` (a run), and the mean CE.

    ``ce`` is a mapping from (set, head) to an :class:`~wmtp.numerics.bootstrap.Interval` over seeds and documents.
    """
    arms = {key: held_out_arms(runs, *key) for key in _sets_and_heads(runs)}
    rows = []
    for cell, of_seed in cells_of(runs).items():
        method = next(iter(of_seed.values())).method
        targets = sum(run.targets for run in of_seed.values()) / len(of_seed)
        ce = {key: found.interval(cell) for key, found in arms.items() if cell in found.arms}
        rows.append({"cell": cell, "method": method, "seeds": list(of_seed), "targets": targets, "ce": ce})
    return rows


def table_text(runs: Sequence[Run]) -> str:
    """Returns :func:`table` for a terminal."""
    rows = table(runs)
    keys = sorted({key for row in rows for key in row["ce"]})
    lines = [["cell", "seeds", "targets", *(f"{name} head {head}".strip() for name, head in keys)]]
    for row in rows:
        cells = [row["cell"], " ".join(map(str, row["seeds"])), f"{row['targets']:.0f}"]
        for key in keys:
            ce = row["ce"].get(key)
            ends = "" if ce is None or ce.low == ce.high else f" [{ce.low:.4f}, {ce.high:.4f}]"
            cells.append("" if ce is None else f"{ce.estimate:.4f}{ends}")
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = ["  ".join(f"{c:{width}}" for c, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join(["held-out CE, nats per target, with intervals of 95 % over seeds and documents", *shown])
