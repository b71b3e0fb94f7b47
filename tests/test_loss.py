"""The fused loss against plain autograd in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from wmtp.generation.linear import times
from wmtp.loss import mtp_loss, token_cross_entropy, token_cross_entropy_and_entropy, weighted_mtp_cross_entropy
from wmtp.loss.fused import _FusedLinearCrossEntropy
from wmtp.training.planning.gpu_kernels import gpu_kernels
from wmtp.weighting import Weighting, critic, dft, entropy, rho1, uniform
from wmtp.weighting.targets import valid_targets


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


def test_bf16_operands_have_the_ce_of_their_exact_product():
    """CE and entropy within 2e-5 nats of float64's, logits up to 30: float32's error. bfloat16 logits miss by 0.1."""
    hidden, unembedding, labels, weights, document_ids, head_weights = random_case(0, 4, 2, 160, 64, 500, False, 0.9)
    hidden, unembedding = (hidden * 2).bfloat16(), unembedding.bfloat16()
    h64, u64 = hidden.double().requires_grad_(), unembedding.double().requires_grad_()
    weights = weights.bfloat16()
    exact, _, exact_ce = plain(h64, u64, labels, weights.double(), document_ids, head_weights)
    h, u = hidden.requires_grad_(), unembedding.requires_grad_()
    named = {"document_ids": document_ids, "chunk_tokens": 64}
    out = weighted_mtp_cross_entropy(h, u, labels, weights, head_weights=head_weights.float(), **named)
    assert (out.ce - exact_ce).abs().max() <= 2e-5
    ce, entropy = token_cross_entropy_and_entropy(h, u, labels, **named)
    assert (ce - exact_ce).abs().max() <= 2e-5
    log_p = F.log_softmax(h64.detach() @ u64.detach().T, dim=-1)
    exact_entropy = -(log_p.exp() * log_p).sum(-1)  # [H, B, S], of the position that predicts
    for k in range(1, 5):
        error = (entropy[k - 1, :, k:] - exact_entropy[k - 1, :, :-k])[out.valid[k - 1, :, k:]]
        assert error.abs().max() <= 2e-5
    # Gradients are rounded once, to the 8 bits in which they are handed on: 2^-8 of each number at most, on a CPU.
    for ours, truth in zip(gradients(out.loss_sum, h, u), gradients(exact, h64, u64), strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), truth, rtol=2**-8, atol=1e-5)


class Products(TorchDispatchMode):
    """(dtype of the operands, dtype of the result) of every matrix product."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.__name__.split(".")[0] in ("mm", "addmm", "addmm_", "bmm", "linear"):
            self.seen.append((args[-1 if func._overloadname == "default" else 1].dtype, result.dtype))
        return result


