"""Cross-entropy over whole data sets, each rank its share of the rows."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from wmtp.data import PackedDataset, validation_batches
from wmtp.distributed import World, all_reduce_sum
from wmtp.loss import token_cross_entropy, weighted_mtp_cross_entropy
from wmtp.models import MTPDecoder


@torch.no_grad()
def validate(
    model: MTPDecoder, data: PackedDataset, inputs: Callable[[dict], dict], batch_size: int, world: World
) -> list[float]:
    """Computes the mean CE of each head, in nats per target token, over all of a data set; the same on every rank.

    Args:
        model: an :class:`~wmtp.models.MTPDecoder`, which is left in evaluation mode.
        inputs: what the model reads of a batch, on its device.
        batch_size: rows of one rank's batch.
    """
    model.eval()
    sums = torch.zeros(2, model.num_future_tokens, dtype=torch.float64, device=world.device)
    for batch in validation_batches(data, batch_size, world.rank, world.size):
        out = model(**inputs(batch), labels=batch["labels"].to(world.device), loss_fn=weighted_mtp_cross_entropy)
        sums += torch.stack([part.double().sum(dim=(1, 2)) for part in (out.ce, out.valid)])
    ce, count = all_reduce_sum(sums)
    return (ce / count).tolist()


@torch.no_grad()
def epoch_cross_entropy(
    kept: dict | None,
    epoch: int,
    model: nn.Module,
    data: PackedDataset,
    inputs: Callable[[dict], dict],
    *,
    heads: int,
    batch_size: int,
    world: World,
) -> dict:
    """Computes the CE of the first heads for every target of a data set, as an epoch begins, on every rank.

    Args:
        kept: of an earlier call, returned again where it is of this epoch and of so many heads.
        model: left in training mode.
        data, inputs, batch_size: as in :func:`validate`.

    Returns:
        ``epoch``, and ``ce`` [heads, R, S] float32 on the CPU: small state of a checkpoint.
    """
    if kept is not None and (kept["epoch"], len(kept["ce"])) == (epoch, heads):
        return kept
    model.eval()
    table = torch.zeros(heads, *data.tokens.shape)
    for batch in validation_batches(data, batch_size, world.rank, world.size):
        labels = batch["labels"].to(world.device)
        ce = model(**inputs(batch), labels=labels, num_heads=heads, loss_fn=token_cross_entropy).cpu()
        table[:, batch["rows"]] = ce[:, : len(batch["rows"])]
    dist.all_reduce(table)  # every row was scored by one rank, and is 0 on the others
    model.train()
    return {"epoch": epoch, "ce": table}
