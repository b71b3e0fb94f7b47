"""Runs in an MLflow store as the recipes leave them: an export and its training, an evaluation and its results."""

import json
from pathlib import Path

import torch
from omegaconf import OmegaConf
from random_models import random_decoder

from recipes.promote import PromoteRecipe
from wmtp.config import load
from wmtp.eval import AssertionTask
from wmtp.eval.results import evaluation_results
from wmtp.eval.samples import Judgement, Sample
from wmtp.models import export_hf
from wmtp.pretrained import byte_tokenizer, checkpoint_sha256

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "tasks_sha256": "t" * 64,
    "prompts_sha256": "p" * 64,
    "protocol": {"_component_": "wmtp.eval.docstring_protocol"},
    "limits": {"_component_": "wmtp.sandbox.Limits", "cpu_seconds": 10.0},
    "top_p": 0.95,
    "max_new_tokens": 64,
    "seed": 0,
}
_SIZES = {"vocab_size": 259, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "embed_dim": 16}
_SIZES |= {"intermediate_dim": 16, "max_seq_len": 64, "num_future_tokens": 2}
_JUDGED = {"p": Judgement("passed"), "w": Judgement("wrong_answer"), "h": Judgement("harness_error")}


def results_of(letters: list[str], temperature: float = 0.8, **settings) -> dict:
    """Results of tasks 0, 1, ...: a string a task, a letter a sample: p(assed), w(rong), h(arness error)."""
    tasks = [AssertionTask(f"t/{i}", "", "", None, "", "", "", ("assert f()",)) for i in range(len(letters))]
    samples, judgements = [], {}
    for task, of_task in zip(tasks, letters, strict=True):
        for number, letter in enumerate(of_task):
            samples.append(Sample(task.task_id, number, temperature, "program"))
            judgements[samples[-1].key] = _JUDGED[letter]
    sandbox = {"layers": ["seccomp", "rlimits"], "missing": []}
    named = {"tasks_sha256": f"{len(letters):064d}"}
    return evaluation_results(
        tasks, samples, judgements, settings=SETTINGS | named | settings, sandbox=sandbox, resamples=200
    )


def run_promote(name: str, action: str = "register", evaluation_run: str | None = None, **overrides) -> None:
    """Run the recipe on the tiny config with overrides, in this process."""
    cfg = load(ROOT / "configs" / "tiny" / "promote.yaml")
    cfg.update({"name": name, "action": action, "evaluation_run": evaluation_run, "by": "someone", **overrides})
    recipe = PromoteRecipe(cfg)
    recipe.setup()
    recipe.run()


class Runs:
    """Makes runs in one store, which has its own place for artifacts where none is given."""

    def __init__(self, client, folder: Path, artifacts: str | None = None) -> None:
        self.client, self.folder = client, folder
        self._experiment = client.create_experiment("wmtp/test", artifacts)
        self.exports = 0

    def training(self, *, tags: dict | None = None, config: str = "rho1") -> str:
        """A finished training run with an export of its own."""
        self.exports += 1
        export = self.folder / f"export{self.exports}"
        model = random_decoder(**_SIZES)
        torch.nn.init.constant_(model.norm.scale, self.exports)  # another model each time
        export_hf(model, export, tokenizer_source=byte_tokenizer())
        run_id = self.client.create_run(self._experiment, run_name=f"training{self.exports}").info.run_id
        self.client.log_artifacts(run_id, str(export), "export")
        cfg = load(ROOT / "configs" / "tiny" / f"{config}.yaml")
        self.client.log_text(run_id, OmegaConf.to_yaml(cfg, resolve=True), "config.yaml")
        self.client.log_metric(run_id, "eval/ce_head1", 2.5, step=10)
        tags = {"wmtp.git_commit": "c0ffee", "wmtp.method": "rho1", "wmtp.dataset": "tiny", **(tags or {})}
        for key, value in tags.items():
            self.client.set_tag(run_id, key, value)
        self.client.set_terminated(run_id)
        return run_id

    def sha256(self, number: int | None = None) -> str:
        return checkpoint_sha256(self.folder / f"export{number or self.exports}")

    def evaluation(
        self, training_run: str | None, letters: list[str], *, name: str = "tiny_tasks", results: dict | None = None,
        status: str = "FINISHED", **tags,
    ) -> str:  # fmt: skip
        """A finished evaluation run of the newest export; a tag given as None is left out."""
        run_id = self.client.create_run(self._experiment, run_name=name).info.run_id
        self.client.log_text(run_id, json.dumps(results or results_of(letters)), "results.json")
        defaults = {"evaluation": name, "model_sha256": self.sha256(), "training_run_id": training_run}
        for key, value in {**defaults, **tags}.items():
            if value is not None:
                self.client.set_tag(run_id, f"wmtp.{key}", value)
        self.client.set_terminated(run_id, status)
        return run_id
