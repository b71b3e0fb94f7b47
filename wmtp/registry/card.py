"""The model card of a registered version, in the Hub's format.

Every value comes from the training run, the evaluation runs or the export itself; a few statements that no run can know
(the base's licence, known limits) come from the config. All other values are called unknown. Nothing is guessed.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf
from safetensors import safe_open

from wmtp.errors import UserError
from wmtp.eval.markdown import cell, fenced, table
from wmtp.eval.results_page import cautions, headline, scores
from wmtp.pretrained.config_files import MTP_CONFIG, MTP_WEIGHTS
from wmtp.registry.promotion import Evaluation, Export

UNKNOWN = "unknown"
# The keys of a training config that the card shows; the run's config.yaml has all of them.
_DATA_KEYS = ("dataset", "seq_len", "packed")
_WEIGHT_KEYS = ("weighting", "head_weights", "reference_checkpoint", "value_model", "refresh_policy_ce")
_OPTIMIZATION_KEYS = (
    "adapters", "optimizer", "extra_heads_lr", "lr_scheduler", "max_grad_norm", "batch_size",
    "gradient_accumulation_steps", "tokens_per_step", "epochs", "max_steps", "dtype", "export_dtype", "seed",
)  # fmt: skip
_EVALUATION_KEYS = ("tasks", "protocol", "top_p", "max_new_tokens", "num_drafts", "dtype", "seed", "limits")
_FILE = "README.md"


@dataclass(frozen=True)
class Statements:
    """Statements that no run can know of a model. Every key is optional; the card calls missing ones unknown.

    Args:
        license: of the base model, as the Hub names licences: ``apache-2.0``, ``llama2``, ``other``.
        license_link: where it can be read.
        base_model: the base's name on the Hub.
        language: of the text it was made for, such as ``[en, code]``.
        intended_use: a sentence.
        limits: sentences about what it cannot or must not do.
    """

    license: str | None = None
    license_link: str | None = None
    base_model: str | None = None
    language: Sequence[str] = ()
    intended_use: str | None = None
    limits: Sequence[str] = ()

    def __post_init__(self) -> None:
        for key in ("language", "limits"):
            value = getattr(self, key)
            if isinstance(value, str) or not all(isinstance(item, str) for item in value or ()):
                raise UserError(f"{key} must be a list of strings, got {value!r}")


def model_card(
    name: str, version: str, export: Export, evaluations: Sequence[Evaluation], statements: Statements
) -> str:
    """Returns the card of a version as a README.md: YAML header, then Markdown. It needs at least one evaluation."""
    shape = _shape(export.folder)
    parts = [
        f"# {cell(name)}, version {cell(version)}",
        _summary(export, shape),
        *(f"**{cell(e.name)}**: {cell(line)}" for e in evaluations for line in headline(e.results)),
        "## Model",
        table(["", ""], _model_rows(export, shape, statements)),
        "## Intended use",
        cell(statements.intended_use or "Unknown: nobody has stated one."),
        "## Training",
        *_training(export),
        "## Evaluation",
        *(part for evaluation in evaluations for part in _evaluated(evaluation)),
        "## Limits",
        "\n".join(f"- {cell(line)}" for line in [*(statements.limits or ()), *_limits(export, evaluations)]),
        "## Licence",
        _licence(export, statements),
        "## Where it comes from",
        table(["", ""], _provenance(export, evaluations)),
        "## Use",
        _use(name, version),
    ]
    return f"---\n{_header(name, shape, evaluations, statements)}---\n\n" + "\n\n".join(parts) + "\n"


def card_artifact(name: str) -> str:
    """Returns the folder among a run's artifacts for the card of a registered model; two models may share a run."""
    return f"model_card/{name}"


def log_card(client, run_id: str, name: str, card: str) -> str:
    """Logs the card as an artifact of the training run. Returns its ``runs:/`` name."""
    path = f"{card_artifact(name)}/{_FILE}"
    client.log_text(run_id, card, path)
    return f"runs:/{run_id}/{path}"


