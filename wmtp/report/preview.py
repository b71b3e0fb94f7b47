"""The first documents of a run's data in the terminal: tokens, which of them are targets, and with what weight."""

import unicodedata
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from wmtp.data import PackedDataset
from wmtp.loss import mtp_loss
from wmtp.report.token_views import token_views

_WIDTH = 100  # characters of a line


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
    """The first documents with the weights that the loss would give their targets now; training is as without it.

    A collective: every rank calls it, and runs the model in evaluation mode on the same rows.

    Args:
        count: so many documents.
        model: the policy.
        data: packed documents, shown row by row.
        prepare: a batch of `data` to what model and loss read: on the device, with the signals of frozen models.
        weighting: see wmtp.weighting.
        tokenizer: a :class:`wmtp.pretrained.Tokenizer`.
        batch_size: rows at a time.
        step: optimizer step, for weightings that draw anew each step.
    """
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


def token_table(pieces: Sequence[str], figures: Mapping[str, Sequence[str]], width: int = _WIDTH) -> str:
    """Tokens side by side with their figures below them, in plain text; a line ends where the code's line does.

    Spaces are shown as a dot, line ends and what cannot be seen as escapes, a token of a character's first bytes as ~.

    Args:
        pieces: the tokens' texts.
        figures: name to a text for each token, "" where it has none; names stand before the lines.
        width: characters of a line, where its first token leaves a choice.
    """
    rows = {"token": [_shown(piece) for piece in pieces], **figures}
    margin = max(map(len, rows)) + 1
    lines, start, used = [], 0, 0
    widths = [max(_columns(texts[i]) for texts in rows.values()) + 1 for i in range(len(pieces))]
    for i, piece in enumerate(pieces):
        used += widths[i]
        full = i + 1 < len(pieces) and margin + used + widths[i + 1] > width
        if full or "\n" in piece or i + 1 == len(pieces):
            for name, texts in rows.items():
                part = texts[start : i + 1]
                cells = (text + " " * (wide - _columns(text)) for text, wide in zip(part, widths[start:], strict=False))
                if name == "token" or any(part):
                    lines.append(f"{name:<{margin}}{''.join(cells)}".rstrip())
            start, used = i + 1, 0
    return "\n".join(lines)


def _shown(piece: str) -> str:
    escaped = (c if c.isprintable() else ascii(c)[1:-1] for c in piece)
    return "".join(escaped).replace(" ", "·") or "~"


def _columns(text: str) -> int:
    """Columns of a terminal that a text takes: characters of East Asian scripts take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
