"""Finished runs as values, from their output folders or from MLflow, and whether they may be compared."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from omegaconf import OmegaConf

from wmtp.errors import UserError, mask_secrets
from wmtp.tracking import METRICS, TAGS
from wmtp.tracking.environment import config_sha256
from wmtp.tracking.spool import read_run
from wmtp.tracking.store import artifact_text, artifacts, clear_store_errors, existing_client, store_uri
from wmtp.training.run_log import held_out_file, read_metrics

_EVALUATIONS = ("results.json", "heads.json")
_SAME_TOKENS = 0.01  # target tokens of two runs may differ by so much: a step ends with a whole micro-batch
_OF_A_RUN = ("seed", "output_dir", "tracking", "resume", "overwrite")  # keys in which runs of one cell differ
_SWEEP = re.compile(r"cells/([^/]+)/seed-\d+/?$")  # the output_dir of a sweep's training run


@dataclass(frozen=True)
class Run:
    """What a training run left behind.

    Attributes:
        name: as it was asked for.
        source: its folder, or its MLflow id.
        run_id: in MLflow; None where it is in none.
        config: resolved.
        facts: its tags without ``wmtp.``: method, dataset, data_sha256, config_sha256, git_commit, recipe, ...
        metrics: each by its name: (step, value), by step.
        held_out: the documents of the last evaluation, with the columns of
            :meth:`wmtp.training.validation.HeldOut.write` and ``sha256`` of each set in ``attrs``; None where there is
            none.
        evaluations: results.json and heads.json, by the names of the evaluations.
        state: as MLflow has it; of a folder ``FINISHED``, or ``UNFINISHED`` where it has no export and its last step is
            not the config's.
    """

    name: str
    source: str
    run_id: str | None
    config: dict[str, Any]
    facts: dict[str, str]
    metrics: dict[str, list[tuple[int, float]]]
    held_out: pd.DataFrame | None
    evaluations: dict[str, dict]
    state: str

    @property
    def seed(self) -> int:
        return int(self.config.get("seed") or 0)

    @property
    def method(self) -> str:
        return self.facts.get("method", "")

    @property
    def settings(self) -> dict[str, Any]:
        """Returns the config without what runs of one cell differ in: seed, places, tracking."""
        return {key: value for key, value in self.config.items() if key not in _OF_A_RUN}

    @property
    def cell(self) -> str:
        """Returns what runs share that differ by their seeds alone: the sweep's name for it, or method and hash."""
        tags = (self.config.get("tracking") or {}).get("tags") or {}
        in_sweep = _SWEEP.search(str(self.config.get("output_dir", "")))
        known = self.facts.get("cell") or tags.get("wmtp.cell") or (in_sweep and in_sweep[1])
        if known:
            return str(known)
        return f"{self.method or 'run'}-{config_sha256(self.settings)[:6]}"

    @property
    def documents(self) -> pd.DataFrame:
        """Returns :attr:`held_out`.

        Raises:
            UserError: there is none, or a CE in it is no number.
        """
        if self.held_out is None:
            raise UserError(
                f"{self.name} has no CE of held-out documents (held_out/step_N.parquet): train it with an eval_dataset"
            )
        if not self.has_finite_documents:
            raise UserError(f"{self.name} has a held-out CE that is inf or nan, as it diverged: leave it out")
        return self.held_out

    @property
    def has_finite_documents(self) -> bool:
        """Whether it has :attr:`held_out`, and no CE in it is inf or nan: what diverged has no difference."""
        return self.held_out is not None and bool(np.isfinite(self.held_out["ce"]).all())

    @property
    def targets(self) -> int:
        """Returns the target tokens that it has been trained on."""
        return int(self.metrics.get("train/targets", [(0, 0.0)])[-1][1])


def load_run(name: str) -> Run:
    """Loads a run from its output_dir, or by its id from the MLflow store of ``$MLFLOW_TRACKING_URI``.

    Raises:
        UserError: no such folder or id, a folder that holds no run, or a store that does not answer.
    """
    if Path(name).is_dir():
        return _from_folder(name, Path(name))
    if not re.fullmatch(r"[0-9a-f]{32}", name):
        raise UserError(
            f"{name} is no folder and no MLflow run id (32 digits of 0-9 a-f); give a run's output_dir or id"
        )
    return _from_mlflow(name)


def _from_folder(name: str, folder: Path) -> Run:
    if not (folder / METRICS).exists():
        raise UserError(f"{folder} holds no {METRICS}: give the output_dir of a run")
    lines = read_metrics(folder / METRICS)
    metrics: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for key, value in line.items():
            if key not in ("step", "time"):
                metrics.setdefault(key, []).append((line["step"], value))
    config = _config((folder / "config.yaml").read_text()) if (folder / "config.yaml").exists() else {}
    tags = json.loads((folder / TAGS).read_text()) if (folder / TAGS).exists() else {}
    file = folder / held_out_file(_last_evaluation(metrics))
    evaluations = {}
    for kind in _EVALUATIONS:
        for found in sorted(folder.rglob(kind)):
            evaluations[found.parent.relative_to(folder).name or "evaluation"] = json.loads(found.read_text())
    last = max((line["step"] for line in lines), default=None)
    ended = any((folder / export).exists() for export in ("export", "adapter")) or last == config.get("max_steps", -1)
    documents, state = _documents(file) if file.exists() else None, "FINISHED" if ended else "UNFINISHED"
    run_id = read_run(folder).get("run_id")
    return Run(name, str(folder), run_id, config, _facts(tags), metrics, documents, evaluations, state)


