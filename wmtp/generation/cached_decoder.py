"""The decoder's forward pass over cached keys and values, with a length per row.

A block needs keys and values of all earlier tokens, but query, output and MLP only at positions whose result is used.
So the trunk runs on all new tokens and writes every head's keys and values from its own states, and the heads run only
on the requested positions: a window to verify, or the last position of a prompt.

Rows that continue one prompt share its keys and values (as in Hydragen, Juravsky et al. 2024, arXiv 2402.05099): each
query attends to its row's own tokens and to its prompt apart, and the two results are weighed by their sums of
exponentials, which is attention to both, exactly. The queries of all rows of a prompt then read it once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmtp.generation.kv_memory import rounded
from wmtp.generation.linear import side_by_side, times
from wmtp.models.decoder import MTPDecoder
from wmtp.numerics.products import on_cuda

PREFILL_CHUNK = 512  # tokens of a prompt in one forward: bounds the attention mask and the activations
_ALIGNMENT = 32  # the attended length is a multiple of it: fewer shapes, and aligned masks for CUDA's kernels


def to_device(numbers: Sequence, device: torch.device) -> Tensor:
    """Returns a tensor of the host's numbers; on CUDA the host does not wait until they are there."""
    return torch.tensor(numbers).to(device, non_blocking=True)


class KVCache:
    """Keys and values of several blocks, [rows, positions, 2, num_kv_heads, head_dim] each; grows and shrinks.

    Nothing is erased: entries beyond a row's length are masked until they are overwritten. New entries are zeros,
    because a masked NaN would still spread.
    """

    def __init__(self, blocks: list[Tensor]) -> None:
        self.blocks = blocks

    @property
    def rows(self) -> int:
        return self.blocks[0].shape[0]

    @property
    def capacity(self) -> int:
        """Returns the positions of a row."""
        return self.blocks[0].shape[1]

    def reserve(self, rows: int, length: int) -> None:
        """Makes room for ``length`` positions in each of the first ``rows`` rows."""
        if rows > self.rows or length > self.capacity:
            self.resize(max(rows, self.rows), max(length, self.capacity))

    def resize(self, rows: int, length: int) -> None:
        """Holds so many rows and positions, rounded up, with what there was. One block at a time is there twice."""
        for i, old in enumerate(self.blocks):
            self.blocks[i] = old.new_zeros(rows, rounded(length), *old.shape[2:])
            kept = old[:rows, : rounded(length)]
            self.blocks[i][: kept.shape[0], : kept.shape[1]] = kept

    def move_row(self, target: int, source: int, length: int) -> None:
        """Copies the first ``length`` positions of one row to another."""
        for block in self.blocks:
            block[target, :length] = block[source, :length]

    def row(self, row: int) -> "KVCache":
        """Returns a row as a cache that shares its memory."""
        return KVCache([block[row : row + 1] for block in self.blocks])


@dataclass(frozen=True)
class Prompts:
    """The prompts that rows continue.

    Attributes:
        cache: a prompt in each row.
        lengths: tokens of each.
        of_rows: for each row of the batch, which of them it continues.
    """

    cache: KVCache
    lengths: Sequence[int]
    of_rows: Sequence[int]


@dataclass(frozen=True)
class _PromptPlaces:
    """Prompts in the form that attention needs: P of them, of at most T tokens, each with at most R rows."""

    cache: KVCache
    count: int  # P
    attended: int  # T
    mask: Tensor | None  # [P, 1, 1, T]: 0 where the prompt has a token, else -inf; None for a single prompt
    rows: Tensor  # [P * R]: rows by prompt, with some row where one has fewer than R
    places: Tensor  # [B]: where each row is among these
    of_rows: list[tuple[int, int]]  # of each row: its prompt, and the length of that


