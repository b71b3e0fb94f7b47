"""A summary of a run's metrics.jsonl in a few lines."""

import json
import statistics
from pathlib import Path

from wmtp.errors import UserError


def run_summary(output_dir: Path) -> str:
    """Returns a run's CE on held-out data of each head, before and after, and its median speed.

    Raises:
        ValueError: the folder holds no metrics of a run.
    """
    file = output_dir / "metrics.jsonl"
    if not file.exists():
        raise UserError(f"{output_dir} holds no metrics.jsonl: give the output_dir of a run")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    held_out = [line for line in lines if "eval/ce_head1" in line]
    speeds = [line["train/tokens_per_second"] for line in lines if "train/tokens_per_second" in line]
    text = [f"{output_dir}: {lines[-1]['step']} steps, {statistics.median(speeds):.0f} tokens/s"] if speeds else []
    if held_out:
        first, last = held_out[0], held_out[-1]
        steps = [f"step {line['step']}" for line in (first, last)]
        text.append(f"{'held-out CE, nats per token':30}{steps[0]:>10}{steps[1]:>10}")
        for name in sorted(key for key in first if key.startswith("eval/ce_head")):
            text.append(f"  {name.removeprefix('eval/ce_'):28}{first[name]:>10.4f}{last[name]:>10.4f}")
    return "\n".join(text)
