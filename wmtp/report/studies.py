"""A study: the runs of a sweep, or any runs, by cell; what it compares, and what the comparison found."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import yaml

from wmtp.errors import UserError
from wmtp.numerics.bootstrap import Interval
from wmtp.numerics.paired import mean_difference
from wmtp.report.claims import Comparison, compare_all
from wmtp.report.runs import Run, load_runs, require_comparable
from wmtp.tracking.store import artifact_text, clear_store_errors, existing_client, store_uri

_NO_WEIGHTS = ("uniform", "shuffled", "random_matched")  # methods that need no control
_CONTROLS = ("shuffled", "random_matched")


@dataclass(frozen=True)
class Study:
    """Runs by cell.

    Attributes:
        name: of the sweep, or of the runs.
        cells: name to its runs by seed; the baseline comes first.
        sweep: the sweep's config; {} for runs without one.
        rows: of the sweep's table, by cell and seed: axes, state, error, command.
        baseline: the cell that all others are held against.
        controls: cell to the names of its controls.
        objective: the metric that cells are ranked by, such as ``eval/code/ce_head1``; lower is better.
        margin: differences up to it do not matter; None where the study names none.
        parent_id: MLflow's id of the sweep's run, where it came from there.
    """

    name: str
    cells: dict[str, list[Run]]
    baseline: str
    objective: str
    sweep: dict = field(default_factory=dict)
    rows: dict[tuple[str, int], dict] = field(default_factory=dict)
    controls: dict[str, list[str]] = field(default_factory=dict)
    margin: float | None = None
    parent_id: str | None = None

    @property
    def runs(self) -> list[Run]:
        """All runs, cell by cell."""
        return [run for runs in self.cells.values() for run in runs]

    @property
    def target(self) -> tuple[str, int]:
        """The held-out set and the head of the objective."""
        return parse_ce(self.objective) or ("", 1)

    @cached_property
    def axes(self) -> dict[str, list]:
        """Config keys that the sweep varies, with the values that its cells have, in order."""
        values: dict[str, set] = {}
        for cell in self.cells:
            for key, value in self.axes_of(cell).items():
                values.setdefault(key, set()).add(value)
        return {key: sorted(of, key=lambda v: (isinstance(v, str), v)) for key, of in values.items() if len(of) > 1}

    def axes_of(self, cell: str) -> dict[str, object]:
        """Returns a cell's values of the keys that its sweep varies; {} for a cell outside of the grid."""
        return dict(next((row["axes"] for (name, _), row in self.rows.items() if name == cell), {}))

    @property
    def unfinished(self) -> list[dict]:
        """Rows of the sweep's table that are not done."""
        return [row for row in self.rows.values() if row["state"] != "done"]

    def ranked(self) -> list[str]:
        """Returns the cells from the best objective to the worst; those without one last."""
        found = {cell: over_seeds(runs, self.objective) for cell, runs in self.cells.items()}
        return sorted(found, key=lambda cell: (np.inf if found[cell] is None else found[cell].estimate, cell))

    def shown(self, limit: int) -> list[str]:
        """Returns the cells that figures name: the baseline, the best, its controls, and the next best ones."""
        ranked = [cell for cell in self.ranked() if cell != self.baseline]
        first = [self.baseline, *ranked[:1]]
        first += [cell for cell in self.controls.get(ranked[0], ()) if cell in self.cells] if ranked else []
        return list(dict.fromkeys([*first, *ranked]))[:limit]

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Every cell against the baseline and against its controls, on the documents and seeds that all have.

        Raises:
            UserError: there is nothing to compare, and why.
        """
        arms, weights = held_out_arms(self)
        made = [(cell, self.baseline) for cell in arms if cell != self.baseline]
        made += [(cell, c) for cell in arms for c in self.controls.get(cell, ()) if c in arms and c != self.baseline]
        needed = {cell: self.controls.get(cell) or self._unnamed_controls(cell) for cell in arms}
        return compare_all(arms, made, weights=weights, controls=needed, margin=self.margin)

    def _unnamed_controls(self, cell: str) -> Sequence[str]:
        """A cell whose weights are not the baseline's needs controls, named or not."""
        method = self.cells[cell][0].facts.get("method")
        same = method == self.cells[self.baseline][0].facts.get("method")
        return () if same or method in _NO_WEIGHTS else _CONTROLS


