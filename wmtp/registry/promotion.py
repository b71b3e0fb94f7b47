"""The rule of promotion: an evaluated export replaces the one in production unless it is worse.

Everything is read back from MLflow: an evaluation's results.json, its settings, the training run that it names, and the
export itself, whose hash must be the evaluated one.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from omegaconf import OmegaConf

from wmtp.eval.estimators import pass_at_k
from wmtp.eval.results import compare_results, why_not_alike
from wmtp.pretrained.resolve import checkpoint_sha256, resolve_checkpoint
from wmtp.registry.versions import RegistryError, store_errors
from wmtp.tracking.store import artifact_text


@dataclass(frozen=True)
class RunRecord:
    """A run as MLflow holds it."""

    run_id: str
    name: str
    experiment: str
    status: str
    tags: dict[str, str]
    metrics: dict[str, float]
    config: dict  # empty if the run has none


@dataclass(frozen=True)
class Evaluation:
    """An evaluation of the model with that hash."""

    run: RunRecord
    name: str
    model_sha256: str
    results: dict

    @property
    def fixed(self) -> dict:
        """The results at the evaluation's fixed temperature."""
        return self.results["temperatures"][self.results["fixed_temperature"]]


@dataclass(frozen=True)
class Export:
    """A training run's export, fetched; its hash is the evaluated one."""

    run: RunRecord
    source: str  # URI
    folder: Path  # the local copy
    sha256: str


def read_run(client, run_id: str) -> RunRecord:
    """Returns a run of the store, with its config; a RegistryError says that there is no such run."""
    with store_errors(f"run {run_id} cannot be read"):
        run = client.get_run(str(run_id))
        experiment = client.get_experiment(run.info.experiment_id).name
    info, data = run.info, run.data
    config = _artifact(client, info.run_id, "config.yaml", _yaml) or {}
    return RunRecord(info.run_id, info.run_name, experiment, info.status, dict(data.tags), dict(data.metrics), config)


def read_evaluation(client, run_id: str) -> Evaluation:
    """Returns the results of an evaluation run, with the hash of its model; refuses any other run."""
    run = read_run(client, run_id)
    results = _artifact(client, run.run_id, "results.json", json.loads)
    name = run.tags.get("wmtp.evaluation")
    if name is None or results is None or "temperatures" not in results:
        raise RegistryError(
            f"run {run.run_id} ({run.name}) is no evaluation with results of each task: give the id of a run of "
            "recipes/eval_mbpp.py or eval_codecontests.py"
        )
    if run.status != "FINISHED":
        raise RegistryError(f"evaluation run {run.run_id} is {run.status}, not FINISHED: resume it, or run it again")
    sha256 = run.tags.get("wmtp.model_sha256")
    if sha256 is None:
        raise RegistryError(
            f"evaluation run {run.run_id} does not name its model (tag wmtp.model_sha256): it had random weights or "
            "judged existing samples; evaluate the export with checkpoint=runs:/<training run>/export"
        )
    return Evaluation(run, name, sha256, results)


def evaluated_export(client, evaluation: Evaluation, training_run: str | None = None) -> Export:
    """Fetches the evaluated export through MLflow; by default that of the training run which the evaluation names.

    A RegistryError says that no training run is known, or that its export is another model.
    """
    run_id = training_run or evaluation.run.tags.get("wmtp.training_run_id")
    if run_id is None:
        raise RegistryError(
            f"evaluation run {evaluation.run.run_id} names no training run (tag wmtp.training_run_id): its checkpoint "
            "was no export of a tracked run; give training_run=<id>, or evaluate checkpoint=runs:/<training run>/export"
        )
    run = read_run(client, run_id)
    reference = _artifact(client, run.run_id, "export.json", json.loads)
    folder = resolve_checkpoint(f"runs:/{run.run_id}/export")
    sha256 = checkpoint_sha256(folder)
    if sha256 != evaluation.model_sha256:
        raise RegistryError(
            f"the export of training run {run.run_id} is not the model of evaluation run {evaluation.run.run_id}: "
            f"SHA-256 {sha256[:12]}..., evaluated was {evaluation.model_sha256[:12]}...; evaluate this export"
        )
    with store_errors(f"run {run.run_id} cannot be read"):
        source = f"{client.get_run(run.run_id).info.artifact_uri.rstrip('/')}/export"
    return Export(run, reference["uri"] if reference else source, folder, sha256)


def not_worse(
    ours: Evaluation,
    theirs: Evaluation,
    *,
    k: int = 1,
    max_drop: float | None = None,
    seed: int = 0,
    resamples: int = 10_000,
) -> tuple[bool, str, dict]:
    """Decides whether a model may replace another: it may unless it is worse by more than chance explains.

    The paired difference in pass@k, ours - theirs, is bootstrapped over tasks (95 %). A model whose whole interval lies
    below 0 is refused. With few tasks that asks little; ``max_drop`` asks for more.

    Args:
        k: of pass@k, at each run's fixed temperature.
        max_drop: also refuse if the interval reaches below -max_drop (a non-inferiority margin).
        seed, resamples: of the bootstrap.

    Returns:
        The decision, the reason in words, and the figures.

    Raises:
        ValueError: the two are of other tasks or protocols, and so cannot be compared, or have too few samples for k.
    """
    if reason := why_not_alike(ours.results, theirs.results):
        pair = f"evaluations {ours.run.run_id} and {theirs.run.run_id} ({ours.name})"
        raise RegistryError(f"{pair} cannot be compared: {reason}")
    difference = compare_results(ours.results, theirs.results, k, seed=seed, resamples=resamples)
    # Over all tasks, for any k: the evaluation may have reported others.
    scores = [
        fmean(pass_at_k(task["n"], task["correct"], k) for task in evaluation.fixed["per_task"])
        for evaluation in (ours, theirs)
    ]
    figures = {
        "evaluation": ours.name,
        "metric": f"pass@{k}",
        "ours": scores[0],
        "theirs": scores[1],
        "difference": asdict(difference),
        "tasks": ours.results["tasks"],
        "samples_per_task": ours.fixed["samples_per_task"],
        "max_drop": max_drop,
        "theirs_run": theirs.run.run_id,
    }
    percent = lambda share: f"{100 * share:.1f}"
    text = (
        f"pass@{k} {percent(scores[0])} against {percent(scores[1])} %, difference {percent(difference.estimate)} "
        f"({percent(difference.low)} to {percent(difference.high)}) over {ours.results['tasks']} tasks of {ours.name}"
    )
    if difference.high < 0:
        return False, f"worse beyond the interval: {text}", figures
    if max_drop is not None and difference.low < -max_drop:
        return False, f"the interval reaches below -max_drop = -{percent(max_drop)}: {text}", figures
    return True, f"not worse beyond the interval: {text}", figures


def _artifact(client, run_id: str, path: str, read: Callable[[str], dict]) -> dict | None:
    """Returns the parsed content of a run's artifact, or None if the run has none of that name."""
    with store_errors(f"artifact {path} of run {run_id} cannot be fetched"):
        text = artifact_text(client, run_id, path)
    try:
        return None if text is None else read(text)
    except Exception as error:  # each format has errors of its own
        raise RegistryError(f"artifact {path} of run {run_id} is damaged: {type(error).__name__}") from error


def _yaml(text: str) -> dict:
    return dict(OmegaConf.to_container(OmegaConf.create(text)))  # type: ignore[arg-type]
