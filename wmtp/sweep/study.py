"""The study in whose storage workers share cells: a trial of Optuna's for each attempt at one.

A cell's trials are told apart by their user attributes. Those that ended without a result (their worker died, was
stopped, or came second) are void; of the others the one with the lowest number counts. Trials are numbered in the order
in which they are made, so every worker that starts one sees whether an earlier one counts: no cell runs twice, and none
is lost, whichever worker is killed when.
"""

import logging
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.exceptions import DuplicatedStudyError, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from wmtp.config import differences
from wmtp.errors import mask_secrets, one_line
from wmtp.sweep.cells import SweepError

CELL, ERROR, RETRIES, WORKER, STAGES = "cell", "error", "retries", "worker", "stages"  # of a trial
PLAN, CHANGES = "plan", "changes"  # of a study
_SECONDS_TO_PLAN = 60.0  # for the worker that made a study to say what it is
STORAGE_DOWN = (StorageInternalError, SQLAlchemyError)

warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
optuna.logging.set_verbosity(optuna.logging.WARNING)
logging.getLogger("optuna.storages._rdb").setLevel(logging.CRITICAL)  # what it logs of an error is raised too


class StorageDown(SweepError):
    """A storage that does not answer, or refuses: nothing is lost, as every cell's runs keep their own checkpoints."""


def open_storage(url: str, heartbeat_seconds: int) -> RDBStorage:
    """Returns Optuna's storage: SQLite, or a database that several machines reach.

    Args:
        heartbeat_seconds: between signs of life; a worker on another machine that gave none for three times as long is
            taken for dead.

    Raises:
        StorageDown: no such storage, or it does not answer.
    """
    if url.startswith("sqlite:///"):
        Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    if url.startswith(("postgresql://", "postgres://")):  # SQLAlchemy would take psycopg2
        url = f"postgresql+psycopg://{url.partition('://')[2]}"
    kwargs: dict[str, Any] = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    if url.startswith("postgresql"):
        kwargs["connect_args"] = {"connect_timeout": 10}
    with clear_storage_errors(url):
        for attempt in range(3):
            try:
                return RDBStorage(url, kwargs, heartbeat_interval=heartbeat_seconds, grace_period=3 * heartbeat_seconds)
            except (SQLAlchemyError, AssertionError):  # two workers make its tables at once
                if attempt == 2:
                    raise
                time.sleep(1)
    raise AssertionError("unreachable")


@contextmanager
def clear_storage_errors(url: str) -> Iterator[None]:
    """Turns what a storage raises into a line with its address, without its password."""
    try:
        yield
    except (*STORAGE_DOWN, ImportError, AssertionError) as error:
        cause = error.__cause__ or error
        shown, why = mask_secrets(url).replace("+psycopg", ""), one_line(cause).partition(" (Background on")[0]
        raise StorageDown(
            f"storage {shown} cannot be used: {why:.300}; cells that are done stay done: start the same command again "
            "when it answers"
        ) from error


