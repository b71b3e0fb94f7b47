"""Runs that are stopped, killed, finished or started twice: nothing is lost, and nothing is replaced unasked."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from omegaconf import OmegaConf
from processes import run_recipe_file, start, start_launched
from services import new_store

from runs import read_metrics, series
from wmtp.config import ConfigError
from wmtp.errors import Stopped, clear_errors
from wmtp.training.checkpoint import complete_checkpoints, latest_checkpoint
from wmtp.training.stopping import StopFlag, stopping

RECIPE = "full_finetune_distributed_wmtp"
QUICK = {"eval_dataset": None, "save_every": None, "export_dtype": "none"}


def figures(output_dir):
    return series(read_metrics(output_dir))


def wait_for_lines(metrics, number, alive):
    while not metrics.exists() or metrics.read_text().count("\n") < number:
        assert alive(), "ended too early"
        time.sleep(0.005)


def gone(pid):
    """Whether a process has ended; one that only its parent has not asked about has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):  # before it is opened, and before it is read
        return True


@pytest.mark.long
def test_stopped_killed_with_its_launcher_and_finished_it_equals_a_run_left_alone(tiny_config, tmp_path):
    """Two processes: SIGTERM to one of them, then kill -9 of their launcher, then the rest."""
    uri = new_store(tmp_path)
    log = tmp_path / "log.txt"
    tracking = {"_component_": "wmtp.tracking.MLflowLogger", "experiment": "e", "tracking_uri": uri}
    options = {**QUICK, "max_steps": 30, "resume": "auto", "output_dir": str(tmp_path / "run")}
    cfg = tiny_config(**options, tracking=tracking)
    OmegaConf.save(cfg, tmp_path / "run.yaml")
    OmegaConf.save(tiny_config(**options | {"output_dir": str(tmp_path / "alone")}), tmp_path / "alone.yaml")
    metrics = tmp_path / "run" / "metrics.jsonl"
    job = (run_recipe_file, RECIPE, str(tmp_path / "run.yaml"))

    processes = start(*job, size=2, log=log)
    wait_for_lines(metrics, 3, processes.running)
    os.kill(processes.pids[1], signal.SIGTERM)
    processes.join(code=Stopped.exit_status)
    (stopped,) = complete_checkpoints(tmp_path / "run" / "checkpoints")
    step = int(stopped.name.removeprefix("step_"))
    assert read_metrics(tmp_path / "run")[-1]["step"] == step
    told = log.read_text().splitlines()[-1]
    assert told == f"stopped by SIGTERM after step {step} of 30, and saved; to go on: the same command with resume=true"
    client = MlflowClient(uri)
    assert [run.info.status for run in client.search_runs(["1"])] == ["KILLED"]

    launcher, pids = start_launched(*job, size=2, log=log)
    wait_for_lines(metrics, step + 3, launcher.running)
    os.kill(launcher.pids[0], signal.SIGKILL)
    launcher.members[0].join()
    while not all(map(gone, pids)):  # or this test never ends: they would train on for ever, and into the next run
        assert metrics.read_text().count("\n") < 30
        time.sleep(0.01)

    start(*job, size=2, log=log).join()
    start(run_recipe_file, RECIPE, str(tmp_path / "alone.yaml"), size=2, log=log).join()
    assert figures(tmp_path / "run") == figures(tmp_path / "alone")
    (run,) = client.search_runs(["1"])
    assert run.info.status == "FINISHED"


def test_a_finished_run_is_found_finished_whatever_save_every_was(tiny_config, run_recipe):
    cfg = tiny_config(save_every=None, max_steps=2, eval_every=None)
    run_recipe(cfg)
    folder = Path(cfg.output_dir)
    assert [path.name for path in complete_checkpoints(folder / "checkpoints")] == ["step_00000002"]
    written = latest_checkpoint(folder).stat().st_mtime_ns
    before = read_metrics(folder)
    cfg.resume = "auto"
    assert run_recipe(cfg) == before
    assert latest_checkpoint(folder).stat().st_mtime_ns == written  # nor is the same state saved again
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(ConfigError, match="already holds a run without a checkpoint to go on from; set overwrite=true"):
        run_recipe(cfg)
    assert read_metrics(folder) == before
    assert (folder / "export").is_dir()
    cfg.overwrite = True
    run_recipe(cfg)
    assert [path.name for path in complete_checkpoints(folder / "checkpoints")] == ["step_00000002"]
    assert figures(folder) == series(before)


@pytest.mark.parametrize("resume", [False, "auto"])
def test_a_folder_in_which_no_step_was_taken_may_be_tried_again(tiny_config, run_recipe, resume):
    cfg = tiny_config(max_steps=1, eval_every=None, resume=resume)
    folder = Path(cfg.output_dir)
    (folder / "checkpoints" / "step_00000001.tmp").mkdir(parents=True)
    (folder / "checkpoints" / "step_00000001.tmp" / "__0_0.distcp").write_bytes(b"torn")
    (folder / "config.yaml").write_text("a: 1\n")
    (folder / "metrics.jsonl").write_text('{"step": 0, "eval/ce_head1": 5.5}\n{"step": 1, "tor')
    assert [line["step"] for line in run_recipe(cfg)] == [0, 1, 1]
    if not resume:
        with pytest.raises(ConfigError, match="already holds a run; set resume=true to go on with it, overwrite=true"):
            run_recipe(cfg)


