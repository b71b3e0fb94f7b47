"""Frozen weights in 4 bits (NF4 with double quantisation, QLoRA, Dettmers et al. 2023, arXiv 2305.14314, section 3).

A weight is cut into blocks of 64 values; each value keeps a 4-bit index into 16 quantiles of a normal distribution,
each block one 8-bit scale. The values are torchao's `NF4Tensor`. Every process holds the whole of a quantised weight
(half a byte a value), and FSDP2 leaves it alone. torchao's hooks allow sharding, but it would need rows and blocks that
divide evenly among the processes, gather the weight in every pass, and fail on one process: there FSDP2 of torch 2.13
skips the hook that takes the tensor apart, so the hook that puts it together gets one part instead of three.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4

from wmtp.errors import UserError

_BLOCK, _SCALE_BLOCK = 64, 256  # values that share a scale, and scales that share a scale of their own: the paper's


def quantize_nf4(weight: Tensor, name: str = "weight") -> nn.Parameter:
    """Makes a frozen NF4 parameter of a [out, in] weight, on its device; ``.to(dtype)`` reads it.

    Scales are quantised in groups of 256, or of the largest smaller power of two that divides their number: the same on
    any number of processes.

    Raises:
        ValueError: the number of values is no multiple of 64.
    """
    check_nf4_shape(weight.shape, name)
    scale_block = math.gcd(_SCALE_BLOCK, weight.numel() // _BLOCK)
    return nn.Parameter(to_nf4(weight.detach().contiguous(), _BLOCK, scale_block), requires_grad=False)


def check_nf4_shape(shape: torch.Size, name: str) -> None:
    """Raises ValueError where a weight of this shape cannot be quantised."""
    if shape.numel() % _BLOCK:
        raise UserError(
            f"quantize nf4 needs weights of a multiple of {_BLOCK} values, {name} is {list(shape)}; set it to null"
        )


def is_nf4(weight: Tensor | None) -> bool:
    return isinstance(weight, NF4Tensor)


def mark_nf4(module: Any, dtype: torch.dtype | None = None) -> None:
    """Quantises a linear layer's weight, rounded to ``dtype`` first if that is given: now, or on the meta device when
    `load_checkpoint` reads it."""
    module.quantized_to = "nf4"
    module.weight = nn.Parameter(module.weight.to(dtype or module.weight.dtype), requires_grad=False)
    if not module.weight.is_meta:
        module.weight = quantize_nf4(module.weight)


def quantized_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields (name, module) of every linear layer whose weight is quantised, or will be when it is read."""
    for name, module in model.named_modules():
        if getattr(module, "quantized_to", None) is not None:
            yield name, module
