"""Where things are, and what a run left behind."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


SPEED = ("per_second", "/data_wait", "/peak_memory_gib", "/tflops", "/mfu")  # ends of figures that differ each time


def series(lines):
    """All of a run's figures that must go on bit for bit: every one but its speed."""
    return [{name: value for name, value in line.items() if not name.endswith(SPEED)} for line in lines]


def read_metrics(output_dir):
    """The figures of each line; when they were logged is left out."""
    lines = map(json.loads, (Path(output_dir) / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def write_own_rules():
    """Write my_rules.py, a researcher's own weightings, into the working directory, where a config finds it."""
    Path("my_rules.py").write_text(
        """
import torch

from wmtp.weighting import Weighting, clipped_mean_one


def fewer_spaces(signals, least=0.5):  # a plain function of the signals, with a key
    weights = torch.where(signals.labels == 32, least, 1.0) * signals.valid[0]
    return weights * signals.valid[0].sum() / weights.sum()


def surprise(power=1.0):  # a builder of one
    def rule(signals):
        weights = signals.policy_ce[0] ** power * signals.valid[0]
        return weights * signals.valid[0].sum() / weights.sum()

    rule.needs = {"policy_ce"}
    return rule


def over_prior(prior="prior_ce"):  # a signal of its own, from a column of the data
    return Weighting(
        lambda signals: signals.policy_ce - getattr(signals, prior),
        lambda excess, mask: clipped_mean_one(excess, mask, 0.1, 5.0),
        needs={"policy_ce", prior},
        bounds=(0.1, 5.0),
    )


def thrice_ce():
    return Weighting(
        lambda signals: signals.policy_ce, lambda ce, mask: 3 * ce * mask, needs={"policy_ce"}, bounds=(0.0, 5.0)
    )
"""
    )