def test_cuda_s_products_of_bf16_operands_give_float32():
    """Shapes and dtypes alone, no CUDA device: all but the gradient that goes back into the hidden states."""
    source = torch.arange(12)
    with gpu_kernels(), FakeTensorMode(allow_non_fake_inputs=True), Products() as products:
        h = torch.empty(1, 1, 13, 8, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        u = torch.empty(50, 8, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        labels, rows = torch.empty(12, dtype=torch.long, device="cuda"), source.to("cuda")
        weight = torch.ones(12, device="cuda")
        ends = (0, 12, 12)
        _, ce, *_ = _FusedLinearCrossEntropy.apply(h, u, rows, labels, weight, None, None, None, ends, 12)
        logits = times(u)(h[0, 0])
    bf16, fp32 = torch.bfloat16, torch.float32
    assert ce.dtype == logits.dtype == fp32
    assert products.seen == [(bf16, fp32), (bf16, bf16), (bf16, fp32), (bf16, fp32)]


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


class CountRows(TorchDispatchMode):
    """Counts the rows of any matrix product with the unembedding [50, 8], in units of one row's GEMM, V * D."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name in ("mm", "addmm_", "addmm"):
            a, b = args[-2:]
            self.rows += a.shape[0] * a.shape[1] * b.shape[1] // (50 * 8)
        return func(*args, **(kwargs or {}))


def test_rows_of_weight_zero_take_no_part_in_gradient_gemms():
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


@pytest.mark.parametrize(
    ("weighting", "passes"),
    [
        (uniform(), 0), (rho1("soft"), 1), (rho1("soft", "reference"), 0), (dft(), 1), (entropy("soft"), 1),
        (critic(), 0), (dft(per_head=True), 4),
    ],
)  # fmt: skip
def test_weights_cost_no_more_than_one_gemm_a_token_of_the_heads_they_read(weighting, passes):
    h, u = torch.randn(4, 1, 21, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    labels = torch.randint(0, 50, (1, 21))
    columns = {"reference_ce": torch.rand(1, 21), "values": torch.rand(1, 21)}
    pairs = 20 + 19 + 18 + 17
    with CountRows() as counter:
        mtp_loss(h, u, labels, weighting, signals=columns).loss_sum.backward()
    assert counter.rows == 3 * pairs + {0: 0, 1: 20, 4: pairs}[passes]
    # CE of an earlier pass saves this one's, but where the entropy is read
    kept = torch.rand(4, 1, 21)
    with CountRows() as counter:
        mtp_loss(h, u, labels, weighting, signals=columns | {"policy_ce": kept}).loss_sum.backward()
    assert counter.rows == 3 * pairs + 20 * ("policy_entropy" in weighting.needs)


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
    for weighting in (uniform(), rho1("soft", strength=0.0)):
        h, u = hidden.float().requires_grad_(), unembedding.float().requires_grad_()
        signals = {"reference_ce": torch.rand(labels.shape)}
        out = mtp_loss(h, u, labels, weighting, document_ids=document_ids, signals=signals)
        out.loss_sum.backward()
        got.append((out.loss_sum.detach(), h.grad, u.grad))
    assert all(torch.equal(a, b) for a, b in zip(*got, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 7, None])
def test_entropy_and_ce_equal_float64(dtype, chunk):
    tolerance = 1e-5
    hidden, unembedding, labels, _, document_ids, _ = random_case(5, 3, 2, 11, 8, 30, False, 0.8)
    hidden, unembedding = (hidden * 4).to(dtype), unembedding.to(dtype)  # from nearly uniform to nearly certain
    ce, h = token_cross_entropy_and_entropy(
        hidden.requires_grad_(), unembedding, labels, document_ids=document_ids, chunk_tokens=chunk
    )
    log_p = F.log_softmax(hidden.double() @ unembedding.double().T, dim=-1)
    exact = -(log_p.exp() * log_p).sum(-1)  # [H, B, S], of the position that predicts
    valid = valid_targets(labels, 3, document_ids)
    assert h.dtype == ce.dtype == torch.float32 and not h.requires_grad and not ce.requires_grad
    assert bool((h[~valid] == 0).all())
    for k in range(1, 4):
        where = valid[k - 1, :, k:]
        torch.testing.assert_close(
            h[k - 1, :, k:][where].double(), exact[k - 1, :, :-k][where], rtol=tolerance, atol=tolerance
        )
    torch.testing.assert_close(
        ce, token_cross_entropy(hidden, unembedding, labels, document_ids=document_ids), rtol=tolerance, atol=tolerance
    )


def test_entropy_by_hand_and_of_a_token_that_is_certain():
    # logits 0 and log 3: p = 1/4, 3/4; then logits 0 and 200: certain within float32
    for logit, entropy_of_both in ((1.0986123, 0.5623351), (200.0, 0.0)):
        _, h = token_cross_entropy_and_entropy(
            torch.ones(1, 1, 2, 1), torch.tensor([[0.0], [logit]]), torch.tensor([[0, 1]])
        )
        assert h[0, 0].tolist() == [0, pytest.approx(entropy_of_both)]


def seen_by_a_weighting(step=0, **columns):
    """The signals that mtp_loss gives to a weighting that needs everything."""
    seen = []

    def score(signals):
        seen.append(signals)
        return signals.policy_ce

    all_signals = {"policy_ce", "policy_entropy", "reference_ce", "values", "prior_ce"}
    weighting = Weighting(score, lambda scores, mask: mask.float(), needs=all_signals)
    g = torch.Generator().manual_seed(0)
    hidden, unembedding = torch.randn(2, 1, 6, 4, generator=g), torch.randn(9, 4, generator=g)
    columns |= {name: torch.rand(1, 6) for name in ("reference_ce", "values", "prior_ce")}
    out = mtp_loss(hidden.requires_grad_(), unembedding, torch.arange(6)[None], weighting, signals=columns, step=step)
    return seen[0], out, columns


def test_a_weighting_sees_the_policy_s_own_signals_and_the_columns():
    signals, out, columns = seen_by_a_weighting(step=17)
    assert signals.step == 17 and signals.training
    torch.testing.assert_close(signals.policy_ce, out.ce[:1])
    assert signals.policy_entropy.shape == (1, 1, 6) and torch.equal(signals.valid, out.valid)
    assert all(torch.equal(getattr(signals, name), column) for name, column in columns.items())
    with torch.no_grad():
        assert not seen_by_a_weighting()[0].training


def test_policy_ce_from_outside_is_used_for_the_weights_only():
    kept = torch.arange(6.0)[None]
    assert torch.equal(seen_by_a_weighting(policy_ce=kept)[0].policy_ce, kept[None])
    hidden, unembedding, labels = torch.randn(2, 1, 6, 4), torch.randn(9, 4), torch.arange(6)[None]
    out = mtp_loss(
        hidden, unembedding, labels, rho1("select", percentile=0.4),
        signals={"policy_ce": kept, "reference_ce": torch.zeros(1, 6)},
    )  # fmt: skip
    assert out.weights.tolist() == [[0, 0, 0, 0, 2.5, 2.5]]  # the highest of what was kept
    torch.testing.assert_close(out.ce, token_cross_entropy(hidden, unembedding, labels))  # of zero weights too


def test_a_plain_function_of_the_signals_is_a_weighting():
    hidden, unembedding, labels, weights, document_ids, _ = random_case(6, 2, 2, 9, 8, 30, False, 1.0)
    args = hidden.float(), unembedding.float(), labels
    targets = valid_targets(labels, 1, document_ids)[0]
    weights = weights * targets * targets.sum() / (weights * targets).sum()
    out = mtp_loss(*args, lambda signals: weights.float(), document_ids=document_ids)
    given = weighted_mtp_cross_entropy(*args, weights.float(), document_ids=document_ids)
    assert torch.equal(out.loss_sum, given.loss_sum)


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: numbers that are read, and shapes that depend on values."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.__name__.split(".")[0] in ("_local_scalar_dense", "nonzero", "_unique2", "masked_select")
        return func(*args, **(kwargs or {}))


def test_a_step_whose_weights_are_not_checked_does_not_wait_for_the_device():
    hidden, unembedding, labels = torch.randn(2, 1, 6, 4), torch.randn(9, 4), torch.arange(6)[None]
    weights = torch.tensor([[0.0, 1, 1, 1, 1, 1]])

    def waits(run, *args, **options):
        with Waits() as waits:
            run(hidden, unembedding, labels, *args, **options)
        return waits.count

    bare = waits(weighted_mtp_cross_entropy, weights)
    assert waits(mtp_loss, lambda signals: weights, step=3) == bare < waits(mtp_loss, lambda signals: weights, step=2)


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
