"""The short form of benchmarks/torture.py: runs that are killed go on to what an uninterrupted one gives."""

import random
import time
from dataclasses import replace

import psutil
import pytest
from omegaconf import OmegaConf
from processes import ROOT, run_recipe_file, start
from random_models import random_decoder

from benchmarks.torture import JOBS, Run, Started, Torture, different
from wmtp.data import byte_tokenizer
from wmtp.files import write_manifest
from wmtp.models import export_hf


class Forked(Started):
    """The processes of a run without their start-up, and without a launcher: when one dies, we end the others."""

    def __init__(self, run: Run) -> None:
        self.run, self._before = run, run.progress()
        file = (run.job.recipe, str(run.config))
        self._processes = start(run_recipe_file, *file, size=run.processes, log=run.log)  # with the store they meet at
        self._members = self._processes.members

    def launcher(self):
        return []

    def ranks(self):
        return [psutil.Process(member.pid) for member in self._members if member.is_alive()]

    def running(self):
        return all(member.is_alive() for member in self._members)

    def wait(self):
        while any(member.is_alive() for member in self._members):
            if any(member.exitcode for member in self._members):
                for member in self._members:
                    member.kill()
            time.sleep(0.02)
        return next((member.exitcode for member in self._members if member.exitcode), 0)


@pytest.fixture
def reference(tmp_path):
    sizes = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "tiny" / "score_reference.yaml").model)
    sizes.pop("_component_")
    export_hf(random_decoder(**sizes), tmp_path / "reference", tokenizer_source=byte_tokenizer())
    return tmp_path / "reference"


@pytest.mark.slow
def test_killed_runs_end_as_uninterrupted_ones(tmp_path, reference, monkeypatch):
    short = {**JOBS["full"].changes, "max_steps": 12, "eval_every": 6, "save_every": 2}
    monkeypatch.setitem(JOBS, "full", replace(JOBS["full"], changes=short))
    torture = Torture(tmp_path / "runs", reference, random.Random(0), start=Forked)
    torture.run("full", 2, False, ["in a save", "one rank"])
    torture.run("scoring", 1, False, ["all ranks"])
    assert (torture.tried, torture.survived, torture.equal) == (3, 3, 3)


def test_what_differs_and_what_is_torn_is_found(tmp_path):
    run = Run(JOBS["full"], 1, tmp_path / "run", tmp_path)
    checkpoint = run.output / "checkpoints" / "step_00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer.pt").write_bytes(b"all of it")
    write_manifest(checkpoint)
    (run.output / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.5, "train/tokens_per_second": 7.0}\n')
    calm = run.result()
    assert calm["metrics"] == [{"step": 1, "train/loss": 2.5}] and run.torn() == []

    (run.output / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.5000001}\n')
    assert different(run.result(), calm) == ["metrics is not the uninterrupted run's"]
    (checkpoint / "trainer.pt").write_bytes(b"half")
    assert len(run.torn()) == 1
    (run.output / "checkpoints" / "step_00000006.tmp").mkdir()
    assert len(run.torn()) == 2
