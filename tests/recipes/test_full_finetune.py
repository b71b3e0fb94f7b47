"""The full fine-tuning recipe on the tiny config: golden losses, resuming, world sizes, splits, the NaN guard."""

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from counted import Counted
from mlflow.tracking import MlflowClient
from omegaconf import OmegaConf
from processes import run_recipe_file, start
from services import new_store
from transformers import AutoModelForCausalLM

from recipes.full_finetune_distributed_wmtp import FullFinetuneRecipeWMTP
from runs import read_metrics, series
from wmtp.config import StopTraining
from wmtp.loss import token_cross_entropy
from wmtp.models import from_checkpoint, load_checkpoint, shard_model
from wmtp.pretrained import hf_tokenizer
from wmtp.training.checkpoint import complete_checkpoints, latest_checkpoint
from wmtp.training.optimizers import parameter_groups

TAGS = ("git_commit", "git_dirty", "config_sha256", "data_sha256", "packages", "python", "hardware", "world_size")
TAGS += ("recipe", "method", "dataset")


def losses(metrics):
    return [line["train/loss"] for line in metrics if "train/loss" in line]


@pytest.fixture
def reference_export(tiny_config, run_recipe):
    cfg = tiny_config("reference", save_every=None, eval_every=None, max_steps=4)
    run_recipe(cfg)
    return str(Path(cfg.output_dir) / "export")


def test_training_lowers_held_out_ce_and_exports_what_transformers_loads(tiny_config, run_recipe):
    cfg = tiny_config(max_steps=20)
    metrics = run_recipe(cfg)
    held_out = [line for line in metrics if "eval/ce_head1" in line]
    assert [line["step"] for line in held_out] == [0, 5, 10, 15, 20]
    for head in (1, 2):
        assert held_out[-1][f"eval/ce_head{head}"] < 0.8 * held_out[0][f"eval/ce_head{head}"]
    # A random model's CE is that of guessing among 259 ids; one trained on text is far below.
    assert held_out[0]["eval/ce_head1"] == pytest.approx(5.5, abs=0.2)

    export = Path(cfg.output_dir) / "export"
    tokens = torch.tensor([hf_tokenizer(export).encode("def add(a, b):\n    return a + b\n")])
    ours = from_checkpoint(export)
    load_checkpoint(ours, export)
    theirs = AutoModelForCausalLM.from_pretrained(export)
    with torch.no_grad():
        logits = ours(tokens)
        assert logits.shape[0] == 2
        torch.testing.assert_close(logits[0], theirs(tokens).logits, atol=1e-4, rtol=0)


def test_rho1_logs_its_weights_and_keeps_their_share(tiny_config, run_recipe, reference_export):
    cfg = tiny_config("rho1", reference_checkpoint=reference_export, max_steps=3, save_every=None)
    last = [line for line in run_recipe(cfg) if "train/loss" in line][-1]
    assert last["weights/kept_share"] == pytest.approx(0.6, abs=0.02)
    assert last["weights/effective_sample_size"] == pytest.approx(0.6, abs=0.02)
    assert last["weights/p25"] == 0 and last["weights/max"] == pytest.approx(1 / 0.6, abs=0.3)


def test_a_reference_stored_in_bf16_says_what_one_that_is_rounded_when_gathered_says(tiny_config, reference_export):
    recipe = FullFinetuneRecipeWMTP(tiny_config("rho1", reference_checkpoint=reference_export, dtype="bf16"))
    recipe.setup()
    assert {p.dtype for p in recipe._reference.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in recipe._model.parameters()} == {torch.float32}
    gathered = from_checkpoint(reference_export)
    shard_model(gathered, recipe._world.mesh, param_dtype=torch.bfloat16)
    load_checkpoint(gathered, reference_export)
    batch = recipe._next_batch(recipe._stream.next_batch())
    with torch.no_grad():
        ce = gathered(**recipe._inputs(batch), loss_fn=token_cross_entropy, labels=batch["labels"])
    assert torch.equal(batch["signals"]["reference_ce"], ce[0]) and ce.count_nonzero() > 50


def test_lambda_zero_trains_as_uniform_bit_for_bit(tiny_config, run_recipe):
    plain = losses(run_recipe(tiny_config(max_steps=4, save_every=None)))
    zero = tiny_config("rho1", weighting__strength=0.0, max_steps=4, save_every=None)
    assert losses(run_recipe(zero)) == plain


def test_a_resumed_run_goes_on_bit_for_bit_in_the_middle_of_an_epoch(tiny_config, run_recipe):
    options = {"max_steps": 8, "save_every": 3, "accept_prompts": 4, "accept_tokens": 8}
    whole = series(run_recipe(tiny_config(**options, output_dir="whole")))
    assert "eval/accept_length_change_high" in str(whole)  # by what it was before the first step
    run_recipe(tiny_config(**options, output_dir="cut"))
    shutil.rmtree(complete_checkpoints(Path("cut/checkpoints"))[-1])  # as if killed after step 6
    with open("cut/metrics.jsonl", "a") as file:
        file.write('{"step": 8, "torn')  # and in the middle of a line
    resumed = series(run_recipe(tiny_config(**options, output_dir="cut", resume=True)))
    assert resumed == whole


