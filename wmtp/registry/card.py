"""The model card of a registered version, in the Hub's format.

Every value comes from the training run, the evaluation runs or the export itself; a few statements that no run can know
(the base's licence, known limits) come from the config. All other values are called unknown. Nothing is guessed.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData
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
    return f"---\n{_header(name, shape['heads'], evaluations, statements)}\n---\n\n" + "\n\n".join(parts) + "\n"


def log_card(client, run_id: str, name: str, card: str) -> str:
    """Logs the card as an artifact of the training run, which two models may share. Returns its ``runs:/`` name."""
    path = f"model_card/{name}/README.md"
    client.log_text(run_id, card, path)
    return f"runs:/{run_id}/{path}"


def _header(name: str, heads: int | str, evaluations: Sequence[Evaluation], statements: Statements) -> str:
    """Returns the Hub's metadata as YAML."""
    results = [
        EvalResult("text-generation", evaluation.name, evaluation.name, metric, figure["estimate"], metric_name=metric)
        for evaluation in evaluations
        for key, figure in evaluation.fixed["metrics"].items()
        for metric in [key.replace("_at_", "@")]
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=statements.license or UNKNOWN,
        license_link=statements.license_link,
        base_model=statements.base_model,
        language=list(statements.language or ()) or None,
        tags=["wmtp", *(["multi-token-prediction"] if heads not in (1, UNKNOWN) else [])],
        model_name=name,
        eval_results=results,
    )
    return data.to_yaml()


def _shape(folder: Path) -> dict:
    """Returns the export's config.json with its number of heads, and of parameters by weight file."""
    config, mtp = (
        json.loads(file.read_text()) if file.is_file() else {} for file in (folder / "config.json", folder / MTP_CONFIG)
    )
    counts = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:  # from the files' headers
            shapes = [tensors.get_slice(key).get_shape() for key in tensors.keys()]  # noqa: SIM118 (no mapping)
        counts[file.name] = sum(map(math.prod, shapes))
    heads = mtp.get("num_future_tokens", UNKNOWN) if mtp else 1
    return {**config, "heads": heads, "parameters": counts}


def _summary(export: Export, shape: Mapping) -> str:
    component = (export.run.config.get("weighting") or {}).get("_component_", "")
    method = export.run.tags.get("wmtp.method", component.rpartition(".")[2] or UNKNOWN)
    heads, dataset = shape["heads"], export.run.tags.get("wmtp.dataset", UNKNOWN)
    what = "a next-token model" if heads == 1 else f"a multi-token-prediction model with {heads} heads"
    return (
        f"This is {what}, trained by WMTP with token weights {cell(method)} on {cell(dataset)}. Head 1 is an "
        "ordinary causal language model that `transformers` loads; further heads predict further tokens ahead."
    )


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
    fewest, most = evaluation.fixed["samples_per_task"]
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
    lines = [
        f"Evaluated on {names} alone; what it does elsewhere, and whether its training data held these tasks, is "
        "unknown.",
        "It writes code that nobody has read: run it only where it can do no harm.",
    ]
    few = [(e.name, e.results["tasks"]) for e in evaluations if e.results["tasks"] < 100]
    lines += [f"{name} has {tasks} tasks: small differences cannot be seen." for name, tasks in few]
    if export.run.tags.get("wmtp.git_dirty", "").lower() == "true":
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
    run, tags = export.run, export.run.tags
    rows = {
        "training run": f"{run.run_id} ({run.name}, experiment {run.experiment})",
        "model SHA-256": export.sha256,
        "stored at": export.source,
        "git commit": tags.get("wmtp.git_commit", UNKNOWN),
        "uncommitted changes": tags.get("wmtp.git_dirty", UNKNOWN),
        "config SHA-256": tags.get("wmtp.config_sha256", UNKNOWN),
        "data SHA-256": tags.get("wmtp.data_sha256", UNKNOWN),
        "packages": tags.get("wmtp.packages", UNKNOWN),
        "Python": tags.get("wmtp.python", UNKNOWN),
        "training config": f"runs:/{run.run_id}/config.yaml" if run.config else UNKNOWN,
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
    return fenced(OmegaConf.to_yaml(OmegaConf.create(dict(value))), language="yaml")
