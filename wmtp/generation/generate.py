"""Continuous batching: each row decodes one request and takes the next as soon as it finishes."""

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
        id: returned with the completion.
        prompt: token ids, at least one.
        key: strings and numbers, usually (seed, task, sample); the random numbers depend only on it.
    """

    id: object
    prompt: tuple[int, ...]
    key: tuple


@dataclass(frozen=True)
class Completion:
    """The result of a request.

    Args:
        id: the request's.
        text: decoded up to the first stop string or end token, both left out, as are the names of special tokens.
        tokens: all generated tokens, with the end token or those of the stop string.
        finish_reason: ``stop``, ``eos``, or ``length``: max_new_tokens or the model's context is used up.
        forwards: passes of the model for its tokens, the prompt's too; fewer than tokens if drafts were accepted.
    """

    id: object
    text: str
    tokens: tuple[int, ...]
    finish_reason: Literal["stop", "eos", "length"]
    forwards: int


@dataclass
class DecodingStats:
    """Counts that calls of :func:`generate` add to. The seconds exclude the consumer's time."""

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
        """New tokens per row and forward after the prefill: 1 in plain decoding, up to H with drafts."""
        return (self.new_tokens - self.first_tokens) / self.row_forwards if self.row_forwards else 0.0

    def count_drafts(self, count: int) -> None:
        """Counts ``count`` drafts of a row, of heads 2 to count + 1."""
        for k in range(2, count + 2):
            self.drafted[k] = self.drafted.get(k, 0) + 1

    def count_verified(self, draft: int, *, accepted: bool) -> None:
        """Counts the draft at this index of a window, which was compared with the model: all before it are accepted."""
        k = draft + 2
        self.verified[k] = self.verified.get(k, 0) + 1
        self.accepted[k] = self.accepted.get(k, 0) + accepted

    def acceptance(self) -> dict[int, float]:
        """Returns, per head, the share of its verified drafts that were accepted."""
        return {k: self.accepted.get(k, 0) / n for k, n in sorted(self.verified.items())}

    def as_dict(self) -> dict:
        """Returns all counts and the two figures derived from them."""
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
    """Continues every request's prompt and yields each completion as it finishes, in no fixed order.

    A finished row takes the next request at once; ``requests`` is read only when a row is free. Successive requests
    with the same prompt share its prefill. With ``num_drafts`` > 0 decoding is self-speculative: heads 2 to
    num_drafts + 1 draft the tokens after the next, and one forward verifies them. Greedy tokens are those of plain
    decoding; sampled ones have its distribution (:func:`~wmtp.generation.sampling.verify_sampled`), but other random
    numbers, so a single text differs.

    The text depends on the prompt, ``sampling``, ``num_drafts`` and the request's key, not on batch size, order or
    number of processes, up to rounding. Attention adds in an order that varies with the shape of the batch, which moves
    logits by about 1e-6 of their size in float32: another token wins only if two are closer than that. In bfloat16 on a
    CPU a row's products do not depend on other rows, and attention hardly: SmolLM2's texts were the same at batch sizes
    1, 3 and 10. A window of drafts changes the shape more, so a greedy text may differ from plain decoding's where two
    logits nearly tie. On CUDA, bfloat16 states move logits by about 1e-2 between batch shapes, and texts do differ.

    A text ends with the tokenizer's EOS, or with any token that the checkpoint's files name as one (``eos_token_id`` of
    config.json and generation_config.json; chat models have several).

    Args:
        model: an :class:`~wmtp.models.MTPDecoder`, whole on one device, in the dtype to compute in. Its weights are
            read when iteration starts; on a CPU a packed copy of them exists until it ends.
        tokenizer: has ``decode``, ``eos_id`` and ``special_ids``.
        requests: a sequence is checked before anything runs; requests of an iterator are checked as they are read.
        batch_size: rows decoded at once.
        num_drafts: 0 to H - 1; 0 is plain decoding with head 1. Each draft costs a head's block and one more row in the
            forward that verifies it, accepted or not: few are best if the heads are often wrong.
        stats: counts are added to it.

    Raises:
        ValueError: a prompt that is empty, leaves no room for a token, or has ids outside the vocabulary; a bad key;
            more drafts than the model has extra heads; a model that is sharded or has active dropout; non-finite
            logits.
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
    room: int  # tokens left to generate
    length: int  # tokens in the cache: all but the newest one
    tokens: list[int] = field(default_factory=list)
    forwards: int = 1  # the prefill
    finish_reason: Literal["stop", "eos", "length"] | None = None

    def numbers(self, count: int) -> list[Numbers]:
        """Returns the random numbers of the next ``count`` tokens."""
        return [numbers_at(self.digest, len(self.tokens) + i) for i in range(count)]


@dataclass(frozen=True)
class _Prompt:
    """The prompt prefilled last, whose keys and values are in the prompt cache."""

    tokens: tuple[int, ...]
    logits: Tensor  # [heads, 1, 1, V], at its last token


class _Batch:
    """The requests in flight: request b is entry b of ``_rows`` and ``_draft_logits``, and row b of the cache."""

    def __init__(
        self, model: MTPDecoder, tokenizer, sampling: Sampling, batch_size: int, num_drafts: int, stats: DecodingStats
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
        # The extra heads' logits at each row's last cached token; the next drafts are drawn from them.
        self._draft_logits = torch.zeros(self._batch_size, self._num_drafts, len(embedding), device=self._device)

    def _admit(self, requests: Iterator[Request]) -> Iterator[Completion]:
        """Puts new requests in the places of finished rows and yields those that finish at once; closes gaps."""
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
        """Prefills the prompt, unless the request before had the same, and chooses the first token."""
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
        """Appends to every row the drafts that the model accepts, and its own token after them."""
        started = time.perf_counter()
        rows = self._rows
        count = min(self._num_drafts, max(row.room for row in rows) - 1)  # drafts in the window
        useful = [min(count, row.room - 1) for row in rows]
        numbers = [[] if self._sampling.greedy else row.numbers(count + 1) for row in rows]
        drafts = self._draft(count, numbers) if count else _Drafts.none(len(rows), self._device)

        newest = torch.tensor([[row.tokens[-1]] for row in rows], device=self._device)
        window = torch.cat([newest, drafts.tokens], dim=1)  # [B, W]
        states, places = self._decoder.extend(window, [row.length for row in rows], self._cache)
        # The extra heads also run on the whole window, though only the last accepted position matters: a second pass
        # for that position would cost nearly as much, because it reads the unembedding again.
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
                if row.finish_reason:  # tokens accepted after an end token or a stop string are dropped
                    break
        self._stats.forwards += 1
        self._stats.row_forwards += len(rows)
        self._stats.decode_seconds += time.perf_counter() - started

    def _draft(self, count: int, numbers: list[list[Numbers]]) -> "_Drafts":
        """Returns drafts of heads 2 to count + 1 at the last cached token; head 1 gave the newest token there."""
        logits = self._draft_logits[: len(self._rows), :count]  # [B, count, V]
        if self._sampling.greedy:
            return _Drafts(logits.argmax(-1), None)
        q = distribution(logits, self._sampling)  # [B, count, V]
        seeds = torch.tensor([[n.draft for n in of_row[:count]] for of_row in numbers], device=self._device)
        return _Drafts(sample(q, seeds), q)

    def _verify(
        self, logits: Tensor, drafts: "_Drafts", useful: list[int], numbers: list[list[Numbers]]
    ) -> tuple[Tensor, Tensor]:
        """Returns the number of accepted drafts and the token after them, each [B]."""
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
        """Adds a token, whose predecessor is now cached, and checks whether it ends the completion."""
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
    """The drafts in a window: ``tokens[b, i]`` is head i + 2's, drawn from ``q[b, i]``."""

    tokens: Tensor  # [B, W - 1]
    q: Tensor | None  # [B, W - 1, V]; None in greedy decoding, or without drafts

    @staticmethod
    def none(rows: int, device: torch.device) -> "_Drafts":
        return _Drafts(torch.empty(rows, 0, dtype=torch.long, device=device), None)
