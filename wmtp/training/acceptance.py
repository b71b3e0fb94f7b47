"""How many tokens a forward pass yields in self-speculative decoding, measured on a sharded model between steps.

`wmtp.generation` decodes with cached keys and values and needs whole weights. Here every forward pass runs over prompts
and continuations anew, through the model as it is trained: FSDP2 gathers its weights as in any step. The tokens, drafts
and counts are those of greedy self-speculative decoding with all heads, as `recipes/eval_heads.py` measures it.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

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


class HeldOutAcceptance:
    """Measures acceptance on prompts of each held-out set at every evaluation, and how training has changed it.

    Args:
        prompts: of each set, at most; 0 measures nothing.
        max_new_tokens: of each prompt.
    """

    def __init__(self, prompts: int, max_new_tokens: int) -> None:
        self.prompts, self._max_new_tokens = prompts, max_new_tokens
        # By set: which prompts, and tokens and forward passes of each before the first step.
        self._before: dict[str, tuple[str, list[list[float]]]] = {}

    def measure(
        self,
        model: MTPDecoder,
        sets: Mapping[str, PackedDataset],
        tokenizer: Any,
        world: World,
        *,
        first: bool,
        last: bool,
        log: Callable[[str], None],
    ) -> dict[str, float]:
        """Returns the figures of :func:`acceptance`, named as the metrics of `validate` are; every rank calls it.

        After the last step ``accept_length_change`` is among them, with its 95 % interval over prompts in
        ``accept_length_change_low`` and ``_high``, and is told in a line; it says nothing of other seeds.

        Args:
            first: nothing has been trained yet.
            last: training has ended.
            log: for the line, on every rank.
        """
        if not self.prompts or model.num_future_tokens == 1:
            return {}
        end_ids = {tokenizer.eos_id, *(model.source.end_ids if model.source is not None else ())}
        found: dict[str, float] = {}
        for name, data in sorted(sets.items()):
            prefix, prompts = f"eval/{name}/" if name else "eval/", held_out_prompts(data, self.prompts)
            if not prompts:
                continue
            which = hashlib.sha256(repr((prompts, self._max_new_tokens)).encode()).hexdigest()
            counts = acceptance(model, prompts, self._max_new_tokens, end_ids, world)
            found |= {f"{prefix}{figure}": value for figure, value in counts.figures().items()}
            if first:
                self._before[name] = which, counts.lengths.tolist()
            elif last:
                told, before = f"{prefix}accept_length", self._before.get(name)
                if before is None or before[0] != which:
                    log(f"{told}: these prompts were not measured before training, so that no change is known")
                    continue
                change = length_change(torch.tensor(before[1]), counts.lengths)
                if change is not None:
                    mean, low, high = change
                    found |= {f"{told}_change": mean, f"{told}_change_low": low, f"{told}_change_high": high}
                    log(f"{told}: {mean:+.4f} [{low:+.4f}, {high:+.4f}] by training, over {len(prompts)} prompts")
        return found

    def state_dict(self) -> dict:
        """Returns what a resumed run needs, the same on every rank."""
        return dict(self._before)

    def load_state_dict(self, state: dict) -> None:
        """Restores a :meth:`state_dict`."""
        self._before = dict(state)


class Counts(NamedTuple):
    """What greedy self-speculative decoding of some prompts came to, the same on every rank."""

    lengths: Tensor  # [P, 2] float64: tokens after the first of each prompt, and the forward passes that yielded them
    drafts: Tensor  # [H - 1, 2] float64: drafts of heads 2 to H that were accepted, and that were verified

    def figures(self) -> dict[str, float]:
        """Returns ``accept_length``: tokens a forward pass after the first of each prompt, 1 to H; and
        ``acceptance_head{k}``: the share of head k's drafts that were accepted, of those whose predecessors were."""
        new, passes = self.lengths.sum(0).tolist()
        found = {"accept_length": new / passes if passes else 0.0}
        tried = ((k, *of) for k, of in enumerate(self.drafts.tolist(), 2))
        return found | {f"acceptance_head{k}": accepted / verified for k, accepted, verified in tried if verified}


def length_change(before: Tensor, after: Tensor) -> tuple[float, float, float] | None:
    """Returns by how much the accept length of the same prompts has grown, with its 95 % interval over prompts.

    Accept length is a ratio of sums over prompts, tokens / passes. The interval is Student's of its linearised parts,
    (tokens_i - ratio * passes_i) / mean(passes), after minus before of each prompt (Cochran 1977, chapter 6).

    Args:
        before, after: [P, 2] tokens and passes, as in :class:`Counts`.

    Returns:
        None for fewer than two prompts, or where nothing was decoded after first tokens.
    """
    from wmtp.numerics.paired import mean_difference

    if len(after) < 2 or not before[:, 1].any() or not after[:, 1].any():
        return None
    parts, ratios = [], []
    for tokens, passes in (of.double().T for of in (before, after)):
        ratios.append(tokens.sum() / passes.sum())
        parts.append((tokens - ratios[-1] * passes) / passes.mean())
    interval = mean_difference((ratios[1] - ratios[0] + parts[1] - parts[0])[None].numpy()).interval()
    return interval.estimate, interval.low, interval.high


@torch.no_grad()
def acceptance(
    model: MTPDecoder, prompts: Sequence[Sequence[int]], max_new_tokens: int, end_ids: set[int], world: World
) -> Counts:
    """Decodes greedily from each prompt, each rank its share of them; every rank calls it and gets the same result.

    Its cost is at most ``max_new_tokens`` forward passes of all rows, of the longest prompt and the new tokens.

    Args:
        model: an :class:`~wmtp.models.MTPDecoder` with H > 1 heads, in evaluation mode; it may be sharded.
        prompts: token ids.
        end_ids: tokens that end a text.
    """
    num_drafts = model.num_future_tokens - 1
    room = model.max_seq_len - max_new_tokens
    rows = [_Row([*prompt[-room:]], max_new_tokens, end_ids) for prompt in prompts[world.rank :: world.size]]
    shape = {"rows": -(-len(prompts) // world.size), "length": max(len(p[-room:]) for p in prompts) + max_new_tokens}

    begun = _choices(model, rows, shape, 1, world.device)[:, :, 0].T.tolist()
    for row, (first, *drafts) in zip(rows, begun, strict=True):
        row.append(first)
        row.drafts = drafts
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
                row.new_tokens += 1
                if row.done:
                    break
            row.window = []
            row.forwards += 1

    lengths = torch.zeros(len(prompts), 2, dtype=torch.float64, device=world.device)
    for i, row in zip(range(world.rank, len(prompts), world.size), rows, strict=True):
        lengths[i] = torch.tensor([row.new_tokens, row.forwards])
    drafts = [[accepted[k], verified[k]] for k in range(2, num_drafts + 2)]
    of_drafts = torch.tensor(drafts, dtype=torch.float64, device=world.device)
    return Counts(all_reduce_sum(lengths).cpu(), all_reduce_sum(of_drafts).cpu())


class _Row:
    """A text that is being decoded."""

    def __init__(self, tokens: list[int], max_new_tokens: int, end_ids: set[int]) -> None:
        self.tokens, self.room, self._end_ids = tokens, max_new_tokens, end_ids
        self.drafts: list[int] = []  # of heads 2 to H, after the last token
        self.window: list[int] = []  # those that the next forward pass verifies
        self.new_tokens = self.forwards = 0  # after the first token
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
