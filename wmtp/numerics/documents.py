"""Places in packed rows, which hold several documents each."""

import torch
from torch import Tensor


def positions_in_documents(document_ids: Tensor) -> Tensor:
    """Returns each token's distance from the start of its document, [B, S]; a document is a run of equal ids."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand(document_ids.shape)
    starts = torch.zeros_like(index)
    starts[:, 1:] = index[:, 1:] * (document_ids[:, 1:] != document_ids[:, :-1])
    return index - starts.cummax(dim=1).values
