"""What a sweep must not be led astray by: changed files, odd values, signals and storage at the wrong moment."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from services import new_store
from test_sweep import STUB, Sweep, _until

from wmtp.sweep import Cell
from wmtp.sweep.attempt import Attempt, Stage
from wmtp.sweep.cells import SweepError, grid, unlike, yaml_text
from wmtp.sweep.runs import Runs
from wmtp.sweep.study import CELL, STAGES, WORKER, Study, open_storage
from wmtp.sweep.table import LiveTable, progress
from wmtp.training.flops import flops_per_step

pytestmark = pytest.mark.slow

SEARCH = {"axes": {}, "search": {"lr": {"low": 0.0, "high": 1.0}}, "seeds": [0]}


def stub(folder, name, *changes):
    """The stub with some of its text replaced."""
    text = STUB.read_text().replace("parents[2]", "parents[0]")
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    (folder / name).write_text(text)
    return str(folder / name)


def study(tmp_path, cells=("a",), **keys):
    return Study(open_storage(f"sqlite:///{tmp_path}/study.db", 30), "s", list(cells), **keys)


# ----------------------------------------------------------------------------------------------------------------------
# What a study is


def test_another_base_config_or_evaluation_or_number_of_threads_is_another_study(tmp_path):
    recipe = stub(tmp_path, "evaluate.py")
    sweep = Sweep(tmp_path, evaluations={"e": {"recipe": recipe, "config": str(tmp_path / "e.yaml")}}, seeds=[0])
    base = (tmp_path / "base.yaml").read_text()
    (tmp_path / "e.yaml").write_text(base.replace("resume: false", "overwrite: true\ncheckpoint: x"))
    sweep.run(code=75, max_cells=1)
    (tmp_path / "base.yaml").write_text(base.replace("steps: 5", "steps: 7"))
    _, said = sweep.run(code=1)
    assert "base.yaml.steps 5 -> 7; give another study" in said
    (tmp_path / "base.yaml").write_text(base)
    _, said = sweep.run(code=1, threads=2)
    assert "was begun with another threads 1 -> 2" in said.replace("null", "1")
    _, said = sweep.run(code=1, axes={"lr": [0.1, 0.2]})
    assert "was begun with another axes.lr [0.1, 0.3, 0.5] -> [0.1, 0.2]" in said
    Path(recipe).write_text(Path(recipe).read_text() + "# another\n")
    _, said = sweep.run(code=1)
    assert "was begun with another code " in said


def test_cells_that_are_taken_out_are_neither_run_nor_in_the_table(tmp_path):
    sweep = Sweep(tmp_path, seeds=[0])
    sweep.run(code=75, max_cells=1)
    table, _ = sweep.run(axes={"lr": [0.5]}, accept_changes=True)
    assert {row["cell"] for row in table["rows"]} == {"lr-0.5"}
    assert set(sweep.ledgers()) == {"cells/lr-0.1/seed-0", "cells/lr-0.5/seed-0"}


def test_a_study_that_its_maker_left_without_a_plan_is_begun_at_once(tmp_path):
    study(tmp_path).study.set_user_attr(WORKER, {"host": "", "pid": 0})
    store = tmp_path / "no" / "such"
    store.parent.write_text("")
    tracking = {"_component_": "wmtp.tracking.MLflowLogger", "experiment": "x", "tracking_uri": f"sqlite:///{store}"}
    sweep = Sweep(tmp_path, axes={}, seeds=[0])
    _, said = sweep.run(code=1, tracking=tracking)
    assert "MLflow store" in said and "tracking=null runs the sweep without it" in said
    began = time.monotonic()
    sweep.run()
    assert time.monotonic() - began < 30


def test_tracking_that_comes_later_begins_the_parent_run(tmp_path):
    tracking = {"_component_": "wmtp.tracking.MLflowLogger", "experiment": "wmtp/sweep"}
    tracking |= {"tracking_uri": new_store(tmp_path), "artifact_location": str(tmp_path / "a")}
    sweep = Sweep(tmp_path, axes={"lr": [0.1]})
    sweep.run(code=75, max_cells=1)
    _, said = sweep.run(tracking=tracking)
    assert "WARNING" not in said


# ----------------------------------------------------------------------------------------------------------------------
# Trials


def test_what_a_cell_has_got_is_not_lost_to_a_trial_that_came_second(tmp_path):
    one = study(tmp_path, [], search=1)
    first = one.take()
    params = {"lr": first.suggest_float("lr", 0.0, 1.0)}
    one.keep(first._trial_id, STAGES, {"seed-0": {"step": 5}})
    one.study.enqueue_trial({}, user_attrs={CELL: "search-0000"})  # by a worker that looked before the first was there
    assert one.take() is None
    one.give_back(first._trial_id)
    again = one.take()
    assert again.user_attrs[STAGES] == {"seed-0": {"step": 5}}
    assert {"lr": again.suggest_float("lr", 0.0, 1.0)} == params


def test_a_retry_of_a_searched_cell_has_its_values(tmp_path):
    recipe = stub(tmp_path, "some.py", ('if cfg["fails"]', 'if cfg["lr"] > cfg["most"]'))
    sampler = {"_component_": "optuna.samplers.TPESampler", "seed": 0, "n_startup_trials": 1}
    sweep = Sweep(tmp_path, **SEARCH, trials=4, sampler=sampler, recipe=recipe)
    base = tmp_path / "base.yaml"
    base.write_text(base.read_text() + "most: 0.5\n")
    before, _ = sweep.run()
    failed = [row for row in before["rows"] if row["state"] == "failed"]
    assert failed
    after, _ = sweep.run(overrides={"most": 1.0}, accept_changes=True, retry_failed=True)
    assert [row["axes"] for row in after["rows"]] == [row["axes"] for row in before["rows"]]
    assert {row["state"] for row in after["rows"]} == {"done"}


def test_a_trial_that_would_be_pruned_and_is_another_workers_by_now_is_no_crash(tmp_path):
    one = study(tmp_path, pruner=optuna.pruners.MedianPruner())
    trial = one.take()
    argv = ["sh", "-c", f'echo \'{{"step": 1, "x": 0.5}}\' > {tmp_path}/metrics.jsonl; sleep 60']
    stage = Stage("seed-0", argv, tmp_path, tmp_path / "log", dict, "x")
    attempt = Attempt(one, trial, [stage], lambda done: 0.0, {}, prunes=True)
    assert attempt.poll() is None
    one.give_back(trial._trial_id)  # by a worker that took this one for dead
    _until(lambda: (tmp_path / "metrics.jsonl").exists())
    time.sleep(0.2)
    assert attempt.poll() is None
    assert one.keep_alive([attempt.number]) == {attempt.number}
    attempt.give_up()
    assert attempt.ended


# ----------------------------------------------------------------------------------------------------------------------
# Budgets, signals, storage


def test_a_budget_that_is_enough_ends_well_and_is_of_cells_alone(tmp_path):
    prepare = [{"name": "first", "config": str(tmp_path / "base.yaml"), "recipe": str(STUB)}]
    sweep = Sweep(tmp_path, prepare=prepare, axes={"lr": [0.1]})
    sweep.run(code=75, max_cells=1)
    assert sweep.ends() == {"prepared/first": 1, "cells/lr-0.1/seed-0": 1}
    sweep.run(max_cells=1)
    assert sweep.ends()["cells/lr-0.1/seed-1"] == 1


def test_a_signal_while_the_storage_is_down_ends_all_runs_with_one_line(tmp_path, postgres):
    url, stop = postgres
    sweep = Sweep(tmp_path, storage=url, overrides={"seconds": 0.2, "steps": 300})
    worker = sweep.worker(max_parallel=2)
    _until(lambda: len(sweep.ledgers()) == 2)
    stop()
    _until(lambda: "does not answer" in worker.log.read_text())
    os.kill(worker.pids[0], signal.SIGTERM)
    worker.join(code=75, timeout=60)
    said = worker.log.read_text()
    assert "Traceback" not in said and said.count("does not answer") == 2
    assert "to go on: the same command when it does" in said
    running = subprocess.run(["pgrep", "-f", f"{STUB}.*{tmp_path}"], capture_output=True, text=True, check=False)
    assert not running.stdout


def test_a_run_that_is_always_killed_says_so(tmp_path):
    kills = 'print("step 3", flush=True); os.kill(os.getpid(), 9)\n    if cfg'
    table, _ = Sweep(tmp_path, recipe=stub(tmp_path, "kill.py", ("if cfg", kills)), axes={}, seeds=[0]).run()
    assert table["rows"][0]["error"].startswith("ended by SIGKILL; the last line was: step 3")


def test_figures_that_are_no_numbers_are_null_in_the_table(tmp_path):
    recipe = stub(tmp_path, "nan.py", ('"step": step + 1,', '"step": step + 1, "eval/x": float("nan"),'))
    Sweep(tmp_path, recipe=recipe, axes={}, seeds=[0]).run()
    text = (tmp_path / "sweep" / "table.json").read_text()
    (row,) = json.loads(text, parse_constant=lambda name: pytest.fail(name))["rows"]
    assert row["figures"]["seed-0"]["eval/x"] is None


def test_a_narrow_terminal_shows_figures_whole(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "44")
    with LiveTable() as screen:
        cell = {"cell": "rho1_strength-0.1_temperature-0.5", "state": "running", "mean": 1.23456, "sd": 0.1}
        screen.show("1 running", [{**cell, "seeds": 3}])
    said = capsys.readouterr().err
    assert all(text in said for text in ("running", "1.2346", "0.1000", "seeds"))


def test_the_time_left_is_the_plans_until_a_cell_has_ended(tmp_path):
    three = study(tmp_path, ("a", "b", "c"))
    assert progress(three) == "0 done of 3 cells"
    assert progress(three, [3600.0, 7200.0]) == "0 done of 3 cells; about 4.5 h left"
    three.finish(three.take()._trial_id, TrialState.COMPLETE, 1.0, **{STAGES: {"seed-0": {"seconds": 120}}})
    assert progress(three, [3600.0]) == "1 done of 3 cells; best 1.0000; about 4 min left"


# ----------------------------------------------------------------------------------------------------------------------
# Values


def test_values_that_look_alike_in_short_have_names_of_their_own():
    base = Cell("", "r", "c")
    long = "/a/long/path/to/a/folder/that/goes/on/to/"
    for options in (
        [-0.1, 0.1], [f"{long}one", f"{long}two"], ["a b", "a, b"], [[1, -2], [1, 2]],
        [{"_component_": "a.b", "t": 1}, {"_component_": "a.b", "t": 2}],
    ):  # fmt: skip
        cells = unlike(grid(base, {"x": options}))
        assert [cell.axes["x"] for cell in cells] == options
    assert [cell.name for cell in grid(base, {"x": [-0.1, 0.1, "u"]})] == ["x--0.1", "x-0.1", "x-u"]
    with pytest.raises(SweepError, match=r"two cells have the name x-0\.1"):
        unlike(grid(base, {"x": [0.1, 0.10]}))


def test_operations_are_counted_where_a_config_leaves_the_accumulation_out():
    cell = Cell("a", "r", "configs/tiny/uniform.yaml")
    one = Cell("a", "r", "configs/tiny/uniform.yaml", {"gradient_accumulation_steps": 1})
    assert flops_per_step(cell.settings()) == flops_per_step(one.settings())


def test_a_text_outside_of_unicodes_first_plane_reaches_the_run():
    assert yaml_text("a 😀") == '"a 😀"'


def test_a_cells_own_tracking_keys_outlive_the_sweeps_section():
    tracking = {"_component_": "wmtp.tracking.MLflowLogger", "experiment": "e"}
    config = "configs/tiny/uniform.yaml"
    runs = Runs("/tmp/x", processes=1, evaluations={}, tracking=tracking, objective="x")
    cell = Cell("a", "recipes/full_finetune_distributed_wmtp.py", config, {"tracking.log_export": False})
    assert runs.training(cell, 0).settings().tracking.log_export is False
    assert runs.training(cell, 0).settings().tracking.experiment == "e"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"axes": {"seed": [1, 2]}}, "cell seed-1: seed is set by the sweep itself; give seeds instead"),
        ({"axes": {"output_dir": ["/tmp/a"]}}, "output_dir is set by the sweep itself"),
        ({"axes": [1]}, "axes must be a section of keys and values, got [1]"),
        ({"cells": 5}, "cells must be a list, got 5"),
        ({"cells": [{"name": "a", "axes": [1]}]}, "must be keys with their values, got [1]"),
        ({"cells": [{"name": "a", "overrides": [1]}]}, "must be keys with their values, got [1]"),
        ({"cells": [{"name": "a", "recipe": 3}]}, "cells: each entry has a name"),
        ({"evaluations": {"x": None}}, "evaluations.x must be a section with recipe and config, got None"),
        ({"evaluations": {"a/b": {}}}, "cell 'a/b': a name consists of"),
        ({"prepare": 3}, "prepare must be a list, got 3"),
        ({"controls": {"lr-0.1": "lr-0.3"}}, "controls.lr-0.1 must be a list of cells, got 'lr-0.3'"),
        ({"other_data": ["clean"]}, "baseline, controls, other_data and factors name cells; there is no 'clean'"),
        ({"factors": {"a": ["x", "y"], "b": [1, 2]}}, "factors name cells; there is no 'x_1'"),
        ({"factors": {"a": ["x"]}}, "factors must name two levels or more of each factor, got {'a': ['x']}"),
        (
            {
                **SEARCH,
                "trials": 2,
                "pruner": {"_component_": "optuna.pruners.MedianPruner"},
                "objective": "e/x",
                "evaluations": {"e": {"recipe": "recipes/eval_heads.py", "config": "configs/tiny/eval_heads.yaml"}},
            },
            "pruner ends a cell while it trains, and objective e/x is of an evaluation after; set",
        ),
        ({"devices": "0,1"}, "devices must be a list, got '0,1'"),
        ({"seeds": [0, 0]}, "seeds must be different whole numbers"),
        ({**SEARCH, "trials": 2, "equal": "flops"}, "equal=flops is for cells that are known before"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(tmp_path, changes, named):
    _, said = Sweep(tmp_path).run(code=1, **changes)
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert named in line
    assert not (tmp_path / "sweep").exists()
