"""The value model: what a value depends on, saving and loading, adapters, and the same on two processes."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from processes import fork_server
from random_models import random_decoder
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh

from wmtp.models import (
    ValueModel,
    add_lora,
    export_hf,
    from_checkpoint,
    init_lora,
    load_checkpoint,
    load_value_model,
    save_value_model,
    shard_model,
    value_model_config,
    value_tokenizer,
)
from wmtp.pretrained import CheckpointError, byte_tokenizer

SIZES = {
    "vocab_size": 259,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 24,
    "intermediate_dim": 40,
    "max_seq_len": 32,
}
TOKENS = torch.arange(24).view(2, 12) * 7 % 259
TOKENIZER = byte_tokenizer()


@torch.no_grad()
def value_model(head="mlp", **changes):
    model = ValueModel(random_decoder(**SIZES | changes), head)
    for parameter in model.value_head.parameters():
        parameter.normal_(std=0.3)
    return model


def save(model, folder, **options):
    save_value_model(model, folder, tokenizer=TOKENIZER, settings={"loss": "pairwise"}, **options)


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_values_start_at_zero_and_are_a_head_on_the_hidden_states(head):
    model = ValueModel(random_decoder(**SIZES), head)
    assert (model(TOKENS) == 0).all()
    model = value_model(head)
    hidden = model.backbone.hidden_states(TOKENS)[0]
    out = model.value_head.out
    if head == "mlp":
        hidden = torch.nn.functional.silu(hidden @ model.value_head.hidden.weight.T + model.value_head.hidden.bias)
    values = (hidden * out.weight[0]).sum(dim=-1) + out.bias
    torch.testing.assert_close(model(TOKENS), values)
    kept = model(TOKENS, return_hidden=True)
    assert torch.equal(model(TOKENS, hidden=kept), model(TOKENS))


def test_a_value_depends_on_its_prefix_alone():
    model, changed = value_model(), TOKENS.clone()
    changed[:, 6:] = 5
    a, b = model(TOKENS), model(changed)
    assert torch.equal(a[:, :6], b[:, :6]) and (a[:, 6:] != b[:, 6:]).all()
    # Two documents in a row, then padding, are as each alone.
    ids = torch.tensor([[0] * 5 + [1] * 4 + [-1] * 3] * 2)
    packed = model(TOKENS, document_ids=ids)
    torch.testing.assert_close(packed[:, :5], model(TOKENS[:, :5]))
    torch.testing.assert_close(packed[:, 5:9], model(TOKENS[:, 5:9]))


def test_a_frozen_backbone_keeps_nothing_for_the_backward_pass():
    model = value_model()
    model.backbone.requires_grad_(False)
    hidden = model(TOKENS, return_hidden=True)
    assert hidden.grad_fn is None and not hidden.requires_grad
    model(TOKENS).sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters() if name.startswith("value_head.")}


def test_more_heads_and_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="num_future_tokens 1, got 2"):
        ValueModel(random_decoder(**SIZES, num_future_tokens=2))
    with pytest.raises(ValueError, match="head must be one of linear, mlp, got 'quadratic'"):
        ValueModel(random_decoder(**SIZES), "quadratic")


# ----------------------------------------------------------------------------------------------------------------------
# Saving and loading


@pytest.mark.parametrize(("head", "tied"), [("linear", True), ("mlp", False)])
def test_a_saved_model_gives_the_same_values_bit_for_bit(tmp_path, head, tied):
    model = value_model(head, tie_word_embeddings=tied)
    save(model, tmp_path / "value_model")
    assert [path.name for path in tmp_path.iterdir()] == ["value_model"]
    loaded = load_value_model(str(tmp_path / "value_model"))
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    about = value_model_config(tmp_path / "value_model")
    assert about["head"] == head and about["settings"] == {"loss": "pairwise"}
    assert value_tokenizer(tmp_path / "value_model").vocab_hash() == about["vocab_hash"] == TOKENIZER.vocab_hash()
    # The folder is a checkpoint like any other: a decoder of its backbone.
    decoder = from_checkpoint(tmp_path / "value_model")
    load_checkpoint(decoder, tmp_path / "value_model")
    assert torch.equal(decoder(TOKENS), model.backbone(TOKENS))
    with pytest.raises(FileExistsError, match="already exists"):
        save(model, tmp_path / "value_model")


def test_bfloat16_rounds_the_backbone_and_leaves_the_head(tmp_path):
    model = value_model()
    save(model, tmp_path / "small", dtype=torch.bfloat16)
    assert load_file(tmp_path / "small" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    loaded = load_value_model(tmp_path / "small", param_dtype=torch.bfloat16)
    assert loaded.backbone.norm.scale.dtype == torch.bfloat16
    for ours, theirs in zip(loaded.value_head.parameters(), model.value_head.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    values = loaded(TOKENS)
    assert values.dtype == torch.float32
    assert (values - values.bfloat16()).abs().max() > 0  # not merely rounded values in a wider type
    torch.testing.assert_close(values, model(TOKENS), atol=0.1, rtol=0.1)


def test_what_is_no_value_model_is_refused_in_one_line(tmp_path):
    model = value_model()
    export_hf(model.backbone, tmp_path / "plain")
    save(model, tmp_path / "good")
    weights, about = tmp_path / "good" / "value_head.safetensors", tmp_path / "good" / "value_model.json"
    head, config = load_file(weights), about.read_text()

    def refused(message, path=tmp_path / "good"):
        with pytest.raises(CheckpointError, match=message) as error:
            load_value_model(path)
        assert "\n" not in str(error.value)

    refused("plain holds no value model .*critic_stage1", tmp_path / "plain")
    refused("absent does not exist", tmp_path / "absent")
    weights.write_bytes(weights.read_bytes()[:-4])
    refused(r"value_head.safetensors \(\d+ bytes\) cannot be read, it may be truncated")
    save_file({"out.weight": head["out.weight"]}, weights)
    refused("a mlp head has")
    weights.unlink()
    refused("value_head.safetensors is missing")
    save_file(head, weights)
    about.write_text(json.dumps({k: v for k, v in json.loads(config).items() if k != "settings"}))
    refused("value_model.json lacks settings")
    about.write_text(json.dumps(json.loads(config) | {"vocab_size": 300}))
    refused("different sizes")
    about.write_text(json.dumps(json.loads(config) | {"vocab_hash": "0" * 64}))
    with pytest.raises(CheckpointError, match="not the one its value model was trained with"):
        value_tokenizer(tmp_path / "good")


# ----------------------------------------------------------------------------------------------------------------------
# Adapters


@torch.no_grad()
def trained_adapters(model):
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b.weight"):
            parameter.normal_(std=0.2)


def test_adapters_start_as_nothing_and_are_all_that_is_trained():
    model = value_model()
    before = model(TOKENS)
    add_lora(model.backbone, rank=4, targets=["q_proj", "w2"])
    assert torch.equal(model(TOKENS), before)
    model(TOKENS).sum().backward()
    trained = {name for name, parameter in model.backbone.named_parameters() if parameter.grad is not None}
    assert len(trained) == 3 * 2 * 2 and all(".q_proj.lora_" in name or ".w2.lora_" in name for name in trained)


def test_saved_and_merged_adapters_give_the_same_values(tmp_path):
    model = value_model()
    before = model(TOKENS)
    add_lora(model.backbone, rank=4)
    trained_adapters(model)
    values = model(TOKENS)
    assert (values - before).abs().max() > 0.1
    save(model, tmp_path / "merged")
    torch.testing.assert_close(load_value_model(tmp_path / "merged")(TOKENS), values, atol=1e-5, rtol=1e-5)
    assert torch.equal(model(TOKENS), values)  # the model itself keeps its adapters


def test_a_forgotten_start_of_adapters_shows(tmp_path):
    """On the meta device a checkpoint fills the weights; adapters are NaN until init_lora, then as without meta."""
    source = random_decoder(**SIZES)
    export_hf(source, tmp_path / "source")
    with torch.device("meta"):
        model = add_lora(from_checkpoint(tmp_path / "source"), rank=4)
    load_checkpoint(model, tmp_path / "source")
    assert model(TOKENS).isnan().all()
    init_lora(model)
    assert torch.equal(model(TOKENS), source(TOKENS))
    plain = add_lora(random_decoder(**SIZES), rank=4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    init_lora(plain, seed=1)
    assert not torch.equal(plain.layers[0].attn.q_proj.lora_a.weight, model.layers[0].attn.q_proj.lora_a.weight)
    bound = SIZES["embed_dim"] ** -0.5
    assert 0.9 * bound < plain.layers[0].attn.q_proj.lora_a.weight.abs().max() <= bound


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be a whole number >= 1, got 0"),
        ({"alpha": -1.0}, "alpha must be a number > 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"targets": ["q_proj", "w4"]}, "targets must be one or more of q_proj, .*, got w4"),
        ({"targets": []}, "got none"),
    ],
)
def test_adapters_with_wrong_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        add_lora(random_decoder(**SIZES), **options)


# ----------------------------------------------------------------------------------------------------------------------
# Two processes


def on_two_processes(rank, folder):
    torch.set_num_threads(1)
    folder = Path(folder)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))

    plain, sharded = load_value_model(folder / "source"), load_value_model(folder / "source", mesh=mesh)
    torch.testing.assert_close(sharded(TOKENS), plain(TOKENS), atol=1e-6, rtol=1e-6)
    save(sharded, folder / "sharded")
    ours, theirs = ({f.name: f.read_bytes() for f in (folder / n).iterdir()} for n in ("sharded", "source"))
    assert len(ours) > 5 and ours == theirs

    # In bfloat16 the weights of the blocks are rounded as they are gathered, those of the head are not.
    rounded = load_value_model(folder / "source", mesh=mesh, param_dtype=torch.bfloat16)
    hidden = rounded(TOKENS, return_hidden=True)
    assert hidden.dtype == torch.bfloat16
    torch.testing.assert_close(rounded(TOKENS), plain.value_head(hidden), atol=1e-6, rtol=1e-6)
    # So it stores them: rounded when they are read, they are the same bits as when they are gathered.
    assert {p.dtype for p in rounded.backbone.parameters()} == {torch.bfloat16}
    with torch.device("meta"):
        stored = from_checkpoint(folder / "source", num_future_tokens=1)
    shard_model(stored, mesh, param_dtype=torch.bfloat16)
    load_checkpoint(stored, folder / "source")
    assert {p.dtype for p in stored.parameters()} == {torch.float32}
    states = stored(TOKENS, loss_fn=lambda hidden, unembedding, document_ids: hidden[0])
    assert torch.equal(states, hidden)

    # Adapters and a new head start equal on all ranks, and equal to the unsharded model's.
    def adapted(device):
        with torch.device(device):
            model = ValueModel(add_lora(from_checkpoint(folder / "source"), rank=3), "mlp")
        if device == "meta":
            shard_model(model, mesh, param_dtype=torch.float32)
            model.to_empty(device="cpu")
        load_checkpoint(model.backbone, folder / "source")
        init_lora(model.backbone, seed=5)
        model.value_head.init_weights(5)
        return model

    for whole, part in zip(adapted("cpu").parameters(), adapted("meta").parameters(), strict=True):
        assert torch.equal(whole, part.full_tensor())
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.long
@pytest.mark.slow
def test_two_processes_give_and_save_what_one_does(tmp_path):
    save(value_model(), tmp_path / "source")
    fork_server()
    mp.start_processes(on_two_processes, (str(tmp_path),), nprocs=2, start_method="forkserver")
