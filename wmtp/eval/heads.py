"""How well each head predicts held-out text: cross-entropy and top-1 accuracy per target, without [B, S, V] logits."""

from typing import NamedTuple

import torch
from torch import Tensor

from wmtp.loss import of_each_target
from wmtp.weighting.targets import Targets, valid_targets


class HeadScores(NamedTuple):
    """Per head and target; as everywhere, the position is the *target's*."""

    ce: Tensor  # [H, B, S] float32, nats; 0 where the head has no target
    correct: Tensor  # [H, B, S] bool: the head's most likely token is the target
    valid: Tensor  # [H, B, S] bool: where head k predicts target j


def score_heads(
    hidden: Tensor, unembedding: Tensor, labels: Tensor, *, document_ids: Tensor | None = None
) -> HeadScores:
    """Computes CE and correctness of every head's prediction of every target; a `loss_fn` for a model's forward.

    Args:
        hidden: [H, B, S, D] normed hidden states.
        unembedding: [V, D], same dtype and device.
        labels: [B, S] token ids, -100 where a token is no target.
        document_ids: [B, S]; a head never predicts across a document's edge.
    """
    valid = valid_targets(labels, hidden.shape[0], document_ids)
    ce, correct = of_each_target(_ce_and_correct, hidden, unembedding, labels, Targets(labels, document_ids))
    return HeadScores(ce, correct, valid)


def _ce_and_correct(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    return torch.nn.functional.cross_entropy(logits, label, reduction="none"), logits.argmax(dim=1) == label


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
