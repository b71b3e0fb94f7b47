"""Figures that describe a step's weights."""

import math

import numpy as np
import torch
from scipy import special
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
    """Computes percentiles, concentration and correlations of the weights of N targets, in float64.

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
    w, count = weights.detach().double().cpu().numpy(), weights.numel()
    if count == 0:
        return {}
    total = w.sum()
    figures = dict(zip(("p25", "p75", "p95", "max"), np.quantile(w, (0.25, 0.75, 0.95, 1.0)).tolist(), strict=True))
    figures["mean"] = float(total / count)
    figures["kept_share"] = float((w > 0).mean())
    figures["effective_sample_size"] = float(total**2 / max(count * (w**2).sum(), 1e-300))
    entropy = float(special.entr(w / max(total, 1e-300)).sum())
    figures["entropy"] = min(1.0, entropy / math.log(count)) if count > 1 else float(total > 0)
    for name, column in (("ce_correlation", policy_ce), ("position_correlation", position)):
        if column is not None:
            x = column.detach().double().cpu().numpy()
            if np.ptp(w) > SPREAD and np.ptp(x) > SPREAD:
                figures[name] = float(np.corrcoef(w, x)[0, 1])
    return figures
