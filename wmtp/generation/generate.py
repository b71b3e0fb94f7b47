"""Continuous batching: each row decodes one request and takes the next as soon as it finishes."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from wmtp.errors import UserError
from wmtp.generation.cached_decoder import CachedDecoder, Prompts, to_device
from wmtp.generation.kv_memory import free_kv_memory, kv_bytes_per_token, kv_positions
from wmtp.generation.requests import Completion, DecodingStats, Request, Step, check_memory, check_request
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


def generate(
    model: nn.Module,
    tokenizer,
    requests: Iterable[Request],
    sampling: Sampling,
    *,
    batch_size: int,
    num_drafts: int = 0,
    kv_memory: int | None = None,
    compile: bool = False,
    stats: DecodingStats | None = None,
    watch: Callable[[object, Step], None] | None = None,
) -> Iterator[Completion]:
    """Continues every request's prompt and yields each completion as it finishes, in no fixed order.

    A finished row takes the next request at once; ``requests`` is read only when a row is free. Requests with the same
    prompt, one after the other, share its prefill and its keys and values. As many rows are decoded at once as
    ``kv_memory`` has room for (:mod:`wmtp.generation.kv_memory`), at most ``batch_size``.

    With ``num_drafts`` > 0 decoding is self-speculative: heads 2 to num_drafts + 1 draft the tokens after the next, and
    one forward verifies them. Greedy tokens are those of plain decoding; sampled ones have its distribution
    (:func:`~wmtp.generation.sampling.verify_sampled`), but other random numbers, so a single text differs.

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
        batch_size: rows decoded at once, at most.
        num_drafts: 0 to H - 1; 0 is plain decoding with head 1. Each draft costs a head's block and one more row in the
            forward that verifies it, accepted or not: few are best if the heads are often wrong.
        kv_memory: bytes that keys and values may take; None is a share of what is free when iteration starts.
        compile: torch.compile what blocks do besides attention, for CUDA: a minute at the start, then fewer and larger
            kernels. Logits move by rounding.
        stats: counts are added to it.
        watch: called with a request's id and each step of its decoding, as it happens.

    Raises:
        ValueError: a prompt that is empty, leaves no room for a token, has ids outside the vocabulary, or does not fit
            into ``kv_memory`` even alone; a bad key; more drafts than the model has extra heads; a model that is
            sharded or has active dropout; non-finite logits.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise UserError(f"batch_size must be a whole number >= 1, got {batch_size!r}")
    if kv_memory is not None and (isinstance(kv_memory, bool) or not isinstance(kv_memory, int) or kv_memory < 1):
        raise UserError(f"kv_memory must be a number of bytes >= 1, got {kv_memory!r}")
    check_decoder(model, num_drafts)
    if isinstance(requests, Sequence):
        for request in requests:
            check_request(request, model)
            if kv_memory is not None:
                check_memory(request, model, sampling, num_drafts, kv_memory)
        batch_size = min(batch_size, max(len(requests), 1))
    stats = DecodingStats() if stats is None else stats
    batch = Batch(model, tokenizer, sampling, batch_size, num_drafts, kv_memory, stats, watch, compile)
    return batch.run(iter(requests))


def check_decoder(model: nn.Module, num_drafts: int) -> None:
    """Refuses a model, or a number of drafts, that :func:`generate` would refuse."""
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


@dataclass(eq=False)
class _Prompt:
    """A prompt whose keys and values are in the prompts' cache."""

    tokens: tuple[int, ...]
    logits: Tensor  # [heads, 1, V], at its last token


@dataclass
class _Row:
    """A request that is being decoded. Its cache holds all of its tokens but the newest."""

    request: Request
    digest: bytes
    prompt: _Prompt
    new_tokens: int  # it may have in all
    tokens: list[int] = field(default_factory=list)
    forwards: int = 1  # the prefill
    finish_reason: Literal["stop", "eos", "length"] | None = None

    @property
    def room(self) -> int:
        """Returns the tokens left to generate."""
        return self.new_tokens - len(self.tokens)

    @property
    def length(self) -> int:
        """Returns the tokens in its cache."""
        return len(self.tokens) - 1

    def numbers(self, count: int) -> list[Numbers]:
        """Returns the random numbers of the next ``count`` tokens."""
        return [numbers_at(self.digest, len(self.tokens) + i) for i in range(count)]


