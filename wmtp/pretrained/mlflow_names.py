"""Checkpoint folders in MLflow: artifacts of runs, and registered models."""

import hashlib
import json
import shutil
from pathlib import Path

from wmtp.errors import mask_secrets
from wmtp.files import cache_folder, unfinished
from wmtp.pretrained.config_files import CheckpointError
from wmtp.pretrained.folders import checkpoint_sha256, made_once
from wmtp.storage import is_remote, local_copy
from wmtp.tracking.store import artifact_text, artifacts, clear_store_errors, existing_client, store_uri


def from_mlflow(name: str) -> Path:
    """Returns the folder of ``runs:/<run id>/<path>``, ``models:/<name>@<alias>`` or ``models:/<name>/<version>``.

    It is fetched once for each end of its run. Where the run has ``<path>.json`` in place of ``<path>``, a reference of
    uri and sha256, the folder comes from that uri and must have that hash.

    Raises:
        CheckpointError: no such store, run, artifact, model, alias or version; or another model behind a reference.
    """
    uri = store_uri()
    kind, _, place = name.partition(":/")
    place = place.strip("/")
    with clear_store_errors(f"{name}: not in the MLflow store {mask_secrets(uri)}", CheckpointError):
        client = existing_client(uri, CheckpointError)
        if kind == "models":
            source, sha256 = _registered(client, name, place)
            if is_remote(source) or Path(source).is_dir():
                return _held_against(local_copy(source), sha256, name, source)
            if not source.startswith("runs:/"):
                shown = mask_secrets(source)
                raise CheckpointError(f"{name}: its source {shown} is no artifact of a run, S3 prefix or folder")
            place = source.removeprefix("runs:/")
    run_id, _, artifact = place.partition("/")
    if not run_id or not artifact:
        raise CheckpointError(f"{name} must be runs:/<run id>/<artifact path>, such as runs:/0a1b2c/value_model")
    what = f"{name}: the MLflow store {mask_secrets(uri)} has no run {run_id}"
    with clear_store_errors(what, CheckpointError, "; set MLFLOW_TRACKING_URI to the store of the run"):
        ended = client.get_run(run_id).info.end_time
    # A resumed run may have written the artifact again; then its end time differs too.
    digest = hashlib.sha256(f"{uri} {artifact} {ended}".encode()).hexdigest()[:12]
    folder = cache_folder() / "mlflow" / f"{run_id}-{Path(artifact).name}-{digest}"
    if folder.is_dir():
        return folder
    with clear_store_errors(f"{name}: the artifact cannot be fetched", CheckpointError):
        return _fetched(client, run_id, artifact, folder, name)


def _registered(client, name: str, place: str) -> tuple[str, str | None]:
    """Returns where a model version is, ``runs:/...`` if a run has it, and the hash that it must have."""
    model, _, alias = place.partition("@")
    model, _, version = (model, "", "") if alias else place.partition("/")
    if not model or not (alias or version) or "/" in version:
        raise CheckpointError(f"{name} must be models:/<name>@<alias> or models:/<name>/<version>")
    found = client.get_model_version_by_alias(model, alias) if alias else client.get_model_version(model, version)
    source = found.source.rstrip("/")
    if found.run_id:
        base = client.get_run(found.run_id).info.artifact_uri.rstrip("/")
        if source.startswith(f"{base}/"):
            source = f"runs:/{found.run_id}/{source.removeprefix(f'{base}/')}"
    return source, found.tags.get("wmtp.model_sha256")


def _fetched(client, run_id: str, artifact: str, folder: Path, name: str) -> Path:
    there = artifacts(client, run_id, Path(artifact).parent.as_posix())
    if artifact not in there:
        text = artifact_text(client, run_id, f"{artifact}.json")
        if text is None:
            shown = ", ".join(sorted(there)) or "nothing"
            raise CheckpointError(f"{name}: the run has no artifact folder {artifact}; it has {shown}")
        reference = json.loads(text)
        if not {"uri", "sha256"} <= reference.keys():
            raise CheckpointError(f"{name}: {artifact}.json of the run is no reference: it lacks uri or sha256")
        return _held_against(local_copy(reference["uri"]), reference["sha256"], name, reference["uri"])
    with made_once(folder) as partial:
        if partial is not None:
            download = unfinished(partial)
            download.mkdir()
            Path(client.download_artifacts(run_id, artifact, str(download))).rename(partial)
            shutil.rmtree(download)
    return folder


def _held_against(folder: Path, sha256: str | None, name: str, uri: str) -> Path:
    """Returns the folder, after a check that it holds the model of this hash."""
    if sha256 is not None and checkpoint_sha256(folder) != sha256:
        raise CheckpointError(
            f"{name}: {uri} holds another model now (its SHA-256 is not {sha256:.12}...); restore it, or name a run "
            "whose export is there"
        )
    return folder
