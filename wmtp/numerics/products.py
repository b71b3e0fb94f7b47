"""Matrix products with a float32 result for operands of any dtype.

A product of two bfloat16 numbers is exact in float32, and sums of them nearly so; a result stored in bfloat16 keeps
only 8 bits. Logits of 16 to 32 would then be multiples of 0.125, too coarse for a cross-entropy or a low temperature.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

_simulated = False


def on_cuda(x: Tensor) -> bool:
    """Returns whether a tensor is on CUDA, or stands for one that is, in a simulation (wmtp.training.planning)."""
    return x.is_cuda or _simulated


@contextlib.contextmanager
def as_on_cuda(on: bool = True) -> Iterator[None]:
    """Lets tensors of the CPU stand for tensors on CUDA; with False, within such a simulation, for what they are."""
    global _simulated
    before, _simulated = _simulated, on
    try:
        yield
    finally:
        _simulated = before


def operand(x: Tensor) -> Tensor:
    """Returns ``x`` as :func:`mm_float32` takes it: half precision unchanged on CUDA, everything else as float32.

    On a CPU torch has no product of half-precision operands with a float32 result. Float32 products are also many times
    faster on processors without bfloat16 instructions.
    """
    return x if on_cuda(x) and x.dtype in (torch.bfloat16, torch.float16) else x.float()


def mm_float32(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Returns a [N, K] @ b [K, M] of two operands, summed in float32: [N, M] float32, in ``out`` if given."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def add_mm_float32(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Returns ``total`` [N, M] float32 with a [N, K] @ b [K, M] added in place: no second [N, M]; None starts at 0."""
    if total is None:
        return mm_float32(a, b)
    if a.dtype == torch.float32:
        return total.addmm_(a, b)
    return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
