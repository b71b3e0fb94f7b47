"""Runs beside each other: a table of their cells, and what of it is a finding. A cell is a config without its seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from wmtp.config import differences
from wmtp.errors import UserError
from wmtp.eval.results import figure_by_task, why_not_alike
from wmtp.numerics.bootstrap import Interval
from wmtp.numerics.paired import mean_difference
from wmtp.report.claims import Comparison, adjust, compare_all
from wmtp.report.runs import Run
from wmtp.tracking.environment import config_sha256

_ROUNDING = 1e-9  # of shares
CONTROLS = ("shuffled", "random_matched")
PLAIN = ("uniform", *CONTROLS, "eval", "")  # methods that need no control


@dataclass(frozen=True)
class Arms:
    """A metric of runs, by cell, seed and unit.

    Attributes:
        name: of the metric, as a column has it: ``code head 1``, ``mbpp pass@1``.
        arms: cell to [S, U]: its seeds, with NaN for those that only others have, on all units.
        seeds: [S].
        units: [U] their ids.
        sample: what a unit is: ``document`` or ``task``; "" where runs keep totals, which are one unit.
        weights: [U] how much each unit counts, the target tokens of a document; None for all alike.
        unit: of the metric: ``nats``, or "" for a share, of which more is better.
        nothing: what it says that the metric is zero in all arms.
    """

    name: str
    arms: dict[str, np.ndarray]
    seeds: tuple[int, ...]
    units: tuple[str, ...]
    sample: str = "document"
    weights: np.ndarray | None = None
    unit: str = ""
    nothing: str = ""

    def interval(self, cell: str) -> Interval:
        """Returns a cell's mean over seeds and units, with its interval over both; of one value alone without one."""
        values = self.arms[cell]
        values = values[~np.isnan(values).all(axis=1)]
        if values.size == 1:  # nothing that it could vary over
            return Interval(*3 * (float(values.item()),))
        return mean_difference(values, self.weights).interval()

    @property
    def title(self) -> str:
        """Returns its name in a sentence."""
        return f"CE of {self.name}" if self.unit else self.name

    @property
    def all_zero(self) -> bool:
        """Whether no arm has anything but zeros: such a study says nothing about the metric."""
        return not any(np.nan_to_num(values).any() for values in self.arms.values())

    def why_no_claim(self) -> str:
        """Returns why :func:`compare_runs` has made no comparison."""
        if self.all_zero:
            return f"No claim: {self.nothing} in any arm ({self.name})."
        needs = "" if self.sample else ": runs keep totals alone, so that takes two seeds in common, and not equal luck"
        return f"No claim: {self.title} of no other cell can be held against the baseline's{needs}."


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


def held_out_arms(runs: Sequence[Run], set_name: str = "", head: int = 1) -> Arms:
    """Pairs runs that may be compared (:func:`~wmtp.report.runs.require_comparable`), by seeds and documents.

    Raises:
        UserError: no run has this set, or this head.
    """
    values, documents, targets = {}, (), None
    for run in _of_cells(runs):
        rows = run.documents[(run.documents["set"] == set_name) & (run.documents["head"] == head)]
        if len(rows):
            values[run.cell, run.seed] = rows["ce"].to_numpy()
            documents, targets = tuple(rows["document"]), rows["targets"].to_numpy()
    if not values:
        shown = ", ".join(f"head {k}" + (f" of set {name}" if name else "") for name, k in sets_and_heads(runs))
        raise UserError(f"no run has the CE of head {head} of set {set_name!r}; there are {shown}")
    name = f"{set_name} head {head}".strip()
    return Arms(name, *_stacked(values), documents, weights=targets, unit="nats")


def sets_and_heads(runs: Sequence[Run]) -> list[tuple[str, int]]:
    """Returns the held-out sets and heads that runs have documents of."""
    both = (run.documents[["set", "head"]].drop_duplicates() for run in runs)
    return sorted({(name, int(head)) for of_run in both for name, head in of_run.itertuples(index=False)})