class Batch:
    """The requests in flight: request b is entry b of ``_rows`` and ``_draft_logits``, and row b of ``_own``."""

    def __init__(
        self,
        model: MTPDecoder,
        tokenizer,
        sampling: Sampling,
        batch_size: int,
        num_drafts: int,
        kv_memory: int | None,
        stats: DecodingStats,
        watch: Callable[[object, Step], None] | None = None,
        compile: bool = False,
    ) -> None:
        self._model, self._tokenizer, self._sampling, self._stats = model, tokenizer, sampling, stats
        self._watch = watch if watch is not None else lambda id, step: None
        self._batch_size, self._num_drafts, self._kv_memory = batch_size, num_drafts, kv_memory
        self._compile = compile
        self._stop = StopStrings(tokenizer, sampling.stop)
        self._end_ids = {tokenizer.eos_id, *(model.source.end_ids if model.source is not None else ())}
        self._rows: list[_Row] = []
        self._prompts: list[_Prompt] = []  # in the order of the rows of their cache
        self._waiting: Request | None = None  # read, and without room yet

    def run(self, requests: Iterator[Request]) -> Iterator[Completion]:
        # Inference mode ends at each yield: it must not leak into the code that consumes the completions.
        self._prepare()
        while True:
            self._close_gaps()
            while new := self._take(requests):
                self._first_tokens(new)
                yield from (self._completion(row) for row in new if row.finish_reason)
            if not self._rows:
                return
            self._step()
            yield from (self._completion(row) for row in self._rows if row.finish_reason)

    # ------------------------------------------------------------------------------------------------------------------
    # Requests come and go

    @torch.inference_mode()
    def _prepare(self) -> None:
        self._decoder = CachedDecoder(self._model, 1 + self._num_drafts, compile=self._compile)
        self._own, self._prompt_cache = self._decoder.new_cache(), self._decoder.new_cache()
        embedding = self._model.tok_embeddings.weight
        self._device = embedding.device
        # The extra heads' logits at each row's last cached token; the next drafts are drawn from them.
        self._draft_logits = torch.zeros(self._batch_size, self._num_drafts, len(embedding), device=self._device)
        if self._kv_memory is None:
            self._kv_memory = free_kv_memory(self._device)
        self._positions = self._kv_memory // kv_bytes_per_token(self._model, self._num_drafts)

    @torch.inference_mode()
    def _take(self, requests: Iterator[Request]) -> list[_Row]:
        """Returns rows for the next requests, as many as there is room for, with their prompts prefilled."""
        started = time.perf_counter()
        new: list[_Row] = []
        while len(self._rows) + len(new) < self._batch_size:
            request = next(requests, None) if self._waiting is None else self._waiting
            self._waiting = None
            if request is None:
                break
            check_request(request, self._model)
            row = self._row(request, [*self._rows, *new])
            if row is None:
                self._waiting = request
                break
            new.append(row)
        self._stats.prefill_seconds += time.perf_counter() - started
        return new

    def _row(self, request: Request, others: list[_Row]) -> _Row | None:
        """Returns a row for the request beside the others, or None where it has to wait for one of them to finish."""
        tokens = tuple(request.prompt)
        new_tokens = min(self._sampling.max_new_tokens, self._model.max_seq_len - len(tokens))
        same = next((prompt for prompt in self._prompts if prompt.tokens == tokens), None)
        kept = [p for p in self._prompts if p is same or any(row.prompt is p for row in others)]
        lengths = [len(prompt.tokens) for prompt in kept] + [len(tokens)] * (same is None)
        longest = max([new_tokens, *(row.new_tokens for row in others)]) + self._num_drafts
        if kv_positions(len(lengths), max(lengths), len(others) + 1, longest) > self._positions:
            if not others:
                check_memory(request, self._model, self._sampling, self._num_drafts, self._kv_memory)
            return None
        self._keep_prompts(kept)
        self._make_room(len(lengths), max(lengths), len(others) + 1, longest)
        return _Row(request, key_digest(request.key), same or self._prefill(request), new_tokens)

    def _keep_prompts(self, kept: list[_Prompt]) -> None:
        """Drops all other prompts, and closes the gaps that they leave."""
        for place in reversed(range(len(self._prompts))):
            if self._prompts[place] not in kept:
                last = self._prompts.pop()
                if place < len(self._prompts):
                    self._prompts[place] = last
                    self._prompt_cache.move_row(place, len(self._prompts), len(last.tokens))

    def _make_room(self, prompts: int, longest_prompt: int, rows: int, longest: int) -> None:
        """Lets the prompts' cache grow; caches that would outgrow the budget shrink to what they need."""
        cache, own = self._prompt_cache, self._own
        held = kv_positions(
            max(prompts, cache.rows), max(longest_prompt, cache.capacity),
            max(rows, own.rows), max(longest, own.capacity),
        )  # fmt: skip
        if held > self._positions:
            own.resize(min(rows, own.rows), min(longest, own.capacity))
            cache.resize(prompts, longest_prompt)
        cache.reserve(prompts, longest_prompt)

    def _prefill(self, request: Request) -> _Prompt:
        """Computes a new prompt, whose place in the prompts' cache is the last one."""
        logits = self._decoder.prefill(request.prompt, self._prompt_cache.row(len(self._prompts)))[:, :, 0]
        if not bool(logits.isfinite().all()):
            raise UserError(f"the model gives request {request.id!r} logits that are not finite; check its weights")
        self._prompts.append(_Prompt(tuple(request.prompt), logits))
        self._stats.prefills += 1
        return self._prompts[-1]

    @torch.inference_mode()
    def _first_tokens(self, new: list[_Row]) -> None:
        """Chooses the first token of new rows, and takes those in that do not end with it."""
        started = time.perf_counter()
        logits = torch.stack([row.prompt.logits for row in new], dim=1)  # [heads, B, 1, V]
        numbers = [row.numbers(1) for row in new]
        _, tokens = self._verify(logits[0], _Drafts.none(len(new), self._device), [0] * len(new), numbers)
        for b, (row, token) in enumerate(zip(new, tokens.cpu().tolist(), strict=True)):
            self._append(row, token)
            self._watch(row.request.id, Step((), 0, (token,)))
            if not row.finish_reason:
                self._draft_logits[len(self._rows)] = logits[1:, b, 0]
                self._rows.append(row)
        self._stats.first_tokens += len(new)
        self._stats.prefill_seconds += time.perf_counter() - started

    @torch.inference_mode()
    def _close_gaps(self) -> None:
        for place in reversed(range(len(self._rows))):
            if self._rows[place].finish_reason:
                last = self._rows.pop()
                if place < len(self._rows):
                    self._rows[place] = last
                    self._own.move_row(place, len(self._rows), last.length)
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
        self._keep_prompts([row.prompt for row in rows])
        count = min(self._num_drafts, max(row.room for row in rows) - 1)  # drafts in the window
        useful = [min(count, row.room - 1) for row in rows]
        numbers = [[] if self._sampling.greedy else row.numbers(count + 1) for row in rows]
        drafts = self._draft(count, numbers) if count else _Drafts.none(len(rows), self._device)

        newest = to_device([[row.tokens[-1]] for row in rows], self._device)
        window = torch.cat([newest, drafts.tokens], dim=1)  # [B, W]
        places_of = {id(prompt): place for place, prompt in enumerate(self._prompts)}
        lengths, of_rows = [len(prompt.tokens) for prompt in self._prompts], [places_of[id(row.prompt)] for row in rows]
        prompts = Prompts(self._prompt_cache, lengths, of_rows)
        states, places = self._decoder.extend(window, [row.length for row in rows], self._own, prompts)
        # The extra heads also run on the whole window, though only the last accepted position matters: a second pass
        # for that position would cost nearly as much, because it reads the unembedding again.
        logits = self._decoder.heads(states, places, self._own)  # [heads, B, W, V]
        accepted, token = self._verify(logits[0], drafts, useful, numbers)
        if self._num_drafts:
            last = logits[1:, torch.arange(len(rows), device=self._device), accepted]  # [drafts, B, V]
            self._draft_logits[: len(rows)] = last.transpose(0, 1)

        results = torch.cat([accepted[:, None], drafts.tokens, token[:, None]], dim=1)
        results = results.cpu().tolist()  # here the host waits for the device, and nowhere else in a step
        for row, num_useful, (num_accepted, *drafted, chosen) in zip(rows, useful, results, strict=True):
            row.forwards += 1
            before = len(row.tokens)
            self._stats.count_drafts(num_useful)
            for i, new in enumerate([*drafted[:num_accepted], chosen]):
                if i < num_useful:
                    self._stats.count_verified(i, accepted=i < num_accepted)
                self._append(row, new)
                if row.finish_reason:  # tokens accepted after an end token or a stop string are dropped
                    break
            self._watch(row.request.id, Step(tuple(drafted[:num_useful]), num_accepted, tuple(row.tokens[before:])))
        self._stats.forwards += 1
        self._stats.row_forwards += len(rows)
        self._stats.decode_seconds += time.perf_counter() - started

    def _draft(self, count: int, numbers: list[list[Numbers]]) -> "_Drafts":
        """Returns drafts of heads 2 to count + 1 at the last cached token; head 1 gave the newest token there."""
        logits = self._draft_logits[: len(self._rows), :count]  # [B, count, V]
        if self._sampling.greedy:
            return _Drafts(logits.argmax(-1), None)
        q = distribution(logits, self._sampling)  # [B, count, V]
        seeds = to_device([[n.draft for n in of_row[:count]] for of_row in numbers], self._device)
        return _Drafts(sample(q, seeds), q)

    def _verify(
        self, logits: Tensor, drafts: "_Drafts", useful: list[int], numbers: list[list[Numbers]]
    ) -> tuple[Tensor, Tensor]:
        """Returns the number of accepted drafts and the token after them, each [B]."""
        useful = to_device(useful, self._device)
        if self._sampling.greedy:
            return verify_greedy(logits, drafts.tokens, useful)
        p = distribution(logits, self._sampling)  # [B, W, V]
        uniforms, seeds = (
            to_device([[getattr(n, name) for n in of_row] for of_row in numbers], self._device)
            for name in ("accept", "token")
        )
        accepted, weights = verify_sampled(p, drafts.q, drafts.tokens, useful, uniforms[:, :-1])
        return accepted, sample(weights, seeds.gather(1, accepted[:, None])[:, 0])

    def _append(self, row: _Row, token: int) -> None:
        """Adds a token, whose predecessor is now cached, and checks whether it ends the completion."""
        row.tokens.append(token)
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
