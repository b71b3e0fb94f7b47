"""Acceptance between steps of a training is that of self-speculative decoding on the same prompts."""

import numpy as np
import pytest
import torch
from processes import start

from wmtp.data import Document, Documents, pack
from wmtp.distributed import end_world, start_world
from wmtp.generation import Request, Sampling, generate
from wmtp.generation.requests import DecodingStats
from wmtp.loss import mtp_loss
from wmtp.models import llama_mtp, shard_model
from wmtp.pretrained import byte_tokenizer
from wmtp.training.acceptance import HeldOutAcceptance, acceptance, held_out_prompts, length_change
from wmtp.weighting import uniform


def counting_model():
    """A model that has learnt to count, and whose drafts are therefore sometimes right."""
    torch.manual_seed(0)
    model = llama_mtp(
        vocab_size=260, num_layers=2, num_heads=2, num_kv_heads=1, embed_dim=32, intermediate_dim=64, max_seq_len=64,
        num_future_tokens=4,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        starts, steps = torch.randint(0, 40, (16, 1)), torch.randint(1, 4, (16, 1))
        tokens = (starts + steps * torch.arange(32)) % 60
        model(tokens, loss_fn=mtp_loss, labels=tokens, weighting=uniform()).loss_sum.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return counting_model()


PROMPTS = [[i, i + s, i + 2 * s][: 2 + i % 2] for i in range(3, 8) for s in (1, 2, 3)]


@pytest.mark.parametrize("max_new_tokens", [1, 2, 17])
def test_it_counts_what_speculative_decoding_counts(model, max_new_tokens):
    tokenizer, stats = byte_tokenizer(), DecodingStats()
    requests = [Request(i, tuple(prompt), (0, i, 0)) for i, prompt in enumerate(PROMPTS)]
    sampling = Sampling(max_new_tokens)
    list(generate(model, tokenizer, requests, sampling, batch_size=4, num_drafts=3, stats=stats))
    found = acceptance(model, PROMPTS, max_new_tokens, {tokenizer.eos_id}, start_world("cpu")).figures()
    assert found.pop("accept_length") == stats.tokens_per_forward
    assert found == {f"acceptance_head{k}": share for k, share in stats.acceptance().items()}
    if max_new_tokens > 2:
        assert 1 < stats.tokens_per_forward < 4


def sharded_measure(expected):
    """Every rank measures on a sharded model, one rank more often than the other, and gets what one process does."""
    model, world = counting_model(), start_world("cpu")
    shard_model(model, world.mesh, param_dtype=torch.float32)
    counts = acceptance(model, PROMPTS[:7], 17, {256}, world)
    assert [part.tolist() for part in counts] == expected
    end_world()


@pytest.mark.long
def test_ranks_share_the_prompts_of_a_sharded_model(model, tmp_path):
    expected = [part.tolist() for part in acceptance(model, PROMPTS[:7], 17, {256}, start_world("cpu"))]
    start(sharded_measure, expected, size=2, log=tmp_path / "log.txt").join()


def test_prompts_are_those_of_the_first_documents_that_have_one():
    lengths = [(0, 4), (3, 2), (5, 6), (1, 1), (2, 9)]
    items, prompts = [], []
    for i, (prompt, completion) in enumerate(lengths):
        tokens = np.arange(prompt + completion, dtype=np.int32) + 10 * i
        labels = tokens.copy()
        labels[:prompt] = -100
        items.append(Document(tokens, labels, f"d{i}"))
        prompts.append(tokens[:prompt].tolist())
    data = pack(Documents("some", tuple(items)), 12, pad_id=0)
    assert held_out_prompts(data, 3) == [prompt for prompt in prompts if prompt][:3]
    assert held_out_prompts(data, 99) == [prompt for prompt in prompts if prompt]


def documents_of(prompts):
    """Each prompt, and an end that is a target."""
    items = []
    for i, prompt in enumerate(prompts):
        tokens = np.array([*prompt, 7], dtype=np.int32)
        items.append(Document(tokens, np.where(np.arange(len(tokens)) < len(prompt), -100, tokens), f"d{i}"))
    return pack(Documents("some", tuple(items)), 12, pad_id=0)


def test_the_change_by_training_is_that_of_the_same_prompts_and_outlives_a_restart(model):
    untrained = llama_mtp(
        vocab_size=260, num_layers=2, num_heads=2, num_kv_heads=1, embed_dim=32, intermediate_dim=64, max_seq_len=64,
        num_future_tokens=4,
    ).eval()  # fmt: skip
    sets, lines = {"code": documents_of(PROMPTS)}, []
    measured = (sets, byte_tokenizer(), start_world("cpu"))
    begun, resumed, other = HeldOutAcceptance(12, 17), HeldOutAcceptance(12, 17), HeldOutAcceptance(12, 16)
    before = begun.measure(untrained, *measured, first=True, last=False, log=lines.append)
    for later in (resumed, other):
        later.load_state_dict(begun.state_dict())
    after = resumed.measure(model, *measured, first=False, last=True, log=lines.append)
    change, low, high = (after.pop(f"eval/code/accept_length_change{end}") for end in ("", "_low", "_high"))
    assert change == pytest.approx(after["eval/code/accept_length"] - before["eval/code/accept_length"], rel=1e-12)
    assert low < change < high
    assert lines == [f"eval/code/accept_length: {change:+.4f} [{low:+.4f}, {high:+.4f}] by training, over 12 prompts"]
    unknown = other.measure(model, *measured, first=False, last=True, log=lines.append)
    assert not [name for name in unknown if "change" in name]
    assert lines[1].endswith("these prompts were not measured before training, so that no change is known")


def test_the_interval_of_a_change_holds_the_true_one_in_95_of_100():
    """Prompts of unlike length, each with an accept length of its own, before and after."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(1000):
        passes = rng.integers(10, 41, (2, 16))
        shared = rng.normal(0, 0.2, 16)
        tokens = passes * (np.array([[1.3], [1.5]]) + shared + rng.normal(0, 0.1, (2, 16)))
        before, after = torch.tensor(np.stack([tokens, passes], axis=2))
        _, low, high = length_change(before, after)
        held += low <= 0.2 <= high
    assert 925 <= held <= 975
    assert length_change(before[:1], after[:1]) is None
    assert length_change(before, torch.zeros(16, 2)) is None
