"""The store's side of one run: its experiment, its run, and its records. To send a record twice changes nothing."""

import json
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
_METRICS_PER_BATCH = 1000  # MLflow's own limits
_PARAMS_PER_BATCH = 100
_FILES = ("artifact", "text")
_RECORDS_AT_ONCE = 200


class Refused(UserError):
    """A refusal of the store that another try would meet again."""


class Postponed(Exception):
    """An artifact that could not be sent and was put behind all other records: the file store may fail alone."""


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
        if self._client is None:
            self.connect()
        if self.run_id is not None:
            self._client.update_run(self.run_id, status="RUNNING")
            return self.run_id
        experiment = self._experiment()
        made = self._client.search_runs([experiment], f"tags.`{RUN_KEY}` = '{self._run['key']}'")
        if made:
            self.run_id = made[0].info.run_id
            return self.run_id
        tags = {RUN_KEY: self._run["key"]}
        if self._run.get("parent_run_id"):
            tags["mlflow.parentRunId"] = self._run["parent_run_id"]
        created = self._client.create_run(
            experiment, start_time=self._run["started"], tags=tags, run_name=self._run.get("run_name")
        )
        self.run_id = created.info.run_id
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
        """Sends records of one kind. A record that the store already has changes nothing."""
        getattr(self, f"_send_{records[0]['kind']}")(records)

    def _send_metrics(self, records: list[dict]) -> None:
        from mlflow.entities import Metric

        batch = [
            Metric(entity_name(key), value, record["time"], record["step"])
            for record in records
            for key, value in record["metrics"].items()
        ]
        self._log("metrics", batch, _METRICS_PER_BATCH)

    def _send_params(self, records: list[dict]) -> None:
        """Sends new params. Params that an earlier process of the run logged stay; a tag gives each changed value.

        A value that was changed back has its tag too; the tag of a key that the config no longer has says None.
        """
        from mlflow.entities import Param

        for record in records:
            data = self._client.get_run(self.run_id).data
            given = {entity_name(key): value[:MAX_PARAM] for key, value in record["params"].items()}
            new = [Param(key, value) for key, value in given.items() if key not in data.params]
            self._log("params", new, _PARAMS_PER_BATCH)
            changed = {}
            for key, old in data.params.items():
                tag, value = f"wmtp.resumed_with.{key}"[:MAX_NAME], given.get(key, "None")
                if value != old or tag in data.tags:
                    changed[tag] = value
            self._send_tags([{"tags": changed}])

    def _send_tags(self, records: list[dict]) -> None:
        from mlflow.entities import RunTag

        tags = {key[:MAX_NAME]: value[:MAX_TAG] for record in records for key, value in record["tags"].items()}
        self._log("tags", [RunTag(key, value) for key, value in tags.items()], _PARAMS_PER_BATCH)

    def _log(self, kind: str, entities: list, at_once: int) -> None:
        for start in range(0, len(entities), at_once):
            self._client.log_batch(self.run_id, **{kind: entities[start : start + at_once]})

    def _send_dataset(self, records: list[dict]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        for record in records:
            data = Dataset(**{key: record[key] for key in ("name", "digest", "source_type", "source", "profile")})
            tags = [InputTag("mlflow.data.context", record["context"])]
            self._client.log_inputs(self.run_id, [DatasetInput(data, tags)])

    def _send_text(self, records: list[dict]) -> None:
        for record in records:
            self._client.log_text(self.run_id, record["text"], record["file"])

    def _send_artifact(self, records: list[dict]) -> None:
        # File by file, in this thread: mlflow would send a folder from a pool that delays the end of the process.
        for record in records:
            path = self._output_dir / record["path"]
            if path.is_dir():
                for file in sorted(p for p in path.rglob("*") if p.is_file()):
                    below = file.parent.relative_to(path.parent).as_posix()
                    self._client.log_artifact(self.run_id, str(file), "/".join(filter(None, (record["folder"], below))))
            else:
                self._client.log_artifact(self.run_id, str(path), record["folder"])

    def _send_run_file(self, records: list[dict]) -> None:
        """Sends nothing: it writes the run's id into models that were exported before the run had one."""
        for record in records:
            path = self._output_dir / record["path"]
            write_whole(path, json.dumps({**json.loads(path.read_text()), "run_id": self.run_id}, indent=1) + "\n")
            if (path.parent / MANIFEST).exists():
                write_manifest(path.parent)

    def _send_status(self, records: list[dict]) -> None:
        self._client.set_terminated(self.run_id, records[-1]["status"], end_time=records[-1]["time"])

    def _send_resumed(self, records: list[dict]) -> None:
        self._client.update_run(self.run_id, status="RUNNING")


def deliver(spool: Spool, delivery: Delivery) -> int:
    """Sends the next records of the spool, all of one kind, and returns their number.

    Records that can never be sent are set aside.

    Raises:
        Postponed: an artifact failed. Any other exception is the store's.
    """
    waiting = spool.unsent(_RECORDS_AT_ONCE)
    if not waiting:
        return 0
    kind = waiting[0][0]["kind"]
    batch: list[tuple[dict, Position]] = []
    for record, position in waiting:
        if record["kind"] != kind or (batch and kind in _FILES):
            break
        batch.append((record, position))
    try:
        delivery.send([record for record, _ in batch])
    except Exception as error:
        if kind in _FILES and not _never(error):
            spool.append(batch[0][0])
            spool.mark_sent(batch[0][1])
            raise Postponed(f"{batch[0][0].get('path') or batch[0][0].get('file')}: {one_line(error):.300}") from error
        if not _never(error):
            raise
        for record, position in batch:  # one of them is to blame
            try:
                delivery.send([record])
            except Exception as again:
                if not _never(again):
                    raise
                spool.refuse(record, f"{one_line(again):.300}")
            spool.mark_sent(position)
    else:
        spool.mark_sent(*(position for _, position in batch))
    return len(batch)


def _http_status(error: BaseException) -> int:
    """Returns the HTTP status behind an error of mlflow's, 0 if there is none."""
    for part in (error, error.__cause__, error.__context__):
        status = getattr(part, "get_http_status_code", None)
        if status is not None:
            text = str(error)
            for code in (401, 403):  # a proxy answers without mlflow's JSON: its code is only in the text
                if f"error code {code}" in text:
                    return code
            return status()
    return 0


def _never(error: BaseException) -> bool:
    """Returns whether the store would refuse the same record again: a bad value, or a file that is gone."""
    return isinstance(error, FileNotFoundError) or _http_status(error) == 400
