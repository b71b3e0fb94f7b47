"""The MLflow store of a process: its URI, its checks, its client, and the names it accepts."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

from wmtp.errors import UserError, mask_secrets, one_line

MAX_PARAM = 6000  # characters of a param's value that MLflow keeps
MAX_TAG = 8000
MAX_NAME = 250
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_PROBE_SECONDS = 5.0

_of_config: str | None = None


def use_store(uri: str | None) -> None:
    """Makes the store of a config this process's own: for its run, and for ``runs:/`` and ``models:/`` names."""
    global _of_config
    _of_config = uri


def store_uri(given: str | None = None) -> str:
    """Returns the store: the given one, the config's (:func:`use_store`), ``$MLFLOW_TRACKING_URI``, or mlflow.db here.

    A SQLite file has its absolute path, so that the URI also holds in another working directory.
    """
    uri = given or _of_config or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    file = sqlite_file(uri)
    return uri if file is None else f"sqlite:///{file.absolute()}"


def sqlite_file(uri: str) -> Path | None:
    """Returns the file of a SQLite store, None for any other store."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


def check_store(uri: str) -> None:
    """Refuses a store that can never be used. A store that is down or slow passes: runs go on without it.

    Raises:
        ValueError: no kind of MLflow store, a path that is no SQLite file, or credentials that a server refuses.
    """
    shown, scheme = mask_secrets(uri), uri.partition(":")[0].partition("+")[0].lower()
    where = f"tracking_uri {shown!r}"
    if scheme == "s3":
        raise UserError(f"{where} is no MLflow store; S3 holds artifacts: set artifact_location to it instead")
    known = ("http", "https", "databricks", *_DATABASES)
    if scheme not in known and scheme not in {plugin.name for plugin in entry_points(group="mlflow.tracking_store")}:
        raise UserError(f"{where} is no MLflow store; use sqlite:///FILE, a database or http(s)://HOST")
    file = sqlite_file(uri)
    if file is not None and not file.parent.is_dir():
        raise UserError(f"{where}: the folder {file.parent} does not exist; make it, or give another file")
    if file is not None and file.is_dir():
        raise UserError(f"{where}: {file} is a folder; give a file in it, such as {file / 'mlflow.db'}")
    if file is not None and file.exists() and file.stat().st_size:
        with file.open("rb") as start:
            if start.read(16) != b"SQLite format 3\0":
                raise UserError(f"{where}: {file} is no SQLite file; give another")
    if scheme in ("http", "https"):
        if not urlsplit(uri).hostname:
            raise UserError(f"{where} names no host; use http(s)://HOST:PORT")
        _check_credentials(uri, where)


def refused_credentials(where: str, status: int) -> str:
    """Returns the message for a store that answers 401 or 403."""
    return (
        f"{where} refuses the credentials (HTTP {status}); set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
        "or MLFLOW_TRACKING_TOKEN"
    )


def _check_credentials(uri: str, where: str) -> None:
    """Refuses credentials that a server answers with 401 or 403, without mlflow, whose import takes seconds."""
    import requests

    if os.environ.get("MLFLOW_TRACKING_AUTH") or os.environ.get("MLFLOW_TRACKING_AWS_SIGV4"):
        return  # only mlflow can sign such requests
    user, password, token = (os.environ.get(f"MLFLOW_TRACKING_{name}") for name in ("USERNAME", "PASSWORD", "TOKEN"))
    url = f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
    try:
        answer = requests.get(
            url,
            headers={"Authorization": f"Bearer {token}"} if token else None,
            auth=(user, password or "") if user else None,  # otherwise the user and password in the URL, if any
            timeout=_PROBE_SECONDS,
        )
    except requests.RequestException:
        return  # down or slow: the sender tries again and reports it
    if answer.status_code in (401, 403):
        raise UserError(refused_credentials(where, answer.status_code))


def mlflow_client(uri: str):
    """Returns an `MlflowClient` with few retries of its own, for callers that try again."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # mlflow's 7 retries take minutes
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # mlflow would report usage, even from a closed cluster
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # several for each run that is read
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def existing_client(uri: str, kind: type[UserError], name: str = ""):
    """Returns an `MlflowClient` on a store that exists: of an absent SQLite file mlflow would make an empty one."""
    file = sqlite_file(uri)
    if file is not None and not file.exists():
        raise kind(f"{name}the MLflow store {uri} does not exist; set MLFLOW_TRACKING_URI to the store of the runs")
    return mlflow_client(uri)


def artifacts(client, run_id: str, folder: str = "") -> set[str]:
    """Returns the paths of a run's artifacts in a folder of them."""
    return {item.path for item in client.list_artifacts(run_id, None if folder in ("", ".") else folder)}


def artifact_text(client, run_id: str, path: str) -> str | None:
    """Returns the text of a run's artifact, None if the run has none of that path."""
    if path not in artifacts(client, run_id, Path(path).parent.as_posix()):
        return None
    with TemporaryDirectory() as folder:
        return Path(client.download_artifacts(run_id, path, folder)).read_text(encoding="utf-8")


@contextmanager
def clear_store_errors(what: str, kind: type[UserError], way_out: str = "") -> Iterator[None]:
    """Turns an error of MLflow or of any artifact store into one of that kind, whose line begins with `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each store has errors of its own
        raise kind(f"{what}: {one_line(error):.300}{way_out}") from error


def entity_name(name: str) -> str:
    """Returns a metric's or param's name as MLflow accepts it: ``pass@1`` becomes ``pass_at_1``, other signs ``_``."""
    name = re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"))
    parts = [part if part.strip(".") else "_" * len(part) for part in name.split("/") if part]
    return "/".join(parts)[:MAX_NAME].rstrip("/") or "_"
