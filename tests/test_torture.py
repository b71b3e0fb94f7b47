"""The short form of benchmarks/torture.py: runs that are killed go on to what an uninterrupted one gives."""

import random
from dataclasses import replace

import pytest
from omegaconf import OmegaConf
from processes import ROOT
from random_models import random_decoder

from benchmarks.torture import JOBS, Kill, Run, Torture, different
from wmtp.config import load
from wmtp.files import write_manifest
from wmtp.models import export_hf
from wmtp.pretrained import byte_tokenizer


@pytest.fixture
def reference(tmp_path):
    sizes = OmegaConf.to_container(load(ROOT / "configs" / "tiny" / "score_reference.yaml").model)
    sizes.pop("_component_")
    export_hf(random_decoder(**sizes), tmp_path / "reference", tokenizer_source=byte_tokenizer())
    return tmp_path / "reference"


@pytest.mark.long
def test_killed_runs_end_as_uninterrupted_ones(tmp_path, reference, monkeypatch):
    short = {**JOBS["full"].changes, "max_steps": 12, "eval_every": 6, "save_every": 2}
    monkeypatch.setitem(JOBS, "full", replace(JOBS["full"], changes=short))
    torture = Torture(tmp_path / "runs", reference, random.Random(0))
    torture.run("full", 2, "local", "forked", [Kill("in a save", 0.3), Kill("one rank", 0.4)])
    assert (torture.tried, torture.survived, torture.equal) == (2, 2, 2)


def test_what_differs_and_what_is_torn_is_found(tmp_path):
    run = Run(JOBS["full"], 1, tmp_path / "run", tmp_path)
    checkpoint = run.output / "checkpoints" / "step_00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer.pt").write_bytes(b"all of it")
    write_manifest(checkpoint)
    (run.output / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.5, "train/tokens_per_second": 7.0}\n')
    calm = run.result()
    assert calm["metrics"] == [{"step": 1, "train/loss": 2.5}] and run.torn() == run.left_over() == []

    (run.output / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.5000001}\n')
    assert different(run.result(), calm) == ["metrics is not the uninterrupted run's"]
    (checkpoint / "trainer.pt").write_bytes(b"half")
    assert len(run.torn()) == 1
    (run.output / "checkpoints" / "step_00000006.tmp").mkdir()
    assert len(run.torn()) == len(run.left_over()) == 1
