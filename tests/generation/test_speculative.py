"""Self-speculative decoding: the tokens of plain greedy decoding, the distribution of plain sampling."""

import itertools
from dataclasses import replace

import pytest
import torch
from decoding import completions, far_from, requests_of

from wmtp.generation import DecodingStats, Request, Sampling, generate


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("heads", ["random", "looped", "trained"])
def test_greedy_tokens_are_those_of_plain_decoding(tiny, trained, letters, heads, batch_size):
    model = trained if heads == "trained" else tiny(looped_heads=heads == "looped")
    requests = requests_of(16, vocab_size=32)
    letters.eos_id = 30  # ends the word 6, 14, 22, 30 of trained's language; the stop strings end two others
    sampling = Sampling(30, stop=(letters.decode([23, 31]), letters.decode([17, 25])))
    plain = completions(model, letters, requests, sampling, batch_size=batch_size)
    stats = DecodingStats()
    drafted = completions(model, letters, requests, sampling, batch_size=batch_size, num_drafts=2, stats=stats)
    assert all(replace(drafted[i], forwards=plain[i].forwards) == plain[i] for i in plain)
    assert all(plain[i].forwards == len(plain[i].tokens) >= drafted[i].forwards for i in plain)
    if heads != "trained":
        assert 1 <= stats.tokens_per_forward < 1.3
    else:
        assert {c.finish_reason for c in plain.values()} == {"stop", "eos", "length"}
        assert stats.tokens_per_forward > 1.5
        assert stats.row_forwards < sum(len(c.tokens) for c in plain.values())


def test_acceptance_is_counted_on_verified_drafts(trained, letters):
    """By hand, from the plain forward pass over the finished text: a draft counts if all before it were accepted."""
    model, stats, letters.eos_id = trained, DecodingStats(), -1
    requests = requests_of(6, vocab_size=32)
    done = completions(model, letters, requests, Sampling(21), num_drafts=2, stats=stats)
    verified, accepted, forwards = {2: 0, 3: 0}, {2: 0, 3: 0}, 0
    for request in requests:
        text = [*request.prompt, *done[request.id].tokens]
        with torch.no_grad():
            heads = model(torch.tensor([text])).argmax(-1)[:, 0].tolist()  # [H][S]
        known = len(request.prompt) + 1  # the prefill gave one token; the state before it is at known - 2
        while known < len(text):
            state, gained = known - 2, 1
            for k in (2, 3):
                if known + k - 2 >= len(text) - 1:  # the last token of all is head 1's, not a draft
                    break
                verified[k] += 1
                if heads[k - 1][state] != text[state + k]:
                    break
                accepted[k] += 1
                gained += 1
            known += gained
            forwards += 1
    assert stats.verified == verified and stats.accepted == accepted and stats.row_forwards == forwards
    assert stats.acceptance() == {k: accepted[k] / verified[k] for k in (2, 3)}
    assert all(stats.drafted[k] >= verified[k] for k in (2, 3)) and 0 < accepted[3] < verified[3] < verified[2]
    assert stats.as_dict()["acceptance"] == stats.acceptance()


@torch.no_grad()
def joint_of_three(model, prompt, sampling):
    """Exact probabilities [V ** 3] of the first three tokens, from full forwards and a nucleus found by sorting."""

    def next_token(tokens):
        probs = (model(torch.tensor([tokens]), num_heads=1)[0, 0, -1].double() / sampling.temperature).softmax(-1)
        ranked, order = probs.sort(descending=True)
        ranked[ranked.cumsum(-1) - ranked >= sampling.top_p] = 0
        return torch.zeros_like(probs).scatter(0, order, ranked / ranked.sum())

    size = model.vocab_size
    joint = torch.zeros(size**3, dtype=torch.float64)
    first = next_token(list(prompt))
    for a, b in itertools.product(range(size), repeat=2):
        if first[a] > 0:
            second = next_token([*prompt, a])
            if second[b] > 0:
                cell = (a * size + b) * size
                joint[cell : cell + size] = first[a] * second[b] * next_token([*prompt, a, b])
    return joint


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling",
    [Sampling(3, 2.0, 0.8), *(pytest.param(Sampling(3, t), marks=pytest.mark.long) for t in (1.0, 2.5))],
    ids=str,
)
def test_sampled_tokens_have_the_models_distribution(tiny, letters, sampling):
    letters.eos_id = -1
    model = tiny(vocab_size=6, max_seq_len=8)
    with torch.no_grad():
        model.output.weight.mul_(1.5)  # heads that disagree
    prompt, joint = (1, 4, 2), joint_of_three(model, (1, 4, 2), sampling)
    for num_drafts, n in ((0, 4_000), (2, 10_000)):
        stats, counts = DecodingStats(), torch.zeros(6**3)
        requests = (Request(i, prompt, (0, i)) for i in range(n))
        for done in generate(model, letters, requests, sampling, batch_size=512, num_drafts=num_drafts, stats=stats):
            a, b, c = done.tokens
            counts[(a * 6 + b) * 6 + c] += 1
        assert counts.sum() == n and stats.prefills == 1 and counts[joint == 0].sum() == 0
        likely = joint > 7 / n  # chi-square wants several expected samples in a cell; the unlikely ones share a cell
        assert likely.sum() > 20
        grouped_counts, grouped_joint = (torch.cat([x[likely], x[~likely].sum()[None]]) for x in (counts, joint))
        assert far_from(grouped_counts, grouped_joint) < 4
    # The drafts matter here: a good share is refused, and a good share is not.
    assert 0.3 < stats.acceptance()[2] < 0.9
    assert stats.verified[2] == n  # of three tokens, the first is the prefill's and the last head 1's
