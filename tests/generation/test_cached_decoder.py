"""The decoder over cached keys and values gives the logits of the plain forward pass."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wmtp.generation import cached_decoder, kv_memory
from wmtp.generation.cached_decoder import CachedDecoder, Prompts
from wmtp.generation.linear import _can_pack, side_by_side, times

HEADS = 3
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
VARIANTS = {
    "grouped": {},
    "multi-head": {"num_kv_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "llama3 rope": {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 16}},
    "one layer": {"num_layers": 1},
    "looped": {"looped_heads": True},
    "looped, four of five heads": {"looped_heads": True, "num_future_tokens": 5},
}


def random_tokens(*shape):
    return torch.randint(0, 67, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_rows_of_different_length_get_the_full_forwards_logits(tiny, monkeypatch, variant):
    monkeypatch.setattr(cached_decoder, "PREFILL_CHUNK", 7)
    monkeypatch.setattr(kv_memory, "GROWTH", 8)
    model = tiny(**VARIANTS[variant])
    tokens, lengths = random_tokens(3, 60), [3, 25, 14]
    full = model(tokens)  # [H, B, S, V]
    num_heads = min(4, model.num_future_tokens)
    decoder, full = CachedDecoder(model, num_heads), full[:num_heads]
    cache = decoder.new_cache()
    assert len(cache.blocks) == len(model.layers) + num_heads - 1, "each round has keys and values of its own"
    cache.reserve(3, 25)
    for row, length in enumerate(lengths):
        logits = decoder.prefill(tokens[row, :length].tolist(), cache.row(row))
        torch.testing.assert_close(logits[:, 0, 0], full[:, row, length - 1], atol=1e-5, rtol=1e-5)

    def window(width, rows):
        new = torch.stack([tokens[r, n : n + width] for r, n in zip(rows, lengths, strict=True)])
        states, places = decoder.extend(new, lengths, cache)
        assert states[0].shape == (len(rows), width, 24)
        logits = decoder.heads(states, places, cache)
        for b, (row, n) in enumerate(zip(rows, lengths, strict=True)):
            torch.testing.assert_close(logits[:, b], full[:, row, n : n + width], atol=1e-5, rtol=1e-5)

    for width in (1, 4, 3, 9):  # of which a first part is kept, as when drafts are refused
        window(width, [0, 1, 2])
        lengths = [n + min(width, 2) for n in lengths]
    cache.move_row(0, 2, lengths[2])
    lengths = [lengths[2], lengths[1]]
    cache.resize(2, max(lengths))
    assert cache.rows == 2 and max(lengths) <= cache.capacity < max(lengths) + 8
    window(5, [2, 1])


@pytest.mark.parametrize("looped", [False, True])
@pytest.mark.parametrize("prompts", [[20], [3, 25, 14]])
@torch.inference_mode()
def test_rows_that_share_prompts_get_the_full_forwards_logits(tiny, prompts, looped):
    """Five rows, of which the first prompt has most; each has tokens of its own behind it."""
    model, of_rows = tiny(looped_heads=looped), [p % len(prompts) for p in (0, 0, 1, 0, 2)]
    heads, tails = random_tokens(len(prompts), 25), random_tokens(5, 30)
    texts = [torch.cat([heads[p, : prompts[p]], tail]) for p, tail in zip(of_rows, tails, strict=True)]
    full = [model(text[None])[:, 0] for text in texts]  # [H, S, V]
    decoder = CachedDecoder(model, HEADS)
    shared, own = decoder.new_cache(), decoder.new_cache()
    shared.reserve(len(prompts), max(prompts))
    for p, length in enumerate(prompts):
        decoder.prefill(heads[p, :length].tolist(), shared.row(p))
    lengths = [0] * 5
    for width in (1, 4, 3):
        new = torch.stack([tail[n : n + width] for tail, n in zip(tails, lengths, strict=True)])
        states, places = decoder.extend(new, lengths, own, Prompts(shared, prompts, of_rows))
        logits = decoder.heads(states, places, own)
        for row, n in enumerate(lengths):
            at = prompts[of_rows[row]] + n
            torch.testing.assert_close(logits[:, row], full[row][:, at : at + width], atol=1e-5, rtol=1e-5)
        lengths = [n + 1 + row % min(width, 2) for row, n in enumerate(lengths)]  # of which a first part is kept


@torch.inference_mode()
def test_logits_of_a_bf16_model_are_not_rounded(tiny):
    """Within 1e-5 of float64's product of the same bfloat16 operands; rounded to bfloat16 they miss by 0.01."""
    model = tiny().to(torch.bfloat16)
    decoder, states = CachedDecoder(model, HEADS), []
    product = decoder._unembed
    decoder._unembed = lambda x: states.append(x) or product(x)
    logits = decoder.prefill([1, 2, 3], decoder.new_cache())  # [H, 1, 1, V]
    assert states[0].dtype == torch.bfloat16 and logits.dtype == torch.float32
    exact = states[0].double() @ model.unembedding.double().T
    assert (logits[:, 0, 0] - exact).abs().max() <= 1e-5 < (exact - exact.bfloat16()).abs().max() / 100


@torch.inference_mode()
def test_heads_that_are_not_asked_for_do_not_run(tiny):
    model = tiny()
    for block in model.extra_heads:
        nn.init.constant_(block.attn.k_proj.weight, float("nan"))
    decoder = CachedDecoder(model, 1)
    cache = decoder.new_cache()
    assert len(cache.blocks) == 3
    logits = decoder.prefill([1, 2, 3], cache)
    assert logits.isfinite().all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_packed_products_are_the_plain_ones_and_no_row_sees_the_others(dtype, bias):
    torch.manual_seed(0)
    layers = [nn.Linear(1536, n, bias=bias, dtype=dtype) for n in (5, 96)]
    if not _can_pack(layers[0].weight):
        pytest.skip("this build of torch, or this processor, packs no weights")
    x = torch.randn(33, 1536, dtype=dtype)
    joint = side_by_side(*layers)
    for out, layer in zip(joint(x), layers, strict=True):
        exact = F.linear(x.double(), layer.weight.double())
        shift = layer.bias.double() if bias else 0
        torch.testing.assert_close(out.double(), exact + shift, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)
        torch.testing.assert_close(times(layer.weight)(x).double(), exact, atol=2e-5, rtol=0)  # float32 of either dtype
    for rows in (1, 2, 3, 5, 8, 32):
        assert all(torch.equal(a, b[:rows]) for a, b in zip(joint(x[:rows]), joint(x), strict=True))


@torch.inference_mode()
def test_layers_that_are_more_than_a_weight_are_called():
    from torchtune.modules.peft import LoRALinear

    torch.manual_seed(0)
    lora = LoRALinear(8, 6, rank=2, alpha=4.0)
    nn.init.normal_(lora.lora_b.weight)
    plain, biased = nn.Linear(8, 3, bias=False), nn.Linear(8, 3)
    x = torch.randn(5, 8)
    for layers in ((lora, plain), (lora,), (plain, biased)):
        assert all(torch.equal(out, layer(x)) for out, layer in zip(side_by_side(*layers)(x), layers, strict=True))
