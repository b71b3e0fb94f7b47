"""The micro-batches of one optimizer step, and what they sum to over all ranks."""

import math
from typing import NamedTuple

import torch

from wmtp.config import StopTraining
from wmtp.data import BatchStream, PackedDataset
from wmtp.distributed import all_reduce_sum, gather_objects
from wmtp.loss import MTPLoss
from wmtp.training.stopping import StopFlag
from wmtp.weighting.statistics import target_table, weight_statistics


def num_training_steps(
    max_steps: int | None,
    epochs: float | None,
    data: PackedDataset,
    *,
    rows_per_micro_batch: int,
    micro_batches: int | None,
    target_tokens: int | None,
) -> int:
    """Returns the optimizer steps of a run of so many steps, or else passes over the data.

    Args:
        rows_per_micro_batch: over all ranks.
        micro_batches, target_tokens: of a step, as in :class:`Accumulation`.
    """
    if max_steps is not None:
        return max_steps
    if target_tokens is not None:
        return math.ceil(epochs * data.num_targets / target_tokens)
    return math.ceil(epochs * len(data) / (rows_per_micro_batch * micro_batches))


class StepSums(NamedTuple):
    """Sums over an optimizer step's micro-batches and all ranks."""

    loss_sum: float
    num_targets: float  # sum_k b_k * N_k: divide the loss and the gradients by it, once
    tokens: float
    targets: list[float]  # N_k, of each head
    ce: list[float]  # mean cross-entropy of each head, nats per target, unweighted
    divergence: dict[str, float]  # kl_head2 to kl_headH, from soft targets, and anchor_kl of head 1, likewise; if there


class Accumulation:
    """Collects the micro-batches of one optimizer step: so many, or so many target tokens over all ranks.

    Args:
        stream: gives the micro-batches. It knows the targets of all ranks' rows, so none asks the others.
        micro_batches: of the step; None to count target tokens.
        target_tokens: of head 1, over all ranks: the micro-batch that reaches them is the step's last.

    Attributes:
        full: the last micro-batch was taken from the stream; known before its loss is computed.
    """

    def __init__(self, stream: BatchStream, micro_batches: int | None, target_tokens: int | None = None) -> None:
        self._stream, self._micro_batches, self._target_tokens = stream, micro_batches, target_tokens
        self._taken, self._targets_before = 0, stream.num_targets
        self.full = False
        self.batches: list[dict] = []
        self.outs: list[MTPLoss] = []

    def next_batch(self) -> dict:
        """Takes this rank's rows of the next micro-batch from the stream."""
        batch = self._stream.next_batch()
        self._taken += 1
        if self._target_tokens is None:
            self.full = self._taken == self._micro_batches
        else:
            self.full = self._stream.num_targets - self._targets_before >= self._target_tokens
        return batch

    def add(self, batch: dict, out: MTPLoss) -> None:
        self.batches.append(batch)
        self.outs.append(out)

    def sums(self, stop: StopFlag | None = None) -> StepSums:
        """Adds up in one collective, in which the ranks also agree whether the run ends after this step."""
        ce = sum(out.ce.double().sum(dim=(1, 2)) for out in self.outs)  # [H]
        count = sum(out.valid.sum(dim=(1, 2)) for out in self.outs).double()  # [H]
        tokens = sum((batch["document_ids"] >= 0).sum() for batch in self.batches)
        scalars = [sum(out.loss_sum.double() for out in self.outs), sum(out.num_targets.double() for out in self.outs)]
        scalars += [tokens.double(), torch.full_like(scalars[0], float(stop is not None and stop.wanted()))]
        soft = [out.divergence.double() for out in self.outs if out.divergence is not None]
        divergence = torch.stack(soft).sum(0) if soft else ce[:0]
        anchor = [out.anchor_kl.double() for out in self.outs if out.anchor_kl is not None]
        anchored = torch.stack(anchor).sum()[None] if anchor else ce[:0]
        loss_sum, num_targets, tokens, wanted, *sums = all_reduce_sum(
            torch.cat([torch.stack(scalars), ce, count, divergence, anchored])
        ).tolist()
        if stop is not None:
            stop.agree(wanted)
        heads = len(ce)
        targets = sums[heads : 2 * heads]
        mean = lambda part: [s / max(n, 1) for s, n in zip(part, targets, strict=False)]
        found = {f"kl_head{k}": kl for k, kl in enumerate(mean(sums[2 * heads :][: len(divergence)]), start=1)}
        found.pop("kl_head1", None)  # it has no soft targets
        if anchor:
            found["anchor_kl"] = sums[-1] / max(targets[0], 1)
        return StepSums(loss_sum, num_targets, tokens, targets, mean(sums[:heads]), found)

    def weight_statistics(self) -> dict[str, float]:
        """Describes the weights of all target tokens of the step, over all ranks (wmtp.weighting.weight_statistics)."""
        pairs = zip(self.batches, self.outs, strict=True)
        mine = [target_table(out.ce, out.valid, out.weights, batch["document_ids"]) for batch, out in pairs]
        weights, policy_ce, position = torch.cat(mine).unbind(1)
        return weight_statistics(weights, policy_ce=policy_ce, position=position, all_reduce=all_reduce_sum)

    def require_finite(self, loss: float, grad_norm: float, step: int, data: PackedDataset) -> None:
        """Raises StopTraining, with the documents of the step, where its loss or gradient is not finite."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise StopTraining(
                f"step {step}: loss {loss}, gradient norm {grad_norm}; the weights were not touched. "
                f"{self.documents(data)}"
            )

    def documents(self, data: PackedDataset) -> str:
        """Names the documents of micro-batches whose loss is not finite (of all, if every loss is), over all ranks."""
        rows = [batch["rows"] for batch in self.batches]
        bad = [r for r, out in zip(rows, self.outs, strict=True) if not bool(torch.isfinite(out.loss_sum))]
        everyone = gather_objects((bad, rows))
        batches = [r for bad, _ in everyone for r in bad] or [r for _, every in everyone for r in every]
        ids = [name for r in batches for row in r for name in data.row_ids(int(row))]
        return f"Documents of the batch: {', '.join(ids[:8])}{f' and {len(ids) - 8} more' if len(ids) > 8 else ''}"
