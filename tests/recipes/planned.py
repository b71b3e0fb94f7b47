"""Processes of test_plan_memory.py: what the planner says of configs, and what a run of them holds in truth."""

import json
import math
import os
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from omegaconf import OmegaConf
from run_configs import run_configs
from torch.profiler import ProfilerActivity, profile

from recipes.full_finetune_distributed_wmtp import FullFinetuneRecipeWMTP
from runs import ROOT
from wmtp.config import build, changed, load
from wmtp.errors import line_for_user
from wmtp.generation import Request, Sampling, generate
from wmtp.models import llama_mtp
from wmtp.pretrained import byte_tokenizer
from wmtp.sweep.cells import Cell, flat
from wmtp.training.planning import plan as planning
from wmtp.training.planning.cards import CARDS, Card
from wmtp.training.planning.simulation import fake_world
from wmtp.training.planning.training_step import simulate_step

CPU = Card("CPU", 64e9, 1e12, 1e12, 1e11, 1e11, 1e11, 1.0)


def plans(result, *configs):
    """Write the bytes that each config's plan holds at most, on one CPU."""
    mesh = fake_world(1)
    found = [planning.plan_config(OmegaConf.load(cfg), mesh, CPU).memory for cfg in configs]
    Path(result).write_text(json.dumps(found))


def waits(result, config):
    """Write how often the host waits for the device in a step of a config on 2 simulated cards."""
    plan = planning.plan_config(OmegaConf.load(config), fake_world(2), CARDS["a100_80gb"])
    Path(result).write_text(json.dumps(plan.waits))


def depths(result, config):
    """Write a config's figures on 4 simulated cards, of the whole model and as two shallow ones tell them."""
    cfg, mesh = OmegaConf.load(config), fake_world(4)
    with planning.gpu_kernels():
        whole = simulate_step(cfg, mesh)
    told, _ = planning._measure(cfg, mesh, True)
    figures = {"whole": whole.figures, "told": told}
    Path(result).write_text(json.dumps({name: [[*key, n] for key, n in f.items()] for name, f in figures.items()}))


def measured(result, recipe_class, config):
    """Write the most bytes that the allocator had given out at one time in the third step of a run."""
    marks = []
    recipe = recipe_class(OmegaConf.load(config))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        recipe.setup()
        next_batch, save = recipe._stream.next_batch, recipe.save_checkpoint

        def marked(work):
            marks.append(time.time_ns())
            return work()

        with (
            patch.object(recipe._stream, "next_batch", lambda: marked(next_batch)),
            patch.object(recipe, "save_checkpoint", lambda: marked(save)),
        ):
            recipe.train()
    _write_most(result, profiler, marks[2], marks[3])


def _write_most(result, profiler, begun=0, ended=math.inf):
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        if begun <= event.start_ns() <= ended:
            most = max(most, live)
    Path(result).write_text(json.dumps(most))


def decoded(result, config):
    """Write the most bytes that the allocator had given out while a config's round of answers was decoded."""
    cfg, tokenizer = OmegaConf.load(config), byte_tokenizer()
    tokenizer.eos_id = -1  # no answer ends before it has all its tokens
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        model = build(cfg.model, where="model").requires_grad_(False).eval()
        length = cfg.model.max_seq_len - cfg.max_new_tokens
        requests = [Request(row, tuple(range(5, 105)) * (length // 100), (0, row)) for row in range(cfg.batch_size)]
        sampling = Sampling(cfg.max_new_tokens, cfg.temperatures[0])
        rows = {"batch_size": cfg.batch_size, "num_drafts": cfg.num_drafts, "kv_memory": 10**9}
        answers = list(generate(model, tokenizer, requests, sampling, **rows))
    assert {len(answer.tokens) for answer in answers} == {cfg.max_new_tokens}
    _write_most(result, profiler)


def largest(result, config, memory):
    """Write the largest micro-batch of a config on two small cards, and the bytes of it and of the next one."""
    cfg, mesh, card = OmegaConf.load(config), fake_world(2), Card("small", memory, 1e14, 1e13, 1e12, 1e11, 1e11, 1.0)
    rows = planning.largest_batch(cfg, mesh, card)
    held = []
    for number in (rows, rows + 1):
        cfg.batch_size = number
        held.append(planning.plan_config(cfg, mesh, card).memory)
    Path(result).write_text(json.dumps([rows, *held]))


def ways_out(result, config, memory):
    """Write what would make a config fit one small card, each with the bytes that a config so changed holds."""
    cfg, mesh = OmegaConf.load(config), fake_world(1)
    card = Card("small", memory, 1e14, 1e13, 1e12, 1e11, 1e11, 1.0)
    found = {}
    for way in planning.ways_out(cfg, mesh, card):
        so_changed = changed(cfg.copy(), way.partition(" (")[0].split(" "))
        found[way] = planning.plan_config(so_changed, mesh, card).memory
    Path(result).write_text(json.dumps(found))


def arms(result, config, cards):
    """Write the bytes that each cell of a sweep's config would hold on so many A100s."""
    os.chdir(ROOT)
    sweep, mesh = load(config), fake_world(cards)
    base = Cell("", sweep.recipe, sweep.config, flat(OmegaConf.to_container(sweep, resolve=True)["overrides"]))
    found = {}
    for entry in sweep.cells:
        changes = {**base.changes, **flat(OmegaConf.to_container(entry.get("overrides") or OmegaConf.create({})))}
        cell = replace(base, name=entry.name, config=entry.get("config", base.config), changes=changes)
        found[cell.name] = planning.plan_config(cell.settings(), mesh, CARDS["a100_80gb"]).memory
    Path(result).write_text(json.dumps(found))


def run(config, smallest):
    """Run the full fine-tuning recipe, with plans for models of so many parameters and more."""
    with patch("wmtp.training.planning.worth.SMALLEST", smallest):
        run_configs(config)


def run_out_of_memory(config):
    """Run the full fine-tuning recipe until a card has no memory for its first update; print the line for the user."""

    def refuse(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of")

    recipe = FullFinetuneRecipeWMTP(OmegaConf.load(config))
    recipe.setup()
    recipe._torch_optimizer.step = refuse
    try:
        recipe.train()
    except torch.OutOfMemoryError as error:
        print(line_for_user(error), flush=True)


def needs_numbers(**sizes):
    """Builds a model in a way that tensors without data do not allow."""
    assert torch.ones(()).item() == 1
    torch.rand(())
    return llama_mtp(**sizes)