@pytest.mark.long
def test_world_size_and_accumulation_split_change_nothing(tiny_config, run_distributed):
    """The same global batch of 8 rows per step, cut 4 x 2, 2 x 4 and so on; and resuming at another world size."""
    common = {"max_steps": 4, "save_every": 2, "eval_every": None, "export_dtype": "none"}

    def cut(name, rows, micro_steps, **more):
        return tiny_config(output_dir=name, batch_size=rows, gradient_accumulation_steps=micro_steps, **common, **more)

    here = Path.cwd()
    names = [str(here / name) for name in ("1x8", "1x2", "2x4", "2x1", "4x2", "4x1", "again", "hsdp")]
    one = run_distributed(1, cut(names[0], 8, 1), cut(names[1], 2, 4))
    two = run_distributed(2, cut(names[2], 4, 1), cut(names[3], 1, 4), torchrun=True)
    shutil.copytree(names[3], names[6])
    shutil.rmtree(latest_checkpoint(Path(names[6])))  # at step 2, saved by two processes
    four = run_distributed(
        4,
        cut(names[4], 2, 1),
        cut(names[5], 1, 2),
        cut(names[6], 2, 1, resume=True),
        cut(names[7], 1, 2, hsdp_replicas=2),
    )
    for metrics in (*one[1:], *two, *four):
        assert losses(metrics) == pytest.approx(losses(one[0]), rel=2e-5)
        norms = [[line["train/grad_norm"] for line in m if "train/loss" in line] for m in (metrics, one[0])]
        assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def replicas_reduce_once_a_step(*paths):
    """What each of two processes does: train with one and with three micro-batches a step, and count."""
    counts = []
    for path in paths:
        recipe = FullFinetuneRecipeWMTP(OmegaConf.load(path))
        recipe.setup()
        with Counted() as collectives:
            recipe.train()
        counts.append(collectives.operations["allreduce_"])
    blocks = 3
    assert counts[0] == counts[1] >= 2 * (blocks + 1)


@pytest.mark.long
def test_replicas_add_up_their_gradients_once_a_step_and_train_as_shards_do(tiny_config, run_distributed, tmp_path):
    common = {"max_steps": 2, "save_every": None, "eval_dataset": None, "export_dtype": "none", "batch_size": 1}
    paths = []
    for steps in (1, 3):
        cfg = tiny_config(
            output_dir=str(tmp_path / str(steps)), gradient_accumulation_steps=steps, hsdp_replicas=2, **common
        )
        paths.append(str(tmp_path / f"{steps}.yaml"))
        OmegaConf.save(cfg, paths[-1])
    start(replicas_reduce_once_a_step, *paths, size=2, log=tmp_path / "log.txt").join()

    common |= {"gradient_accumulation_steps": None, "tokens_per_step": 1000}
    shards, replicas = (
        tiny_config(output_dir=str(tmp_path / f"by_tokens{n}"), hsdp_replicas=n, **common) for n in (1, 2)
    )
    one, two = run_distributed(2, shards, replicas)
    for figure in ("train/loss", "train/grad_norm", "train/targets"):
        ours, theirs = ([line[figure] for line in run if figure in line] for run in (one, two))
        assert ours == pytest.approx(theirs, rel=1e-4) and len(ours) == 2


def run_on_a_small_disk(recipe, config):
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # bytes a file, less than a checkpoint's shard takes
    run_recipe_file(recipe, config)


def test_a_disk_that_takes_no_checkpoint_ends_the_run_with_one_line(tiny_config, tmp_path):
    cfg = tiny_config(output_dir=str(tmp_path / "run"), save_every=1, max_steps=3)
    OmegaConf.save(cfg, tmp_path / "config.yaml")
    process = start(
        run_on_a_small_disk, "full_finetune_distributed_wmtp", str(tmp_path / "config.yaml"), log=tmp_path / "log.txt"
    )
    with pytest.raises(AssertionError, match="exit codes \\[1\\]"):
        process.join()
    said = (tmp_path / "log.txt").read_text()
    why = f"{tmp_path}/run/checkpoints: a file could not be written whole ("
    assert f"error: a checkpoint could not be written: {why}" in said
    assert " MB free); make room, then resume=true goes on" in said
    assert "Traceback" not in said
    assert complete_checkpoints(tmp_path / "run" / "checkpoints") == []


def test_a_checkpoint_holds_the_state_of_its_step_though_training_goes_on(tiny_config, run_recipe):
    """Steps 4 to 6 run while step 3 is written; going back to step 3 gives the same steps again."""
    run_recipe(tiny_config(max_steps=6, save_every=3, output_dir="six", lr_scheduler=None))
    shutil.rmtree(complete_checkpoints(Path("six/checkpoints"))[-1])
    before = losses(read_metrics("six"))
    assert (
        losses(run_recipe(tiny_config(max_steps=6, save_every=3, output_dir="six", lr_scheduler=None, resume=True)))
        == before
    )


