import pytest
import torch
import torch.nn.functional as F
from counted import Counted

from wmtp.loss import weighted_mtp_cross_entropy
from wmtp.models import checkpoint_activations
from wmtp.models.masks import block_mask, dense_mask
from wmtp.numerics.documents import positions_in_documents

HEADS = 3


def random_tokens(*shape):
    return torch.randint(0, 67, shape, generator=torch.Generator().manual_seed(1))


def test_positions_start_again_with_each_document():
    ids = torch.tensor([[4, 4, 4, 9, 9, -1, -1], [0, 1, 2, 2, 2, 2, 2]])
    assert positions_in_documents(ids).tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 0, 0, 1, 2, 3, 4]]


@pytest.mark.parametrize("scaling", [None, "llama3"])
def test_a_packed_document_has_the_states_it_has_alone(tiny, scaling):
    if scaling:
        scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        scaling["original_max_position_embeddings"] = 16
    model = tiny(num_future_tokens=HEADS, rope_scaling=scaling)
    tokens = random_tokens(2, 16)
    lengths = [[5, 1, 7], [16]]  # the first row ends in three tokens of padding
    ids = torch.full((2, 16), -1)
    ids[0, :13] = torch.tensor([0] * 5 + [1] + [2] * 7)
    ids[1] = 3
    packed = model.hidden_states(tokens, document_ids=ids)
    assert packed.shape == (HEADS, 2, 16, 24)
    for row, row_lengths in enumerate(lengths):
        start = 0
        for length in row_lengths:
            alone = model.hidden_states(tokens[row : row + 1, start : start + length])
            torch.testing.assert_close(packed[:, row : row + 1, start : start + length], alone, atol=1e-5, rtol=1e-5)
            start += length

    other_padding = tokens.clone()
    other_padding[0, 13:] = 0
    changed = model.hidden_states(other_padding, document_ids=ids)
    assert torch.equal(changed[:, 0, :13], packed[:, 0, :13]) and torch.equal(changed[:, 1], packed[:, 1])
    assert torch.isfinite(packed).all()


def test_rows_of_one_document_take_the_causal_path(tiny):
    model, tokens = tiny(), random_tokens(2, 9)
    ids = torch.tensor([[0], [5]]).expand(2, 9)
    assert torch.equal(model(tokens, document_ids=ids), model(tokens))
    masked = model(tokens, mask=torch.ones(2, 9, 9, dtype=torch.bool).tril())
    torch.testing.assert_close(masked, model(tokens), atol=1e-5, rtol=1e-5)


def test_flex_attention_gets_the_same_mask():
    ids = torch.tensor([[0] * 4 + [1] * 5 + [-1] * 3, [7] * 12])
    batch, query, key = torch.meshgrid(torch.arange(2), torch.arange(12), torch.arange(12), indexing="ij")
    assert torch.equal(block_mask(ids).mask_mod(batch, 0, query, key), dense_mask(ids))


def test_only_the_asked_heads_are_computed(tiny):
    model, tokens = tiny(num_future_tokens=HEADS), random_tokens(2, 9)
    called = []
    model.extra_heads[0].register_forward_hook(lambda *_: called.append(2))
    assert torch.equal(model(tokens, num_heads=1), model(tokens)[:1])
    assert called == [2]  # by the full forward alone
    with pytest.raises(ValueError, match="num_heads must be between 1 and the model's 3, got 4"):
        model(tokens, num_heads=4)


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_in_forward_has_the_gradients_of_full_logits(tiny, tied):
    model, tokens = tiny(num_future_tokens=2, tie_word_embeddings=tied), random_tokens(2, 10)
    assert tied is not any(name.startswith("output") for name, _ in model.named_parameters())
    logits = model(tokens)
    sum(
        F.cross_entropy(logits[k, :, : 9 - k].transpose(1, 2), tokens[:, k + 1 :], reduction="sum") for k in (0, 1)
    ).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    out = model(tokens, loss_fn=weighted_mtp_cross_entropy, labels=tokens)
    out.loss_sum.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-4, rtol=1e-4, msg=name)


def test_activation_checkpointing_changes_no_gradient_and_recomputes_what_it_says(tiny):
    tokens, ids = random_tokens(2, 10), torch.tensor([[0] * 4 + [1] * 6]).expand(2, 10)
    products, attentions, gates, expected = {}, {}, {}, None
    for how in (None, 1, 2, "selective"):
        model = tiny(num_future_tokens=HEADS)
        if how is not None:
            assert checkpoint_activations(model, how) is model
        with Counted() as counted:
            model(tokens, document_ids=ids, loss_fn=weighted_mtp_cross_entropy, labels=tokens).loss_sum.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        expected = expected or gradients
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True)), how
        products[how] = counted.operations["mm"]
        attentions[how] = counted.operations["_scaled_dot_product_flash_attention_for_cpu"]
        gates[how] = counted.operations["silu"]
    blocks = len(model.layers) + len(model.extra_heads)
    assert attentions == {None: blocks, 1: 2 * blocks, 2: blocks + (blocks + 1) // 2, "selective": blocks}
    assert products[1] > products[2] > products[None] == products["selective"]
    assert gates["selective"] == gates[1] == 2 * gates[None]


def test_rotation_angles_survive_bfloat16_and_the_meta_device(tiny):
    model = tiny(max_seq_len=4096)
    angles = model.rope.cache.clone()
    model.to(torch.bfloat16)
    assert torch.equal(model.rope.cache, angles) and model.norm.scale.dtype == torch.bfloat16
    with torch.device("meta"):
        model = tiny(max_seq_len=4096)
    model.to_empty(device="cpu")
    assert torch.equal(model.rope.cache, angles)
    model.init_weights()
    assert torch.isfinite(model(random_tokens(1, 4))).all()
    assert 0.019 < model.tok_embeddings.weight.std() < 0.021


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_future_tokens": 0}, "num_future_tokens must be a whole number >= 1, got 0"),
        ({"embed_dim": 25}, "embed_dim must be a multiple of num_heads 4, got 25"),
        ({"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads 3, got 4"),
        ({"head_dim": 7}, "head_dim must be an even number"),
        ({"rope_base": 0}, "rope_base must be a number > 0, got 0"),
        (
            {"rope_scaling": {"rope_type": "longrope"}},
            "rope_scaling type must be one of default, linear, dynamic, yarn, llama3, got 'longrope'",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "lacks low_freq_factor"),
        ({"attention": "eager"}, "attention must be 'sdpa' or 'flex', got 'eager'"),
    ],
)
def test_impossible_models_are_refused(tiny, change, message):
    with pytest.raises(ValueError, match=message):
        tiny(**change)


def test_inputs_that_cannot_work_are_refused(tiny):
    with pytest.raises(ValueError, match="sequence length must be <= max_seq_len 32, got 33"):
        tiny()(random_tokens(1, 33))
    with pytest.raises(ValueError, match="attention 'flex' needs CUDA"):
        tiny(attention="flex")(random_tokens(1, 4))


def test_named_models_have_their_published_sizes():
    from wmtp.models import codellama_7b, meta_mtp_7b

    def count(model):
        return sum(parameter.numel() for parameter in model.parameters())

    with torch.device("meta"):
        assert count(meta_mtp_7b()) == 6_738_415_616  # Llama 2 7B: four heads add no parameters to 32 blocks
        assert count(codellama_7b(vocab_size=32_000)) == 6_738_415_616
        assert count(codellama_7b()) == 6_738_546_688
