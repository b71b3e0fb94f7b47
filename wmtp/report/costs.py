"""What training runs cost, from the figures of their logged steps."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from wmtp.report.runs import Run


@dataclass(frozen=True)
class Cost:
    """The sum over runs; None is not known of all of them.

    Attributes:
        tokens: that were trained on, padding not counted.
        seconds: of optimizer steps, without start-up, evaluation and checkpoints.
        flops: operations that the models need, over all devices.
        hours: of devices: seconds times the number of processes.
    """

    tokens: float | None
    seconds: float | None
    flops: float | None
    hours: float | None


def cost(runs: Iterable[Run]) -> Cost:
    """Returns what runs cost together; steps that were not logged count like the mean of those that were."""
    columns = zip(*map(_of_run, runs), strict=True)
    return Cost(*(None if None in column else float(sum(column)) for column in columns))


def _of_run(run: Run) -> tuple[float | None, ...]:
    tokens, speed = (dict(run.metrics.get(f"train/{name}", ())) for name in ("tokens", "tokens_per_second"))
    rates = dict(run.metrics.get("train/tflops", ()))
    steps = sorted(tokens.keys() & speed.keys())
    if not steps:
        return None, None, None, None
    seconds = np.array([tokens[step] / speed[step] for step in steps])
    share = steps[-1] / len(steps)
    processes = int(run.facts.get("world_size") or 1)
    flops = None
    if rates.keys() >= set(steps):
        flops = share * processes * 1e12 * float(seconds @ np.array([rates[step] for step in steps]))
    total = share * float(seconds.sum())
    return share * sum(tokens[step] for step in steps), total, flops, total * processes / 3600