def test_max_minutes_stops_after_a_step_and_says_so(tiny_config):
    from recipes.full_finetune_distributed_wmtp import FullFinetuneRecipeWMTP

    recipe = FullFinetuneRecipeWMTP(tiny_config(max_minutes=1e-6, max_steps=9, **QUICK))
    recipe.setup()
    with pytest.raises(
        Stopped, match=r"^stopped by max_minutes=1e-06 after step 1 of 9, and saved; to go on: .*resume=t"
    ) as e:
        recipe.train()
    assert e.value.exit_status == 75
    assert latest_checkpoint(Path(recipe._output_dir)).name == "step_00000001"


def stop_in_order(kind, ready):
    """A loop that asks after each step, a set-up that does not ask, or a step without an end, deaf to the first."""
    with clear_errors(), stopping():
        flag = StopFlag()
        if kind != "set-up":
            assert not flag.wanted()
        Path(ready).touch()
        while kind != "loop" or not flag.wanted():
            time.sleep(0.01)
        print("one more step", flush=True)
        raise Stopped("after the step")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_set_up_at_once_a_loop_after_its_step_and_twice_anything(tmp_path, number):
    running = {}
    for kind in ("set-up", "loop", "deaf"):
        log = tmp_path / f"{kind}.txt"
        running[kind] = (start(stop_in_order, kind, str(tmp_path / kind), log=log), log)
    for kind, (process, log) in running.items():
        while not (tmp_path / kind).exists():
            assert process.running(), log.read_text()
            time.sleep(0.01)
        os.kill(process.pids[0], number)
    for kind, line in (
        ("set-up", f"stopped by {number.name}; to go on from what is saved"),
        ("loop", "after the step"),
    ):
        process, log = running[kind]
        process.join(code=75)
        assert log.read_text().splitlines()[-1].startswith(line)
        assert ("one more step" in log.read_text()) == (kind == "loop")
    process, log = running["deaf"]
    while "a second signal ends it at once" not in log.read_text():
        assert process.running(), log.read_text()
        time.sleep(0.01)
    while process.running():  # the first one told twice within a second is one signal
        os.kill(process.pids[0], number)
        time.sleep(0.2)
    process.join(code=-number)


def run_and_stop_in_its_first_evaluation(recipe, config):
    (kind,) = (v for v in vars(sys.modules[f"recipes.{recipe}"]).values() if getattr(v, "evaluate", None))
    evaluate = kind.evaluate

    def signalled(self, *data):
        if self._step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, *data)

    kind.evaluate = signalled
    run_recipe_file(recipe, config)


@pytest.mark.slow
def test_a_signal_in_an_evaluation_is_heeded_after_it_not_after_one_more_step(tiny_config, models, tmp_path):
    running = []
    for recipe, job in ((RECIPE, "uniform"), ("lora_wmtp", "lora_rho1"), ("critic_stage1", "critic_stage1")):
        cfg = tiny_config(job, max_steps=9, eval_every=1, save_every=None)
        for key in ("checkpoint", "reference_checkpoint"):
            if cfg.get(key) is not None:
                cfg[key] = str(models / "reference")
        OmegaConf.save(cfg, tmp_path / f"{job}.yaml")
        log = tmp_path / f"{job}.txt"
        args = (recipe, str(tmp_path / f"{job}.yaml"))
        running.append((start(run_and_stop_in_its_first_evaluation, *args, log=log), cfg.output_dir))
    for process, output_dir in running:
        process.join(code=75)
        last = process.log.read_text().splitlines()[-1]
        assert last.startswith("stopped by SIGTERM after step 1 of 9, and saved"), last
        lines = read_metrics(output_dir)
        assert lines[-1]["step"] == 1 and any(key.startswith("eval/") for key in lines[-1])


@pytest.mark.long
@pytest.mark.slow
def test_scoring_finishes_its_part_and_goes_on_byte_for_byte(tiny_config, models, tmp_path):
    def job(name, **more):
        cfg = tiny_config(
            "score_reference", checkpoint=str(models / "reference"), output_dir=str(tmp_path / name), **more
        )
        cfg.documents_per_part, cfg.batch_size, cfg.dataset.max_functions = 1, 1, 256
        OmegaConf.save(cfg, tmp_path / f"{name}.yaml")
        return run_recipe_file, "score_reference", str(tmp_path / f"{name}.yaml")

    start(*job("alone"), log=tmp_path / "alone.txt").join()
    log = tmp_path / "log.txt"
    process = start(*job("run", resume="auto"), size=2, log=log)
    while not (tmp_path / "run" / "data" / "part-00001.parquet").exists():  # the one that is told has begun, too
        assert process.running(), log.read_text()
        time.sleep(0.005)
    os.kill(process.pids[1], signal.SIGTERM)
    process.join(code=Stopped.exit_status)
    assert "stopped by SIGTERM with " in log.read_text().splitlines()[-1]
    assert not (tmp_path / "run" / "manifest.json").exists()
    start(*job("run", resume="auto"), size=2, log=log).join()
    parts = [
        sorted((path.name, path.read_bytes()) for path in (tmp_path / n / "data").iterdir()) for n in ("run", "alone")
    ]
    assert parts[0] == parts[1]
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("run", "alone")]
    assert manifests[0] == manifests[1]
