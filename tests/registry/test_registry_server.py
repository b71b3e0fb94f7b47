"""The recipe as it is started, against a real `mlflow server`: what a user types, and reads."""

import json
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from mlflow.tracking import MlflowClient
from processes import start
from services import mlflow_server
from tracked_runs import ROOT, Runs, run_promote

from wmtp.registry import last_move, moves, versions


def _main(*overrides):
    """What `python recipes/promote.py --config configs/tiny/promote.yaml ...` does."""
    sys.argv = ["recipes/promote.py", "--config", str(ROOT / "configs" / "tiny" / "promote.yaml"), *overrides]
    from recipes.promote import main

    sys.exit(main())


@pytest.mark.slow
def test_the_commands_work_on_a_server_and_leave_a_card(tmp_path, monkeypatch):
    with mlflow_server(tmp_path / "server") as server:
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
            (process,) = start(_main, *overrides, log=log).members
            process.join(120)
            assert process.exitcode == status, log.read_text()
            return log.read_text().splitlines()

        said = run(0, f"evaluation_run={good}", 'card.limits=["seen in a test"]')
        assert "wmtp-tiny@staging: nothing -> version 1 (move 1: registered with tiny_tasks)" in said
        run_promote("wmtp-tiny", "production", good)
        run_promote("wmtp-tiny", "register", worse)
        (refusal,) = [line for line in run(1, "action=production", f"evaluation_run={worse}") if "error" in line]
        assert refusal.startswith(
            "error: version 2 does not replace version 1 in production: worse beyond the interval"
        )
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
