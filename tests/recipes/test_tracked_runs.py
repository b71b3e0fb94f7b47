"""Training beside a real MLflow server that is down, slow, killed or refusing; and what is found again through it."""

import json
import math
import os
import shutil
import sys
from pathlib import Path

import pytest
from fault_proxy import FaultProxy
from huggingface_hub import ModelCard
from mlflow.tracking import MlflowClient
from processes import start
from services import AWS_ENVIRONMENT, MlflowServer, moto_server
from tracked_runs import ROOT, Runs, run_promote

from recipes.eval_heads import EvalHeadsRecipe
from recipes.full_finetune_distributed_wmtp import FullFinetuneRecipeWMTP
from runs import read_metrics
from wmtp.pretrained import CheckpointError, checkpoint_sha256, resolve_checkpoint
from wmtp.registry.versions import last_move, moves, versions
from wmtp.tracking import FOLDER
from wmtp.tracking.replay import replay

SHORT = {"save_every": None, "eval_every": None, "export_dtype": "none"}


@pytest.fixture(scope="module")
def module_server(tmp_path_factory):
    """A server that keeps its artifacts in S3, not yet started; its clients are told nothing but its address."""
    import boto3

    with pytest.MonkeyPatch.context() as environment, moto_server() as s3:
        for name, value in AWS_ENVIRONMENT.items():
            environment.setenv(name, value)
        boto3.client("s3", endpoint_url=s3).create_bucket(Bucket="wmtp")
        to_s3 = {"MLFLOW_S3_ENDPOINT_URL": s3}
        server = MlflowServer(tmp_path_factory.mktemp("server"), artifacts="s3://wmtp/mlflow", environment=to_s3)
        yield server
        server.kill()


@pytest.fixture
def server(module_server):
    module_server.start()
    return module_server


def tracked(cfg, uri=None, **section):
    cfg.tracking = {"_component_": "wmtp.tracking.MLflowLogger", "tracking_uri": uri, **section}
    return cfg


def train(cfg, at=None):
    """Train in this process and end the run; `at[step]` is called as that step's metrics are logged."""
    recipe = FullFinetuneRecipeWMTP(cfg)
    recipe.setup()
    write = recipe._log.metrics

    def metrics(figures, step):
        (at or {}).get(step, lambda: None)()
        write(figures, step)

    recipe._log.metrics = metrics
    recipe.train()
    recipe.export()
    recipe._log.close()
    return recipe


def losses(output_dir):
    return {line["step"]: line["train/loss"] for line in read_metrics(output_dir) if "train/loss" in line}


def in_store(client, run_id, key="train/loss"):
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, key)]


def the_run(client, experiment):
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return run


@pytest.mark.long
def test_no_mood_of_the_server_touches_training_and_every_metric_arrives_once(
    module_server, tiny_config, tmp_path, capfd
):
    """Down as the run begins; then up, slow, killed; at the end it is down again, and what is left is replayed."""
    server, steps = module_server, {"max_steps": 8, **SHORT}
    server.kill()
    train(tiny_config(output_dir=str(tmp_path / "untracked"), **steps))
    cfg = tiny_config(output_dir=str(tmp_path / "run"), **steps)
    tracked(cfg, server.url, experiment="faults", flush_seconds=0.5)
    train(cfg, {2: server.start, 4: server.pause, 6: server.go_on, 7: server.kill})
    said = capfd.readouterr().err
    assert "the run begins there when the store answers" in said
    assert "the store does not take what it is sent" in said
    assert f"send them with python -m wmtp.tracking replay {cfg.output_dir}" in said
    expected = losses(tmp_path / "untracked")
    assert losses(cfg.output_dir) == expected and sorted(expected) == list(range(1, 9))
    server.start()
    kept = {path.name: path.read_bytes() for path in (tmp_path / "run" / FOLDER).iterdir()}
    client = MlflowClient(server.url)
    for _ in range(2):
        replay(Path(cfg.output_dir))
        run = the_run(client, "faults")
        assert in_store(client, run.info.run_id) == sorted(expected.items())
        for name, content in kept.items():  # as if the replay had noted nothing down
            (tmp_path / "run" / FOLDER / name).write_bytes(content)
    assert run.info.status == "FINISHED" and run.data.tags["wmtp.recipe"] == "full_finetune_distributed_wmtp"


