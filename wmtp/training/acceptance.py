"""How many tokens a forward pass yields in self-speculative decoding, measured on a sharded model between steps.

`wmtp.generation` decodes with cached keys and values and needs whole weights. Here every forward pass runs over prompts
and continuations anew, through the model as it is trained: FSDP2 gathers its weights as in any step. The tokens, drafts
and counts are those of greedy self-speculative decoding with all heads, as `recipes/eval_heads.py` measures it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from wmtp.data import PackedDataset
from wmtp.data.documents import IGNORE
from wmtp.distributed import World, all_reduce_sum
from wmtp.models import MTPDecoder
from wmtp.numerics.products import mm_float32, operand


def held_out_prompts(data: PackedDataset, count: int) -> list[list[int]]:
    """Returns the prompts of the first ``count`` documents, in the data set's order, that have one."""
    prompts: list[list[int]] = []
    rows = {int(member): row for row in range(len(data)) for member in data.row_members(row)}
    for member in sorted(rows):
        if len(prompts) == count:
            break
        row = rows[member]
        batch = data.batch([row])
        number = data.row_members(row).tolist().index(member)
        inside = batch["document_ids"][0] == number
        targets = (batch["labels"][0][inside] != IGNORE).nonzero()
        prompt = batch["tokens"][0][inside][: int(targets[0])].tolist()
        if prompt:
            prompts.append(prompt)
    return prompts


def held_out_acceptance(
    model: MTPDecoder,
    sets: Mapping[str, PackedDataset],
    tokenizer: Any,
    prompts: int,
    max_new_tokens: int,
    world: World,
) -> dict[str, float]:
    """Returns :func:`acceptance` on prompts of each held-out set, named as the metrics of `validate` are.

    Args:
        prompts: of each set, at most; 0 measures nothing.
    """
    if not prompts or model.num_future_tokens == 1:
        return {}
    end_ids = {tokenizer.eos_id, *(model.source.end_ids if model.source is not None else ())}
    found: dict[str, float] = {}
    for name, data in sorted(sets.items()):
        prefix, begun = f"eval/{name}/" if name else "eval/", held_out_prompts(data, prompts)
        if begun:
            figures = acceptance(model, begun, max_new_tokens, end_ids, world)
            found |= {f"{prefix}{figure}": value for figure, value in figures.items()}
    return found


@torch.no_grad()
def acceptance(
    model: MTPDecoder, prompts: Sequence[Sequence[int]], max_new_tokens: int, end_ids: set[int], world: World
) -> dict[str, float]:
    """Decodes greedily from each prompt, each rank its share of them; every rank calls it and gets the same result.

    Its cost is at most ``max_new_tokens`` forward passes of all rows, of the longest prompt and the new tokens.

    Args:
        model: an :class:`~wmtp.models.MTPDecoder` with H > 1 heads, in evaluation mode; it may be sharded.
        prompts: token ids.
        end_ids: tokens that end a text.

    Returns:
        ``accept_length``: tokens a forward pass after the first of each prompt, 1 to H; ``acceptance_head{k}``: the
        share of head k's drafts that were accepted, of those whose predecessors were.
    """
    num_drafts = model.num_future_tokens - 1
    room = model.max_seq_len - max_new_tokens
    rows = [_Row([*prompt[-room:]], max_new_tokens, end_ids) for prompt in prompts[world.rank :: world.size]]
    shape = {"rows": -(-len(prompts) // world.size), "length": max(len(p[-room:]) for p in prompts) + max_new_tokens}

    begun = _choices(model, rows, shape, 1, world.device)[:, :, 0].T.tolist()
    for row, (first, *drafts) in zip(rows, begun, strict=True):
        row.append(first)
        row.drafts = drafts
    new_tokens = forwards = 0  # after the first token of each text
    verified, accepted = Counter[int](), Counter[int]()  # drafts, by head
    while int(all_reduce_sum(torch.tensor(float(sum(not row.done for row in rows)), device=world.device))):
        running = [row for row in rows if not row.done]
        useful = [min(num_drafts, row.room - 1) for row in running]
        for row, count in zip(running, useful, strict=True):
            row.window = row.drafts[:count]
        choices = _choices(model, running, shape, 1 + num_drafts, world.device).tolist()
        for b, (row, count) in enumerate(zip(running, useful, strict=True)):
            right = next((i for i, draft in enumerate(row.window) if choices[0][b][i] != draft), count)
            row.drafts = [choices[k][b][right] for k in range(1, num_drafts + 1)]
            for i, token in enumerate([*row.window[:right], choices[0][b][right]]):
                verified[i + 2] += i < count
                accepted[i + 2] += i < right
                row.append(token)
                new_tokens += 1
                if row.done:
                    break
            row.window = []
        forwards += len(running)

    heads = range(2, num_drafts + 2)
    counts = [new_tokens, forwards, *(of[k] for k in heads for of in (accepted, verified))]
    new, passes, *of_heads = all_reduce_sum(torch.tensor(counts, dtype=torch.float64, device=world.device)).tolist()
    found = {"accept_length": new / passes if passes else 0.0}
    pairs = zip(heads, of_heads[::2], of_heads[1::2], strict=True)
    return found | {f"acceptance_head{k}": taken / tried for k, taken, tried in pairs if tried}


class _Row:
    """A text that is being decoded."""

    def __init__(self, tokens: list[int], max_new_tokens: int, end_ids: set[int]) -> None:
        self.tokens, self.room, self._end_ids = tokens, max_new_tokens, end_ids
        self.drafts: list[int] = []  # of heads 2 to H, after the last token
        self.window: list[int] = []  # those that the next forward pass verifies
        self.done = False

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self.room -= 1
        self.done = token in self._end_ids or self.room == 0


def _choices(model: MTPDecoder, rows: list[_Row], shape: dict[str, int], width: int, device: torch.device) -> Tensor:
    """Returns each head's likeliest token at the last token of each row and at those of its window: [H, rows, width].

    The forward pass has one shape, whatever the rows: nothing is compiled anew, and every rank takes part.
    """
    tokens, positions = torch.zeros(*shape.values(), dtype=torch.long), torch.zeros(shape["rows"], width)
    for b, row in enumerate(rows):
        text = row.tokens + row.window
        tokens[b, : len(text)] = torch.tensor(text)
        positions[b] = len(row.tokens) - 1 + torch.arange(width).clamp(max=len(row.window))
    choices = model(tokens.to(device), loss_fn=_likeliest, positions=positions.long().to(device))
    return choices[:, : len(rows)].cpu()


def _likeliest(hidden: Tensor, unembedding: Tensor, *, positions: Tensor, **_: Any) -> Tensor:
    index = positions[None, :, :, None].expand(len(hidden), -1, -1, hidden.shape[-1])
    at = operand(hidden.gather(2, index).flatten(0, 2))
    return mm_float32(at, operand(unembedding).T).argmax(-1).view(len(hidden), *positions.shape)