def evaluation_arms(runs: Sequence[Run], evaluation: str, figure: str | None = None) -> Arms:
    """Pairs runs by seeds and by the tasks of an evaluation, at its fixed temperature.

    An evaluation of heads has the totals of its prompts alone: each run is one unit. A task that the judge failed on in
    one run is left out of all.

    Args:
        figure: as in :func:`~wmtp.eval.results.figure_by_task`; of heads the share of drafts that verification
            accepted, with all heads drafting, or another figure of that decoding, as the accept length
            ``tokens_per_forward``. None is ``pass_at_1``, or ``acceptance_head2``.

    Raises:
        UserError: no run has this evaluation or figure, or two of them have evaluated something else or otherwise.
    """
    evaluated = [run for run in _of_cells(runs) if evaluation in evaluations_of([run])]
    if not evaluated:
        there = ", ".join(evaluations_of(runs)) or "none"
        raise UserError(f"no run has evaluation {evaluation!r} with figures of tasks or drafts; there are {there}")
    first, values = evaluated[0].evaluations[evaluation], {}
    for run in evaluated:
        if reason := _why_not_alike(first, run.evaluations[evaluation]):
            raise UserError(f"{evaluated[0].name} and {run.name} cannot be compared by {evaluation}: {reason}")
    if "temperatures" not in first:
        figure = figure or "acceptance_head2"
        drafted = {(run.cell, run.seed): _all_drafting(run.evaluations[evaluation]) for run in evaluated}
        values = {key: np.array([of[figure]]) for key, of in drafted.items() if figure in of}
        if not values:
            raise UserError(f"{evaluation} has no figure {figure!r}; there are {', '.join(_all_drafting(first))}")
        name = "accept length" if figure == "tokens_per_forward" else figure.replace("_head", " of head ")
        name = f"{name} ({evaluation})"
        return Arms(name, *_stacked(values), ("all prompts",), "", nothing="no draft was accepted")
    figure = figure or "pass_at_1"
    by_task = {(run.cell, run.seed): figure_by_task(run.evaluations[evaluation], figure) for run in evaluated}
    tasks = tuple(task for task in next(iter(by_task.values())) if all(task in of for of in by_task.values()))
    if not tasks:
        raise UserError(f"no task of {evaluation} has {figure} in all runs: give it more samples, or a smaller k")
    values = {key: np.array([of[task] for task in tasks]) for key, of in by_task.items()}
    name = f"{evaluation} {figure.replace('_at_', '@').replace('_', ' ')}"
    return Arms(name, *_stacked(values), tasks, "task", nothing="no program passed")


def evaluations_of(runs: Sequence[Run]) -> list[str]:
    """Returns the names of the evaluations that :func:`evaluation_arms` can read."""
    found = (item for run in runs for item in run.evaluations.items())
    return sorted({name for name, of in found if "temperatures" in of or acceptance(of)})


def acceptance(evaluation: dict) -> dict[str, float]:
    """Returns ``acceptance_head{k}`` of heads.json, with all heads drafting; {} of other evaluations."""
    drafted = _all_drafting(evaluation)
    return {name: share for name, share in drafted.items() if name.startswith("acceptance_head")}


def _all_drafting(evaluation: dict) -> dict[str, float]:
    return next((of for name, of in reversed(evaluation.get("speed", {}).items()) if name.startswith("drafts_")), {})


def _why_not_alike(ours: dict, theirs: dict) -> str | None:
    if "temperatures" in ours:
        return why_not_alike(ours, theirs)
    return next(iter(differences(ours.get("settings", {}), theirs.get("settings", {}))), None)


def _of_cells(runs: Sequence[Run]) -> list[Run]:
    return [run for of_seed in cells_of(runs).values() for run in of_seed.values()]


def _stacked(values: Mapping[tuple[str, int], np.ndarray]) -> tuple[dict[str, np.ndarray], tuple[int, ...]]:
    """Returns cell to [S, U] and the seeds [S], from [U] by cell and seed."""
    seeds, empty = sorted({seed for _, seed in values}), np.full_like(next(iter(values.values())), np.nan)
    cells = dict.fromkeys(cell for cell, _ in values)
    return {c: np.stack([values.get((c, seed), empty) for seed in seeds]) for c in cells}, tuple(seeds)


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
    metrics: Sequence[Arms],
    *,
    baseline: str | None = None,
    margin: float | None = None,
    controls: Mapping[str, Sequence[str]] | None = None,
) -> list[list[Comparison]]:
    """Compares each cell with the baseline, and what has controls with these, by seeds and units at once.

    Args:
        runs: that may be compared (:func:`~wmtp.report.runs.require_comparable`).
        metrics: of these runs; the first needs no name in a claim.
        baseline: a cell, or the name of a run of it; None for :func:`default_baseline`.
        margin: of equivalence, in nats.
        controls: cell to its controls; None for :func:`controls_of`.

    Returns:
        The comparisons of each metric, adjusted for those of all metrics together; none of a metric that is zero in all
        arms.

    Raises:
        UserError: an unknown baseline, or two cells without a seed in common.
    """
    cells = cells_of(runs)
    of_run = {run.name: run.cell for run in runs}
    base = default_baseline(cells) if baseline is None else of_run.get(baseline, baseline)
    if base not in cells:
        raise UserError(f"baseline {baseline!r} is no run and no cell of these; there are {', '.join(cells)}")
    controls = controls_of(cells) if controls is None else controls
    pairs = [(cell, base) for cell in cells if cell != base]
    pairs += [(cell, control) for cell, _ in pairs for control in controls.get(cell, ()) if control != base]
    return _adjusted([_compared(metric, pairs, controls, margin, named=n > 0) for n, metric in enumerate(metrics)])


