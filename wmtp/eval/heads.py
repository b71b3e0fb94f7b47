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
    ce, correct, count = sums
    names = {}
    for k in range(1, sums.shape[1] + 1):
        mean = ce[k - 1] / count[k - 1]
        names[f"ce_head{k}"] = mean.item()
        names[f"perplexity_head{k}"] = mean.exp().item()
        names[f"accuracy_head{k}"] = (correct[k - 1] / count[k - 1]).item()
    return names


def head_sums(scores: HeadScores) -> Tensor:
    """Returns [3, H] float64 sums of one batch, to be added up over batches and ranks."""
    return torch.stack([part.double().sum(dim=(1, 2)) for part in (scores.ce, scores.correct, scores.valid)])
