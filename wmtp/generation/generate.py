"""Continuous batching: rows that each decode one request, replaced as soon as they finish."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from wmtp.errors import UserError
from wmtp.generation.cached_decoder import CachedDecoder
from wmtp.generation.sampling import (
    Numbers,
    Sampling,
    distribution,
    key_digest,
    numbers_at,
    sample,
    verify_greedy,
    verify_sampled,
)
from wmtp.generation.text import StopStrings
from wmtp.models.decoder import MTPDecoder


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Args:
        id: handed back with the completion.
        prompt: token ids, at least one.
        key: strings and numbers, usually (seed, task, sample); the random numbers depend on it and on nothing else.
    """

    id: object
    prompt: tuple[int, ...]
    key: tuple


@dataclass(frozen=True)
class Completion:
    """What a request got.

    Args:
        id: the request's.
        text: decoded up to the first stop string or end token, both left out, as are the names of special tokens.
        tokens: every token generated, with the end token or those of the stop string.
        finish_reason: ``stop``, ``eos``, or ``length``: max_new_tokens or the model's context is used up.
        forwards: passes of the model that made its tokens, the prompt's too; fewer than tokens where drafts helped.
    """

    id: object
    text: str
    tokens: tuple[int, ...]
    finish_reason: Literal["stop", "eos", "length"]
    forwards: int


@dataclass
class DecodingStats:
    """Counts of one or several calls of :func:`generate`, which adds to them; seconds leave out the consumer's time."""

    prefills: int = 0  # prompts computed; samples of one prompt share it
    forwards: int = 0  # of the decoder after prefill, for all rows at once
    row_forwards: int = 0  # the same, counted once per row
    completions: int = 0
    new_tokens: int = 0  # of all completions, with end tokens and those of stop strings
    drafted: dict[int, int] = field(default_factory=dict)  # per head: drafts made
    verified: dict[int, int] = field(default_factory=dict)  # per head: drafts whose predecessors were all accepted
    accepted: dict[int, int] = field(default_factory=dict)  # per head: verified drafts that were accepted
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    first_tokens: int = 0  # tokens that came from a prefill

    @property
    def tokens_per_forward(self) -> float:
        """New tokens a row gains in one forward after its prefill: 1 in plain decoding, up to H with drafts."""
        return (self.new_tokens - self.first_tokens) / self.row_forwards if self.row_forwards else 0.0

    def count_drafts(self, count: int) -> None:
        """A row got ``count`` drafts, of heads 2 to count + 1."""
        for k in range(2, count + 2):
            self.drafted[k] = self.drafted.get(k, 0) + 1

    def count_verified(self, draft: int, *, accepted: bool) -> None:
        """The draft at this index of a window, all before it accepted, was compared with the model."""
        k = draft + 2
        self.verified[k] = self.verified.get(k, 0) + 1
        self.accepted[k] = self.accepted.get(k, 0) + accepted

    def acceptance(self) -> dict[int, float]:
        """Per head, the share of its verified drafts that were accepted."""
        return {k: self.accepted.get(k, 0) / n for k, n in sorted(self.verified.items())}

    def as_dict(self) -> dict:
        """All counts and the two figures derived from them."""
        return {**asdict(self), "tokens_per_forward": self.tokens_per_forward, "acceptance": self.acceptance()}


