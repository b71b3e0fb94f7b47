"""A study: the runs of a sweep, or any runs, by cell, with what the sweep says of them."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path

import numpy as np
import yaml

from wmtp.errors import UserError, mask_secrets
from wmtp.numerics.bootstrap import Interval
from wmtp.report.comparison import (
    CONTROLS,
    PLAIN,
    cells_of,
    default_baseline,
    held_out_arms,
    require_one_config,
    sets_and_heads,
)
from wmtp.report.runs import Run, load_run, require_comparable
from wmtp.tracking.store import artifact_text, clear_store_errors, existing_client, store_uri


@dataclass(frozen=True)
class Study:
    """Runs by cell.

    Attributes:
        name: of the sweep, or of the runs.
        cells: name to its runs by seed; the baseline comes first.
        groups: the runs that may be compared with each other; one, unless others were allowed.
        baseline: the cell that all others are held against.
        objective: the held-out CE that cells are ranked by, such as ``eval/code/ce_head1``.
        other_data: cells that were trained on other data on purpose.
        sweep: the sweep's config; {} for runs without one.
        rows: of the sweep's table, by cell and seed: axes, state, error, command.
        parent_id: MLflow's id of the sweep's run, where it came from there.
    """

    name: str
    cells: dict[str, list[Run]]
    groups: list[list[Run]]
    baseline: str
    objective: str
    other_data: tuple[str, ...] = ()
    sweep: dict = field(default_factory=dict)
    rows: dict[tuple[str, int], dict] = field(default_factory=dict)
    parent_id: str | None = None

    @property
    def runs(self) -> list[Run]:
        """All runs, cell by cell."""
        return [run for runs in self.cells.values() for run in runs]

    @property
    def compared(self) -> list[Run]:
        """The runs that may be compared with the baseline's first, itself among them."""
        return next(group for group in self.groups if self.cells[self.baseline][0] in group)

    @property
    def target(self) -> tuple[str, int]:
        """The held-out set and the head of the objective."""
        return parse_ce(self.objective) or ("", 1)

    @property
    def controls(self) -> dict[str, list[str]] | None:
        """Cell to its controls as the sweep names them, by the cell or by the grid that it belongs to.

        A weighting for which it names none lacks them; None where it names none for any cell.
        """
        named = self.sweep.get("controls") or {}
        found: dict[str, list[str]] = {}
        for cell, runs in self.cells.items():
            keys = [key for key in named if cell == key or (self.axes_of(cell) and cell.startswith(f"{key}_"))]
            own = list(named[max(keys, key=len)]) if keys else None  # of rho1 and rho1_lora the nearer one
            needed = [] if runs[0].method in PLAIN else [f"a {kind} control of it" for kind in CONTROLS]
            found[cell] = needed if own is None else own
        return found if named else None

    @cached_property
    def axes(self) -> dict[str, list]:
        """Config keys that the sweep varies, with the values that its cells have, in order; or its factors."""
        if self.factors:
            return dict(self.factors)
        values: dict[str, set[float | str]] = {}
        for cell in self.cells:
            for key, value in self.axes_of(cell).items():
                values.setdefault(key, set()).add(value)
        return {key: sorted(of, key=numbers_first) for key, of in values.items() if len(of) > 1}

    @cached_property
    def factors(self) -> dict[str, list[str]]:
        """Factor to its levels, the first of which the others are held against, where cells are a design of factors."""
        given = self.sweep.get("factors") or {}
        if not isinstance(given, Mapping) or not all(isinstance(of, list) and len(of) > 1 for of in given.values()):
            raise UserError(f"factors must name two levels or more of each factor, got {given}")
        return {name: list(map(str, levels)) for name, levels in given.items()}

    @cached_property
    def design(self) -> dict[str, dict[str, str]]:
        """The cells of the factors' design, by the levels that their names join, each with its level by factor."""
        every = product(*self.factors.values()) if self.factors else ()
        return {"_".join(levels): dict(zip(self.factors, levels, strict=True)) for levels in every}

    def axes_of(self, cell: str) -> dict[str, float | str]:
        """Returns a cell's values of the keys or factors that its sweep varies; {} for a cell outside of the grid.

        What is no number is a text, JSON if it is none: lists, sections and null.
        """
        if cell in self.design:
            return dict(self.design[cell])
        own: dict = next((row["axes"] for (name, _), row in self.rows.items() if name == cell), {})
        return {key: value if type(value) in (int, float, str) else json.dumps(value) for key, value in own.items()}

    @property
    def unfinished(self) -> list[dict]:
        """Rows of the sweep's table that are not done."""
        return [row for row in self.rows.values() if row["state"] != "done"]

    def ranked(self) -> list[str]:
        """Returns the cells from the best objective to the worst; those without one last."""
        found = {cell: over_seeds(runs, self.objective) for cell, runs in self.cells.items()}
        known = {cell: of.estimate for cell, of in found.items() if of and np.isfinite(of.estimate)}
        return sorted(found, key=lambda cell: (known.get(cell, np.inf), cell))

    def shown(self, limit: int) -> list[str]:
        """Returns the cells that figures name: the baseline, cells of a design that differ from it by one factor, the
        best, its controls, and the next best ones."""
        ranked = [cell for cell in self.ranked() if cell != self.baseline]
        base = self.design.get(self.baseline, {})
        near = (cell for cell, own in self.design.items() if len(own.items() - base.items()) == 1 and cell in ranked)
        first = [self.baseline, *near, *ranked[:1]]
        first += [cell for cell in (self.controls or {}).get(ranked[0], ()) if cell in self.cells] if ranked else []
        return list(dict.fromkeys([*first, *ranked]))[:limit]


