"""Decoding as a card would do it, on tensors without numbers: waits of the host, and bytes of the 7B configs."""

from collections import defaultdict
from pathlib import Path

import pytest
import torch
from decoding import Letters
from on_fake_cuda import FakeCUDA

from wmtp.config import load
from wmtp.generation import DecodingStats, Request, Sampling, cached_decoder, generate
from wmtp.generation.generate import Batch
from wmtp.generation.kv_memory import FREE_SHARE
from wmtp.models import codellama_7b, llama_mtp, meta_mtp_7b
from wmtp.training.planning.cards import CARDS

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BUILDERS = {"meta_mtp_7b": meta_mtp_7b, "codellama_7b": codellama_7b}
EVALUATIONS = sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.glob("*_7b/eval_*.yaml") if "heads" not in p.name)

LONGEST = "meta_mtp_7b/eval_mbpp.yaml"  # KV caches of 156 GB where every row holds its prompt
SIZES = {
    "vocab_size": 67, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32, "intermediate_dim": 40,
    "max_seq_len": 64, "num_future_tokens": 3,
}  # fmt: skip


def on_the_card(cuda, builder, **sizes):
    torch.set_default_dtype(torch.bfloat16)  # a fake parameter's dtype cannot be changed
    try:
        with cuda, torch.device("cuda"):
            return builder(**sizes).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "sampling", [Sampling(9), Sampling(9, 0.8), Sampling(9, 0.8, 0.9)], ids=["greedy", "", "top_p"]
)
@pytest.mark.parametrize("num_drafts", [0, 2])
def test_the_host_waits_once_in_a_decode_step(sampling, num_drafts):
    cuda, stats = FakeCUDA(), DecodingStats()
    model = on_the_card(cuda, llama_mtp, **SIZES)
    requests = [Request((task, n), (task, 3, 4), (task, n)) for task in (1, 2) for n in range(3)]
    options = {"batch_size": 8, "kv_memory": 10**9, "num_drafts": num_drafts, "stats": stats}
    with cuda:
        done = list(generate(model, Letters(), requests, sampling, **options))
    assert {len(c.tokens) for c in done} == {9} and stats.forwards == 8
    # One more for the first tokens of all rows, and one a prompt, whose logits are looked at.
    assert cuda.waits == {"to the host": stats.forwards + 1, "_local_scalar_dense": stats.prefills}


@pytest.mark.parametrize("num_kv_heads", [2, 4])
def test_a_compiled_step_waits_once_and_its_graphs_hold_for_all_shapes(monkeypatch, num_kv_heads):
    """No compiler runs on tensors without numbers: what it would be given differs in the number of tokens alone."""
    seen = defaultdict(set)

    def compiled(function):
        def call(block, *args):
            given = function, *(isinstance(a, torch.Tensor) or a for a in args)
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            assert all(t.device.type == "cuda" for t in tensors)
            seen[given].add(tuple((t.dtype, t.shape[1:], t.stride(), t.storage_offset()) for t in tensors))
            return function(block, *args)

        return call

    monkeypatch.setattr(cached_decoder, "compiled", compiled)
    cuda = FakeCUDA()
    model = on_the_card(cuda, llama_mtp, **{**SIZES, "num_layers": 2, "num_kv_heads": num_kv_heads})
    for num_drafts in (0, 2):
        for prompts in ([3, 1, 40], [5]):
            requests = [Request(n, (n,) * length, (n,)) for n, length in enumerate(prompts)]
            requests += [Request((n, n), requests[-1].prompt, (n, n)) for n in range(len(prompts) - 1)]
            stats, before = DecodingStats(), cuda.waits["to the host"]
            options = {"batch_size": 8, "kv_memory": 10**9, "num_drafts": num_drafts, "stats": stats}
            with cuda:
                list(generate(model, Letters(), requests, Sampling(4, 0.8), compile=True, **options))
            assert cuda.waits["to the host"] - before == stats.forwards + 1
    assert set(cuda.waits) == {"to the host", "_local_scalar_dense"}
    assert len(seen) == 7 and all(len(signatures) == 1 for signatures in seen.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [LONGEST, *(pytest.param(name, marks=pytest.mark.long) for name in EVALUATIONS if name != LONGEST)]
)
def test_a_7b_evaluation_holds_less_than_70_gb_at_its_longest_prompt(name):
    """As many samples of the longest prompt that leaves room for a whole answer as a card decodes at once, at their
    last step; and whatever is in flight, as much as the budget admits where none is given."""
    cfg, cuda, card = load(CONFIGS / name), FakeCUDA(), CARDS["a100_80gb"]
    model = on_the_card(cuda, BUILDERS[name.split("/")[0]], max_seq_len=cfg.model.max_seq_len)
    weights = cuda.held
    kv_memory = int(FREE_SHARE * (card.memory - weights))
    sampling = Sampling(cfg.max_new_tokens, cfg.temperatures[0], cfg.top_p)
    prompt = (0,) * (cfg.model.max_seq_len - cfg.max_new_tokens)
    batch = Batch(model, Letters(), sampling, cfg.batch_size, cfg.num_drafts, kv_memory, DecodingStats())
    with cuda:
        batch._prepare()
        batch._first_tokens(batch._take(iter([Request(n, prompt, (n,)) for n in range(cfg.num_samples)])))
        for row in batch._rows:
            row.tokens += [0] * (cfg.max_new_tokens - 2)
        batch._step()
    caches = sum(block.nbytes for cache in (batch._own, batch._prompt_cache) for block in cache.blocks)
    assert len(batch._rows) == cfg.batch_size and caches <= kv_memory
    assert 13.4e9 < weights < 13.6e9 and cuda.peak < 70e9
    beside = cuda.peak - weights - caches
    assert weights + kv_memory + beside < 70e9
