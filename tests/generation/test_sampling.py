"""Distributions, keyed random numbers, verification: each against hand-computed or enumerated truth."""

import pytest
import torch
from decoding import far_from

from wmtp.generation.sampling import (
    Sampling,
    distribution,
    key_digest,
    numbers_at,
    sample,
    verify_greedy,
    verify_sampled,
)
from wmtp.numerics.keyed import splitmix64


def test_temperature_divides_logits_and_a_tiny_one_does_not_overflow():
    logits = torch.tensor([[0.0, 1.0, -2.0], [30.0, 31.0, 30.5]])
    torch.testing.assert_close(distribution(logits, Sampling(1, 0.5)), (logits * 2).softmax(-1))
    assert distribution(logits * 1e5, Sampling(1, 1e-30)).tolist() == [[0, 1, 0], [0, 1, 0]]
    assert distribution(logits.bfloat16(), Sampling(1, 1.0)).dtype == torch.float32


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.39, [0, 0, 1, 0]),
        (0.45, [0, 0.3, 0.4, 0]),
        (0.75, [0.2, 0.3, 0.4, 0]),
        (0.95, [0.2, 0.3, 0.4, 0.1]),
        (1.0, [0.2, 0.3, 0.4, 0.1]),
    ],
)
def test_a_nucleus_is_the_smallest_set_that_holds_top_p(top_p, expected):
    probs = distribution(torch.tensor([0.2, 0.3, 0.4, 0.1]).log(), Sampling(1, 1.0, top_p))
    expected = torch.tensor(expected)
    torch.testing.assert_close(probs, expected / expected.sum())


def test_equally_probable_tokens_share_their_place_in_the_nucleus():
    logits = torch.tensor([3.0, 1.0, 1.0, 1.0, -5.0])
    assert (distribution(logits, Sampling(1, 1.0, 0.8)) > 0).tolist() == [True, True, True, True, False]
    assert (distribution(torch.zeros(9), Sampling(1, 1.0, 0.3)) > 0).all()


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.999])
def test_large_nuclei_equal_a_sort_in_float64(top_p):
    logits = torch.randn(6, 5000, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[0.1], [1], [2], [3], [6], [20]]
    )
    probs = distribution(logits, Sampling(1, 0.7, top_p))
    exact, order = (logits.double() / 0.7).softmax(-1).sort(descending=True)
    kept = torch.zeros(6, 5000, dtype=torch.bool).scatter(1, order, exact.cumsum(-1) - exact < top_p)
    assert torch.equal(probs > 0, kept)
    torch.testing.assert_close(probs.sum(-1), torch.ones(6))


def test_the_noise_is_splitmix64():
    # The first outputs for seed 1234567, as published with the generator's reference code.
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    seeds = torch.tensor([1234567, 0])
    assert [z % 2**64 for z in splitmix64(seeds, 5)[0].tolist()] == expected
    assert splitmix64(seeds, 1)[1].item() % 2**64 == 0xE220A8397B1DCDAF


def test_numbers_depend_on_key_and_position_alone():
    digest = key_digest((7, "MBPP/11", 3))
    assert digest == key_digest((7, "MBPP/11", 3))
    assert numbers_at(digest, 5) == numbers_at(digest, 5)
    others = [(7, "MBPP/11", 4), (8, "MBPP/11", 3), (7, "MBPP/1", 13), ("7", "MBPP/11", 3)]
    seen = [numbers_at(d, p) for d in (digest, *map(key_digest, others)) for p in range(200)]
    assert len({n.token for n in seen} | {n.draft for n in seen}) == 2 * len(seen)
    accepts = torch.tensor([n.accept for n in seen], dtype=torch.float64)
    assert accepts.min() >= 0 and accepts.max() < 1
    assert far_from(torch.histc(accepts, 20, 0, 1), torch.ones(20)) < 4
    with pytest.raises(ValueError, match="key must be a tuple of strings and numbers, got"):
        key_digest((0, object()))