@pytest.mark.slow
def test_training_is_found_again_through_mlflow_alone(server, tiny_config, tmp_path, monkeypatch, capfd):
    """Two environment variables lead to the run; from there its export, its evaluation, and no secret."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    secret = f"planted-{os.urandom(8).hex()}"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    cfg = tracked(tiny_config(max_steps=1, **{**SHORT, "export_dtype": "fp32"}))
    recipe = train(cfg)
    client = MlflowClient(server.url)
    run = the_run(client, "wmtp/python_functions")
    assert run.data.tags["wmtp.data_sha256"] == recipe._data.fingerprint
    export = recipe._output_dir / "export"
    about = json.loads((export / "wmtp_run.json").read_text())
    assert about == {
        "run_id": run.info.run_id, "experiment": "wmtp/python_functions", "step": 1,
        "method": "uniform", "dataset": "python_functions",
        "config_sha256": run.data.tags["wmtp.config_sha256"], "data_sha256": recipe._data.fingerprint,
    }  # fmt: skip

    sha256 = checkpoint_sha256(export)
    content = {path.name: path.read_bytes() for path in export.iterdir()}
    shutil.rmtree(recipe._output_dir)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WMTP_CACHE", str(tmp_path / "cache"))
    name = f"runs:/{run.info.run_id}/export"
    fetched = resolve_checkpoint(name)
    assert {path.name: path.read_bytes() for path in fetched.iterdir()} == content
    client.create_registered_model("tiny")
    client.create_model_version("tiny", source=f"{run.info.artifact_uri}/export", run_id=run.info.run_id)
    client.set_registered_model_alias("tiny", "staging", "1")
    assert resolve_checkpoint("models:/tiny@staging") == resolve_checkpoint("models:/tiny/1") == fetched
    for wrong, message in (
        ("models:/tiny@production", "models:/tiny@production: not in the MLflow store"),
        ("models:/other/1", "models:/other/1: not in the MLflow store"),
        ("models:/tiny", "must be models:/<name>@<alias> or models:/<name>/<version>"),
    ):
        with pytest.raises(CheckpointError, match=message) as error:
            resolve_checkpoint(wrong)
        assert "\n" not in str(error.value)

    evaluation = tracked(tiny_config("eval_heads", checkpoint=name, speed_prompts=0), parent_run_id="training")
    heads = EvalHeadsRecipe(evaluation)
    heads.setup()
    heads.report(heads.evaluate(), heads.measure_speed())
    heads._log.close()
    found = the_run(client, "wmtp/heads")
    assert found.data.tags["wmtp.training_run_id"] == run.info.run_id
    assert found.data.tags["mlflow.parentRunId"] == run.info.run_id
    assert found.data.tags["wmtp.model_sha256"] == sha256 and found.data.tags["wmtp.evaluation"] == "heads"
    assert math.isfinite(found.data.metrics["eval/heads/heads/ce_head1"])
    for run_id in (run.info.run_id, found.info.run_id):
        folder = Path(client.download_artifacts(run_id, "", str(tmp_path)))
        for file in (p for p in folder.rglob("*") if p.is_file()):
            assert secret.encode() not in file.read_bytes()
    assert secret not in capfd.readouterr().err


@pytest.mark.parametrize("status", [401, 403])
def test_credentials_that_the_server_refuses_end_a_run_before_it_begins(status, server, tiny_config):
    with FaultProxy(server.url) as proxy:
        proxy.mode = status
        cfg = tracked(tiny_config(**SHORT), proxy.url)
        with pytest.raises(ValueError, match=rf"refuses the credentials \(HTTP {status}\)"):
            FullFinetuneRecipeWMTP(cfg).setup()
    assert not Path(cfg.output_dir).exists()


def test_a_server_that_answers_503_is_waited_for_at_the_end(server, tiny_config, capfd):
    with FaultProxy(server.url) as proxy:
        proxy.mode = 503
        cfg = tracked(tiny_config(max_steps=3, **SHORT), proxy.url, experiment="busy")
        train(cfg, {3: lambda: setattr(proxy, "mode", "pass")})
        assert proxy.faults > 0
    client = MlflowClient(server.url)
    run = the_run(client, "busy")
    assert run.info.status == "FINISHED"
    assert in_store(client, run.info.run_id) == sorted(losses(cfg.output_dir).items())
    assert "the store answers again" in capfd.readouterr().err


def test_an_export_that_lies_in_s3_is_tracked_by_reference(server, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.environment["MLFLOW_S3_ENDPOINT_URL"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    monkeypatch.setenv("WMTP_CACHE", str(tmp_path / "cache"))
    options = {"max_steps": 1, **SHORT, "export_dtype": "fp32", "output_dir": "s3://wmtp/runs/uniform"}
    recipe = train(tracked(tiny_config(**options), experiment="in_s3"))
    recipe._output.close()
    sha256 = checkpoint_sha256(recipe._output_dir / "export")
    client = MlflowClient(server.url)
    run = the_run(client, "in_s3")
    assert run.data.tags["wmtp.output"] == "s3://wmtp/runs/uniform"
    there = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert "export.json" in there and "export" not in there

    monkeypatch.setenv("WMTP_CACHE", str(tmp_path / "empty"))
    fetched = resolve_checkpoint(f"runs:/{run.info.run_id}/export")
    assert checkpoint_sha256(fetched) == sha256 and fetched.is_relative_to(tmp_path / "empty")
    assert json.loads((fetched / "wmtp_run.json").read_text())["run_id"] == run.info.run_id
    client.create_registered_model("in_s3")
    client.create_model_version("in_s3", "s3://wmtp/runs/uniform/export", run.info.run_id)
    assert resolve_checkpoint("models:/in_s3/1") == fetched
    reference = {"uri": "s3://wmtp/runs/uniform/export", "sha256": "0" * 64}
    client.log_text(run.info.run_id, json.dumps(reference), "export.json")
    with pytest.raises(CheckpointError, match="holds another model now"):
        resolve_checkpoint(f"runs:/{run.info.run_id}/export")


def promote_main(*overrides):
    """What `python recipes/promote.py --config configs/tiny/promote.yaml ...` does."""
    sys.argv = ["recipes/promote.py", "--config", str(ROOT / "configs" / "tiny" / "promote.yaml"), *overrides]
    from recipes.promote import main

    sys.exit(main())


@pytest.mark.long
def test_promoting_works_on_a_server_and_leaves_a_card(server, tmp_path, monkeypatch):
    """The recipe as it is started: what a user types, and reads."""
    client = MlflowClient(server.url)
    runs = Runs(client, tmp_path)
    training = runs.training(tags={"wmtp.git_dirty": "True", "wmtp.packages": "torch==2.13.0"})
    good = runs.evaluation(training, ["p"] * 6)
    worse = runs.evaluation(runs.training(), ["w"] * 6)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    monkeypatch.setenv("WMTP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "a-user")

    def run(status, *overrides):
        log = tmp_path / "log.txt"
        log.unlink(missing_ok=True)
        (process,) = start(promote_main, *overrides, log=log).members
        process.join(120)
        assert process.exitcode == status, log.read_text()
        return log.read_text().splitlines()

    said = run(0, f"evaluation_run={good}", 'card.limits=["seen in a test"]')
    assert "wmtp-tiny@staging: nothing -> version 1 (move 1: registered with tiny_tasks)" in said
    run_promote("wmtp-tiny", "production", good)
    run_promote("wmtp-tiny", "register", worse)
    (refusal,) = [line for line in run(1, "action=production", f"evaluation_run={worse}") if "error" in line]
    assert refusal.startswith("error: version 2 does not replace version 1 in production: worse beyond the interval")
    run_promote("wmtp-tiny", "rollback")

    record = moves(client, "wmtp-tiny")
    assert [(m.alias, m.before, m.after, m.by) for m in record] == [
        ("staging", None, "1", "a-user"),
        ("production", None, "1", "someone"),
        ("staging", "1", "2", "someone"),
        ("production", "1", None, "someone"),
    ]
    assert last_move(record, "production").decision == "undoes move 2"
    version = versions(client, "wmtp-tiny")[0]
    assert version.tags["wmtp.production"].startswith("move 2, ")
    run_id, path = version.tags["wmtp.model_card"].removeprefix("runs:/").split("/", 1)
    card = Path(client.download_artifacts(run_id, path, str(tmp_path))).read_text()
    results = json.loads(Path(client.download_artifacts(good, "results.json", str(tmp_path))).read_text())
    _check_card(card, results, version, training, good)


def _check_card(text, results, version, training, good):
    """The Hub's own reader understands it, and every statement is the runs'."""
    card = ModelCard(text)
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("tiny_tasks", "pass@1", 1.0)
    assert card.data.license == "unknown" and "multi-token-prediction" in card.data.tags
    figure = results["temperatures"]["0.8"]["metrics"]["pass_at_1"]
    interval = f"{100 * figure['low']:.1f} to {100 * figure['high']:.1f}"
    assert f"pass@1 = 100.0 % (95 % interval {interval}), 6 tasks" in text
    for line in (
        "| heads | 2 |",
        "_component_: wmtp.weighting.rho1",
        "_component_: wmtp.data.python_functions",
        "| git commit | c0ffee |",
        "| packages | torch==2.13.0 |",
        "| Python | unknown |",  # no tag of the run says it, so nobody does
        f"| model SHA-256 | {version.tags['wmtp.model_sha256']} |",
        f"| evaluation tiny\\_tasks | runs:/{good}/results.json |",
        "- seen in a test",
        "- Trained by code with uncommitted changes",
        "Trained from random weights: there is no base model.",
        f'resolve_checkpoint("models:/wmtp-tiny/{version.number}")',
    ):
        assert line in text, line
    assert f"| training run | {training} (training1, experiment wmtp/test) |" in text
    assert version.description.startswith("# wmtp-tiny, version 1") and len(version.description) <= 5000
