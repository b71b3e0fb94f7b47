"""The options of heads 2 to H in both training recipes: runs that use them all, resume, and read what they wrote."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from recipes.eval_heads import EvalHeadsRecipe
from recipes.lora_wmtp import LoRARecipeWMTP
from runs import read_metrics, series
from wmtp.models import export_hf, from_checkpoint, llama_mtp, load_checkpoint
from wmtp.models.adapter_folder import read_adapter
from wmtp.pretrained import byte_tokenizer
from wmtp.training.checkpoint import complete_checkpoints, latest_checkpoint

SIZES = {"vocab_size": 259, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 64}
SIZES |= {"intermediate_dim": 128, "max_seq_len": 256, "tie_word_embeddings": True}
ALL = {"_component_": "wmtp.loss.HeadTraining", "targets": "both", "soft_weight": 0.5, "top_k": 8, "temperature": 0.9}
ALL |= {"trunk_gradient": 0.5, "decay": 0.6, "warm_up_steps": 3, "adaptive": True}


@pytest.fixture
def base(tmp_path):
    """A checkpoint of a next-token model."""
    torch.manual_seed(1)
    export_hf(llama_mtp(**SIZES), tmp_path / "base", tokenizer_source=byte_tokenizer())
    return str(tmp_path / "base")


def on(base, cfg, **model):
    """A config whose model is read from the base, with heads that it lacks."""
    cfg.checkpoint = base
    cfg.model = {"_component_": "wmtp.models.from_checkpoint", "path": base, "num_future_tokens": 3, **model}
    return cfg


def run_lora(cfg):
    recipe = LoRARecipeWMTP(cfg)
    recipe.setup()
    recipe.train()
    recipe.export()
    return read_metrics(cfg.output_dir)


@pytest.mark.slow
@pytest.mark.parametrize("job", ["uniform", "lora_rho1"])
def test_a_resumed_run_goes_on_bit_for_bit_with_every_option(tiny_config, run_recipe, base, job):
    run = run_lora if job == "lora_rho1" else run_recipe

    def config(name, **more):
        cfg = on(base, tiny_config(job, output_dir=name, max_steps=5, save_every=2, eval_every=None, heads=ALL, **more))
        cfg.weighting = {"_component_": "wmtp.weighting.uniform"}
        cfg.reference_model = cfg.token_view = None
        return cfg

    whole = run(config("whole"))
    kept = torch.load(latest_checkpoint(Path("whole")) / "trainer.pt", weights_only=False)["heads"]["agreement"]
    assert kept[0] == 1.0 and all(0.3 < value < 1.0 and value != kept[1] for value in kept[2:])
    assert all(line[f"train/kl_head{k}"] > 0 for line in whole if "train/loss" in line for k in (2, 3))
    run(config("cut"))
    shutil.rmtree(complete_checkpoints(Path("cut/checkpoints"))[-1])  # as if killed after step 4
    assert series(run(config("cut", resume=True))) == series(whole)


@pytest.mark.long
def test_processes_agree_on_the_agreement(tiny_config, run_distributed, base):
    """Two processes weigh their heads alike, and as one process does that has all rows."""
    common = {"max_steps": 3, "eval_every": None, "export_dtype": "none", "heads": ALL}
    here = Path.cwd()
    for looped in (False, True):
        names = [str(here / f"{looped}{size}") for size in (1, 2)]
        for size, name in enumerate(names, 1):
            cfg = tiny_config(output_dir=name, batch_size=4 // size, gradient_accumulation_steps=1, **common)
            (metrics,) = run_distributed(size, on(base, cfg, looped_heads=looped))
            found = torch.load(latest_checkpoint(Path(name)) / "trainer.pt", weights_only=False)["heads"]["agreement"]
            figures = [[line["train/loss"], line["train/grad_norm"]] for line in metrics if "train/loss" in line]
            if size == 1:
                expected = found, figures
        assert found == pytest.approx(expected[0], abs=1e-5)
        torch.testing.assert_close(torch.tensor(figures), torch.tensor(expected[1]), atol=1e-4, rtol=1e-4)


@pytest.mark.long
def test_looped_heads_train_compiled_and_recomputed_and_are_evaluated(tiny_config, run_recipe, base):
    detached = {"_component_": "wmtp.loss.HeadTraining", "trunk_gradient": 0.0, "targets": "soft"}
    cfg = tiny_config(max_steps=6, save_every=None, eval_every=None, compile=True, activation_checkpointing=True)
    cfg = on(base, cfg, looped_heads=True, head_init="zero_residual")
    OmegaConf.update(cfg, "heads", detached)
    cfg.update({"accept_prompts": 4, "accept_tokens": 8})
    metrics = run_recipe(cfg)
    first, last = (line for line in metrics if "eval/ce_head1" in line)
    assert all(last[f"eval/ce_head{k}"] < first[f"eval/ce_head{k}"] for k in (1, 2, 3))
    export = Path(cfg.output_dir) / "export"
    assert json.loads((export / "mtp_config.json").read_text()) == {"num_future_tokens": 3, "looped_heads": True}

    evaluation = tiny_config("eval_heads", checkpoint=str(export), seq_len=256)
    evaluation.model = {"_component_": "wmtp.models.from_checkpoint", "path": str(export)}
    recipe = EvalHeadsRecipe(evaluation)
    recipe.setup()
    recipe.report(recipe.evaluate(), recipe.measure_speed())
    results = json.loads((Path(evaluation.output_dir) / "heads.json").read_text())
    assert "acceptance" in json.dumps(results)


def test_an_adapter_of_new_heads_is_read_as_it_was_trained(tiny_config, base):
    def config(name, **more):
        cfg = tiny_config("lora_rho1", output_dir=name, save_every=None, token_view=None, reference_model=None, **more)
        cfg.weighting = {"_component_": "wmtp.weighting.uniform"}
        cfg.adapters.update({"heads": "lora", "targets": ["q_proj", "output_proj", "w1", "w2"], "train_norms": False})
        cfg.heads = {"_component_": "wmtp.loss.HeadTraining", "trunk_gradient": 0.0, "targets": "soft"}
        return on(base, cfg, looped_heads=True, head_init="zero_residual")

    trained = run_lora(config("trained", max_steps=3, export_merged="fp32"))
    about = read_adapter("trained/adapter")
    assert (about["looped_heads"], about["head_init"]) == (True, "zero_residual")
    read = run_lora(config("read", max_steps=0, adapter="trained/adapter"))
    after = [line["eval/ce_head3"] for line in trained if "eval/ce_head3" in line]
    assert after[-1] != after[0] and [line["eval/ce_head3"] for line in read if "eval/ce_head3" in line] == after[-1:]
    merged = from_checkpoint("trained/export")
    load_checkpoint(merged, "trained/export")
    assert merged.config.looped_heads and merged.num_new_heads == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"heads__warm_up_steps": 11}, "warm_up_steps 11 is longer than the run's 10 steps"),
        ({"heads__targets": "soft", "model__num_future_tokens": 1}, "heads: the model has one head"),
        ({"heads__trunk_gradient": [0.0, 1.0]}, "trunk_gradient has 2 factors, the model 1 extra heads"),
        ({"heads__decay": 0.0}, "decay must be a number > 0, or null, got 0.0"),
        (
            {"heads__teacher": "reference", "heads__targets": "soft"},
            "teacher is 'reference', and there is no reference",
        ),
        ({"model__head_init": "zeros"}, "head_init must be one of copies, zero_residual, got 'zeros'"),
        ({"model__looped_heads": "yes"}, "looped_heads must be true or false, got 'yes'"),
    ],
)
def test_is_refused_in_one_line_and_leaves_no_trace(tiny_config, run_recipe, overrides, message):
    cfg = tiny_config(heads={"_component_": "wmtp.loss.HeadTraining"}, **overrides)
    with pytest.raises(ValueError) as error:
        run_recipe(cfg)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not Path(cfg.output_dir).exists()


def test_separate_heads_of_a_checkpoint_are_not_looped(tiny_config, run_recipe, tmp_path):
    export_hf(llama_mtp(**SIZES, num_future_tokens=3), tmp_path / "separate", tokenizer_source=byte_tokenizer())
    cfg = on(str(tmp_path / "separate"), tiny_config(), looped_heads=True)
    with pytest.raises(ValueError, match="has separate ones for its heads 2 to 3, the model one block") as error:
        run_recipe(cfg)
    assert "\n" not in str(error.value) and not Path(cfg.output_dir).exists()
