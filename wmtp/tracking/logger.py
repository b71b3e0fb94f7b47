"""A run in MLflow, as torchtune's recipes log to it. Every call writes to the spool and returns."""

import json
import math
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from wmtp.errors import UserError, mask_secrets, one_line
from wmtp.tracking.delivery import Delivery
from wmtp.tracking.sender import Sender
from wmtp.tracking.spool import Spool, read_run
from wmtp.tracking.store import check_store, store_uri
from wmtp.tracking.system import SystemMetrics

_STORE_SECONDS = 15.0  # at the start, for a server's answer; later calls do not wait
_FILE_SECONDS = 120.0  # for a SQLite file, which is created and migrated in this process


@dataclass
class MLflowLogger:
    """A run in MLflow: torchtune's `MetricLoggerInterface` with tags, artifacts and data. Only rank 0 makes one.

    Three calls wait for the store: :meth:`connect` and :meth:`start` for 15 seconds at most, and :meth:`close` for
    `flush_seconds`. Records that the store has not taken by then stay in the spool.

    Args:
        experiment: name of the experiment, created if absent; the recipe fills in ``{dataset}`` and ``{method}``. Runs
            to be compared belong into one experiment, so the default leaves the method out.
        run_name: name of the run; null lets MLflow invent one.
        tracking_uri: the store; null is `$MLFLOW_TRACKING_URI` if set, else `sqlite:///mlflow.db` in the working
            directory.
        artifact_location: of a new experiment, e.g. `s3://bucket/wmtp`; null is the store's default.
        parent_run_id: the run that this one is shown below; ``training`` is the run that trained the evaluated model.
        system_metrics_seconds: between figures of CPU, memory, disk, network and GPU; null for none.
        flush_seconds: for :meth:`close` to go on trying while nothing is accepted.
        log_export: log exported models as artifact `export`, or by reference if they are in S3.
        tags: further tags of the run, by name.

    Raises:
        ValueError: a store that cannot be used, or credentials that it refuses.
    """

    experiment: str = "wmtp/{dataset}"
    run_name: str | None = None
    tracking_uri: str | None = None
    artifact_location: str | None = None
    parent_run_id: str | None = None
    system_metrics_seconds: float | None = 30.0
    flush_seconds: float = 60.0
    log_export: bool = True
    tags: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if self.tracking_uri is not None and mask_secrets(self.tracking_uri) != self.tracking_uri:
            raise UserError(
                "tracking_uri holds a password, and a config is kept with the results; set it as MLFLOW_TRACKING_URI, "
                "or the password as MLFLOW_TRACKING_PASSWORD"
            )
        for name in ("system_metrics_seconds", "flush_seconds"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UserError(f"{name} must be > 0, got {value}")
        _fill(self.experiment, method="m", dataset="d")
        self._uri = store_uri(self.tracking_uri)
        check_store(self._uri)
        self._spool: Spool | None = None
        self._sender: Sender | None = None
        self._system: SystemMetrics | None = None
        self._delivery: Delivery | None = None

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until the store has given one."""
        return None if self._delivery is None else self._delivery.run_id

    @property
    def where(self) -> str:
        """Store, experiment and run, as a text for people."""
        run = f"run {self.run_id}" if self.run_id else "the run begins there when the store answers"
        return f"{mask_secrets(self._uri)} (experiment {self.experiment}, {run})"

    def connect(
        self,
        output_dir: Path,
        *,
        method: str,
        dataset: str,
        run_id: str | None = None,
        resumed: bool = False,
        training_run_id: str | None = None,
        log: Callable[[str], None] = print,
    ) -> None:
        """Opens the store. Nothing is written yet, neither to the store nor to disk.

        Args:
            output_dir: the run's folder, which will hold the spool.
            run_id: MLflow's id of a resumed run, if it is known.
            resumed: the run in output_dir is resumed; its spool names it even if it has no id yet.
            training_run_id: the run that trained the model which this one evaluates.
            log: called with lines about a store that fails; one that refuses raises an error.
        """
        parent = training_run_id if self.parent_run_id == "training" else self.parent_run_id
        if parent is None and self.parent_run_id is not None:
            raise UserError(
                "parent_run_id is training, but the model's folder has no wmtp_run.json that names its run; set "
                "parent_run_id to a run's id, or to null"
            )
        self._output_dir, self._log, self._resumed = output_dir, log, resumed
        self._run: dict[str, Any] = {
            "experiment": _fill(self.experiment, method=method, dataset=dataset),
            "run_name": self.run_name,
            "artifact_location": self.artifact_location,
            "parent_run_id": parent,
            "tracking_uri": mask_secrets(self._uri),
            "uri_in_config": self.tracking_uri is not None,
            "key": uuid.uuid4().hex,
            "started": _now(),
            "run_id": run_id,
        }
        kept = read_run(output_dir) if resumed else {}
        if kept and run_id in (None, kept.get("run_id")):
            self._run |= {name: kept.get(name) for name in ("experiment", "key", "started", "run_id")}
        self.experiment = self._run["experiment"]
        self._delivery = Delivery(self._uri, self._run, output_dir)
        seconds = _FILE_SECONDS if self._uri.startswith("sqlite:") else _STORE_SECONDS
        self._sender = Sender(self._delivery, log, seconds)

    def start(self) -> None:
        """Begins or resumes the run: later calls are recorded, and sent as soon as possible."""
        self._spool = Spool(self._output_dir)
        self._spool.set_run(**self._run)
        if self._resumed:
            self._record("resumed")
        self._sender.start(self._spool)
        if self.tags:
            self.log_tags(self.tags)
        if self.system_metrics_seconds is not None:
            started = self._run["started"]
            log = lambda metrics: self.log_dict(metrics, (_now() - started) // 1000)
            self._system = SystemMetrics(self.system_metrics_seconds, log)

    def log_config(self, config: DictConfig) -> None:
        """Logs all config values as params, and the resolved config as artifact config.yaml."""
        flat = _flatten(OmegaConf.to_container(config, resolve=True))
        self._record("params", params={key: mask_secrets(str(value)) for key, value in flat.items()})
        self.log_text(OmegaConf.to_yaml(config, resolve=True), "config.yaml")

    def log_tags(self, tags: Mapping[str, object]) -> None:
        """Sets tags, and replaces existing ones of the same names."""
        self._record("tags", tags={key: mask_secrets(str(value)) for key, value in tags.items()})

    def log_dataset(self, name: str, sha256: str, section: Mapping[str, object], context: str) -> None:
        """Logs the data as the run's input, with the first 36 digits of their hash: MLflow keeps no more.

        Args:
            section: the config's section that builds them; its ``source`` is their path.
            context: ``training`` or ``evaluation``.
        """
        source = section.get("source")
        kind = "code" if source is None else "s3" if str(source).startswith("s3://") else "local"
        where = {"tags": {"mlflow.source.name": section.get("_component_")}} if source is None else {"uri": source}
        texts = {"source": json.dumps(where), "profile": json.dumps({"sha256": sha256})}
        texts = {key: mask_secrets(text) for key, text in texts.items()}
        self._record("dataset", name=name, digest=sha256[:36], source_type=kind, context=context, **texts)

    def log(self, name: str, data: float, step: int) -> None:
        """Logs one metric of a step."""
        self.log_dict({name: data}, step)

    def log_dict(self, payload: Mapping[str, float], step: int) -> None:
        """Logs a step's metrics: numbers or tensors with one element. An integer beyond float64 becomes infinite."""
        self._record("metrics", step=step, metrics={name: _number(value) for name, value in payload.items()})

    def log_text(self, text: str, file: str) -> None:
        """Logs a text as the artifact `file`, secrets masked."""
        self._record("text", text=mask_secrets(text), file=file)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Logs a file or a folder as an artifact. It is read when it is sent, so it must stay until the run ends."""
        self._record("artifact", path=self._below(path), folder=folder)

    def log_model(self, folder: Path, run_file: Path, reference: Mapping[str, object] | None) -> None:
        """Logs a model's folder as an artifact of its name, or a reference to it as ``name.json``.

        Args:
            run_file: a JSON file in the folder that names the run; a run id that is not known yet is filled in later.
            reference: uri and sha256 of a copy that readers of the artifact can reach; None logs the folder itself.
        """
        if self.run_id is None:
            self._record("run_file", path=self._below(run_file))
        if self.log_export and reference is None:
            self.log_artifact(folder)
        elif self.log_export:
            self.log_text(json.dumps(reference, indent=1), f"{folder.name}.json")

    def close(self, status: str = "FINISHED") -> None:
        """Ends the run as FINISHED, FAILED or KILLED, and waits until the store has all records, or `flush_seconds`."""
        if self._spool is None or self._sender is None:
            if self._sender is not None:
                self._sender.stop()
            return
        if self._system is not None:
            self._system.stop()
        try:
            self._record("status", status=status)
        except OSError as error:  # of a full disk; earlier records are sent all the same
            self._log(f"WARNING: tracking: that the run is {status} could not be recorded: {one_line(error)}")
        left = self._sender.close(self.flush_seconds)
        refused = self._spool.folder / "refused.jsonl"
        if refused.exists():
            self._log(f"tracking: the store refused {len(refused.read_text().splitlines())} records, kept in {refused}")
        if left:
            self._log(
                f"WARNING: tracking: {left} records have not reached {mask_secrets(self._uri)} "
                f"({self._sender.failure or 'no answer'}); they are kept in {self._spool.folder}: send them with "
                f"python -m wmtp.tracking replay {self._output_dir}"
            )
        self._spool = None

    def _below(self, path: Path) -> str:
        """Returns a path relative to output_dir if it lies there: the folder may move before all is sent."""
        path, own = path.absolute(), self._output_dir.absolute()
        return path.relative_to(own).as_posix() if path.is_relative_to(own) else str(path)

    def _record(self, kind: str, **content: object) -> None:
        self._spool.append({"kind": kind, "time": _now(), **content})


def _now() -> int:
    """Returns the milliseconds since 1970, as MLflow counts."""
    return time.time_ns() // 1_000_000


def _number(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # an int beyond float64
        return math.inf if value > 0 else -math.inf


def _fill(template: str, **values: str) -> str:
    try:
        return template.format(**values)
    except (KeyError, IndexError, ValueError) as error:
        part = str(error).strip("'")
        raise UserError(
            f"experiment {template!r} has a part {{{part}}} that nothing fills in; use {{method}} and {{dataset}}"
        ) from None


def _flatten(value: Any, name: str = "") -> dict[str, object]:
    """Returns the leaves of nested dicts and lists by their dotted names; an empty one is a leaf."""
    if not (isinstance(value, dict | list) and value):
        return {name: value}
    flat: dict[str, object] = {}
    for key, child in value.items() if isinstance(value, dict) else enumerate(value):
        flat |= _flatten(child, f"{name}.{key}" if name else str(key))
    return flat
