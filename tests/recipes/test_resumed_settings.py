"""A run that goes on with another config: what the config says is what runs, moments come from the checkpoint."""

import math
from pathlib import Path

import pytest
import torch

from recipes.full_finetune_distributed_wmtp import FullFinetuneRecipeWMTP
from runs import read_metrics
from wmtp.errors import UserError
from wmtp.training.checkpoint import latest_checkpoint

SHORT = {"eval_every": None, "eval_dataset": None, "export_dtype": "none", "save_every": 2, "output_dir": "run"}


def rates(folder="run"):
    return [line["train/lr"] for line in read_metrics(folder)]


def half_cosine(peak, steps, at):
    """By hand, for the tiny configs' two steps of warm-up."""
    return pytest.approx([peak * (1 + math.cos(math.pi * (i - 2) / (steps - 1))) / 2 for i in at])


def set_up(cfg):
    recipe = FullFinetuneRecipeWMTP(cfg)
    recipe.setup()
    recipe._log.close()
    return recipe


def moments(recipe):
    state = recipe._torch_optimizer.state_dict()["state"]
    return {
        (p, name): v.full_tensor() if hasattr(v, "full_tensor") else v for p in state for name, v in state[p].items()
    }


def test_rates_weights_and_moments_of_a_run_that_goes_on_otherwise(tiny_config, run_recipe, capfd):
    """The schedule is the new config's from the step reached, and so is every hyperparameter; the moments stay."""
    run_recipe(tiny_config(**SHORT, max_steps=4))
    assert rates()[:2] == [1.5e-3, 3e-3]
    assert rates()[2:] == half_cosine(3e-3, 4, (3, 4))
    saved = torch.load(latest_checkpoint(Path("run")) / "trainer.pt", weights_only=False)
    assert saved["config"]["optimizer"]["lr"] == 3e-3

    unchanged = set_up(tiny_config(**SHORT, max_steps=4, resume=True))
    assert "at step 4 of 4\n" in capfd.readouterr().err  # nothing else changed, so nothing else is said
    new = {"max_steps": 8, "optimizer__lr": 1e-3, "optimizer__betas": [0.8, 0.99], "optimizer__weight_decay": 0.1}
    changed = set_up(tiny_config(**SHORT, **new, resume=True))
    said = capfd.readouterr().err
    assert (
        "at step 4 of 8 with max_steps 4 -> 8, optimizer.lr 0.003 -> 0.001, optimizer.betas [0.9, 0.95] -> [0.8, 0.99]"
        ", optimizer.weight_decay 0.0 -> 0.1\n" in said
    )
    group = changed._torch_optimizer.param_groups[0]
    assert (group["initial_lr"], group["betas"], group["weight_decay"]) == (1e-3, (0.8, 0.99), 0.1)
    before, after = moments(unchanged), moments(changed)
    assert {name for _, name in after} == {"step", "exp_avg", "exp_avg_sq"}
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)

    run_recipe(tiny_config(**SHORT, **new, resume=True))
    assert rates()[4:] == half_cosine(1e-3, 8, (5, 6, 7, 8))


def test_a_finished_cosine_run_goes_on_at_a_constant_rate(tiny_config, run_recipe, capfd):
    run_recipe(tiny_config(**SHORT, max_steps=2))
    run_recipe(tiny_config(**SHORT, max_steps=4, resume=True, lr_scheduler=None, optimizer__lr=1e-4))
    assert rates()[2:] == [1e-4, 1e-4]
    assert "lr_scheduler wmtp.training.lr_schedule.cosine_with_warmup -> null" in capfd.readouterr().err


def test_the_extra_heads_may_get_a_rate_of_their_own_on_the_way(tiny_config, run_recipe):
    run_recipe(tiny_config(**SHORT, max_steps=2))
    alone = moments(set_up(tiny_config(**SHORT, max_steps=2, resume=True)))
    apart = set_up(tiny_config(**SHORT, max_steps=2, resume=True, lr_scheduler=None, extra_heads_lr=0.5))
    rates = {p: group["lr"] for group in apart._torch_optimizer.param_groups for p in group["params"]}
    for name, p in apart._model.named_parameters():
        assert rates[p] == (0.5 if name.startswith("extra_heads") else 3e-3)
    assert len(moments(apart)) == len(alone) > 0
    total = sum(v.double().square().sum() for v in alone.values())
    torch.testing.assert_close(sum(v.double().square().sum() for v in moments(apart).values()), total)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer__amsgrad": True}, r"cannot resume with optimizer\.amsgrad null -> True: AdamW .*max_exp_avg_sq"),
        ({"seed": 1}, "cannot resume: seed changed since the checkpoint, seed was 0, now 1"),
        ({"seq_len": 64}, r"cannot resume: the data or its packing \(dataset, tokenizer, seq_len, packed\) changed"),
        ({"model__embed_dim": 32}, r"cannot resume with model\.embed_dim 64 -> 32: .*the model has \(\d+, 32\)"),
    ],
)
def test_what_cannot_change_is_refused_by_name(tiny_config, run_recipe, changes, message):
    run_recipe(tiny_config(**SHORT, max_steps=2))
    with pytest.raises(UserError, match=message):
        FullFinetuneRecipeWMTP(tiny_config(**SHORT, max_steps=2, resume=True, **changes)).setup()


def test_another_optimizer_is_refused_by_name_where_it_keeps_other_moments(tiny_config, run_recipe):
    run_recipe(tiny_config(**SHORT, max_steps=2))
    cfg = tiny_config(**SHORT, max_steps=2, resume=True)
    cfg.optimizer = {"_component_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}
    message = (
        r"cannot resume with optimizer\._component_ torch\.optim\.AdamW -> torch\.optim\.SGD, .*: SGD keeps the state "
        "momentum_buffer, the checkpoint holds exp_avg, exp_avg_sq, step; restore the section optimizer"
    )
    with pytest.raises(UserError, match=message):
        FullFinetuneRecipeWMTP(cfg).setup()
