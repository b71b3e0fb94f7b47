"""The runs of a sweep's cells: their commands, folders, tags, and the figures that they leave."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wmtp.storage import output_of
from wmtp.sweep.attempt import Stage
from wmtp.sweep.cells import Cell, SweepError, loaded
from wmtp.sweep.process import command, shown
from wmtp.tracking import METRICS
from wmtp.training.run_log import read_metrics

_RESULTS = ("results.json", "heads.json")
_NO_RESULT = ("per_second", "seconds", "speedup")  # ends of figures that differ from run to run


@dataclass(frozen=True)
class Runs:
    """How the cells of a sweep are run.

    Args:
        output_dir: of the sweep: a local folder, or ``s3://bucket/prefix``.
        processes: of every run.
        evaluations: after each training, by name.
        tracking: the runs' tracking section; None for no MLflow.
        parent_run_id: MLflow's run that the trainings are shown below.
        objective: the figure that a cell is judged by.
    """

    output_dir: str
    processes: int
    evaluations: Mapping[str, Cell]
    tracking: Mapping[str, Any] | None
    objective: str
    parent_run_id: str | None = None

    def prepared(self, cell: Cell) -> list[Stage]:
        """Returns the one run of a cell that others need."""
        cell = self._placed(cell, f"prepared/{cell.name}", {"run_name": cell.name, "parent_run_id": self.parent_run_id})
        return [self._stage(cell, cell.name, f"prepared/{cell.name}", training=True)]

    def stages(self, cell: Cell, seeds: Sequence[int]) -> list[Stage]:
        """Returns a cell's runs: for each seed the training, then the evaluations of its export."""
        found = []
        for seed in seeds:
            place = f"cells/{cell.name}/seed-{seed}"
            found.append(self._stage(self.training(cell, seed), f"seed-{seed}", place, training=True))
            for name in self.evaluations:
                evaluation = self.evaluation(cell, seed, name)
                at = f"{place}/evaluations/{name}"
                found.append(self._stage(evaluation, f"seed-{seed}/{name}", at, training=False))
        return found

    def training(self, cell: Cell, seed: int) -> Cell:
        """Returns a cell with all that its training with a seed is told."""
        tags = {"wmtp.cell": cell.name, "wmtp.seed": str(seed), "wmtp.axes": json.dumps(dict(cell.axes))}
        tracking = {"run_name": f"{cell.name}-seed{seed}", "parent_run_id": self.parent_run_id, "tags": tags}
        place = f"cells/{cell.name}/seed-{seed}"
        return self._placed(replace(cell, changes={**cell.changes, "seed": seed}), place, tracking)

    def evaluation(self, cell: Cell, seed: int, name: str) -> Cell:
        """Returns an evaluation of a cell's export: of the same model, if the evaluation has one of its kind."""
        evaluation, place = self.evaluations[name], f"cells/{cell.name}/seed-{seed}"
        theirs, model = evaluation.settings().get("model"), cell.settings().get("model")
        changes = {"checkpoint": f"{self.output_dir}/{place}/export"}
        if theirs is not None and model is not None and theirs.get("_component_") == model.get("_component_"):
            same = {key: value for key, value in model.items() if key != "max_seq_len" and theirs.get(key) != value}
            changes |= {f"model.{key}": value for key, value in same.items()}
        # The run's own folder, in what the sweep's config says of the evaluation.
        own = {k: v.replace("{cell}", f"{self.output_dir}/{place}") if isinstance(v, str) else v
               for k, v in evaluation.changes.items()}  # fmt: skip
        tags = {"wmtp.cell": cell.name, "wmtp.seed": str(seed)}
        tracking = {"run_name": f"{cell.name}-seed{seed}-{name}", "parent_run_id": "training", "tags": tags}
        told = replace(evaluation, name=f"{cell.name}/{name}", changes={**changes, **own})
        return self._placed(told, f"{place}/evaluations/{name}", tracking)

    def command(self, cell: Cell) -> str:
        """Returns the command that a run of :meth:`training` or :meth:`evaluation` can be repeated with by hand."""
        kept = {key: value for key, value in cell.changes.items() if key not in ("resume", "tracking")}
        return shown(cell.recipe, replace(cell, changes=kept).arguments(), self.processes)

    def value(self, done: Mapping[str, Mapping[str, Any]]) -> float:
        """Returns the mean of the objective over the seeds.

        Raises:
            SweepError: a run has not logged it, or it is no finite number.
        """
        found = []
        for seed in [name for name in done if "/" not in name]:
            own = {**done[seed]}
            for name in self.evaluations:
                own |= {f"{name}/{key}": number for key, number in done.get(f"{seed}/{name}", {}).items()}
            value = own.get(self.objective)
            if value is None:
                known = ", ".join(key for key in own if key not in ("step", "seconds"))
                raise SweepError(f"objective {self.objective} was never logged; there are {known or 'no figures'}")
            if not abs(value) < float("inf"):
                raise SweepError(f"objective {self.objective} is {value}")
            found.append(value)
        return sum(found) / len(found)

    def _placed(self, cell: Cell, place: str, tracking: dict[str, Any]) -> Cell:
        goes_on = {"resume": "auto"} if "resume" in loaded(cell.config) else {"overwrite": True}
        tracked = None if self.tracking is None else {**self.tracking, **tracking}
        changes = {"output_dir": f"{self.output_dir}/{place}", **goes_on, "tracking": tracked}
        # The sweep's section replaces the config's, so what a cell changes in it comes after.
        last = {} if tracked is None else {k: v for k, v in cell.changes.items() if k.startswith("tracking.")}
        first = {key: value for key, value in cell.changes.items() if key not in {*changes, *last}}
        return replace(cell, changes={**first, **changes, **last})

    def _stage(self, cell: Cell, name: str, place: str, *, training: bool) -> Stage:
        folder = output_of(f"{self.output_dir}/{place}").folder
        log = output_of(self.output_dir).folder / f"{place}.log"
        read = (lambda: _last(folder / METRICS)) if training else (lambda: _results(folder))
        argv = command(cell.recipe, cell.arguments(), self.processes)
        return Stage(name, argv, folder, log, read, self.objective if training else None)


def _last(metrics: Path) -> dict[str, float]:
    """Returns the last value of each figure of a training that is its result."""
    merged: dict[str, float] = {}
    for line in read_metrics(metrics):
        merged |= line
    return {key: value for key, value in merged.items() if key.startswith("eval/") or key in ("step", "train/loss")}


def _results(folder: Path) -> dict[str, float]:
    """Returns the figures of an evaluation: of results.json those at the fixed temperature."""
    for name in _RESULTS:
        if (folder / name).exists():
            found = json.loads((folder / name).read_text(encoding="utf-8"))
            if "fixed_temperature" in found:
                fixed = found["temperatures"][found["fixed_temperature"]]["metrics"]
                return {key: figure["estimate"] for key, figure in fixed.items()}
            return dict(_numbers({key: of for key, of in found.items() if key != "settings"}))
    return {}


def _numbers(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, child in value.items():
        if isinstance(child, Mapping):
            yield from _numbers(child, f"{prefix}{key}/")
        elif isinstance(child, int | float) and not key.endswith(_NO_RESULT):
            yield f"{prefix}{key}", child
