"""Logits of targets, a chunk at a time: no [B, S, V] is ever there."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from wmtp.numerics.cross_entropy import cross_entropy_
from wmtp.numerics.products import mm_float32, on_cuda, operand
from wmtp.weighting.targets import Targets, valid_targets

# Bytes of float32 logits alive at a time. On CPU small enough to leave the peak to the [V, D] gradient accumulator,
# on CUDA large enough to fill the device with one GEMM. Each chunk reads and writes that accumulator, which a GPU's
# memory is too slow for with fewer rows.
_CHUNK_BYTES = {"cpu": 48 * 2**20, "cuda": 512 * 2**20}
_CHUNK_ROWS = {"cpu": 16, "cuda": 2048}


@torch.no_grad()
def of_each_target(
    figures: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    hidden: Tensor,
    unembedding: Tensor,
    labels: Tensor,
    targets: Targets,
    chunk_tokens: int | None = None,
) -> list[Tensor]:
    """Computes figures of each target from its logits, a chunk at a time: each [H, B, S] or
    [H, B, S, N], 0 where no target.

    Args:
        figures: ``figures(logits [C, V] float32, label [C])`` returns them, each [C] or [C, N], and may write into the
            logits.
        hidden, unembedding, labels, chunk_tokens: as in :func:`weighted_mtp_cross_entropy`.
        targets: of the labels and their documents.
    """
    place = targets.place(len(hidden), labels.device)  # [N], in [H*B*S]
    label = labels.flatten()[place % labels.numel()]
    size = chunk_tokens or default_chunk(hidden, unembedding)
    chunks = chunked_logits(hidden, unembedding, rows_of(place, labels), size)
    # Without any target, the figures of zero rows give their number and dtypes.
    found = [figures(logits, label[part]) for part, _, logits in chunks] or [
        figures(hidden.new_empty((0, len(unembedding)), dtype=torch.float32), label)
    ]
    results = []
    for column in zip(*found, strict=True):
        result = column[0].new_zeros(*hidden.shape[:3], *column[0].shape[1:])
        result.view(-1, *result.shape[3:])[place] = torch.cat(column)
        results.append(result)
    return results


class HeadScores(NamedTuple):
    """How each head predicts each target, by the *target's* position: [H, B, S]."""

    ce: Tensor  # float32, nats; 0 where the head has no target
    valid: Tensor  # bool: where head k predicts target j
    correct: Tensor  # bool: the head's likeliest token is the target
    agreed: Tensor  # bool: the head's likeliest token is head 1's


def score_heads(
    hidden: Tensor, unembedding: Tensor, labels: Tensor, *, document_ids: Tensor | None = None
) -> HeadScores:
    """Computes CE and choice of every head for every target by one GEMM each; a ``loss_fn`` for a model's forward.

    Arguments as in :func:`weighted_mtp_cross_entropy`.
    """
    figures = lambda logits, label: (logits.argmax(1), cross_entropy_(logits, label)[0])  # the second overwrites them
    choice, ce = of_each_target(figures, hidden, unembedding, labels, Targets(labels, document_ids))
    valid = valid_targets(labels, len(hidden), document_ids)
    return HeadScores(ce, valid, valid & (choice == labels), valid & (choice == choice[:1]))


def chunked_logits(
    hidden: Tensor, unembedding: Tensor, source: Tensor, size: int, ends: Sequence[int] = ()
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yields the rows of the hidden states in chunks of at most ``size``: (slice of ``source``, h [C, D], logits).

    The logits [C, V], float32, are in one reused buffer: the next chunk overwrites them.

    Args:
        source: [N] the rows, as places in hidden [H*B*S, D].
        ends: in order; a chunk ends before these rows, so that all rows of a chunk are on one side of them.
    """
    rows, matrix = hidden.reshape(-1, hidden.shape[-1]), operand(unembedding)
    buffer = rows.new_empty((min(size, len(source)), len(matrix)), dtype=torch.float32)
    for begin, stop in pairwise((0, *ends, len(source))):
        for start in range(begin, stop, size):
            part = slice(start, min(start + size, stop))
            h = operand(rows[source[part]])
            yield part, h, mm_float32(h, matrix.T, out=buffer[: len(h)])


def rows_of(place: Tensor, labels: Tensor) -> Tensor:
    """Returns the positions t = j - k in hidden [H*B*S, D] from which heads k predict the targets at ``place``: [N].

    Args:
        place: [N], of target j of head k in [H*B*S].
    """
    return place - place // labels.numel() - 1


def default_chunk(hidden: Tensor, unembedding: Tensor) -> int:
    """Returns the rows per chunk, by device and V."""
    kind = "cuda" if on_cuda(hidden) else hidden.device.type
    return max(_CHUNK_ROWS.get(kind, 16), _CHUNK_BYTES.get(kind, 2**26) // (4 * unembedding.shape[0]))
