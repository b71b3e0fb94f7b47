"""The fused loss against plain autograd in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from wmtp.loss import mtp_loss, token_cross_entropy, valid_targets, weighted_mtp_cross_entropy
from wmtp.weighting import Rho1, Uniform


def plain(hidden, unembedding, labels, weights, document_ids, head_weights):
    """The definition, written as loops over heads and positions on full logits: (loss_sum, num_targets, ce)."""
    heads, batch, seq, _ = hidden.shape
    log_p = F.log_softmax((hidden @ unembedding.T).double(), dim=-1)  # [H, B, S, V]
    ce = torch.zeros(heads, batch, seq, dtype=torch.float64)
    loss, count = hidden.new_zeros((), dtype=torch.float64), 0.0
    for k in range(1, heads + 1):
        for b in range(batch):
            for t in range(seq - k):
                j = t + k
                if labels[b, j] == -100 or document_ids[b, t] != document_ids[b, j]:
                    continue
                nll = -log_p[k - 1, b, t, labels[b, j]]
                ce[k - 1, b, j] = nll.detach()
                weight = weights[k - 1, b, j] if weights.dim() == 3 else weights[b, j]
                loss = loss + head_weights[k - 1] * weight * nll
                count += head_weights[k - 1].item()
    return loss, count, ce


def random_case(seed, heads, batch, seq, dim, vocab, per_head, keep):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(heads, batch, seq, dim, generator=g, dtype=torch.float64)
    unembedding = torch.randn(vocab, dim, generator=g, dtype=torch.float64) * 0.5
    labels = torch.randint(0, vocab, (batch, seq), generator=g)
    labels[torch.rand(batch, seq, generator=g) > keep] = -100
    weights = torch.rand((heads, batch, seq) if per_head else (batch, seq), generator=g, dtype=torch.float64) * 3
    weights[torch.rand(weights.shape, generator=g) < 0.3] = 0
    document_ids = torch.randint(0, 2, (batch, seq), generator=g).cumsum(1)
    head_weights = torch.rand(heads, generator=g, dtype=torch.float64) + 0.1
    return hidden, unembedding, labels, weights, document_ids, head_weights


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


def relative(value, exact):
    return ((value.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    heads=st.integers(1, 8),
    batch=st.integers(1, 3),
    seq=st.integers(1, 12),
    dim=st.integers(1, 16),
    vocab=st.integers(2, 40),
    per_head=st.booleans(),
    keep=st.sampled_from([0.0, 0.3, 1.0]),
    chunk=st.integers(1, 30),
)
def test_loss_and_gradients_equal_plain_autograd_in_float64(seed, heads, batch, seq, dim, vocab, per_head, keep, chunk):
    case = random_case(seed, heads, batch, seq, dim, vocab, per_head, keep)
    hidden, unembedding, labels, weights, document_ids, head_weights = case
    h64, u64 = hidden.clone().requires_grad_(), unembedding.clone().requires_grad_()
    exact, count, exact_ce = plain(h64, u64, labels, weights, document_ids, head_weights)
    h32, u32 = hidden.float().requires_grad_(), unembedding.float().requires_grad_()
    out = weighted_mtp_cross_entropy(
        h32, u32, labels, weights.float(), document_ids=document_ids, head_weights=head_weights.float(),
        chunk_tokens=chunk,
    )  # fmt: skip
    assert out.num_targets.item() == pytest.approx(count, rel=1e-5)
    torch.testing.assert_close(out.ce.double(), exact_ce, rtol=1e-5, atol=1e-5)
    if not exact.requires_grad:  # no valid pair at all
        assert out.loss_sum.item() == 0
        assert all(bool((g == 0).all()) for g in gradients(out.loss_sum, h32, u32))
        return
    assert out.loss_sum.item() == pytest.approx(exact.item(), rel=1e-5, abs=1e-5)
    for fused, truth in zip(gradients(out.loss_sum * 3, h32, u32), gradients(exact * 3, h64, u64), strict=True):
        assert relative(fused, truth) <= 1e-5


@pytest.mark.parametrize("heads", [1, 4])
def test_bf16_error_is_no_larger_than_plain_bf16(heads):
    hidden, unembedding, labels, weights, document_ids, _ = random_case(0, heads, 2, 160, 64, 500, False, 0.9)
    ones = torch.ones(heads, dtype=torch.float64)
    hidden, unembedding = hidden.bfloat16().double(), unembedding.bfloat16().double()

    def errors(loss_of, dtype):
        h, u = hidden.to(dtype).requires_grad_(), unembedding.to(dtype).requires_grad_()
        loss = loss_of(h, u)
        return loss.detach().double(), [g.double() for g in gradients(loss, h, u)]

    def on_full_logits(h, u):
        valid = valid_targets(labels, heads, document_ids)
        loss = 0
        for k in range(1, heads + 1):
            logits = (h[k - 1, :, :-k] @ u.T).flatten(0, 1)
            nll = F.cross_entropy(logits, labels[:, k:].flatten().clamp(min=0), reduction="none")
            loss = loss + (nll * (weights[:, k:] * valid[k - 1, :, k:]).flatten().to(nll.dtype)).sum()
        return loss

    def fused(h, u):
        out = weighted_mtp_cross_entropy(
            h, u, labels, weights.float(), document_ids=document_ids, head_weights=ones.float(), chunk_tokens=64
        )
        return out.loss_sum

    exact_loss, exact = errors(on_full_logits, torch.float64)
    plain_loss, plain_grads = errors(on_full_logits, torch.bfloat16)
    fused_loss, fused_grads = errors(fused, torch.bfloat16)
    assert abs(fused_loss - exact_loss) <= abs(plain_loss - exact_loss)
    for ours, theirs, truth in zip(fused_grads, plain_grads, exact, strict=True):
        assert relative(ours, truth) <= relative(theirs, truth)


def test_hand_computed_example():
    """Two tokens of vocabulary, logits 0: every CE is log 2, whatever the weights; their sum is the weights'."""
    hidden, unembedding = torch.zeros(2, 1, 3, 1), torch.zeros(2, 1)
    out = weighted_mtp_cross_entropy(
        hidden, unembedding, torch.tensor([[0, 1, 1]]), torch.tensor([[9.0, 0.5, 2.0]]),
        head_weights=torch.tensor([1.0, 0.25]),
    )  # fmt: skip
    # head 1 predicts targets 1 and 2, head 2 predicts target 2: 0.5 + 2 + 0.25 * 2 = 3 and 2 + 0.25 pairs
    assert out.loss_sum.item() == pytest.approx(3 * 0.6931472)
    assert out.num_targets.item() == 2.25
    assert out.valid[:, 0].tolist() == [[False, True, True], [False, False, True]]