def numbers_first(value: float | str) -> tuple[bool, float | str]:
    """Returns by what the values of an axis are sorted."""
    return isinstance(value, str), value


def parse_ce(metric: str) -> tuple[str, int] | None:
    """Returns the held-out set ("" for the unnamed one) and the head of a CE's name; None for other metrics."""
    found = re.fullmatch(r"eval/(?:([^/]+)/)?ce_head(\d+)", metric)
    return found and (found[1] or "", int(found[2]))


def over_seeds(runs: Iterable[Run], metric: str) -> Interval | None:
    """Returns the mean of a metric's last values over runs, with the lowest and the highest."""
    values = [run.metrics[metric][-1][1] for run in runs if run.metrics.get(metric)]
    return over(values) if values else None


def over(values: Sequence[float]) -> Interval:
    """Returns the mean of values, with the lowest and the highest."""
    return Interval(float(np.mean(values)), min(values), max(values))


def held_out_interval(runs: Sequence[Run], metric: str) -> Interval | None:
    """Returns a cell's held-out CE with its 95 % interval over seeds and documents, else as :func:`over_seeds`."""
    known = [run for run in runs if run.has_finite_documents and run.metrics.get(metric)]
    name, head = parse_ce(metric) or ("", 1)
    if len(known) == len(runs) and (name, head) in sets_and_heads(known):
        return held_out_arms(known, name, head).interval(known[0].cell)
    return over_seeds(runs, metric)


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def load_study(
    names: Sequence[str], *, baseline: str | None = None, objective: str | None = None,
    other_data: Sequence[str] | None = None, factors: Mapping | None = None, allow_mixed: bool = False,
) -> Study:  # fmt: skip
    """Reads a study from a sweep's folder or MLflow run (by id or by the study's name), or from runs.

    Args:
        names: one sweep, or runs: folders or MLflow ids.
        baseline, objective, other_data, factors: instead of what the sweep's config names.
        allow_mixed: take runs that cannot be compared; the claims are then about those that can, with the baseline.

    Raises:
        UserError: nothing of that name, a study without runs, runs that cannot be compared, or a store that is down.
    """
    sweep: dict = {}
    table: dict = {}
    parent_id, sources = None, list(names)
    folder = Path(names[0])
    if len(names) == 1 and (folder / "sweep.yaml").is_file():
        sweep = yaml.safe_load((folder / "sweep.yaml").read_text())
        table = json.loads((folder / "table.json").read_text()) if (folder / "table.json").is_file() else {}
        sources = [path.parent.as_posix() for path in sorted(folder.glob("cells/*/seed-*/metrics.jsonl"))]
    elif len(names) == 1 and not folder.exists():
        found = _tracked_sweep(names[0])
        if found is not None:
            parent_id, sweep, table, sources = found
    title = str(sweep.get("study") or ", ".join(Path(name).name for name in names))
    # What still runs, was pruned or failed has seen fewer tokens: the sweep's table says what became of it.
    runs = [run for run in map(load_run, sources) if run.state == "FINISHED" or not sweep]
    if not runs:
        raise UserError(f"study {title} has no finished run yet: wait for a first cell of recipes/sweep_wmtp.py")
    runs.sort(key=lambda run: (run.cell, run.seed))
    if not sweep:  # which has seen to it, or was told to accept changes
        require_one_config(runs)
    by_seed = cells_of(runs)
    cells = {cell: list(of.values()) for cell, of in by_seed.items()}
    first = baseline or sweep.get("baseline") or default_baseline(by_seed)
    if first not in cells:
        raise UserError(f"baseline {first!r} is no cell with a run; there are {', '.join(cells)}")
    with_documents = [run for run in runs if run.has_finite_documents]
    if other_data is None:  # of the sweep's, not all need have a run yet
        known = {run.cell for run in with_documents}
        other_data = [cell for cell in sweep.get("other_data") or () if cell in known]
    same_tokens = sweep.get("equal") != "flops"
    groups = require_comparable(with_documents, allow_mixed, same_tokens=same_tokens, other_data=other_data)
    without = [run for run in runs if not run.has_finite_documents]
    return Study(
        name=title,
        cells={first: cells.pop(first), **cells},
        groups=[*groups, without] if without else groups,
        baseline=first,
        objective=_objective(runs, objective, sweep.get("objective")),
        other_data=tuple(other_data),
        sweep=sweep if factors is None else {**sweep, "factors": factors},
        rows={(row["cell"], row["seed"]): row for row in table.get("rows", ())},
        parent_id=parent_id or (runs[0].config.get("tracking") or {}).get("parent_run_id") if sweep else None,
    )