@dataclass(frozen=True)
class _Places:
    """The positions of the tokens [B, W] of one forward in the form that attention needs, the same for every block."""

    angles: Tensor  # complex [B * W, 1, head_dim / 2]: RoPE turns pairs of coordinates, that is, multiplies
    slots: Tensor  # [B * W] index of (row, position) in a cache seen as [rows * positions, ...]
    mask: Tensor  # [B, 1, groups * W, T]: 0 where the query sees the key, else -inf
    prompts: _PromptPlaces | None


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
        self._device = model.tok_embeddings.weight.device
        self._norm, self._unembed = model.norm, times(model.unembedding)

    def new_cache(self) -> KVCache:
        """Returns a cache for all blocks, without rows."""
        shape, weight = self.model.config, self.model.tok_embeddings.weight
        empty = weight.new_zeros(0, 0, 2, shape.num_kv_heads, shape.head_dim, requires_grad=False)
        return KVCache([empty] * len(self._blocks))

    def extend(
        self, tokens: Tensor, lengths: Sequence[int], cache: KVCache, prompts: Prompts | None = None
    ) -> tuple[Tensor, _Places]:
        """Runs the trunk on new tokens and caches the keys and values of all blocks.

        Args:
            tokens: [B, W], row b's W tokens after the ``lengths[b]`` that are cached.
            lengths: of the first B rows of the cache.
            cache: grows as needed.
            prompts: what comes before all of that, if there is more.

        Returns:
            the trunk's states [B, W, D], and the tokens' places, for :meth:`heads` on all of them.
        """
        width = tokens.shape[1]
        cache.reserve(len(tokens), max(lengths) + width)
        places = self._places(lengths, width, cache, prompts)
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
        for start in range(0, len(prompt), PREFILL_CHUNK):
            tokens = to_device([prompt[start : start + PREFILL_CHUNK]], self._device)
            states, _ = self.extend(tokens, [start], cache)
        return self.heads(states[:, -1:], self._places([len(prompt) - 1], 1, cache, None), cache)

    # ------------------------------------------------------------------------------------------------------------------
    # One block

    def _places(self, first: Sequence[int], width: int, cache: KVCache, prompts: Prompts | None) -> _Places:
        """Returns the places of ``width`` tokens per row from position ``first`` [B], in the cache's first B rows."""
        attended = min(-(-(max(first) + width) // _ALIGNMENT) * _ALIGNMENT, cache.capacity)
        device, dtype = cache.blocks[0].device, cache.blocks[0].dtype
        own = to_device(first, device)[:, None] + torch.arange(width, device=device)  # [B, W]
        slots = (torch.arange(len(first), device=device)[:, None] * cache.capacity + own).flatten()
        hidden = torch.arange(attended, device=device) > own[:, :, None]  # [B, W, T]
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
        positions = own
        if prompts is not None:
            positions = own + to_device([prompts.lengths[p] for p in prompts.of_rows], device)[:, None]
        # A row that waits for the others in its window may be past the context's end; its result is never read.
        angles = self._angles[positions.flatten().clamp(max=len(self._angles) - 1)]
        shared = None if prompts is None else self._prompt_places(prompts)
        return _Places(angles[:, None], slots, mask.repeat(1, self._groups, 1)[:, None], shared)

    def _prompt_places(self, prompts: Prompts) -> _PromptPlaces:
        rows: list[list[int]] = [[] for _ in prompts.lengths]
        order = []  # of each row: its prompt, and its place among the rows of that
        for row, p in enumerate(prompts.of_rows):
            order.append((p, len(rows[p])))
            rows[p].append(row)
        most = max(map(len, rows))
        padded = [of_prompt + [0] * (most - len(of_prompt)) for of_prompt in rows]
        device, dtype = prompts.cache.blocks[0].device, prompts.cache.blocks[0].dtype
        attended, mask = max(prompts.lengths), None
        if len(rows) > 1:
            attended = min(-(-attended // _ALIGNMENT) * _ALIGNMENT, prompts.cache.capacity)
            hidden = torch.arange(attended, device=device) >= to_device(prompts.lengths, device)[:, None]
            mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
            mask = mask[:, None, None]
        places = to_device([p * most + place for p, place in order], device)
        of_rows = [(p, prompts.lengths[p]) for p in prompts.of_rows]
        rows_by_prompt = to_device(padded, device).flatten()
        return _PromptPlaces(prompts.cache, len(rows), attended, mask, rows_by_prompt, places, of_rows)

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
        queries = queries.flatten(2, 3)  # [B, num_kv_heads, groups * W, head_dim]
        out, sums = _attention(queries, cache.blocks[i][:batch, :attended], places.mask)
        if places.prompts is not None:
            out = self._with_prompts(i, queries, out, sums, places.prompts)
        out = out.unflatten(2, (self._groups, -1)).permute(0, 3, 1, 2, 4).reshape(len(h), -1)
        h = h + block.attention_out(out)[0]
        gate, up = block.gate_up(block.mlp_norm(h))
        return h + block.down(F.silu(gate) * up)[0]

    def _with_prompts(self, i: int, queries: Tensor, own: Tensor, own_sums: Tensor, prompts: _PromptPlaces) -> Tensor:
        """Returns attention to prompts and own tokens from attention to the latter: [B, num_kv_heads, Q, head_dim]."""
        kv = prompts.cache.blocks[i][: prompts.count, : prompts.attended]
        if not on_cuda(queries) and queries.dtype != torch.float32:
            # A CPU's products of half precision round by the number of queries, and texts would part by the batch.
            alone = [
                _attention(queries[row : row + 1], kv[p : p + 1, :length], None)
                for row, (p, length) in enumerate(prompts.of_rows)
            ]
            out, sums = (torch.cat(parts) for parts in zip(*alone, strict=True))
        else:
            # [P, num_kv_heads, R, Q, head_dim]
            by_prompt = queries[prompts.rows].unflatten(0, (len(kv), -1)).transpose(1, 2)
            out, sums = (
                x.unflatten(2, by_prompt.shape[2:4]).transpose(1, 2).flatten(0, 1)[prompts.places]
                for x in _attention(by_prompt.flatten(2, 3), kv, prompts.mask)
            )
        # In float64: float32 rounds otherwise in a whole vector than behind the last one, that is, by the batch.
        share = (sums - own_sums).double().sigmoid()[..., None]  # of the prompt in the sum of exponentials of both
        return own.double().lerp(out.double(), share).type_as(own)

    @staticmethod
    def _rotate(x: Tensor, angles: Tensor) -> Tensor:
        """Applies RoPE to [N, heads, head_dim], in float32 like the model."""
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * angles).flatten(-2).type_as(x)


def _attention(queries: Tensor, kv: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns attention [B, num_kv_heads, Q, head_dim] and float32 logarithms [B, num_kv_heads, Q] of its sums.

    These are the kernels that F.scaled_dot_product_attention takes with a mask; it does not return the sums.

    Args:
        queries: [B, num_kv_heads, Q, head_dim].
        kv: keys and values of T tokens, [B, T, 2, num_kv_heads, head_dim].
        mask: [B, 1, Q or 1, T], added to the scores.
    """
    keys, values = kv.permute(2, 0, 3, 1, 4)
    if mask is not None:
        mask = mask.expand(*queries.shape[:3], -1)
    if not queries.is_cuda:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(queries, keys, values, 0.0, False, attn_mask=mask)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    out, sums, *_ = efficient(queries, keys, values, mask, compute_log_sumexp=True)
    return out, sums[:, :, : queries.shape[2]]


class _Block:
    """The layers of a transformer block, in the form that cached decoding calls."""

    def __init__(self, block: nn.Module) -> None:
        attention, mlp = block.attn, block.mlp
        self.attention_norm, self.mlp_norm = block.sa_norm, block.mlp_norm
        self.queries = side_by_side(attention.q_proj)
        self.keys_values = side_by_side(attention.k_proj, attention.v_proj)
        self.attention_out = side_by_side(attention.output_proj)
        self.gate_up = side_by_side(mlp.w1, mlp.w3)
        self.down = side_by_side(mlp.w2)
