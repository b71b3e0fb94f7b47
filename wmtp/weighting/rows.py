"""Building blocks of weights: pure functions over rows.

A row [L] holds the scores of one scope (a document, or a batch); a mask says which of its entries are real.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from wmtp.errors import UserError
from wmtp.numerics.products import on_cuda

SPREAD = 1e-6  # a smaller range of scores is the float32 noise of two equal models' CE
SCOPES = ("sequence", "batch")
LOOK_AT = "look at the models and columns they come from"
_NEG_INF = float("-inf")


class ScopeRows(NamedTuple):
    """The place of each valid entry when every scope has a row of its own."""

    place: tuple[Tensor, ...]  # head, row of the batch and position of each valid entry, in this order: [N] each
    row: Tensor  # [N]
    column: Tensor  # [N], the entry's number within its scope, in order of position
    mask: Tensor  # [G, L] bool: entries that are real; a row has at least one

    def lay(self, values: Tensor) -> Tensor:
        """Lays values [N], one per valid entry, into rows [G, L], with zeros behind them."""
        rows = values.new_zeros(self.mask.shape)
        rows[self.row, self.column] = values
        return rows

    def pick(self, rows: Tensor) -> Tensor:
        """Takes the values [N] back out of rows [G, L]."""
        return rows[self.row, self.column]


def scope_rows(valid: Tensor, document_ids: Tensor | None, scope: str) -> ScopeRows:
    """Gives each scope that has a valid target a row of its own.

    Args:
        valid: [H, B, S] bool; heads never share a scope.
        document_ids: [B, S], equal within a document; None where each row of the batch is one document.
        scope: ``sequence`` (one document) or ``batch`` (all of [B, S]).
    """
    _, batch, seq = valid.shape
    head, line, position = place = valid.nonzero(as_tuple=True)  # [N] each, in order of position
    scope_id = head
    if scope == "sequence":
        scope_id = head * batch + line
        if document_ids is not None:  # numbered anew, so that ids of any size keep rows of the batch apart
            number, _ = _numbered(document_ids.flatten())
            scope_id = scope_id * (batch * seq) + number.view(batch, seq)[line, position]
    row, column = _numbered(scope_id)
    # The sizes, which the host needs, come over together: on CUDA it waits for them.
    sizes = (torch.stack([row.max(), column.max()]) + 1).tolist() if row.numel() else (0, 0)
    mask = valid.new_zeros(sizes)
    mask[row, column] = torch.ones_like(row, dtype=torch.bool)
    return ScopeRows(place, row, column, mask)


def _numbered(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers the distinct ids [N] from 0, in order of their size, and the entries of each, in their order.

    On CUDA the host does not wait for it, as it would for torch.unique.
    """
    ordered, order = ids.sort(stable=True)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    index = torch.arange(len(ids), device=ids.device)
    in_order = starts.cumsum(0) - 1, index - (index * starts).cummax(0).values
    number, column = (torch.empty_like(index).scatter_(0, order, values) for values in in_order)
    return number, column


