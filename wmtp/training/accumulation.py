"""The micro-batches of one optimizer step, and what they sum to over all ranks."""

from typing import NamedTuple

import torch
from torch import Tensor

from wmtp.data import PackedDataset
from wmtp.distributed import all_reduce_sum, gather_objects
from wmtp.loss import MTPLoss
from wmtp.training.stopping import StopFlag
from wmtp.weighting.statistics import target_table, weight_statistics


class StepSums(NamedTuple):
    """Sums over an optimizer step's micro-batches and all ranks."""

    loss_sum: float
    num_targets: float  # sum_k b_k * N_k: divide the loss and the gradients by it, once
    tokens: float
    ce: list[float]  # mean cross-entropy of each head, nats per target, unweighted


class StepWindow:
    """Collects the micro-batches of one optimizer step."""

    def __init__(self) -> None:
        self.batches: list[dict] = []
        self.outs: list[MTPLoss] = []

    def __len__(self) -> int:
        return len(self.outs)

    def add(self, batch: dict, out: MTPLoss) -> None:
        self.batches.append(batch)
        self.outs.append(out)

    def head1_targets(self) -> float:
        """Target tokens so far, over all ranks."""
        return all_reduce_sum(sum(out.valid[0].sum() for out in self.outs)).item()

    def sums(self, stop: StopFlag | None = None) -> StepSums:
        """In one collective, in which the ranks also agree whether the run ends after this step."""
        ce = sum(out.ce.double().sum(dim=(1, 2)) for out in self.outs)  # [H]
        count = sum(out.valid.sum(dim=(1, 2)) for out in self.outs).double()  # [H]
        tokens = sum((batch["document_ids"] >= 0).sum() for batch in self.batches)
        scalars = [sum(out.loss_sum.double() for out in self.outs), sum(out.num_targets.double() for out in self.outs)]
        scalars += [tokens.double(), torch.full_like(scalars[0], float(stop is not None and stop.wanted()))]
        loss_sum, num_targets, tokens, wanted, *both = all_reduce_sum(
            torch.cat([torch.stack(scalars), ce, count])
        ).tolist()
        if stop is not None:
            stop.agree(wanted)
        heads = len(ce)
        means = [s / max(n, 1) for s, n in zip(both[:heads], both[heads:], strict=True)]
        return StepSums(loss_sum, num_targets, tokens, means)

    def weight_statistics(self) -> dict[str, float]:
        """Of the weights of all target tokens of the step, on all ranks; see wmtp.weighting.weight_statistics."""
        pairs = zip(self.batches, self.outs, strict=True)
        mine = [target_table(out.ce, out.valid, out.weights, batch["document_ids"]) for batch, out in pairs]
        everyone: Tensor = torch.cat(gather_objects(torch.cat(mine).cpu()))
        weights, policy_ce, position = everyone.unbind(1)
        return weight_statistics(weights, policy_ce=policy_ce, position=position)

    def documents(self, data: PackedDataset) -> str:
        """The documents of the micro-batches whose loss is not finite (of all, if every loss is), over all ranks."""
        rows = [batch["rows"] for batch in self.batches]
        bad = [r for r, out in zip(rows, self.outs, strict=True) if not bool(torch.isfinite(out.loss_sum))]
        everyone = gather_objects((bad, rows))
        batches = [r for bad, _ in everyone for r in bad] or [r for _, every in everyone for r in every]
        ids = [name for r in batches for row in r for name in data.row_ids(int(row))]
        return f"Documents of the batch: {', '.join(ids[:8])}{f' and {len(ids) - 8} more' if len(ids) > 8 else ''}"
