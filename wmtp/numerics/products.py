"""Matrix products with a float32 result, whatever the dtype of what is multiplied.

A product of two bfloat16 numbers is exact in float32, and so is nearly their sum; a result stored in bfloat16 keeps 8
bits of it. Logits of 16 to 32 would then lie 0.125 apart, which neither a cross-entropy nor a low temperature forgives.
"""

import torch
from torch import Tensor


def operand(x: Tensor) -> Tensor:
    """``x`` as :func:`mm_float32` takes it: half precision as it is on CUDA, everything else as float32.

    On a CPU the products themselves are then float32's: torch has none there of half precision with a float32 result.
    Where the processor has no bfloat16 instructions that is also many times faster.
    """
    return x if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) else x.float()


def mm_float32(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a [N, K] @ b [K, M] of two operands, summed and returned in float32: [N, M], in ``out`` where it is given."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)
