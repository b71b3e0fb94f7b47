"""Token Cleaning: one threshold for the whole data set, on scores that two frozen models gave beforehand."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wmtp.errors import UserError
from wmtp.weighting.base import AnyWeighting, Signals, check_range
from wmtp.weighting.targets import valid_targets

_ROWS = 256  # of the data set in memory at a time


def token_cleaning(percentile: float = 0.6, base: str = "base_ce") -> "TokenCleaning":
    """Weights that keep the best targets of the whole data set (Token Cleaning, fixed model, arXiv 2502.01968).

        score = CE_base - CE_reference;    w = N / kept where the score is among the data set's top share, else 0

    Both CEs are columns of the data (`recipes/score_reference.py` writes them), so that the threshold is found exactly
    before training. The mean weight over the data set is 1, that of a document or batch need not be: a document may
    keep nothing. The paper's self-evolving form is this one several times, with the columns scored anew in between.

    Args:
        percentile: share of the data set's targets that is kept, in (0, 1]; 0.6 in the paper.
        base: name of the column with the base model's CE.

    Raises:
        ValueError: a value out of its range.
    """
    check_range("percentile", percentile, 0 < percentile <= 1, "in (0, 1]")
    return TokenCleaning(percentile, base)


class TokenCleaning(AnyWeighting):
    """The weighting of :func:`token_cleaning`; :meth:`prepare` finds its threshold."""

    needs: frozenset[str]

    def __init__(self, percentile: float, base: str) -> None:
        super().__init__(self._weigh)
        self.name, self.needs, self.mean_one = "token_cleaning", frozenset({base, "reference_ce"}), "never"
        self.bounds = (0.0, float("inf"))
        self._percentile, self._base = percentile, base
        self._threshold: float | None = None
        self._weight = 1.0

    def prepare(self, tokenizer: Any, data: Any) -> None:
        """Finds the threshold in two readings of the data set's columns: of any size, and exact."""
        lacking = sorted(self.needs - set(data.signals))
        if lacking:
            raise UserError(
                f"token_cleaning takes one threshold over the data set, which has no column {', '.join(lacking)}; "
                "score it with recipes/score_reference.py"
            )
        high = np.zeros(1 << 16, np.int64)
        for keys in self._keys(data):
            high += np.bincount(keys >> 16, minlength=1 << 16)
        total = int(high.sum())
        wanted = max(1, round(self._percentile * total))
        top, above = _largest(high, wanted)
        low = np.zeros_like(high)
        for keys in self._keys(data):
            low += np.bincount(keys[keys >> 16 == top] & 0xFFFF, minlength=1 << 16)
        rest, more = _largest(low, wanted - above)
        kept = above + more + int(low[rest])
        bits = np.array([(top << 16) | rest], np.uint32)
        self._threshold = float(np.where(bits >> 31, bits ^ 0x80000000, ~bits).astype(np.uint32).view(np.float32)[0])
        self._weight = total / kept

    def rehearse(self) -> None:
        """Takes the threshold of two uniform random columns, in a plan."""
        share = self._percentile
        self._threshold = (2 * (1 - share)) ** 0.5 - 1 if share >= 0.5 else 1 - (2 * share) ** 0.5
        self._weight = 1 / share

    def _keys(self, data: Any) -> Iterator[np.ndarray]:
        """Yields unsigned keys in the order of the scores of head 1's targets, some rows at a time."""
        for first in range(0, len(data), _ROWS):
            batch = data.batch(list(range(first, min(first + _ROWS, len(data)))))
            score = (batch["signals"][self._base] - batch["signals"]["reference_ce"]) + 0.0
            bits = score[valid_targets(batch["labels"], 1, batch["document_ids"])[0]].numpy().view(np.uint32)
            yield np.where(bits >> 31, ~bits, bits | 0x80000000).astype(np.int64)

    def _weigh(self, signals: Signals) -> Tensor:
        if self._threshold is None:
            raise ValueError("token_cleaning has no threshold yet; call prepare(tokenizer, data) first")
        score = signals.named[self._base].detach().float() - signals.reference_ce.detach().float()
        return torch.where(signals.valid[0] & (score >= self._threshold), self._weight, 0.0)


def _largest(counts: np.ndarray, wanted: int) -> tuple[int, int]:
    """Returns the bin that holds the wanted-th largest entry, and the number of entries in higher bins."""
    from_top = counts[::-1].cumsum()
    place = int(np.searchsorted(from_top, wanted))
    return len(counts) - 1 - place, int(from_top[place - 1]) if place else 0