def test_samples_have_the_frequencies_of_their_weights():
    weights = torch.tensor([0.5, 0.0, 0.25, 1e-3, 0.1, 0.05, 0.0, 0.7])  # not normalised
    digest = key_digest(("sample",))
    seeds = torch.tensor([[numbers_at(digest, i).token, numbers_at(digest, i).draft] for i in range(20_000)])
    tokens = sample(weights.expand(20_000, 2, 8), seeds)
    assert tokens.shape == (20_000, 2)
    for column in tokens.T:
        assert far_from(column.bincount(minlength=8), weights) < 4
    pairs = (tokens[:, 0] * 8 + tokens[:, 1]).bincount(minlength=64)  # the two seeds of a position are independent
    joint = torch.outer(weights, weights).flatten()
    assert far_from(pairs[joint > 1e-3], joint[joint > 1e-3]) < 4
    assert sample(torch.eye(3), torch.tensor([1, 2, 3])).tolist() == [0, 1, 2]


def test_greedy_verification_counts_leading_matches():
    says = torch.tensor([[4, 1, 2, 3], [4, 1, 2, 3], [4, 1, 2, 3], [0, 0, 0, 0]])
    logits = torch.nn.functional.one_hot(says, 5).float()
    drafts = torch.tensor([[4, 1, 2], [4, 0, 2], [4, 1, 2], [1, 0, 0]])
    accepted, token = verify_greedy(logits, drafts, useful=torch.tensor([3, 3, 1, 3]))
    assert accepted.tolist() == [3, 1, 1, 0]
    assert token.tolist() == [3, 1, 1, 0]


@pytest.mark.parametrize("useful", [0, 1, 2])
def test_rejection_sampling_has_the_models_distribution(useful):
    """Two drafts over four tokens; q covers what p does not and the other way round."""
    n = 40_000
    p = torch.tensor([[0.5, 0.1, 0.4, 0.0], [0.05, 0.15, 0.2, 0.6], [0.25, 0.25, 0.4, 0.1]])
    q = torch.tensor([[0.1, 0.5, 0.2, 0.2], [0.3, 0.3, 0.4, 0.0]])
    generator = torch.Generator().manual_seed(0)
    drafts = torch.stack([q_i.expand(n, -1).multinomial(1, generator=generator)[:, 0] for q_i in q], dim=1)
    uniforms = torch.rand(n, 2, dtype=torch.float64, generator=generator)
    accepted, rest = verify_sampled(
        p.expand(n, -1, -1), q.expand(n, -1, -1), drafts, torch.full((n,), useful), uniforms
    )
    token = rest.multinomial(1, generator=generator)
    decided = torch.cat([drafts, torch.zeros(n, 1, dtype=torch.long)], dim=1).scatter(1, accepted[:, None], token)
    for i in range(useful + 1):  # p does not look back here, so each decided token is drawn from its own row of p
        of_position = decided[accepted >= i, i]
        assert far_from(of_position.bincount(minlength=4), p[i]) < 4
    shares = [(accepted >= i + 1).sum() / (accepted >= i).sum() for i in range(useful)]
    for share, p_i, q_i in zip(shares, p, q, strict=False):
        assert abs(share - torch.minimum(p_i, q_i).sum()) < 0.02  # 1 - total variation distance
    assert accepted.max() == useful


def test_a_residual_lost_to_rounding_falls_back_to_the_model():
    p = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]])
    q = torch.tensor([[[0.5, 0.5]]])
    accepted, rest = verify_sampled(p, q, torch.tensor([[0]]), torch.tensor([1]), torch.tensor([[1.0]]))
    assert accepted.tolist() == [0] and rest.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number >= 1, got 0"),
        ({"temperature": -0.5}, "temperature must be >= 0"),
        ({"temperature": float("nan")}, "temperature must be >= 0"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"stop": "\n"}, "stop must be a tuple of non-empty strings"),
        ({"stop": ("",)}, "stop must be a tuple of non-empty strings"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**{"max_new_tokens": 4, **change})
