"""The decoder's forward pass over cached keys and values, with a length per row.

A block needs keys and values of all earlier tokens, but query, output and MLP only at positions whose result is used.
So the trunk runs on all new tokens and writes every head's keys and values from its own states, and the heads run only
on the requested positions: a window to verify, or the last position of a prompt. Looped heads have keys and values for
each round, and all rounds but the last run on all new tokens, as the next one reads what they give.

Rows that continue one prompt share its keys and values (as in Hydragen, Juravsky et al. 2024, arXiv 2402.05099): each
query attends to its row's own tokens and to its prompt apart, and the two results are weighed by their sums of
exponentials, which is attention to both, exactly. The queries of all rows of a prompt then read it once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wmtp.generation.blocks import Block, compiled, enter, leave, rotations
from wmtp.generation.kv_memory import rounded
from wmtp.generation.linear import times
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

    def __init__(self, blocks: list[Tensor], first: int = 0) -> None:
        self.blocks, self.first = blocks, first  # the first row of a forward

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
        """Returns the same cache, for forwards of one row."""
        return KVCache(self.blocks, row)


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
    mask: Tensor | None  # [P, 1, 1 or R * Q, T]: 0 where the query sees the token; None for a single prompt
    near: Tensor | None  # [B, 1, Q, T]: 0 where the window of the row's query has the token; None: everywhere
    queries: Tensor  # [P * R * Q] numbers of queries: by prompt, with those of some row where one has fewer than R
    places: Tensor  # [B * W, groups]: where each query is among these
    of_rows: list[tuple[int, int]]  # of each row: its prompt, and the length of that


@dataclass(frozen=True)
class _Places:
    """The positions of the tokens [B, W] of one forward in the form that attention needs, in all blocks of a kind: with
    the sliding window, or without.

    A row has Q = groups * W queries over the same keys, each of its groups after the other.
    """

    cos: Tensor  # [B * W, 1, head_dim], as in rotations()
    sin: Tensor
    slots: Tensor  # [B * W] index of (row, position) in a cache seen as [rows * positions, ...]
    mask: Tensor  # [B, 1, Q, T]: 0 where the query sees the key, else -inf
    queries: Tensor | None  # [B * Q] numbers of queries, row by row; None where they are in that order
    places: Tensor | None  # [B * W, groups]: where each query is among these
    prompts: _PromptPlaces | None


class CachedDecoder:
    """The first ``num_heads`` heads of a model, and its trunk, over :class:`KVCache`.

    It reads the weights when it is built (on a CPU it makes a packed copy, see :mod:`wmtp.generation.linear`), so it is
    out of date after a training step. With ``compile`` all of a block but its attention is compiled
    (:mod:`wmtp.generation.blocks`), and nothing is packed. Blocks are numbered trunk first, then head 1, then the extra
    heads.
    """

    def __init__(self, model: MTPDecoder, num_heads: int, *, compile: bool = False) -> None:
        self.model = model
        self.num_heads = num_heads
        self._embed_dim = model.config.embed_dim
        self._groups = model.config.num_heads // model.config.num_kv_heads
        whole = local = rotations(model.rope)
        if model.config.local_rope_base is not None:
            local = rotations(model.local_rope)
        self._rotations = (whole, local)  # of blocks without and with the sliding window
        self._window, self._scale = model.config.sliding_window, model.config.attention_multiplier
        blocks = [*model.layers[:-1], *model.heads[:num_heads]]
        made = {block: Block(block, pack=not compile) for block in dict.fromkeys(blocks)}
        self._blocks = [made[block] for block in blocks]  # looped heads have one
        self._looped = model.config.looped_heads and num_heads > 1
        self._compile = compile
        self._enter: Callable = compiled(enter) if compile else enter
        self._leave: Callable = compiled(leave) if compile else leave
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
    ) -> tuple[list[Tensor], tuple[_Places, _Places]]:
        """Runs the trunk on new tokens and caches the keys and values of all blocks.

        Args:
            tokens: [B, W], row b's W tokens after the ``lengths[b]`` that are cached.
            lengths: of B rows of the cache.
            cache: grows as needed.
            prompts: what comes before all of that, if there is more.

        Returns:
            the states [B, W, D] that heads read, and the tokens' places, for :meth:`heads` on all of them. They are the
            trunk's and, of looped heads, those of all rounds but the last.
        """
        width = tokens.shape[1]
        cache.reserve(cache.first + len(tokens), max(lengths) + width)
        places = self._places(lengths, width, cache, prompts)
        h = self.model.embed(tokens).view(-1, self._embed_dim)  # [B * W, D]
        for i in range(self._num_trunk):
            h = self._run(i, h, places, cache, write=True)
        states = [h]
        for i in range(self._num_trunk, len(self._blocks)):
            if self._looped and self._num_trunk < i < len(self._blocks) - 1:
                states.append(self._run(i, states[-1], places, cache, write=True))
            else:
                self._write(i, states[0] if i == self._num_trunk else states[-1], places, cache)
        return [h.view(*tokens.shape, -1) for h in states], places

    def heads(self, states: list[Tensor], places: tuple[_Places, _Places], cache: KVCache) -> Tensor:
        """Returns float32 logits [heads, B, W, V]; the first are head 1's, for the next token.

        Args:
            states: of :meth:`extend`, [B, W, D] each, at places whose keys and values are cached.
        """
        trunk, *rounds = (h.reshape(-1, self._embed_dim) for h in states)
        first, last = self._num_trunk, len(self._blocks) - 1
        if self._looped:
            final = self._run(last, rounds[-1] if rounds else trunk, places, cache)
            outs = [self._run(first, trunk, places, cache), *rounds, final]
        else:
            outs = [self._run(i, trunk, places, cache) for i in range(first, last + 1)]
        hidden = torch.cat([self._norm(out) for out in outs])
        return self._unembed(hidden).view(self.num_heads, *states[0].shape[:2], -1)

    def prefill(self, prompt: Sequence[int], cache: KVCache) -> Tensor:
        """Caches a whole prompt in the cache's first row. Returns the logits [heads, 1, 1, V] at its last token."""
        for start in range(0, len(prompt), PREFILL_CHUNK):
            tokens = to_device([prompt[start : start + PREFILL_CHUNK]], self._device)
            states, _ = self.extend(tokens, [start], cache)
        # Tensors of their own: a compiled graph depends on where one begins.
        last = [h[0, -1:, None].clone() for h in states]
        return self.heads(last, self._places([len(prompt) - 1], 1, cache, None), cache)

    # ------------------------------------------------------------------------------------------------------------------
    # One block

    def _places(
        self, first: Sequence[int], width: int, cache: KVCache, prompts: Prompts | None
    ) -> tuple[_Places, _Places]:
        """Returns the places of ``width`` tokens per row from position ``first`` [B], in B rows of the cache, in blocks
        without the sliding window, and with it."""
        whole, local = self._rotations
        longest = max(first) + width + (0 if prompts is None else max(prompts.lengths))
        window = None if self._window is None or longest <= self._window else self._window
        places = self._places_of(first, width, cache, prompts, whole, None)
        if not any(block.slides for block in self._blocks) or (local is whole and window is None):
            return places, places
        return places, self._places_of(first, width, cache, prompts, local, window)

    def _places_of(
        self,
        first: Sequence[int],
        width: int,
        cache: KVCache,
        prompts: Prompts | None,
        rotation: tuple[Tensor, Tensor],
        window: int | None,
    ) -> _Places:
        attended = min(-(-(max(first) + width) // _ALIGNMENT) * _ALIGNMENT, cache.capacity)
        device, dtype = cache.blocks[0].device, cache.blocks[0].dtype
        own = to_device(first, device)[:, None] + torch.arange(width, device=device)  # [B, W]
        rows = torch.arange(cache.first, cache.first + len(first), device=device)
        slots = (rows[:, None] * cache.capacity + own).flatten()
        index = torch.arange(attended, device=device)
        hidden = index > own[:, :, None]  # [B, W, T]
        if window is not None:
            hidden |= index <= own[:, :, None] - window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
        positions = own
        if prompts is not None:
            positions = own + to_device([prompts.lengths[p] for p in prompts.of_rows], device)[:, None]
        # A row that waits for the others in its window may be past the context's end; its result is never read.
        cos, sin = (part[positions.flatten().clamp(max=len(part) - 1), None] for part in rotation)
        mask = mask.repeat(1, self._groups, 1)[:, None]
        queries = places = None
        if self._groups > 1 and (width > 1 or self._compile):  # compiled: no graph of its own for one token
            numbers = torch.arange(len(first) * self._groups * width, device=device)
            queries = numbers.view(-1, width, self._groups).transpose(1, 2).flatten()
            places = numbers.view(-1, self._groups, width).transpose(1, 2).flatten().view(-1, self._groups)
        shared = None if prompts is None else self._prompt_places(prompts, positions, queries, window)
        return _Places(cos, sin, slots, mask, queries, places, shared)

    def _prompt_places(
        self, prompts: Prompts, positions: Tensor, own: Tensor | None, window: int | None
    ) -> _PromptPlaces:
        width = positions.shape[1]
        rows: list[list[int]] = [[] for _ in prompts.lengths]
        order = []  # of each row: its prompt, and its place among the rows of that
        for row, p in enumerate(prompts.of_rows):
            order.append((p, len(rows[p])))
            rows[p].append(row)
        most = max(map(len, rows))
        padded = [of_prompt + [0] * (most - len(of_prompt)) for of_prompt in rows]
        device, dtype = prompts.cache.blocks[0].device, prompts.cache.blocks[0].dtype
        attended, mask, near = max(prompts.lengths), None, None
        if len(rows) > 1 or window is not None:
            attended = min(-(-attended // _ALIGNMENT) * _ALIGNMENT, prompts.cache.capacity)
            hidden = torch.arange(attended, device=device) >= to_device(prompts.lengths, device)[:, None]
            mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
            mask = mask[:, None, None]
        rows_by_prompt = to_device(padded, device).flatten()
        if window is not None:
            # A window may have left the prompt. The least number, not -inf: attention to nothing would not be a number.
            hidden = torch.arange(attended, device=device) <= positions[:, :, None] - window  # [B, W, T]
            near = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, torch.finfo(dtype).min)
            near = near.repeat(1, self._groups, 1)[:, None]
            mask = mask + near[rows_by_prompt].unflatten(0, (len(rows), -1)).transpose(1, 2).flatten(2, 3)
        # From places of rows to places of their queries, and from those of these rows to the queries' numbers.
        within = torch.arange(self._groups * width, device=device)
        queries = (rows_by_prompt[:, None] * len(within) + within).flatten()
        places = to_device([p * most + place for p, place in order], device)[:, None] * len(within) + within
        places = places.view(-1, self._groups, width).transpose(1, 2).flatten().view(-1, self._groups)
        of_rows = [(p, prompts.lengths[p]) for p in prompts.of_rows]
        queries = queries if own is None else own[queries]
        return _PromptPlaces(prompts.cache, len(rows), attended, mask, near, queries, places, of_rows)

    def _write(self, i: int, h: Tensor, both: tuple[_Places, _Places], cache: KVCache) -> None:
        block, slots = self._blocks[i], cache.blocks[i].flatten(0, 1)
        places = both[block.slides]
        self._enter(block, False, h, places.cos, places.sin, places.slots, slots, None, None)

    def _run(self, i: int, h: Tensor, both: tuple[_Places, _Places], cache: KVCache, *, write: bool = False) -> Tensor:
        """Returns the block's output [B * W, D] for states at places whose keys and values are cached, or are now."""
        block = self._blocks[i]
        places = both[block.slides]
        prompts = places.prompts
        batch, _, _, attended = places.mask.shape
        written = (places.slots, cache.blocks[i].flatten(0, 1)) if write else (None, None)
        together = prompts is not None and _together(h)
        by_prompt = prompts.queries if together else None
        queries, asked = self._enter(block, True, h, places.cos, places.sin, *written, places.queries, by_prompt)
        queries = queries.unflatten(0, (batch, -1))
        kv = cache.blocks[i][cache.first : cache.first + batch, :attended]
        own, sums = _attention(queries, kv, places.mask, self._scale)
        if prompts is None:
            return self._leave(block, h, own, sums, places.places, None, None, None)
        kv = prompts.cache.blocks[i][: prompts.count, : prompts.attended]
        if together:
            shared = _attention(asked.unflatten(0, (prompts.count, -1)), kv, prompts.mask, self._scale)
            return self._leave(block, h, own, sums, places.places, *shared, prompts.places)
        alone = []
        for row, (p, length) in enumerate(prompts.of_rows):
            near = None if prompts.near is None else prompts.near[row : row + 1, :, :, :length]
            alone.append(_attention(queries[row : row + 1], kv[p : p + 1, :length], near, self._scale))
        shared = (torch.cat(parts) for parts in zip(*alone, strict=True))
        return self._leave(block, h, own, sums, places.places, *shared, places.places)


def _together(h: Tensor) -> bool:
    """Returns whether rows may attend to their prompt together.

    A CPU's products of half precision round by the number of queries, and texts would part by the batch.
    """
    return on_cuda(h) or h.dtype == torch.float32


def _attention(queries: Tensor, kv: Tensor, mask: Tensor | None, scale: float | None) -> tuple[Tensor, Tensor]:
    """Returns attention [B * Q, num_kv_heads, head_dim] and float32 logarithms [B * Q, num_kv_heads] of its sums.

    These are the kernels that F.scaled_dot_product_attention takes with a mask; it does not return the sums.

    Args:
        queries: [B, Q, num_kv_heads, head_dim].
        kv: keys and values of T tokens, [B, T, 2, num_kv_heads, head_dim].
        mask: [B, 1, Q or 1, T], added to the scores.
        scale: of the scores; None is head_dim ** -0.5.
    """
    queries = queries.transpose(1, 2)
    keys, values = kv.permute(2, 0, 3, 1, 4)
    if mask is not None:
        mask = mask.expand(*queries.shape[:3], -1)
    if queries.is_cuda:
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        out, sums, *_ = efficient(queries, keys, values, mask, compute_log_sumexp=True, scale=scale)
        sums = sums[:, :, : queries.shape[2]]
    else:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, sums = flash(queries, keys, values, 0.0, False, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).flatten(0, 1), sums.transpose(1, 2).flatten(0, 1).contiguous()
