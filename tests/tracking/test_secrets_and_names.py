"""What is refused before a run begins, what is masked, and which names the store gets. No store is opened here."""

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from wmtp.errors import mask_secrets
from wmtp.tracking import MLflowLogger, check_store, code_changes
from wmtp.tracking.environment import config_sha256
from wmtp.tracking.replay import replay
from wmtp.tracking.store import entity_name

ROOT = Path(__file__).resolve().parents[2]


def test_secrets_are_masked_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abc/DEF+ghi=jkl")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter22hunter")
    monkeypatch.setenv("SOME_TOKEN", "short")  # a word
    monkeypatch.setenv("MONKEY", "unrelated value")
    text = "key abc/DEF+ghi=jkl, in a URL abc%2FDEF%2Bghi%3Djkl, hunter22hunter; short unrelated value"
    assert mask_secrets(text) == "key ***, in a URL ***, ***; short unrelated value"
    assert mask_secrets("postgresql://me:pw@db:5/x https://db:5/a@b") == "postgresql://***@db:5/x https://db:5/a@b"


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("eval/mbpp/pass@1", "eval/mbpp/pass_at_1"),
        ("a//b/", "a/b"),
        ("/x", "x"),
        ("../a/./b", "__/a/_/b"),
        ("p%\n\\", "p___"),
        ("", "_"),
        ("x" * 300, "x" * 250),
        ("système 1.5:k-2", "système 1.5:k-2"),
    ],
)
def test_names_become_what_mlflow_accepts(given, name):
    from mlflow.utils.validation import _validate_metric_name

    assert entity_name(given) == name
    _validate_metric_name(entity_name(given))


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://bucket/runs", "S3 holds artifacts: set artifact_location"),
        ("nowhere://x", "is no MLflow store; use sqlite:///FILE"),
        ("", "is no MLflow store"),
        ("sqlite:///no/such/folder/mlflow.db", "the folder no/such/folder does not exist"),
        ("sqlite:////etc/hostname", "/etc/hostname is no SQLite file"),
        ("sqlite:////etc", "/etc is a folder"),
        ("http://:5000", "names no host"),
    ],
)
def test_a_store_that_can_never_be_used_is_refused(uri, message):
    with pytest.raises(ValueError, match=message) as error:
        check_store(uri)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("status", [401, 403])
def test_wrong_credentials_are_refused_at_once_and_not_shown(status, monkeypatch):
    asked = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.headers["Authorization"])
            self.send_error(status)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "someone")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "planted-password")
    with pytest.raises(
        ValueError, match=rf"refuses the credentials \(HTTP {status}\); set MLFLOW_TRACKING_US"
    ) as error:
        check_store(f"http://127.0.0.1:{server.server_address[1]}")
    server.shutdown()
    server.server_close()
    assert "planted-password" not in str(error.value) and "\n" not in str(error.value)
    assert asked == ["Basic c29tZW9uZTpwbGFudGVkLXBhc3N3b3Jk"]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"experiment": "wmtp/{model}"}, r"experiment 'wmtp/\{model\}' has a part \{model\} that nothing fills in"),
        ({"flush_seconds": 0}, "flush_seconds must be > 0, got 0"),
        ({"system_metrics_seconds": -1}, "system_metrics_seconds must be > 0, got -1"),
        ({"tracking_uri": "https://me:planted@host"}, "tracking_uri holds a password"),
    ],
)
def test_a_tracking_section_with_a_mistake_is_refused(section, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        MLflowLogger(**section)
    assert "planted" not in str(error.value)


def test_replay_of_what_is_no_tracked_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no tracking_spool of a run"):
        replay(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_config_hash_is_that_of_the_experiment_not_of_its_place():
    cfg = {"seed": 0, "optimizer": {"lr": 1.0, "betas": [0.9, 0.95]}, "output_dir": "a", "tracking": None}
    reordered = {"tracking": {"x": 1}, "resume": True, "optimizer": {"betas": [0.9, 0.95], "lr": 1.0}, "seed": 0}
    assert config_sha256(cfg) == config_sha256(reordered)
    assert config_sha256(cfg) != config_sha256({**cfg, "seed": 1})
    assert config_sha256(OmegaConf.to_container(OmegaConf.create(cfg))) == config_sha256(cfg)


def test_the_diff_holds_changed_and_new_files_without_secrets(tmp_path, monkeypatch):
    def git(*args):
        subprocess.run(("git", "-c", "user.name=n", "-c", "user.email=e", *args), cwd=tmp_path, check=True)

    git("init", "-q")
    (tmp_path / "recipe.py").write_text("lr = 1\n")
    git("add", ".")
    git("commit", "-qm", "first")
    monkeypatch.setattr("wmtp.tracking.environment._SOURCE", tmp_path / "recipe.py")  # instead of WMTP's own checkout
    assert code_changes() == ""
    monkeypatch.setenv("PLANTED_KEY", "0123456789planted")
    (tmp_path / "recipe.py").write_text("lr = 2\nkey = '0123456789planted'\n")
    (tmp_path / "new.py").write_text("new = True\n")
    (tmp_path / "weights.bin").write_bytes(bytes(100))
    diff = code_changes()
    assert "+lr = 2\n+key = '***'\n" in diff and "+new = True\n" in diff
    assert "not shown: weights.bin" in diff


def test_neither_mlflow_nor_torch_is_imported_with_the_package():
    code = "import sys, wmtp.tracking, wmtp.tracking.replay; print({'mlflow', 'torch', 'boto3'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "set()\n"
