"""What only a GPU shows; skipped without one. The recipes' own tests run there too, with WMTP_TEST_DEVICE=cuda."""

import contextlib
import warnings

import pytest
import torch
from processes import start
from random_models import random_decoder
from torch._dynamo.utils import counters

from wmtp.distributed import start_world
from wmtp.generation import DecodingStats, Request, Sampling, generate
from wmtp.loss import mtp_loss, token_cross_entropy
from wmtp.models import shard_model
from wmtp.pretrained import byte_tokenizer
from wmtp.weighting import dft, rho1, uniform
from wmtp.weighting.targets import Targets

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

SIZES = {"vocab_size": 259, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 64}
SIZES |= {"intermediate_dim": 128, "max_seq_len": 512, "num_future_tokens": 2}


def packed_batch(rows=3, length=200):
    """Rows of four documents each, the last of them padding."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 259, (rows, length), generator=generator)
    edges = torch.stack([torch.randperm(length - 1, generator=generator)[:3].sort().values + 1 for _ in range(rows)])
    document_ids = (torch.arange(length) >= edges[:, :, None]).sum(1)
    document_ids[document_ids == 3] = -1
    batch = {"tokens": tokens, "labels": tokens.masked_fill(document_ids < 0, -100), "document_ids": document_ids}
    return {name: value.cuda() for name, value in batch.items()}


def loss_and_gradients(model, batch, weighting=None):
    signals = {"reference_ce": torch.full_like(batch["tokens"], 5.0, dtype=torch.float32)}
    kept = {"labels": batch["labels"], "document_ids": batch["document_ids"], "signals": signals}
    out = model(batch["tokens"], loss_fn=mtp_loss, weighting=weighting or uniform(), **kept)
    out.loss_sum.backward()
    return out.loss_sum.detach(), [parameter.grad for parameter in model.parameters()]


def assert_close(got, expected, tolerance):
    torch.testing.assert_close(got[0], expected[0], rtol=tolerance, atol=0)
    for ours, theirs in zip(got[1], expected[1], strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("length", [128, 200])
def test_flex_attention_sees_what_the_dense_mask_shows(length):
    batch = packed_batch(length=length)
    models = [random_decoder(**SIZES, attention=attention).cuda() for attention in ("flex", "sdpa")]
    assert_close(*(loss_and_gradients(model, batch) for model in models), 1e-4)


def deterministic_steps():
    start_world("cuda", deterministic=True)
    batch = packed_batch()
    for attention in ("flex", "sdpa"):
        for weighting in (uniform(), rho1(), dft()):
            models = [random_decoder(**SIZES, attention=attention).cuda() for _ in range(2)]
            ours, theirs = (loss_and_gradients(model, batch, weighting) for model in models)
            assert torch.equal(ours[0], theirs[0])
            assert all(torch.equal(a, b) for a, b in zip(ours[1], theirs[1], strict=True))


def test_deterministic_steps_are_equal_bit_for_bit(tmp_path):
    start(deterministic_steps, log=tmp_path / "log.txt").join()


def test_compiled_blocks_compute_the_same():
    batch, plain, compiled = packed_batch(), random_decoder(**SIZES).cuda(), random_decoder(**SIZES).cuda()
    for block in (*compiled.layers, *compiled.extra_heads):
        block.compile()
    assert_close(loss_and_gradients(compiled, batch), loss_and_gradients(plain, batch), 1e-4)


def test_a_frozen_model_in_host_memory_says_the_same():
    batch, mesh = packed_batch(), start_world("cuda").mesh
    labels, found = batch.pop("labels"), []
    for offload in (False, True):
        model = random_decoder(**SIZES).requires_grad_(False).eval().to("cpu" if offload else "cuda", torch.bfloat16)
        shard_model(model, mesh, param_dtype=torch.bfloat16, cpu_offload=offload)
        found.append([model(**batch, loss_fn=token_cross_entropy, labels=labels) for _ in range(2)])
        assert all(parameter.is_cuda != offload for parameter in model.parameters())
    for once, offloaded in zip(*found, strict=True):
        assert torch.equal(once, offloaded)


@pytest.mark.parametrize("weighting", [uniform(), rho1(), dft()], ids=["uniform", "rho1", "dft"])
@pytest.mark.parametrize("attention", ["sdpa", "flex"])
def test_a_micro_batch_waits_for_the_device_once(weighting, attention):
    """Forward and backward of a step in which the weights are not checked; what it logs is not part of it."""
    batch = packed_batch()
    targets = Targets(batch["labels"].cpu(), batch["document_ids"].cpu())
    model = shard_model(
        random_decoder(**SIZES, attention=attention).cuda(), start_world("cuda").mesh, param_dtype=torch.bfloat16
    )
    signals = {"reference_ce": torch.full_like(batch["tokens"], 5.0, dtype=torch.float32)}
    kept = {"labels": batch["labels"], "document_ids": batch["document_ids"], "signals": signals, "step": 7}
    kept["targets"] = targets
    for _ in range(2):  # the first allocates and compiles
        with device_waits() as waits:
            out = model(batch["tokens"], loss_fn=mtp_loss, weighting=weighting, **kept)
            out.loss_sum.backward()
    assert len(waits) <= 1, "\n".join(waits)


@contextlib.contextmanager
def device_waits():
    """Collects the places at which the host waits for the device."""
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [f"{wait.filename}:{wait.lineno}" for wait in caught if "synchroniz" in str(wait.message)]


@pytest.mark.parametrize(
    "sampling", [Sampling(40), Sampling(40, 0.8), Sampling(40, 0.8, 0.9)], ids=["greedy", "", "top_p"]
)
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("num_drafts", [0, 1])
def test_a_decode_step_waits_for_the_device_once(sampling, num_drafts, compile):
    model, stats = random_decoder(**SIZES).cuda().to(torch.bfloat16).eval(), DecodingStats()
    requests = [Request((p, n), tuple(range(1, 5 + p)), (p, n)) for p in range(2) for n in range(3)]
    options = {"batch_size": 6, "num_drafts": num_drafts, "compile": compile}
    if compile:
        list(generate(model, byte_tokenizer(), requests, sampling, **options))
    with device_waits() as waits:
        assert len(list(generate(model, byte_tokenizer(), requests, sampling, stats=stats, **options))) == 6
    # One more for all first tokens, and one a prompt, whose logits are looked at.
    assert len(waits) == stats.forwards + 1 + stats.prefills, "\n".join(waits)


@pytest.mark.parametrize("sampling", [Sampling(40), Sampling(40, 0.8)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("num_drafts", [0, 1])
def test_compiled_decoding_gives_the_same_texts_by_seven_graphs(sampling, num_drafts):
    torch._dynamo.reset()
    counters.clear()
    model = random_decoder(**SIZES).cuda().eval()
    for prompts, rows in ((1, 5), (3, 2), (4, 1)):
        requests = [Request((p, n), tuple(range(1, 5 + p)), (p, n)) for p in range(prompts) for n in range(rows)]
        plain, compiled = (
            {
                done.id: done.tokens
                for done in generate(
                    model, byte_tokenizer(), requests, sampling, batch_size=4, num_drafts=num_drafts, compile=compile
                )
            }
            for compile in (False, True)
        )
        assert compiled == plain
    assert counters["stats"]["unique_graphs"] == 7 and not counters["graph_break"]
