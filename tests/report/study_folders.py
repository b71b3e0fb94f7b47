"""Folders of studies in the formats that the recipes write, with numbers of a simple formula: many runs in a second."""

import functools
import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from omegaconf import OmegaConf

from wmtp.config import load
from wmtp.report.token_views import TokenView
from wmtp.report.token_weights import token_weights_html
from wmtp.tracking import TAGS

ROOT = Path(__file__).resolve().parents[2]
SETS = {"code": 2.0, "prose": 3.0}
AXES = ("strength", "temperature", "percentile")
VERDICTS = {"passed": 12, "wrong_answer": 20, "exception": 30, "timeout": 3}


@functools.cache
def tiny_config() -> dict:
    return OmegaConf.to_container(load(ROOT / "configs/tiny/rho1.yaml"), resolve=True)


def write_run(
    folder: Path,
    *,
    seed: int,
    method: str = "rho1",
    gain: float = 0.0,
    weighting: dict | None = None,
    steps: int = 20,
    documents: int = 40,
    heads: int = 2,
) -> None:
    """A finished run whose held-out CE on code is lower by `gain`, and on prose higher by half of it."""
    folder.mkdir(parents=True)
    cfg = tiny_config() | {"seed": seed, "output_dir": str(folder), "max_steps": steps}
    cfg["weighting"] = {"_component_": f"wmtp.weighting.{method}", **(weighting or {})}
    (folder / "config.yaml").write_text(yaml.safe_dump(cfg, sort_keys=False))
    rng = np.random.default_rng([seed, 7])
    luck = float(rng.normal(0, 0.002))
    spread = rng.normal(0, 0.3, (len(SETS), documents))
    own = np.random.default_rng([seed, round(1e4 * gain), *method.encode()])
    rows, last = [], {}
    for number, (name, level) in enumerate(SETS.items()):
        change = (-gain if name == "code" else gain / 2) + luck
        for document in range(documents):
            for head in range(1, heads + 1):
                ce = level + 0.4 * (head - 1) + spread[number, document] + change + float(own.normal(0, 0.004))
                rows.append((name, f"{name}/{document}", document, head, 30 + document, ce))
    columns = ["set", "document", "number", "head", "targets", "ce"]
    table = pd.DataFrame(rows, columns=columns).astype({"number": "int32", "head": "int8", "targets": "int32"})
    (folder / "held_out").mkdir()
    schema = pa.Table.from_pandas(table, preserve_index=False)
    schema = schema.replace_schema_metadata({"sha256": json.dumps({name: 64 * name[0] for name in SETS})})
    pq.write_table(schema, folder / "held_out" / f"step_{steps:08d}.parquet")
    for (name, head), part in table.groupby(["set", "head"]):
        last[f"eval/{name}/ce_head{head}"] = float(np.average(part["ce"], weights=part["targets"]))
    start = {metric: 2.2 if "prose" in metric else 5.5 for metric in last}
    lines = []
    for step in range(steps + 1):
        share = math.exp(-4 * step / steps)
        if step % 5 == 0 or step == steps:
            lines.append({"step": step, "time": 1e9 + step, **{k: v + (start[k] - v) * share for k, v in last.items()}})
        if step in (0, steps) and heads > 1:
            length, change = "eval/code/accept_length", 0.1 + gain
            lines[-1][length] = 1.2 + change * (step == steps)
            if step:
                ends = {"": change, "_low": change - 0.12, "_high": change + 0.12}
                lines[-1] |= {f"{length}_change{end}": value for end, value in ends.items()}
        if step == steps:
            lines[-1] |= last
        if step:
            kept = 1.0 if method == "uniform" else 0.4 + gain
            figures = {"train/loss": 2 + 3 * share, "train/ce_head1": 2 + 3 * share + float(rng.normal(0, 0.05))}
            figures |= {"train/ce_head2": 2.5 + 3 * share, "weights/kept_share": kept, "weights/max": 1 / kept}
            figures |= {"weights/effective_sample_size": kept, "weights/entropy": kept**0.1, "weights/p95": 1 / kept}
            figures |= {"train/tokens": 500.0, "train/tokens_per_second": 1000.0 + step, "train/tflops": 0.01}
            lines.append({"step": step, "time": 1e9 + step, **figures})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if method != "uniform":
        write_token_page(folder, steps, kept=0.4 + gain)
    facts = {
        "method": method,
        "data_sha256": "d" * 64,
        "rows_sha256": "d" * 64,
        "git_commit": "c0ffee",
        "recipe": "full_finetune_distributed_wmtp",
    }
    (folder / TAGS).write_text(json.dumps({f"wmtp.{name}": value for name, value in facts.items()}))
    write_evaluations(folder, own, gain=gain, heads=heads)


