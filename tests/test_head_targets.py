"""Soft targets and the factors of the trunk's gradient, against plain autograd in float64."""

import pytest
import torch
import torch.nn.functional as F
from counted import Counted

from wmtp.errors import UserError
from wmtp.loss import SoftTargets, mtp_loss, weighted_mtp_cross_entropy
from wmtp.weighting import dft, rho1, uniform
from wmtp.weighting.targets import valid_targets

B, S, D, V, H = 2, 12, 8, 31, 4


def example(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(H, B, S, D, generator=generator).to(dtype).requires_grad_()
    unembedding = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (B, S), generator=generator)
    labels[:, 3:5] = -100
    document_ids = torch.tensor([[0] * 7 + [1] * 5, [0] * 12])
    weights = torch.rand(B, S, generator=generator) * (torch.rand(B, S, generator=generator) > 0.3)
    return hidden, unembedding, labels, document_ids, weights


def plain(hidden, unembedding, labels, document_ids, weights, soft, factors, teacher=None):
    """The definition on full logits in float64: loss_sum, with the gradients of each head's loss scaled."""
    valid, loss = valid_targets(labels, H, document_ids), torch.zeros((), dtype=torch.float64)
    shifted = lambda x, k: F.pad(x[:, : S - k], (0, 0, k, 0))  # [B, S, V], by the target's position
    for k in range(1, H + 1):
        u = unembedding * factors[k - 1] + unembedding.detach() * (1 - factors[k - 1])
        log_p = shifted(F.log_softmax(hidden[k - 1] @ u.T, -1), k)
        per_token = F.nll_loss(log_p.transpose(1, 2), labels, reduction="none", ignore_index=-100)
        if k > 1 and soft is not None:
            z = shifted(hidden[0] @ unembedding.T, 1).detach() if teacher is None else teacher
            top = z.topk(soft.top_k, dim=-1)
            q = F.softmax(top.values / (soft.temperature or 1.0), -1)
            kl = (torch.xlogy(q, q) - q * log_p.gather(-1, top.indices)).sum(-1)
            per_token = soft.hard * per_token + soft.soft * kl
        loss = loss + (per_token * weights * valid[k - 1]).sum()
    return loss


@pytest.mark.parametrize("factors", [(1.0,) * 4, (1.0, 0.0, 0.0, 0.0), (1.0, 0.5, 0.0, 2.0)])
@pytest.mark.parametrize(
    "soft",
    [
        None,
        SoftTargets(top_k=5),
        SoftTargets(soft=0.3, hard=1.0, top_k=V, temperature=2.0),
        SoftTargets(temperature=0.0),
    ],
    ids=["hard", "soft", "both", "argmax"],
)
@pytest.mark.parametrize("chunk", [3, 1000])
def test_loss_and_gradients_are_those_of_autograd_on_full_logits(soft, factors, chunk, monkeypatch):
    hidden, unembedding, labels, document_ids, weights = example()
    monkeypatch.setattr("wmtp.loss.fused.default_chunk", lambda *_: chunk)
    given = lambda signals: weights
    given.scope, given.bounds, given.needs = "batch", (0.0, 9.0), ()
    out = mtp_loss(
        hidden,
        unembedding,
        labels,
        given,
        document_ids=document_ids,
        head_targets=soft,
        trunk_gradient=factors,
        step=3,
    )
    out.loss_sum.backward()
    h, u = (x.detach().double().requires_grad_() for x in (hidden, unembedding))
    expected = plain(h, u, labels, document_ids, weights.double(), soft, factors)
    expected.backward()
    assert out.loss_sum.item() == pytest.approx(expected.item(), rel=1e-5)
    for found, exact in ((hidden.grad, h.grad), (unembedding.grad, u.grad)):
        assert (found.double() - exact).norm() < 1e-6 * exact.norm()
    if soft is not None:
        assert out.divergence[0] == 0 and (out.divergence[1:] > 0).all()
        hard = mtp_loss(hidden, unembedding, labels, given, document_ids=document_ids, step=3)
        torch.testing.assert_close(out.ce, hard.ce)


def test_hard_targets_and_a_joint_trunk_are_todays_loss_bit_for_bit():
    hidden, unembedding, labels, document_ids, _ = example()
    results = []
    for options in ({}, {"trunk_gradient": (1.0,) * H}, {"soft": SoftTargets(soft=0.0, hard=1.0, top_k=3)}):
        h, u = (x.detach().clone().requires_grad_() for x in (hidden, unembedding))
        soft = options.pop("soft", None)
        out = mtp_loss(h, u, labels, uniform(), document_ids=document_ids, head_targets=soft, **options)
        out.loss_sum.backward()
        results.append((out.loss_sum.detach(), h.grad, u.grad, out.ce))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("weighting", [uniform(), dft(), rho1()], ids=["uniform", "dft", "rho1"])
def test_soft_targets_cost_at_most_one_gemm_a_target_and_detached_heads_save_theirs(weighting):
    hidden, unembedding, labels, document_ids, _ = example()
    signals = {"reference_ce": torch.rand(B, S)}
    rows = {}  # of the left operand, by option: rows of all products with the unembedding

    def products(**options):
        with Counted() as counted:
            out = mtp_loss(
                hidden, unembedding, labels, weighting, document_ids=document_ids, signals=signals, **options
            )
            out.loss_sum.backward()
        return counted.operations["mm"] + counted.operations["addmm_"]

    rows = {
        "hard": products(),
        "soft": products(head_targets=SoftTargets(top_k=4)),
        "detached": products(trunk_gradient=(1.0, 0.0, 0.0, 0.0)),
    }
    first_pass = weighting.name != "uniform"
    assert rows["soft"] == rows["hard"] + (not first_pass)
    # One chunk for head 1 with three products, one for the others with two.
    assert rows["detached"] == rows["hard"] + 2


def test_a_frozen_teacher_takes_head_1s_place():
    hidden, unembedding, labels, document_ids, weights = example()
    z = torch.randn(B, S, V, dtype=torch.float64)
    soft = SoftTargets(soft=0.7, hard=0.1, top_k=6, temperature=0.5, teacher="reference")
    top = z.topk(6)
    tokens = (F.softmax(top.values / 0.5, -1).float(), top.indices)
    from wmtp.loss import TopTokens

    out = weighted_mtp_cross_entropy(
        hidden, unembedding, labels, weights, document_ids=document_ids, soft_targets=(soft, TopTokens(*tokens))
    )
    h, u = hidden.detach().double(), unembedding.detach().double()
    expected = plain(h, u, labels, document_ids, weights.double(), soft, (1.0,) * H, teacher=z)
    assert out.loss_sum.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"soft": -1.0}, "soft must be a number >= 0, got -1.0"),
        ({"soft": 0.0}, "soft and hard are both 0"),
        ({"top_k": 0}, "top_k must be a whole number >= 1, got 0"),
        ({"temperature": float("nan")}, "temperature must be a number >= 0, got nan"),
        ({"teacher": "head2"}, "teacher must be one of head1, reference, got 'head2'"),
    ],
)
def test_wrong_values_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        SoftTargets(**wrong)