def _tracked_sweep(name: str) -> tuple[str, dict, dict, list[str]] | None:
    """Returns a sweep's run id, config, table and training runs; None where the name is of another run."""
    store = store_uri()
    with clear_store_errors(f"study {name} cannot be read from {mask_secrets(store)}", UserError):
        client = existing_client(store, UserError)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        quoted = f'"{name}"' if "'" in name else f"'{name}'"
        found = client.search_runs(experiments, f"tags.`wmtp.sweep` = {quoted}", max_results=2)
        found = found or client.search_runs(experiments, f"attributes.run_id = {quoted}")
        if not found:
            raise UserError(f"{name} is no folder, and {mask_secrets(store)} has no run or study of that name")
        if len(found) > 1:
            ids = " and ".join(run.info.run_id for run in found)
            raise UserError(f"{mask_secrets(store)} has several studies named {name}: give the id of one, as {ids}")
        run_id, tags = found[0].info.run_id, found[0].data.tags
        if "wmtp.sweep" not in tags:
            return None
        children, token = [], None
        while token is None or token:
            page = client.search_runs(experiments, f"tags.`mlflow.parentRunId` = '{run_id}'", page_token=token)
            children += [run.info.run_id for run in page if "wmtp.cell" in run.data.tags]
            token = page.token or ""
        sweep = yaml.safe_load(artifact_text(client, run_id, "sweep.yaml") or "{}")
        table = json.loads(artifact_text(client, run_id, "table.json") or "{}")
    return run_id, {"study": tags["wmtp.sweep"], **sweep}, table, sorted(children)


def _objective(runs: Sequence[Run], wanted: str | None, of_sweep: str | None) -> str:
    """Returns the held-out CE that cells are ranked by: the wanted one, the sweep's, or the first of head 1.

    A sweep may have another objective, such as a pass rate: its documents have no figures of their own.
    """
    known = list(dict.fromkeys(metric for run in runs for metric in run.metrics if parse_ce(metric)))
    if wanted is not None and wanted not in known:
        raise UserError(f"no run has the objective {wanted!r}; there are {', '.join(known) or 'no held-out CEs'}")
    first = next((metric for metric in known if metric.endswith("ce_head1")), "eval/ce_head1")
    return wanted or (of_sweep if of_sweep in known else first)