def _header(name: str, shape: Mapping, evaluations: Sequence[Evaluation], statements: Statements) -> str:
    """Returns the Hub's metadata as YAML."""
    header: dict = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    header["license"] = statements.license or UNKNOWN
    for key in ("license_link", "base_model", "language"):
        if value := getattr(statements, key):
            header[key] = list(value) if key == "language" else value
    heads = shape["heads"]
    header["tags"] = ["wmtp", *(["multi-token-prediction"] if isinstance(heads, int) and heads > 1 else [])]
    results = []
    for evaluation in evaluations:
        fixed = evaluation.results["temperatures"][evaluation.results["fixed_temperature"]]
        metrics = {metric.replace("_at_", "@"): figure["estimate"] for metric, figure in fixed["metrics"].items()}
        results.append(
            {
                "task": {"type": "text-generation"},
                "dataset": {"name": evaluation.name, "type": evaluation.name},
                "metrics": [{"type": metric, "name": metric, "value": value} for metric, value in metrics.items()],
            }
        )
    header["model-index"] = [{"name": name, "results": results}]
    return _yaml(header)


def _shape(folder: Path) -> dict:
    """Returns the export's config.json with its number of heads and of parameters."""
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    mtp = folder / MTP_CONFIG
    heads = json.loads(mtp.read_text()).get("num_future_tokens", UNKNOWN) if mtp.is_file() else 1
    return {**config, "heads": heads, "parameters": _parameters(folder)}


def _parameters(folder: Path) -> dict[str, int]:
    """Returns the number of parameters in each weight file, from the files' headers."""
    counts = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            shapes = [tensors.get_slice(key).get_shape() for key in tensors.keys()]  # noqa: SIM118 (no mapping)
        counts[file.name] = sum(map(math.prod, shapes))
    return counts


def _summary(export: Export, shape: Mapping) -> str:
    method, dataset = _method(export), _of_tags(export, "wmtp.dataset")
    heads = shape["heads"]
    what = "a next-token model" if heads == 1 else f"a multi-token-prediction model with {heads} heads"
    return (
        f"This is {what}, trained by WMTP with token weights {cell(method)} on {cell(dataset)}. Head 1 is an "
        "ordinary causal language model that `transformers` loads; further heads predict further tokens ahead."
    )


def _method(export: Export) -> str:
    component = (export.run.config.get("weighting") or {}).get("_component_", "")
    return _of_tags(export, "wmtp.method", component.rsplit(".", 1)[-1] or UNKNOWN)


def _of_tags(export: Export, key: str, default: str = UNKNOWN) -> str:
    return export.run.tags.get(key, default)


def _model_rows(export: Export, shape: Mapping, statements: Statements) -> list[list[str]]:
    checkpoint = export.run.config.get("checkpoint", UNKNOWN)
    started = "random weights (no base model)" if checkpoint is None else str(checkpoint)
    further_heads = shape["parameters"].get(MTP_WEIGHTS, 0)
    trunk = sum(shape["parameters"].values()) - further_heads
    rows = {
        "base model": statements.base_model or ("none" if checkpoint is None else UNKNOWN),
        "training started from": started,
        "architecture": ", ".join(shape.get("architectures") or [UNKNOWN]),
        "heads": shape["heads"],
        "parameters": f"{trunk:,} with head 1" if trunk else UNKNOWN,
        "parameters of further heads": f"{further_heads:,}",
        "layers, width, vocabulary": ", ".join(
            str(shape.get(key, UNKNOWN)) for key in ("num_hidden_layers", "hidden_size", "vocab_size")
        ),
        "longest sequence": shape.get("max_position_embeddings", UNKNOWN),
        "stored as": shape.get("dtype", shape.get("torch_dtype", UNKNOWN)),
    }
    return [[name, cell(value)] for name, value in rows.items()]


def _training(export: Export) -> list[str]:
    config, tags = export.run.config, export.run.tags
    parts = [] if config else ["The run holds no config: data, weights and settings are unknown."]
    for title, keys in (("Data", _DATA_KEYS), ("Token weights", _WEIGHT_KEYS), ("Settings", _OPTIMIZATION_KEYS)):
        if chosen := {key: config[key] for key in keys if key in config}:
            parts += [f"### {title}", _yaml_block(chosen)]
    size, hardware, data = (cell(tags.get(f"wmtp.{key}", UNKNOWN)) for key in ("world_size", "hardware", "data_sha256"))
    parts.append(f"Trained by {size} process(es) on {hardware}, data SHA-256 {data}.")
    measured = {
        key: value for key, value in sorted(export.run.metrics.items()) if key.startswith(("eval/", "train/loss"))
    }
    if measured:
        parts += [
            "### Last figures of training",
            table(["metric", "value"], [[cell(key), f"{value:.4f}"] for key, value in measured.items()]),
            "Nats per target token. The run records no intervals for them.",
        ]
    return parts


