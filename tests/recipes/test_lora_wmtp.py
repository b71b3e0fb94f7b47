"""The LoRA recipe on the tiny config: what moves, what is kept, resuming, processes, cached trunk states, bad input."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from processes import start
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from recipes.lora_wmtp import LoRARecipeWMTP
from runs import ROOT, read_metrics, series, write_own_rules
from wmtp.config import ConfigError, load
from wmtp.files import content_sha256
from wmtp.models import export_hf, from_checkpoint, llama_mtp, load_checkpoint
from wmtp.training.checkpoint import complete_checkpoints, latest_checkpoint

SHIPPED = load(ROOT / "configs" / "tiny" / "lora_rho1.yaml")


@pytest.fixture
def base(tmp_path):
    """A checkpoint of a next-token model, the reference of the token weights too."""
    from wmtp.pretrained import byte_tokenizer

    torch.manual_seed(1)
    sizes = {"vocab_size": 259, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 64}
    model = llama_mtp(**sizes, intermediate_dim=128, max_seq_len=256, tie_word_embeddings=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    export_hf(model, tmp_path / "base", tokenizer_source=byte_tokenizer())
    return str(tmp_path / "base")


@pytest.fixture
def lora_config(tiny_config, base):
    """The shipped tiny config on the base, plain in what is not asked for."""

    def config(**overrides):
        cfg = tiny_config("lora_rho1", checkpoint=base, export_merged="none", max_steps=3, save_every=None)
        cfg.weighting = {"_component_": "wmtp.weighting.uniform"}
        cfg.reference_model = cfg.eval_dataset = cfg.token_view = None
        for key, value in overrides.items():
            OmegaConf.update(cfg, key.replace("__", "."), value)
        return cfg

    return config


def run(cfg):
    """Run the recipe in this process; returns it and its metrics."""
    recipe = LoRARecipeWMTP(cfg)
    recipe.setup()
    recipe.train()
    recipe.export()
    return recipe, read_metrics(cfg.output_dir)


def losses(metrics):
    return [line["train/loss"] for line in metrics if "train/loss" in line]


def values(recipe):
    plain = lambda p: (p.to_local() if hasattr(p, "to_local") else p).detach().to(torch.float32).clone()
    return {name: plain(p) for name, p in recipe._model.named_parameters()}


@pytest.mark.parametrize(
    "adapters",
    [
        {"heads": "full", "train_norms": True},
        {"heads": "lora", "dora": True, "quantize": "nf4", "dropout": 0.1},
        {"trunk": "frozen", "heads": "full"},
    ],
    ids=["lora", "qdora", "heads"],
)
def test_what_is_frozen_stays_and_only_what_is_trained_has_state(lora_config, adapters):
    """All frozen parameters bit for bit; optimizer and checkpoint hold the trained ones, by name and by size."""
    cfg = lora_config(save_every=2, **{f"adapters__{key}": value for key, value in adapters.items()})
    recipe = LoRARecipeWMTP(cfg)
    recipe.setup()
    before = values(recipe)
    recipe.train()
    trained = {name for name, parameter in recipe._model.named_parameters() if parameter.requires_grad}
    after = values(recipe)
    assert {name for name in before if not torch.equal(before[name], after[name])} == trained
    assert 0 < len(trained) < len(before)

    optimizer = recipe._torch_optimizer
    with_state = {id(p) for p, state in optimizer.state.items() if state}
    assert with_state == {id(p) for p in recipe._model.parameters() if p.requires_grad}
    metadata = FileSystemReader(str(latest_checkpoint(recipe._output_dir))).read_metadata().state_dict_metadata
    assert {key.removeprefix("model.") for key in metadata if key.startswith("model.")} == trained
    moments = {key for key in metadata if key.endswith((".exp_avg", ".exp_avg_sq"))}
    assert len(moments) == 2 * len(trained)
    sizes = [metadata[key].size.numel() for key in {f"model.{name}" for name in trained} | moments]
    assert sum(sizes) == 3 * sum(after[name].numel() for name in trained)


def test_a_base_stored_in_bf16_trains_as_one_that_is_rounded_when_gathered(lora_config, monkeypatch):
    found = []
    for name in ("stored", "rounded"):
        cfg = lora_config(dtype="bf16", output_dir=f"{lora_config().output_dir}-{name}")
        cfg.adapters.heads = "full"
        recipe, metrics = run(cfg)
        dtypes = {(p.requires_grad, p.dtype) for p in recipe._model.parameters()}
        frozen = torch.bfloat16 if name == "stored" else torch.float32
        assert dtypes == {(True, torch.float32), (False, frozen)}
        found.append(losses(metrics))
        monkeypatch.setattr("recipes.lora_wmtp.store_frozen", lambda model, dtype: model)
    assert found[0] == found[1] and len(found[0]) == 3


def test_held_out_ce_falls_and_the_merged_export_is_the_trained_model(lora_config, base):
    options = {"eval_dataset": SHIPPED.eval_dataset, "eval_every": None, "export_merged": "fp32"}
    Path(base, "generation_config.json").write_text('{"eos_token_id": [10, 257], "temperature": 0.6}')
    recipe, metrics = run(lora_config(max_steps=20, adapters__train_norms=True, **options))
    held_out = [line for line in metrics if "eval/ce_head1" in line]
    assert held_out[-1]["eval/ce_head1"] < 0.95 * held_out[0]["eval/ce_head1"]
    assert held_out[-1]["eval/ce_head2"] < 0.95 * held_out[0]["eval/ce_head2"]

    tokens = torch.arange(40).view(2, 20)
    merged = from_checkpoint(recipe._output_dir / "export")
    load_checkpoint(merged, recipe._output_dir / "export")
    assert merged.source.generation_config == {"eos_token_id": [10, 257], "temperature": 0.6}
    recipe._model.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            merged(tokens), recipe._model(tokens.to(recipe._world.device)).cpu(), atol=1e-5, rtol=1e-5
        )
    # The adapter folder on its base is the same model again: evaluated, exported, nothing trained.
    again = lora_config(output_dir="again", max_steps=0, adapters__train_norms=True, **options)
    again.adapter = str(recipe._output_dir / "adapter")
    _, evaluated = run(again)
    assert evaluated == [{"step": 0, **{k: v for k, v in held_out[-1].items() if k != "step"}}]
    assert complete_checkpoints(Path("again/checkpoints")) == []
    for name in ("adapter_model.safetensors", "wmtp_heads.safetensors"):
        ours, theirs = (load_file(folder / "adapter" / name) for folder in (Path("again"), recipe._output_dir))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_plain_function_as_weighting_trains_and_resumes(lora_config):
    write_own_rules()
    rule = {"_component_": "my_rules.fewer_spaces", "least": 0.25}
    options = {"max_steps": 4, "save_every": 2, "weighting": {"_component_": "wmtp.weighting.shuffled", "method": rule}}
    _, whole = run(lora_config(output_dir="whole", **options))
    assert all(line["weights/mean"] == pytest.approx(1, abs=1e-5) for line in whole)
    assert all(line["weights/max"] > 1.01 for line in whole)
    run(lora_config(output_dir="cut", **options))
    shutil.rmtree(complete_checkpoints(Path("cut/checkpoints"))[-1])
    assert series(run(lora_config(output_dir="cut", resume=True, **options))[1]) == series(whole)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_resumed_run_goes_on_bit_for_bit(lora_config, quantize):
    options = {"max_steps": 4, "save_every": 2, "adapters__quantize": quantize, "adapters__dropout": 0.1}
    options["dtype"] = "bf16" if quantize else "fp32"
    if not quantize:  # and how far the drafts carried before the first step
        options |= {"eval_dataset": SHIPPED.eval_dataset, "eval_every": None, "accept_prompts": 3, "accept_tokens": 4}
    _, whole = run(lora_config(output_dir="whole", **options))
    run(lora_config(output_dir="cut", **options))
    shutil.rmtree(complete_checkpoints(Path("cut/checkpoints"))[-1])  # as if killed after step 2
    _, resumed = run(lora_config(output_dir="cut", resume=True, **options))
    assert series(resumed) == series(whole)
    assert quantize or "eval/accept_length_change" in resumed[-1]
    ours, theirs = (load_file(f"{run}/adapter/adapter_model.safetensors") for run in ("cut", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    if quantize:  # other 4 bits are another base
        with pytest.raises(ConfigError, match=r"cannot resume with quantized_from torch\.bfloat16 -> null"):
            LoRARecipeWMTP(lora_config(output_dir="cut", resume=True, **options | {"dtype": "fp32"})).setup()


def test_kept_trunk_states_change_nothing(lora_config):
    options = {"adapters__trunk": "frozen", "eval_dataset": SHIPPED.eval_dataset, "eval_every": None, "max_steps": 3}
    _, plain = run(lora_config(output_dir="plain", **options))
    recipe, kept = run(lora_config(output_dir="kept", cache_trunk="fp32", **options))
    for ours, theirs in zip(series(kept), series(plain), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    ours, theirs = (pd.read_parquet(f"{name}/held_out/step_00000003.parquet") for name in ("kept", "plain"))
    assert len(theirs) > 20 and ours.ce.to_numpy() == pytest.approx(theirs.ce.to_numpy(), rel=1e-5)
    tokens = sum(int(data.row_tokens.sum()) for data in (recipe._data, *recipe._eval_data.values()))
    files = list(Path("kept/trunk_states").glob("*.bin"))
    assert len(files) == 2 and sum(file.stat().st_size for file in files) == tokens * 64 * 4
    # They are used, and used again by a later run of the same base and data.
    for file in files:
        file.write_bytes(b"\0" * file.stat().st_size)
        note = file.with_suffix(".json")  # else they are no longer what was written, and made again
        note.write_text(json.dumps(json.loads(note.read_text()) | {"sha256": content_sha256(file)}))
    _, zeros = run(lora_config(output_dir="kept", overwrite=True, cache_trunk="fp32", **options))
    assert losses(zeros)[0] != pytest.approx(losses(plain)[0], rel=1e-3)
    _, rounded = run(lora_config(output_dir="rounded", cache_trunk="bf16", **options))
    assert losses(rounded) == pytest.approx(losses(plain), rel=1e-2)


def test_weights_and_pages_are_those_of_the_full_recipe(lora_config, run_recipe, base):
    """Before the first update the model is the base, so both recipes see the same weights and the same loss."""
    torch.manual_seed(2)
    reference = {key: value for key, value in SHIPPED.reference_model.items() if key != "_component_"}
    export_hf(llama_mtp(**reference), Path("reference"), tokenizer_source=base)
    options = {"weighting": OmegaConf.merge(SHIPPED.weighting, {"mode": "soft"}), "max_steps": 2}
    options |= {"reference_model": SHIPPED.reference_model, "reference_checkpoint": "reference"}
    options["token_view"] = OmegaConf.merge(SHIPPED.token_view, {"every": 1})
    cfg = lora_config(**options)
    _, ours = run(cfg)
    of_adapters = ("adapters", "adapter", "cache_trunk", "export_merged", "merge_quantized")
    full = OmegaConf.create({key: value for key, value in cfg.items() if key not in of_adapters})
    full.export_dtype, full.output_dir = "none", "full"
    theirs = run_recipe(full)
    same = [key for key in theirs[0] if key.startswith("weights/") or key in ("train/loss", "train/ce_head2")]
    assert len(same) > 8 and {k: ours[0][k] for k in same} == pytest.approx({k: theirs[0][k] for k in same}, rel=1e-6)
    assert ours[0]["weights/max"] > 1.01
    assert (Path(cfg.output_dir) / "token_weights" / "step_00000001.html").stat().st_size > 1000

    options["weighting"] = OmegaConf.merge(SHIPPED.weighting, {"strength": 0.0})
    zero = lora_config(output_dir="zero", **options)
    assert losses(run(zero)[1]) == losses(run(lora_config(output_dir="uniform", max_steps=2))[1])


def test_a_run_that_goes_on_has_the_rates_of_its_config(lora_config, capfd):
    """Steps 3 and 4 of 4, by hand: after one step of warm-up the cosine is at 2/4 and 3/4 of its way to step 5."""
    options = {"save_every": 2, "output_dir": "run", "lr_scheduler__num_warmup_steps": 1}
    run(lora_config(max_steps=2, **options))
    _, metrics = run(lora_config(max_steps=4, **options, optimizer__lr=0.02, extra_heads_lr=0.5, resume=True))
    assert [line["train/lr"] for line in metrics][2:] == pytest.approx([0.02 * 0.5, 0.02 * (1 - 0.5**0.5) / 2])
    said = capfd.readouterr().err
    assert "max_steps 2 -> 4" in said and "optimizer.lr 0.003 -> 0.02" in said and "extra_heads_lr null -> 0.5" in said


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"adapters__targets": ["q_proj", "qkv"]}, "adapters.targets must be one or more of q_proj, "),
        ({"adapters__rank": 0}, "adapters.rank must be a whole number >= 1, got 0"),
        ({"adapters__ranks": 4}, "unknown key 'ranks' in adapters; did you mean 'rank'"),
        ({"adapters__seed": 4}, "unknown key 'seed' in adapters"),
        ({"cache_trunk": "fp32"}, "cache_trunk needs adapters.trunk=frozen"),
        ({"adapters__trunk": "frozen", "adapters__heads": "frozen"}, "leave nothing to train"),
        ({"adapters__quantize": "nf4", "export_merged": "bf16"}, "set merge_quantized=true"),
        ({"adapters__heads": "frozen", "extra_heads_lr": 0.1}, "extra_heads_lr is set, but no extra head is trained"),
        ({"adapter": "no/such/folder"}, "no/such/folder"),
        ({"export_dtype": "bf16"}, "unknown key 'export_dtype' in config"),
    ],
)
def test_is_refused_in_one_line_and_leaves_no_trace(lora_config, overrides, message):
    cfg = lora_config(**overrides)
    with pytest.raises((ValueError, OSError)) as error:
        run(cfg)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path(cfg.output_dir).exists()


def test_another_base_is_refused_by_hash(lora_config, base, tmp_path):
    cfg = lora_config(output_dir="first", max_steps=2, save_every=1)
    recipe, _ = run(cfg)
    shutil.copytree(base, tmp_path / "other")
    model = from_checkpoint(base)
    load_checkpoint(model, base)
    with torch.no_grad():
        model.norm.scale[0] += 1e-6
    shutil.rmtree(tmp_path / "other")
    export_hf(model, tmp_path / "other", tokenizer_source=base)
    before = {path: path.read_bytes() for path in Path("first").rglob("*") if path.is_file()}

    def refused(cfg, message):
        with pytest.raises(ValueError, match=message) as error:
            run(cfg)
        assert "\n" not in str(error.value)

    adapter = str(recipe._output_dir / "adapter")
    refused(
        lora_config(checkpoint=str(tmp_path / "other"), adapter=adapter), "belongs to another base: it was trained on"
    )
    again = {"output_dir": "first", "resume": True, "max_steps": 3, "save_every": 1}
    refused(
        lora_config(checkpoint=str(tmp_path / "other"), **again), "cannot resume with base_weights [0-9a-f]{64} -> "
    )
    refused(lora_config(adapters__alpha=3.0, **again), r"cannot resume with adapters\.alpha .* -> 3\.0; restore")
    assert {path: path.read_bytes() for path in Path("first").rglob("*") if path.is_file()} == before
    about = json.loads((Path(adapter) / "wmtp_adapter.json").read_text())
    assert about["base_weights"] == recipe._base["base_weights"] and len(about["base_weights"]) == 64


def run_all(*paths):
    for path in paths:
        run(OmegaConf.load(path))


@pytest.mark.long
def test_two_processes_train_what_one_does(lora_config, tmp_path):
    """LoRA, QLoRA with DoRA, and a frozen trunk with kept states: the same losses, and adapters of the same numbers."""
    kinds = {
        "lora": {"adapters__train_norms": True},
        "qdora": {"adapters__quantize": "nf4", "adapters__dora": True, "adapters__heads": "lora"},
        "heads": {"adapters__trunk": "frozen", "cache_trunk": "fp32"},
    }
    configs = {1: [], 2: []}
    for processes, group in configs.items():
        for kind, options in kinds.items():
            rows = {"batch_size": 4 // processes, "output_dir": str(tmp_path / f"{kind}{processes}")}
            group.append(str(tmp_path / f"{kind}{processes}.yaml"))
            OmegaConf.save(lora_config(max_steps=4, **rows, **options), group[-1])
        start(run_all, *group, size=processes, log=tmp_path / f"log{processes}.txt").join()
    for kind in kinds:
        one, two = (tmp_path / f"{kind}{processes}" for processes in (1, 2))
        assert losses(read_metrics(two)) == pytest.approx(losses(read_metrics(one)), rel=1e-4)
        for file in (one / "adapter").glob("*.safetensors"):
            ours, theirs = load_file(two / "adapter" / file.name), load_file(file)
            assert ours.keys() == theirs.keys()
            for key in theirs:
                torch.testing.assert_close(ours[key], theirs[key], atol=1e-4, rtol=1e-4)
