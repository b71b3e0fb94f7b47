"""What CUDA's kernels hold and do, where the same call on a CPU is made of other operations.

Attention needs nothing here: torch's flash attention for the CPU keeps what CUDA's kernels keep, the output and one
float32 a query and head. Flex attention is that kernel without a mask, which it never writes down whole.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from wmtp.generation import linear
from wmtp.models import block, decoder
from wmtp.numerics import cross_entropy
from wmtp.numerics.products import as_on_cuda


@contextlib.contextmanager
def gpu_kernels() -> Iterator[None]:
    """Lets a simulation on tensors of the CPU hold and do what a run on CUDA does."""
    with (
        as_on_cuda(),
        patch.object(block, "rms_norm", lambda x, weight, eps: _FusedNorm.apply(x, weight)),
        patch.object(decoder, "block_mask", lambda document_ids, window=None: None),
        patch.object(cross_entropy, "softmax_rows", _softmax_rows),
        patch.object(linear, "_can_pack", lambda weight: False),
    ):
        yield


def _softmax_rows(
    logits: Tensor, label: Tensor, weight: Tensor | None = None, gradient: Tensor | None = None, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The bytes of the loss's kernel: a read of the logits, and with a gradient a second one and its write."""
    ce = logits.amax(dim=1)
    if gradient is not None:
        gradient.copy_(logits)
    return ce, ce.clone() if entropy else None


class _FusedNorm(torch.autograd.Function):
    """The bytes of aten's `_fused_rms_norm`: one pass, which keeps its input and one float32 a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return x * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        x, scale, _ = ctx.saved_tensors
        d_scale = torch.zeros_like(scale) if ctx.needs_input_grad[1] else None
        return torch.addcmul(x, gradient, x), d_scale
