"""What a user can get wrong: one line that names it, before anything is written, and a non-zero exit on every rank."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from runs import ROOT
from wmtp.errors import UserError
from wmtp.pretrained import byte_tokenizer


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"learning_rate": 1e-3}, "unknown key 'learning_rate'"),
        ({"max_step": 3}, "unknown key 'max_step' in config; did you mean 'max_steps'"),
        ({"weighting__percentil": 0.5}, "unknown key 'percentil' in weighting"),
        ({"optimizer__lrr": 0.5}, "unknown key 'lrr' in optimizer; did you mean 'lr'"),
        ({"model__num_future_token": 2}, "did you mean 'num_future_tokens'"),
        ({"batch_size": 0}, "batch_size must be a whole number >= 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be a whole number"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be a number > 0"),
        ({"dtype": "fp16"}, "dtype must be one of fp32, bf16, got 'fp16'"),
        ({"resume": "maybe"}, "resume must be one of"),
        ({"tokens_per_step": 100}, "exactly one of gradient_accumulation_steps and tokens_per_step"),
        ({"epochs": 1}, "exactly one of epochs and max_steps"),
        ({"seq_len": 512}, "seq_len 512 is longer than model.max_seq_len 256"),
        (
            {"extra_heads_lr": 0.1, "model__num_future_tokens": 1},
            "extra_heads_lr is set, but model.num_future_tokens is 1",
        ),
        ({"head_weights": [1.0]}, "head_weights must be 2 numbers"),
        ({"weighting___component_": "wmtp.weighting.Rho2"}, "'wmtp.weighting.Rho2' cannot be found"),
        ({"checkpoint": "no/such/folder"}, "no/such/folder"),
        ({"model__vocab_size": 100}, "model has 100 token ids"),
        ({"batch_size": 1000}, "fewer than batch_size 1000"),
        ({"dataset__root": "no/such/tree"}, "no/such/tree"),
        ({"dataset__min_body_lines": 10_000, "dataset__max_body_lines": None}, "empty"),
        ({"cpu_offload": True}, "cpu_offload needs device=cuda"),
        ({"hsdp_replicas": 2}, "hsdp_replicas must divide the world size 1"),
        ({"resume": True}, "holds no complete checkpoint"),
    ],
)
def test_is_refused_in_one_line_and_leaves_no_trace(tiny_config, run_recipe, overrides, message):
    cfg = tiny_config(**overrides)
    with pytest.raises((ValueError, OSError)) as error:
        run_recipe(cfg)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path(cfg.output_dir).exists()


def test_rho1_values_and_references(tiny_config, run_recipe, tmp_path):
    with pytest.raises(ValueError, match=r"weighting.percentile must be in \(0, 1\], got 1.5"):
        run_recipe(tiny_config("rho1", weighting__percentile=1.5))
    with pytest.raises(ValueError, match="needs reference_ce: set reference_model"):
        run_recipe(tiny_config("rho1", reference_model=None))

    export = tmp_path / "other"
    run_recipe(tiny_config(max_steps=1, save_every=None, output_dir=str(export)))
    tokenizer = export / "export" / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    vocab = content["model"]["vocab"]
    first, second = list(vocab)[:2]
    vocab[first], vocab[second] = vocab[second], vocab[first]  # same size, other ids
    tokenizer.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="token ids"):
        run_recipe(tiny_config("rho1", reference_checkpoint=str(export / "export")))


def test_a_run_is_never_overwritten_unless_told(tiny_config, run_recipe):
    cfg = tiny_config(max_steps=2, save_every=1)
    run_recipe(cfg)
    before = {p: p.read_bytes() for p in Path(cfg.output_dir).rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="already holds a run; set resume=true"):
        run_recipe(cfg)
    assert {p: p.read_bytes() for p in Path(cfg.output_dir).rglob("*") if p.is_file()} == before
    cfg.overwrite, cfg.max_steps = True, 1
    assert max(line["step"] for line in run_recipe(cfg)) == 1


def test_a_folder_of_other_files_is_no_place_for_a_run(tiny_config, run_recipe, tmp_path):
    weights = tmp_path / "mine" / "checkpoints" / "weights.pth"
    weights.parent.mkdir(parents=True)
    weights.write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds files that are no run's"):
            run_recipe(tiny_config(output_dir=str(tmp_path / "mine"), overwrite=overwrite))
    assert weights.read_text() == "precious"


@pytest.mark.parametrize("below", ["", "run"])
def test_a_file_is_no_place_for_a_run(tiny_config, run_recipe, tmp_path, below):
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(UserError, match=f"output_dir {file / below} can be no folder: {file} is a file; name another"):
        run_recipe(tiny_config(output_dir=str(file / below), dataset__root="no/such/tree"))
    assert file.read_text() == "precious" and [*tmp_path.glob(".*")] == []


def test_a_corrupt_checkpoint_is_named_and_left_alone(tiny_config, run_recipe):
    cfg = tiny_config(max_steps=2, save_every=2)
    run_recipe(cfg)
    shard = next(Path(cfg.output_dir).rglob("*.distcp"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-8])
    cfg.resume, cfg.max_steps = True, 4
    with pytest.raises(ValueError, match=rf"{shard.name} has {len(content) - 8} bytes, its manifest says"):
        run_recipe(cfg)
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="corrupt"):
        run_recipe(cfg)
    shard.write_bytes(content)
    cfg.model.embed_dim = 32
    with pytest.raises(ValueError, match=r"holds tok_embeddings\.weight as"):
        run_recipe(cfg)


def test_a_dataset_row_without_its_fields_is_named_by_file_and_line(tiny_config, run_recipe, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    cfg = tiny_config()
    cfg.dataset = {"_component_": "wmtp.data.prompt_completion", "source": str(rows)}
    with pytest.raises(ValueError, match=r"rows.jsonl:2.*completion"):
        run_recipe(cfg)


def test_the_reference_ce_column_replaces_the_reference_model(tiny_config, run_recipe, tmp_path):
    tokens = [len(byte_tokenizer().encode(text)) for text in ("def f():\n", "    return 1\n")]
    row = {"prompt": "def f():\n", "completion": "    return 1\n", "reference_ce": [1.0] * (sum(tokens) + 1)}
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for _ in range(64)))
    cfg = tiny_config("rho1", max_steps=2, save_every=None, reference_model=None)
    cfg.dataset = {"_component_": "wmtp.data.prompt_completion", "source": str(rows)}
    last = [line for line in run_recipe(cfg) if "train/loss" in line][-1]
    assert last["weights/kept_share"] == pytest.approx(0.6, abs=0.05)


@pytest.mark.long
def test_launched_on_two_processes_the_error_of_rank_1_alone_is_the_last_line(tiny_config, tmp_path):
    (tmp_path / "fails_on_rank_1.py").write_text(
        "import os\nfrom wmtp.pretrained import byte_tokenizer\nfrom wmtp.errors import UserError\n"
        "def tokenizer():\n    if os.environ['RANK'] == '1':\n"
        "        raise UserError('no room on this node; use another')\n"
        "    return byte_tokenizer()\n"
    )
    # The plug-in of torch's launcher as pyproject.toml declares it, whatever is installed.
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    plugin = tmp_path / "plugin-1.dist-info"
    plugin.mkdir()
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1\n")
    lines = [f"[{group}]\n{name} = {value}\n" for group, own in points.items() for name, value in own.items()]
    (plugin / "entry_points.txt").write_text("".join(lines))
    cfg = tiny_config(tokenizer={"_component_": "fails_on_rank_1.tokenizer"})
    OmegaConf.save(cfg, tmp_path / "bad.yaml")
    tune = Path(sys.executable).with_name("tune")
    recipe = "recipes/full_finetune_distributed_wmtp.py"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    environment.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(
        [tune, "run", "--nproc_per_node", "2", recipe, "--config", str(tmp_path / "bad.yaml")],
        cwd=ROOT, capture_output=True, text=True, timeout=400, env=environment,
    )  # fmt: skip
    said = done.stderr.splitlines()
    assert done.returncode == 1
    assert said[-1] == "error [rank 1]: no room on this node; use another (traceback: WMTP_TRACEBACK=1)"
    assert "Traceback" not in done.stderr and "ChildFailedError" not in done.stderr
    assert "OMP_NUM_THREADS" not in done.stderr
    assert len([line for line in said if "Skipping import" in line]) <= 1  # tune's own process, before any of ours
    assert not Path(cfg.output_dir).exists()
