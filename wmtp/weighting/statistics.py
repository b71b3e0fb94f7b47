"""Figures that describe a step's weights."""

import math
from collections.abc import Callable

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
    weights: Tensor,
    *,
    policy_ce: Tensor | None = None,
    position: Tensor | None = None,
    all_reduce: Callable[[Tensor], Tensor] = Tensor.double,
) -> dict[str, float]:
    """Computes percentiles, concentration and correlations of the weights of N targets.

    Args:
        weights: [N] >= 0.
        policy_ce: [N], the policy's CE of each target.
        position: [N], the place of each target in its document.
        all_reduce: returns the sum of a tensor over the ranks, float64, where each of them gives its own targets and
            gets the figures of all: :func:`wmtp.distributed.all_reduce_sum`. By default these targets are all.

    Returns:
        ``mean`` (1, as every weighting promises); ``p25, p75, p95, max`` (linear between order statistics);
        ``kept_share``: share of targets with weight > 0;
        ``effective_sample_size`` = (sum w)^2 / (N sum w^2), the share of the targets that the weights amount to (Kish
        1965), in [0, 1]; ``entropy`` of w / sum w, divided by log N, in [0, 1], 1 for equal weights;
        ``ce_correlation`` and ``position_correlation``, Pearson's, left out where one side has no spread. Both shares
        and the entropy are 0 where every weight is 0. Empty when there is no target.
    """
    given = {"ce_correlation": policy_ce, "position_correlation": position}
    others = {name: column for name, column in given.items() if column is not None}
    if any(column.shape != weights.shape for column in others.values()):
        raise ValueError(f"each of {tuple(weights.shape)} weights needs its partner in {', '.join(others)}")
    columns = torch.stack([column.detach().float() for column in (weights, *others.values())])  # [C, N]
    x = columns.double()
    sums = all_reduce(torch.stack([torch.ones_like(x[0]), x[0] > 0, x[0].square(), *x]).sum(1))
    count, kept, squares, total = sums[:4]
    if count == 0:
        return {}
    centred = x - sums[3:, None] / count
    entropy = torch.special.entr(x[0] / total.clamp(min=1e-300)).sum()
    products, variances = (centred * centred[0]).sum(1), centred.square().sum(1)
    entropy, *moments = all_reduce(torch.stack([entropy, *products, *variances]))
    products, variances = torch.stack(moments).unflatten(0, (2, -1))
    places = torch.tensor([0.0, 0.25, 0.75, 0.95, 1.0], dtype=torch.float64, device=x.device) * (count - 1)
    below, above = order_statistics(columns, torch.cat([places.floor(), places.ceil()]), all_reduce).chunk(2, dim=1)
    ordered = below.lerp(above, places.frac())  # [C, 5]
    figures = dict(zip(("p25", "p75", "p95", "max"), ordered[0, 1:].tolist(), strict=True))
    figures["mean"] = (total / count).item()
    figures["kept_share"] = (kept / count).item()
    figures["effective_sample_size"] = (total.square() / (count * squares).clamp(min=1e-300)).item()
    alone = float(total > 0)  # of a single target
    figures["entropy"] = min(1.0, entropy.item() / math.log(count)) if count > 1 else alone
    spread = ordered[:, -1] - ordered[:, 0] > SPREAD
    for i, name in enumerate(others, start=1):
        if spread[0] and spread[i]:
            figures[name] = (products[i] / (variances[0] * variances[i]).sqrt()).clamp(-1, 1).item()
    return figures


def order_statistics(columns: Tensor, places: Tensor, all_reduce: Callable[[Tensor], Tensor] = Tensor.double) -> Tensor:
    """Returns the values at places 0, 1, ... of each column in rising order over all ranks, exact, [C, P] float64.

    No rank sees another's values: in 32 steps, one for each bit of a float32, all ranks count how many are not above
    the middle of what is left. A rank keeps its own values, sorted, and sends C * P counts a step.

    Args:
        columns: [C, N] float32, N of this rank, which may be 0.
        places: [P], whole numbers below the number of values on all ranks.
        all_reduce: as in :func:`weight_statistics`.
    """
    bits = columns.contiguous().view(torch.int32)
    keys = (bits ^ (bits >> 31 & 0x7FFFFFFF)).sort(dim=1).values  # whole numbers in the order of the values
    low = torch.full((len(columns), len(places)), -(2**31), dtype=torch.int64, device=columns.device)
    high = torch.full_like(low, 2**31 - 1)
    for _ in range(32):
        middle = (low + high) >> 1
        enough = all_reduce(torch.searchsorted(keys, middle.int(), right=True)) > places
        low, high = torch.where(enough, low, middle + 1), torch.where(enough, middle, high)
    found = low.int()
    return (found ^ (found >> 31 & 0x7FFFFFFF)).view(torch.float32).double()