def parse_ce(metric: str) -> tuple[str, int] | None:
    """Returns the held-out set ("" for the unnamed one) and the head of a CE's name; None for other metrics."""
    found = re.fullmatch(r"eval/(?:([^/]+)/)?ce_head(\d+)", metric)
    return found and (found[1] or "", int(found[2]))


def over_seeds(runs: Iterable[Run], metric: str, *, first: bool = False) -> Interval | None:
    """Returns the mean of a metric's last (or first) values over runs, with the lowest and the highest."""
    values = [run.metrics[metric][0 if first else -1][1] for run in runs if run.metrics.get(metric)]
    return Interval(float(np.mean(values)), min(values), max(values)) if values else None


def held_out_matrix(runs: Sequence[Run], held_out_set: str, head: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns [S, U], the CE of each run on each document, and [U], their targets; None where a run has none."""
    columns = []
    for run in runs:
        if run.held_out is None:
            return None
        rows = run.held_out[(run.held_out["set"] == held_out_set) & (run.held_out["head"] == head)]
        columns.append(rows.sort_values("number"))
    if not columns or not len(columns[0]) or any(len(rows) != len(columns[0]) for rows in columns):
        return None
    return np.stack([rows["ce"].to_numpy() for rows in columns]), columns[0]["targets"].to_numpy()


def held_out_interval(runs: Sequence[Run], held_out_set: str, head: int) -> Interval | None:
    """Returns a cell's held-out CE with its 95 % interval over seeds and documents; None without figures of both."""
    found = held_out_matrix(runs, held_out_set, head)
    return mean_difference(*found).interval() if found and found[0].size > 1 else None


def held_out_arms(study: Study) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns each cell's [S, U] held-out CE of the objective on the seeds that all cells have, and [U] targets.

    Raises:
        UserError: there is nothing to compare, and why.
    """
    seeds = set.intersection(*({run.seed for run in runs} for runs in study.cells.values()))
    if len(study.cells) < 2:
        raise UserError(f"the study has one cell, {study.baseline}, and nothing to hold it against")
    if not seeds:
        raise UserError("no seed has been run in every cell, so no two cells can be paired")
    arms, targets = {}, np.empty(0)
    for cell, runs in study.cells.items():
        paired = {run.seed: run for run in runs if run.seed in seeds}
        found = held_out_matrix([paired[seed] for seed in sorted(seeds)], *study.target)
        if found is None:
            raise UserError(
                f"cell {cell} has no held-out CE of single documents (held_out/*.parquet) for the objective"
            )
        arms[cell], targets = found
    return arms, targets


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def load_study(
    names: Sequence[str],
    *,
    baseline: str | None = None,
    objective: str | None = None,
    tracking_uri: str | None = None,
    allow_mixed: bool = False,
) -> Study:
    """Reads a study from a sweep's folder or MLflow run (by id or by the study's name), or from runs.

    Args:
        names: one sweep, or runs: folders or MLflow ids.
        baseline, objective: instead of what the sweep's config names.
        tracking_uri: the MLflow store.
        allow_mixed: take runs that cannot be compared.

    Raises:
        UserError: nothing of that name, a study without runs, runs that cannot be compared, or a store that is down.
    """
    if not names:
        raise UserError("a report needs a study or runs: give study=NAME, or runs=[FOLDER or MLflow id, ...]")
    sweep, table, parent_id, sources = {}, {}, None, list(names)
    folder = Path(names[0])
    if len(names) == 1 and (folder / "sweep.yaml").is_file():
        sweep = yaml.safe_load((folder / "sweep.yaml").read_text())
        table = json.loads((folder / "table.json").read_text()) if (folder / "table.json").is_file() else {}
        sources = [path.parent.as_posix() for path in sorted(folder.glob("cells/*/seed-*/metrics.jsonl"))]
    elif len(names) == 1 and not folder.exists():
        found = _tracked_sweep(names[0], tracking_uri)
        if found is not None:
            parent_id, sweep, table, sources = found
    title = str(sweep.get("study") or ", ".join(Path(name).name for name in names))
    if not sources:
        raise UserError(
            f"study {title} has no run yet: start it with recipes/sweep_wmtp.py, or wait for its first cell"
        )
    runs = load_runs(sources)
    require_comparable(runs, allow_mixed=allow_mixed)
    cells: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.cell, run.seed)):
        cells.setdefault(run.cell, []).append(run)
    first = baseline or sweep.get("baseline") or _uniform(cells)
    if first not in cells:
        raise UserError(f"baseline {first!r} is no cell with a run; there are {', '.join(cells)}")
    return Study(
        name=title,
        cells={first: cells.pop(first), **cells},
        baseline=first,
        objective=_objective(runs, objective, sweep.get("objective")),
        sweep=sweep,
        rows={(row["cell"], row["seed"]): row for row in table.get("rows", ())},
        controls={cell: list(names) for cell, names in (sweep.get("controls") or {}).items()},
        margin=sweep.get("margin"),
        parent_id=parent_id,
    )


def _tracked_sweep(name: str, uri: str | None) -> tuple[str, dict, dict, list[str]] | None:
    """Returns a sweep's run id, config, table and training runs; None where the name is of another run."""
    store = store_uri(uri)
    with clear_store_errors(f"study {name} cannot be read from {store}", UserError):
        client = existing_client(store, UserError)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        quoted = name.replace("'", "''")
        found = client.search_runs(experiments, f"tags.`wmtp.sweep` = '{quoted}'", max_results=2)
        found = found or client.search_runs(experiments, f"attributes.run_id = '{quoted}'")
        if not found:
            raise UserError(f"{name} is neither a folder nor a run's id nor a study's name in {store}")
        if len(found) > 1:
            ids = ", ".join(run.info.run_id for run in found)
            raise UserError(f"{store} has several studies named {name}; give the id of one: {ids}, ...")
        parent = found[0]
        if "wmtp.sweep" not in parent.data.tags:
            return None
        run_id = parent.info.run_id
        children = []
        page = None
        while page is None or page.token:
            query = f"tags.`mlflow.parentRunId` = '{run_id}'"
            page = client.search_runs(experiments, query, page_token=page and page.token)
            children += [run.info.run_id for run in page if "wmtp.cell" in run.data.tags]
        sweep = yaml.safe_load(artifact_text(client, run_id, "sweep.yaml") or "{}")
        table = json.loads(artifact_text(client, run_id, "table.json") or "{}")
    return run_id, {"study": parent.data.tags["wmtp.sweep"], **sweep}, table, sorted(children)


def _uniform(cells: Mapping[str, list[Run]]) -> str:
    return next((cell for cell, runs in cells.items() if runs[0].facts.get("method") == "uniform"), next(iter(cells)))


def _objective(runs: Sequence[Run], wanted: str | None, of_sweep: str | None) -> str:
    """Returns the held-out CE that cells are ranked by: the wanted one, the sweep's, or the first of head 1.

    A sweep may have another objective, such as a pass rate: its documents have no figures of their own.
    """
    known = list(dict.fromkeys(metric for run in runs for metric in run.metrics if parse_ce(metric)))
    if wanted is not None and wanted not in known:
        raise UserError(f"no run has the objective {wanted!r}; there are {', '.join(known) or 'no held-out CEs'}")
    first = next((metric for metric in known if metric.endswith("ce_head1")), "eval/ce_head1")
    return wanted or (of_sweep if of_sweep in known else first)