def test_non_finite_stops_before_the_weights_are_touched_and_names_the_batch(tiny_config):
    cfg = tiny_config(eval_every=None, save_every=None)
    recipe = FullFinetuneRecipeWMTP(cfg)
    recipe.setup()
    recipe._eval_data = {}
    with torch.no_grad():
        next(recipe._model.layers[0].parameters()).to_local().view(-1)[0] = float("nan")
    before = [p.to_local().clone() for p in recipe._model.parameters()]
    with pytest.raises(
        StopTraining, match=r"step 1: loss nan.*weights were not touched.*Documents of the batch: .*\.py"
    ):
        recipe.train()
    after = [p.to_local() for p in recipe._model.parameters()]
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(after, before, strict=True))


def test_accumulation_by_tokens_fills_each_step(tiny_config, run_recipe):
    cfg = tiny_config(
        gradient_accumulation_steps=None, tokens_per_step=1000, max_steps=2, save_every=None, batch_size=1
    )
    targets = [line["train/targets"] for line in run_recipe(cfg) if "train/loss" in line]
    for counted in (targets[0], targets[1] - targets[0]):
        assert 1000 <= counted < 1000 + cfg.seq_len


@pytest.mark.slow
def test_memory_and_speed_options_change_nothing_but_memory_and_speed(tiny_config, run_recipe):
    plain = losses(run_recipe(tiny_config(max_steps=3, save_every=None, output_dir="a")))
    for how in (True, 2, "selective"):
        recomputed = tiny_config(max_steps=3, save_every=None, output_dir=f"b{how}", activation_checkpointing=how)
        assert losses(run_recipe(recomputed)) == plain
    compiled = tiny_config(max_steps=3, save_every=None, output_dir="c", compile=True)
    assert losses(run_recipe(compiled)) == pytest.approx(plain, rel=1e-4)
    rounded = tiny_config(max_steps=3, save_every=None, output_dir="d", dtype="bf16")
    assert losses(run_recipe(rounded)) == pytest.approx(plain, rel=1e-2)


def test_mlflow_holds_config_tags_and_metrics_and_a_resumed_run_goes_on_in_it(tiny_config, run_recipe, tmp_path):
    uri = new_store(tmp_path)
    tracking = {"_component_": "wmtp.tracking.MLflowLogger", "experiment": "e", "tracking_uri": uri}
    tracking["artifact_location"] = str(tmp_path / "artifacts")
    for steps, resume in ((4, False), (6, True)):
        if resume:  # as if killed after step 4, before its checkpoint was complete: steps 3 and 4 happen again
            shutil.rmtree(latest_checkpoint(Path(tiny_config().output_dir)))
        recipe = FullFinetuneRecipeWMTP(
            tiny_config(max_steps=steps, save_every=2, tracking=tracking, resume=resume, lr_scheduler=None)
        )
        recipe.setup()
        recipe.train()
        recipe._log.close()
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["model.num_future_tokens"] == "2"
    assert {f"wmtp.{name}" for name in TAGS} <= set(run.data.tags)
    history = client.get_metric_history(run.info.run_id, "train/loss")
    logged = {m.step: m.value for m in history}
    assert logged == {
        line["step"]: line["train/loss"] for line in read_metrics(recipe._output_dir) if "train/loss" in line
    }
    assert [m.step for m in history] == [1, 2, 3, 4, 5, 6]
    assert {a.path for a in client.list_artifacts(run.info.run_id)} - {"git_diff.patch"} == {"config.yaml", "held_out"}


def test_extra_heads_may_have_a_learning_rate_of_their_own(tiny_config):
    """One step of AdamW moves a weight by about its learning rate; what is frozen is in no group."""
    cfg = tiny_config(max_steps=1, save_every=None, eval_every=None, lr_scheduler=None, extra_heads_lr=0.5)
    recipe = FullFinetuneRecipeWMTP(cfg)
    recipe.setup()
    recipe._eval_data = {}
    before = {name: p.to_local().clone() for name, p in recipe._model.named_parameters()}
    recipe.train()
    moved = {name: (p.to_local() - before[name]).abs().max().item() for name, p in recipe._model.named_parameters()}
    for name, distance in moved.items():
        assert distance == pytest.approx(0.5 if name.startswith("extra_heads") else cfg.optimizer.lr, rel=0.05)
    recipe._model.norm.requires_grad_(False)
    groups = parameter_groups(recipe._model, recipe._model.extra_heads, cfg.extra_heads_lr, False)
    assert sum(len(group["params"]) for group in groups) == len(list(recipe._model.parameters())) - 1


def test_metrics_are_json_lines(tiny_config, run_recipe):
    cfg = tiny_config(max_steps=2, save_every=None)
    run_recipe(cfg)
    lines = (Path(cfg.output_dir) / "metrics.jsonl").read_text().splitlines()
    keys = set().union(*(json.loads(line) for line in lines))
    assert {"train/loss", "train/ce_head1", "train/ce_head2", "train/grad_norm", "train/lr", "weights/p95"} <= keys
    assert {"train/tokens_per_second", "train/data_wait", "train/peak_memory_gib", "train/tflops"} <= keys
