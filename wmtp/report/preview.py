"""A preview of a run's data in the terminal: tokens of the first documents, with the weights of the targets."""

from collections.abc import Callable

import torch
from torch import nn

from wmtp.data import PackedDataset
from wmtp.loss import mtp_loss


@torch.no_grad()
def preview(
    count: int,
    model: nn.Module,
    data: PackedDataset,
    prepare: Callable[[dict], dict],
    weighting: Callable,
    *,
    tokenizer,
    batch_size: int,
    step: int = 0,
) -> str:
    """Returns the first documents with the weights that the loss would now give their targets. Training is unaffected.

    A collective: every rank calls it, and runs the model in evaluation mode on the same rows.

    Args:
        count: number of documents.
        prepare: moves a batch of `data` to the device and adds the signals of frozen models.
        batch_size: rows at a time.
        step: optimizer step, for weightings that draw random numbers each step.
    """
    from wmtp.report.token_views import token_views  # most runs show nothing
    from wmtp.report.tokens import token_table

    was_training = model.training
    tables: list[str] = []
    model.eval()
    for start in range(0, len(data), batch_size):
        if len(tables) >= count:
            break
        batch = prepare(data.batch(list(range(start, min(start + batch_size, len(data))))))
        inputs = {key: batch[key] for key in ("document_ids", "labels", "signals", "trunk_state") if key in batch}
        out = model(batch["tokens"], loss_fn=mtp_loss, weighting=weighting, step=step, **inputs)
        ids = [data.row_ids(row) for row in batch["rows"]]
        for view in token_views(tokenizer, batch, {"weight": out.weights}, ids=ids, limit=count - len(tables)):
            figures = {
                name: [f"{w:.2f}" if t else "" for w, t in zip(weights, view.is_target, strict=True)]
                for name, weights in view.weights.items()
            }
            head = f"preview of {view.id}: {len(view.pieces)} tokens, {sum(map(bool, view.is_target))} targets"
            tables.append(f"{head}, each with its weight below it\n{token_table(view.pieces, figures)}")
    model.train(was_training)
    return "\n".join(tables)
