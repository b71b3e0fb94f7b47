"""Sharding with FSDP2, and activation checkpointing."""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch._higher_order_ops.flex_attention import flex_attention
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from wmtp.models.nf4 import quantized_modules

# So many of the first blocks gather their weights when their backward pass begins, not during the one before: there
# nearly all gradients are held, so that a block less of weights lowers the peak of a step, by 0.4 of 32 GB at 7B.
GATHERED_LATE = 3

_ATEN = torch.ops.aten
_KEPT = [  # what is dear to compute again
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    flex_attention,
]


def shard_model(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    param_dtype: torch.dtype,
    cpu_offload: bool = False,
) -> nn.Module:
    """Shards every block of ``layers`` and ``extra_heads``, embedding and unembedding, then the root, in place.

    A tied embedding stays with the root, which is whole in the backward pass too.

    Args:
        model: an :class:`~wmtp.models.MTPDecoder` or :class:`~wmtp.models.ValueModel`, on the meta device or not; its
            parameters keep their dtype. Its ``float32_modules`` compute in float32. Quantised weights are not sharded:
            every process holds them whole.
        mesh: one dimension (FSDP), or two: replicate, shard (HSDP).
        param_dtype: of the gathered weights and so of the computation; gradients are reduced in float32.
        cpu_offload: keep the shards in host memory; load with ``device="cpu"``.
    """
    # Without cast_forward_inputs, because FSDP2 would round every float input, and the root's inputs include the loss's
    # float32 weights. Activations need no cast: they take param_dtype from the gathered embedding.
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype, torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy() if cpu_offload else OffloadPolicy(),
        # For the root too: with its default, an evaluation would leave whole, rounded weights registered.
        "reshard_after_forward": True,
        "ignored_params": {module.weight for _, module in quantized_modules(model)},
    }
    # This is for a value model's head, whose small differences would be lost in bfloat16.
    full_precision = MixedPrecisionPolicy(torch.float32, torch.float32, cast_forward_inputs=False)
    for module in getattr(model, "float32_modules", ()):
        fully_shard(module, **(options | {"mp_policy": full_precision}))
    if not model.config.tie_word_embeddings:  # type: ignore[union-attr]
        decoder: Any = getattr(model, "backbone", model)
        fully_shard(decoder.tok_embeddings, **options).set_unshard_in_backward(False)  # its gradient needs no weights
        fully_shard(decoder.output, **options)
    for block in (*model.layers, *model.extra_heads):  # type: ignore[misc]
        fully_shard(block, **options)
    for after in model.layers[1 : GATHERED_LATE + 1]:  # type: ignore[index]
        after.set_modules_to_backward_prefetch([after])  # which is there: none ahead
    fully_shard(model, **options)
    return model


def checkpoint_activations(model: nn.Module, how: int | str = 1) -> nn.Module:
    """Recomputes activations of blocks in the backward pass instead of keeping them; no gradient changes by a bit.

    Args:
        model: an :class:`~wmtp.models.MTPDecoder` or :class:`~wmtp.models.ValueModel`, before it is sharded.
        how: N: of every N-th block only the input is kept, beginning with the first, and everything of the others;
            ``selective``: of every block the results of matrix products and attention are kept, and norms, rotations
            and the MLP's gate are computed again.
    """
    selective = how == "selective"
    every = 1 if selective else int(how)
    context: dict[str, Any] = {"context_fn": partial(create_selective_checkpoint_contexts, _KEPT)} if selective else {}
    chosen = set((*model.layers, *model.extra_heads)[::every])  # type: ignore[misc]
    apply_activation_checkpointing(model, partial(checkpoint_wrapper, **context), check_fn=lambda m: m in chosen)
    return model
