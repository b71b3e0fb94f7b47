"""Figures that describe a step's weights."""

import math

import numpy as np
import torch
from torch import Tensor

from wmtp.weighting.rows import SPREAD, scope_rows


def target_table(ce: Tensor, valid: Tensor, weights: Tensor | None, document_ids: Tensor | None) -> Tensor:
    """Returns the figures of one micro-batch for :func:`weight_statistics`, to be joined over micro-batches and ranks.

    Args:
        ce, valid: [H, B, S], each head's CE (nats), and where it has a target.
        weights: [B, S] or [H, B, S]; None for all ones.
        document_ids: [B, S] or None, as given to the loss.

    Returns:
        [N, 3] float32: weight, head 1's CE (nats), and the place of the target among its document's, from 0 (first,
        or only) to 1 (last). N counts head 1's targets; every head's pairs where weights differ by head.
    """
    first = valid[:1]
    rows = scope_rows(first, document_ids, "sequence")
    last = (rows.mask.sum(1) - 1).clamp(min=1)
    place = torch.zeros_like(ce[:1])
    place[first] = rows.column.float() / last[rows.row]
    weights = torch.ones_like(place[0]) if weights is None else weights.detach().float()
    counted = valid if weights.dim() == 3 else first
    columns = [column.expand(counted.shape)[counted] for column in (weights, ce[:1], place)]
    return torch.stack(columns, dim=1)


def weight_statistics(
    weights: Tensor, *, policy_ce: Tensor | None = None, position: Tensor | None = None
) -> dict[str, float]:
    """Computes percentiles, concentration and correlations of the weights of N targets.

    Args:
        weights: [N] >= 0.
        policy_ce: [N], the policy's CE of each target.
        position: [N], the place of each target in its document.

    Returns:
        ``mean`` (1, as every weighting promises); ``p25, p75, p95, max`` (linear between order statistics);
        ``kept_share``: share of targets with weight > 0;
        ``effective_sample_size`` = (sum w)^2 / (N sum w^2), the share of the targets that the weights amount to (Kish
        1965), in [0, 1]; ``entropy`` of w / sum w, divided by log N, in [0, 1], 1 for equal weights;
        ``ce_correlation`` and ``position_correlation``, Pearson's, left out where one side has no spread. Both shares
        and the entropy are 0 where every weight is 0. Empty when there is no target.
    """
    w = weights.detach().double()
    if w.numel() == 0:
        return {}
    # torch.quantile refuses more than 2^24 numbers, numpy's does not.
    quantiles = np.quantile(w.cpu().numpy(), (0.25, 0.75, 0.95, 1.0)).tolist()
    figures = dict(zip(("p25", "p75", "p95", "max"), quantiles, strict=True))
    figures["mean"] = w.mean().item()
    figures["kept_share"] = (w > 0).double().mean().item()
    figures["effective_sample_size"] = (w.sum().square() / (w.numel() * w.square().sum()).clamp(min=1e-300)).item()
    figures["entropy"] = _relative_entropy(w)
    for name, other in (("ce_correlation", policy_ce), ("position_correlation", position)):
        correlation = None if other is None else _pearson(w, other.detach().double())
        if correlation is not None:
            figures[name] = correlation
    return figures


def _relative_entropy(w: Tensor) -> float:
    if not bool(w.sum() > 0):
        return 0.0
    if w.numel() == 1:
        return 1.0
    p = w / w.sum()
    return min(1.0, torch.special.entr(p).sum().item() / math.log(w.numel()))


def _pearson(x: Tensor, y: Tensor) -> float | None:
    if x.shape != y.shape:
        raise ValueError(f"each weight needs its partner: {tuple(x.shape)} weights, {tuple(y.shape)} others")
    if not all(bool(side.max() - side.min() > SPREAD) for side in (x, y)):
        return None
    r = torch.corrcoef(torch.stack([x, y]))[0, 1].item()
    return r if math.isfinite(r) else None
