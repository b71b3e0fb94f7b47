"""Weights of the data in the loss: a hand-computed example, ones that change nothing, and times a method's own."""

import math
import warnings

import pytest
import torch
from random_signals import CONTROLS, METHODS, one_row, random_signals, with_named

from wmtp.loss import mtp_loss
from wmtp.weighting import check_weights
from wmtp.weighting import given as given_weights
from wmtp.weighting.base import Signals
from wmtp.weighting.targets import valid_targets


def with_weights(seed=0, zero=0.2):
    signals = random_signals(seed)
    g = torch.Generator().manual_seed(seed)
    weight = torch.rand(signals.labels.shape, generator=g) * 3
    weight[torch.rand(weight.shape, generator=g) < zero] = 0.0
    return with_named(signals, weight=weight)


def test_the_loss_is_that_of_the_hand_computed_example():
    """Two heads, labels 1 2 0 behind a first token; logits are the hidden state, so a CE is seen by the eye."""
    hidden = torch.zeros(2, 1, 4, 3)
    hidden[0, 0, 0, 1] = math.log(2)  # head 1 at t=0: p(1) = 2/4; the other rows are uniform: p = 1/3
    hidden[1, 0, 0, 2] = math.log(4)  # head 2 at t=0, target j=2 of label 2: p = 4/6
    labels, document_ids = torch.tensor([[-100, 1, 2, 0]]), torch.zeros(1, 4, dtype=torch.long)
    signals = {"weight": torch.tensor([[9.0, 0.5, 2.0, 0.0]])}
    options = {"document_ids": document_ids, "signals": signals}
    ln2, ln3, ln1_5 = math.log(2), math.log(3), math.log(1.5)
    out = mtp_loss(hidden, torch.eye(3), labels, given_weights(), **options)
    # head 1: targets 1, 2, 3 with weights 0.5, 2, 0; head 2: targets 2, 3 with weights 2, 0
    assert out.loss_sum.item() == pytest.approx(0.5 * ln2 + 2 * ln3 + 0 * ln3 + 2 * ln1_5 + 0 * ln3, rel=1e-6)
    assert out.num_targets.item() == 5
    scaled = mtp_loss(hidden, torch.eye(3), labels, given_weights(normalize="mean"), **options)
    assert scaled.weights.tolist() == [pytest.approx([0.0, 0.6, 2.4, 0.0])]  # divided by 2.5 / 3
    assert scaled.loss_sum.item() == pytest.approx(out.loss_sum.item() * 3 / 2.5, rel=1e-6)


@pytest.mark.parametrize("normalize", ["raw", "mean"])
def test_weights_of_1_are_no_weights_bit_for_bit(normalize):
    torch.manual_seed(0)
    labels = torch.randint(0, 50, (3, 40))
    labels[torch.rand(3, 40) < 0.3] = -100
    document_ids = (torch.rand(3, 40) < 0.1).long().cumsum(1)

    def step(weighting, signals):
        torch.manual_seed(1)
        hidden, unembedding = torch.randn(3, 3, 40, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
        out = mtp_loss(hidden, unembedding, labels, weighting, document_ids=document_ids, signals=signals)
        out.loss_sum.backward()
        return out.loss_sum.detach(), hidden.grad, unembedding.grad

    plain = step(lambda signals: None, {})
    for found, expected in zip(
        step(given_weights(normalize=normalize), {"weight": torch.ones(3, 40)}), plain, strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["rho1_soft", "rho1_select_per_head", "dft", "critic_td"])
@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_a_method_s_weights_are_multiplied(name, scope):
    signals, method = with_weights(), METHODS[name]()
    own = method(signals)
    raw = given_weights("multiply", method)(signals)
    valid = signals.valid if own.dim() == 3 else signals.valid[0]
    assert torch.equal(raw, own * torch.where(valid, signals.weight, 0.0))
    mean = given_weights("multiply", METHODS[name](), normalize="mean", scope=scope)
    weights = mean(signals)
    check_weights(weights, signals, mean)
    inside = raw > 0
    ratio = (weights[inside] / raw[inside]).double()
    if scope == "batch" and own.dim() == 2:
        assert torch.allclose(ratio, ratio[0], rtol=1e-5)
        assert weights.sum().item() == pytest.approx(int(valid.sum()), rel=1e-5)
    assert mean.needs == method.needs | {"weight"} and mean.per_head == method.per_head


def test_controls_permute_given_weights_too():
    signals = with_weights()
    weighting = given_weights()
    own = weighting(signals)
    for name in ("shuffled", "random_matched"):
        control = CONTROLS[name](given_weights())
        drawn = control(signals)
        check_weights(drawn, signals, control)
        assert control.needs == {"weight"} and not torch.equal(drawn, own)
    drawn = CONTROLS["shuffled"](given_weights())(signals)
    assert torch.equal(drawn.flatten().sort().values, own.flatten().sort().values)


def test_a_scope_of_zeros_stays_zero_and_is_no_breach():
    signals = one_row(policy_ce=[0.0, 0.0])
    signals = with_named(signals, weight=torch.zeros_like(signals.labels, dtype=torch.float32))
    for normalize in ("mean", "raw"):
        weighting = given_weights(normalize=normalize)
        weights = weighting(signals)
        check_weights(weights, signals, weighting)
        assert weights.abs().sum() == 0


def test_a_document_s_weight_that_the_mean_removes_is_warned_of():
    labels = torch.tensor([[1, 2, 3, 1, 2, 3]])
    document_ids = torch.tensor([[0, 0, 0, 1, 1, 1]])
    weight = torch.tensor([[2.0, 2.0, 2.0, 1.0, 1.0, 1.0]])
    signals = Signals(labels, valid_targets(labels, 1, document_ids), document_ids, {"weight": weight})
    with pytest.warns(UserWarning, match="1 of 2 documents have one weight for all their targets, which mean 1 over"):
        weights = given_weights(normalize="mean")(signals)
    assert weights.tolist() == [[0, 1, 1, 0, 1, 1]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert given_weights(normalize="mean", scope="batch")(signals)[0, 1].item() == pytest.approx(4 / 3)
        assert given_weights()(signals).tolist() == [[0, 2, 2, 0, 1, 1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"combine": "add"}, "combine must be one of replace, multiply, got 'add'"),
        ({"normalize": "sum"}, "normalize must be one of mean, raw, got 'sum'"),
        ({"scope": "rank"}, "scope must be one of sequence, batch, got 'rank'"),
        ({"combine": "multiply"}, "method must be set with combine=multiply and only there .* method=null"),
        ({"method": METHODS["dft"]()}, "method must be set with combine=multiply and only there .* method=a weighting"),
    ],
)
def test_a_wrong_choice_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        given_weights(**options)


def test_data_without_weights_are_refused_with_the_way_to_give_them():
    with pytest.raises(
        ValueError, match="the weighting needs weight, got none: give the data's rows, turns or characters"
    ):
        given_weights()(random_signals(0))
