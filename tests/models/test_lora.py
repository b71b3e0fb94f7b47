"""Adapters: what they start as, what is trained, merging, 4 bits, and what the loss and the trunk then cost."""

import weakref

import pytest
import torch
from random_models import random_decoder
from torch.utils._python_dispatch import TorchDispatchMode

from wmtp.loss import mtp_loss, weighted_mtp_cross_entropy
from wmtp.models import (
    add_lora,
    export_hf,
    from_checkpoint,
    init_lora,
    load_checkpoint,
    parameter_counts,
)
from wmtp.models.nf4 import is_nf4, quantize_nf4
from wmtp.pretrained import checkpoint_formats
from wmtp.weighting import rho1

# Widths whose weights have a multiple of 64 values.
SIZES = {
    "vocab_size": 67,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 32,
    "intermediate_dim": 48,
    "max_seq_len": 32,
    "num_future_tokens": 3,
}
TOKENS = torch.arange(24).view(2, 12) * 7 % 67


def held(weight):
    """The bytes of a quantised weight, scales included."""
    names, _ = weight.__tensor_flatten__()
    return sum(getattr(weight, name).nbytes for name in names)


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def moved(model):
    """As if trained: everything that may move has."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.mul_(1.2) if name.endswith("magnitude") else parameter.add_(
                torch.randn_like(parameter), alpha=0.1
            )
    return model


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("heads", ["full", "lora", "frozen"])
@pytest.mark.parametrize("trunk", ["lora", "frozen"])
def test_at_the_start_the_model_is_the_base_bit_for_bit(trunk, heads, dora):
    model = random_decoder(**SIZES)
    before = model(TOKENS)
    if (trunk, heads) == ("frozen", "frozen"):
        with pytest.raises(ValueError, match="leave nothing to train"):
            add_lora(model, trunk=trunk, heads=heads)
        return
    add_lora(model, rank=4, trunk=trunk, heads=heads, dora=dora)
    model.train()
    assert torch.equal(model(TOKENS), before)
    assert any(name.startswith("layers.") for name in trained(model)) == (trunk == "lora")
    assert any(name.startswith("extra_heads.") for name in trained(model)) == (heads != "frozen")
    of_adapters = ("lora_a.weight", "lora_b.weight", "magnitude")
    assert all(name.endswith(of_adapters) for name in trained(model) if name.startswith("layers.") or heads == "lora")


def test_what_is_trained_is_what_the_switches_say():
    blocks = {"sa_norm.scale", "mlp_norm.scale"}
    model = add_lora(random_decoder(**SIZES), rank=2, targets=["v_proj", "w2"], heads="full", train_norms=True)
    of_layers = {name.split(".", 2)[2] for name in trained(model) if name.startswith("layers.")}
    assert of_layers == {f"{p}.lora_{x}.weight" for p in ("attn.v_proj", "mlp.w2") for x in "ab"} | blocks
    assert {n for n, _ in model.named_parameters() if n.startswith("extra_heads.")} <= trained(model)
    assert "norm.scale" in trained(model) and "output.weight" not in trained(model)
    frozen = add_lora(random_decoder(**SIZES), trunk="frozen", heads="lora", train_norms=True, train_unembedding=True)
    assert {name for name in trained(frozen) if not name.startswith("extra_heads.")} == {"norm.scale", "output.weight"}
    tied = add_lora(random_decoder(**SIZES, tie_word_embeddings=True), heads="frozen", train_unembedding=True)
    assert "tok_embeddings.weight" in trained(tied)
    next_token = add_lora(random_decoder(**SIZES | {"num_future_tokens": 1}), rank=2)
    assert len(trained(next_token)) == 3 * 7 * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be a whole number >= 1, got 0"),
        ({"dropout": 1}, r"dropout must be in \[0, 1\), got 1"),
        ({"targets": ["gate_proj"]}, "targets must be one or more of q_proj, .*w3, got gate_proj"),
        ({"trunk": "full"}, "trunk must be one of lora, frozen, got 'full'"),
        ({"heads": "none"}, "heads must be one of full, lora, frozen, got 'none'"),
        ({"quantize": "int4"}, "quantize must be one of null, nf4, got 'int4'"),
    ],
)
def test_wrong_values_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        add_lora(random_decoder(**SIZES), **options)
    assert "\n" not in str(error.value)


def test_choices_that_contradict_each_other_are_refused():
    tied = random_decoder(**SIZES, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="train_unembedding trains the embedding of a tied model, which lies below"):
        add_lora(tied, trunk="frozen", train_unembedding=True)
    with pytest.raises(ValueError, match="nothing to train in a model with one head"):
        add_lora(random_decoder(**SIZES | {"num_future_tokens": 1}), trunk="frozen")
    odd = random_decoder(**SIZES | {"embed_dim": 20, "head_dim": 6, "intermediate_dim": 33})
    with pytest.raises(ValueError, match=r"multiple of 64 values, layers.0.q_proj is \[24, 20\]; set it to null"):
        add_lora(odd, quantize="nf4")
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(add_lora(random_decoder(**SIZES)))


@pytest.mark.parametrize("dora", [False, True])
def test_merged_and_unmerged_logits_agree(tmp_path, dora):
    model = random_decoder(**SIZES)
    before = model(TOKENS)
    moved(add_lora(model, rank=4, alpha=2.0, dora=dora, heads="lora", train_norms=True)).eval()
    logits = model(TOKENS)
    assert (logits - before).abs().max() > 0.1
    export_hf(model, tmp_path / "merged")
    exported = from_checkpoint(tmp_path / "merged")
    load_checkpoint(exported, tmp_path / "merged")
    scale = logits.abs().max()
    torch.testing.assert_close(exported(TOKENS) / scale, logits / scale, atol=1e-5, rtol=0)
    assert not any("lora" in name or "magnitude" in name for name, _ in exported.named_parameters())


def test_dora_is_its_formula():
    model = moved(add_lora(random_decoder(**SIZES), rank=4, alpha=2.0, targets=["w2"], dora=True)).eval()
    w2 = model.layers[1].mlp.w2
    x = torch.randn(5, 48)
    direction = w2.weight.double() + 2.0 / 4 * w2.lora_b.weight.double() @ w2.lora_a.weight.double()
    expected = x.double() @ (w2.magnitude.double()[:, None] * direction / direction.norm(dim=1, keepdim=True)).T
    torch.testing.assert_close(w2(x).double(), expected, atol=1e-5, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Four bits


def quantized(folder, **options):
    """The base, and a model of it with its trunk in NF4, loaded from a folder on the meta device."""
    base = random_decoder(**SIZES)
    export_hf(base, folder / "base")
    with torch.device("meta"):
        model = add_lora(from_checkpoint(folder / "base"), rank=4, quantize="nf4", **options)
    load_checkpoint(model, folder / "base")
    init_lora(model)
    return base, model


def test_four_bits_hold_the_trunk_and_the_heads_stay_as_they_are(tmp_path):
    base, model = quantized(tmp_path, heads="full", dora=True)
    for name, weight in base.named_parameters():
        ours = model.get_parameter(name)
        if name.startswith(("layers.0", "layers.1")) and name.endswith("weight"):
            error = (ours.to(torch.float32) - weight).norm() / weight.norm()
            assert 0.02 < error < 0.12 and not ours.requires_grad, name  # 16 levels: of a normal weight about 9 %
        else:
            assert torch.equal(ours, weight), name
    in_four_bits = sum(held(p) for p in model.parameters() if is_nf4(p))
    in_trunk = sum(
        p.numel() for n, p in base.named_parameters() if n.startswith(("layers.0", "layers.1")) and "proj" in n
    )
    in_trunk += sum(
        p.numel() for n, p in base.named_parameters() if n.startswith(("layers.0", "layers.1")) and "mlp.w" in n
    )
    assert 0.5 * in_trunk < in_four_bits < 0.6 * in_trunk + 14 * 100
    # Random weights, quantised as they are, are the same numbers as those read from a file.
    direct = add_lora(random_decoder(**SIZES), rank=4, quantize="nf4", heads="full", dora=True)
    assert torch.equal(direct(TOKENS), model(TOKENS))


def test_four_bits_are_those_of_the_weights_in_the_dtype_that_is_asked_for(tmp_path):
    base, read = quantized(tmp_path, quantize_from=torch.bfloat16)
    direct = add_lora(random_decoder(**SIZES), rank=4, quantize="nf4", quantize_from=torch.bfloat16)
    for model in (read, direct):
        weight, source = model.layers[0].mlp.w1.weight, base.layers[0].mlp.w1.weight
        expected = quantize_nf4(source.bfloat16())
        assert weight.dtype == torch.bfloat16 and model.layers[0].mlp.w1.lora_a.weight.dtype == torch.float32
        assert torch.equal(weight.to(torch.float32), expected.to(torch.float32))
        assert 0.02 < (weight.to(torch.float32) - source).norm() / source.norm() < 0.12
    assert torch.equal(read(TOKENS), direct(TOKENS))


def test_only_adapters_and_heads_get_gradients_through_four_bits(tmp_path):
    _, model = quantized(tmp_path, heads="full")
    model(TOKENS).square().sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == trained(model) and any("layers.0.attn.q_proj.lora_b" in name for name in with_gradient)


def test_the_full_precision_trunk_never_exists(tmp_path, monkeypatch):
    """Each full tensor is gone when the next one is read."""
    read, alive, count = checkpoint_formats.Checkpoint.read, [], 0

    def watched(self, name):
        nonlocal count
        tensor = read(self, name)
        count += sum(ref() is not None for ref in alive)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(checkpoint_formats.Checkpoint, "read", watched)
    _, model = quantized(tmp_path, heads="frozen")
    assert len(alive) > 40 and count == 0
    assert type(model.layers[0].mlp.w1.weight.data).__name__ == "NF4Tensor"


def test_four_bits_are_merged_only_when_that_is_asked_for(tmp_path):
    _, model = quantized(tmp_path, heads="full")
    moved(model).eval()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"quantised to nf4, and merge_quantized is false.*set merge_quantized=true"):
        export_hf(model, tmp_path / "merged")
    assert sorted(tmp_path.iterdir()) == before  # nothing half written either
    logits = model(TOKENS)
    export_hf(model, tmp_path / "merged", merge_quantized=True)
    exported = from_checkpoint(tmp_path / "merged")
    load_checkpoint(exported, tmp_path / "merged")
    torch.testing.assert_close(exported(TOKENS), logits, atol=1e-5 * logits.abs().max().item(), rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# What it costs


class CountRows(TorchDispatchMode):
    """Counts the rows of any matrix product with the unembedding [67, 32], in units of one row's GEMM, V * D."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.split(".")[0] in ("mm", "addmm_", "addmm"):
            a, b = args[-2:]
            if {67, 32} <= {*a.shape, *b.shape}:
                self.rows += a.shape[0] * a.shape[1] * b.shape[1] // (67 * 32)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("train_unembedding", "gemms"), [(False, 2), (True, 3)])
