"""The critic's losses against numbers worked out by hand, and their gradients against autograd in float64."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp.critic import critic_loss, mse_loss, pairwise_loss, response_last, response_mean, spread_rewards

# Two prompts of one and two tokens, responses of three and two tokens, padding after the second.
RESPONSE = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 1, 0]], dtype=torch.bool)
REWARDS = torch.tensor([2.0, 0.6])
VALUES = torch.tensor([[9.0, 0.5, 0.2, 0.4, 9.0], [9.0, 9.0, -1.0, 0.3, 9.0]])


@pytest.mark.parametrize(
    ("spread", "expected"),
    [
        ("terminal", [[0, 0, 0, 2.0, 0], [0, 0, 0, 0.6, 0]]),
        ("uniform", [[0, 2.0, 2.0, 2.0, 0], [0, 0, 0.6, 0.6, 0]]),
        ("length", [[0, 2 / 3, 4 / 3, 2.0, 0], [0, 0, 0.3, 0.6, 0]]),
        # gamma 0.9, lambda 0.5. First row: G_3 = 2; G_2 = 0.9 (0.5 * 0.4 + 0.5 * 2) = 1.08;
        # G_1 = 0.9 (0.5 * 0.2 + 0.5 * 1.08) = 0.576. Second: G_2 = 0.6; G_1 = 0.9 (0.5 * 0.3 + 0.5 * 0.6) = 0.405.
        ("gae", [[0, 0.576, 1.08, 2.0, 0], [0, 0, 0.405, 0.6, 0]]),
    ],
)
def test_targets_by_hand(spread, expected):
    targets, has_target = spread_rewards(spread, REWARDS, RESPONSE, VALUES, gamma=0.9, gae_lambda=0.5)
    torch.testing.assert_close(targets, torch.tensor(expected))
    last = torch.tensor([[0, 0, 0, 1, 0], [0, 0, 0, 1, 0]], dtype=torch.bool)
    assert torch.equal(has_target, last if spread == "terminal" else RESPONSE)


def test_mse_by_hand():
    """Row 1: (0.5 - 2)^2 + (0.2 - 2)^2 + (0.4 - 2)^2 = 2.25 + 3.24 + 2.56; row 2: 1.6^2 + 0.3^2 = 2.56 + 0.09."""
    out = mse_loss(VALUES, *spread_rewards("uniform", REWARDS, RESPONSE, VALUES))
    assert out.loss_sum.item() == pytest.approx(10.70)
    assert out.count.item() == 5


def test_pairwise_by_hand():
    """Means 1.1 / 3 and -0.35: -log sigmoid(0.716667) = log(1 + 0.488377) = 0.397687."""
    out = pairwise_loss(VALUES[:1], RESPONSE[:1], VALUES[1:], RESPONSE[1:])
    assert response_mean(VALUES, RESPONSE).tolist() == pytest.approx([1.1 / 3, -0.35])
    assert response_last(VALUES, RESPONSE).tolist() == pytest.approx([0.4, 0.3])
    assert out.loss_sum.item() == pytest.approx(math.log1p(math.exp(-(1.1 / 3 + 0.35))))
    assert out.loss_sum.item() == pytest.approx(0.397687, abs=2e-6)
    assert out.count.item() == 1


@st.composite
def batches(draw):
    """Values, response masks (one run in each row, perhaps none) and rewards, in float64."""
    rows, seq = 2 * draw(st.integers(1, 3)), draw(st.integers(2, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    values = torch.randn(rows, seq, generator=generator, dtype=torch.float64)
    response = torch.zeros(rows, seq, dtype=torch.bool)
    for row in range(rows):
        start = draw(st.integers(0, seq - 1))
        response[row, start : draw(st.integers(start, seq))] = True
    return values, response, torch.randn(rows, generator=generator, dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(batches(), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_the_value_plus_the_generalized_advantage(batch, gamma, lam):
    """Against the definition: a double sum over the deltas of each response, one token at a time."""
    values, response, rewards = batch
    targets, _ = spread_rewards("gae", rewards, response, values, gamma=gamma, gae_lambda=lam)
    for row in range(len(values)):
        at = response[row].nonzero().flatten().tolist()
        v = [values[row, j].item() for j in at]
        deltas = [gamma * after - now for now, after in itertools.pairwise(v)]
        deltas += [rewards[row].item() - v[-1]] if v else []
        for i, j in enumerate(at):
            advantage = sum((gamma * lam) ** n * delta for n, delta in enumerate(deltas[i:]))
            assert targets[row, j].item() == pytest.approx(v[i] + advantage, abs=1e-9)
    assert (targets[~response] == 0).all()


def test_gae_without_discount_and_bootstrap_is_uniform():
    whole, _ = spread_rewards("gae", REWARDS, RESPONSE, VALUES, gamma=1.0, gae_lambda=1.0)
    torch.testing.assert_close(whole, spread_rewards("uniform", REWARDS, RESPONSE, VALUES)[0])


@settings(max_examples=40, deadline=None)
@given(batches(), st.sampled_from(["terminal", "uniform", "length", "gae", None]))
def test_gradients_are_those_of_the_formula_and_stay_in_the_response(batch, spread):
    values, response, rewards = batch
    values, response, rewards = (x.unflatten(0, (-1, 2)) for x in (values, response, rewards))
    values.requires_grad_(True)
    loss = critic_loss("pairwise" if spread is None else "mse", spread)
    (ours,) = torch.autograd.grad(loss(values, response, rewards).loss_sum, values)

    total = torch.zeros((), dtype=torch.float64) * values.sum()  # plain: one program after another
    for pair in range(len(values)):
        sides = [values[pair, side][response[pair, side]] for side in (0, 1)]
        if spread is None:
            if all(len(side) for side in sides):
                total = total + torch.log1p(torch.exp(sides[1].mean() - sides[0].mean()))
            continue
        for side, r in zip(sides, rewards[pair], strict=True):
            n = len(side)
            fixed = side.detach()
            targets = {
                "terminal": [None] * (n - 1) + [r] * (n > 0),
                "uniform": [r] * n,
                "length": [r * (i + 1) / n for i in range(n)],
                "gae": [
                    sum(0.95**k * 0.05 * fixed[i + k + 1] for k in range(n - 1 - i)) + 0.95 ** (n - 1 - i) * r
                    for i in range(n)
                ],
            }[spread]
            for v, target in zip(side, targets, strict=True):
                if target is not None:
                    total = total + (v - target) ** 2
    (theirs,) = torch.autograd.grad(total, values)
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
    assert (ours[~response] == 0).all()


@settings(max_examples=20, deadline=None)
@given(batches(), st.sampled_from([("mse", "uniform"), ("mse", "gae"), ("pairwise", None)]))
def test_a_step_is_the_same_however_it_is_cut(batch, names):
    values, response, rewards = (x.unflatten(0, (-1, 2)) for x in batch)
    loss = critic_loss(*names)
    whole = loss(values, response, rewards)
    parts = [loss(values[i : i + 1], response[i : i + 1], rewards[i : i + 1]) for i in range(len(values))]
    assert sum(part.count for part in parts) == whole.count
    torch.testing.assert_close(sum(part.loss_sum for part in parts), whole.loss_sum)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hinge",), "loss must be one of mse, pairwise, got 'hinge'"),
        (("mse",), "loss mse needs a reward_spread, one of terminal, uniform, length, gae, got None"),
        (("mse", "gaussian"), "got 'gaussian'"),
        (("pairwise", "uniform"), "loss pairwise spreads no reward: set reward_spread to null, got 'uniform'"),
        (("mse", "uniform", 0.9), "gamma is read by reward_spread gae alone: set it to null, got 0.9"),
        (("mse", "gae", 1.5), r"gamma must be in \[0, 1\], got 1.5"),
        (("mse", "gae", None, -0.1), r"gae_lambda must be in \[0, 1\], got -0.1"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(arguments, message):
    loss, spread, gamma, lam = (*arguments, None, None, None)[:4]
    with pytest.raises(ValueError, match=message):
        critic_loss(loss, spread, gamma=gamma, gae_lambda=lam)
