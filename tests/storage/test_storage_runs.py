"""Recipes whose inputs and outputs are in S3: through faults, on an empty machine, without a secret anywhere."""

import contextlib
import itertools
import json
import sqlite3
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from processes import run_recipe_file, start
from random_models import random_decoder

from wmtp.config import load
from wmtp.models import export_hf
from wmtp.pretrained import byte_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TRAIN = "full_finetune_distributed_wmtp"
ROWS = [{"prompt": f"def f{i}(x):\n", "completion": f"    return x + {i}\n"} for i in range(48)]
KEYS = {"AWS_ACCESS_KEY_ID": "AKIAPLANTED0000KEY", "AWS_SECRET_ACCESS_KEY": "pLaNtEd/secret+one",
        "AWS_SESSION_TOKEN": "pLaNtEd-token-two", "MLFLOW_TRACKING_PASSWORD": "pLaNtEd-password-three"}  # fmt: skip


@pytest.fixture
def job(bucket, tmp_path, monkeypatch):
    """The shipped tiny configs with a dataset and models in the bucket, writing below its `runs/`."""
    sizes = OmegaConf.to_container(load(ROOT / "configs" / "tiny" / "score_reference.yaml").model)
    sizes.pop("_component_")
    export_hf(random_decoder(**sizes), tmp_path / "reference", tokenizer_source=byte_tokenizer())
    for file in (tmp_path / "reference").iterdir():
        bucket.put(f"reference/{file.name}", file.read_bytes())
    bucket.put("rows.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS).encode())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    rows = {"_component_": "wmtp.data.prompt_completion", "source": f"{bucket.uri}/rows.jsonl"}

    def config(name, **overrides):
        cfg = load(ROOT / "configs" / "tiny" / f"{name}.yaml")
        cfg.output_dir, cfg.tracking, cfg.dataset = f"{bucket.uri}/runs/{name}", None, dict(rows)
        if "eval_dataset" in cfg:
            cfg.eval_dataset = None
        for key, value in overrides.items():
            OmegaConf.update(cfg, key.replace("__", "."), value)
        path = tmp_path / f"{name}.yaml"
        OmegaConf.save(cfg, path)
        return str(path)

    return config


def run(tmp_path, *recipes, size=1, fails=False):
    """Run recipe files with their configs in so many processes; returns what they printed."""
    log = tmp_path / "log.txt"
    for name, config in recipes:
        started = start(run_recipe_file, name, config, size=size, log=log)
        with pytest.raises(AssertionError, match="exit codes") if fails else contextlib.nullcontext():
            started.join()
    return log.read_text()


def metrics_of(bucket, name):
    return [json.loads(line) for line in bucket.get(f"runs/{name}/metrics.jsonl").splitlines()]


@pytest.mark.long
def test_training_goes_on_through_faults_and_no_secret_is_written(job, bucket, tmp_path, monkeypatch, capfd):
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "6")
    modes = itertools.cycle(["cut", 503, "corrupt", "refuse", 500, "delay"])
    count = itertools.count()

    def every_third(method, path):
        bucket.proxy.mode = next(modes)
        return next(count) % 3 == 0

    bucket.proxy.mode, bucket.proxy.matches, bucket.proxy.seconds = 500, every_third, 0.1
    tracking = load(ROOT / "configs" / "tiny" / "rho1.yaml").tracking
    config = job("rho1", reference_checkpoint=f"{bucket.uri}/reference", max_steps=4, save_every=2, tracking=tracking)
    printed = run(tmp_path, (TRAIN, config), size=2)
    assert bucket.proxy.faults > 10
    steps = [f"step_{step:08d}" for step in (2, 4)]
    assert {key.split("/")[3] for key in bucket.keys("runs/rho1/checkpoints/step")} == set(steps)
    for folder in (*(f"checkpoints/{step}" for step in steps), "export"):
        manifest = json.loads(bucket.get(f"runs/rho1/{folder}/manifest.json"))
        assert all(len(bucket.get(f"runs/rho1/{folder}/{name}")) == e["bytes"] for name, e in manifest.items())
    assert bucket.get("runs/rho1/checkpoints/latest").decode() == steps[-1]
    assert [row["step"] for row in metrics_of(bucket, "rho1")] == [1, 2, 3, 4]

    # The same again with credentials that are refused: one clear line, before anything is built.
    bucket.proxy.reset()
    bucket.proxy.mode = 403
    refused = run(tmp_path, (TRAIN, job("uniform")), size=2, fails=True).removeprefix(printed)
    lines = [line for line in refused.splitlines() if line.startswith("error")]
    assert lines  # of whichever rank is first: all have the same error
    assert all("AccessDenied" in line and "set AWS_ACCESS_KEY_ID" in line for line in lines)

    bucket.proxy.reset()
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    written += [bucket.get(key) for key in bucket.keys("")]
    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        written.append("\n".join(store.iterdump()).encode())
    written += [text.encode() for text in (printed, refused, *capfd.readouterr())]
    assert len(written) > 40
    for name, secret in KEYS.items():
        assert not any(secret.encode() in text for text in written), name


