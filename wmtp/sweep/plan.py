"""What a study must be the same in for all its workers: config, code and data; and its parent run in MLflow."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import wmtp
from wmtp.errors import mask_secrets
from wmtp.files import content_sha256
from wmtp.storage import is_remote
from wmtp.sweep.cells import Cell, SweepError, loaded
from wmtp.tracking.environment import code_sha256, environment_tags
from wmtp.tracking.store import clear_store_errors, mlflow_client, store_uri

# Keys that say where and how fast cells run, not what they are.
_SCHEDULING = {
    "storage", "max_parallel", "devices", "max_hours", "max_cells", "retry_failed", "accept_changes",
    "heartbeat_seconds", "tracking",
}  # fmt: skip
_NO_PART_OF_A_RUN = ("report", "sweep")  # rooms of wmtp that a cell's figures do not depend on


def plan(cfg: DictConfig, cells: Iterable[Cell]) -> dict[str, Any]:
    """Returns all that decides on a study's results: its config, those of its runs, hashes of code and local data.

    Args:
        cells: all that runs: what is prepared, trained and evaluated.

    Data in S3, and what a component reads by itself, is not looked at here: runs keep hashes of the documents.
    """
    settings = OmegaConf.to_container(cfg, resolve=True)
    cells = list(cells)
    configs = [(cell.config, loaded(cell.config)) for cell in cells]
    return {
        **{key: value for key, value in json.loads(json.dumps(settings)).items() if key not in _SCHEDULING},
        "configs": {file: json.loads(json.dumps(OmegaConf.to_container(cfg), default=str)) for file, cfg in configs},
        "code": _code({cell.recipe for cell in cells}),
        "data": {source: _sha256(Path(source)) for source in sorted(_sources(cells))},
    }


def _code(recipes: Iterable[str]) -> str:
    package = Path(wmtp.__file__).parent
    files = {path.relative_to(package.parent).as_posix(): path for path in package.rglob("*.py")}
    files = {name: path for name, path in files.items() if name.split("/")[1] not in _NO_PART_OF_A_RUN}
    return code_sha256({**files, **{recipe: Path(recipe) for recipe in recipes}})[:16]


def _sources(cells: Iterable[Cell]) -> set[str]:
    """Returns the local files and folders that the cells' datasets are made from."""
    found: set[str] = set()
    waiting: list[Any] = []
    for cell in cells:
        cfg = cell.settings()
        waiting += [cfg.get(key) for key in ("dataset", "eval_dataset")]
    while waiting:
        section = waiting.pop()
        if OmegaConf.is_dict(section):
            for key, value in section.items():
                if key in ("source", "root") and isinstance(value, str) and not is_remote(value):
                    found |= {value} if Path(value).expanduser().exists() else set()
                waiting.append(value)
    return found


def _sha256(path: Path) -> str:
    """Returns a hash of a file, or of all files below a folder."""
    path = path.expanduser()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    lines = [f"{file.relative_to(path).as_posix()} {content_sha256(file)}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


class ParentRun:
    """The MLflow run of a study, below which its trainings are shown.

    Args:
        tracking: the sweep's tracking section.
    """

    def __init__(self, tracking: Mapping[str, Any]) -> None:
        self._experiment = str(tracking.get("experiment", "wmtp/sweep"))
        if "{" in self._experiment:
            raise SweepError(
                f"tracking.experiment {self._experiment!r} has parts that runs fill in, but all runs of a sweep belong "
                "into one: give it a name of its own"
            )
        self._location = tracking.get("artifact_location")
        self._uri = store_uri(tracking.get("tracking_uri"))
        self._errors = lambda: clear_store_errors(
            f"MLflow store {mask_secrets(self._uri)}", SweepError, "; tracking=null runs the sweep without it"
        )
        self._client: Any = None
        self._logged: tuple[str, str] | None = None

    def create(self, study: str, run_name: str | None, settings: str) -> str:
        """Returns the id of a new run with the sweep's config."""
        with self._errors():
            self._client = mlflow_client(self._uri)
            found = self._client.get_experiment_by_name(self._experiment)
            there = found.experiment_id if found else self._client.create_experiment(self._experiment, self._location)
            tags = {**environment_tags(), "wmtp.sweep": study}
            run = self._client.create_run(there, tags=tags, run_name=run_name or study)
            self._client.log_text(run.info.run_id, settings, "sweep.yaml")
        return run.info.run_id

    def update(self, run_id: str, table: str, status: str) -> None:
        """Logs the table, and whether the study is RUNNING or FINISHED, where they are new."""
        if (table, status) == self._logged:
            return
        with self._errors():
            self._client = self._client or mlflow_client(self._uri)
            self._client.log_text(run_id, table, "table.json")
            self._client.update_run(run_id, status)
        self._logged = table, status