class Study:
    """One study, as one worker sees it.

    Args:
        storage: of :func:`open_storage`; studies in one storage have names of their own.
        cells: names of the cells that there are; a search makes more.
        sampler: gives Optuna's sampler for the search's n-th cell: with a seed of its own, so that what is tried does
            not depend on how often a worker was started.
        pruner: Optuna's; None for its default, the median.

    Attributes:
        study: Optuna's own.
        is_new: this worker has made it.
        maximize: the best value is the largest.
    """

    def __init__(
        self, storage: RDBStorage, name: str, cells: Sequence[str], *, maximize: bool = False, search: int = 0,
        sampler: Callable[[int], optuna.samplers.BaseSampler] | None = None,
        pruner: optuna.pruners.BasePruner | None = None,
    ) -> None:  # fmt: skip
        self._cells, self._search, self.maximize, self._sampler = cells, search, maximize, sampler
        direction = StudyDirection.MAXIMIZE if maximize else StudyDirection.MINIMIZE
        with clear_storage_errors(storage.url):
            try:
                self.study = optuna.create_study(storage=storage, study_name=name, direction=direction, pruner=pruner)
                self.is_new = True
                self.study.set_user_attr(WORKER, _this_process())
            except DuplicatedStudyError:
                self.study = optuna.load_study(storage=storage, study_name=name, pruner=pruner)
                self.is_new = False
            self._storage, self._heart = self.study._storage, storage

    # ------------------------------------------------------------------------------------------------------------------
    # What the study is

    def agree(self, plan: Mapping[str, Any], begin: Mapping[str, Callable[[], Any]], *, accept: bool = False) -> None:
        """Writes down what a new study is, and refuses another study than the one there.

        Args:
            plan: all that decides on the results.
            begin: makes further attributes of the study, each where it is not there, before any cell can be taken.
            accept: go on with a study that was begun with another plan.

        Raises:
            SweepError: the study was begun with another plan; the line names what differs.
        """
        until = time.monotonic() + _SECONDS_TO_PLAN
        while not self.is_new and time.monotonic() < until:
            known = self.study.user_attrs
            if PLAN in known or _has_ended(known.get(WORKER) or {}):
                break
            time.sleep(0.2)
        there = self.study.user_attrs.get(PLAN)
        found = [] if there is None else differences(there, plan)
        if found:
            what = f"{'; '.join(found[:6])}{f' and {len(found) - 6} more' * (len(found) > 6)}"
            if not accept:
                raise SweepError(
                    f"study {self.study.study_name} was begun with another {what}; give another study and output_dir, "
                    "or accept_changes=true to go on with both in one table"
                )
            self.study.set_user_attr(CHANGES, [*self.study.user_attrs.get(CHANGES, []), what])
        for key, make in begin.items():
            if key not in self.study.user_attrs:
                self.study.set_user_attr(key, make())
        if there is None:
            self._enqueue(self._missing(self.trials()))
        self.study.set_user_attr(PLAN, dict(plan))

    def retry_failed(self) -> None:
        """Enqueues every cell again that has failed."""
        for name, trial in self.counting().items():
            if ERROR in trial.user_attrs:
                self.study.enqueue_trial(trial.params, user_attrs={CELL: name, RETRIES: trial.number})

    # ------------------------------------------------------------------------------------------------------------------
    # What its trials say

    def trials(self) -> list[FrozenTrial]:
        """Returns all trials of the cells that there are, by number; with `accept_changes` there may be others."""
        known = lambda name: name in self._cells or (self._search > 0 and str(name).startswith("search-"))
        return [trial for trial in self.study.get_trials(deepcopy=False) if known(trial.user_attrs.get(CELL))]

    def counting(self, trials: Iterable[FrozenTrial] | None = None) -> dict[str, FrozenTrial]:
        """Returns the trial that counts, of every cell that has one."""
        found: dict[str, FrozenTrial] = {}
        for trial in self.trials() if trials is None else trials:
            name, before = trial.user_attrs.get(CELL), None
            if name is None or (trial.state == TrialState.FAIL and ERROR not in trial.user_attrs):
                continue
            before = found.get(name)
            if before is None or (ERROR in before.user_attrs and trial.user_attrs.get(RETRIES) == before.number):
                found[name] = trial
        return found

    def done(self) -> bool:
        """Returns whether every cell has ended, in whichever way."""
        counting = self.counting()
        names = {*self._cells, *counting}
        ended = all(name in counting and counting[name].state.is_finished() for name in names)
        return ended and len(counting) >= self.size

    @property
    def size(self) -> int:
        """How many cells there will be."""
        return len(self._cells) + self._search

    def _missing(self, trials: Sequence[FrozenTrial]) -> list[tuple[str, FrozenTrial | None]]:
        """Returns the cells that no trial counts for, with the last one that was tried."""
        counting, last = self.counting(trials), {}
        for trial in sorted(trials, key=_got_so_far):
            last[trial.user_attrs[CELL]] = trial
        names = [*self._cells, *sorted(name for name in last if name not in self._cells)]
        # A failed cell counts until its retry does; a retry that ended without a result is owed still.
        owed = lambda name: last[name].user_attrs.get(RETRIES) == counting[name].number
        found = [(name, last.get(name)) for name in names if name not in counting or owed(name)]
        searched = sum(name not in self._cells for name in names)
        if not found and searched < self._search:  # one at a time: each learns from those before
            found.append((f"search-{searched:04d}", None))
        return found

    def _enqueue(self, cells: Iterable[tuple[str, FrozenTrial | None]]) -> None:
        for name, before in cells:
            kept = {} if before is None else {k: v for k, v in before.user_attrs.items() if k in (STAGES, RETRIES)}
            self.study.enqueue_trial({} if before is None else before.params, user_attrs={CELL: name, **kept})

    # ------------------------------------------------------------------------------------------------------------------
    # A worker's trials

    def take(self) -> optuna.Trial | None:
        """Returns a trial that is now this worker's, of a cell that nobody else has; None where there is none."""
        trials = self.trials()
        if not any(trial.state == TrialState.WAITING for trial in trials):
            self._enqueue(self._missing(trials))
            trials = self.trials()
        for trial in trials:
            if trial.state == TrialState.WAITING and self._take(trial):
                if self._sampler is not None and (name := trial.user_attrs[CELL]) not in self._cells:
                    self.study.sampler = self._sampler(int(name.rpartition("-")[2]))
                return optuna.Trial(self.study, trial._trial_id)
        return None

    def _take(self, trial: FrozenTrial) -> bool:
        number, name = trial._trial_id, trial.user_attrs.get(CELL)
        try:
            self._heart.record_heartbeat(number)  # first: a trial without one is never taken for dead
            if not self._storage.set_trial_state_values(number, TrialState.RUNNING):
                return False
        except UpdateFinishedTrialError:
            return False
        self._storage.set_trial_user_attr(number, WORKER, _this_process())
        if name is not None and self.counting()[name].number != trial.number:
            self.give_back(number)
            return False
        return name is not None

    def keep_alive(self, mine: Iterable[int]) -> set[int]:
        """Gives a sign of life for this worker's trials, and gives up those of dead ones.

        Returns:
            Those of this worker's that are not its own any more, as it was suspended or cut off for too long.
        """
        mine = set(mine)
        for number in mine:
            self._heart.record_heartbeat(number)
        fail_stale_trials(self.study)
        running = {trial._trial_id: trial for trial in self.trials() if trial.state == TrialState.RUNNING}
        for number in set(running) - mine:
            if _has_ended(running[number].user_attrs.get(WORKER) or {}):
                self.give_back(number)
        return mine - set(running)

    def finish(self, number: int, state: TrialState, value: float | None = None, **attributes: Any) -> bool:
        """Ends a trial; returns False where it was given up, so that another one counts."""
        try:
            for key, content in attributes.items():
                self._storage.set_trial_user_attr(number, key, content)
            return self._storage.set_trial_state_values(number, state, None if value is None else [value])
        except UpdateFinishedTrialError:
            return False

    def keep(self, number: int, key: str, content: Any) -> None:
        """Writes down what a running trial has done so far, for whoever goes on if this worker dies."""
        with suppress(UpdateFinishedTrialError):  # :meth:`keep_alive` tells
            self._storage.set_trial_user_attr(number, key, content)

    def give_back(self, number: int) -> None:
        """Ends a trial without a result, so that its cell can be taken again."""
        self.finish(number, TrialState.FAIL)


def _got_so_far(trial: FrozenTrial) -> tuple[int, ...]:
    """Orders the trials of a cell: one that was given back as it came second knows less than those before."""
    known = trial.user_attrs
    return known.get(RETRIES, -1), len(known.get(STAGES, {})), len(trial.params), trial.number


def _this_process() -> dict[str, Any]:
    process = psutil.Process()
    return {"host": _host(), "pid": process.pid, "started": process.create_time()}


def _host() -> str:
    """Returns a name of the place in which a process id means something: the machine, and its namespace there."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')} {int(psutil.boot_time())}"
    except OSError:
        return socket.gethostname()


def _has_ended(worker: Mapping[str, Any]) -> bool:
    """Returns whether a worker on this machine has ended; False for one on another, whose signs of life tell."""
    if worker.get("host") != _host():
        return False
    try:
        return psutil.Process(worker["pid"]).create_time() != worker["started"]
    except psutil.NoSuchProcess:
        return True