def write_token_page(folder: Path, step: int, kept: float) -> None:
    pieces = ["def ", "add", "(", "a", ", ", "b", "):\n    ", "return ", "a <", " b", " & ", "1", "\n"]
    n = len(pieces)
    weights = [0.0 if i / n > kept else 1 / kept for i in range(n)]
    view = TokenView("code/add", pieces, list(range(n)), [i > 3 for i in range(n)], {"this run": weights})
    folder = folder / "token_weights"
    folder.mkdir()
    page = token_weights_html([view], title=f"Token weights of step {step}")
    (folder / f"step_{step:08d}.html").write_text(page)


def write_evaluations(folder: Path, rng: np.random.Generator, gain: float, heads: int) -> None:
    """Evaluations of heads and of 65 tasks, with a sample each, of which the easier ones pass."""
    (folder / "evaluations" / "heads").mkdir(parents=True)
    quality = {f"ce_head{k}": 2 - gain + 0.4 * k for k in range(1, heads + 1)}
    speed = {
        f"drafts_{heads - 1}": {
            "speedup": 1.3,
            "tokens_per_forward": 1.5 + gain,
            "acceptance_head2": 0.5 + gain + float(rng.normal(0, 0.001)),
        }
    }
    heads_json = {"heads": quality, "teacher_forced": quality, "speed": speed}
    (folder / "evaluations" / "heads" / "heads.json").write_text(json.dumps(heads_json))
    (folder / "evaluations" / "mbpp").mkdir()
    better = round(100 * gain)
    verdicts = VERDICTS | {"passed": 12 + better, "exception": 30 - better}
    share = verdicts["passed"] / 65
    metrics = {"pass_at_1": {"estimate": share, "low": share - 0.05, "high": share + 0.05, "tasks": 65}}
    results = {"settings": {}, "tasks": 65, "samples": 65, "verdicts": verdicts, "fixed_temperature": "0.2"}
    easy = np.argsort(np.arange(65) + rng.normal(0, 10, 65))[: verdicts["passed"]]
    per_task = [{"task_id": f"t/{i}", "n": 1, "correct": int(i in easy)} for i in range(65)]
    results["temperatures"] = {"0.2": {"metrics": metrics, "samples_per_task": [1, 1], "per_task": per_task}}
    (folder / "evaluations" / "mbpp" / "results.json").write_text(json.dumps(results))


def write_study(folder: Path, *, seeds: int = 2, grid: bool = True, **options) -> Path:
    """A sweep: uniform, 27 cells of rho1 on phase 14's axes (or one), and its two controls."""
    strengths, temperatures, percentiles = (0.1, 0.3, 1.0), (0.5, 0.7, 1.0), (0.1, 0.2, 0.3)
    cells = {"uniform": ("uniform", 0.0, {})}
    for s, t, p in product(strengths, temperatures, percentiles) if grid else [(1.0, 0.7, 0.2)]:
        name = f"rho1_strength-{s}_temperature-{t}_percentile-{p}" if grid else "rho1"
        weights = {"mode": "emphasis", "strength": s, "temperature": t, "percentile": p}
        cells[name] = ("rho1", 0.02 * s * (2 - abs(t - 0.7)) * (1 - abs(p - 0.2)), weights)
    best = max(cells, key=lambda cell: cells[cell][1])
    on_axes = set(cells) - {"uniform"} if grid else set()
    cells |= {"shuffled": ("shuffled", 0.001, {}), "random_matched": ("random_matched", 0.0, {})}
    rows = []
    for cell, (method, gain, weighting) in cells.items():
        for seed in range(seeds):
            place = folder / "cells" / cell / f"seed-{seed}"
            write_run(place, seed=seed, method=method, gain=gain, weighting=weighting, **options)
            own = {f"weighting.{key}": weighting[key] for key in AXES} if cell in on_axes else {}
            command = f"tune run recipes/full_finetune_distributed_wmtp.py seed={seed}"
            rows.append({"cell": cell, "seed": seed, "state": "done", "axes": own, "error": None, "command": command})
    rows.append({"cell": "dft", "seed": 0, "state": "failed", "axes": {}, "error": "loss nan", "command": ""})
    (folder / "table.json").write_text(json.dumps({"study": folder.name, "rows": rows}))
    sweep = {"study": folder.name, "recipe": "recipes/full_finetune_distributed_wmtp.py", "baseline": "uniform"}
    sweep |= {"controls": {best: ["shuffled", "random_matched"]}, "margin": None, "objective": "eval/code/ce_head1"}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    return folder
