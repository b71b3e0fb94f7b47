"""One threshold for a whole data set: exact where its columns give the scores, else from a sketch of the last epoch's.

A score's bucket is made of the upper 16 bits of its float32: sign, exponent and seven bits, so that its lower edge is
at most 0.8 % below it. The sketch counts the scores of each of the 65,536 buckets, over all ranks and micro-batches,
and nothing else: it depends neither on their order nor on how they are cut.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from wmtp.errors import UserError
from wmtp.weighting.base import OF_THE_POLICY, Signals, Weighting, check_range
from wmtp.weighting.rows import top_share
from wmtp.weighting.targets import valid_targets

_ROWS = 256  # of the data set in memory at a time
_BUCKETS = 1 << 16


def token_cleaning(percentile: float = 0.6, base: str = "base_ce") -> Weighting:
    """Weights that keep the best targets of the whole data set (Token Cleaning, fixed model, arXiv 2502.01968).

        score = CE_base - CE_reference;    w = N / kept where the score is among the data set's top share, else 0

    Both CEs are columns of the data (`recipes/score_reference.py` writes them), so that the threshold is found exactly
    before training. The mean weight over the data set is 1, that of a document or batch need not be: a document may
    keep nothing. The paper's self-evolving form is this one several times, with the columns scored anew in between
    (docs/method.md). Of the scores 3, 2, 1 in one document and 0, -1 in another, 0.6 keep the first document's three,
    with weight 5/3 each, and none of the other.

    Args:
        percentile: share of the data set's targets that is kept, in (0, 1]; 0.6 in the paper.
        base: name of the column with the base model's CE.

    Raises:
        ValueError: a value out of its range.
    """
    needs = {base, "reference_ce"}
    threshold = DataThreshold(lambda s: (getattr(s, base) - s.reference_ce)[None], needs, percentile, offline=True)
    return Weighting(threshold.score, threshold.weigh, needs=needs, **threshold.of_weighting)


class DataThreshold:
    """The least score of the data set's top share: the state of a weighting whose scope is ``dataset``.

    Where the data's columns give the scores, it is found from them before training. Else each epoch takes that of the
    scores of the epoch before: those that training itself has seen since the last threshold, once they are as many as
    the data set's targets. Until then the share of each micro-batch is kept (scope ``batch``).

        w = total / kept where the score is not below the threshold, else 0

    with the numbers of scores that the threshold was found among, and kept: the mean weight is 1 over those.

    Args:
        of_signals: the score, as :class:`~wmtp.weighting.Weighting` takes it, of one head.
        needs: the signals that it reads.
        share: of the targets to keep, in (0, 1].
        offline: refuse data without these columns.
    """

    def __init__(
        self, of_signals: Callable[[Signals], Tensor], needs: Collection[str], share: float, *, offline: bool = False
    ) -> None:
        check_range("percentile", share, 0 < share <= 1, "in (0, 1]")
        self._of_signals, self._needs, self._share, self._offline = of_signals, set(needs), share, offline
        self._online, self._rehearsed = not offline, False
        self._targets: int | None = None  # of the data set
        self._threshold: float | None = None
        self._weight = 1.0
        self._counts = torch.zeros(_BUCKETS, dtype=torch.float64)  # since the last threshold, over all ranks
        self._gathered: Tensor | None = None  # of this step, on this rank

    @property
    def of_weighting(self) -> dict[str, Any]:
        """Returns the arguments of a weighting with this state: round(share * n) of n are kept, at least one."""
        return {"state": self, "scope": "batch", "mean_one": "never", "bounds": (0.0, 1.5 / self._share)}

    def prepare(self, tokenizer: Any, data: Any) -> None:
        """Finds the threshold in two readings of the data set's columns, of any size and exact, if they give it."""
        self._targets = data.num_targets
        lacking = sorted(self._needs - set(data.signals))
        if self._offline and lacking:
            raise UserError(
                f"token_cleaning takes one threshold over the data set, which has no column {', '.join(lacking)}; "
                "score it with recipes/score_reference.py"
            )
        self._online = bool(lacking) or not self._needs.isdisjoint(OF_THE_POLICY)
        if not self._online:
            high = _total(_count(keys >> 16) for keys in self._keys(data))
            wanted = max(1, round(self._share * int(high.sum())))
            top, above = _largest(high, wanted)
            low = _total(_count((keys & 0xFFFF)[keys >> 16 == top]) for keys in self._keys(data))
            rest, more = _largest(low, wanted - above)
            self._threshold = _score(top << 16 | rest)
            self._weight = float(high.sum()) / (above + more + float(low[rest]))

    def rehearse(self) -> None:
        """Lets a plan, which has no data, keep the share of each micro-batch."""
        self._rehearsed = True

    def _keys(self, data: Any) -> Iterator[Tensor]:
        for first in range(0, len(data), _ROWS):
            batch = data.batch(list(range(first, min(first + _ROWS, len(data)))))
            valid = valid_targets(batch["labels"], 1, batch["document_ids"])
            signals = Signals(batch["labels"], valid, batch["document_ids"], batch["signals"])
            yield _key(self._of_signals(signals)[valid])

    def score(self, signals: Signals) -> Tensor:
        """Returns the scores, and counts those of the targets in training."""
        scores = self._of_signals(signals)
        if self._online and signals.training:
            found = _count(_key(scores[signals.rows(1, "batch").place]) >> 16)
            self._gathered = found if self._gathered is None else self._gathered + found
        return scores

    def weigh(self, scores: Tensor, mask: Tensor) -> Tensor:
        """Returns the weights of rows of scores [G, L]."""
        if self._threshold is not None:
            return torch.where(mask & (scores >= self._threshold), self._weight, 0.0)
        if self._offline and not self._rehearsed:
            raise ValueError("token_cleaning has no threshold yet; call prepare(tokenizer, data) first")
        top = top_share(scores, mask, self._share)
        return top * (mask.sum(1, keepdim=True) / top.sum(1, keepdim=True).clamp(min=1))

    def end_step(self, all_reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Merges the step's counts of all ranks; a whole data set of them gives a new threshold."""
        if not self._online:
            return
        if self._targets is None or self._gathered is None:
            raise RuntimeError("scope dataset: call prepare(tokenizer, data) before training, and end_step once a step")
        self._counts += all_reduce_sum(self._gathered).cpu()
        self._gathered = None
        total = int(self._counts.sum())
        if total >= self._targets:
            bucket, above = _largest(self._counts, max(1, round(self._share * total)))
            self._threshold, self._weight = _score(bucket << 16), total / (above + float(self._counts[bucket]))
            self._counts.zero_()

    def state_dict(self) -> dict:
        """Returns threshold, weight and counts, the same on every rank; {} where the columns give the threshold."""
        if not self._online:
            return {}
        if self._gathered is not None:
            raise RuntimeError("state_dict: the step's counts are not merged yet; call end_step first")
        return {"threshold": self._threshold, "weight": self._weight, "counts": self._counts.clone()}

    def load_state_dict(self, state: dict) -> None:
        """Restores a :meth:`state_dict`, exactly."""
        if set(state) != set(self.state_dict()):
            raise UserError(
                f"scope dataset needs the state of its threshold, got {', '.join(sorted(state)) or 'nothing'}; "
                "resume with the weighting and the data of the checkpoint"
            )
        if state:
            self._threshold, self._weight = state["threshold"], state["weight"]
            self._counts, self._gathered = state["counts"].clone(), None


def _key(scores: Tensor) -> Tensor:
    """Returns whole numbers from 0 to 2^32 - 1 in the order of float32 scores; of 0 and -0 the same."""
    bits = (scores.float() + 0.0).contiguous().view(torch.int32).long()
    return torch.where(bits < 0, -(2**31) - bits - 1, bits) + 2**31


def _score(key: int) -> float:
    """Returns the score of a key."""
    bits = key - 2**31 if key >= 2**31 else -key - 1
    return torch.tensor([bits], dtype=torch.int64).int().view(torch.float32).item()


def _count(buckets: Tensor) -> Tensor:
    ones = torch.ones(buckets.shape, dtype=torch.float64, device=buckets.device)
    return torch.zeros(_BUCKETS, dtype=torch.float64, device=buckets.device).index_add_(0, buckets, ones)


def _total(parts: Iterable[Tensor]) -> Tensor:
    total = torch.zeros(_BUCKETS, dtype=torch.float64)
    for part in parts:
        total += part
    return total


def _largest(counts: Tensor, wanted: int) -> tuple[int, int]:
    """Returns the bucket that holds the wanted-th largest entry, and the number of entries in higher ones."""
    from_top = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, float(wanted)))
    return len(counts) - 1 - place, int(from_top[place - 1]) if place else 0
