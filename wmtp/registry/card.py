"""The model card of a registered version, in the Hub's format.

Every value comes from the training run, the evaluation runs or the export itself; a few statements that no run can know
(the base's licence, known limits) come from the config. All other values are called unknown. Nothing is guessed.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from omegaconf import OmegaConf

from wmtp.errors import UserError
from wmtp.eval.markdown import cell, fenced
from wmtp.eval.results_page import cautions, headline, scores
from wmtp.pretrained.checkpoint_formats import open_safetensors
from wmtp.pretrained.config_files import MTP_CONFIG, MTP_WEIGHTS
from wmtp.registry.promotion import Evaluation, Export
from wmtp.registry.versions import store_errors

UNKNOWN = "unknown"
_MAX_DESCRIPTION = 5000  # characters
_TEMPLATE = Path(__file__).with_name("card.md.jinja")
# The keys of a training config that the card shows; the run's config.yaml has all of them.
_CONFIG_KEYS = {
    "Data": "dataset seq_len packed",
    "Token weights": "weighting head_weights reference_checkpoint value_model refresh_policy_ce",
    "Settings": "adapters optimizer extra_heads_lr lr_scheduler max_grad_norm batch_size gradient_accumulation_steps "
    "tokens_per_step epochs max_steps dtype export_dtype seed",
}
_EVALUATION_KEYS = "tasks protocol top_p max_new_tokens num_drafts dtype seed limits"


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
    run, folder = export.run, export.folder
    shape, mtp = (
        json.loads(file.read_text()) if file.is_file() else {} for file in (folder / "config.json", folder / MTP_CONFIG)
    )
    heads = mtp.get("num_future_tokens", UNKNOWN) if mtp else 1
    parameters = {
        file.name: sum(math.prod(tensor.shape) for tensor in open_safetensors(file).values())
        for file in folder.glob("*.safetensors")
    }
    weighting = (run.config.get("weighting") or {}).get("_component_", "")
    facts: dict[str, Any] = {
        "name": name,
        "version": version,
        "export": export,
        "run": run,
        "evaluations": evaluations,
        "statements": statements,
        "shape": shape,
        "heads": heads,
        "further_heads": parameters.get(MTP_WEIGHTS, 0),
        "trunk": sum(parameters.values()) - parameters.get(MTP_WEIGHTS, 0),
        "checkpoint": run.config.get("checkpoint", UNKNOWN),
        "method": run.tags.get("wmtp.method", weighting.rpartition(".")[2] or UNKNOWN),
        "figures": {k: v for k, v in sorted(run.metrics.items()) if k.startswith(("eval/", "train/loss"))},
        "config_keys": _CONFIG_KEYS,
        "evaluation_keys": _EVALUATION_KEYS,
        "unknown": UNKNOWN,
        "tag": lambda key: cell(run.tags.get(f"wmtp.{key}", UNKNOWN)),
        "chosen": lambda values, keys: {key: values[key] for key in keys.split() if key in values},
        "yaml": lambda values: fenced(OmegaConf.to_yaml(OmegaConf.create(values)), language="yaml"),
        **{function.__name__: function for function in (cell, headline, cautions, scores)},
    }
    data = _header(name, heads, evaluations, statements)
    return str(ModelCard.from_template(data, template_path=str(_TEMPLATE), **facts))


def publish_card(client, run_id: str, name: str, version: str, card: str) -> str:
    """Logs a version's card as an artifact of the training run, and sets the version's description to it.

    Two models may share the run. The description is cut to the length that every store keeps, and has no YAML header,
    which is for the Hub. Returns the artifact's ``runs:/`` name, which is a tag of the version too.
    """
    path, text = f"model_card/{name}/README.md", card.split("---\n", 2)[-1].lstrip()
    where = f"runs:/{run_id}/{path}"
    if len(text) > _MAX_DESCRIPTION:
        note = f"\n\n[... the whole card is {where} ...]\n"
        text = text[: _MAX_DESCRIPTION - len(note)].rpartition("\n")[0] + note
    with store_errors(f"version {version} of {name} cannot be described"):
        client.log_text(run_id, card, path)
        client.update_model_version(name, version, description=text)
        client.set_model_version_tag(name, version, "wmtp.model_card", where)
    return where


def _header(name: str, heads: int | str, evaluations: Sequence[Evaluation], statements: Statements) -> ModelCardData:
    results = [
        EvalResult("text-generation", evaluation.name, evaluation.name, metric, figure["estimate"], metric_name=metric)
        for evaluation in evaluations
        for key, figure in evaluation.fixed["metrics"].items()
        for metric in [key.replace("_at_", "@")]
    ]
    return ModelCardData(
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
