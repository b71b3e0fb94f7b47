"""Controls are random weights with the distribution of a method's own. No claim about a method holds without them.

Random numbers are a hash of (seed, step, head, the document's labels, the target's place in its document). So a
document gets the same draw wherever it lies in a batch, on any rank, at any world size and after a resume, and a new
one at the next step.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from wmtp.errors import UserError
from wmtp.numerics.documents import positions_in_documents
from wmtp.numerics.keyed import GOLDEN, mix64, top53
from wmtp.numerics.products import on_cuda
from wmtp.weighting.base import AnyWeighting, Signals, any_weighting, builder_of, check_range
from wmtp.weighting.rows import ScopeRows, clipped_mean, require_finite


def shuffled(method: Callable[[Signals], Tensor | None], seed: int = 0) -> "Control":
    """A random permutation of the method's own weights among the targets of each document.

    The numbers, their mean and each document's share stay the method's; only the token that has a weight changes.

    Args:
        method: any weighting; weights [H, B, S] are permuted in each head by itself.
        seed: >= 0.
    """

    def redraw(weights: Tensor, rows: ScopeRows, key: Tensor) -> Tensor:
        # Real entries come first in a row, so with the largest key behind them they are permuted among themselves.
        order = rows.lay(key).masked_fill(~rows.mask, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
        return weights.gather(1, order)

    return Control(method, redraw, seed)


def random_matched(method: Callable[[Signals], Tensor | None], seed: int = 0) -> "Control":
    """Weights drawn with replacement from those that the method gave to the document.

    The draws are then scaled to the mean of the document's own weights (1 under scope ``sequence``) within the method's
    bounds. Zeros stay zeros as long as the mean can be reached without them. Where every draw is zero, every weight is
    that mean.

    Args:
        method: any weighting; its ``bounds`` are kept, (0, inf) where it has none. Heads are drawn independently.
        seed: >= 0.
    """
    low, high = getattr(method, "bounds", (0.0, float("inf")))

    def redraw(weights: Tensor, rows: ScopeRows, key: Tensor) -> Tensor:
        count = rows.mask.sum(1, keepdim=True)
        fraction = top53(rows.lay(key)).double() * 2.0**-53  # [0, 1)
        index = (fraction * count).long().clamp(max=rows.mask.shape[1] - 1)
        mean = (weights * rows.mask).sum(1, keepdim=True) / count
        drawn = weights.gather(1, index)
        return clipped_mean(drawn.log(), rows.mask, low, high, mean.clamp(low, high))

    return Control(method, redraw, seed)


class Control(AnyWeighting):
    """A weighting that asks ``method`` for weights and draws them anew inside each document.

    Args:
        method: a weighting, or any callable from signals to weights; its needs, its state and its end of a step are
            passed through.
        redraw: ``redraw(weights [G, L] float64, rows, key [N] int64) -> [G, L]``; a row is a document of one head.
        seed: >= 0.
    """

    def __init__(self, method: Callable[[Signals], Tensor | None], redraw: Callable, seed: int) -> None:
        if not callable(method):
            raise UserError(f"method must be a weighting (a section with a _component_), got {method!r}")
        check_range("seed", seed, isinstance(seed, int) and 0 <= seed < 2**63, "a whole number >= 0 and < 2^63")
        super().__init__(any_weighting(method))
        self._redraw, self._seed = redraw, seed
        self.name = f"{builder_of(redraw)}({self.name})"

    @torch.no_grad()
    def __call__(self, signals: Signals) -> Tensor | None:
        """Returns weights of the method's shape; None where the method gives None (all ones).

        Raises:
            ValueError: the method gave a weight that is not finite or is below 0.
        """
        weights = self._rule(signals)
        if weights is None:
            return None
        by_head = weights.dim() == 3
        valid = signals.valid if by_head else signals.valid[:1]
        rows = signals.rows(len(valid), "sequence")
        own = (weights if by_head else weights[None])[rows.place].double()
        fine = require_finite(own, "weights of the method")
        if not on_cuda(own) and bool((own < 0).any()):  # there, wmtp.weighting.check_weights asks for it now and then
            raise UserError(f"{int((own < 0).sum())} of {own.numel()} weights of the method are below 0")
        drawn = torch.zeros(valid.shape, dtype=torch.float32, device=valid.device)
        if own.numel() > 0:
            found = rows.pick(self._redraw(rows.lay(own), rows, self._keys(signals, rows))).float()
            drawn[rows.place] = found.where(fine, math.nan)
        return drawn if by_head else drawn[0]

    def _keys(self, signals: Signals, rows: ScopeRows) -> Tensor:
        """Draws an int64 for each valid target: [N]."""
        head, row, target = rows.place
        documents = torch.zeros_like(signals.labels) if signals.document_ids is None else signals.document_ids
        place = positions_in_documents(documents)[row, target]
        label = signals.labels[row, target].long()
        document = rows.lay(mix64(mix64(label + 1) + place * GOLDEN)).sum(1)[rows.row]  # same sum wherever it lies
        key = head.new_full((), self._seed)
        for part in (signals.step, head, document, place):
            key = mix64(key * GOLDEN + part + 1)
        return key
