"""A real (random) sequence-classification model as the source of rewards: scored once, kept, and never NaN."""

import json

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from wmtp.critic import Pair, Pairs, encode_pairs
from wmtp.critic.rewards import hf_reward_model, reward_pairs
from wmtp.errors import UserError
from wmtp.pretrained import byte_tokenizer


@pytest.fixture
def write_model(tmp_path):
    """Writes a reward model's folder; returns its path."""

    def to_folder(name="reward_model", *, pad_token_id=258, num_labels=1, seed=0):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=259,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.3,
            pad_token_id=pad_token_id,
            num_labels=num_labels,
        )
        LlamaForSequenceClassification(config).save_pretrained(tmp_path / name)
        byte_tokenizer().save(tmp_path / name)
        return str(tmp_path / name)

    return to_folder


def pairs_of(*programs):
    items = tuple(Pair(f"p{n}", "# ", *both) for n, both in enumerate(programs))
    return encode_pairs(byte_tokenizer(), Pairs("pairs", items), seq_len=64)


DATA = pairs_of(("return a + b", "return a"), ("x", "y = 1\nz"), ("x", "return a"))


@pytest.mark.parametrize("pad_token_id", [258, None])
def test_rewards_are_the_models_own_and_are_computed_once(write_model, tmp_path, monkeypatch, pad_token_id):
    path = write_model(pad_token_id=pad_token_id)
    theirs = AutoModelForSequenceClassification.from_pretrained(path)
    data, scored = reward_pairs(hf_reward_model(path, batch_size=4, cache=str(tmp_path / "cache")), DATA)
    assert scored == 4  # of the six programs "return a" and "x" come twice, each time after the same prompt
    for pair, rewards in zip(data.pairs, data.rewards, strict=True):
        for program, reward in zip((pair.correct, pair.incorrect), rewards, strict=True):
            with torch.no_grad():
                alone = theirs(torch.tensor([list(f"# {program}".encode())])).logits.item()
            assert reward == pytest.approx(alone, abs=1e-5)
    assert len(set(data.rewards.reshape(-1).tolist())) == 4

    def never(*args, **kwargs):
        raise AssertionError("the model was loaded again")

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", never)
    again, scored = reward_pairs(hf_reward_model(path, cache=str(tmp_path / "cache")), DATA)
    assert scored == 0 and np.array_equal(again.rewards, data.rewards)


def test_a_bf16_model_s_rewards_are_not_rounded(write_model, tmp_path):
    """Its states are bfloat16, the product with its last layer is float32's: 1e-5 from float64's of the same states."""
    path = write_model()
    theirs = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.bfloat16)
    model = hf_reward_model(path, batch_size=1, dtype="bf16", cache=str(tmp_path / "cache"))
    data, _ = reward_pairs(model, DATA)
    for pair, rewards in zip(data.pairs, data.rewards, strict=True):
        for program, reward in zip((pair.correct, pair.incorrect), rewards, strict=True):
            with torch.no_grad():
                states = theirs.model(torch.tensor([list(f"# {program}".encode())])).last_hidden_state[0, -1]
            assert reward == pytest.approx((states.double() @ theirs.score.weight[0].double()).item(), abs=1e-5)
    assert model.file != hf_reward_model(path, cache=str(tmp_path / "cache")).file


def test_another_model_or_a_torn_file_is_scored_again(write_model, tmp_path):
    cache = str(tmp_path / "cache")
    model = hf_reward_model(write_model(), cache=cache)
    first = reward_pairs(model, DATA)[0].rewards
    other = reward_pairs(hf_reward_model(write_model("other", seed=1), cache=cache), DATA)
    assert other[1] == 4 and not np.allclose(other[0].rewards, first)

    lines = model.file.read_bytes().splitlines(keepends=True)
    model.file.write_bytes(b"".join(lines[:2]) + lines[2][:-9])  # killed in the middle of a line
    again, scored = reward_pairs(hf_reward_model(write_model(), cache=cache), DATA)
    assert scored == 2 and np.array_equal(again.rewards, first)
    kept = [json.loads(line) for line in model.file.read_text().splitlines()]
    assert len({row["text_sha256"] for row in kept}) == len(kept) == 4
    for wrong in (b"{}\n", b"\xff\n", lines[1].replace(b'"reward": ', b'"reward": x')):
        model.file.write_bytes(lines[0] + wrong + b"".join(lines[2:]))
        with pytest.raises(UserError, match=rf"{model.file}:2 is no reward that was written there; remove the file"):
            reward_pairs(hf_reward_model(write_model(), cache=cache), DATA)


def test_a_reward_that_is_no_number_is_refused_by_the_problems_name(write_model, tmp_path):
    path = write_model()
    model = LlamaForSequenceClassification.from_pretrained(path)
    with torch.no_grad():
        model.model.embed_tokens.weight[ord("z")] = float("nan")
    model.save_pretrained(path)
    rewards = hf_reward_model(path, batch_size=1, cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"the reward of problem 'p1' \(incorrect program\) is nan"):
        reward_pairs(rewards, DATA)
    kept = [json.loads(line)["reward"] for line in rewards.file.read_text().splitlines()]
    assert len(kept) == 3 and np.isfinite(kept).all()  # the others need not be scored again


def test_what_cannot_give_a_reward_is_refused_in_one_line(write_model, tmp_path):
    def refused(message, path, **options):
        with pytest.raises(ValueError, match=message) as error:
            reward_pairs(hf_reward_model(path, cache=str(tmp_path / "cache"), **options), DATA)
        assert "\n" not in str(error.value)

    refused("absent does not exist", str(tmp_path / "absent"))
    refused(r"must give one number \(num_labels 1\), it has 2", write_model("two", num_labels=2))
    refused("longer than the reward model's max_length 8", write_model(), max_length=8)
    refused("batch_size must be a whole number >= 1, got 0", write_model(), batch_size=0)
    refused("dtype must be one of fp32, bf16, got 'fp64'", write_model(), dtype="fp64")
    (tmp_path / "reward_model" / "config.json").write_text("{}")
    refused("cannot be loaded", str(tmp_path / "reward_model"))


def test_a_model_without_a_score_is_refused_rather_than_given_a_random_one(write_model, tmp_path):
    path = write_model()
    LlamaForCausalLM(LlamaConfig.from_pretrained(path)).save_pretrained(path)
    with pytest.raises(ValueError, match=r"lacks score\.weight; give a model that was trained to score text"):
        reward_pairs(hf_reward_model(path, cache=str(tmp_path / "cache")), DATA)
