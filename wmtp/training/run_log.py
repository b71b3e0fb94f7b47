"""What a run writes down: metrics.jsonl beside its checkpoints, MLflow, and lines on stderr."""

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from wmtp.config import build
from wmtp.distributed import on_rank_0, wait_for_all
from wmtp.files import write_whole
from wmtp.pretrained.resolve import RUN_FILE, checkpoint_sha256
from wmtp.storage import Output
from wmtp.tracking import FOLDER, METRICS, TAGS
from wmtp.tracking.environment import (
    code_changes,
    code_sha256,
    config_sha256,
    environment_tags,
    mlflow_fields,
    own_code,
)
from wmtp.tracking.store import use_store

if TYPE_CHECKING:
    from wmtp.training.validation import HeldOut

_CODE = "code"


class RunLog:
    """The record of one run. Every rank has one and may call it; rank 0 alone writes.

    Args:
        output: the run's folder and, for ``s3://``, its remote copy.
        tracking: the config's tracking section, or None. Its store is the process's until the run is closed: names
            such as ``runs:/ID/export`` are looked up there.
        is_main: whether this is rank 0.

    Raises:
        ConfigError, ValueError: a tracking section with a mistake, a store that cannot be used or refuses.
    """

    def __init__(self, output: Output, tracking: DictConfig | None, *, is_main: bool) -> None:
        self._output, self._output_dir, self._is_main = output, output.folder, is_main
        self._file = output.folder / METRICS
        use_store(None if tracking is None else tracking.get("tracking_uri"))
        self._tracker = build(tracking, where="tracking") if is_main else None
        self._kept: set[str] = set()  # figures of the step that the run goes on from
        self._times: dict[str, float] = {}  # when what happens again happened first, by the figures' names

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, to be kept in checkpoints; None without tracking, on other ranks, and as long as the
        store has not given one."""
        return self._tracker.run_id if self._tracker else None

    def start(
        self,
        cfg: DictConfig,
        *,
        recipe: str,
        method: str,
        dataset: str,
        data_sha256: str | None,
        tags: Mapping[str, object] | None = None,
        step: int = 0,
        resumed: bool = False,
        run_id: str | None = None,
        replaces: Sequence[str] = (),
    ) -> None:
        """Begins, or goes on after ``step``; before this a mistake leaves no trace on disk. Every rank calls it.

        Code of the researcher's own that the run depends on is kept in ``code/HASH``, also in MLflow.

        Args:
            cfg: the whole config, written to config.yaml and to MLflow.
            recipe: the recipe's name, a tag.
            method: what is done: the weighting's name, ``eval``, ...; part of the experiment's name, and a tag.
            dataset: the name of the data, likewise.
            data_sha256: hash of the data, None where it is not known yet.
            tags: what MLflow shall know beside.
            step: optimizer steps of the checkpoint that the run goes on from.
            resumed: the run in output_dir goes on; else a new one begins, or replaces it.
            run_id: MLflow's id of the run that goes on, where a checkpoint knows it.
            replaces: names in output_dir that belong to the run which a new one replaces.
        """
        wait_for_all()  # every rank has checked the folder before rank 0 changes it
        resolved = OmegaConf.to_container(cfg, resolve=True)
        self._facts = {"method": method, "dataset": dataset, "config_sha256": config_sha256(resolved)}
        self._facts["data_sha256"] = data_sha256
        own = own_code(resolved, recipe)
        if own:
            self._facts["own_code_sha256"] = code_sha256(own)
        tags = {f"wmtp.{name}": value for name, value in self._facts.items() if value is not None} | dict(tags or {})

        def begin() -> None:
            if self._tracker:
                names = {"method": method, "dataset": dataset, "training_run_id": tags.get("wmtp.training_run_id")}
                self._tracker.connect(self._output_dir, **names, run_id=run_id, resumed=resumed, log=self.info)
            replaced = () if resumed else (*replaces, _CODE, FOLDER, self._file.name)
            steps = max((line["step"] for line in read_metrics(self._file)), default=0)
            if not resumed and steps:
                self.info(f"{self._output_dir} held a run of {steps} steps, which this one replaces")
            self._prepare_folder(cfg, step, replaced)
            kept = {f"{_CODE}/{self._facts['own_code_sha256'][:12]}/{name}": file for name, file in own.items()}
            for name, file in kept.items():
                (self._output_dir / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, self._output_dir / name)
            remote = {"wmtp.output": self._output.remote} if self._output.remote else {}
            known = environment_tags(own.values()) | {"wmtp.recipe": recipe, **remote, **tags}
            write_whole(self._output_dir / TAGS, json.dumps(known, indent=1, default=str) + "\n")
            self._output.begin(replaced)
            if self._tracker:
                self._tracker.start()
                self._tracker.log_config(cfg)
                fields = mlflow_fields(resolved, self._facts, recipe)
                if resumed:  # the description may be somebody's own by now
                    fields.pop("mlflow.note.content")
                self._tracker.log_tags({**fields, **known})
                self._data_section = resolved.get("dataset") or resolved.get("tasks") or {}
                self._track_data(data_sha256)
                texts = {name: file.read_text(errors="replace") for name, file in kept.items()}
                for name, text in {**texts, "git_diff.patch": code_changes(own.values())}.items():
                    if text:
                        self._tracker.log_text(text, name)
                self.info(f"tracking in {self._tracker.where}")

        on_rank_0(begin)

    def _track_data(self, sha256: str | None) -> None:
        if sha256 is not None:
            context = "evaluation" if self._facts["method"] == "eval" else "training"
            self._tracker.log_dataset(self._facts["dataset"], sha256, self._data_section, context)

    def _prepare_folder(self, cfg: DictConfig, step: int, replaced: Sequence[str]) -> None:
        for name in replaced:
            path = self._output_dir / name
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        self._output_dir.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(cfg, self._output_dir / "config.yaml", resolve=True)
        if self._file.exists():  # what was logged after the checkpoint is about to happen again
            lines = read_metrics(self._file)
            write_whole(self._file, "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step))
            for line in lines:
                at = line.pop("time", None)
                if line["step"] == step:
                    self._kept.add(json.dumps(line))
                elif line["step"] > step and at is not None:
                    self._times[" ".join(map(str, (line.pop("step"), *line)))] = at

    def metrics(self, metrics: dict[str, float], step: int) -> None:
        """Writes a step's figures down; held-out ones are shown too."""
        if not self._is_main:
            return
        at = self._times.get(" ".join(map(str, (step, *metrics))), round(time.time(), 3))
        if json.dumps({"step": step, **metrics}) not in self._kept:  # as a run resumed after its last step says again
            with self._file.open("a") as file:  # from where the tracker reads it
                file.write(json.dumps({"step": step, "time": at, **metrics}) + "\n")
        evaluated = {key: value for key, value in metrics.items() if key.startswith("eval/")}
        if evaluated:
            self.info(f"step {step}: " + "  ".join(f"{k} {v:.4f}" for k, v in evaluated.items()))

    def result(self, metrics: dict[str, float], *files: Path, tags: Mapping[str, object] | None = None) -> None:
        """Logs the findings of a job without steps: its figures, and the files that hold them, for MLflow."""
        if self._tracker:
            self._tracker.log_dict(metrics, 0)
            self._tracker.log_tags(tags or {})
            self._track_data((tags or {}).get("wmtp.data_sha256"))
            for file in files:
                self._tracker.log_artifact(file)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Copies a file or folder to MLflow."""
        if self._tracker:
            self._tracker.log_artifact(path, folder)

    def exported(self, folder: Path, step: int) -> None:
        """Writes into an exported model's folder which run it is of, uploads it, and gives it to MLflow: as an
        artifact, or by reference where it is uploaded."""
        if not self._is_main:
            return
        experiment = self._tracker.experiment if self._tracker else None
        facts = {"run_id": self.run_id, "experiment": experiment, "step": step, **self._facts}
        (folder / RUN_FILE).write_text(json.dumps(facts, indent=1) + "\n")
        self.info(f"exported to {folder}")
        if self._tracker:
            reference = None
            if self._output.remote:
                uri = f"{self._output.remote}/{folder.relative_to(self._output_dir).as_posix()}"
                reference = {"uri": uri, "sha256": checkpoint_sha256(folder), "run_id": self.run_id}
            self._tracker.log_model(folder, folder / RUN_FILE, reference)
        self._output.upload(folder)

    def held_out(self, found: "HeldOut", step: int) -> None:
        """Writes an evaluation down: its metrics, and the CE of each document in a file, also in MLflow."""
        if self._is_main:
            file = self._output_dir / held_out_file(step)
            found.write(file)
            self.artifact(file, file.parent.name)
        self.metrics(found.metrics, step)

    def page(self, name: str, html: str) -> None:
        """Writes a page below output_dir and copies it to MLflow, both under its name: ``folder/file.html``."""
        if self._is_main:
            file = self._output_dir / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(html, encoding="utf-8")
            self.artifact(file, str(Path(name).parent))

    def info(self, line: str) -> None:
        """Prints a line on stderr, above the progress bar."""
        if self._is_main:
            tqdm.write(line, file=sys.stderr)

    def close(self, status: str = "FINISHED") -> None:
        """Ends the MLflow run as FINISHED, FAILED or KILLED."""
        if self._tracker:
            self._tracker.close(status)
        use_store(None)


def held_out_file(step: int) -> str:
    """Returns the name below output_dir of the file of an evaluation after so many steps."""
    return f"held_out/step_{step:08d}.parquet"


def read_metrics(metrics: Path) -> list[dict]:
    """Returns what a run logged; a line that was torn when its process was killed is none."""
    text = metrics.read_text() if metrics.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def builder_name(section: DictConfig) -> str:
    """Returns what a section builds: ``rho1`` of ``wmtp.weighting.rho1``. A run's method and dataset are named so."""
    return str(section._component_).rpartition(".")[2]
