"""The critic's first stage on tiny data: it learns, stops, goes on bit for bit, and refuses what is wrong."""

import itertools
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from mlflow.tracking import MlflowClient
from omegaconf import OmegaConf
from processes import start
from services import new_store

from recipes.critic_stage1 import CriticStage1Recipe
from runs import ROOT, read_metrics, series
from wmtp.config import StopTraining, load
from wmtp.errors import Stopped
from wmtp.files import verify_manifest
from wmtp.models import MTPDecoder, load_value_model
from wmtp.pretrained import CheckpointError, hf_tokenizer, resolve_checkpoint
from wmtp.training.checkpoint import complete_checkpoints, load_trainer


@pytest.fixture
def critic_config(tmp_path, monkeypatch):
    """The shipped tiny config on pairs that differ by one letter, with overrides by dotted key."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"problem": f"p{n}", "prompt": f"# {n}\n", "correct": f"return a + {n}", "incorrect": f"return a - {n}"}
        for n in range(40)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def config(**overrides):
        cfg = load(ROOT / "configs" / "tiny" / "critic_stage1.yaml")
        cfg.output_dir, cfg.tracking = str(tmp_path / "critic"), None
        cfg.dataset = {"_component_": "wmtp.critic.jsonl_pairs", "source": str(tmp_path / "pairs.jsonl")}
        cfg.seq_len, cfg.optimizer.lr = 32, 0.01
        for key, value in overrides.items():
            OmegaConf.update(cfg, key.replace("__", "."), value)
        return cfg

    return config


def run(cfg):
    """Run the recipe in this process; returns it and its metrics."""
    recipe = CriticStage1Recipe(cfg)
    recipe.setup()
    recipe.train()
    recipe.finish()
    return recipe, read_metrics(cfg.output_dir)


def files_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def losses(metrics):
    return [line["train/loss"] for line in metrics if "train/loss" in line]


# ----------------------------------------------------------------------------------------------------------------------
# Learning, stopping, the result


def test_it_learns_stops_in_time_and_writes_the_value_model_of_the_best_step(critic_config):
    recipe, metrics = run(critic_config(max_steps=60, eval_every=4, lr_scheduler=None))
    assert losses(metrics)[0] == pytest.approx(0.693147, abs=1e-5)  # all values are 0: log 2
    held_out = {line["step"]: line["eval/pairwise_accuracy"] for line in metrics if "eval/auc" in line}
    best = max(held_out.values())
    first = min(step for step, accuracy in held_out.items() if accuracy == best)
    assert best == 1.0 and metrics[-1]["step"] == first + 3 * 4 < 60  # patience 3
    assert losses(metrics)[-1] < 0.2
    final = {key: value for key, value in metrics[-1].items() if key.startswith("final/")}
    assert final["final/value_model/pairwise_accuracy"] == 1.0
    assert final["final/length_only/pairwise_accuracy"] == 0.5  # all lengths are equal
    report = (recipe._output_dir / "report.md").read_text()
    assert f"best at step {first}" in report and "| pairwise accuracy | 1.000 [1.000, 1.000] | 0.500 [" in report

    folder = recipe._output_dir / "value_model"
    tokens = torch.tensor([hf_tokenizer(folder).encode("# 3\nreturn a + 3")])
    values = load_value_model(folder)(tokens)
    with torch.no_grad():  # the recipe's model is back at its best weights
        torch.testing.assert_close(values, recipe._model(tokens), atol=0, rtol=0)
    assert values.abs().max() > 0.1
    about = json.loads((folder / "value_model.json").read_text())
    assert about["settings"]["best_step"] == first and about["settings"]["loss"] == "pairwise"


def test_a_run_that_ends_without_an_evaluation_is_evaluated_once(critic_config):
    options = {"eval_every": None, "output_dir": "run"}
    stopped = CriticStage1Recipe(critic_config(max_steps=100, max_minutes=1e-9, **options))
    stopped.setup()
    with pytest.raises(Stopped, match="after step 1 of 100"):
        stopped.train()
    recipe, metrics = run(critic_config(max_steps=1, resume=True, **options))
    assert [line["step"] for line in metrics if "eval/auc" in line] == [1]
    assert "best at step 1" in (recipe._output_dir / "report.md").read_text()


def test_mse_learns_the_size_of_rewards(critic_config, tmp_path):
    """Labelled rows with rewards 3 and -1; values that regress these are no probabilities to calibrate."""
    rows = [
        {"problem": n, "prompt": f"# {n}\n", "completion": f"return a {sign} {n}", "reward": reward}
        for n in range(40)
        for sign, reward in (("+", 3.0), ("-", -1.0))
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = critic_config(loss="mse", reward_spread="terminal", score="last", max_steps=40, eval_every=None)
    cfg.lr_scheduler = None
    _, metrics = run(cfg)
    assert losses(metrics)[0] == pytest.approx((3**2 + 1**2) / 2)  # all values are 0
    assert losses(metrics)[-1] < 0.5
    assert metrics[-1]["final/value_model/pairwise_accuracy"] == 1.0
    assert "final/value_model/brier" not in metrics[-1] and "final/length_only/brier" in metrics[-1]


def test_a_test_part_is_reported_on_and_takes_no_part(critic_config):
    recipe, _ = run(critic_config(max_steps=2, test_fraction=0.3, save_every=None))
    parts = [set(data.problems) for data in (recipe._data, recipe._heldout, recipe._test)]
    assert all(parts) and not any(a & b for a, b in itertools.combinations(parts, 2))
    report = (recipe._output_dir / "report.md").read_text()
    assert "pairs of this report: test part" in report and "chosen on these same pairs" not in report
    saved = [path.name for path in complete_checkpoints(recipe._output_dir / "checkpoints")]
    assert saved == ["step_00000002"]  # at the end alone
    assert len(list((recipe._output_dir / "best").iterdir())) == 1


def test_only_what_is_trained_moves_and_each_group_has_its_rate(critic_config):
    """One step of AdamW moves a weight by about its learning rate."""
    lora = {"_component_": "wmtp.models.add_lora", "rank": 2}
    for backbone, section in (("frozen", None), ("lora", lora), ("full", None)):
        cfg = critic_config(backbone=backbone, lora=section, head="linear", head_lr=0.1, max_steps=1, lr_scheduler=None)
        cfg.output_dir, cfg.save_every = backbone, 1
        recipe = CriticStage1Recipe(cfg)
        recipe.setup()
        before = {name: p.to_local().clone() for name, p in recipe._model.named_parameters()}
        recipe.train()
        moved = {n: (p.to_local() - before[n]).abs().max().item() for n, p in recipe._model.named_parameters()}
        assert moved["value_head.out.weight"] == pytest.approx(0.1, rel=0.05)
        # The head starts at zero, so the first step's gradient of the backbone is zero.
        assert not any(distance for name, distance in moved.items() if not name.startswith("value_head"))
        trained = {name for name, p in recipe._model.named_parameters() if p.requires_grad}
        assert all(name.startswith("value_head") or "lora_" in name for name in trained) == (backbone != "full")
        groups = recipe._torch_optimizer.param_groups
        assert sum(len(group["params"]) for group in groups) == len(trained)
        assert {group["lr"] for group in groups} == ({0.1} if backbone == "frozen" else {0.1, cfg.optimizer.lr})
        # A checkpoint holds what is trained, not the frozen rest.
        metadata = dist.checkpoint.FileSystemReader(f"{backbone}/checkpoints/step_00000001").read_metadata()
        saved = {key.removeprefix("model.") for key in metadata.state_dict_metadata if key.startswith("model.")}
        assert saved == trained


def test_memory_options_change_nothing_but_memory(critic_config):
    options = {"max_steps": 3, "save_every": None, "backbone": "lora", "lora": {"_component_": "wmtp.models.add_lora"}}
    plain, recomputed, rounded = (
        run(critic_config(**options, **more))[1]
        for more in (
            {"output_dir": "plain"},
            {"output_dir": "recomputed", "activation_checkpointing": True},
            {"output_dir": "rounded", "dtype": "bf16"},
        )
    )
    norms = [[line["train/grad_norm"] for line in m if "train/loss" in line] for m in (plain, recomputed, rounded)]
    assert losses(recomputed) == pytest.approx(losses(plain), rel=1e-6)
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    assert norms[2] == pytest.approx(norms[0], rel=0.05) and norms[2] != norms[0]


@pytest.mark.parametrize("backbone", ["frozen", pytest.param("lora", marks=pytest.mark.long)])
def test_a_backbone_stored_in_bf16_gives_the_values_of_one_that_is_rounded_when_gathered(
    backbone, critic_config, monkeypatch
):
    section, found = {"_component_": "wmtp.models.add_lora"} if backbone == "lora" else None, []
    for name in ("stored", "rounded"):
        cfg = critic_config(output_dir=name, backbone=backbone, lora=section, dtype="bf16", max_steps=3)
        recipe, metrics = run(cfg)
        stored = {p.dtype for p in recipe._model.parameters() if not p.requires_grad}
        assert stored == {torch.bfloat16 if name == "stored" else torch.float32}
        assert all(p.dtype == torch.float32 for p in recipe._model.parameters() if p.requires_grad)
        found.append((losses(metrics), files_of(recipe._output_dir / "value_model")["value_head.safetensors"]))
        monkeypatch.setattr("recipes.critic_stage1.store_frozen", lambda model, dtype: model)
    assert found[0] == found[1]


def test_kept_hidden_states_train_the_same_and_are_used_again(critic_config, monkeypatch):
    options = {"backbone": "frozen", "head": "mlp", "max_steps": 6, "save_every": None}
    _, plain = run(critic_config(**options, output_dir="plain"))
    cfg = critic_config(**options, output_dir="kept", cache_hidden="fp32")
    _, kept = run(cfg)
    assert losses(kept) == pytest.approx(losses(plain), rel=1e-4)
    assert kept[-1]["final/value_model/auc"] == pytest.approx(plain[-1]["final/value_model/auc"], abs=0.02)

    def never(*args, **kwargs):
        raise AssertionError("the backbone ran again")

    monkeypatch.setattr(MTPDecoder, "hidden_states", never)
    cfg.overwrite = True
    _, again = run(cfg)
    assert series(again) == series(kept)


def test_rewards_of_a_model_replace_labels(critic_config, monkeypatch):
    from wmtp.critic import rewards

    class Length:
        file = "nowhere"

        def score(self, texts, names, device):
            return torch.tensor([len(text) / 100 for text in texts]).numpy(), len(texts)

    monkeypatch.setattr(rewards, "length_rewards", Length, raising=False)
    section = {"_component_": "wmtp.critic.rewards.length_rewards"}
    cfg = critic_config(reward_model=section, loss="mse", reward_spread="uniform", max_steps=1, save_every=None)
    recipe, metrics = run(cfg)
    assert recipe._data.rewards.max() < 0.3
    assert 0 < losses(metrics)[0] < 0.1  # the mean square of rewards around 0.2; labels would give 0.5
    about = json.loads((recipe._output_dir / "value_model" / "value_model.json").read_text())
    assert about["settings"]["reward_model"] == section


# ----------------------------------------------------------------------------------------------------------------------
# Going on


def test_a_resumed_run_goes_on_bit_for_bit_early_stopping_too(critic_config):
    options = {"max_steps": 30, "eval_every": 2, "save_every": 3, "patience": 2}
    whole, metrics = run(critic_config(**options, output_dir="whole"))
    stopped = whole._step
    assert stopped < 30
    run(critic_config(**options, output_dir="cut"))
    for number in (1, 2):  # go back to the checkpoint before the last, and what came after it is gone
        checkpoints = complete_checkpoints(Path("cut/checkpoints"))
        assert len(checkpoints) == 2 and checkpoints[-1].name == f"step_{stopped:08d}"
        shutil.rmtree(checkpoints[-1])
        if number == 2:
            shutil.rmtree("cut/value_model")
        again, resumed = run(critic_config(**options, output_dir="cut", resume=True))
        for checkpoint in complete_checkpoints(Path("cut/checkpoints")):  # what each may need to go back to is there
            assert Path(f"cut/best/step_{load_trainer(checkpoint, again._cfg)[0]['best']['step']:08d}").is_dir()
        assert series(resumed) == series(metrics) and again._best == whole._best
        assert files_of("cut/value_model") == files_of("whole/value_model")
    # A run that has stopped stays stopped.
    done, _ = run(critic_config(**options, output_dir="cut", resume=True))
    assert done._step == stopped and files_of("cut/value_model") == files_of("whole/value_model")


def test_a_run_that_goes_on_has_the_rates_of_its_config(critic_config, capfd):
    options = {"save_every": 2, "eval_every": None, "output_dir": "run"}
    run(critic_config(max_steps=2, **options))
    changed = critic_config(max_steps=4, **options, resume=True, lr_scheduler=None, optimizer__lr=0.25, head_lr=0.125)
    recipe, metrics = run(changed)
    assert [line["train/lr"] for line in metrics if "train/lr" in line][2:] == [0.125, 0.125]  # of the head, as said
    assert recipe._torch_optimizer.defaults["lr"] == 0.25
    said = capfd.readouterr().err
    schedule = "wmtp.training.lr_schedule.cosine_with_warmup"
    assert f"optimizer.lr 0.01 -> 0.25, head_lr null -> 0.125, lr_scheduler {schedule} -> null" in said


def run_all(*configs):
    """What each process does: run the recipe on each config, in one process group."""
    for path in configs:
        run(OmegaConf.load(path))
    dist.barrier()
    dist.destroy_process_group()


def launch(processes, *configs):
    paths = []
    for cfg in configs:
        paths.append(f"{cfg.output_dir}.yaml")
        OmegaConf.save(cfg, paths[-1])
    return start(run_all, *paths, size=processes, log=f"{paths[0]}.log")


@pytest.mark.long
def test_two_processes_equal_one_and_a_killed_run_goes_on_bit_for_bit(critic_config, tmp_path):
    lora = {"_component_": "wmtp.models.add_lora", "rank": 2, "dropout": 0.1}
    options = {"max_steps": 12, "eval_every": 2, "save_every": 1, "patience": None, "resume": "auto"}
    options |= {"optimizer__lr": 2e-3}  # small: where all gradients are small AdamW magnifies their rounding
    full = {**options, "batch_size": 4, "gradient_accumulation_steps": 1}
    halves = {**options, "batch_size": 1, "gradient_accumulation_steps": 2}
    kept = {"backbone": "frozen", "loss": "mse", "reward_spread": "gae", "cache_hidden": "fp32"}
    adapted = {"backbone": "lora", "lora": lora}

    def config(name, cut, **more):
        return critic_config(output_dir=str(tmp_path / name), **cut, **more)

    killed = config("killed", full, **adapted)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    process = launch(1, killed)
    while process.running() and (not metrics.exists() or metrics.read_text().count("\n") < 6):
        time.sleep(0.005)
    os.kill(process.pids[0], signal.SIGKILL)
    process.members[0].join()
    for folder in ("checkpoints", "best"):
        for complete in complete_checkpoints(tmp_path / "killed" / folder):
            verify_manifest(complete)
    assert not (tmp_path / "killed" / "value_model").exists()

    whole = (config("full1", full), config("kept1", full, **kept), config("alone", full, **adapted))
    launch(1, killed, *whole).join()
    assert series(read_metrics(tmp_path / "killed")) == series(read_metrics(tmp_path / "alone"))
    assert files_of(tmp_path / "killed" / "value_model") == files_of(tmp_path / "alone" / "value_model")

    launch(2, config("full2", halves), config("kept2", halves, **kept)).join()
    for name in ("full", "kept"):
        one, two = (read_metrics(tmp_path / f"{name}{n}") for n in (1, 2))
        assert losses(two) == pytest.approx(losses(one), rel=1e-4)
        norms = [[line["train/grad_norm"] for line in m if "train/loss" in line] for m in (one, two)]
        assert norms[1] == pytest.approx(norms[0], rel=1e-2)
        ours, theirs = (load_value_model(tmp_path / f"{name}{n}" / "value_model") for n in (1, 2))
        tokens = torch.tensor([list(b"# 3\nreturn a + 3")])
        torch.testing.assert_close(theirs(tokens), ours(tokens), atol=1e-3, rtol=1e-2)


# ----------------------------------------------------------------------------------------------------------------------
# MLflow


def test_mlflow_holds_the_report_and_the_value_model_which_loads_by_its_run(critic_config, tmp_path, monkeypatch):
    uri = new_store(tmp_path)
    tracking = {"_component_": "wmtp.tracking.MLflowLogger", "experiment": "e", "tracking_uri": uri}
    tracking["artifact_location"] = str(tmp_path / "artifacts")
    recipe, _ = run(critic_config(max_steps=2, save_every=None, tracking=tracking, log_model=True))
    recipe._log.close()
    monkeypatch.setenv("WMTP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client = MlflowClient(uri)
    (found,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert {"wmtp.data_sha256", "backbone_weights", "wmtp.git_commit"} <= set(found.data.tags)
    assert found.data.metrics["final/length_only/pairwise_accuracy"] == 0.5
    there = {a.path for a in client.list_artifacts(found.info.run_id)} - {"git_diff.patch"}
    assert there == {"config.yaml", "report.md", "value_model"}

    name = f"runs:/{found.info.run_id}/value_model"
    fetched = resolve_checkpoint(name)
    assert files_of(fetched) == files_of(recipe._output_dir / "value_model")
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(load_value_model(name)(tokens), load_value_model(recipe._output_dir / "value_model")(tokens))
    shutil.rmtree(tmp_path / "artifacts")
    assert resolve_checkpoint(name) == fetched  # once is enough

    def refused(name, message):
        with pytest.raises(CheckpointError, match=message) as error:
            resolve_checkpoint(name)
        assert "\n" not in str(error.value)

    refused(f"runs:/{found.info.run_id}/other", "the run has no artifact folder other; it has nothing")
    refused("runs:/0123456789abcdef0123456789abcdef/value_model", "has no run 0123456789abcdef0123456789abcdef")
    refused("runs:/value_model", "must be runs:/<run id>/<artifact path>")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/absent.db")
    refused(name, "absent.db does not exist; set MLFLOW_TRACKING_URI")
    assert not (tmp_path / "absent.db").exists()


# ----------------------------------------------------------------------------------------------------------------------
# What is wrong


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"reward_spreads": "gae"}, "unknown key 'reward_spreads' in config; did you mean 'reward_spread'"),
        ({"loss": "hinge"}, "loss must be one of mse, pairwise, got 'hinge'"),
        ({"loss": "mse"}, "loss mse needs a reward_spread"),
        ({"reward_spread": "uniform"}, "loss pairwise spreads no reward"),
        ({"gamma": 0.9}, "gamma is read by reward_spread gae alone"),
        ({"head": "deep"}, "head must be one of linear, mlp, got 'deep'"),
        ({"backbone": "lora"}, "set the section lora if, and only if, backbone is lora; backbone is lora"),
        ({"cache_hidden": "fp32"}, "cache_hidden keeps what a frozen backbone gives, backbone is full"),
        ({"reward_model": {"_component_": "wmtp.critic.rewards.hf_reward_model"}}, "loss pairwise reads no rewards"),
        ({"log_model": True}, "log_model is true, but tracking is null"),
        ({"epochs": 1}, "exactly one of epochs and max_steps"),
        ({"patience": 0}, "patience must be a whole number >= 1, got 0"),
        ({"heldout_fraction": 0.001}, "there is no problem in the heldout part, out of 40 at heldout_fraction 0.001"),
        ({"heldout_fraction": 1.5}, "heldout_fraction must be in (0, 1), got 1.5"),
        ({"seq_len": 4}, "are longer than seq_len 4"),
        ({"seq_len": 2000}, "seq_len 2000 is longer than model.max_seq_len 1024"),
        ({"batch_size": 100}, "fewer than batch_size 100 x world size 1 = 100"),
        ({"model__vocab_size": 100}, "model has 100 token ids, the dataset uses id 257"),
        ({"model__num_future_tokens": 2}, "num_future_tokens 1, got 2"),
        ({"dataset__source": "no/such/file.jsonl"}, "no/such/file.jsonl does not exist"),
        ({"checkpoint": "no/such/folder"}, "no/such/folder"),
        ({"resume": True}, "holds no complete checkpoint"),
    ],
)
def test_is_refused_in_one_line_and_leaves_no_trace(critic_config, overrides, message):
    cfg = critic_config(**overrides)
    with pytest.raises((ValueError, OSError)) as error:
        run(cfg)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not Path(cfg.output_dir).exists()


def test_wrong_pairs_are_named_by_file_and_line_or_problem(critic_config, tmp_path):
    good = {"problem": "p", "prompt": "", "correct": "a", "incorrect": "b"}
    for row, message in (
        ({"problem": "p", "prompt": "", "correct": "a"}, "pairs.jsonl:2: field 'incorrect' is missing"),
        ({"problem": "q", "prompt": "", "completion": "a", "reward": float("nan")}, "pairs.jsonl:2: field 'reward'"),
        ({"problem": "q", "prompt": "", "completion": "a", "is_correct": True}, "'q' has 1 correct and 0 incorrect"),
    ):
        (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(row)}\n")
        with pytest.raises(ValueError, match=message):
            run(critic_config())


def test_another_tokenizer_or_another_backbone_is_refused(critic_config, tmp_path):
    first = critic_config(max_steps=2, save_every=1, output_dir="first")
    run(first)
    # The value model's folder is a backbone like any other; with two ids swapped it is another tokenizer's.
    backbone = tmp_path / "backbone"
    shutil.copytree("first/value_model", backbone)
    tokenizer = backbone / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    vocab = content["model"]["vocab"]
    a, b = list(vocab)[:2]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    tokenizer.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="policy and backbone must share the token ids"):
        run(critic_config(checkpoint=str(backbone), output_dir="second"))
    # A checkpoint of the run does not hold the frozen weights, so they must still be the same.
    shutil.copy("first/value_model/tokenizer.json", tokenizer)
    first.resume, first.max_steps, first.checkpoint = True, 4, str(backbone)
    before = files_of("first/value_model")
    with pytest.raises(
        ValueError, match=r"cannot resume with backbone_weights random, seed 0 -> [0-9a-f]{64}; restore"
    ):
        run(first)
    first.checkpoint, first.loss, first.reward_spread = None, "mse", "uniform"
    with pytest.raises(ValueError, match="cannot resume with loss pairwise -> mse uniform"):
        run(first)
    assert files_of("first/value_model") == before


def test_non_finite_stops_before_the_weights_are_touched_and_names_the_problems(critic_config):
    recipe = CriticStage1Recipe(critic_config(save_every=None))
    recipe.setup()
    with torch.no_grad():
        next(recipe._model.layers[0].parameters()).to_local().view(-1)[0] = float("nan")
    before = [p.to_local().clone() for p in recipe._model.parameters()]
    with pytest.raises(StopTraining, match=r"step 1: loss nan.*weights were not touched. Problems of the batch: p\d+"):
        recipe.train()
    after = [p.to_local() for p in recipe._model.parameters()]
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(after, before, strict=True))


def test_a_run_is_never_overwritten_unless_told(critic_config):
    cfg = critic_config(max_steps=1, save_every=1)
    run(cfg)
    before = files_of(f"{cfg.output_dir}/value_model")
    with pytest.raises(ValueError, match="already holds a run; set resume=true"):
        run(cfg)
    assert files_of(f"{cfg.output_dir}/value_model") == before