def test_frozen_unembedding_gets_no_gradient_and_hidden_the_same():
    hidden, unembedding, labels, weights, document_ids, _ = random_case(1, 2, 2, 9, 8, 30, False, 1.0)
    got = []
    for frozen in (False, True):
        h, u = hidden.float().requires_grad_(), unembedding.float().requires_grad_(not frozen)
        weighted_mtp_cross_entropy(h, u, labels, weights.float(), document_ids=document_ids).loss_sum.backward()
        got.append(h.grad)
    assert u.grad is None
    assert torch.equal(*got)


def test_rows_of_weight_zero_take_no_part_in_gradient_gemms():
    """Counted in the dispatcher: the rows that enter any matrix product."""

    class CountRows(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.__name__.split(".")[0]
            if name in ("mm", "addmm_", "addmm"):
                a, b = args[-2:]
                self.rows += a.shape[0] * a.shape[1] * b.shape[1] // (50 * 8)  # in units of one row's GEMM, V * D
            return func(*args, **(kwargs or {}))

    hidden, unembedding = torch.randn(4, 1, 21, 8), torch.randn(50, 8)
    labels = torch.randint(0, 50, (1, 21))
    kept = torch.zeros(1, 21)
    kept[0, 10:15] = 1.0  # 5 targets, predicted by each of 4 heads

    def gemms(weights, **kwargs):
        h, u = hidden.clone().requires_grad_(), unembedding.clone().requires_grad_()
        with CountRows() as counter:
            weighted_mtp_cross_entropy(h, u, labels, weights, **kwargs).loss_sum.backward()
        return counter.rows

    pairs = 20 + 19 + 18 + 17
    assert gemms(None) == 3 * pairs
    assert gemms(kept) == pairs + 2 * 4 * 5
    with CountRows() as counter:
        ce = token_cross_entropy(hidden[:1], unembedding, labels)
    assert counter.rows == 20
    assert gemms(kept, known_ce=ce) == pairs - 15 + 2 * 4 * 5  # head 1's 15 unkept targets are known already

    h, u = hidden.clone().requires_grad_(), unembedding.clone().requires_grad_()
    with CountRows() as counter:
        mtp_loss(h, u, labels, Rho1("soft"), reference_ce=torch.rand(1, 21)).loss_sum.backward()
    assert counter.rows == 3 * pairs + 20  # 3H + 1 GEMMs a token


def test_known_ce_changes_nothing():
    hidden, unembedding, labels, weights, document_ids, _ = random_case(2, 3, 2, 9, 8, 30, False, 0.8)
    args = (hidden.float(), unembedding.float(), labels, weights.float())
    ce = token_cross_entropy(args[0][:1], args[1], labels, document_ids=document_ids)
    known = weighted_mtp_cross_entropy(*args, document_ids=document_ids, known_ce=ce)
    fresh = weighted_mtp_cross_entropy(*args, document_ids=document_ids)
    torch.testing.assert_close(known.ce, fresh.ce)
    assert known.loss_sum.item() == pytest.approx(fresh.loss_sum.item(), rel=1e-6)


def test_lambda_zero_is_plain_mtp_bit_for_bit():
    hidden, unembedding, labels, _, document_ids, _ = random_case(3, 4, 2, 12, 8, 30, False, 0.9)
    got = []
    for weighting in (Uniform(), Rho1("soft", strength=0.0)):
        h, u = hidden.float().requires_grad_(), unembedding.float().requires_grad_()
        out = mtp_loss(h, u, labels, weighting, document_ids=document_ids, reference_ce=torch.rand(labels.shape))
        out.loss_sum.backward()
        got.append((out.loss_sum.detach(), h.grad, u.grad))
    assert all(torch.equal(a, b) for a, b in zip(*got, strict=True))


def test_backward_twice_is_refused():
    out = weighted_mtp_cross_entropy(
        torch.randn(1, 1, 4, 3, requires_grad=True), torch.randn(5, 3), torch.tensor([[0, 1, 2, 3]])
    )
    out.loss_sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        out.loss_sum.backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(2, 3, dtype=torch.long)}, "labels must be"),
        ({"weights": torch.ones(3)}, "weights must be"),
        ({"weights": torch.ones(1, 4, requires_grad=True)}, "no gradient"),
        ({"head_weights": torch.ones(3)}, "head_weights"),
        ({"unembedding": torch.zeros(5, 4)}, "share D"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, message):
    args = {"hidden": torch.zeros(1, 1, 4, 3), "unembedding": torch.zeros(5, 3)}
    args["labels"] = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        weighted_mtp_cross_entropy(**{**args, **change})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_equals_cpu(dtype):
    hidden, unembedding, labels, weights, document_ids, _ = random_case(4, 4, 2, 64, 64, 300, False, 0.9)
    got = []
    for device in ("cpu", "cuda"):
        h = hidden.to(device, dtype).requires_grad_()
        u = unembedding.to(device, dtype).requires_grad_()
        out = weighted_mtp_cross_entropy(
            h, u, labels.to(device), weights.float().to(device), document_ids=document_ids.to(device)
        )
        out.loss_sum.backward()
        got.append([x.double().cpu() for x in (out.loss_sum.detach(), out.ce, h.grad, u.grad)])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for on_cpu, on_cuda in zip(*got, strict=True):
        assert relative(on_cuda, on_cpu) <= tolerance
