"""The anchor of head 1: its divergence and gradients against plain autograd in float64, and what it costs."""

import math

import pytest
import torch
import torch.nn.functional as F
from counted import Counted

from wmtp.errors import UserError
from wmtp.loss import Anchor, AnchorStates, SoftTargets, mtp_loss, weighted_mtp_cross_entropy
from wmtp.models import add_lora, llama_mtp
from wmtp.weighting import dft, rho1, uniform
from wmtp.weighting.targets import valid_targets

B, S, D, V, H = 2, 12, 8, 31, 3
A = 0.3


def example(seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(H, B, S, D, generator=generator, requires_grad=True)
    unembedding = torch.randn(V, D, generator=generator, requires_grad=True)
    frozen = AnchorStates(torch.randn(B, S, 5, generator=generator), torch.randn(V, 5, generator=generator), A)
    labels = torch.randint(0, V, (B, S), generator=generator)
    labels[:, 3:5] = -100
    document_ids = torch.tensor([[0] * 7 + [1] * 5, [0] * 12])
    weights = torch.rand(B, S, generator=generator) * (torch.rand(B, S, generator=generator) > 0.4)
    return hidden, unembedding, frozen, labels, document_ids, weights


def plain(hidden, unembedding, frozen, labels, document_ids, weights, b=(1.0,) * H, factors=(1.0,) * H):
    """sum_k b_k sum_j w_j CE_k(j) + b_1 A sum_j KL(p0_j || p_j) on full logits, and the sum of the divergences."""
    valid, loss = valid_targets(labels, H, document_ids), torch.zeros((), dtype=torch.float64)
    for k in range(1, H + 1):
        u = unembedding * factors[k - 1] + unembedding.detach() * (1 - factors[k - 1])
        log_p = F.pad(F.log_softmax(hidden[k - 1] @ u.T, -1)[:, : S - k], (0, 0, k, 0))
        ce = F.nll_loss(log_p.transpose(1, 2), labels, reduction="none", ignore_index=-100)
        loss = loss + b[k - 1] * (ce * weights * valid[k - 1]).sum()
        if k == 1:
            log_p0 = F.log_softmax(frozen.hidden.double() @ frozen.unembedding.double().T, -1)
            log_p0 = F.pad(log_p0[:, : S - 1], (0, 0, 1, 0))
            kl = (F.kl_div(log_p, log_p0, reduction="none", log_target=True).sum(-1) * valid[0]).sum()
            loss = loss + b[0] * A * kl
    return loss, kl


def of_data(weights):
    given = lambda signals: weights
    given.scope, given.bounds, given.needs = "batch", (0.0, 9.0), ()
    return given


@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize("case", ["weights", "uniform", "head_weights", "detached", "known_ce", "no gradient of W"])
def test_loss_and_gradients_are_those_of_autograd_on_full_logits(case, chunk):
    hidden, unembedding, frozen, labels, document_ids, weights = example()
    options, b, factors = {}, (1.0,) * H, (1.0,) * H
    if case == "uniform":
        weights = None
    if case == "head_weights":
        b = (0.7, 0.0, 2.0)
        options["head_weights"] = torch.tensor(b)
    if case == "detached":
        options["trunk_gradient"] = factors = (1.0, 0.0, 0.5)
    if case == "known_ce":
        options["known_ce"] = weighted_mtp_cross_entropy(
            hidden[:1], unembedding, labels, document_ids=document_ids
        ).ce.detach()
    if case == "no gradient of W":
        unembedding.requires_grad_(False)
    out = weighted_mtp_cross_entropy(
        hidden, unembedding, labels, weights, document_ids=document_ids, anchor=frozen, chunk_tokens=chunk, **options
    )
    out.loss_sum.backward()
    h, u = (x.detach().double().requires_grad_() for x in (hidden, unembedding))
    ones = torch.ones(B, S, dtype=torch.float64)
    expected, kl = plain(h, u, frozen, labels, document_ids, ones if weights is None else weights.double(), b, factors)
    expected.backward()
    assert out.loss_sum.item() == pytest.approx(expected.item(), rel=1e-5)
    assert out.anchor_kl.item() == pytest.approx(kl.item(), rel=1e-5) and kl > 1
    for found, exact in ((hidden.grad, h.grad), (unembedding.grad, u.grad)):
        if found is not None:
            assert (found.double() - exact).norm() < 1e-6 * exact.norm()
    with torch.no_grad():
        looked_at = weighted_mtp_cross_entropy(
            hidden, unembedding, labels, weights, document_ids=document_ids, anchor=frozen, **options
        )
    assert looked_at.loss_sum.item() == pytest.approx(out.loss_sum.item(), rel=1e-6)
    torch.testing.assert_close(looked_at.ce, out.ce)


def test_the_docstrings_example_and_a_policy_that_has_not_moved():
    labels = torch.tensor([[-100, 0]])
    frozen = AnchorStates(torch.ones(1, 2, 1), torch.tensor([[0.5], [0.5]]).log(), 0.1)
    unembedding = torch.tensor([[0.8], [0.2]]).log()
    out = weighted_mtp_cross_entropy(torch.ones(1, 1, 2, 1), unembedding, labels, anchor=frozen)
    assert out.loss_sum.item() == pytest.approx(-math.log(0.8) + 0.0223, abs=5e-5)
    hidden, unembedding, _, labels, document_ids, weights = example()
    runs = []
    for anchor in (None, AnchorStates(hidden[0].detach(), None, A)):
        h, u = (x.detach().requires_grad_() for x in (hidden, unembedding))
        out = weighted_mtp_cross_entropy(h, u, labels, weights, document_ids=document_ids, anchor=anchor)
        out.loss_sum.backward()
        runs.append((out.loss_sum.detach(), h.grad, u.grad, out.ce))
    assert out.anchor_kl.abs() < 1e-5
    for found, expected in zip(*runs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_asft_is_the_published_dft_with_an_anchor():
    """mean(sg(p) CE) + lambda mean KL, of one head, with and without soft targets for none."""
    hidden, unembedding, frozen, labels, document_ids, _ = example()
    out = mtp_loss(
        hidden[:1], unembedding, labels, dft(normalize="raw"), document_ids=document_ids, anchor=frozen, step=3
    )
    valid = valid_targets(labels, 1, document_ids)[0]
    log_p = F.pad(F.log_softmax(hidden[0].double() @ unembedding.double().T, -1)[:, :-1], (0, 0, 1, 0))
    own = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0][valid]
    log_p0 = F.log_softmax(frozen.hidden.double() @ frozen.unembedding.double().T, -1)
    log_p0 = F.pad(log_p0[:, :-1], (0, 0, 1, 0))
    kl = (log_p0.exp() * (log_p0 - log_p)).sum(-1)[valid]
    expected = (own.exp() * -own).mean() + A * kl.mean()
    assert (out.loss_sum / out.num_targets).item() == pytest.approx(expected.item(), rel=1e-5)


def test_soft_targets_of_the_other_heads_stay_what_they_are():
    hidden, unembedding, frozen, labels, document_ids, weights = example()
    common = {"document_ids": document_ids, "head_targets": SoftTargets(top_k=4), "step": 3}
    for weighting in (of_data(weights), uniform()):
        both = mtp_loss(hidden, unembedding, labels, weighting, anchor=frozen, **common)
        soft = mtp_loss(hidden, unembedding, labels, weighting, **common)
        torch.testing.assert_close(both.divergence, soft.divergence)
        torch.testing.assert_close(both.loss_sum, soft.loss_sum + A * both.anchor_kl)


@pytest.mark.parametrize("weighting", [uniform(), rho1(), dft()], ids=["uniform", "rho1", "dft"])
def test_it_costs_one_product_a_target_and_the_gradients_of_head_1s_targets_of_weight_zero(weighting):
    hidden, unembedding, frozen, labels, document_ids, _ = example()
    products = []
    for anchor in (None, frozen):
        with Counted() as counted:
            out = mtp_loss(
                hidden,
                unembedding,
                labels,
                weighting,
                document_ids=document_ids,
                signals={"reference_ce": torch.rand(B, S)},
                anchor=anchor,
            )
            out.loss_sum.backward()
        products.append(counted.operations["mm"] + counted.operations["addmm_"])
    # Head 1's rows are a chunk of their own: with uniform weights its logits and both gradients, else those it had
    # beside the other heads'. The frozen model's logits are one product more, and nothing in the backward pass.
    assert products[1] == products[0] + 3 + 1


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ({"trunk": "frozen"}, "adapters.trunk is frozen, so that head 1 never moves"),
        ({"train_norms": True}, "train_norms changes the model without its adapters too"),
        ({"train_unembedding": True}, "train_unembedding changes the model without its adapters too"),
    ],
)
def test_adapters_that_leave_no_base_to_stay_near_are_refused(adapters, message):
    shape = {"vocab_size": V, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "embed_dim": 8, "intermediate_dim": 8}
    model = add_lora(llama_mtp(**shape, max_seq_len=8, num_future_tokens=2, tie_word_embeddings=False), **adapters)
    with pytest.raises(UserError, match=message):
        Anchor().require_adapters(model.adapters)


@pytest.mark.parametrize("weight", [0, -1.0, math.inf, math.nan])
def test_a_weight_out_of_range_is_refused(weight):
    with pytest.raises(UserError, match="anchor: weight must be a number > 0, got"):
        Anchor(weight)


def test_what_it_cannot_do_without_is_said():
    with pytest.raises(UserError, match=r"anchor needs the frozen model .* set reference_model, or anchor=null"):
        Anchor().require_model(None)
    hidden, unembedding, frozen, labels, *_ = example()
    with pytest.raises(ValueError, match="the anchor's model has 30 tokens, the policy 31"):
        weighted_mtp_cross_entropy(
            hidden, unembedding, labels, anchor=frozen._replace(unembedding=frozen.unembedding[1:])
        )
