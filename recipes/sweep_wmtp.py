"""Runs the cells of a sweep, each a training and its evaluations, on any number of machines that share one study.

    python recipes/sweep_wmtp.py --config configs/tiny/sweep.yaml
    python recipes/sweep_wmtp.py --config configs/tiny/sweep.yaml retry_failed=true

Cells are all combinations of `axes`, the entries of `cells`, and what `search` tries, each with every seed. The study
in `storage` says which are done. The same command, here or on another machine that reaches the storage, is one more
worker, and goes on after a kill: docs/sweeps.md.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import wmtp  # noqa: F401  # isort: skip  # first: it silences what torchtune says when it is imported
import optuna
from omegaconf import DictConfig, OmegaConf
from optuna.trial import TrialState

from wmtp import config
from wmtp.config import ConfigError, ConfigReader, build
from wmtp.errors import Stopped, clear_errors, mask_secrets, one_line
from wmtp.files import locked, write_whole
from wmtp.storage import output_of
from wmtp.sweep import Cell, SweepError
from wmtp.sweep.attempt import Attempt, Stage
from wmtp.sweep.cells import equalised, flat, grid, refuse_own_keys, suggested, tokens_per_step, unlike
from wmtp.sweep.plan import ParentRun, plan
from wmtp.sweep.planned import CannotFit, Planner
from wmtp.sweep.runs import Runs
from wmtp.sweep.study import CELL, ERROR, STORAGE_DOWN, Study, clear_storage_errors, open_storage
from wmtp.sweep.table import LiveTable, by_cell, markdown, progress, rows, strict_json, times
from wmtp.training.stopping import StopFlag, stopping

EQUAL = ("steps", "target_tokens", "flops")
SECONDS_BETWEEN_LOOKS = 0.2  # at what runs here
SECONDS_BETWEEN_TAKES = 2.0  # while the study has nothing to take
PARENT = "mlflow_run_id"  # the study's attribute that names its run in MLflow


class SweepRecipe:
    """Order of events: read the config, `setup` (every cell is checked, the study opened), `prepare`, `run`."""

    def __init__(self, cfg: DictConfig) -> None:
        """Reads and checks every key; nothing is opened yet."""
        self._cfg = cfg
        read = ConfigReader(cfg)
        self._output_dir = str(read.get("output_dir")).rstrip("/")
        self._name = read.text("study")
        self._storage_url = read.text("storage", os.environ.get("WMTP_SWEEP_STORAGE") or None)
        self._base = Cell("", read.text("recipe"), read.text("config"), flat(read.plain("overrides", {})))
        self._processes = read.integer("nproc_per_node", 1, minimum=1)
        self._axes = read.plain("axes", {})
        self._cells_cfg = read.plain("cells", [])
        self._search = flat(read.plain("search", {}))
        self._trials = read.integer("trials", 0)
        self._sampler_cfg = read.section("sampler", optional=True)
        self._pruner_cfg = read.section("pruner", optional=True)
        self._seeds = read.numbers("seeds", [0], minimum=0, whole=True)
        self._prepare_cfg = read.plain("prepare", [])
        self._evaluations_cfg = read.plain("evaluations", {})
        self._equal = read.choice(
            "equal", {"steps": "steps", "target_tokens": "target_tokens", "flops": "flops"}, "steps"
        )
        self._objective = read.text("objective", "eval/ce_head1")
        self._maximize = read.choice("direction", {"minimize": False, "maximize": True}, "minimize")
        self._baseline = read.text("baseline", None)
        self._controls = read.plain("controls", {})
        self._other_data = read.plain("other_data", [])
        self._factors = read.plain("factors", {})
        self._margin = read.number("margin", None, above=0)
        self._max_parallel = read.integer("max_parallel", 1, minimum=1)
        self._devices = read.plain("devices", [])
        self._threads = read.integer("threads", 1, minimum=1)
        hours = read.number("max_hours", None, above=0)
        self._stop = StopFlag(None if hours is None else 60 * hours)
        self._max_cells = read.integer("max_cells", None, minimum=1)
        self._retry_failed = read.flag("retry_failed", False)
        self._accept_changes = read.flag("accept_changes", False)
        self._heartbeat_seconds = read.integer("heartbeat_seconds", 30, minimum=1)
        self._tracking_cfg = read.section("tracking", optional=True)
        read.done()

        if bool(self._search) != bool(self._trials):
            raise ConfigError("search and trials go together: keys to search, and how many cells to try")
        if self._pruner_cfg is not None and self._objective.partition("/")[0] in self._evaluations_cfg:
            raise ConfigError(
                f"pruner ends a cell while it trains, and objective {self._objective} is of an evaluation after; set "
                "a held-out figure such as eval/ce_head1, or pruner: null"
            )
        if self._search and self._equal != "steps":
            raise ConfigError(f"equal={self._equal} is for cells that are known before: a search has equal=steps")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ConfigError("sweep_wmtp is one process, which starts the others: use --nproc_per_node 1")
        if self._storage_url is None:
            self._storage_url = f"sqlite:///{output_of(self._output_dir).folder}/study.db"
        elif self._cfg.get("storage") and mask_secrets(self._storage_url) != self._storage_url:
            raise ConfigError(
                "storage holds a password, and a config is kept with the results; set it as WMTP_SWEEP_STORAGE"
            )
        self._places = self._shares()
        at_once = self._processes * len(self._places)
        sharing = {"cpu": at_once, "cuda": 1 if self._devices else len(self._places)}
        self._planner = Planner(self._processes, sharing, lambda line: self._screen.line(line))

    def _shares(self) -> list[dict[str, str]]:
        """Returns the environment of each run that may be active at once: its threads, and its GPUs."""
        threads = {"OMP_NUM_THREADS": str(self._threads)}
        if not self._devices:
            return [threads] * self._max_parallel
        devices, each = list(map(str, self._devices)), self._processes
        shares = [devices[i : i + each] for i in range(0, len(devices) - each + 1, each)][: self._max_parallel]
        if not shares:
            raise ConfigError(f"devices {devices} are fewer than nproc_per_node {each}")
        return [{**threads, "CUDA_VISIBLE_DEVICES": ",".join(share)} for share in shares]

    # ------------------------------------------------------------------------------------------------------------------
    # Set-up

    def setup(self) -> None:
        """Checks every cell by its recipe, then joins the study, or begins it."""
        cells = grid(self._base, self._axes) if self._axes or not (self._cells_cfg or self._search) else []
        for entry in self._cells_cfg:
            cells += grid(self._cell(entry, "cells"), entry.get("axes"))
        self._cells = unlike(cells)
        self._check_claims()
        self._cells = self._equalised(self._cells)
        self._prepared = unlike(self._cell(entry, "prepare") for entry in self._prepare_cfg)
        for name, entry in self._evaluations_cfg.items():
            if not isinstance(entry, Mapping):
                raise ConfigError(f"evaluations.{name} must be a section with recipe and config, got {entry!r}")
        named = [{"name": str(name), **entry} for name, entry in self._evaluations_cfg.items()]
        evaluations = {cell.name: cell for cell in unlike(self._cell(entry, "evaluations") for entry in named)}
        searched = [self._searched("search-0000", suggested(self._search, None))] if self._search else []
        refuse_own_keys([*self._cells, *searched])
        everything = [*self._prepared, *self._cells, *searched, *evaluations.values()]
        for cell in everything:
            cell.check()

        tracking = None if self._tracking_cfg is None else OmegaConf.to_container(self._tracking_cfg, resolve=True)
        parent = None if tracking is None else ParentRun(tracking)
        self._folder = output_of(self._output_dir).folder
        storage = open_storage(self._storage_url, self._heartbeat_seconds)
        self._errors = lambda: clear_storage_errors(self._storage_url)
        self._sampler(0)  # a mistake in its section is found before anything runs
        own = {"sampler": self._sampler, "pruner": build(self._pruner_cfg, where="pruner")}
        self._tasks = {f"{cell.name}/seed-{seed}": (cell, [seed]) for cell in self._cells for seed in self._seeds}
        self._study = Study(storage, self._name, list(self._tasks), maximize=self._maximize, search=self._trials, **own)
        self._first = [Study(storage, f"{self._name}: {cell.name}", [cell.name]) for cell in self._prepared]
        settings = mask_secrets(OmegaConf.to_yaml(self._cfg, resolve=True))
        begin = {PARENT: lambda: parent.create(self._name, tracking.get("run_name"), settings)} if parent else {}
        with self._errors():
            self._study.agree(plan(self._cfg, everything), begin, accept=self._accept_changes)
            self._parent, self._parent_id = parent, self._study.study.user_attrs.get(PARENT)
            if self._retry_failed:
                for study in (*self._first, self._study):
                    study.retry_failed()
        of_runs = {"processes": self._processes, "evaluations": evaluations, "tracking": tracking}
        self._runs = Runs(self._output_dir, objective=self._objective, parent_run_id=self._parent_id, **of_runs)
        write_whole(self._folder / "sweep.yaml", settings)

    def _cell(self, entry: Mapping[str, Any], where: str) -> Cell:
        """Returns the cell of an entry of the config; one of `cells` starts from the sweep's own overrides."""
        known = {"name", "recipe", "config", "overrides"} | ({"axes"} if where == "cells" else set())
        texts = ("name", "recipe", "config")
        good = isinstance(entry, Mapping) and "name" in entry and not set(entry) - known
        if not good or not all(isinstance(entry.get(key, ""), str) for key in texts):
            raise ConfigError(f"{where}: each entry has a name, and may have {', '.join(sorted(known))}; got {entry}")
        base = self._base if where == "cells" else replace(self._base, changes={})
        recipe, config_file = entry.get("recipe", base.recipe), entry.get("config", base.config)
        return Cell(entry["name"], recipe, config_file, {**base.changes, **flat(entry.get("overrides") or {})})

    def _searched(self, name: str, values: Mapping[str, Any]) -> Cell:
        return replace(self._base, name=name, changes={**self._base.changes, **values}, axes=values, group="search")

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        section = OmegaConf.merge({"_component_": "optuna.samplers.TPESampler", "seed": 0}, self._sampler_cfg or {})
        section.seed = (section.seed or 0) + number
        return build(section, where="sampler")

    def _check_claims(self) -> None:
        """Refuses a baseline or control that is no cell; a group's name stands for each of its cells."""
        names, groups = [cell.name for cell in self._cells], {cell.group for cell in self._cells}
        told = [self._baseline] * (self._baseline is not None)
        for name, own in self._controls.items():
            if not isinstance(own, list):
                raise ConfigError(f"controls.{name} must be a list of cells, got {own!r}")
            told += own
        if not all(isinstance(levels, list) and len(levels) > 1 for levels in self._factors.values()):
            raise ConfigError(f"factors must name two levels or more of each factor, got {self._factors}")
        told += ["_".join(map(str, levels)) for levels in product(*self._factors.values()) if levels]
        for name in [*told, *self._other_data]:
            if name not in names:
                known = ", ".join(names)
                keys = "baseline, controls, other_data and factors"
                raise SweepError(f"{keys} name cells; there is no {name!r}, but {known}")
        for name in self._controls:
            if name not in {*names, *groups, "search"}:
                raise SweepError(f"controls: there is no cell or group {name!r}, but {', '.join([*names, *groups])}")

    def _equalised(self, cells: list[Cell]) -> list[Cell]:
        if self._equal == "steps" or not cells:
            return cells
        base = next((cell for cell in cells if cell.name == self._baseline), None)
        if base is None:
            raise SweepError(f"equal={self._equal} makes every cell cost what the baseline does: set baseline")
        if self._equal == "target_tokens":
            return equalised(cells, base, lambda cfg: tokens_per_step(cfg, self._processes), self._equal)
        from wmtp.training.flops import flops_per_step

        return equalised(cells, base, flops_per_step, self._equal)

    # ------------------------------------------------------------------------------------------------------------------
    # Work

    def run(self) -> None:
        """Runs what all cells need, one after the other, then the cells, until the study has no more."""
        with LiveTable() as self._screen:
            for study, cell in zip(self._first, self._prepared, strict=True):
                self._work(study, lambda trial, cell=cell: self._runs.prepared(self._planner.fitting(cell)), None)
                with self._errors():
                    failed = study.counting()[cell.name].user_attrs.get(ERROR)
                if failed:
                    raise SweepError(f"prepare: {cell.name}: {failed}; mend that, then retry_failed=true")
            prunes = self._pruner_cfg is not None
            self._work(self._study, self._stages, self._runs.value, prunes=prunes, most=self._max_cells)
        with self._errors():
            failed = [cell["cell"] for cell in self._write() if cell["state"] == "failed"]
        if failed:
            self._screen.line(f"{len(failed)} failed: {', '.join(failed)}; retry_failed=true tries again")
        self._screen.line(f"wrote {self._folder}/table.md and table.json")

    def _work(
        self, study: Study, stages: Callable, value: Callable | None, *, prunes: bool = False, most: int | None = None
    ) -> None:
        """Takes what the study has while a place is free, and looks after what runs; returns when all has ended."""
        running: dict[int, Attempt] = {}  # by place
        taken, take_at, beat_at, down = 0, 0.0, 0.0, False
        while True:
            stops = self._stop.wanted()
            full = stops or (most is not None and taken >= most)
            if stops:
                for attempt in running.values():
                    attempt.stop()
            try:
                for place, attempt in list(running.items()):
                    line = attempt.poll()
                    if attempt.ended:
                        del running[place]
                        take_at = 0.0
                        self._screen.line(f"{attempt.name}: {line or 'stopped'}")
                        self._show(study)
                if time.monotonic() >= beat_at:
                    beat_at = time.monotonic() + self._heartbeat_seconds
                    lost = study.keep_alive(attempt.number for attempt in running.values())
                    for place in [place for place, attempt in running.items() if attempt.number in lost]:
                        running.pop(place).give_up()
                    self._show(study)
                free = [place for place in range(len(self._places)) if place not in running]
                if full and not running:
                    if study.done():
                        return
                    self._write()
                    raise Stopped(f"stopped with {progress(study)}; to go on: the same command")
                if free and not full and time.monotonic() >= take_at:
                    trial = study.take()
                    if trial is not None:
                        taken += 1
                        try:
                            of_trial, place = stages(trial), free[0]
                            running[place] = Attempt(study, trial, of_trial, value, self._places[place], prunes=prunes)
                        except CannotFit as error:
                            study.finish(trial._trial_id, TrialState.FAIL, **{ERROR: str(error)})
                            self._screen.line(f"{trial.user_attrs[CELL]}: failed: {error}")
                        self._show(study)
                    elif not running and study.done():
                        return
                    else:
                        take_at = time.monotonic() + SECONDS_BETWEEN_TAKES
                down = False
            except STORAGE_DOWN as error:
                why = one_line(error.__cause__ or error).partition(" (Background on")[0]
                told = f"storage {mask_secrets(self._storage_url)} does not answer: {why:.200}"
                if stops and all(attempt.idle for attempt in running.values()):
                    raise Stopped(f"stopped while {told}; to go on: the same command when it does") from error
                if not down:
                    self._screen.line(told)
                down = True
                time.sleep(SECONDS_BETWEEN_TAKES)
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _stages(self, trial: optuna.Trial) -> list[Stage]:
        name = trial.user_attrs[CELL]
        if name in self._tasks:
            cell, seeds = self._tasks[name]
        else:
            cell, seeds = self._searched(name, suggested(self._search, trial)), self._seeds
        return self._runs.stages(self._planner.fitting(cell, len(seeds)), seeds)

    # ------------------------------------------------------------------------------------------------------------------
    # The table

    def _show(self, study: Study) -> None:
        """Draws the live table, and writes the files where it is of the cells."""
        title = progress(study, list(self._planner.seconds.values()))
        self._screen.show(title, self._write() if study is self._study else [])

    def _write(self) -> list[dict]:
        """Writes table.json and table.md from the study's storage alone; returns the line of each cell."""
        counting = self._study.counting()
        searched = {name: trial.params for name, trial in counting.items() if name not in self._tasks}
        tasks = self._tasks | {n: (self._searched(n, params), self._seeds) for n, params in sorted(searched.items())}
        command = lambda cell, seed: self._runs.command(self._runs.training(cell, seed))
        found = rows(tasks, counting, self._runs.value, command)
        cells = by_cell(found, maximize=self._maximize)
        facts = {
            "study": self._name,
            "objective": self._objective,
            "direction": "maximize" if self._maximize else "minimize",
            "baseline": self._baseline,
            "controls": self._controls,
            "other_data": self._other_data,
            "margin": self._margin,
        }
        text = strict_json({**facts, "cells": cells, "rows": found, "seconds": times(counting)})
        with locked(self._folder / ".table.lock"):  # other workers write it too
            write_whole(self._folder / "table.json", text)
            write_whole(self._folder / "table.md", markdown(facts, found, cells))
        if self._parent is not None:
            status = "FINISHED" if self._study.done() else "RUNNING"
            try:
                self._parent.update(self._parent_id, text, status)
            except SweepError as error:
                self._screen.line(f"WARNING: {error}")
        return cells


@clear_errors()
@stopping(resumes=False)
@config.parse
def main(cfg: DictConfig) -> None:
    recipe = SweepRecipe(cfg)
    recipe.setup()
    recipe.run()


if __name__ == "__main__":
    main()
