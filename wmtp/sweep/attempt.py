"""One attempt at a cell: its runs one after the other, each going on from its own checkpoint if interrupted."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from wmtp.errors import UserError, one_line
from wmtp.sweep.process import Process
from wmtp.sweep.study import CELL, ERROR, STAGES, Study
from wmtp.tracking import METRICS
from wmtp.training.run_log import read_metrics

_SECONDS_BETWEEN_STARTS = 2.0
_MOST_KILLS = 3  # one after the other without a step between them


@dataclass(frozen=True)
class Stage:
    """One run: a training or an evaluation.

    Attributes:
        name: of the run below the cell: ``seed-0`` or ``seed-0/heads``.
        argv: its command.
        folder: its local output folder.
        log: the file for what it prints.
        read: its figures by name, once it has ended.
        series: its figure that says how the cell does while it runs; None for an evaluation.
    """

    name: str
    argv: list[str]
    folder: Path
    log: Path
    read: Callable[[], Mapping[str, Any]]
    series: str | None = None

    @property
    def metrics(self) -> Path:
        """The file in which a training writes its figures down."""
        return self.folder / METRICS


class Attempt:
    """The runs of one trial. Nothing waits: :meth:`poll` is called until the attribute `ended` is true.

    What raises because the storage is down is done again at the next call.

    Args:
        trial: this worker's own trial.
        stages: its runs in order; those that an earlier attempt has finished are not run again.
        value: the objective from the figures of all stages by their names; raises a UserError if there is none. None
            for a run that is only prepared.
        environment: variables of the runs: devices, threads.
        prunes: ask the study's pruner at every new value of a stage's series.
    """

    def __init__(
        self, study: Study, trial: optuna.Trial, stages: Sequence[Stage], value: Callable[[dict], float] | None,
        environment: dict[str, str], *, prunes: bool = False,
    ) -> None:  # fmt: skip
        self._study, self._stages, self._value, self._environment = study, stages, value, environment
        self._trial, self.number, self._prunes = trial, trial._trial_id, prunes
        self.name = trial.user_attrs[CELL]
        self._done: dict[str, dict] = dict(trial.user_attrs.get(STAGES, {}))
        self._process: Process | None = None
        self._outcome: tuple[TrialState, float | None, dict[str, Any]] | None = None
        self._stopping = self._pruned = self.ended = False
        self._start_at = self._began = 0.0
        self._kills, self._at, self._reported = 0, ("", 0), -1

    def poll(self) -> str | None:
        """Does what is to be done now; returns a line about how the attempt ended, once it has."""
        if self._outcome is None:
            self._advance()
        if self._outcome is None:
            return None
        state, value, attributes = self._outcome
        counts = self._study.finish(self.number, state, value, **attributes, **{STAGES: self._done})
        self.ended = True
        if not counts:
            return "was another worker's by now"
        if state == TrialState.COMPLETE:
            return "done" if self._value is None else f"done, {value:.4f}"
        return "pruned" if state == TrialState.PRUNED else f"failed: {attributes[ERROR]}" if attributes else None

    def stop(self) -> None:
        """Asks the run to save and end; the cell is given back."""
        if not self._stopping and self._process is not None:
            self._process.stop()
        self._stopping = True

    @property
    def idle(self) -> bool:
        """No run of it is active."""
        return self._process is None or self._process.poll() is not None

    def give_up(self) -> None:
        """Ends the run at once, and leaves the trial to those who have it now."""
        if self._process is not None:
            self._process.kill()
        self.ended = True

    def _advance(self) -> None:
        stage = next((stage for stage in self._stages if stage.name not in self._done), None)
        if stage is None:
            try:
                value = 0.0 if self._value is None else self._value(self._done)  # Optuna wants one
                self._outcome = TrialState.COMPLETE, value, {}
            except UserError as error:
                self._outcome = TrialState.FAIL, None, {ERROR: one_line(error)}
        elif self._process is None:
            if self._stopping:
                self._outcome = TrialState.FAIL, None, {}
            elif time.monotonic() >= self._start_at:
                self._began = time.time()
                self._process = Process(stage.argv, stage.log, self._environment)
        elif self._process.poll() is not None:
            process, self._process = self._process, None
            self._after(stage, process)
        elif self._prunes and stage.series is not None and not self._pruned:
            with suppress(UpdateFinishedTrialError):  # Study.keep_alive tells
                if self._worse(stage):
                    self._pruned = True
                    self._process.stop()

    def _after(self, stage: Stage, process: Process) -> None:
        """Decides what comes after the end of a run."""
        if process.poll() == 0:
            try:
                figures = stage.read()
            except (OSError, ValueError) as error:
                self._outcome = TrialState.FAIL, None, {ERROR: f"{stage.name}: {one_line(error)}"}
                return
            self._done[stage.name] = {**figures, "seconds": round(time.time() - self._began, 1)}
            self._kills, self._reported = 0, -1
            self._study.keep(self.number, STAGES, self._done)
        elif self._pruned:
            self._outcome = TrialState.PRUNED, None, {}
        elif self._stopping and process.interrupted():
            self._outcome = TrialState.FAIL, None, {}
        elif process.waits_for_folder():
            self._start_at = time.monotonic() + _SECONDS_BETWEEN_STARTS
        elif process.interrupted() and self._kills < _MOST_KILLS:
            size = stage.metrics.stat().st_size if stage.metrics.exists() else 0
            self._kills = self._kills + 1 if (stage.name, size) == self._at else 1
            self._at, self._start_at = (stage.name, size), time.monotonic() + _SECONDS_BETWEEN_STARTS
        else:
            at = f"{stage.name.partition('/')[2]}: " if "/" in stage.name else ""
            self._outcome = TrialState.FAIL, None, {ERROR: f"{at}{process.error()} (log: {stage.log})"}

    def _worse(self, stage: Stage) -> bool:
        """Reports new values of the series, averaged with earlier seeds; returns whether the pruner ends the cell."""
        before = [figures for name, figures in self._done.items() if "/" not in name]
        offset, worse = int(sum(figures["step"] for figures in before)), False
        for line in read_metrics(stage.metrics):
            if stage.series in line and line["step"] > self._reported:
                values = [*(figures[stage.series] for figures in before), line[stage.series]]
                if math.isfinite(statistics.fmean(values)):
                    self._trial.report(statistics.fmean(values), offset + line["step"])
                    worse = worse or self._trial.should_prune()
                self._reported = line["step"]
        return worse
