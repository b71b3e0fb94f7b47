"""A profile of a training run: which steps, of which process, where, and what is refused."""

import gzip
import json
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from omegaconf import OmegaConf
from processes import run_recipe_file, start
from services import new_store

from recipes.critic_stage1 import CriticStage1Recipe
from recipes.full_finetune_distributed_wmtp import FullFinetuneRecipeWMTP
from recipes.lora_wmtp import LoRARecipeWMTP
from wmtp.config import ConfigError

PROFILER = {"enabled": True, "wait_steps": 1, "warmup_steps": 0, "active_steps": 2}
SHORT = {"max_steps": 4, "save_every": None, **{f"profiler__{key}": value for key, value in PROFILER.items()}}


def written(cfg):
    return sorted(path.name for path in Path(cfg.output_dir, "profiler").glob("*"))


def named(steps, *ranks):
    return [f"steps_{steps}.rank{rank}.{end}" for rank in ranks for end in ("pt.trace.json.gz", "txt")]


def train(recipe):
    recipe.setup()
    recipe.train()
    return recipe


@pytest.mark.filterwarnings("ignore:Profiler won't be using warmup")
def test_steps_are_counted_from_where_a_start_begins(tiny_config, capsys):
    cfg = tiny_config(**SHORT, eval_dataset=None)
    train(FullFinetuneRecipeWMTP(cfg))
    assert written(cfg) == named("2-3", 0)
    trace, table = (Path(cfg.output_dir, "profiler", name) for name in written(cfg))
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = {event["name"] for event in events if event["name"].startswith("ProfilerStep#")}
    assert steps == {"ProfilerStep#1", "ProfilerStep#2"}  # torch counts from 0
    assert "aten::mm" in table.read_text()
    line = f"profiled steps 2 to 3: traces (for ui.perfetto.dev) and tables in {trace.parent}"
    assert line in capsys.readouterr().err

    cfg.update(resume=True, max_steps=6)  # two steps more: the second one is recorded, as far as the run goes
    train(FullFinetuneRecipeWMTP(cfg))
    assert written(cfg) == [*named("2-3", 0), *named("6-6", 0)]


@pytest.mark.filterwarnings("ignore:Profiler won't be using warmup")
def test_mlflow_has_the_files_of_every_process(tiny_config, tmp_path):
    uri = new_store(Path("store").resolve())
    cfg = tiny_config(**SHORT, eval_dataset=None, export_dtype="none")
    cfg.tracking = {"_component_": "wmtp.tracking.MLflowLogger", "tracking_uri": uri, "system_metrics_seconds": None}
    OmegaConf.save(cfg, tmp_path / "run.yaml")
    job = (run_recipe_file, "full_finetune_distributed_wmtp", str(tmp_path / "run.yaml"))
    start(*job, size=2, log=tmp_path / "log.txt").join()
    assert written(cfg) == named("2-3", 0, 1)
    client = MlflowClient(uri)
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert sorted(Path(f.path).name for f in client.list_artifacts(run.info.run_id, "profiler")) == written(cfg)


@pytest.mark.filterwarnings("ignore:Profiler won't be using warmup")
@pytest.mark.parametrize("job, recipe", [("lora_rho1", LoRARecipeWMTP), ("critic_stage1", CriticStage1Recipe)])
def test_the_other_training_recipes_have_it_too(tiny_config, models, job, recipe):
    cfg = tiny_config(
        job, **SHORT, **({"reference_checkpoint": str(models / "reference")} if job == "lora_rho1" else {})
    )
    train(recipe(cfg))
    assert written(cfg) == named("2-3", 0)
    metrics = Path(cfg.output_dir, "metrics.jsonl").read_text()
    assert all(f"train/{name}" in metrics for name in ("data_wait", "peak_memory_gib", "tflops"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"enabled": "maybe"}, "profiler.enabled must be true or false, got 'maybe'"),
        ({"active_steps": 0}, "profiler.active_steps must be >= 1, got 0"),
        ({"wait_steps": 3}, r"profiler.wait_steps \+ warmup_steps \+ active_steps is 5, the run has 4 steps; lower"),
        ({"steps": 3}, "unknown key 'steps' in profiler; did you mean"),
    ],
)
def test_a_value_that_makes_no_profile_is_refused_before_models_are_built(tiny_config, changes, message):
    changed = {f"profiler__{key}": value for key, value in changes.items()}
    cfg = tiny_config(**SHORT | changed, checkpoint="nowhere")
    with pytest.raises(ConfigError, match=message):
        FullFinetuneRecipeWMTP(cfg).setup()
    assert not Path(cfg.output_dir, "config.yaml").exists()
