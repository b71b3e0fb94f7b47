"""The decoder's forward pass over cached keys and values, with a length per row.

A block needs keys and values of all earlier tokens, but query, output and MLP only at positions whose result is used.
So the trunk runs on all new tokens and writes every head's keys and values from its own states, and the heads run only
on the requested positions: a window to verify, or the last position of a prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules import RMSNorm

from wmtp.generation.linear import side_by_side, times
from wmtp.models.decoder import MTPDecoder

PREFILL_CHUNK = 512  # tokens of a prompt in one forward: bounds the attention mask and the activations
_GROWTH = 128  # positions by which a cache grows
_ALIGNMENT = 32  # the attended length is a multiple of it: fewer shapes, and aligned masks for CUDA's kernels


class KVCache:
    """Keys and values of several blocks, [rows, positions, 2, num_kv_heads, head_dim] each; grows in positions.

    Nothing is erased: entries beyond a row's length are masked until they are overwritten. New entries are zeros,
    because a masked NaN would still spread.
    """

    def __init__(self, model: MTPDecoder, num_blocks: int, rows: int) -> None:
        shape, weight = model.config, model.tok_embeddings.weight
        empty = weight.new_zeros(rows, 0, 2, shape.num_kv_heads, shape.head_dim, requires_grad=False)
        self.blocks = [empty] * num_blocks

    @property
    def capacity(self) -> int:
        return self.blocks[0].shape[1]

    def reserve(self, length: int) -> None:
        """Makes room for ``length`` positions in every row."""
        if length <= self.capacity:
            return
        capacity = -(-length // _GROWTH) * _GROWTH
        for i, old in enumerate(self.blocks):
            self.blocks[i] = old.new_zeros(old.shape[0], capacity, *old.shape[2:])
            self.blocks[i][:, : old.shape[1]] = old

    def copy_row(self, row: int, source: "KVCache", source_row: int, length: int) -> None:
        """Copies the first ``length`` positions of a row, from another cache or this one."""
        self.reserve(length)
        for ours, theirs in zip(self.blocks, source.blocks, strict=True):
            ours[row, :length] = theirs[source_row, :length]


@dataclass(frozen=True)
class _Places:
    """The positions of the tokens [B, W] of one forward in the form that attention needs, the same for every block."""

    angles: Tensor  # complex [B * W, 1, head_dim / 2]: RoPE turns pairs of coordinates, that is, multiplies
    slots: Tensor  # [B * W] index of (row, position) in a cache seen as [rows * positions, ...]
    mask: Tensor  # [B, 1, groups * W, T]: 0 where the query sees the key, else -inf


class CachedDecoder:
    """The first ``num_heads`` heads of a model, and its trunk, over :class:`KVCache`.

    It reads the weights when it is built (on a CPU it makes a packed copy, see :mod:`wmtp.generation.linear`), so it is
    out of date after a training step. Blocks are numbered trunk first, then head 1, then the extra heads.
    """

    def __init__(self, model: MTPDecoder, num_heads: int) -> None:
        self.model = model
        self.num_heads = num_heads
        self._embed_dim, self._head_dim = model.config.embed_dim, model.config.head_dim
        self._num_kv_heads = model.config.num_kv_heads
        self._groups = model.config.num_heads // model.config.num_kv_heads
        self._angles = torch.view_as_complex(model.rope.cache)  # [max_seq_len, head_dim / 2]
        self._blocks = [_Block(block) for block in (*model.layers, *model.extra_heads[: num_heads - 1])]
        self._num_trunk = len(model.layers) - 1
        self._norm, self._unembed = _norm(model.norm), times(model.unembedding)

    def new_cache(self, rows: int) -> KVCache:
        return KVCache(self.model, len(self._blocks), rows)

    def extend(self, tokens: Tensor, lengths: Sequence[int], cache: KVCache) -> tuple[Tensor, _Places]:
        """Runs the trunk on new tokens and caches the keys and values of all blocks.

        Args:
            tokens: [B, W], row b's W tokens after the ``lengths[b]`` that are cached.
            lengths: of the first B rows of the cache.
            cache: grows as needed.

        Returns:
            the trunk's states [B, W, D], and the tokens' places, for :meth:`heads` on all of them.
        """
        width = tokens.shape[1]
        cache.reserve(max(lengths) + width)
        places = self._places(torch.tensor(lengths), width, cache)
        h = self.model.tok_embeddings(tokens).view(-1, self._embed_dim)  # [B * W, D]
        for i in range(self._num_trunk):
            self._write(i, h, places, cache)
            h = self._run(i, h, places, cache)
        for i in range(self._num_trunk, len(self._blocks)):
            self._write(i, h, places, cache)
        return h.view(*tokens.shape, -1), places

    def heads(self, states: Tensor, places: _Places, cache: KVCache) -> Tensor:
        """Returns float32 logits [heads, B, W, V] at trunk states; the first are head 1's, for the next token.

        Args:
            states: [B, W, D], at places whose keys and values are cached.
        """
        h = states.reshape(-1, self._embed_dim)
        hidden = [self._norm(self._run(i, h, places, cache)) for i in range(self._num_trunk, len(self._blocks))]
        return self._unembed(torch.cat(hidden)).view(self.num_heads, *states.shape[:2], -1)

    def prefill(self, prompt: Sequence[int], cache: KVCache) -> Tensor:
        """Caches a whole prompt in row 0. Returns the logits [heads, 1, 1, V] at its last token."""
        device = self.model.tok_embeddings.weight.device
        for start in range(0, len(prompt), PREFILL_CHUNK):
            tokens = torch.tensor([prompt[start : start + PREFILL_CHUNK]], device=device)
            states, _ = self.extend(tokens, [start], cache)
        return self.heads(states[:, -1:], self._places(torch.tensor([len(prompt) - 1]), 1, cache), cache)

    # ------------------------------------------------------------------------------------------------------------------
    # One block

    def _places(self, first: Tensor, width: int, cache: KVCache) -> _Places:
        """Returns the places of ``width`` tokens per row from position ``first`` [B], in the cache's first B rows."""
        positions = first[:, None] + torch.arange(width)  # [B, W], on the host, where the lengths are known
        attended = min(-(-(int(positions.max()) + 1) // _ALIGNMENT) * _ALIGNMENT, cache.capacity)
        device, dtype = cache.blocks[0].device, cache.blocks[0].dtype
        rows = torch.arange(len(first))[:, None]
        slots = (rows * cache.capacity + positions).flatten().to(device)
        positions = positions.to(device)
        hidden = torch.arange(attended, device=device) > positions[:, :, None]  # [B, W, T]
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
        # A row that waits for the others in its window may be past the context's end; its result is never read.
        angles = self._angles[positions.flatten().clamp(max=len(self._angles) - 1)]
        return _Places(angles[:, None], slots, mask.repeat(1, self._groups, 1)[:, None])

    def _write(self, i: int, h: Tensor, places: _Places, cache: KVCache) -> None:
        keys, values = self._blocks[i].keys_values(self._blocks[i].attention_norm(h))
        keys = self._rotate(keys.unflatten(-1, (self._num_kv_heads, -1)), places.angles)
        both = torch.stack([keys, values.unflatten(-1, (self._num_kv_heads, -1))], dim=1)  # [B * W, 2, ...]
        cache.blocks[i].view(-1, *both.shape[1:]).index_copy_(0, places.slots, both)

    def _run(self, i: int, h: Tensor, places: _Places, cache: KVCache) -> Tensor:
        """Returns the block's output [B * W, D] for states at places whose keys and values are cached."""
        block = self._blocks[i]
        batch, _, _, attended = places.mask.shape
        (queries,) = block.queries(block.attention_norm(h))
        queries = self._rotate(queries.unflatten(-1, (-1, self._head_dim)), places.angles)
        # Grouped-query attention without copies of the keys: a group's queries become rows over the same keys.
        queries = queries.view(batch, -1, self._num_kv_heads, self._groups, self._head_dim).permute(0, 2, 3, 1, 4)
        keys, values = cache.blocks[i][:batch, :attended].permute(2, 0, 3, 1, 4)  # [B, num_kv_heads, T, head_dim]
        out = F.scaled_dot_product_attention(queries.flatten(2, 3), keys, values, attn_mask=places.mask)
        out = out.unflatten(2, (self._groups, -1)).permute(0, 3, 1, 2, 4).reshape(len(h), -1)
        h = h + block.attention_out(out)[0]
        gate, up = block.gate_up(block.mlp_norm(h))
        return h + block.down(F.silu(gate) * up)[0]

    @staticmethod
    def _rotate(x: Tensor, angles: Tensor) -> Tensor:
        """Applies RoPE to [N, heads, head_dim], in float32 like the model."""
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * angles).flatten(-2).type_as(x)


class _Block:
    """The layers of a transformer block, in the form that cached decoding calls."""

    def __init__(self, block: nn.Module) -> None:
        attention, mlp = block.attn, block.mlp
        self.attention_norm, self.mlp_norm = _norm(block.sa_norm), _norm(block.mlp_norm)
        self.queries = side_by_side(attention.q_proj)
        self.keys_values = side_by_side(attention.k_proj, attention.v_proj)
        self.attention_out = side_by_side(attention.output_proj)
        self.gate_up = side_by_side(mlp.w1, mlp.w3)
        self.down = side_by_side(mlp.w2)


def _norm(norm: RMSNorm) -> Callable[[Tensor], Tensor]:
    """Returns the module as a function with its weight cast once: F.rms_norm is fused only for equal dtypes."""
    weight = norm.scale.float()
    return lambda x: F.rms_norm(x.float(), weight.shape, weight, norm.eps).type_as(x)