def _evaluated(evaluation: Evaluation) -> list[str]:
    results, settings = evaluation.results, evaluation.results["settings"]
    fewest, most = results["temperatures"][results["fixed_temperature"]]["samples_per_task"]
    counts = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    return [
        f"### {cell(evaluation.name)}",
        *(f"> {cell(line)}" for line in cautions(results)),
        *scores(results),
        f"Protocol: {results['tasks']} tasks, {counts} sample(s) a task and temperature, judged in a sandbox "
        f"({'; '.join(map(cell, results['sandbox']['layers'])) or 'no protections recorded'}).",
        _yaml_block({key: settings[key] for key in _EVALUATION_KEYS if key in settings}),
    ]


def _limits(export: Export, evaluations: Sequence[Evaluation]) -> list[str]:
    """Returns the limits that follow from the runs themselves."""
    names = ", ".join(evaluation.name for evaluation in evaluations)
    lines = [f"Evaluated on {names} alone; what it does elsewhere, and whether its training data held these tasks, "
             "is unknown."]  # fmt: skip
    lines.append("It writes code that nobody has read: run it only where it can do no harm.")
    for evaluation in evaluations:
        tasks = evaluation.results["tasks"]
        if tasks < 100:
            lines.append(f"{evaluation.name} has {tasks} tasks: small differences cannot be seen.")
    if _of_tags(export, "wmtp.git_dirty", "False").lower() == "true":
        lines.append("Trained by code with uncommitted changes: the commit alone does not reproduce it.")
    if export.run.status != "FINISHED":
        lines.append(f"The training run's status is {export.run.status}.")
    return lines


def _licence(export: Export, statements: Statements) -> str:
    if statements.license is None:
        if export.run.config.get("checkpoint", UNKNOWN) is None:
            return "Trained from random weights: there is no base model. The licence of these weights is unknown."
        return "The licence of the base model is unknown. Find it out before you pass the model on."
    link = f" (<{statements.license_link}>)" if statements.license_link else ""
    return f"The base model is under {cell(statements.license)}{link}; its terms for fine-tuned models apply."


def _provenance(export: Export, evaluations: Sequence[Evaluation]) -> list[list[str]]:
    rows = {
        "training run": f"{export.run.run_id} ({export.run.name}, experiment {export.run.experiment})",
        "model SHA-256": export.sha256,
        "stored at": export.source,
        "git commit": _of_tags(export, "wmtp.git_commit"),
        "uncommitted changes": _of_tags(export, "wmtp.git_dirty"),
        "config SHA-256": _of_tags(export, "wmtp.config_sha256"),
        "data SHA-256": _of_tags(export, "wmtp.data_sha256"),
        "packages": _of_tags(export, "wmtp.packages"),
        "Python": _of_tags(export, "wmtp.python"),
        "training config": f"runs:/{export.run.run_id}/config.yaml" if export.run.config else UNKNOWN,
        **{f"evaluation {e.name}": f"runs:/{e.run.run_id}/results.json" for e in evaluations},
    }
    return [[cell(name), cell(value)] for name, value in rows.items()]


def _use(name: str, version: str) -> str:
    code = (
        "from transformers import AutoModelForCausalLM\n"
        "from wmtp.models import resolve_checkpoint  # $MLFLOW_TRACKING_URI names the registry\n\n"
        f'folder = resolve_checkpoint("models:/{name}/{version}")\n'
        "model = AutoModelForCausalLM.from_pretrained(folder)  # head 1"
    )
    return fenced(code, language="python")


def _yaml_block(value: Mapping) -> str:
    return fenced(_yaml(value), language="yaml")


def _yaml(value: Mapping) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(dict(value)))
