"""recipes/export.py: what it writes is the model that it read, bit for bit, or it refuses."""

import json
from pathlib import Path

import pytest
import torch
from family_parity import FAMILIES, write_case
from omegaconf import OmegaConf
from random_models import random_decoder

from recipes.export import ExportRecipe
from wmtp.config import ConfigError
from wmtp.models import add_lora, export_hf, from_checkpoint, init_lora, load_adapter, load_checkpoint, save_adapter
from wmtp.pretrained import CheckpointError, byte_tokenizer, checkpoint_sha256

SIZES = {
    "vocab_size": 259,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 24,
    "intermediate_dim": 40,
    "max_seq_len": 32,
    "num_future_tokens": 3,
}
TOKENS = torch.arange(24).view(2, 12) * 7 % 67


def export(**keys):
    keys = {key: str(value) if isinstance(value, Path) else value for key, value in keys.items()}
    recipe = ExportRecipe(OmegaConf.create(keys))
    recipe.setup()
    recipe.export()


def source(folder, dtype=torch.float32, **changes):
    export_hf(random_decoder(**SIZES | changes), folder, tokenizer_source=byte_tokenizer(), dtype=dtype)
    return folder


def state(folder, dtype=torch.float32):
    model = from_checkpoint(folder).to(dtype)
    load_checkpoint(model, folder)
    return model.state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], tensor) for name, tensor in other.items())


def weights(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.suffix == ".safetensors" or f.name == "config.json"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaling", [None, 8.0])
def test_to_metas_format_and_back_every_bit_is_the_same(tmp_path, dtype, scaling):
    llama3 = {"rope_type": "llama3", "factor": scaling, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 8192
    source(tmp_path / "hf", dtype, rope_scaling=llama3 if scaling else None)
    export(checkpoint=tmp_path / "hf", folder=tmp_path / "meta", format="meta")
    export(checkpoint=tmp_path / "meta", folder=tmp_path / "back")
    assert same(state(tmp_path / "meta", dtype), state(tmp_path / "hf", dtype))
    first, last = weights(tmp_path / "hf"), weights(tmp_path / "back")
    assert first.keys() == last.keys()
    assert all(first[name] == last[name] for name in first if name.endswith("safetensors"))
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    assert (params["n_layers"], params["n_future_tokens"], params.get("rope_scaling_factor")) == (5, 3, scaling)
    # The width that Meta's own code computes.
    width = int(params.get("ffn_dim_multiplier", 1) * int(2 * 4 * params["dim"] / 3))
    assert -(-width // params["multiple_of"]) * params["multiple_of"] == SIZES["intermediate_dim"]
    record = json.loads((tmp_path / "back" / "wmtp_export.json").read_text())
    assert record["checkpoint_sha256"] == checkpoint_sha256(tmp_path / "meta")
    assert (record["dtype"], record["num_future_tokens"]) == (str(dtype).removeprefix("torch."), 3)
    before = checkpoint_sha256(tmp_path / "back")
    (tmp_path / "back" / "wmtp_export.json").unlink()  # says where it came from, and is no part of the model
    assert checkpoint_sha256(tmp_path / "back") == before


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"tie_word_embeddings": True}, "tie_word_embeddings True, .*set untie=true"),
        ({"head_dim": 8}, "head_dim 8, its readers would take 6; use format=hf"),
    ],
)
def test_what_metas_format_has_no_place_for_is_refused_by_name(tmp_path, changes, named):
    source(tmp_path / "hf", **changes)
    with pytest.raises(CheckpointError, match=f"Meta's format has no place for {named}"):
        export(checkpoint=tmp_path / "hf", folder=tmp_path / "meta", format="meta")
    assert not (tmp_path / "meta").exists()


@pytest.mark.parametrize(
    "name, named",
    [
        ("Qwen2, Qwen2.5, their -Coder", "model.layers.0.self_attn.q_proj.bias"),
        ("Qwen3, dense", "model.layers.0.self_attn.q_norm.weight"),
        ("OLMo 2", "model.layers.0.self_attn.q_norm.weight"),
        ("Granite 3", "embedding_multiplier 12.0, its readers would take 1.0"),
        ("Phi-3 of 4k, Phi-4", "sliding_window 8, its readers would take None"),
        ("DeepSeek-Coder", "rope_scaling .*'linear'"),
    ],
)
def test_other_families_leave_as_they_are_and_not_in_metas_format(tmp_path, name, named, capfd):
    folder = write_case(tmp_path, *FAMILIES[name]).folder
    export(checkpoint=folder, folder=tmp_path / "heads", num_future_tokens=3)
    assert f"heads 2 to 3 are new, {folder} lacks them" in capfd.readouterr().out
    export(checkpoint=tmp_path / "heads", folder=tmp_path / "again")
    assert weights(tmp_path / "heads") == weights(tmp_path / "again")
    with pytest.raises(CheckpointError, match=f"Meta's format has no place for {named}"):
        export(checkpoint=tmp_path / "heads", folder=tmp_path / "meta", format="meta")


