"""What a query may look at in packed rows: the keys of its own document, up to itself, and within a window.

One rule in three forms: a dense mask; flex attention's, for CUDA; and attention to each document by itself, for a CPU.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# A call of attention and its backward pass take a processor some 0.1 ms, in which it adds so many products.
_WORTH_A_CALL = 2**20


def dense_mask(document_ids: Tensor, window: int | None = None) -> Tensor:
    """Returns [B, S, S] bool: query i sees key j <= i of its document (padding, -1, sees padding: no row is empty), of
    the last ``window`` alone if that is given."""
    same = document_ids[:, :, None] == document_ids[:, None, :]
    return same.tril_() if window is None else same.tril_().triu_(1 - window)


def block_mask(document_ids: Tensor, window: int | None = None) -> Any:
    """Returns the mask of :func:`dense_mask` as flex attention's BlockMask."""
    from torch.nn.attention.flex_attention import create_block_mask

    batch, seq = document_ids.shape
    reach = seq if window is None else window

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = (key <= query) & (query - key < reach)
        return near & (document_ids[batch, query] == document_ids[batch, key])

    return create_block_mask(visible, batch, None, seq, seq, device=document_ids.device)


class Documents:
    """The mask of :func:`dense_mask` as the documents themselves, each of which is attended to alone: their squares
    are smaller than those of whole rows, which attention with a mask computes.

    Args:
        document_ids: [B, S], not on CUDA, whose host would wait for them.
        window: how many keys a query sees at most.
    """

    def __init__(self, document_ids: Tensor, window: int | None = None) -> None:
        self.ids, self.window = document_ids, window
        self.lengths = [torch.unique_consecutive(row, return_counts=True)[1].tolist() for row in document_ids]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """Computes attention [B, heads, S, head_dim] of queries, keys and values of that shape."""
        outs = []
        for lengths, *row in zip(self.lengths, *(t.split(1) for t in (q, k, v)), strict=True):
            for document in zip(*(t.split(lengths, dim=2) for t in row), strict=True):
                queries, keys, values = document
                mask, length = None, queries.shape[2]
                if self.window is not None and length > self.window:
                    mask = dense_mask(self.ids.new_zeros(1, length), self.window)[:, None]
                out = F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=mask is None, scale=scale)
                outs.append(out.transpose(1, 2))  # as the kernel lays it out
        return torch.cat(outs, dim=1).view(len(q), -1, *outs[0].shape[2:]).transpose(1, 2)


def document_mask(document_ids: Tensor, window: int | None = None, *, width: int) -> Tensor | Documents:
    """Returns the mask that costs a CPU less: the documents, or a dense one where they are many and small.

    Args:
        width: of the states.
    """
    documents = Documents(document_ids, window)
    lengths = [length for row in documents.lengths for length in row]
    saved = document_ids.numel() * document_ids.shape[1] - sum(length**2 for length in lengths)
    return documents if saved * width > _WORTH_A_CALL * len(lengths) else dense_mask(document_ids, window)
