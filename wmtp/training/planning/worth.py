"""Which runs are planned, and why others are not."""

import torch
from omegaconf import DictConfig

from wmtp.config import build
from wmtp.errors import one_line

SMALLEST = 50_000_000  # parameters of a model that is worth the seconds that its plan takes


def is_worth_a_plan(cfg: DictConfig) -> bool:
    """Returns whether a training config's model is as large as that."""
    with torch.device("meta"):
        model = build(cfg.model, where="model")
    return sum(parameter.numel() for parameter in model.parameters()) >= SMALLEST


def why_unplanned(error: Exception) -> str:
    """Says what a simulation met that it cannot take."""
    return f"a simulated step ended with {type(error).__name__}: {one_line(error):.200}"
