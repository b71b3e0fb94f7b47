"""The check that a method's weights are what every weighting promises."""

import torch
from torch import Tensor

from wmtp.errors import UserError
from wmtp.weighting.base import AnyWeighting, Signals
from wmtp.weighting.rows import scope_rows

_FIRST, _EVERY = 3, 20  # steps
_MEAN_TOLERANCE, _BOUND_TOLERANCE = 1e-3, 1e-4  # far above what float32 weights and their sums are off


def is_checked(step: int) -> bool:
    """Returns whether the step's weights are checked: in few steps, because the check waits for the device."""
    return step < _FIRST or step % _EVERY == 0


def check_weights(weights: Tensor | None, signals: Signals, weighting: AnyWeighting) -> None:
    """Refuses ``weights`` of ``weighting`` that break its promises (:mod:`wmtp.weighting`); None is always right.

    Raises:
        ValueError: another shape than [B, S] or [H, B, S], a gradient, a weight that is not finite, is out of bounds or
            lies where no target is, or a scope whose mean is not 1. The message names weighting, place and value.
    """
    if weights is None:
        return
    name, (low, high) = f"weighting {weighting.name}", weighting.bounds
    shapes = tuple(signals.labels.shape), tuple(signals.valid.shape)
    if not torch.is_tensor(weights) or tuple(weights.shape) not in shapes:
        got = f"shape {tuple(weights.shape)}" if torch.is_tensor(weights) else type(weights).__name__
        raise UserError(f"{name} must return weights [B, S] = {shapes[0]} or [H, B, S] = {shapes[1]}, got {got}")
    if weights.requires_grad:
        raise UserError(f"{name} returned weights that carry a gradient; detach them")
    w = weights.reshape(-1, *shapes[0]).double()
    valid = signals.valid[: len(w)]

    def refuse(bad: Tensor, what: str, way_out: str) -> None:
        places = bad.nonzero()
        if len(places):
            head, row, j = places[0].tolist()
            at = f"{f'head {head + 1}, ' if len(w) > 1 else ''}row {row}, token {j}"
            value = f"{w[head, row, j].item():.6g}"
            raise UserError(f"{name} gave {len(places)} weights {what}, the first at {at}: {value}; {way_out}")

    refuse(valid & ~w.isfinite(), "that are not finite", "look at the signals that it reads")
    refuse(~valid & (w != 0), "not 0 where no target is", "multiply by signals.valid (a weight belongs to its target)")
    slack = _BOUND_TOLERANCE * max(1.0, abs(low)), _BOUND_TOLERANCE * (high if high < float("inf") else 1.0)
    outside = valid & ((w < low - slack[0]) | (w > high + slack[1]))
    refuse(outside, f"outside its bounds [{low:g}, {high:g}]", "see wmtp.weighting.clipped_mean_one")
    rows = scope_rows(valid, signals.document_ids, weighting.scope)
    means = rows.lay(w[valid]).sum(1) / rows.mask.sum(1)  # [G]
    off = ((means - 1).abs() > _MEAN_TOLERANCE).nonzero()
    if len(off):
        group = int(off[0])
        head, row, j = valid.nonzero()[rows.row == group][0].tolist()
        at = f"{f'head {head + 1}, ' if len(w) > 1 else ''}row {row}, from token {j} on"
        where = "the batch" if weighting.scope == "batch" else f"the document in {at}"
        raise UserError(
            f"{name} gave weights of mean {means[group].item():.6g} over the {int(rows.mask[group].sum())} targets of "
            f"{where} ({len(off)} of {len(means)} scopes are off); it must be 1: divide by the mean, or see "
            "wmtp.weighting.clipped_mean_one"
        )
