"""MLflow tracking on `MlflowClient`: one run, resumable by id, metrics sent asynchronously from rank 0.

mlflow is imported where it is used: the import takes seconds, and only rank 0 of a tracked run needs it.
"""

import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

_MAX_PARAM = 6000  # characters of a param value that MLflow keeps
_PARAMS_PER_BATCH = 100


class MLflowLogger:
    """A run in MLflow. Only rank 0 makes one.

    Args:
        experiment: experiment name, made when absent.
        run_name: name of the run.
        tracking_uri: where runs are kept; null is `sqlite:///mlflow.db` in the working directory, or
            `$MLFLOW_TRACKING_URI` where that is set.
        artifact_location: of a new experiment, e.g. `s3://bucket/wmtp`; null is the store's default.
        run_id: an existing run to go on with.
    """

    def __init__(
        self,
        experiment: str,
        run_name: str | None = None,
        tracking_uri: str | None = None,
        artifact_location: str | None = None,
        run_id: str | None = None,
    ) -> None:
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
        try:
            self._client = MlflowClient(tracking_uri=uri)
            found = self._client.get_experiment_by_name(experiment)
        except MlflowException as error:
            raise ValueError(f"tracking.tracking_uri {uri!r} cannot be used: {error}") from error
        experiment_id = found.experiment_id if found else self._client.create_experiment(experiment, artifact_location)
        if run_id is None:
            run_id = self._client.create_run(experiment_id, run_name=run_name).info.run_id
        else:
            self._client.update_run(run_id, status="RUNNING")
        self.run_id = run_id
        self.where = f"{uri} (experiment {experiment}, run {run_id})"
        self._pending: list = []

    def log_config(self, cfg: DictConfig) -> None:
        """All config values as params and the resolved config as an artifact; what a resumed run logged stays."""
        from mlflow.entities import Param

        present = self._client.get_run(self.run_id).data.params
        flat = _flatten(OmegaConf.to_container(cfg, resolve=True))
        params = [Param(key, str(value)[:_MAX_PARAM]) for key, value in flat.items() if key not in present]
        for start in range(0, len(params), _PARAMS_PER_BATCH):
            self._client.log_batch(self.run_id, params=params[start : start + _PARAMS_PER_BATCH])
        self._client.log_text(self.run_id, OmegaConf.to_yaml(cfg, resolve=True), "config.yaml")

    def log_tags(self, tags: dict[str, object]) -> None:
        from mlflow.entities import RunTag

        self._client.log_batch(self.run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Send without waiting; :meth:`close` waits for what is under way."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        batch = [Metric(key, float(value), now, step) for key, value in metrics.items()]
        self._pending.append(self._client.log_batch(self.run_id, metrics=batch, synchronous=False))

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        self._client.log_artifact(self.run_id, str(path), folder)

    def close(self, status: str = "FINISHED") -> None:
        """Wait for the metrics, then set the run's status: FINISHED, FAILED or KILLED."""
        for operation in self._pending:
            if operation is not None:
                operation.wait()
        self._pending.clear()
        self._client.set_terminated(self.run_id, status)


def environment_tags() -> dict[str, str]:
    """What a result depends on beside its config: code version, packages, hardware."""
    packages = ("torch", "torchtune", "torchao", "transformers", "datasets", "wmtp")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "git_commit": _git("rev-parse", "HEAD") or "unknown",
        "git_dirty": str(bool(_git("status", "--porcelain"))),
        "packages": " ".join(f"{name}=={version(name)}" for name in packages),
        "python": platform.python_version(),
        "hardware": device,
    }


def _git(*args: str) -> str:
    try:
        return subprocess.run(("git", *args), capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""  # not a checkout, or no git: the tag says unknown


def _flatten(value: dict | list, prefix: str = "") -> dict[str, object]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    flat: dict[str, object] = {}
    for key, child in items:
        name = f"{prefix}{key}"
        if isinstance(child, dict | list) and child:
            flat |= _flatten(child, f"{name}.")
        else:
            flat[name] = child
    return flat
