"""Requests, a tokenizer of letters, and a statistic, for the tests beside this file."""

import torch

from wmtp.generation import Request, generate


class Letters:
    """A tokenizer of 67 characters, one a token: id i is chr(40 + i). EOS is id 66 unless said otherwise."""

    def __init__(self, eos_id=66, special_ids=()):
        self.eos_id = eos_id
        self.special_ids = frozenset(special_ids)

    def decode(self, ids):
        return "".join(chr(40 + i) for i in ids)


def requests_of(count, *, vocab_size=66, longest=12):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    prompts = [tuple(torch.randint(0, vocab_size, (n,), generator=generator).tolist()) for n in lengths]
    return [Request(i, prompt, (0, "task", i)) for i, prompt in enumerate(prompts)]


def completions(model, tokenizer, requests, sampling, **options):
    options.setdefault("batch_size", 4)
    done = list(generate(model, tokenizer, requests, sampling, **options))
    assert len({c.id for c in done}) == len(done)
    return {c.id: c for c in done}


def far_from(counts, probs):
    """Standard deviations by which the chi-square statistic lies above its mean; cells of probability 0 are empty."""
    assert counts[probs == 0].sum() == 0
    counts, probs = counts[probs > 0].double(), probs[probs > 0].double()
    expected = counts.sum() * probs / probs.sum()
    assert expected.min() > 5
    degrees = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum().item() - degrees) / (2 * degrees) ** 0.5
