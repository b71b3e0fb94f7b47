"""Compiled decoding: the texts and logits of decoding as it is, by a number of graphs that no shape changes."""

import functools

import pytest
import torch
from decoding import completions, requests_of
from torch._dynamo.utils import counters

from wmtp.generation import Request, Sampling
from wmtp.generation.cached_decoder import CachedDecoder, Prompts

GRAPHS = 7  # before attention: five choices of what is written and asked for; behind it: with prompts, and without


@pytest.fixture
def compiled(request, monkeypatch):
    """Compiles for one of torch's backends, and counts from here on."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=request.param))


def decoder_of_prompts(model, prompts, of_rows, **options):
    """Decodes windows of several widths behind prompts; returns the logits of all of them."""
    decoder, found = CachedDecoder(model, 3, **options), []
    shared, own = decoder.new_cache(), decoder.new_cache()
    shared.reserve(len(prompts), max(map(len, prompts)))
    for place, prompt in enumerate(prompts):
        found.append(decoder.prefill(prompt, shared.row(place)))
    generator, lengths = torch.Generator().manual_seed(1), [0] * len(of_rows)
    for width in (1, 3, 1):
        tokens = torch.randint(0, 66, (len(of_rows), width), generator=generator)
        states, places = decoder.extend(tokens, lengths, own, Prompts(shared, [len(p) for p in prompts], of_rows))
        found.append(decoder.heads(states, places, own))
        lengths = [n + 1 + row % width for row, n in enumerate(lengths)]
    return found


def assert_bounded():
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert counters["stats"]["unique_graphs"] == GRAPHS


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)], indirect=True)
@torch.inference_mode()
def test_logits_are_those_of_decoding_as_it_is_whatever_the_shapes(tiny, compiled):
    parallel, looped = tiny(), tiny(looped_heads=True)
    for model, prompts, of_rows in (
        (parallel, [[5]], [0]),
        (parallel, [[1, 2, 3]], [0, 0, 0, 0]),
        (parallel, [[1, 2, 3], [4] * 40], [0, 1, 0]),
        (looped, [[1, 2], [3, 4, 5, 6], [7] * 33], [0, 1, 2]),
        (parallel, [[1, 2], [3, 4, 5, 6], [7] * 33], [0, 1, 2]),
    ):
        plain = decoder_of_prompts(model, prompts, of_rows)
        for logits, expected in zip(decoder_of_prompts(model, prompts, of_rows, compile=True), plain, strict=True):
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert_bounded()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("compiled", ["inductor"], indirect=True)
def test_texts_are_those_of_decoding_as_it_is(trained, letters, compiled):
    """Prompts of their own and shared, rows that end and are refilled, drafts that are accepted and refused."""
    letters.eos_id = 30
    tasks = requests_of(5, vocab_size=32)
    requests = [Request((r.id, n), r.prompt, (0, r.id, n)) for r in tasks for n in range(2)]
    for sampling, options in (
        (Sampling(30), {}),
        (Sampling(30), {"num_drafts": 2}),
        (Sampling(20, 0.8), {"batch_size": 7}),
        (Sampling(20, 1.0, 0.9), {"num_drafts": 2, "batch_size": 2}),
        (Sampling(9, 0.8), {"num_drafts": 1, "batch_size": 1}),
    ):
        plain = completions(trained, letters, requests, sampling, **options)
        assert completions(trained, letters, requests, sampling, compile=True, **options) == plain
    assert_bounded()