def test_a_frozen_unembedding_costs_no_gradient_gemm(train_unembedding, gemms):
    model = add_lora(random_decoder(**SIZES), heads="full", train_unembedding=train_unembedding)
    pairs = 2 * (11 + 10 + 9)
    with CountRows() as counter:
        model(TOKENS, loss_fn=weighted_mtp_cross_entropy, labels=TOKENS).loss_sum.backward()
    assert counter.rows == gemms * pairs
    assert (model.output.weight.grad is None) != train_unembedding


def test_head_1_of_weight_zero_costs_its_statistic_alone():
    """What configs with a frozen trunk set: head 1 cannot learn, so it takes no part in the gradient GEMMs."""
    model = add_lora(random_decoder(**SIZES), trunk="frozen", heads="full")
    inputs = {
        "labels": TOKENS,
        "weighting": rho1("soft"),
        "signals": {"reference_ce": torch.rand(2, 12)},
        "loss_fn": mtp_loss,
    }
    with CountRows() as counter:
        model(TOKENS, head_weights=torch.tensor([0.0, 1.0, 1.0]), **inputs).loss_sum.backward()
    assert counter.rows == 2 * 11 + 2 * 2 * (10 + 9)


def test_a_frozen_trunk_keeps_nothing_and_its_state_takes_its_place():
    model = add_lora(random_decoder(**SIZES), trunk="frozen", heads="full")
    ids = torch.tensor([[0] * 5 + [1] * 7, [0] * 9 + [-1] * 3])
    state = model(TOKENS, document_ids=ids, return_trunk=True)
    assert state.shape == (2, 12, 32) and state.grad_fn is None
    with_state, without = (
        model(TOKENS, document_ids=ids, trunk_state=kept, loss_fn=weighted_mtp_cross_entropy, labels=TOKENS)
        for kept in (state, None)
    )
    assert torch.equal(with_state.loss_sum, without.loss_sum)
    ran = []
    for block in model.layers[:-1]:
        block.register_forward_hook(lambda *_: ran.append(1))
    model(TOKENS, document_ids=ids, trunk_state=state)
    assert not ran
    assert not torch.equal(model(TOKENS, document_ids=ids, trunk_state=state + 1), model(TOKENS, document_ids=ids))


def test_what_is_counted_are_the_parameters():
    model = add_lora(random_decoder(**SIZES), rank=4, targets=["q_proj"], heads="frozen")
    assert parameter_counts(model) == (3 * 2 * 4 * 32, sum(p.numel() for p in model.parameters()))
