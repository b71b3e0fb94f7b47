"""The store's side of one run: its experiment, its run, and its records. To send a record twice changes nothing."""

import json
from itertools import takewhile
from pathlib import Path
from typing import Any

from wmtp.errors import UserError, mask_secrets, one_line
from wmtp.files import MANIFEST, write_manifest, write_whole
from wmtp.tracking.spool import Position, Spool
from wmtp.tracking.store import (
    MAX_NAME,
    MAX_PARAM,
    MAX_TAG,
    entity_name,
    mlflow_client,
    refused_credentials,
    sqlite_file,
)

RUN_KEY = "wmtp.run_key"
_METRICS_PER_BATCH, _OTHERS_PER_BATCH = 1000, 100  # MLflow's own limits
_RECORDS_AT_ONCE = 200


class Refused(UserError):
    """A refusal of the store that another try would meet again."""


class Delivery:
    """A connection to the store for one run: finds or creates its experiment and run, and sends its records.

    Args:
        run: the spool's run.json: experiment, run_name, artifact_location, key, run_id, parent_run_id, started.
        output_dir: the folder that artifacts' paths are relative to.
    """

    def __init__(self, uri: str, run: dict, output_dir: Path) -> None:
        self._uri, self._run, self._output_dir = uri, run, output_dir
        self._client: Any = None
        self.run_id: str | None = run.get("run_id")

    def connect(self) -> None:
        """Opens the store and looks for the experiment and for the run if it is resumed. It creates nothing.

        Raises:
            Refused: wrong credentials, an unusable database, a deleted experiment, or no such run.
        """
        try:
            self._client = mlflow_client(self._uri)
            found = self._client.get_experiment_by_name(self._run["experiment"])
            if self.run_id is not None:
                self._client.get_run(self.run_id)
        except Exception as error:
            self._client = None
            status, where = _http_status(error), f"tracking_uri {mask_secrets(self._uri)!r}"
            if status in (401, 403):
                raise Refused(refused_credentials(where, status)) from error
            local = sqlite_file(self._uri) is not None and "locked" not in str(error)
            if local or (400 <= status < 500 and status not in (408, 429)):
                raise Refused(f"{where} cannot be used: {one_line(error):.300}") from error
            raise
        if found is not None and found.lifecycle_stage == "deleted":
            raise Refused(
                f"experiment {self._run['experiment']!r} is deleted in {mask_secrets(self._uri)}; restore it there, or "
                "set tracking.experiment to another name"
            )

    def open_run(self) -> str:
        """Returns the id of the resumed run, of one that an unanswered request created, or of a new one."""
        if self.run_id is None:
            experiment, key, parent = self._experiment(), self._run["key"], self._run.get("parent_run_id")
            made = self._client.search_runs([experiment], f"tags.`{RUN_KEY}` = '{key}'")
            tags = {RUN_KEY: key, **({"mlflow.parentRunId": parent} if parent else {})}
            facts = {"start_time": self._run["started"], "tags": tags, "run_name": self._run.get("run_name")}
            run = made[0] if made else self._client.create_run(experiment, **facts)
            self.run_id = run.info.run_id
        return self.run_id

    def _experiment(self) -> str:
        name = self._run["experiment"]
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return self._client.create_experiment(name, self._run.get("artifact_location"))
            except Exception:
                found = self._client.get_experiment_by_name(name)  # another run may have created it in between
                if found is None:
                    raise
        return found.experiment_id

    def send(self, records: list[dict]) -> None:
        """Sends records of metrics, or one of another kind. A record that the store already has changes nothing."""
        if records[0]["kind"] == "metrics":
            self._send_metrics(records)
        else:
            getattr(self, f"_send_{records[0]['kind']}")(records[0])

    def _send_metrics(self, records: list[dict]) -> None:
        from mlflow.entities import Metric

        batch = [
            Metric(entity_name(key), value, record["time"], record["step"])
            for record in records
            for key, value in record["metrics"].items()
        ]
        self._log("metrics", batch, _METRICS_PER_BATCH)

    def _send_params(self, record: dict) -> None:
        """Sends new params. Params that an earlier process of the run logged stay; a tag gives each changed value.

        A value that was changed back has its tag too; the tag of a key that the config no longer has says None.
        """
        from mlflow.entities import Param

        data = self._client.get_run(self.run_id).data
        given = {entity_name(key): value[:MAX_PARAM] for key, value in record["params"].items()}
        self._log("params", [Param(key, value) for key, value in given.items() if key not in data.params])
        changed = {}
        for key, old in data.params.items():
            tag, value = f"wmtp.resumed_with.{key}"[:MAX_NAME], given.get(key, "None")
            if value != old or tag in data.tags:
                changed[tag] = value
        self._send_tags({"tags": changed})

    def _send_tags(self, record: dict) -> None:
        from mlflow.entities import RunTag

        self._log("tags", [RunTag(key[:MAX_NAME], value[:MAX_TAG]) for key, value in record["tags"].items()])

    def _log(self, kind: str, entities: list, at_once: int = _OTHERS_PER_BATCH) -> None:
        for start in range(0, len(entities), at_once):
            self._client.log_batch(self.run_id, **{kind: entities[start : start + at_once]})

    def _send_dataset(self, record: dict) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = Dataset(**{key: record[key] for key in ("name", "digest", "source_type", "source", "profile")})
        tags = [InputTag("mlflow.data.context", record["context"])]
        self._client.log_inputs(self.run_id, [DatasetInput(data, tags)])

    def _send_text(self, record: dict) -> None:
        self._client.log_text(self.run_id, record["text"], record["file"])

    def _send_artifact(self, record: dict) -> None:
        # File by file, in this thread: mlflow would send a folder from a pool that delays the end of the process.
        path = self._output_dir / record["path"]
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            below = file.parent.relative_to(path.parent).as_posix()
            folder = "/".join(part for part in (record["folder"], below) if part not in (None, "."))
            self._client.log_artifact(self.run_id, str(file), folder or None)

    def _send_run_file(self, record: dict) -> None:
        """Sends nothing: it writes the run's id into a model that was exported before the run had one."""
        path = self._output_dir / record["path"]
        write_whole(path, json.dumps({**json.loads(path.read_text()), "run_id": self.run_id}, indent=1) + "\n")
        if (path.parent / MANIFEST).exists():
            write_manifest(path.parent)

    def _send_status(self, record: dict) -> None:
        self._client.set_terminated(self.run_id, record["status"], end_time=record["time"])

    def _send_resumed(self, record: dict) -> None:
        self._client.update_run(self.run_id, status="RUNNING")


