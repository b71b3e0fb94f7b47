"""Matrix products with few rows; on a CPU with weights packed once for the kernels that decoding needs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from wmtp.numerics.products import mm_float32, operand

Linear = Callable[[Tensor], tuple[Tensor, ...]]

_FEW_ROWS = 4


def side_by_side(*modules: Any, pack: bool = True) -> Linear:
    """Returns a function from an input [N, D] to the outputs of linear layers; one product if weights are packed.

    On a CPU the weights of plain layers are copied into oneDNN's blocked layout. A product of 1 to 16 rows then takes
    the time of reading the weights once; the library behind ``F.linear`` takes two to four times that in float32. The
    bits of a row then do not depend on the other rows. Layers with more than a weight (LoRA), and those on other
    devices, are called unchanged, and all of them without ``pack``: a packed weight cannot be in a compiled graph.
    """
    weights = [module.weight for module in modules if type(module) is nn.Linear]
    biases = [module.bias for module in modules if getattr(module, "bias", None) is not None]
    alike = len(weights) == len(modules) and len(biases) in (0, len(modules))
    if not pack or not alike or not _can_pack(weights[0]):
        return lambda x: tuple(module(x) for module in modules)
    product = _packed(torch.cat(weights) if len(weights) > 1 else weights[0], torch.cat(biases) if biases else None)
    sizes = [len(weight) for weight in weights]
    return lambda x: product(x).split(sizes, dim=-1)


def times(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns x [N, D] -> x @ weight.T [N, V] in float32, with the weight packed as in :func:`side_by_side`."""
    matrix = operand(weight)
    product = _packed(matrix) if _can_pack(matrix) else lambda x: mm_float32(x, matrix.T)
    return lambda x: product(operand(x))


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False  # a build of torch without these two operators, such as the one for macOS
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _packed(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    # torch.compile's weight freezing emits these two operators; they have no public name.
    blocks = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _FEW_ROWS)

    def product(x: Tensor) -> Tensor:
        if len(x) == 1:  # the kernel for one row is slower than the one for four, and adds in another order
            return product(x.expand(_FEW_ROWS, -1).contiguous())[:1]
        return torch.ops.mkldnn._linear_pointwise(x, blocks, bias, "none", [], "")

    return product
