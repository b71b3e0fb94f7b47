"""How well each head predicts held-out text: cross-entropy and top-1 accuracy per target, from sums of batches."""

import torch
from torch import Tensor

from wmtp.loss import HeadScores


def summarize_heads(sums: Tensor) -> dict[str, float]:
    """Means per head from sums over all batches and ranks.

    Args:
        sums: [3, H] float64: summed CE, correct predictions, targets.

    Returns:
        ``ce_head{k}`` (nats per target token), ``perplexity_head{k}`` and ``accuracy_head{k}``.
    """
    names: dict[str, float] = {}
    for k, (ce, correct, count) in enumerate(sums.T, start=1):
        figures = {"ce": ce / count, "perplexity": (ce / count).exp(), "accuracy": correct / count}
        names |= {f"{name}_head{k}": figure.item() for name, figure in figures.items()}
    return names


def head_sums(scores: HeadScores) -> Tensor:
    """Returns [3, H] float64 sums of one batch, to be added up over batches and ranks."""
    return torch.stack([part.double().sum(dim=(1, 2)) for part in (scores.ce, scores.correct, scores.valid)])
