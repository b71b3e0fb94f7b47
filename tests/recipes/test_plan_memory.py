"""The planner, held against runs: bytes of the allocator, the whole model, and its own words for bad input."""

import json
import os
import re
import subprocess
import sys
from collections import defaultdict

import pytest
from omegaconf import OmegaConf
from planned import arms, decoded, depths, largest, measured, plans, run, run_out_of_memory, waits, ways_out
from processes import start

from recipes.full_finetune_distributed_wmtp import FullFinetuneRecipeWMTP
from recipes.lora_wmtp import LoRARecipeWMTP
from recipes.plan_memory import _check, _recipe_of
from runs import ROOT, read_metrics
from wmtp.config import build, changed, load
from wmtp.errors import UserError
from wmtp.training.planning.cards import CARDS
from wmtp.training.planning.frozen_step import with_kv_memory
from wmtp.training.planning.plan import levers

SIZES = {
    "narrow": {"embed_dim": 128, "intermediate_dim": 256, "num_layers": 3, "vocab_size": 512},
    "wide": {"embed_dim": 512, "intermediate_dim": 1024, "num_layers": 3, "vocab_size": 4096},
    "deep": {"embed_dim": 256, "intermediate_dim": 512, "num_layers": 15, "vocab_size": 1024},
}
SIZES["looped"] = SIZES["wide"] | {"num_future_tokens": 4, "looped_heads": True}
RECIPES = {"uniform": FullFinetuneRecipeWMTP, "lora_rho1": LoRARecipeWMTP}


@pytest.fixture
def in_process(tmp_path):
    """Call a function of `planned` in a process of its own, and return what it wrote."""

    def call(function, *arguments, timeout=300):
        result = tmp_path / f"{function.__name__}.json"
        start(function, str(result), *arguments, size=1, log=tmp_path / "log.txt").join(timeout)
        return json.loads(result.read_text())

    return call


@pytest.fixture
def saved(tmp_path, tiny_config):
    """Save a tiny config of another size, of three steps without evaluation; return its path."""

    def save(job, size, **overrides):
        cfg = tiny_config(job, eval_dataset=None, eval_every=None, max_steps=3, preview=0, batch_size=4, **overrides)
        cfg.model.update(SIZES[size])
        if job == "lora_rho1":
            cfg.update({"weighting": {"_component_": "wmtp.weighting.uniform"}, "reference_model": None,
                        "reference_checkpoint": None, "token_view": None})  # fmt: skip
        path = tmp_path / f"{job}-{size}.yaml"
        cfg.output_dir = str(tmp_path / f"{job}-{size}")
        OmegaConf.save(cfg, path)
        return str(path)

    return save


@pytest.mark.parametrize("job", RECIPES)
@pytest.mark.parametrize("size", [pytest.param(s, marks=pytest.mark.long) if s != "wide" else s for s in SIZES])
def test_what_is_planned_is_what_a_run_holds(job, size, saved, in_process):
    path = saved(job, size)
    (planned,) = in_process(plans, path)
    assert planned == pytest.approx(in_process(measured, RECIPES[job], path), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [0, pytest.param(1, marks=pytest.mark.long)])
def test_what_is_planned_is_what_decoding_holds(drafts, tmp_path, in_process):
    cfg = load(ROOT / "configs/tiny/eval_mbpp.yaml")
    cfg.model.update(SIZES["wide"] | {"max_seq_len": 500})
    cfg.update({"num_samples": 8, "batch_size": 8, "max_new_tokens": 100, "num_drafts": drafts, "temperatures": [1.0]})
    OmegaConf.save(cfg, tmp_path / "answers.yaml")
    (planned,) = in_process(plans, str(tmp_path / "answers.yaml"))
    assert planned == pytest.approx(in_process(decoded, str(tmp_path / "answers.yaml")), rel=0.1)


@pytest.mark.slow
def test_heads_are_planned_with_the_caches_of_the_rows_whose_speed_is_measured(tmp_path, in_process):
    paths = {rows: str(tmp_path / f"{rows}.yaml") for rows in (1, 8)}
    for rows, path in paths.items():
        cfg = load(ROOT / "configs/tiny/eval_heads.yaml")
        cfg.model.update(SIZES["wide"] | {"max_seq_len": 1024})
        cfg.update({"seq_len": 64, "batch_size": 1, "speed_prompts": 8, "speed_batch_size": rows})
        OmegaConf.save(cfg, path)
    one, more = in_process(plans, *paths.values())
    positions = 7 * (1024 + 128)  # of prompts and answers, in whole steps of 128
    caches = positions * 4 * 2 * 2 * 128 * 4  # blocks, keys and values, heads, their size, bytes
    assert caches < more - one < 1.4 * caches  # one block's cache is there twice while it grows


