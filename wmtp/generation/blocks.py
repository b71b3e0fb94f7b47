"""What a transformer block computes around its attention: by torch, or compiled into few kernels.

Attention's shapes change with every step of decoding: the cache grows, rows leave, prompts come and go. All else knows
tokens alone, [N, D]. So attention stays as it is, and what is before and behind it is compiled once for any N.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch._dynamo.decorators import mark_unbacked

from wmtp.generation.linear import side_by_side

_MOST_GRAPHS = 64  # of a function in a process: five for each size and dtype of a model


class Block:
    """The layers of a transformer block, in the form that cached decoding calls; with ``pack`` as linear.py says."""

    def __init__(self, block: Any, *, pack: bool) -> None:
        attention, mlp = block.attn, block.mlp
        self.num_kv_heads = attention.num_kv_heads
        self.groups = attention.num_heads // attention.num_kv_heads
        self.of_model, self.attention, self.activation, self.slides = block, attention, mlp.activation, block.slides
        self.queries = side_by_side(attention.q_proj, pack=pack)
        self.keys_values = side_by_side(attention.k_proj, attention.v_proj, pack=pack)
        self.attention_out = side_by_side(attention.output_proj, pack=pack)
        self.gate_up = side_by_side(mlp.w1, mlp.w3, pack=pack)
        self.down = side_by_side(mlp.w2, pack=pack)


def enter(
    block: Block,
    ask: bool,
    h: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor | None,
    cache: Tensor | None,
    own: Tensor | None,
    by_prompt: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Writes the keys and values of tokens into a cache, and returns their queries in the orders that attention needs.

    A query of all heads of a group has the number n * groups + g. That makes grouped-query attention without copies of
    the keys: a group's queries are rows over the same keys.

    Args:
        ask: False where only keys and values are wanted.
        h: [N, D].
        cos, sin: [N, 1, head_dim], see :func:`rotations`.
        slots, cache: indices [N] into [rows * positions, 2, num_kv_heads, head_dim]; None writes nothing.
        own, by_prompt: [M] numbers of queries; None is all as they are, and for ``by_prompt`` none.

    Returns:
        queries [M, num_kv_heads, head_dim] in the orders ``own`` and ``by_prompt``.
    """
    x, attention = block.of_model.sa_norm(h), block.attention
    if slots is not None and cache is not None:
        keys, values = block.keys_values(x)
        keys = _rotate(attention.by_head(keys, attention.k_norm), cos, sin)
        cache.index_copy_(0, slots, torch.stack([keys, values.unflatten(-1, (block.num_kv_heads, -1))], dim=1))
    if not ask:
        return None, None
    queries = attention.by_head(block.queries(x)[0], attention.q_norm)
    queries = _rotate(queries, cos, sin).unflatten(1, (-1, block.groups)).transpose(1, 2).flatten(0, 1)
    return (queries if own is None else queries[own]), (None if by_prompt is None else queries[by_prompt])


def leave(
    block: Block,
    h: Tensor,
    own: Tensor,
    own_sums: Tensor,
    own_places: Tensor | None,
    prompts: Tensor | None,
    prompt_sums: Tensor | None,
    prompt_places: Tensor | None,
) -> Tensor:
    """Returns a block's output [N, D] from the results of attention to own tokens, and to prompts.

    Args:
        h: [N, D], the block's input.
        own, prompts: attention's outputs, [M, num_kv_heads, head_dim]; where there are no prompts, None.
        own_sums, prompt_sums: float32 logarithms [M, num_kv_heads] of its sums of exponentials.
        own_places, prompt_places: [N, groups], where each query is among these; None is in their order.
    """
    out = _at(own, own_places, block)
    if prompts is not None and prompt_sums is not None:
        # In float64: float32 rounds otherwise in a whole vector than behind the last one, that is, by the batch.
        difference = _at(prompt_sums, prompt_places, block) - _at(own_sums, own_places, block)
        share = difference.double().sigmoid()[..., None]  # of the prompt in the sum of exponentials of both
        out = out.double().lerp(_at(prompts, prompt_places, block).double(), share).type_as(out)
    model = block.of_model
    h = model.add(h, model.sa_post_norm(block.attention_out(out.transpose(1, 2).flatten(1))[0]))
    gate, up = block.gate_up(model.mlp_norm(h))
    return model.add(h, model.mlp_post_norm(block.down(block.activation(gate) * up)[0]))


def compiled(function: Callable) -> Callable:
    """Returns ``enter`` or ``leave`` compiled: one graph for each choice of what is given, whatever the lengths are.

    Only the first dimension of a tensor changes. It is marked as unknown (not only as changing) so that neither one
    token nor two equal lengths get a graph of their own. CUDA graphs (``mode="reduce-overhead"``) would be recorded
    anew for each number of tokens and each block, as its weights lie elsewhere.
    """
    run = torch.compile(function, fullgraph=True)
    known: set[tuple[bool, ...]] = set()

    def call(block: Block, *args: Any) -> Any:
        given = tuple(arg is not None and arg is not False for arg in args)
        if given not in known:  # to be traced, unless another decoder has done it
            known.add(given)
            for arg in args:
                if isinstance(arg, Tensor):
                    mark_unbacked(arg, 0)
            with dynamo_config.patch(recompile_limit=_MOST_GRAPHS):
                return run(block, *args)
        return run(block, *args)

    return call


def _at(x: Tensor, places: Tensor | None, block: Block) -> Tensor:
    return x.unflatten(0, (-1, block.groups)) if places is None else x[places]  # [N, groups, num_kv_heads, ...]


def rotations(rope: Any) -> tuple[Tensor, Tensor]:
    """Returns cos and sin [max_seq_len, head_dim] such that x * cos + swapped(x) * sin is RoPE's rotation of x.

    Pairs of coordinates (a, b) become (a cos - b sin, b cos + a sin), the two products rounded and added as the model
    does it. Complex numbers would do the same, but no compiler fuses them, and a CPU rounds them otherwise in a whole
    vector than behind the last one.
    """
    cos, sin = rope.cache.unbind(-1)  # [max_seq_len, head_dim / 2]
    return torch.stack([cos, cos], -1).flatten(-2), torch.stack([-sin, sin], -1).flatten(-2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies RoPE to [N, heads, head_dim], in float32 (of cos and sin) like the model."""
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (x * cos + swapped * sin).type_as(x)