def _from_mlflow(run_id: str) -> Run:
    uri = store_uri()
    with clear_store_errors(f"run {run_id} in {mask_secrets(uri)}", UserError), TemporaryDirectory() as folder:
        client = existing_client(uri, UserError)
        run = client.get_run(run_id)
        metrics = {}
        for key in sorted(run.data.metrics):
            at = {point.step: point.value for point in client.get_metric_history(run_id, key)}
            metrics[key] = sorted(at.items())
        config = artifact_text(client, run_id, "config.yaml")
        if config is None:
            raise UserError(f"run {run_id} in {mask_secrets(uri)} has no config.yaml: it is not a run of these recipes")
        file = held_out_file(_last_evaluation(metrics))
        documents = None
        if file in artifacts(client, run_id, Path(file).parent.as_posix()):
            documents = _documents(Path(client.download_artifacts(run_id, file, folder)))
        evaluations = {}
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        of_run = f"tags.`mlflow.parentRunId` = '{run_id}'"
        for child in client.search_runs(experiments, of_run, order_by=["attributes.start_time"]):  # the last one stays
            for kind in _EVALUATIONS:
                text = artifact_text(client, child.info.run_id, kind)
                if text is not None:
                    evaluations[child.data.tags.get("wmtp.evaluation", child.info.run_name)] = json.loads(text)
    facts = _facts(run.data.tags)
    return Run(run_id, run_id, run_id, _config(config), facts, metrics, documents, evaluations, run.info.status)


def _config(text: str) -> dict:
    return OmegaConf.to_container(OmegaConf.create(text))  # type: ignore[return-value]


def _facts(tags: dict[str, str]) -> dict[str, str]:
    return {key.removeprefix("wmtp."): str(value) for key, value in tags.items() if not key.startswith("mlflow.")}


def _last_evaluation(metrics: dict[str, list[tuple[int, float]]]) -> int:
    held_out = (points[-1][0] for key, points in metrics.items() if re.fullmatch(r"eval/(.*/)?ce_head1", key))
    return max(held_out, default=0)


def _documents(file: Path) -> pd.DataFrame:
    documents = pd.read_parquet(file)
    documents.attrs["sha256"] = json.loads(pq.read_schema(file).metadata[b"sha256"])
    return documents


def require_comparable(
    runs: Sequence[Run], allow_mixed: bool = False, *, same_tokens: bool = True, other_data: Sequence[str] = ()
) -> list[list[Run]]:
    """Returns the runs that may be compared with each other, in groups: one, unless the others are allowed.

    Args:
        same_tokens: False where the study makes something else equal, such as FLOPs.
        other_data: cells that were trained on other data on purpose: these are what they are compared for.

    Raises:
        UserError: an unknown cell in ``other_data``, or two runs with other held-out data, other training data or, with
            one seed, other numbers of tokens, unless ``allow_mixed``; it names both, and why.
    """
    cells = dict.fromkeys(run.cell for run in runs)
    if unknown := [cell for cell in other_data if cell not in cells]:
        raise UserError(f"other_data: {unknown[0]!r} is no cell with a run; there are {', '.join(cells)}")
    groups: list[list[Run]] = []
    for run in runs:
        reasons = []
        for group in groups:
            reason = next(filter(None, (_why_apart(other, run, same_tokens, other_data) for other in group)), None)
            if reason is None:
                group.append(run)
                break
            reasons.append(reason)
        else:
            if reasons and not allow_mixed:
                raise UserError(f"{reasons[0]}; allow_mixed=true shows them apart")
            groups.append([run])
    return groups


def _why_apart(a: Run, b: Run, same_tokens: bool, other_data: Sequence[str]) -> str | None:
    ours, theirs = (run.documents.attrs["sha256"] for run in (a, b))
    cannot = f"{a.name} and {b.name} cannot be compared:"
    if ours.keys() != theirs.keys():
        return f"{cannot} their held-out sets are {_names(ours)} and {_names(theirs)}"
    for name, sha256 in ours.items():
        if theirs[name] != sha256:
            which = f"held-out set {name}" if name else "held-out set"
            hashes = f"SHA-256 {sha256[:8]} and {theirs[name][:8]}"
            return f"{cannot} their {which}, its tokens or its packing differ ({hashes})"
    # Not data_sha256, which counts the columns that a weighting may read: a scored arm trains on the same rows.
    data = [run.facts.get("rows_sha256", "") for run in (a, b)]
    if not all(data):  # a folder without tags: what the configs say must do
        data = [config_sha256({"dataset": run.config.get("dataset")}) for run in (a, b)]
    on_purpose = a.cell != b.cell and (a.cell in other_data or b.cell in other_data)
    if data[0] != data[1] and not on_purpose:
        return f"{cannot} their training data differ (SHA-256 {data[0][:8]} and {data[1][:8]})"
    # Another seed has other rows, some longer: the numbers of one seed are held against each other.
    if same_tokens and a.seed == b.seed and not math.isclose(a.targets, b.targets, rel_tol=_SAME_TOKENS):
        return f"{cannot} they have been trained on {a.targets} and {b.targets} target tokens"
    return None


def _names(sets: dict) -> str:
    return " ".join(sorted(name or "one without a name" for name in sets)) or "none"