def weigh_rows(scores: Tensor, rows: ScopeRows, rows_fn: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Applies ``rows_fn(scores [G, L], mask [G, L])`` to the scores of each scope, laid out as a padded row.

    Args:
        scores: [H, B, S].
        rows: of :func:`scope_rows`, of the valid entries.

    Returns:
        [H, B, S] float32, 0 where not valid.

    Raises:
        ValueError: if a valid score is not finite; on CUDA the results are NaN, which the loss refuses.
    """
    results = torch.zeros(scores.shape, dtype=torch.float32, device=scores.device)
    values = scores[rows.place].float()
    fine = require_finite(values, "token scores")
    if values.numel() > 0:
        found = rows.pick(rows_fn(rows.lay(values), rows.mask)).float()
        results[rows.place] = found.where(fine, math.nan)
    return results


def mean_one_unless_zero(weights: Tensor, mask: Tensor) -> Tensor:
    """Scales each row's real entries [G, L], >= 0, to mean 1, in float64; a row of zeros stays as it is."""
    mean = weights.double().sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    return weights.double() / torch.where(mean > 0, mean, 1.0)


def require_finite(values: Tensor, what: str) -> Tensor:
    """Returns whether no value is NaN or infinite, a bool on the values' device; on a CPU it refuses those that are.

    On CUDA the host does not wait for the answer: who asks makes NaN of what depends on it.
    """
    fine = torch.isfinite(values)
    if not on_cuda(values) and not fine.all():
        raise UserError(f"{int((~fine).sum())} of {values.numel()} {what} are not finite; {LOOK_AT}")
    return fine.all()


def z_score(scores: Tensor, mask: Tensor) -> Tensor:
    """Returns (score - mean) / standard deviation of each row's real entries, 0 without spread: [G, L] float64."""
    x = scores.double()
    count = mask.sum(1, keepdim=True).clamp(min=1)
    x = (x - (x * mask).sum(1, keepdim=True) / count) * mask
    std = (x.square().sum(1, keepdim=True) / count).sqrt()
    return torch.where(std > SPREAD, x / std.clamp(min=SPREAD), torch.zeros_like(x))


def spread(scores: Tensor, mask: Tensor) -> Tensor:
    """Returns the largest minus the smallest real score of each row: [G, 1]."""
    high = scores.masked_fill(~mask, _NEG_INF).amax(1, keepdim=True)
    low = scores.masked_fill(~mask, math.inf).amin(1, keepdim=True)
    return (high - low).clamp(min=0)


def is_flat(scores: Tensor, mask: Tensor) -> Tensor:
    """Returns whether a row's scores have no spread, so that they rank nothing: [G, 1] bool."""
    return spread(scores, mask) <= SPREAD


def top_share(scores: Tensor, mask: Tensor, share: float) -> Tensor:
    """Marks the round(share * n) >= 1 highest of each row's n real entries: [G, L] float; the earlier wins a tie."""
    keep = (mask.sum(1, keepdim=True) * share).round().clamp(min=1)
    order = scores.masked_fill(~mask, _NEG_INF).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return ((rank < keep) & mask).to(scores.dtype)


def clipped_mean_one(log_weights: Tensor, mask: Tensor, min_weight: float, max_weight: float) -> Tensor:
    """Returns :func:`clipped_mean` with mean 1: the last step of a continuous weighting."""
    return clipped_mean(log_weights, mask, min_weight, max_weight, torch.ones_like(mask[:, :1], dtype=torch.float64))


def clipped_mean(
    log_weights: Tensor, mask: Tensor, min_weight: float | Tensor, max_weight: float | Tensor, mean: Tensor
) -> Tensor:
    """Returns clip(exp(log_weights + c), min, max), with the c of each row that gives its real entries this mean.

    Clipping and normalising one after the other would break one of the two. The mean of the clipped weights grows with
    c, so c is found by bisection between log(mean) - max(log_weights), where no weight is above the mean, and
    log(mean) - min(log_weights), where none is below. Then the entries inside the clip are scaled once more, exactly.

    Args:
        log_weights: [G, L], finite, or -inf for a weight of zero, which stays zero unless the mean cannot be reached
            otherwise. They are logs so that no weight underflows before it is scaled.
        mask: [G, L] bool.
        min_weight, max_weight: 0 <= min <= max; two numbers, or two tensors [G, L], with 0 where masked out.
        mean: [G, 1] between the means of min and max.

    Returns:
        [G, L] float64, 0 where masked out.
    """
    logs = log_weights.double()
    # A zero is put so far below the smallest real weight that it underflows to 0 wherever that weight still counts.
    zero = logs == _NEG_INF
    floor = logs.masked_fill(zero | ~mask, math.inf).amin(1, keepdim=True).nan_to_num(posinf=0.0) - 2000.0
    logs = torch.where(zero, floor, logs)
    total = mask.sum(1, keepdim=True) * mean.double()
    log_mean = mean.double().clamp(min=1e-300).log()
    low = log_mean - logs.masked_fill(~mask, _NEG_INF).amax(1, keepdim=True).nan_to_num(neginf=0.0)
    high = log_mean - logs.masked_fill(~mask, math.inf).amin(1, keepdim=True).nan_to_num(posinf=0.0)

    def clip(weights: Tensor) -> Tensor:
        return weights.clamp(min_weight, max_weight)  # type: ignore[arg-type]  # both numbers, or both tensors

    def clipped(shift: Tensor) -> Tensor:
        return clip((logs + shift).exp()) * mask

    for _ in range(60):
        middle = (low + high) / 2
        below = clipped(middle).sum(1, keepdim=True) < total
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    weights = clipped(high)
    free = (weights > min_weight) & (weights < max_weight) & mask
    missing = total - (weights * ~free).sum(1, keepdim=True)
    scale = missing / (weights * free).sum(1, keepdim=True).clamp(min=1e-300)
    return clip(torch.where(free & (scale > 0), weights * scale, weights)) * mask
