"""A frozen backbone's states kept in a file give the values that the model gives; scores of whole data sets."""

import numpy as np
import pytest
import torch
from random_models import random_decoder

from wmtp.critic import Pair, Pairs, encode_pairs, hidden_states, pair_values, response_last, response_mean, score_pairs
from wmtp.models import ValueModel
from wmtp.pretrained import byte_tokenizer

SIZES = {"vocab_size": 259, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "embed_dim": 16}


@pytest.fixture
def model():
    model = ValueModel(random_decoder(**SIZES, intermediate_dim=24, max_seq_len=64), "linear")
    with torch.no_grad():
        model.value_head.out.weight.normal_(std=0.3)
    return model.requires_grad_(False).eval()


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    items = [
        Pair(f"p{n // 2}", "# " * (n % 3), "a" * int(good), "b" * int(bad))
        for n, (good, bad) in enumerate(rng.integers(1, 40, (7, 2)))
    ]
    return encode_pairs(byte_tokenizer(), Pairs("pairs", tuple(items)), seq_len=64)


def states_of(folder, data, dtype=torch.float32, key="weights"):
    return hidden_states(folder, data, key, embed_dim=16, dtype=dtype)


def test_kept_states_give_the_same_values(tmp_path, model, data):
    states = states_of(tmp_path, data)
    states.compute(model, batch_size=3)
    for rows in ([4, 0], [6]):
        batch = data.batch(rows, size=3)
        response = batch["response"]
        ours = pair_values(model, batch, "cpu", states.of(batch))[response]
        torch.testing.assert_close(ours, pair_values(model, batch, "cpu")[response], atol=1e-5, rtol=1e-5)
    assert data.lengths.sum() * 16 * 4 == next(tmp_path.glob("*.bin")).stat().st_size
    halves = states_of(tmp_path, data, torch.bfloat16)
    halves.compute(model, batch_size=3)
    batch = data.batch([2])
    torch.testing.assert_close(halves.of(batch), states.of(batch).bfloat16())


def test_they_are_computed_once_for_the_same_data_and_weights(tmp_path, model, data, capfd):
    states_of(tmp_path, data).compute(model, batch_size=3)
    note = next(tmp_path.glob("*.json")).read_text()

    def never(*args, **kwargs):
        raise AssertionError("the backbone ran again")

    states_of(tmp_path, data).compute(torch.nn.Module(), batch_size=3)  # a module that cannot run
    model.forward = never
    for other in (
        states_of(tmp_path, data, key="other weights"),
        states_of(tmp_path, data.take([1, 0])),
        states_of(tmp_path, data, torch.bfloat16),
    ):
        for _ in range(2):  # nor does a file count that is not whole
            with pytest.raises(AssertionError, match="ran again"):
                other.compute(model, batch_size=3)
    torn = next(tmp_path.glob("*.json")).with_suffix(".bin")
    whole = torn.read_bytes()
    for content in (whole[:-1], bytes([whole[0] ^ 1]) + whole[1:]):
        torn.write_bytes(content)
        capfd.readouterr()
        with pytest.raises(AssertionError, match="ran again"):
            states_of(tmp_path, data).compute(model, batch_size=3)
        assert f"{torn} is not what was written into it; it is made again\n" in capfd.readouterr().err
        torn.with_suffix(".json").write_text(note)


def test_scores_are_those_of_each_program_alone(model, data):
    scores = score_pairs(lambda batch: pair_values(model, batch, "cpu"), data, batch_size=3)
    for row in range(len(data)):
        batch = data.batch([row])
        values, response = pair_values(model, batch, "cpu")[0], batch["response"][0]
        np.testing.assert_allclose(scores.mean[row], response_mean(values, response), atol=1e-6)
        np.testing.assert_allclose(scores.last[row], response_last(values, response), atol=1e-6)
        for side, document in enumerate(data.documents[row]):
            alone = model(torch.from_numpy(document.tokens).long()[None])[0, document.labels >= 0]
            assert scores.mean[row, side] == pytest.approx(alone.mean().item(), abs=1e-6)
            assert scores.last[row, side] == pytest.approx(alone[-1].item(), abs=1e-6)


def test_values_that_are_not_finite_are_refused_by_name(model, data):
    with torch.no_grad():
        model.backbone.tok_embeddings.weight[ord("#")] = float("nan")
    with pytest.raises(ValueError, match=r"pairs: the values of 4 pairs are not finite, the first is of 'p0'"):
        score_pairs(lambda batch: pair_values(model, batch, "cpu"), data, batch_size=3)
