"""What `compile: true` makes of a block's elementwise operations: the traffic of the kernels that Inductor would write.

A block is traced and lowered on fake tensors, as torch.compile does it, up to the point where code would be generated.
Inductor then says what each of its kernels reads and writes. It chooses them for a CPU here; on CUDA it fuses at least
as much.
"""

from typing import Any, NamedTuple

import torch
from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._inductor.compile_fx import _recursive_post_grad_passes, fake_tensor_prop
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode
from torch._inductor.utils import shape_env_from_inputs
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

_known: dict[tuple, tuple["Fused", "Fused"]] = {}  # by what the block holds and is given


class Fused(NamedTuple):
    """Bytes and kernels of a block's elementwise operations in one pass."""

    moved: int
    calls: int


def fused_traffic(block: nn.Module, rows: int, seq_len: int, width: int, dtype: torch.dtype) -> tuple[Fused, Fused]:
    """Returns what a compiled block's own kernels do in the forward and in the backward pass.

    Args:
        block: on the meta device; products and attention, which Inductor leaves to others, are not counted.
        rows, seq_len, width: of its input [B, S, D].
        dtype: of the computation.
    """
    named = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    key = (rows, seq_len, width, dtype, *((name, t.shape, t.requires_grad) for name, t in named.items()))
    if key not in _known:
        _known[key] = _traffic(block, named, rows, seq_len, width, dtype)
    return _known[key]


def _traffic(
    block: nn.Module, named: dict[str, Tensor], rows: int, seq_len: int, width: int, dtype: torch.dtype
) -> tuple[Fused, Fused]:
    found: dict[str, Fused] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        trained = any(parameter.requires_grad for parameter in block.parameters())
        inputs = [torch.empty(rows, seq_len, width, dtype=dtype, requires_grad=trained)]
        for tensor in named.values():
            kind = dtype if isinstance(tensor, nn.Parameter) else tensor.dtype
            inputs.append(torch.empty(tensor.shape, dtype=kind, requires_grad=tensor.requires_grad))

        def run(x: Tensor, *values: Tensor) -> Tensor:
            return functional_call(block, dict(zip(named, values, strict=True)), (x,), {"mask": None})

        compiled = aot_function(
            run,
            fw_compiler=lambda graph, example: _lowered(graph, example, found, "forward"),
            bw_compiler=lambda graph, example: _lowered(graph, example, found, "backward"),
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )
        out = compiled(*inputs)
        if out.requires_grad:
            out.sum().backward()
    return found["forward"], found.get("backward", Fused(0, 0))


def _lowered(graph: Any, example: Any, found: dict[str, Fused], name: str) -> Any:
    """Notes the traffic of a graph's kernels, and returns what runs the graph as it is."""
    mode = fake_tensor_prop(graph, example)
    with V.set_fake_mode(mode):
        _recursive_post_grad_passes(graph, is_inference=False)
    lowering = GraphLowering(graph, shape_env=shape_env_from_inputs(example))
    with (
        V.set_debug_handler(DebugContext()),
        V.set_fake_mode(mode),
        V.set_graph_handler(lowering),
        V.set_real_inputs(example),
    ):
        lowering.run(*example)
        lowering.init_wrapper_code()
        lowering._update_scheduler()
        own = [node for node in lowering.scheduler.nodes if not isinstance(node, ExternKernelSchedulerNode)]
        sizes = [node.get_read_write_buffers_sizes() for node in own]
    found[name] = Fused(sum(sizes), sum(size > 0 for size in sizes))
    return make_boxed_func(graph.forward)