def _compared(
    metric: Arms, pairs: Sequence[tuple[str, str]], controls: Mapping[str, Sequence[str]], margin: float | None, *,
    named: bool,
) -> list[Comparison]:  # fmt: skip
    known = [pair for pair in pairs if metric.arms.keys() >= set(pair)]
    if not metric.sample:  # totals of one seed, or equal ones of few, say nothing about their error
        known = [(a, b) for a, b in known if np.nanstd(metric.arms[a] - metric.arms[b]) > _ROUNDING]
    if metric.all_zero or not known:
        return []
    ce = metric.unit == "nats"
    return compare_all(
        metric.arms, known, weights=metric.weights, controls=controls, sample=metric.sample, unit=metric.unit,
        metric=metric.title if named or not ce else "", lower_is_better=ce, margin=margin if ce else None,
    )  # fmt: skip


def _adjusted(found: Sequence[Sequence[Comparison]]) -> list[list[Comparison]]:
    adjusted = iter(adjust(c for of_metric in found for c in of_metric))
    return [[next(adjusted) for _ in of_metric] for of_metric in found]


def compare_levels(
    runs: Sequence[Run],
    metrics: Sequence[Arms],
    factors: Mapping[str, Sequence[str]],
    design: Mapping[str, Mapping[str, str]],
    *,
    margin: float | None = None,
) -> list[list[Comparison]]:
    """Compares each level of each factor with the factor's first one, in the mean over a design's cells that differ in
    nothing else, on the same seeds and units.

    Args:
        runs, metrics, margin: as in :func:`compare_runs`.
        factors: name to levels.
        design: cell to its level by factor; every cell has runs.

    Returns:
        The comparisons of each metric, adjusted for those of all metrics together; none of a metric that is zero in all
        arms, or that a cell lacks. A weighting, held against plain training, needs its controls among the levels.
    """
    method = {run.cell: run.method for run in runs}
    cells: dict[str, list[str]] = {}
    pairs, controls = [], {}
    for factor, levels in factors.items():
        names = [f"{factor} {level}" for level in levels]
        cells |= {n: [c for c, of in design.items() if of[factor] == v] for n, v in zip(names, levels, strict=True)}
        pairs += [(name, names[0]) for name in names[1:]]
        methods = {name: {method[cell] for cell in cells[name]} for name in names}
        of_kind = {kind: name for name in names for kind in CONTROLS if methods[name] == {kind}}
        for name in names:
            if methods[names[0]] <= set(PLAIN) and not methods[name] & set(PLAIN):
                pairs += [(name, control) for control in of_kind.values()]
                controls[name] = [of_kind.get(kind, f"a {kind} control of it") for kind in CONTROLS]
    found = []
    for number, metric in enumerate(metrics):
        known = {name: of for name, of in cells.items() if metric.arms.keys() >= set(of)}
        means = {name: np.mean([metric.arms[cell] for cell in of], axis=0) for name, of in known.items()}
        found.append(_compared(replace(metric, arms=means), pairs, controls, margin, named=number > 0))
    return _adjusted(found)


def table_text(runs: Sequence[Run], metrics: Sequence[Arms] = ()) -> str:
    """Returns a terminal's table of cells: their seeds, target tokens of a run, held-out CE, and other metrics."""
    columns = [*(held_out_arms(runs, *key) for key in sets_and_heads(runs)), *metrics]
    lines = [["cell", "seeds", "targets", *(metric.name for metric in columns)]]
    for cell, of_seed in cells_of(runs).items():
        targets = sum(run.targets for run in of_seed.values()) / len(of_seed)
        line = [cell, " ".join(map(str, of_seed)), f"{targets:.0f}"]
        for metric in columns:
            found = metric.interval(cell) if cell in metric.arms else None
            ends = "" if found is None or found.low == found.high else f" [{found.low:.4f}, {found.high:.4f}]"
            line.append("" if found is None else f"{found.estimate:.4f}{ends}")
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(f"{c:{width}}" for c, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join(["held-out CE, nats per target, with intervals of 95 % over seeds and documents", *text])
