import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from wmtp.models import checkpoint_activations, export_hf, from_checkpoint, load_checkpoint
from wmtp.pretrained import read_shape

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
TOKENS = torch.randint(0, 67, (2, 24), generator=torch.Generator().manual_seed(2))


def loaded(folder, **changes):
    model = from_checkpoint(folder, **changes)
    load_checkpoint(model, folder)
    return model


def seven_and_nine():
    """A tokenizer of `transformers` whose BOS is 7 and whose EOS is 9."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "<s>": 7, "</s>": 9}, unk_token="a")),
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{{ messages[0].content }}",
    )


def hf_logits(folder):
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(TOKENS).logits


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 10},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}},
        {"rope_parameters": LLAMA3_ROPE},
        {"rms_norm_eps": 1e-2},
        {"max_shard_size": "8KB"},
    ],
    ids=lambda changes: next(iter(changes), "gqa"),
)
def test_logits_equal_transformers_before_and_after_an_export(tiny_hf, tmp_path, changes):
    hf, folder = tiny_hf(**changes)
    assert len(list(folder.glob("model-*.safetensors"))) == (0 if "max_shard_size" not in changes else 10)
    with torch.no_grad():
        expected = hf(TOKENS).logits
    with torch.device("meta"):
        model = from_checkpoint(folder, num_future_tokens=3)
    load_checkpoint(model, folder)
    logits = model(TOKENS)
    for k in range(3):  # new heads are copies of the last block
        torch.testing.assert_close(logits[k], expected, atol=1e-5, rtol=1e-5)

    with torch.no_grad():  # heads that differ
        for parameter in model.extra_heads.parameters():
            parameter.add_(0.1)
    export_hf(model, tmp_path / "export", max_shard_bytes=8_000 if "max_shard_size" in changes else 5e9)
    torch.testing.assert_close(hf_logits(tmp_path / "export"), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(loaded(tmp_path / "export")(TOKENS), model(TOKENS))
    exported, original = read_shape(tmp_path / "export"), read_shape(folder)
    assert (exported.rope_base, exported.rope_scaling) == (original.rope_base, original.rope_scaling)
    weights = {}
    for file in (tmp_path / "export").glob("model*.safetensors"):
        assert file.stat().st_size < 12_000 or "max_shard_size" not in changes
        weights |= load_file(file)
    assert all(torch.equal(tensor, hf.state_dict()[key]) for key, tensor in weights.items())
    assert len(weights) == len(dict(hf.named_parameters()))


def test_config_files_of_older_transformers_are_understood(tiny_hf):
    hf, folder = tiny_hf(rope_parameters=LLAMA3_ROPE)
    config = json.loads((folder / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    config["rope_scaling"] = scaling
    config["torch_dtype"] = config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        torch.testing.assert_close(loaded(folder)(TOKENS)[0], hf(TOKENS).logits, atol=1e-5, rtol=1e-5)


def test_values_take_the_models_dtype_and_the_exports(tiny_hf, tmp_path):
    hf, folder = tiny_hf()
    model = from_checkpoint(folder).to(torch.bfloat16)
    load_checkpoint(model, folder)
    assert torch.equal(model.norm.scale, hf.model.norm.weight.to(torch.bfloat16))
    export_hf(loaded(folder), tmp_path / "half", dtype=torch.bfloat16)
    weights = load_file(tmp_path / "half" / "model.safetensors")
    assert torch.equal(weights["model.norm.weight"], hf.model.norm.weight.to(torch.bfloat16))
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_untied_model_takes_a_tied_checkpoints_embedding(tiny_hf, tiny):
    _, folder = tiny_hf(tie_word_embeddings=True)
    model = tiny(head_dim=None, tie_word_embeddings=False)
    load_checkpoint(model, folder)
    assert torch.equal(model.output.weight, model.tok_embeddings.weight)
    assert model.output.weight is not model.tok_embeddings.weight
    assert torch.equal(model(TOKENS), loaded(folder)(TOKENS))


def test_wrapped_blocks_load_and_export_alike(tiny_hf, tmp_path):
    _, folder = tiny_hf()
    with torch.device("meta"):
        wrapped = checkpoint_activations(from_checkpoint(folder, num_future_tokens=2))
    for block in (*wrapped.layers, *wrapped.extra_heads):
        block.compile()
    load_checkpoint(wrapped, folder)
    export_hf(wrapped, tmp_path / "wrapped")
    export_hf(loaded(folder, num_future_tokens=2), tmp_path / "plain")
    for file in ("model.safetensors", "mtp_heads.safetensors", "config.json"):
        assert (tmp_path / "wrapped" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_harmless_keys_are_passed_over(tiny_hf):
    hf, folder = tiny_hf(tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(loaded(folder)(TOKENS)[0], hf(TOKENS).logits, atol=1e-5, rtol=1e-5)


def test_an_export_carries_its_tokenizer_and_ids(tiny, tmp_path):
    from transformers import AutoTokenizer

    model = tiny()  # of no checkpoint
    tokenizer = seven_and_nine()
    export_hf(model, tmp_path / "object", tokenizer_source=tokenizer)
    export_hf(model, tmp_path / "folder", tokenizer_source=tmp_path / "object")
    export_hf(model, tmp_path / "none")
    for name in ("object", "folder"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert (config["bos_token_id"], config["eos_token_id"]) == (7, 9)
        again = AutoTokenizer.from_pretrained(tmp_path / name)
        assert again.get_vocab() == tokenizer.get_vocab() and again.chat_template == tokenizer.chat_template
    assert json.loads((tmp_path / "none" / "config.json").read_text())["eos_token_id"] is None


def test_an_export_is_its_sources_config_with_what_training_changed(tiny_hf, tmp_path):
    _, folder = tiny_hf(rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True, max_position_embeddings=48)
    said = json.loads((folder / "config.json").read_text())
    said |= {"eos_token_id": [5, 6], "bos_token_id": 4, "pad_token_id": 3, "pretraining_tp": 2}
    (folder / "config.json").write_text(json.dumps(said))
    generation = {"eos_token_id": 8, "temperature": 0.6, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    export_hf(loaded(folder, max_seq_len=16, num_future_tokens=3), tmp_path / "short", dtype=torch.bfloat16)
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    spelt = {"rope_theta": 500_000.0, "rope_scaling": scaling, "rope_parameters": LLAMA3_ROPE}
    changed = {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    heads = {"num_future_tokens": 3, "auto_map": {"AutoModelForCausalLM": "modeling_wmtp.LlamaForCausalLM"}}
    assert config == {**said, **spelt, **changed, **heads}
    assert json.loads((tmp_path / "short" / "generation_config.json").read_text()) == generation
    export_hf(loaded(folder, max_seq_len=64), tmp_path / "long")
    assert json.loads((tmp_path / "long" / "config.json").read_text())["max_position_embeddings"] == 64

    # An export of the export says the same, and a tokenizer's EOS, which training put at each end, joins the others.
    export_hf(loaded(tmp_path / "short", max_seq_len=16), tmp_path / "again", tokenizer_source=seven_and_nine())
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again == {**config, "eos_token_id": [5, 6, 9], "dtype": "float32", "torch_dtype": "float32"}
    again = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert again == {**generation, "eos_token_id": [8, 9]}
    assert loaded(tmp_path / "again").source.end_ids == [5, 6, 9, 8]


def test_ids_that_the_source_leaves_null_are_the_tokenizers(tiny_hf, tmp_path):
    _, folder = tiny_hf()
    said = json.loads((folder / "config.json").read_text())
    said |= {"eos_token_id": 5, "bos_token_id": None, "pad_token_id": None}
    (folder / "config.json").write_text(json.dumps(said))
    export_hf(loaded(folder), tmp_path / "with", tokenizer_source=seven_and_nine())
    config = json.loads((tmp_path / "with" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (7, [5, 9])
    export_hf(loaded(folder), tmp_path / "without")
    config = json.loads((tmp_path / "without" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (None, 5, None)


def test_an_export_never_overwrites_and_never_leaves_half(tiny_hf, tmp_path, monkeypatch):
    _, folder = tiny_hf()
    model, target = loaded(folder, num_future_tokens=2), tmp_path / "export"
    target.mkdir()
    with pytest.raises(FileExistsError, match="already exists; give another, or remove it"):
        export_hf(model, target)
    target.rmdir()
    with monkeypatch.context() as patch:
        patch.setattr("wmtp.models.export._write_configs", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export_hf(model, target)
    assert not target.exists()
    export_hf(model, target)  # what the failed one left does not disturb
    assert torch.equal(loaded(target)(TOKENS), model(TOKENS))
    model.register_parameter("value_head", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(ValueError, match="value_head has no place in an HF folder of llama; remove what was added"):
        export_hf(model, tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=r"has neither tokenizer\.json nor"):
        export_hf(loaded(folder), tmp_path / "other", tokenizer_source=folder)
