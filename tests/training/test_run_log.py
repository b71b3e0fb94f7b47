"""What a run writes down about itself: what stays when it goes on, what goes when it is replaced."""

import json
import os

import pytest
from omegaconf import OmegaConf

from wmtp.distributed import start_world
from wmtp.storage import Output
from wmtp.training.checkpoint import latest_checkpoint
from wmtp.training.run_log import RunLog


@pytest.fixture
def begin(tmp_path):
    """Begin a run in tmp_path/run, or go on with it."""
    start_world("cpu")

    def begin(**options):
        log = RunLog(Output(str(tmp_path / "run")), None, is_main=True)
        named = {"recipe": "none", "method": "m", "dataset": "d", "data_sha256": None, "replaces": ("checkpoints",)}
        log.start(OmegaConf.create({"a": 1}), **named, **options)
        return log

    return begin


def test_a_run_that_goes_on_replaces_its_figures_at_one_stroke(begin, tmp_path):
    log = begin()
    for step in (1, 2, 3):
        log.metrics({"loss": 1.0 / step}, step)
    file, before = tmp_path / "run" / "metrics.jsonl", tmp_path / "before"
    os.link(file, before)  # the file as it was: a kill before the stroke leaves this one, whole
    log = begin(resumed=True, step=2)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2]
    log.metrics({"loss": 1.0 / 2}, 2)  # said again as the run goes on
    log.metrics({"loss": 7.0}, 3)
    lines, first = (path.read_text().splitlines() for path in (file, before))
    assert json.loads(lines[2]) == {**json.loads(first[2]), "loss": 7.0}  # with its time: to MLflow the same step
    assert len(lines) == 3
    assert [json.loads(line)["step"] for line in before.read_text().splitlines()] == [1, 2, 3]
    assert sorted(path.name for path in file.parent.iterdir()) == ["config.yaml", "metrics.jsonl", "tags.json"]


def test_no_checkpoint_of_a_run_that_is_replaced_stays_to_be_gone_on_from(begin, tmp_path):
    begin()
    kept = tmp_path / "large disk" / "step_00000001"
    kept.mkdir(parents=True)
    (kept / "manifest.json").touch()
    (tmp_path / "run" / "checkpoints").symlink_to(kept.parent)  # which rmtree refuses
    assert latest_checkpoint(tmp_path / "run").name == kept.name
    begin()
    assert latest_checkpoint(tmp_path / "run") is None and kept.exists()