def test_a_mistral_without_a_window_is_a_llama_to_metas_format(tmp_path):
    folder = write_case(tmp_path, "mistral", {"sliding_window": None}).folder
    export(checkpoint=folder, folder=tmp_path / "meta", format="meta")
    assert same(state(tmp_path / "meta"), state(folder))


def test_a_tied_model_goes_untied_where_that_is_asked_for(tmp_path):
    source(tmp_path / "hf", tie_word_embeddings=True)
    export(checkpoint=tmp_path / "hf", folder=tmp_path / "meta", format="meta", untie=True)
    tied, untied = state(tmp_path / "hf"), state(tmp_path / "meta")
    assert torch.equal(untied.pop("output.weight"), tied["tok_embeddings.weight"]) and same(tied, untied)


def test_fewer_heads_another_dtype_and_no_folder_written_over(tmp_path):
    source(tmp_path / "hf")
    export(checkpoint=tmp_path / "hf", folder=tmp_path / "one", num_future_tokens=1, dtype="fp16")
    assert not list((tmp_path / "one").glob("m*_*"))  # neither heads nor code
    whole = {name: tensor.half() for name, tensor in state(tmp_path / "hf").items() if "extra_heads" not in name}
    assert same(state(tmp_path / "one", torch.float16), whole)
    for folder, error in ((tmp_path / "one", FileExistsError), ("s3://bucket/x", ConfigError)):
        with pytest.raises(error, match=r"already exists|wmtp\.storage upload"):
            export(checkpoint=tmp_path / "hf", folder=folder)
    for keys, says in (
        ({"merge": False}, "keeps an adapter apart, and there is none"),
        ({"merge": False, "adapter": tmp_path, "format": "meta"}, "no place for an adapter that is not merged"),
    ):
        with pytest.raises(ConfigError, match=says):
            export(checkpoint=tmp_path / "hf", folder=tmp_path / "two", **keys)


def adapted(base, folder, **options):
    """A model whose every trained parameter is random, saved as an adapter of that base."""
    model = from_checkpoint(base)
    load_checkpoint(model, base)
    add_lora(model, **{"rank": 4, "heads": "full", **options})
    init_lora(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    save_adapter(model, folder, base_weights=checkpoint_sha256(base))
    return model.eval().requires_grad_(False)


def test_an_adapter_leaves_merged_as_the_training_merges_it(tmp_path):
    source(tmp_path / "hf")
    model = adapted(tmp_path / "hf", tmp_path / "adapter", heads="lora")
    export_hf(model, tmp_path / "expected", tokenizer_source=byte_tokenizer())
    export(checkpoint=tmp_path / "hf", adapter=tmp_path / "adapter", folder=tmp_path / "merged")
    assert weights(tmp_path / "merged") == weights(tmp_path / "expected")
    record = json.loads((tmp_path / "merged" / "wmtp_export.json").read_text())
    assert record["adapter_sha256"] == checkpoint_sha256(tmp_path / "adapter") and record["merged"]
    with pytest.raises(ConfigError, match="adapters on the extra heads"):
        export(checkpoint=tmp_path / "hf", adapter=tmp_path / "adapter", folder=tmp_path / "apart", merge=False)
    source(tmp_path / "other", rope_base=5.0)
    with pytest.raises(CheckpointError, match="belongs to another base"):
        export(checkpoint=tmp_path / "other", adapter=tmp_path / "adapter", folder=tmp_path / "wrong")
    assert not (tmp_path / "apart").exists() and not (tmp_path / "wrong").exists()


def test_an_adapter_left_apart_is_put_on_all_heads_by_peft_and_by_wmtp(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is a development tool: make setup")
    from transformers import AutoModelForCausalLM

    source(tmp_path / "hf")
    model = adapted(tmp_path / "hf", tmp_path / "adapter", train_norms=True)
    export(checkpoint=tmp_path / "hf", adapter=tmp_path / "adapter", folder=tmp_path / "apart", merge=False)
    base, adapter = tmp_path / "apart" / "base", tmp_path / "apart" / "adapter"
    theirs = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True)
    theirs = peft.PeftModel.from_pretrained(theirs, str(adapter)).requires_grad_(False)
    torch.testing.assert_close(theirs(TOKENS, num_heads=3).head_logits, model(TOKENS), atol=1e-4, rtol=1e-4)
    ours = from_checkpoint(base)
    load_checkpoint(ours, base)
    add_lora(ours, rank=4, heads="full", train_norms=True)
    load_adapter(ours, adapter, base_weights=checkpoint_sha256(base))
    assert torch.equal(ours.eval()(TOKENS), model(TOKENS))
