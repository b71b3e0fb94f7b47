"""A sweep gives one table, whatever the order, the number of workers, and who is killed when."""

import itertools
import json
import os
import random
import re
import signal
import sqlite3
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from omegaconf import OmegaConf
from processes import run_recipe_file, start
from services import new_store

from runs import ROOT
from wmtp.tracking.store import mlflow_client

pytestmark = pytest.mark.slow

STUB = ROOT / "tests" / "recipes" / "sweep_stub.py"


class Sweep:
    """A sweep of the stub in a folder, with as many workers as a test starts."""

    def __init__(self, folder, **keys):
        self.folder, self._workers = Path(folder), 0
        self.folder.mkdir(parents=True, exist_ok=True)
        base = {"output_dir": "", "seed": 0, "resume": False, "tracking": None, "steps": 5, "seconds": 0.02, "lr": 1.0}
        self.write("base.yaml", base | {"fails": False, "logs": "eval/ce_head1"})
        self._keys = {"output_dir": str(self.folder / "sweep"), "study": "stub", "recipe": str(STUB)}
        self._keys |= {"config": str(self.folder / "base.yaml"), "heartbeat_seconds": 1, "seeds": [0, 1]}
        self._keys |= {"axes": {"lr": [0.1, 0.3, 0.5]}, "tracking": None, **keys}

    def write(self, name, keys):
        OmegaConf.save(OmegaConf.create(keys), self.folder / name)
        return str(self.folder / name)

    def worker(self, **changes):
        """One more worker, not waited for."""
        self._workers += 1
        keys = {key: value for key, value in {**self._keys, **changes}.items()}
        path = self.write(f"worker{self._workers}.yaml", keys)
        return start(run_recipe_file, "sweep_wmtp", path, log=self.folder / f"worker{self._workers}.txt")

    def run(self, code=0, **changes):
        """The table after one worker has ended with this status, and what it printed."""
        worker = self.worker(**changes)
        worker.join(code=code)
        return self.table() if code == 0 else None, worker.log.read_text()

    def table(self):
        """What must be the same each time."""
        table = json.loads((self.folder / "sweep" / "table.json").read_text().replace(str(self.folder), "HERE"))
        table.pop("seconds")
        return table

    def ledgers(self):
        """The lines of every run about its starts and ends, by its folder."""
        files = (self.folder / "sweep").rglob("ledger")
        return {str(p.parent.relative_to(self.folder / "sweep")): p.read_text().splitlines() for p in files}

    def ends(self):
        """How often each run came to its end by steps of its own: one that found all of them done is none."""
        found = {}
        for name, lines in self.ledgers().items():
            pairs = itertools.pairwise(lines)
            found[name] = sum(after.startswith("end") and f"start {after[4:]}" not in line for line, after in pairs)
        return found