def deliver(spool: Spool, delivery: Delivery) -> int:
    """Sends the next records of the spool, and returns their number. Records that can never be sent are set aside."""
    waiting = spool.unsent(_RECORDS_AT_ONCE)
    batch = list(takewhile(lambda item: item[0]["kind"] == "metrics", waiting)) or waiting[:1]
    if batch:
        _deliver(spool, delivery, batch)
    return len(batch)


def _deliver(spool: Spool, delivery: Delivery, batch: list[tuple[dict, Position]]) -> None:
    records, positions = zip(*batch, strict=True)
    try:
        delivery.send(list(records))
    except Exception as error:
        # The store would refuse the same again: a bad value, or a file that is gone.
        never = isinstance(error, FileNotFoundError) or _http_status(error) == 400
        name = records[0].get("path") or records[0].get("file")
        if not never and name:  # a file: its store may fail alone, so it goes behind all other records
            spool.append(records[0])
            spool.mark_sent(*positions)
            raise RuntimeError(f"{name}: {one_line(error):.300}") from error
        if not never:
            raise
        if len(batch) == 1:
            spool.refuse(records[0], f"{one_line(error):.300}")
        else:
            for item in batch:  # one of them is to blame
                _deliver(spool, delivery, [item])
    spool.mark_sent(*positions)


def _http_status(error: BaseException) -> int:
    """Returns the HTTP status behind an error of mlflow's, 0 if there is none."""
    for part in (error, error.__cause__, error.__context__):
        status = getattr(part, "get_http_status_code", None)
        if status is not None:
            # A proxy answers without mlflow's JSON: its code is only in the text.
            return next((code for code in (401, 403) if f"error code {code}" in str(error)), status())
    return 0
