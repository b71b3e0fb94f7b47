"""Rows admitted by their bytes of keys and values."""

import itertools
import random
import weakref

import pytest
import torch
from decoding import completions, requests_of

from wmtp.generation import DecodingStats, Request, Sampling, generate, kv_memory
from wmtp.generation.cached_decoder import KVCache
from wmtp.generation.kv_memory import check_kv_memory, free_kv_memory, kv_bytes_per_token, kv_positions, rows_within
from wmtp.models import codellama_7b, meta_mtp_7b


def seven_billion(builder):
    with torch.device("meta"):
        return builder().to(torch.bfloat16)


def test_the_bytes_of_a_token_are_those_of_every_block_that_decodes():
    """Meta's 29 blocks to head 1, CodeLlama's 32; two of 32 x 128 bfloat16 numbers in each."""
    meta, codellama = seven_billion(meta_mtp_7b), seven_billion(codellama_7b)
    assert kv_bytes_per_token(meta) == 29 * 2 * 32 * 128 * 2 and kv_bytes_per_token(meta, 3) == 32 * 2 * 32 * 128 * 2
    assert kv_bytes_per_token(codellama) == 32 * 2 * 32 * 128 * 2


def test_a_budget_admits_as_many_rows_as_their_answers_take_beside_their_prompt():
    model = seven_billion(meta_mtp_7b)
    positions = kv_positions(1, 4600, 64, 512)
    assert positions == 4608 + 64 * 512
    bytes_of_64 = positions * kv_bytes_per_token(model)
    assert bytes_of_64 < 18e9  # 156 GB with a prompt in every row
    assert rows_within(bytes_of_64, model, 4600, 512) == 64
    assert rows_within(bytes_of_64 - 1, model, 4600, 512) == 63
    one_row = kv_positions(1, 4600, 1, 512, 3) * kv_bytes_per_token(model, 3)
    check_kv_memory(one_row, model, 4600, 512, num_drafts=3, name="it")
    with pytest.raises(ValueError, match=r"it has 4600 tokens, which with 512 new ones take 2\.75 GB .* is 2\.75 GB; "):
        check_kv_memory(one_row - 1, model, 4600, 512, num_drafts=3, name="it")
    assert rows_within(1, model, 4600, 512) == 0


def test_what_is_free_is_shared_by_the_processes_of_a_host(monkeypatch):
    alone = free_kv_memory(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert 0 < free_kv_memory(torch.device("cpu")) < alone / 2


# ----------------------------------------------------------------------------------------------------------------------
# In use


@pytest.fixture
def held(monkeypatch):
    """The bytes of all caches each time that one of them changes; they grow by 8 positions."""
    monkeypatch.setattr(kv_memory, "GROWTH", 8)
    caches, seen, resize = weakref.WeakKeyDictionary(), [], KVCache.resize

    def watched(cache, rows, length):
        resize(cache, rows, length)
        caches[cache] = sum(block.nbytes for block in cache.blocks)
        seen.append(sum(caches.values()))

    monkeypatch.setattr(KVCache, "resize", watched)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("num_drafts", [0, 2])
def test_texts_are_the_same_within_any_budget_and_caches_never_outgrow_it(tiny, letters, held, num_drafts):
    """Prompts of 1 to 12 tokens, and one of 40, three samples of each."""
    model, sampling = tiny(), Sampling(14, 1.0)
    long = tuple(random.Random(0).choices(range(60), k=40))
    prompts = [*(request.prompt for request in requests_of(6)), long, *(r.prompt for r in requests_of(9)[6:])]
    requests = [Request((p, n), prompt, (p, n)) for p, prompt in enumerate(prompts) for n in range(3)]
    options = {"batch_size": 12, "num_drafts": num_drafts}
    expected = completions(model, letters, requests, sampling, **options)
    unbounded, steps = max(held), []
    least = kv_positions(1, 40, 1, 14, num_drafts) * kv_bytes_per_token(model, num_drafts)
    for budget in (least, 2 * least, 4 * least):
        held.clear()
        stats = DecodingStats()
        done = completions(model, letters, iter(requests), sampling, kv_memory=budget, stats=stats, **options)
        assert done == expected and max(held) <= budget < unbounded
        steps.append(stats.forwards)
    assert steps == sorted(steps, reverse=True) and steps[0] > 1.5 * steps[-1]  # more rows at once
    assert any(after < before for before, after in itertools.pairwise(held))  # shrunk to admit others


def test_a_prompt_that_is_over_the_budget_alone_is_named(tiny, letters):
    model = tiny()
    requests = [Request("short", (1, 2), ("a",)), Request("long", (1,) * 40, ("b",))]
    tight = kv_positions(1, 2, 1, 14) * kv_bytes_per_token(model) - 1
    message = (
        "the prompt of request '{}' has {} tokens, which with 14 new ones take .* of keys and values, and kv_memory"
    )
    with pytest.raises(ValueError, match=message.format("short", 2)):
        generate(model, letters, requests, Sampling(14), batch_size=2, kv_memory=tight)  # before anything is generated
    with pytest.raises(ValueError, match=message.format("short", 2)):
        list(generate(model, letters, iter(requests), Sampling(14), batch_size=2, kv_memory=tight))
    for wrong in (0, -1, True, "20GB", 1e9):
        with pytest.raises(ValueError, match="kv_memory must be a number of bytes >= 1, got"):
            generate(model, letters, requests, Sampling(14), batch_size=2, kv_memory=wrong)