def generate(
    model: nn.Module,
    tokenizer,
    requests: Iterable[Request],
    sampling: Sampling,
    *,
    batch_size: int,
    num_drafts: int = 0,
    stats: DecodingStats | None = None,
) -> Iterator[Completion]:
    """Continue every request's prompt; yields each completion as it finishes, in no fixed order.

    A row that finishes makes room for the next request at once, and ``requests`` is read only as room appears. Requests
    with the same prompt, one after the other, share its prefill. With ``num_drafts`` > 0 decoding is self-speculative:
    heads 2 to num_drafts + 1 draft the tokens after the next, and one forward verifies them. Greedy tokens are those of
    plain decoding; sampled ones have its distribution (:func:`~wmtp.generation.sampling.verify_sampled`), though not
    its random numbers, so a single text differs.

    The text depends on the prompt, ``sampling``, ``num_drafts`` and the request's key, not on batch size, order or
    number of processes, up to rounding: attention adds in an order that varies with the shape of the batch, which moves
    logits by about 1e-6 of their size in float32 and makes another token win only where two are closer than that. In
    bfloat16 on a CPU a row's products do not depend on the others, and attention hardly: SmolLM2's texts were the same
    at batch sizes 1, 3 and 10. A window of drafts changes its shape more, so there a greedy text may part from plain
    decoding's where two tokens' logits nearly tie. On CUDA states in bfloat16 move logits by about 1e-2 between batch
    shapes, and texts do part.

    A text ends with the tokenizer's EOS, and with every token that the files of the model's checkpoint name as one
    (``eos_token_id`` of config.json and generation_config.json, which chat models have several of).

    Args:
        model: an :class:`~wmtp.models.MTPDecoder`, whole on one device, in the dtype to compute in. Its weights are
            read when iteration starts; on a CPU a packed copy of them lives until it ends.
        tokenizer: has ``decode``, ``eos_id`` and ``special_ids``.
        requests: checked before anything runs where they are a sequence, one by one as they are read elsewhere.
        batch_size: rows decoded at once.
        num_drafts: 0 to H - 1; 0 is plain decoding, with head 1 alone. Each draft costs a head's block and one more row
            in the forward that verifies it, accepted or not: few are best where the heads are often wrong.
        stats: counts are added to it.

    Raises:
        ValueError: a prompt that is empty, leaves no room for a token, or has ids outside the vocabulary; a bad key;
            more drafts than the model has extra heads; a model that cannot decode as it is; non-finite logits.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise UserError(f"batch_size must be a whole number >= 1, got {batch_size!r}")
    _check_model(model, num_drafts)
    if isinstance(requests, Sequence):
        for request in requests:
            _check_request(request, model)
        batch_size = min(batch_size, max(len(requests), 1))
    stats = DecodingStats() if stats is None else stats
    return _Batch(model, tokenizer, sampling, batch_size, num_drafts, stats).run(iter(requests))


def _check_model(model: nn.Module, num_drafts: int) -> None:
    if not isinstance(model, MTPDecoder):
        raise ValueError(f"generate needs an MTPDecoder, got {type(model).__name__}")
    if isinstance(num_drafts, bool) or not isinstance(num_drafts, int) or not 0 <= num_drafts < model.num_future_tokens:
        raise UserError(
            f"num_drafts must be a whole number between 0 and the model's extra heads, num_future_tokens - 1 = "
            f"{model.num_future_tokens - 1}, got {num_drafts!r}"
        )
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(
            "generate needs whole weights on one device, got a sharded model; export it and load the export"
        )
    if any(isinstance(module, nn.Dropout) and module.p > 0 and module.training for module in model.modules()):
        raise ValueError("generate needs the model without dropout; call model.eval() first")


def _check_request(request: Request, model: MTPDecoder) -> None:
    prompt = request.prompt
    if len(prompt) == 0:
        raise UserError(f"request {request.id!r} has an empty prompt; start it with BOS or a token of text")
    if len(prompt) >= model.max_seq_len:
        raise UserError(
            f"request {request.id!r} has a prompt of {len(prompt)} tokens, which leaves no room for a new one in the "
            f"model's context of {model.max_seq_len}; shorten the prompt"
        )
    if min(prompt) < 0 or max(prompt) >= model.vocab_size:
        wrong = min(prompt) if min(prompt) < 0 else max(prompt)
        raise UserError(f"request {request.id!r} has token id {wrong}, outside the model's {model.vocab_size}")
    key_digest(request.key)


@dataclass
class _Row:
    """A request that is being decoded."""

    request: Request
    digest: bytes
    room: int  # tokens it may still get
    length: int  # tokens in the cache: all but the newest one
    tokens: list[int] = field(default_factory=list)
    forwards: int = 1  # the prefill
    finish_reason: Literal["stop", "eos", "length"] | None = None

    def numbers(self, count: int) -> list[Numbers]:
        """The random numbers of the next ``count`` tokens."""
        return [numbers_at(self.digest, len(self.tokens) + i) for i in range(count)]


@dataclass(frozen=True)
class _Prompt:
    """The prompt prefilled last, whose keys and values are in the prompt cache."""

    tokens: tuple[int, ...]
    logits: Tensor  # [heads, 1, 1, V], at its last token


class _Batch:
    """The requests in flight: request b is entry b of ``_rows`` and ``_draft_logits``, and row b of the cache."""

    def __init__(
        self,
        model: MTPDecoder,
        tokenizer,
        sampling: Sampling,
        batch_size: int,
        num_drafts: int,
        stats: DecodingStats,
    ) -> None:
        self._model, self._tokenizer, self._sampling, self._stats = model, tokenizer, sampling, stats
        self._batch_size = batch_size
        self._num_drafts = num_drafts
        self._stop = StopStrings(tokenizer, sampling.stop)
        self._end_ids = {tokenizer.eos_id, *(model.source.end_ids if model.source is not None else ())}
        self._rows: list[_Row] = []
        self._prompt: _Prompt | None = None

    def run(self, requests: Iterator[Request]) -> Iterator[Completion]:
        # Inference mode ends at each yield: it must not leak into the code that consumes the completions.
        self._prepare()
        while True:
            yield from self._admit(requests)
            if not self._rows:
                return
            self._step()
            yield from (self._completion(row) for row in self._rows if row.finish_reason)

    # ------------------------------------------------------------------------------------------------------------------
    # Requests come and go

    @torch.inference_mode()
    def _prepare(self) -> None:
        self._decoder = CachedDecoder(self._model, 1 + self._num_drafts)
        self._cache, self._prompt_cache = self._decoder.new_cache(self._batch_size), self._decoder.new_cache(1)
        embedding = self._model.tok_embeddings.weight
        self._device = embedding.device
        # Of each row, the extra heads' logits at its last cached token: what the next drafts are drawn from.
        self._draft_logits = torch.zeros(self._batch_size, self._num_drafts, len(embedding), device=self._device)

    def _admit(self, requests: Iterator[Request]) -> Iterator[Completion]:
        """New requests take the places of finished rows; what they leave empty is closed up. Some finish at once."""
        gaps = [b for b, row in enumerate(self._rows) if row.finish_reason]
        for place in (*gaps, *range(len(self._rows), self._batch_size)):
            for request in requests:
                row = self._start(request)
                if not row.finish_reason:
                    self._put(row, place)
                    break
                yield self._completion(row)
            else:
                break  # no more requests
        self._close_gaps()

    @torch.inference_mode()
    def _start(self, request: Request) -> _Row:
        """Prefill the prompt, unless the request before had the same, and choose the first token."""
        started = time.perf_counter()
        _check_request(request, self._model)
        prompt = tuple(request.prompt)
        if self._prompt is None or self._prompt.tokens != prompt:
            logits = self._decoder.prefill(prompt, self._prompt_cache)
            if not bool(logits.isfinite().all()):
                raise UserError(f"the model gives request {request.id!r} logits that are not finite; check its weights")
            self._prompt = _Prompt(prompt, logits)
            self._stats.prefills += 1
        room = min(self._sampling.max_new_tokens, self._model.max_seq_len - len(prompt))
        row = _Row(request, key_digest(request.key), room, len(prompt) - 1)
        _, token = self._verify(self._prompt.logits[0], _Drafts.none(1, self._device), [0], [row.numbers(1)])
        self._append(row, int(token))
        self._stats.first_tokens += 1
        self._stats.prefill_seconds += time.perf_counter() - started
        return row

    @torch.inference_mode()
    def _put(self, row: _Row, place: int) -> None:
        self._rows[place : place + 1] = [row]
        self._cache.copy_row(place, self._prompt_cache, 0, row.length)
        self._draft_logits[place] = self._prompt.logits[1:, 0, 0]

    @torch.inference_mode()
    def _close_gaps(self) -> None:
        for place in reversed(range(len(self._rows))):
            if self._rows[place].finish_reason:
                last = self._rows.pop()
                if place < len(self._rows):
                    self._rows[place] = last
                    self._cache.copy_row(place, self._cache, len(self._rows), last.length)
                    self._draft_logits[place] = self._draft_logits[len(self._rows)]

    def _completion(self, row: _Row) -> Completion:
        self._stats.completions += 1
        shown = row.tokens[:-1] if row.finish_reason == "eos" else row.tokens
        text = self._tokenizer.decode([token for token in shown if token not in self._tokenizer.special_ids])
        cut = self._stop.cut(text)
        if cut is not None:
            return Completion(row.request.id, cut, tuple(row.tokens), "stop", row.forwards)
        return Completion(row.request.id, text, tuple(row.tokens), row.finish_reason, row.forwards)

    # ------------------------------------------------------------------------------------------------------------------
    # One forward of all rows

    @torch.inference_mode()
    def _step(self) -> None:
        """Every row gets the drafts that the model accepts, and the token that it puts after them."""
        started = time.perf_counter()
        rows = self._rows
        count = min(self._num_drafts, max(row.room for row in rows) - 1)  # drafts in the window
        useful = [min(count, row.room - 1) for row in rows]
        numbers = [[] if self._sampling.greedy else row.numbers(count + 1) for row in rows]
        drafts = self._draft(count, numbers) if count else _Drafts.none(len(rows), self._device)

        newest = torch.tensor([[row.tokens[-1]] for row in rows], device=self._device)
        window = torch.cat([newest, drafts.tokens], dim=1)  # [B, W]
        states, places = self._decoder.extend(window, [row.length for row in rows], self._cache)
        # The extra heads too run on the whole window, though only the last accepted position matters: in one pass over
        # the unembedding, whose reading is most of what a second pass for that position alone would cost.
        logits = self._decoder.heads(states, places, self._cache)  # [heads, B, W, V]
        accepted, token = self._verify(logits[0], drafts, useful, numbers)
        if self._num_drafts:
            last = logits[1:, torch.arange(len(rows), device=self._device), accepted]  # [drafts, B, V]
            self._draft_logits[: len(rows)] = last.transpose(0, 1)

        results = torch.cat([accepted[:, None], drafts.tokens, token[:, None]], dim=1).tolist()  # waits for the device
        for row, num_useful, (num_accepted, *drafted, chosen) in zip(rows, useful, results, strict=True):
            row.forwards += 1
            self._stats.count_drafts(num_useful)
            for i, new in enumerate([*drafted[:num_accepted], chosen]):
                if i < num_useful:
                    self._stats.count_verified(i, accepted=i < num_accepted)
                self._append(row, new)
                if row.finish_reason:  # what was accepted behind an end token or a stop string is dropped
                    break
        self._stats.forwards += 1
        self._stats.row_forwards += len(rows)
        self._stats.decode_seconds += time.perf_counter() - started

    def _draft(self, count: int, numbers: list[list[Numbers]]) -> "_Drafts":
        """Of heads 2 to count + 1 at the last cached token, which head 1 has continued with the newest token."""
        logits = self._draft_logits[: len(self._rows), :count]  # [B, count, V]
        if self._sampling.greedy:
            return _Drafts(logits.argmax(-1), None)
        q = distribution(logits, self._sampling)  # [B, count, V]
        seeds = torch.tensor([[n.draft for n in of_row[:count]] for of_row in numbers], device=self._device)
        return _Drafts(sample(q, seeds), q)

    def _verify(
        self, logits: Tensor, drafts: "_Drafts", useful: list[int], numbers: list[list[Numbers]]
    ) -> tuple[Tensor, Tensor]:
        """The number of accepted drafts, and the token after them, each [B]."""
        useful = torch.tensor(useful, device=self._device)
        if self._sampling.greedy:
            return verify_greedy(logits, drafts.tokens, useful)
        p = distribution(logits, self._sampling)  # [B, W, V]
        uniforms, seeds = (
            torch.tensor([[getattr(n, name) for n in of_row] for of_row in numbers], device=self._device)
            for name in ("accept", "token")
        )
        accepted, weights = verify_sampled(p, drafts.q, drafts.tokens, useful, uniforms[:, :-1])
        return accepted, sample(weights, seeds.gather(1, accepted[:, None])[:, 0])

    def _append(self, row: _Row, token: int) -> None:
        """Add a token, whose predecessor is then in the cache, and see whether the completion ends with it."""
        row.tokens.append(token)
        row.length += 1
        row.room -= 1
        self._stats.new_tokens += 1
        if token in self._end_ids:
            row.finish_reason = "eos"
        elif self._stop.ended(row.tokens):
            row.finish_reason = "stop"
        elif row.room == 0:
            row.finish_reason = "length"


@dataclass(frozen=True)
class _Drafts:
    """The window's tokens after the newest: ``tokens[b, i]`` is head i + 2's, drawn from ``q[b, i]``."""

    tokens: Tensor  # [B, W - 1]
    q: Tensor | None  # [B, W - 1, V]; None in greedy decoding, or without drafts

    @staticmethod
    def none(rows: int, device: torch.device) -> "_Drafts":
        return _Drafts(torch.empty(rows, 0, dtype=torch.long, device=device), None)
