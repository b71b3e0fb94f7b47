"""A checkpoint whose files say two things, or something that nobody reads, is refused by name."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from wmtp.errors import UserError
from wmtp.models import export_hf, from_checkpoint, llama_mtp, load_checkpoint
from wmtp.pretrained import CheckpointError, read_shape

TOKENS = torch.randint(0, 67, (2, 24), generator=torch.Generator().manual_seed(2))


def edit_config(folder, name="config.json", **changes):
    file = folder / name
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value != "gone"}))


def edit_weights(folder, edit, name="model.safetensors"):
    weights = load_file(folder / name)
    edit(weights)
    save_file(weights, folder / name, metadata={"format": "pt"})


def refused(folder, *parts):
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(from_checkpoint(folder), folder)
    message = str(error.value)
    assert "\n" not in message and str(folder) in message and all(part in message for part in parts), message


def same_logits(folder):
    """Logits that `transformers` gives too."""
    from transformers import AutoModelForCausalLM

    model = from_checkpoint(folder)
    load_checkpoint(model, folder)
    with torch.no_grad():
        logits = model(TOKENS)[0]
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(TOKENS).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    return logits


def test_a_tied_model_with_another_unembedding_needs_a_decision(tiny_hf):
    _, folder = tiny_hf(tie_word_embeddings=True)
    tied = same_logits(folder)
    other = torch.randn(67, 24, generator=torch.Generator().manual_seed(3)) * 0.2
    edit_weights(folder, lambda weights: weights.update({"lm_head.weight": other}))
    refused(folder, "tie_word_embeddings true, but lm_head.weight is not model.embed_tokens.weight", "set it to false")
    edit_config(folder, tie_word_embeddings=False)  # the one way out
    untied = same_logits(folder)
    assert (untied - tied).abs().max() > 1
    edit_config(folder, tie_word_embeddings=True)  # the other
    edit_weights(folder, lambda weights: weights.pop("lm_head.weight"))
    assert torch.equal(same_logits(folder), tied)
    edit_weights(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].double()}))
    assert torch.equal(same_logits(folder), tied)  # the same values in another dtype


def test_files_of_two_models_in_one_folder(tiny_hf, tmp_path):
    _, shards = tiny_hf("shards", max_shard_size="8KB")
    index, shard = shards / "model.safetensors.index.json", sorted(shards.glob("model-*.safetensors"))[0]
    good = index.read_text()
    _, single = tiny_hf("single")
    (shards / "model.safetensors").write_bytes((single / "model.safetensors").read_bytes())
    refused(shards, "model.safetensors beside the files that model.safetensors.index.json names: two models")
    index.rename(tmp_path / "index")
    refused(shards, f"{shard.name} beside model.safetensors: two models")
    (tmp_path / "index").rename(index)
    (shards / "model.safetensors").unlink()
    (shards / "model-00001-of-00002.safetensors").write_bytes(shard.read_bytes())
    refused(shards, "model-00001-of-00002.safetensors beside the files that model.safetensors.index.json names")
    (shards / "model-00001-of-00002.safetensors").unlink()

    weight_map = json.loads(good)["weight_map"]
    key, elsewhere = "model.norm.weight", next(f for f in weight_map.values() if f != weight_map["model.norm.weight"])
    index.write_text(json.dumps({"weight_map": {**weight_map, key: elsewhere}}))
    refused(shards, f"{index} has {key} in {elsewhere}, it lies in {weight_map[key]}")
    index.write_text(json.dumps({"weight_map": {**weight_map, "model.more.weight": elsewhere}}))
    refused(shards, f"has model.more.weight in {elsewhere}, it lies in no file")
    index.write_text(good)
    edit_weights(shards, lambda weights: weights.update({key: torch.ones(24)}), elsewhere)
    refused(shards, "both hold model.norm.weight")

    torch.save({}, single / "consolidated.pth")
    same_logits(single)  # without params.json it is not a checkpoint
    (single / "params.json").write_text("{}")
    refused(single, "holds two checkpoints, params.json with consolidated.pth and HF's config.json")
    (single / "params.json").unlink()
    (single / "adapter_config.json").write_text("{}")
    refused(single, "holds a model and an adapter (adapter_config.json)")
    (single / "config.json").unlink()
    refused(single, "it is an adapter: give the checkpoint that it was trained on")
    (tmp_path / "quants").mkdir()
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / "quants" / name).write_bytes(b"")
    refused(tmp_path / "quants", f"give the file itself, {tmp_path / 'quants' / 'a.gguf'}")


def test_heads_are_declared_and_there_or_neither(tiny_hf, tmp_path):
    _, folder = tiny_hf()
    model = from_checkpoint(folder, num_future_tokens=3)
    load_checkpoint(model, folder)
    export_hf(model, tmp_path / "export")
    assert read_shape(tmp_path / "export").num_future_tokens == 3
    edit_config(tmp_path / "export", num_future_tokens=4)
    refused(tmp_path / "export", "declares num_future_tokens 4, mtp_config.json gives 3")
    edit_config(tmp_path / "export", num_future_tokens=3)
    assert read_shape(tmp_path / "export").num_future_tokens == 3
    edit_config(tmp_path / "export", "mtp_config.json", head_kind="sequential")
    refused(tmp_path / "export", "mtp_config.json: head_kind is 'sequential', which WMTP does not know")
    (tmp_path / "export" / "mtp_config.json").unlink()
    refused(tmp_path / "export", "mtp_config.json is missing, mtp_heads.safetensors lies there")
    (tmp_path / "export" / "mtp_heads.safetensors").unlink()
    refused(tmp_path / "export", "declares num_future_tokens 3, mtp_config.json is missing")
    (tmp_path / "export" / "mtp_config.json").write_text('{"num_future_tokens": 3}')
    refused(tmp_path / "export", "mtp_heads.safetensors is missing, mtp_config.json declares 3 heads")


def test_heads_that_are_there_are_not_passed_over(tiny_hf, tmp_path):
    _, folder = tiny_hf()
    model = from_checkpoint(folder, num_future_tokens=3)
    load_checkpoint(model, folder)
    export_hf(model, tmp_path / "export")
    edit_config(tmp_path / "export", num_future_tokens=None)  # a key that says nothing
    assert read_shape(tmp_path / "export").num_future_tokens == 3
    edit_config(tmp_path / "export", "mtp_config.json", num_future_tokens=1)
    refused(tmp_path / "export", "mtp_heads.safetensors holds extra heads, mtp_config.json declares 1 head")
    for name in ("mtp_config.json", "mtp_heads.safetensors"):
        (tmp_path / "export" / name).unlink()
    assert read_shape(tmp_path / "export").num_future_tokens == 1


SIZES = {"vocab_size": 11, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "embed_dim": 8, "intermediate_dim": 9}


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"rope_scaling": "linear"}, "rope_scaling must be null or a mapping with rope_type and its factors, got 'lin"),
        ({"rope_scaling": {"rope_type": ["x"]}}, "rope_scaling type must be one of default, linear, dynamic"),
        (
            {"rope_scaling": {"rope_type": "default", "rope_theta": 500_000}},
            "rope_scaling of type 'default' has no rope_theta, got 500000; give it as rope_base",
        ),
        ({"head_dim": "4"}, "head_dim must be an even number >= 2 (RoPE turns pairs), got '4'"),
    ],
)
def test_a_builder_takes_nothing_that_it_does_not_read(change, part):
    with pytest.raises(UserError, match=re.escape(part)):
        llama_mtp(**SIZES, max_seq_len=8, **change)


def test_values_of_another_json_type_are_one_line(tiny_hf):
    _, folder = tiny_hf("one")
    for change, part in (
        ({"rope_scaling": "linear"}, "rope_scaling must be null or a mapping"),
        ({"rope_scaling": False}, "rope_scaling must be null or a mapping"),
        ({"rope_parameters": {"rope_type": ["x"]}}, "llama3, got ['x']"),
        ({"rms_norm_eps": None}, "mend it, or copy it again"),
    ):
        good = (folder / "config.json").read_text()
        edit_config(folder, **change)
        refused(folder, str(folder / "config.json"), part)
        (folder / "config.json").write_text(good)
    for text, part in (("[]", "must hold an object, {...}, got []"), ("[" * 10**5, "(100000 bytes) cannot be read")):
        (folder / "config.json").write_text(text)
        refused(folder, str(folder / "config.json"), part, "copy it again")
    _, shards = tiny_hf("shards", max_shard_size="8KB")
    for weight_map in ([], {"model.norm.weight": 3}):
        (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        refused(shards, "weight_map must name files, got ")


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types is ['full_attention'], which WMTP does not know"),
        ({"sliding_window": 8}, "sliding_window is 8, which WMTP does not know"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1, got 0.5"),
        ({"attention_dropout": 0.1}, "attention_dropout must be 0, got 0.1"),
        ({"rope_interleaved": True}, "rope_interleaved must be False, got True"),
        ({"rope_theta": 5e5}, "rope_theta says 500000.0, rope_parameters.rope_theta 10000.0"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_parameters says None, rope_scaling {'rope_type'"),
        ({"rope_scaling": {"rope_type": "yarn", "type": "llama3"}}, "got 'llama3', 'yarn'"),
        ({"rope_scaling": {"factor": 2.0}}, "of type 'default' has no factor, got 2.0"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "has no partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, "rope_parameters says None, rope_scaling {'rope_type'"),
        (
            {"rope_parameters": {"rope_type": "llama3", **LLAMA3}, "original_max_position_embeddings": 8},
            "original_max_position_embeddings says 8, rope_parameters 16",
        ),
        (
            {
                "rope_parameters": {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": None},
                "original_max_position_embeddings": 16,
            },
            "of type 'llama3' lacks original_max_position_embeddings",
        ),
        ({"hidden_size": "24"}, "hidden_size"),
    ],
)
def test_what_changes_the_computation_is_read_or_refused(tiny_hf, change, part):
    _, folder = tiny_hf()
    edit_config(folder, **change)
    refused(folder, "config.json", part)


# What config.json of SmolLM2-135M-Instruct, Llama 3.2, TinyLlama and unsloth's copies has beside LlamaConfig's keys.
FOUND = {
    "_attn_implementation_autoset": True,
    "_name_or_path": "somewhere",
    "is_llama_config": True,
    "max_sequence_length": 2048,
    "pretraining_tp": 2,
    "quantization_config": None,
    "rope_interleaved": False,
    "rope_parameters": "gone",
    "rope_scaling": {"rope_type": "llama3", **LLAMA3},
    "rope_theta": 500_000.0,
    "torch_dtype": "float32",
    "transformers.js_config": {"dtype": "q4"},
    "unsloth_fixed": True,
    # to_dict() of a LlamaConfig of transformers 4.57
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "diversity_penalty": 0.0,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "max_length": 20,
    "pruned_heads": {},
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "torchscript": False,
    "typical_p": 1.0,
    "use_bfloat16": False,
}


def test_configs_that_are_found_are_read(tiny_hf):
    from transformers import LlamaConfig

    _, folder = tiny_hf()
    plain = same_logits(folder)
    edit_config(folder, **{**LlamaConfig().to_dict(), **json.loads((folder / "config.json").read_text()), **FOUND})
    assert (same_logits(folder) - plain).abs().max() > 1e-3  # the scaling counts
    edit_config(folder, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3})
    same_logits(folder)  # both spellings, saying the same


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_named(tiny_hf, prefix):
    _, folder = tiny_hf()
    weights = load_file(folder / "model.safetensors")
    save_file({f"{prefix}{key}": tensor for key, tensor in weights.items()}, folder / "model.safetensors")
    refused(folder, f"{prefix}model.embed_tokens.weight should be model.embed_tokens.weight", "rename the keys")


def test_the_prefix_of_compiled_blocks_is_named(tiny_hf):
    _, folder = tiny_hf()
    weights = load_file(folder / "model.safetensors")
    renamed = {key.replace("layers.1.", "layers.1._orig_mod."): tensor for key, tensor in weights.items()}
    save_file(renamed, folder / "model.safetensors")
    refused(folder, "model.layers.1._orig_mod.self_attn.q_proj.weight should be model.layers.1.self_attn.q_proj.weight")


def test_metas_params(tiny, tmp_path):
    model = tiny(head_dim=None)
    names = {"attn.q_proj": "attention.wq", "attn.k_proj": "attention.wk", "attn.v_proj": "attention.wv"}
    names |= {"attn.output_proj": "attention.wo", "mlp.": "feed_forward.", "sa_norm.scale": "attention_norm.weight"}
    names |= {"mlp_norm.scale": "ffn_norm.weight", "norm.scale": "norm.weight"}
    weights = model.state_dict()
    for ours, theirs in names.items():
        weights = {key.replace(ours, theirs): tensor for key, tensor in weights.items()}
    torch.save(weights, tmp_path / "consolidated.pth")
    params = {"dim": 24, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 67, "rope_theta": 500_000.0}
    file = tmp_path / "params.json"
    for change, part in (
        ({"use_scaled_rope": True}, "use_scaled_rope is true without rope_scaling_factor"),
        ({"vocab_size": 66}, "vocab_size is 66, the embedding has 67 rows"),
        ({"n_layers": None}, "lacks n_layers"),
        ({"n_layers": "3"}, "n_layers must be a whole number, got '3'"),
        ({"n_future_tokens": [2]}, "n_future_tokens must be a whole number, got [2]"),
        ({"n_kv_heads": 0}, "num_kv_heads must be a whole number >= 1, got 0"),
        ({"sliding_window": 8}, "sliding_window is 8, which WMTP does not know"),
        ({"quantization_args": {"group_size": 32}}, "quantization_args is {'group_size': 32}"),
    ):
        file.write_text(json.dumps({**params, **change}))
        refused(tmp_path, str(file), part)
    silent = dict.fromkeys(("n_future_tokens", "max_seq_len", "norm_eps", "vocab_size"))
    file.write_text(json.dumps({**params, **silent}))
    assert from_checkpoint(tmp_path).config == replace(model.config, rope_base=5e5, max_seq_len=4096)
    scaled = {"use_scaled_rope": True, "rope_scaling_factor": 32, "multiple_of": 8, "max_batch_size": 4}
    file.write_text(json.dumps({**params, **scaled, "max_seq_len": 32}))
    meta = from_checkpoint(tmp_path)
    load_checkpoint(meta, tmp_path)
    export_hf(meta, tmp_path / "hf")
    # Its export's logits are transformers': with the frequencies of Meta's apply_scaling.
    assert torch.equal(same_logits(tmp_path / "hf"), meta(TOKENS)[0])
    rope = json.loads((tmp_path / "hf" / "config.json").read_text())["rope_parameters"]
    assert (rope["factor"], rope["original_max_position_embeddings"]) == (32, 8192)
    torch.save({f"module.{key}": tensor for key, tensor in weights.items()}, tmp_path / "consolidated.pth")
    refused(tmp_path, "module.tok_embeddings.weight should be tok_embeddings.weight")
