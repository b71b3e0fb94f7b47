"""A summary of one run in a few lines."""

import re
import statistics

from wmtp.report.runs import Run


def run_summary(run: Run) -> str:
    """Returns a run's held-out CE of each head and accept length, before and after training, and its median speed."""
    speeds = [value for _, value in run.metrics.get("train/tokens_per_second", ())]
    steps = max((points[-1][0] for points in run.metrics.values()), default=0)
    text = [f"{run.name}: {steps} steps, {statistics.median(speeds):.0f} tokens/s"] if speeds else []
    held_out = {key: points for key, points in sorted(run.metrics.items()) if re.match(r"eval/(.+/)?ce_head\d", key)}
    for number, (name, points) in enumerate(held_out.items()):
        (first, before), (last, after) = points[0], points[-1]
        if number == 0:
            ends = [f"step {step}" for step in (first, last)]
            text.append(f"{'held-out CE, nats per token':30}{ends[0]:>10}{ends[1]:>10}")
        text.append(f"  {name.removeprefix('eval/').replace('ce_', ''):28}{before:>10.4f}{after:>10.4f}")
    for name in sorted(key.removesuffix("_change") for key in run.metrics if key.endswith("accept_length_change")):
        before, after = (run.metrics[name][place][1] for place in (0, -1))
        low, high = (run.metrics[f"{name}_change_{end}"][-1][1] for end in ("low", "high"))
        text.append(f"  {name.removeprefix('eval/'):28}{before:>10.4f}{after:>10.4f}  change [{low:+.4f}, {high:+.4f}]")
    return "\n".join(text)
