"""The Triton kernel behind :mod:`wmtp.numerics.cross_entropy` on CUDA: two reads and one write of a row of logits.

Triton comes with torch's builds for Linux. ``TRITON_INTERPRET=1``, set before this module is imported, runs the kernel
on a CPU, in numpy.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 16384  # columns at a time, in the registers of 32 warps: the fastest on an H100 of 2,048 to 32,768


def softmax_rows(
    logits: Tensor, label: Tensor, weight: Tensor | None, gradient: Tensor | None, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns CE and entropy of rows [C, V]; writes the gradient, which may lie in the memory of the logits."""
    rows, vocab = logits.shape
    ce = torch.empty_like(label, dtype=torch.float32)
    found = torch.empty_like(ce) if entropy else None
    block = min(_BLOCK, triton.next_power_of_2(vocab))
    if rows:
        _softmax_row[(rows,)](
            logits, label, weight, gradient, ce, found, vocab, logits.stride(0),
            0 if gradient is None else gradient.stride(0),
            HAS_GRADIENT=gradient is not None, HAS_ENTROPY=entropy, BLOCK=block, num_warps=max(1, block // 512),
        )  # fmt: skip
    return ce, found


@triton.jit
def _softmax_row(
    logits_ptr, label_ptr, weight_ptr, gradient_ptr, ce_ptr, entropy_ptr, vocab, stride, gradient_stride,
    HAS_GRADIENT: tl.constexpr, HAS_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    label = tl.load(label_ptr + row)
    target = tl.load(logits_ptr + label)  # before the gradient may take its place

    # What is summed so far, relative to the greatest logit so far: exp(z - top), and (z - top) exp(z - top).
    top = -3.0e38  # finite: its difference to itself is a number
    total = 0.0
    moment = 0.0
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(logits_ptr + column, mask=column < vocab, other=float("-inf"))
        higher = tl.maximum(top, tl.max(z, axis=0))
        shrink = tl.exp(top - higher)
        e = tl.exp(z - higher)
        if HAS_ENTROPY:
            moment = shrink * (moment + (top - higher) * total)
            moment += tl.sum(e * tl.where(column < vocab, z - higher, 0.0), axis=0)
        total = total * shrink + tl.sum(e, axis=0)
        top = higher
    tl.store(ce_ptr + row, tl.log(total) + top - target)
    if HAS_ENTROPY:
        tl.store(entropy_ptr + row, tl.maximum(tl.log(total) - moment / total, 0.0))

    if HAS_GRADIENT:
        gradient_ptr += row * gradient_stride
        weight = tl.load(weight_ptr + row)
        scale = weight / total
        for start in range(0, vocab, BLOCK):
            column = start + tl.arange(0, BLOCK)
            z = tl.load(logits_ptr + column, mask=column < vocab, other=float("-inf"))
            d = scale * tl.exp(z - top) - tl.where(column == label, weight, 0.0)
            # A narrower gradient in the logits' memory ends before the next block begins, but starts within the first:
            # all threads have read it then.
            tl.debug_barrier()
            tl.store(gradient_ptr + column, d, mask=column < vocab)