@pytest.mark.slow
def test_an_empty_machine_goes_on_and_a_run_is_not_written_over(job, bucket, tmp_path, monkeypatch):
    small = {"token_view": None, "save_every": 2, "keep_checkpoints": 1}
    run(tmp_path, (TRAIN, job("uniform", max_steps=2, **small)))
    monkeypatch.setenv("WMTP_CACHE", str(tmp_path / "another machine"))
    refused = run(tmp_path, (TRAIN, job("uniform", max_steps=4, **small)), fails=True)
    assert "already holds a run; set resume=true" in refused
    said = run(tmp_path, (TRAIN, job("uniform", max_steps=4, resume=True, **small)))
    assert "step_00000002 at step 2" in said
    assert [row["step"] for row in metrics_of(bucket, "uniform")] == [1, 2, 3, 4]
    assert {key.split("/")[3] for key in bucket.keys("runs/uniform/checkpoints/step")} == {"step_00000004"}
    config = job("uniform", max_steps=1, overwrite=True, token_view=None, save_every=None)
    run(tmp_path, (TRAIN, config))
    assert [row["step"] for row in metrics_of(bucket, "uniform")] == [1]
    assert {key.split("/")[3] for key in bucket.keys("runs/uniform/checkpoints/step")} == {"step_00000001"}


def test_a_lasting_fault_ends_in_one_line_and_keeps_everything(job, bucket, tmp_path):
    bucket.proxy.mode = 500
    bucket.proxy.matches = lambda method, path: method in ("PUT", "POST") and "step_" in path
    config = job("uniform", max_steps=2, save_every=1, token_view=None)
    log = run(tmp_path, (TRAIN, config), fails=True)
    assert "UPLOAD FAILED" in log and "error: not everything could be uploaded" in log
    command = log.rpartition("run: python -m wmtp.storage ")[2].split(" (traceback")[0].split()
    assert (Path(command[1]) / "export" / "config.json").exists()
    bucket.proxy.reset()
    sys.argv = ["wmtp.storage", *command]
    from wmtp.storage.__main__ import main

    main()
    assert len([key for key in bucket.keys("runs/uniform") if key.endswith("manifest.json")]) == 3


@pytest.mark.long
@pytest.mark.slow
def test_scoring_training_and_evaluation_hand_over_in_s3(job, bucket, tmp_path):
    reference = f"{bucket.uri}/reference"
    score = job("score_reference", checkpoint=reference, documents_per_part=16, seq_len=64)
    rows = {"_component_": "wmtp.data.prompt_completion_stream", "source": f"{bucket.uri}/rows.jsonl"}
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(score), {"dataset": rows}), score)
    train = job("rho1_scored", max_steps=1, save_every=None, token_view=None)
    cfg = OmegaConf.load(train)
    cfg.dataset = {"_component_": "wmtp.data.scored", "source": f"{bucket.uri}/runs/score_reference"}
    cfg.dataset.checkpoint = reference
    OmegaConf.save(cfg, train)
    evaluate = job("eval_heads", checkpoint=f"{bucket.uri}/runs/rho1_scored/export", max_new_tokens=4)
    run(tmp_path, ("score_reference", score), (TRAIN, train), ("eval_heads", evaluate))
    assert len(bucket.keys("runs/score_reference/data/")) == 3
    assert json.loads(bucket.get("runs/score_reference/manifest.json"))["data"]["documents"] == len(ROWS)
    assert json.loads(bucket.get("runs/eval_heads/heads.json"))["heads"]