@pytest.mark.parametrize(
    "weighting", ["rho1", *(pytest.param(w, marks=pytest.mark.long) for w in ("uniform", "dft", "entropy", "critic"))]
)
def test_the_host_waits_three_times_a_step(weighting, saved, in_process):
    """For the number of targets that a weighting keeps, for the step's sums and for the norm of its gradient."""
    path = saved("uniform", "narrow", weighting={"_component_": f"wmtp.weighting.{weighting}"})
    assert in_process(waits, path) == (2 if weighting == "uniform" else 3)


@pytest.mark.parametrize("recomputed", [2, *(pytest.param(how, marks=pytest.mark.long) for how in (True, "selective"))])
def test_two_shallow_models_tell_what_the_whole_one_does(recomputed, saved, in_process):
    found = in_process(depths, saved("uniform", "deep", activation_checkpointing=recomputed))
    whole, told = ({tuple(row[:-1]): row[-1] for row in found[name]} for name in ("whole", "told"))
    between = {key for key in whole if key[:2] == ("held", "backward of blocks")}
    assert between and whole.keys() - between == told.keys()
    assert {key: told[key] for key in told if abs(told[key] - whole[key]) > 1} == {}
    held = defaultdict(float)
    for (what, phase, *_), size in whole.items():
        held[phase] += size if what == "held" else 0
    assert held.pop("backward of blocks") <= max(held.values())


def test_a_shallow_policy_is_planned_with_the_whole_of_a_deep_reference(saved, in_process):
    config = saved("rho1", "wide", reference_checkpoint=None)
    cfg = OmegaConf.load(config)
    cfg.reference_model = {**cfg.model, "num_layers": 15}
    OmegaConf.save(cfg, config)
    found = in_process(depths, config)
    whole, told = ({tuple(row[:-1]): row[-1] for row in found[name]} for name in ("whole", "told"))
    frozen = {key for key in whole if "frozen models" in key}
    assert frozen and {key: told[key] for key in frozen if abs(told[key] - whole[key]) > 1} == {}


def test_the_first_blocks_gather_their_weights_when_their_backward_pass_begins(saved, in_process):
    found = in_process(depths, saved("uniform", "deep", activation_checkpointing=True))["whole"]
    gathered = {row[1]: row[-1] for row in found if row[0] == "held" and row[2] == "gathered weights"}
    block = gathered["backward of block 1"]
    assert all(gathered[f"backward of block {number}"] == block for number in range(2, 5))
    assert gathered["backward of block 5"] > 1.5 * block  # and the next one's


def test_an_evaluation_whose_weights_fill_the_card_says_so():
    cfg = load(ROOT / "configs/tiny/eval_mbpp.yaml")
    weights = sum(p.numel() * p.element_size() for p in build(cfg.model, where="model").parameters())
    for dtype, way in (("fp32", "dtype=bf16 halves them"), ("bf16", "use a larger card")):
        cfg.dtype = dtype
        with pytest.raises(UserError, match=rf"this run lacks .* GB for its weights alone, .*; {way}"):
            with_kv_memory(cfg, weights / 3)


def test_the_largest_micro_batch_fits_and_the_next_does_not(saved, in_process):
    rows, fits, more = in_process(largest, saved("uniform", "wide"), 1e9)
    assert rows > 8 and fits <= 1e9 < more


@pytest.mark.slow
@pytest.mark.parametrize(
    "memory, first",
    [
        (0.35e9, "batch_size=2 gradient_accumulation_steps=6"),
        pytest.param(0.2e9, "activation_checkpointing=true cpu_offload=true", marks=pytest.mark.long),
        pytest.param(0.001e9, "", marks=pytest.mark.long),
    ],
)
def test_what_would_fit_does_with_room_and_in_as_many_tokens_a_step(memory, first, saved, in_process):
    ways = in_process(ways_out, saved("uniform", "wide", gradient_accumulation_steps=3), memory)
    assert re.fullmatch(first, next(iter(ways), ""))
    assert all(held <= 0.97 * memory for held in ways.values())


def test_a_change_that_is_advised_is_one_that_its_recipe_takes(monkeypatch):
    """Where a frozen model is asked for by more than the weights, its column does not replace it."""
    monkeypatch.chdir(ROOT)
    for job in ("meta_mtp_7b/rho1", "smollm2_135m/asft", "smollm2_135m/lora_rho1", "smollm2_135m/critic_stage1"):
        cfg = load(ROOT / f"configs/{job}.yaml")
        found = levers(cfg, CARDS["a100_80gb"])
        for changes in found.values():
            so_changed = changed(cfg.copy(), changes)
            _check(so_changed, ROOT / "recipes" / _recipe_of(so_changed))
        assert any("scored column" in name for name in found) == job.endswith("rho1") and len(found) >= 4


