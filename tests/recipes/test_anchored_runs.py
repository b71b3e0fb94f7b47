"""An anchor in both training recipes: against a frozen model, and against the model with its adapters off."""

import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from recipes.full_finetune_distributed_wmtp import FullFinetuneRecipeWMTP
from recipes.lora_wmtp import LoRARecipeWMTP
from runs import read_metrics, series
from wmtp.models import from_checkpoint, load_checkpoint
from wmtp.training.checkpoint import complete_checkpoints

BRIEF = {"eval_every": None, "eval_dataset": None, "export_dtype": "none", "token_view": None, "export_merged": "none"}
ANCHOR = {"_component_": "wmtp.loss.Anchor", "weight": 0.5}
RECIPES = {"rho1": FullFinetuneRecipeWMTP, "lora_rho1": LoRARecipeWMTP}


@pytest.fixture
def config(tiny_config, models):
    """The tiny config of full fine-tuning or LoRA on the reference's weights, which is what it is held near."""

    def of(job, name, **overrides):
        cfg = tiny_config(job, output_dir=name, **{key: BRIEF[key] for key in BRIEF if key in tiny_config(job)})
        cfg.weighting = {"_component_": "wmtp.weighting.dft", "normalize": "raw"}
        cfg.update({"checkpoint": str(models / "reference"), "reference_checkpoint": str(models / "reference")})
        cfg.update({"anchor": ANCHOR, "max_steps": 4, "dataset": {**cfg.dataset, "max_functions": 12}, "seq_len": 128})
        if job == "lora_rho1":
            cfg.reference_model = None
        for key, value in overrides.items():
            OmegaConf.update(cfg, key.replace("__", "."), value)
        return cfg

    return of


def run(job, cfg):
    recipe = RECIPES[job](cfg)
    recipe.setup()
    recipe.train()
    recipe._log.close()
    return recipe, series([line for line in read_metrics(cfg.output_dir) if "train/loss" in line])


@pytest.mark.parametrize("job", RECIPES)
def test_an_anchored_run_says_how_far_head_1_went_and_resumes_bit_for_bit(config, job, models):
    recipe, whole = run(job, config(job, "whole", save_every=2))
    far = [line["train/anchor_kl"] for line in whole]
    assert abs(far[0]) < 1e-6 < far[1] < far[-1], "it starts at the frozen model"
    run(job, config(job, "cut", save_every=2))
    shutil.rmtree(complete_checkpoints(Path("cut/checkpoints"))[-1])  # as if killed after step 2
    assert run(job, config(job, "cut", save_every=2, resume=True))[1] == whole

    # What it is held near is the model of the start, after training too.
    anchor = recipe._next_batch(batch := recipe._stream.next_batch())["found"]["anchor"]
    frozen = from_checkpoint(models / "reference", num_future_tokens=1)
    load_checkpoint(frozen, models / "reference")
    with torch.no_grad():
        hidden = frozen.hidden_states(batch["tokens"], document_ids=batch["document_ids"])[0]
    torch.testing.assert_close(anchor.hidden, hidden, rtol=1e-5, atol=1e-5)
    if job == "rho1":
        assert torch.equal(anchor.unembedding, frozen.unembedding)


def test_it_holds_head_1_back_and_is_refused_without_a_model(config):
    near, free = (run("rho1", config("rho1", name, **more))[1] for name, more in (
        ("near", {"anchor__weight": 20.0}), ("free", {"anchor__weight": 1e-6})))  # fmt: skip
    assert near[-1]["train/anchor_kl"] < 0.5 * free[-1]["train/anchor_kl"]
    for job, overrides, message in (
        ("rho1", {"reference_model": None}, "set reference_model, or anchor=null"),
        ("rho1", {"anchor__weight": 0}, "anchor: weight must be a number > 0, got 0"),
        ("lora_rho1", {"adapters__trunk": "frozen"}, "adapters.trunk is frozen, so that head 1 never moves"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            RECIPES[job](config(job, "refused", **overrides)).setup()
        assert "\n" not in str(error.value)


@pytest.mark.long
def test_two_processes_anchor_as_one_does(config, run_distributed, tmp_path):
    one = run("rho1", config("rho1", "one", batch_size=2, gradient_accumulation_steps=1))[1]
    [two] = run_distributed(2, config("rho1", str(tmp_path / "two"), batch_size=1, gradient_accumulation_steps=1))
    two = series([line for line in two if "train/loss" in line])
    for ours, theirs in zip(two, one, strict=True):
        for key in ("train/loss", "train/anchor_kl", "train/grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-6)
