"""What a training run writes down: metrics.jsonl beside its checkpoints, MLflow, and lines on stderr."""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from wmtp.config import build
from wmtp.distributed import gather_objects
from wmtp.tracking import environment_tags


class RunLog:
    """The record of one run. Every rank has one and may call it; rank 0 alone writes.

    Args:
        output_dir: the run's folder.
        is_main: whether this is rank 0.
    """

    def __init__(self, output_dir: Path, *, is_main: bool) -> None:
        self._output_dir, self._is_main = output_dir, is_main
        self._file = output_dir / "metrics.jsonl"
        self._tracker = None

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, to be kept in checkpoints; None without tracking and on other ranks."""
        return self._tracker.run_id if self._tracker else None

    def start(
        self,
        cfg: DictConfig,
        tracking: DictConfig | None,
        *,
        tags: dict[str, object],
        step: int = 0,
        run_id: str | None = None,
        replaces: Sequence[str] = (),
    ) -> None:
        """Begin, or go on after ``step``; before this a mistake leaves no trace on disk. Every rank calls it.

        Args:
            cfg: the whole config, written to config.yaml and to MLflow.
            tracking: the config's tracking section, or None.
            tags: what MLflow shall know beside the environment.
            step: optimizer steps of the checkpoint that the run goes on from. 0 is a new run, or one that replaces
                another.
            run_id: MLflow's id of the run that goes on.
            replaces: names in output_dir that belong to the run which a new one replaces.
        """
        gather_objects(None)  # every rank has checked the folder before rank 0 changes it
        if not self._is_main:
            return
        if tracking is not None:
            self._tracker = build(tracking, where="tracking", run_id=run_id)
            self._tracker.log_config(cfg)
            self._tracker.log_tags({**environment_tags(), **tags})
            self.say(f"tracking in {self._tracker.where}")
        if step == 0:
            for name in replaces:
                shutil.rmtree(self._output_dir / name, ignore_errors=True)
            self._file.unlink(missing_ok=True)
        self._output_dir.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(cfg, self._output_dir / "config.yaml", resolve=True)
        if self._file.exists():  # what was logged after the checkpoint is about to happen again
            lines = self._file.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            self._file.write_text("".join(kept))

    def metrics(self, metrics: dict[str, float], step: int) -> None:
        """Write a step's figures down; held-out ones are shown too."""
        if not self._is_main:
            return
        with self._file.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        evaluated = {key: value for key, value in metrics.items() if key.startswith("eval/")}
        if evaluated:
            self.say(f"step {step}: " + "  ".join(f"{k} {v:.4f}" for k, v in evaluated.items()))
        if self._tracker:
            self._tracker.log_metrics(metrics, step)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Copy a file or folder to MLflow."""
        if self._tracker:
            self._tracker.log_artifact(path, folder)

    def page(self, name: str, html: str) -> None:
        """Write a page below output_dir and copy it to MLflow, both under its name: ``folder/file.html``."""
        if self._is_main:
            file = self._output_dir / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(html, encoding="utf-8")
            self.artifact(file, str(Path(name).parent))

    def say(self, line: str) -> None:
        """A line on stderr, above the progress bar."""
        if self._is_main:
            tqdm.write(line, file=sys.stderr)

    def close(self, status: str = "FINISHED") -> None:
        """End the MLflow run as FINISHED, FAILED or KILLED."""
        if self._tracker:
            self._tracker.close(status)