def stubs():
    """The stub's processes that run."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if str(STUB) in (process.info["cmdline"] or [])[1:2]:
            found.append(process)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    sweep = Sweep(tmp_path_factory.mktemp("undisturbed"))
    table, _ = sweep.run()
    assert set(sweep.ends().values()) == {1} and len(sweep.ends()) == 6
    return table


def test_the_table_has_every_cell_with_its_seeds(undisturbed):
    assert [row["cell"] for row in undisturbed["rows"]] == ["lr-0.1", "lr-0.1", "lr-0.3", "lr-0.3", "lr-0.5", "lr-0.5"]
    assert [row["seed"] for row in undisturbed["rows"]] == [0, 1] * 3
    best = undisturbed["cells"][0]
    assert best["cell"] == "lr-0.3" and best["axes"] == {"lr": 0.3}
    assert best["mean"] == pytest.approx(0.2 + 0.005) and best["sd"] == pytest.approx(0.01 / 2**0.5)
    assert "lr=0.1 seed=0" in undisturbed["rows"][0]["command"]


def test_two_workers_with_two_runs_each_share_the_cells(tmp_path, undisturbed):
    sweep = Sweep(tmp_path)
    workers = [sweep.worker(max_parallel=2) for _ in range(2)]
    for worker in workers:
        worker.join()
    assert sweep.table() == undisturbed
    assert set(sweep.ends().values()) == {1}


@pytest.mark.long
def test_ten_kills_of_worker_and_run_lose_nothing(tmp_path, undisturbed):
    sweep, chance = Sweep(tmp_path), random.Random(0)
    (tmp_path / "slow.yaml").write_text((tmp_path / "base.yaml").read_text().replace("0.02", "0.3"))
    worker, kills = None, Counter()
    while sum(kills.values()) < 10:
        if worker is None or not worker.running():
            worker = sweep.worker(config=str(tmp_path / "slow.yaml"), max_parallel=2)
        time.sleep(chance.uniform(0.5, 2))
        running = [process for process in stubs() if str(tmp_path) in " ".join(process.cmdline())]
        what = "worker" if chance.random() < 0.5 else "run"
        target = worker.pids[0] if what == "worker" else running[0].pid if running else None
        if target is not None and worker.running():
            os.kill(target, signal.SIGKILL)
            kills[what] += 1
            if what == "worker":
                worker.members[0].join()
    assert min(kills.values()) >= 3
    table, _ = sweep.run(config=str(tmp_path / "slow.yaml"), max_parallel=2)
    for row in table["rows"]:
        row["command"] = row["command"].replace("slow.yaml", "base.yaml")
    assert table == undisturbed
    assert set(sweep.ends().values()) == {1}, sweep.ledgers()


def test_a_run_ends_with_its_worker(tmp_path):
    sweep = Sweep(tmp_path, axes={}, seeds=[0], overrides={"steps": 10_000})
    worker = sweep.worker()
    own = lambda: [process for process in stubs() if str(tmp_path) in " ".join(process.cmdline())]
    _until(lambda: own() and sweep.ledgers())
    os.kill(worker.pids[0], signal.SIGKILL)
    _until(lambda: not own())


def test_a_signal_saves_and_gives_back(tmp_path, undisturbed):
    sweep = Sweep(tmp_path)
    worker = sweep.worker(overrides={"seconds": 0.02})
    _until(lambda: len(sweep.ledgers()) >= 2)
    os.kill(worker.pids[0], signal.SIGTERM)
    worker.join(code=75)
    assert "to go on: the same command" in worker.log.read_text()
    table, _ = sweep.run(overrides={"seconds": 0.02})
    for row in table["rows"]:
        row["command"] = row["command"].replace(" seconds=0.02", "")
    assert table == undisturbed
    assert set(sweep.ends().values()) == {1}


def test_a_budget_of_cells_ends_a_worker(tmp_path):
    sweep = Sweep(tmp_path, axes={"lr": [0.1]})
    _, said = sweep.run(code=75, max_cells=1)
    assert sum(sweep.ends().values()) == 1 and "1 done of 2 cells" in said
    sweep.run()
    assert sum(sweep.ends().values()) == 2


def test_a_failed_cell_is_kept_with_its_line_and_can_be_tried_again(tmp_path):
    cells = [{"name": "bad", "overrides": {"fails": True}}, {"name": "good"}]
    sweep = Sweep(tmp_path, axes={}, cells=cells, seeds=[0])
    table, said = sweep.run()
    bad, good = table["rows"]
    assert (bad["state"], good["state"]) == ("failed", "done")
    assert bad["error"].startswith("ValueError: error: it cannot be") and "seed-0.log" in bad["error"]
    assert bad["error"] in (tmp_path / "sweep" / "table.md").read_text().replace(str(tmp_path), "HERE")
    assert "1 failed" in said and "retry_failed=true" in said
    sweep.run()
    assert Counter(line.split()[0] for line in sweep.ledgers()["cells/bad/seed-0"]) == {"start": 1}
    sweep.run(retry_failed=True)
    assert Counter(line.split()[0] for line in sweep.ledgers()["cells/bad/seed-0"]) == {"start": 2}
    assert sweep.ends()["cells/good/seed-0"] == 1


def _until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_cell_that_cannot_fit_is_refused_with_the_nearest_change_and_the_others_go_on(tmp_path):
    overrides = {"model.embed_dim": 1024, "model.intermediate_dim": 4096, "model.num_layers": 6, "batch_size": 64}
    large = {"recipe": "recipes/full_finetune_distributed_wmtp.py", "config": "configs/tiny/uniform.yaml"}
    cells = [{"name": "large", **large, "overrides": overrides}, {"name": "small"}]
    places = round(psutil.virtual_memory().total / 3e9)  # each run has some 3 GB
    table, said = Sweep(tmp_path, axes={}, cells=cells, seeds=[0], max_parallel=places).run()
    refused, ran = table["rows"]
    assert ran["state"] == "done" and refused["state"] == "failed"
    line = r"this run lacks [\d.]+ GB on each CPU, \d+ threads; what would fit: batch_size=(\d+) "
    rows, steps = map(int, re.fullmatch(f"{line}gradient_accumulation_steps=(\\d+)", refused["error"]).groups())
    assert rows * steps == 64  # as many tokens a step as before
    assert f"large/seed-0: failed: {refused['error']}" in said
    assert not (tmp_path / "sweep" / "cells" / "large").exists()


@pytest.mark.long
def test_a_search_tries_so_many_cells_and_ends_bad_ones_early(tmp_path):
    search = {
        "axes": {}, "search": {"lr": {"low": 0.0, "high": 1.0}}, "trials": 6, "seeds": [0], "overrides": {"steps": 20},
        "sampler": {"_component_": "optuna.samplers.TPESampler", "seed": 0, "n_startup_trials": 4},
        "pruner": {"_component_": "optuna.pruners.MedianPruner", "n_startup_trials": 2},
    }  # fmt: skip
    table, _ = Sweep(tmp_path / "a", **search).run()
    states = Counter(row["state"] for row in table["rows"])
    assert states["done"] + states["pruned"] == 6 and states["pruned"] >= 1
    assert [row["cell"] for row in table["rows"]] == [f"search-{number:04d}" for number in range(6)]
    interrupted = Sweep(tmp_path / "b", **search | {"trials": 4})
    worker = interrupted.worker()
    _until(lambda: sum(interrupted.ends().values()) >= 1)
    os.kill(worker.pids[0], signal.SIGKILL)
    worker.members[0].join()
    again, _ = interrupted.run()
    lrs = [[row["axes"]["lr"] for row in t["rows"]] for t in (table, again)]
    assert lrs[0][:4] == lrs[1]  # what is tried does not depend on the kill


def test_prepared_runs_come_first_and_once_and_evaluations_after_each_training(tmp_path):
    prepare = [{"name": "first", "config": str(tmp_path / "base.yaml"), "recipe": str(STUB)}]
    sweep = Sweep(tmp_path, prepare=prepare, axes={"lr": [0.1]})
    workers = [sweep.worker(), sweep.worker()]
    for worker in workers:
        worker.join()
    assert sweep.ends() == {"prepared/first": 1, "cells/lr-0.1/seed-0": 1, "cells/lr-0.1/seed-1": 1}
    begun = {name: (tmp_path / "sweep" / name / "ledger").stat().st_ctime for name in sweep.ends()}
    assert min(begun, key=begun.get) == "prepared/first"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"recipe": "recipes/none.py"}, "recipe recipes/none.py does not exist"),
        ({"axes": {"lr": 0.1}}, "axis lr must be a list of values, got 0.1"),
        ({"axes": {}, "cells": [{"name": "a"}, {"name": "a"}]}, "two cells have the name a"),
        ({"axes": {}, "cells": [{"name": "a/b"}]}, "cell 'a/b': a name consists of"),
        ({"axes": {}, "cells": [{"nam": "a"}]}, "cells: each entry has a name"),
        (
            {"baseline": "uniform"},
            "baseline, controls, other_data and factors name cells; there is no 'uniform', but lr-0.1, lr-0.3, lr-0.5",
        ),
        ({"search": {"lr": [1]}}, "search and trials go together"),
        ({"search": {"lr": {"low": 1, "high": 0}}, "trials": 2}, "search.lr: "),
        ({"equal": "target_tokens"}, "set baseline"),
        ({"storage": "postgresql://me:secret@localhost:1/x"}, "storage holds a password"),
        ({"storage": "postgresql://localhost:1/x"}, "storage postgresql://localhost:1/x cannot be used"),
        ({"storage": "nosuch://x"}, "storage nosuch://x cannot be used"),
        ({"max_paralel": 2}, "unknown key 'max_paralel' in config; did you mean 'max_parallel'?"),
    ],
)
def test_bad_input_is_one_line(tmp_path, changes, named):
    _, said = Sweep(tmp_path).run(code=1, **changes)
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert named in line and "secret" not in said


def test_an_unknown_key_of_a_recipe_or_component_is_found_before_anything_runs(tmp_path):
    real = {"recipe": "recipes/full_finetune_distributed_wmtp.py", "config": "configs/tiny/rho1.yaml", "seeds": [0]}
    for key, line in [("weighting.strenght", "did you mean 'strength'?"), ("max_stepz", "did you mean 'max_steps'?")]:
        sweep = Sweep(tmp_path / key, **real, axes={key: [1]})
        _, said = sweep.run(code=1)
        assert line in said and "error: cell " in said
        assert not (tmp_path / key / "sweep").exists()


def test_an_objective_that_is_never_logged_fails_the_cell(tmp_path):
    table, _ = Sweep(tmp_path, axes={}, seeds=[0], objective="eval/none").run()
    assert table["rows"][0]["error"] == "objective eval/none was never logged; there are eval/ce_head1"


def test_workers_on_postgresql_share_the_cells_and_one_that_dies_loses_none(tmp_path, postgres, undisturbed):
    url, _ = postgres
    sweep = Sweep(tmp_path, storage=url)
    workers = [sweep.worker() for _ in range(2)]
    _until(lambda: sum(sweep.ends().values()) >= 1)
    os.kill(workers[0].pids[0], signal.SIGKILL)
    workers[1].join()
    assert sweep.table() == undisturbed
    assert set(sweep.ends().values()) == {1}, sweep.ledgers()


def test_a_worker_that_was_suspended_and_taken_for_dead_does_not_run_its_cell_again(tmp_path):
    sweep = Sweep(tmp_path, axes={}, seeds=[0], overrides={"steps": 60, "seconds": 0.1})
    suspended = sweep.worker()
    _until(lambda: len(sweep.ledgers()) == 1)
    _suspend(suspended, tmp_path / "sweep" / "study.db")  # its run goes on
    table, _ = sweep.run()
    os.kill(suspended.pids[0], signal.SIGCONT)
    suspended.join()
    assert [row["state"] for row in table["rows"]] == ["done"] and sweep.table() == table
    assert set(sweep.ends().values()) == {1}, sweep.ledgers()


def _suspend(worker, database):
    """Stop a worker's process at a moment at which it has no lock on SQLite: that would stop all others too."""
    while True:
        os.kill(worker.pids[0], signal.SIGSTOP)
        time.sleep(0.05)
        with closing(sqlite3.connect(database, timeout=0)) as connection:
            try:
                connection.execute("begin exclusive")
                return
            except sqlite3.OperationalError:
                os.kill(worker.pids[0], signal.SIGCONT)
        time.sleep(0.05)