def test_each_rank_without_memory_ends_with_its_plan_and_what_holds_less(saved, tmp_path):
    log = tmp_path / "log.txt"
    start(run_out_of_memory, saved("uniform", "narrow"), size=2, log=log).join()
    said = r"CUDA out of memory\. Tried to allocate 2\.00 GiB; plan: 0\.\d+ of \d+ GB on each of 2 x CPU.* in the .*"
    said += r"what would hold less: batch_size=\d gradient_accumulation_steps=\d \| activation_checkpointing=true \("
    assert len(re.findall(said, log.read_text(), re.MULTILINE)) == 2


@pytest.mark.parametrize("replicas", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_run_says_its_plan_before_it_starts_and_does_what_it_did(replicas, saved, tmp_path):
    rows = []
    for smallest in (0, 10**12):
        path = saved("uniform", "narrow", hsdp_replicas=replicas, overwrite=True)
        log = tmp_path / f"{smallest}.txt"
        start(run, path, smallest, size=2, log=log).join()
        steps = [row for row in read_metrics(OmegaConf.load(path).output_dir) if "train/loss" in row]
        rows.append([(row["train/loss"], row["train/grad_norm"]) for row in steps])
        assert log.read_text().count("on each of 2 x CPU") == (smallest == 0)
        assert "no plan" not in log.read_text()
    assert rows[0] == rows[1] and len(rows[0]) == 3


def test_a_run_that_cannot_be_simulated_says_so_and_goes_on(saved, tmp_path):
    path, log = saved("uniform", "narrow", **{"model._component_": "planned.needs_numbers"}), tmp_path / "log.txt"
    start(run, path, 0, size=2, log=log).join()
    assert log.read_text().count("no plan of this run: a simulated step ended with ") == 1
    assert len([row for row in read_metrics(OmegaConf.load(path).output_dir) if "train/loss" in row]) == 3


def plan_memory(*arguments):
    command = [sys.executable, "recipes/plan_memory.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.long
def test_the_recipe_prints_tables_and_writes_a_page(tmp_path):
    page = tmp_path / "plan.html"
    done = plan_memory("--config", "configs/tiny/rho1.yaml", "gpus=2", "gpu=h100_80gb", f"page={page}")
    assert done.returncode == 0, done.stderr
    assert re.match(r"plan: 0\.0\d+ of 85 GB on each of 2 x H100 80 GB", done.stdout), done.stdout
    for word in ("gathered weights", "frozen models", "scored column", "largest micro-batch that fits: batch_size="):
        assert word in done.stdout
    assert "<table>" in page.read_text() and "http" not in page.read_text()


@pytest.mark.parametrize(
    "changes, words",
    [
        (["gpu=a100"], "gpu must be one of a100_40gb, a100_80gb, h100_80gb, h200_141gb or cpu, got 'a100'"),
        (["model=null"], "plan_memory plans what runs a model; this config has none"),
        (["batch_sise=8"], "unknown key 'batch_sise' in config; did you mean"),
        (["batch_size=100000"], "a micro-batch of 25,600,000 tokens: at most 1,048,576 are planned; lower batch_size"),
        (["hsdp_replicas=2", "gpus=3"], "hsdp_replicas must divide gpus=3, got 2"),
        pytest.param(
            ["model.embed_dim=16384", "model.intermediate_dim=65536", "model.num_layers=24"],
            "this run lacks",
            marks=pytest.mark.long,
        ),
    ],
)
def test_bad_input_is_one_line_with_the_way_out(changes, words):
    done = plan_memory("--config", "configs/tiny/uniform.yaml", *changes)
    assert done.returncode != 0
    assert words in done.stderr.strip().splitlines()[-1]


@pytest.mark.long
def test_the_plans_in_7b_configs_are_fresh_and_fit_their_cards():
    command = [sys.executable, "docs/make_plans.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    said = dict(line.split(" # Plan: ", 1) for line in done.stdout.splitlines())
    held = {name: float(re.match(r"([\d.]+) GB on each of [14] x A100 80 GB ", line)[1]) for name, line in said.items()}
    stated = {str(f.relative_to(ROOT)) for f in (ROOT / "configs").glob("*_7b/*.yaml") if "# Plan: " in f.read_text()}
    assert held.keys() == stated and len(held) >= 19 and min(held.values()) > 1 and max(held.values()) < 70
    assert held["configs/meta_mtp_7b/rho1.yaml"] <= 32


@pytest.mark.long
@pytest.mark.parametrize("study", ["ablation", "heads"])
@pytest.mark.parametrize("model, cards", [("smollm2_135m", 1), ("meta_mtp_7b", 4)])
def test_every_arm_of_the_shipped_ablations_can_be_simulated_and_fits_its_card(model, cards, study, in_process):
    config = str(ROOT / "configs" / model / f"{study}.yaml")
    for name, held in in_process(arms, config, cards, timeout=1800).items():  # two simulations for each of 12 arms
        assert 1e9 < held < 40e9, name
