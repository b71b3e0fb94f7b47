"""Checkpoint folders in MLflow: artifacts of runs, and registered models."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from wmtp.errors import mask_secrets
from wmtp.files import cache_folder
from wmtp.pretrained.config_files import CheckpointError
from wmtp.pretrained.folders import checkpoint_sha256, made_once
from wmtp.storage import is_remote, local_copy
from wmtp.tracking.store import absolute, mlflow_client, sqlite_file, store_uri


def from_mlflow(name: str) -> Path:
    """Returns the folder of ``runs:/<run id>/<path>``, ``models:/<name>@<alias>`` or ``models:/<name>/<version>``.

    It is fetched once for each end of its run. Where the run has ``<path>.json`` in place of ``<path>``, a reference of
    uri and sha256, the folder comes from that uri and must have that hash.

    Raises:
        CheckpointError: no such store, run, artifact, model, alias or version; or another model behind a reference.
    """
    uri = absolute(store_uri())
    file = sqlite_file(uri)
    if file is not None and not file.exists():  # opening it would make an empty one
        raise CheckpointError(
            f"{name}: the MLflow store {mask_secrets(uri)} does not exist; set MLFLOW_TRACKING_URI to the store of the "
            "run"
        )
    client = mlflow_client(uri)
    if name.startswith("models:/"):
        return _registered(client, uri, name)
    run_id, _, artifact = name.removeprefix("runs:/").strip("/").partition("/")
    if not run_id or not artifact:
        raise CheckpointError(f"{name} must be runs:/<run id>/<artifact path>, such as runs:/0a1b2c/value_model")
    return _artifact(client, uri, run_id, artifact, name)


def _registered(client, uri: str, name: str) -> Path:
    from mlflow.exceptions import MlflowException

    given = name.removeprefix("models:/").strip("/")
    model, at, alias = given.partition("@")
    model, _, version = (model, "", "") if at else given.partition("/")
    if not model or not (alias or version) or "/" in version:
        raise CheckpointError(f"{name} must be models:/<name>@<alias> or models:/<name>/<version>")
    try:
        by_alias = client.get_model_version_by_alias
        found = by_alias(model, alias) if alias else client.get_model_version(model, version)
        base = client.get_run(found.run_id).info.artifact_uri.rstrip("/") if found.run_id else None
    except MlflowException as error:
        raise CheckpointError(f"{name}: not in the MLflow store {mask_secrets(uri)}: {_first_line(error)}") from error
    source = found.source.rstrip("/")
    if base is not None and source.startswith(f"{base}/"):
        return _artifact(client, uri, found.run_id, source.removeprefix(f"{base}/"), name)
    if source.startswith("runs:/"):
        run_id, _, artifact = source.removeprefix("runs:/").partition("/")
        return _artifact(client, uri, run_id, artifact, name)
    if is_remote(source) or Path(source).is_dir():
        return _held_against(local_copy(source), found.tags.get("wmtp.model_sha256"), name, source)
    raise CheckpointError(f"{name}: its source {mask_secrets(source)} is no artifact of a run, S3 prefix or folder")


def _artifact(client, uri: str, run_id: str, artifact: str, name: str) -> Path:
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise CheckpointError(
            f"{name}: the MLflow store {mask_secrets(uri)} has no run {run_id} ({_first_line(error)}); set "
            "MLFLOW_TRACKING_URI to the store of the run"
        ) from error
    # A resumed run may have written the artifact again; then its end time differs too.
    digest = hashlib.sha256(f"{uri} {artifact} {run.info.end_time}".encode()).hexdigest()[:12]
    folder = cache_folder() / "mlflow" / f"{run_id}-{Path(artifact).name}-{digest}"
    if not folder.is_dir():
        reference = _reference(client, run_id, artifact, name)
        if reference is not None:
            return _held_against(local_copy(reference["uri"]), reference["sha256"], name, reference["uri"])
    with made_once(folder) as partial:
        if partial is not None:
            _fetch(client, run_id, artifact, partial, name)
    return folder


def _reference(client, run_id: str, artifact: str, name: str) -> dict | None:
    """Reads the reference ``<artifact>.json``; returns None where the run holds the folder itself."""
    with _clear_errors(name):
        parent = Path(artifact).parent.as_posix()
        there = {item.path for item in client.list_artifacts(run_id, None if parent == "." else parent)}
        if artifact in there:
            return None
        if f"{artifact}.json" not in there:
            shown = ", ".join(sorted(there)) or "nothing"
            raise CheckpointError(f"{name}: the run has no artifact folder {artifact}; it has {shown}")
        with TemporaryDirectory() as folder:
            reference = json.loads(Path(client.download_artifacts(run_id, f"{artifact}.json", folder)).read_text())
    if not {"uri", "sha256"} <= reference.keys():
        raise CheckpointError(f"{name}: {artifact}.json of the run is no reference: it lacks uri or sha256")
    return reference


def _fetch(client, run_id: str, artifact: str, partial: Path, name: str) -> None:
    with _clear_errors(name):
        (partial / "download").mkdir(parents=True)
        Path(client.download_artifacts(run_id, artifact, str(partial / "download"))).rename(partial / "whole")
    for item in (partial / "whole").iterdir():
        item.rename(partial / item.name)
    (partial / "whole").rmdir()
    shutil.rmtree(partial / "download")


def _held_against(folder: Path, sha256: str | None, name: str, uri: str) -> Path:
    """Returns the folder, after a check that it holds the model of this hash."""
    if sha256 is not None and checkpoint_sha256(folder) != sha256:
        raise CheckpointError(
            f"{name}: {uri} holds another model now (its SHA-256 is not {sha256:.12}...); restore it, or name a run "
            "whose export is there"
        )
    return folder


@contextmanager
def _clear_errors(name: str) -> Iterator[None]:
    """Turns the errors of any artifact store inside this context into one line."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{name}: the artifact cannot be fetched: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return mask_secrets(next((line for line in str(error).splitlines() if line.strip()), type(error).__name__))