@pytest.mark.long
def test_real_recipes_are_one_family_of_mlflow_runs(tmp_path):
    store = new_store(tmp_path)
    tracking = {"_component_": "wmtp.tracking.MLflowLogger", "experiment": "wmtp/sweep", "tracking_uri": store}
    heads = {"recipe": "recipes/eval_heads.py", "config": "configs/tiny/eval_heads.yaml"}
    cell = {"max_steps": 2, "eval_every": None, "model.num_future_tokens": 3}
    table, _ = Sweep(
        tmp_path, recipe="recipes/full_finetune_distributed_wmtp.py", config="configs/tiny/uniform.yaml", seeds=[5],
        axes={"extra_heads_lr": [0.001]}, overrides=cell, objective="heads/heads/ce_head3",
        evaluations={"heads": {**heads, "overrides": {"speed_prompts": 0}}},
        tracking={**tracking, "artifact_location": str(tmp_path / "artifacts")},
    ).run()  # fmt: skip
    (row,) = table["rows"]
    assert row["state"] == "done" and row["value"] == row["figures"]["seed-5/heads"]["heads/ce_head3"]
    client = mlflow_client(store)
    runs = client.search_runs([client.get_experiment_by_name("wmtp/sweep").experiment_id])
    by_name = {run.info.run_name: run for run in runs}
    parent, training = by_name["stub"], by_name["extra_heads_lr-0.001-seed5"]
    evaluation = by_name["extra_heads_lr-0.001-seed5-heads"]
    assert training.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert evaluation.data.tags["mlflow.parentRunId"] == training.info.run_id
    assert training.data.tags["wmtp.axes"] == '{"extra_heads_lr": 0.001}' and training.data.tags["wmtp.seed"] == "5"
    assert parent.data.tags["wmtp.sweep"] == "stub" and parent.info.status == "FINISHED"
    assert {item.path for item in client.list_artifacts(parent.info.run_id)} == {"sweep.yaml", "table.json"}
