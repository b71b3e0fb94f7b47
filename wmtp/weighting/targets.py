"""Which tokens each head predicts, found on the host's own copy of a batch: nothing waits for the device.

Everything per token is indexed by the *target* position j = t + k, as in :mod:`wmtp.loss`.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from wmtp.numerics.products import as_on_cuda, on_cuda
from wmtp.weighting.rows import ScopeRows, scope_rows

IGNORE_INDEX = -100  # the label of a token that is no target, as in F.cross_entropy


def valid_targets(labels: Tensor, num_heads: int, document_ids: Tensor | None = None) -> Tensor:
    """Marks the targets that each head predicts: [H, B, S] bool, indexed by the target's position.

    ``valid[k - 1, b, j]`` says that token j is a target (``labels[b, j] != -100``) and that position j - k exists and
    lies in the same document.

    Args:
        labels: [B, S] token ids, -100 where a token is no target.
        document_ids: [B, S], equal for tokens of one document; None where each row is one document.
    """
    valid = labels.new_zeros((num_heads, *labels.shape), dtype=torch.bool)
    for k in range(1, min(num_heads, labels.shape[1] - 1) + 1):
        valid[k - 1, :, k:] = labels[:, k:] != IGNORE_INDEX
        if document_ids is not None:
            valid[k - 1, :, k:] &= document_ids[:, k:] == document_ids[:, :-k]
    return valid


def moved(batch: dict, device: torch.device) -> dict:
    """Returns a batch of the data on the device, and its targets, which are counted on the host: ``targets``."""
    targets = Targets(batch["labels"], batch["document_ids"])
    return {**_to_device(batch, device), "targets": targets}


class Targets:
    """The places of a micro-batch's targets, whose number the host has to know.

    Made from the labels as they come from the data, before they are moved, it counts on the host. Made from labels on a
    GPU it says the same, and the host waits for the GPU at each count.

    Args:
        labels, document_ids: as in :func:`valid_targets`.
    """

    def __init__(self, labels: Tensor, document_ids: Tensor | None = None) -> None:
        self._labels, self._document_ids = labels, document_ids
        self._counting = nullcontext if on_cuda(labels) else partial(as_on_cuda, False)
        self._kept: dict[tuple, Any] = {}

    def place(self, num_heads: int, device: torch.device) -> Tensor:
        """Returns the places in [H*B*S] of all targets of the first heads: [N], in order."""
        return self._once(lambda: self._valid(num_heads).flatten().nonzero().squeeze(1), device, num_heads)

    def rows(self, num_heads: int, scope: str, device: torch.device) -> ScopeRows:
        """Returns the rows of :func:`~wmtp.weighting.rows.scope_rows` of the first heads' targets."""
        return self._once(
            lambda: scope_rows(self._valid(num_heads), self._document_ids, scope), device, num_heads, scope
        )

    def _valid(self, num_heads: int) -> Tensor:
        return valid_targets(self._labels, num_heads, self._document_ids)

    def _once(self, find: Callable[[], Any], device: torch.device, *what: Any) -> Any:
        """Returns what is found on the host, moved to the device; it is found and moved the first time."""
        key = (*what, device)
        if key not in self._kept:
            with self._counting():
                self._kept[key] = _to_device(find(), device)
        return self._kept[key]


def _to_device(found: Any, device: torch.device) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), found)
