"""Self-speculative decoding: the tokens of plain greedy decoding, the distribution of plain sampling."""

import itertools

import pytest
import torch
from test_generate import completions, requests_of
from test_sampling import far_from

from wmtp.generation import DecodingStats, Request, Sampling, generate


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("heads", ["random", "trained"])
def test_greedy_tokens_are_those_of_plain_decoding(tiny, trained, letters, heads, batch_size):
    model = tiny() if heads == "random" else trained
    requests = requests_of(16, vocab_size=32)
    # In trained's language every word may end in these; texts then end by stop string, EOS and length.
    letters.eos_id = 29
    sampling = Sampling(30, stop=(letters.decode([7, 15, 23]), letters.decode([22, 30])))
    plain = completions(model, letters, requests, sampling, batch_size=batch_size)
    stats = DecodingStats()
    drafted = completions(model, letters, requests, sampling, batch_size=batch_size, speculative=True, stats=stats)
    assert drafted == plain
    if heads == "random":
        assert 1 <= stats.tokens_per_forward < 1.3
    else:
        assert {c.finish_reason for c in plain.values()} == {"stop", "eos", "length"}
        assert stats.tokens_per_forward > 1.5
        assert stats.row_forwards < sum(len(c.tokens) for c in plain.values())


def test_acceptance_is_counted_on_verified_drafts(trained, letters):
    """By hand, from the plain forward pass over the finished text: a draft counts if all before it were accepted."""
    model, stats, letters.eos_id = trained, DecodingStats(), -1
    requests = requests_of(6, vocab_size=32)
    done = completions(model, letters, requests, Sampling(21), speculative=True, stats=stats)
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


@pytest.mark.parametrize("sampling", [Sampling(3, 1.0), Sampling(3, 2.5), Sampling(3, 2.0, 0.8)], ids=str)
def test_sampled_tokens_have_the_models_distribution(tiny, letters, sampling):
    letters.eos_id = -1
    model = tiny(vocab_size=6, max_seq_len=8)
    with torch.no_grad():
        model.output.weight.mul_(1.5)  # heads that disagree
    prompt, n = (1, 4, 2), 24_000
    joint = joint_of_three(model, prompt, sampling)
    for speculative in (False, True):
        stats = DecodingStats()
        requests = (Request(i, prompt, (0, i)) for i in range(n))
        counts = torch.zeros(6**3)
        for done in generate(model, letters, requests, sampling, batch_size=512, speculative=speculative, stats=stats):
            a, b, c = done.tokens
            counts[(a * 6 + b) * 6 + c] += 1
        likely = joint > 3e-4  # cells of at least seven expected samples; the rest together are one more cell
        grouped_counts = torch.cat([counts[likely], counts[~likely].sum()[None]])
        grouped_joint = torch.cat([joint[likely], joint[~likely].sum()[None]])
        assert counts[joint == 0].sum() == 0
        assert likely.sum() > 20
        assert far_from(grouped_counts, grouped_joint) < 4
        assert stats.prefills == 1
    # The drafts matter here: a good share is refused, and a good share is not.
    assert 0.3 < stats.acceptance()[2] < 0.9
    assert stats.verified[2] == n  # of three tokens, the first is the prefill's and the last head 1's
