"""CE, gradient and entropy of rows of logits against float64: torch's operations on a CPU, and the Triton kernel."""

import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_loss import gradients, plain, random_case, relative

from wmtp.loss import token_cross_entropy_and_entropy, weighted_mtp_cross_entropy
from wmtp.numerics.cross_entropy import cross_entropy_, cross_entropy_and_entropy_
from wmtp.numerics.products import as_on_cuda

VOCABULARIES = [2, 40, 8192, 8193, 20000]  # a block of the kernel has 8,192 columns


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when it is imported


# The interpreted kernel has a process of its own, in which nothing else is asked.
IMPLEMENTATIONS = ["interpreted kernel"] if INTERPRETED else ["torch", "kernel"]


@pytest.fixture(params=IMPLEMENTATIONS)
def device(request):
    if request.param == "kernel" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with as_on_cuda() if INTERPRETED else nullcontext():
        yield "cuda" if request.param == "kernel" else "cpu"


def test_the_kernel_in_triton_s_interpreter():
    pytest.importorskip("triton", "3.7", reason="no Triton, or one whose interpreter NumPy has left behind")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "rows or plain", __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "27 passed" in done.stdout and "skipped" not in done.stdout, done.stdout


def case(rows, vocab, device, scale=8.0):
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(rows, vocab, generator=generator) * scale
    label = torch.randint(0, vocab, (rows,), generator=generator)
    return logits.to(device), label.to(device), (torch.rand(rows, generator=generator) * 3).to(device)


def truth(logits, label, weight):
    log_p = F.log_softmax(logits.double(), dim=1)
    onehot = F.one_hot(label, logits.shape[1])
    entropy = -(log_p.exp() * log_p).nan_to_num().sum(1)
    return -log_p.gather(1, label[:, None]).squeeze(1), weight[:, None] * (log_p.exp() - onehot), entropy


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_ce_and_gradient_of_rows(device, vocab, dtype):
    logits, label, weight = case(3, vocab, device)
    exact, exact_gradient, _ = truth(logits, label, weight)
    alone, nothing = cross_entropy_(logits.clone(), label)
    ce, gradient = cross_entropy_(logits, label, weight, dtype)
    assert nothing is None and gradient.dtype == dtype and gradient.shape == exact_gradient.shape
    torch.testing.assert_close(alone.double(), exact, rtol=0, atol=2e-5)
    torch.testing.assert_close(ce.double(), exact, rtol=0, atol=2e-5)
    rounding = 2e-5
    if dtype == torch.bfloat16:  # each number is rounded once; Triton's interpreter cuts the bits off
        rounding = 2**-7 if INTERPRETED else 2**-8
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=rounding, atol=1e-6)


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("scale", [0.0, 8.0, 1000.0], ids=["even", "as trained", "certain"])
def test_ce_and_entropy_of_rows(device, vocab, scale):
    logits, label, weight = case(3, vocab, device, scale)
    exact, _, exact_entropy = truth(logits, label, weight)
    ce, entropy = cross_entropy_and_entropy_(logits, label)
    torch.testing.assert_close(ce.double(), exact, rtol=1e-6, atol=2e-5)
    torch.testing.assert_close(entropy.double(), exact_entropy, rtol=0, atol=2e-5)
    assert (entropy >= 0).all()


def test_a_row_that_is_not_finite_spoils_no_other_and_no_rows_are_nothing(device):
    logits, label, weight = case(3, 40, device)
    logits[1, 7] = float("nan")
    ce, gradient = cross_entropy_(logits, label, weight)
    assert ce.isfinite().tolist() == [True, False, True] == gradient.isfinite().all(1).tolist()
    ce, gradient = cross_entropy_(logits[:0], label[:0], weight[:0])
    assert ce.shape == (0,) and gradient.shape == (0, 40)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31),
    heads=st.integers(1, 4),
    seq=st.integers(1, 8),
    vocab=st.integers(2, 40),
    per_head=st.booleans(),
    keep=st.sampled_from([0.0, 0.3, 1.0]),
    chunk=st.integers(1, 30),
)
def test_the_loss_equals_plain_autograd(device, seed, heads, seq, vocab, per_head, keep, chunk):
    """Heads, zero weights, documents, known CE and chunks, against plain autograd in float64, as in test_loss.py."""
    hidden, unembedding, labels, weights, document_ids, b = random_case(seed, heads, 2, seq, 8, vocab, per_head, keep)
    h64, u64 = hidden.clone().requires_grad_(), unembedding.clone().requires_grad_()
    exact, _, exact_ce = plain(h64, u64, labels, weights, document_ids, b)
    h, u = (x.float().to(device).requires_grad_() for x in (hidden, unembedding))
    labels, weights, document_ids, b = (x.to(device) for x in (labels, weights, document_ids, b))
    known, entropy = token_cross_entropy_and_entropy(h[:1], u, labels, document_ids=document_ids, chunk_tokens=chunk)
    assert (entropy >= 0).all()
    named = {"document_ids": document_ids, "head_weights": b.float(), "known_ce": known, "chunk_tokens": chunk}
    out = weighted_mtp_cross_entropy(h, u, labels, weights.float(), **named)
    torch.testing.assert_close(out.ce.double().cpu(), exact_ce, rtol=1e-5, atol=1e-5)
    if exact.requires_grad:  # some head has a target
        for fused, double in zip(gradients(out.loss_sum, h, u), gradients(exact, h64, u64), strict=True):
            assert relative(fused.cpu(), double) <= 1e-5
