"""The adapter folder: peft reads it onto the `transformers` model, and it fits its own base alone."""

import json

import pytest
import torch
from random_models import random_decoder
from safetensors.torch import load_file, save_file

from wmtp.models import add_lora, export_hf, init_lora, load_adapter, save_adapter
from wmtp.pretrained import CheckpointError

SIZES = {
    "vocab_size": 67,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 24,
    "intermediate_dim": 40,
    "max_seq_len": 32,
    "num_future_tokens": 3,
}
TOKENS = torch.arange(24).view(2, 12) * 7 % 67
BASE = "ab" * 32


def adapted(seed=1, sizes=SIZES, **options):
    """A random base with adapters whose every trained parameter is random."""
    model = add_lora(random_decoder(**sizes), **{"rank": 4, "alpha": 6.0, "heads": "full", **options})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dora": True, "targets": ["q_proj", "k_proj", "w2"]},
        {"train_norms": True, "train_unembedding": True},
        {"train_norms": True, "train_unembedding": True, "dora": True, "sizes": SIZES | {"tie_word_embeddings": True}},
    ],
    ids=["lora", "dora", "norms", "tied"],
)
def test_peft_gives_the_same_head_1_logits(tmp_path, options):
    peft = pytest.importorskip("peft", reason="peft is a development tool: make setup")
    from transformers import AutoModelForCausalLM

    sizes = options.get("sizes", SIZES)
    export_hf(random_decoder(**sizes), tmp_path / "base")
    model = adapted(**options)
    save_adapter(model, tmp_path / "adapter", base_weights=BASE, base_name=str(tmp_path / "base"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = theirs(TOKENS).logits
    theirs = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        logits, expected = theirs(TOKENS).logits, model(TOKENS)[0]
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    loaded = {key.replace(".default", "").replace(".modules_to_save", "") for key in theirs.state_dict()}
    magnitudes = {key for key in stored if key.endswith("lora_magnitude_vector")}
    assert set(stored) - magnitudes <= loaded and {f"{key}.weight" for key in magnitudes} <= loaded


@pytest.mark.slow
@pytest.mark.parametrize("trunk", ["lora", "frozen"])
def test_what_is_saved_is_read_back_bit_for_bit(tmp_path, trunk):
    options = {"trunk": trunk, "heads": "lora", "dora": True, "train_norms": True}
    model, other = adapted(**options), adapted(2, **options)
    save_adapter(model, tmp_path / "adapter", base_weights=BASE)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert (tmp_path / "adapter" / "adapter_config.json").exists() == (trunk == "lora")
    assert not torch.equal(other(TOKENS), model(TOKENS))
    load_adapter(other, tmp_path / "adapter", base_weights=BASE)
    assert torch.equal(other(TOKENS), model(TOKENS))
    with pytest.raises(FileExistsError, match="already exists"):
        save_adapter(model, tmp_path / "adapter", base_weights=BASE)


def test_an_adapter_that_does_not_fit_is_refused_in_one_line(tmp_path):
    folder = tmp_path / "adapter"
    save_adapter(adapted(), folder, base_weights=BASE)

    def refused(message, base=BASE, folder=folder, **options):
        model = add_lora(random_decoder(**SIZES), **{"rank": 4, "alpha": 6.0, "heads": "full", **options})
        init_lora(model, seed=3)
        before = [parameter.clone() for parameter in model.parameters()]
        with pytest.raises(CheckpointError, match=message) as error:
            load_adapter(model, folder, base_weights=base)
        assert "\n" not in str(error.value)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

    refused("belongs to another base: it was trained on ababab.*, this one is cdcdcd", base="cd" * 32)
    refused("has rank 4, the model 8; set it to the adapter's", rank=8)
    refused("has alpha 6.0, the model 8.0", alpha=8.0)
    refused("has heads full, the model lora", heads="lora")
    refused(r"has targets \[.*the model \['q_proj'\]", targets=["q_proj"])
    refused("holds no adapter", folder=tmp_path)
    weights = folder / "adapter_model.safetensors"
    content = load_file(weights)
    key = next(iter(content))
    save_file({k: v for k, v in content.items() if k != key}, weights)
    refused("adapter_model.safetensors lacks it: ")
    save_file({**content, f"{key}.more": torch.zeros(1)}, weights)
    refused(f"{key}.more has no place in the model's adapters")
    weights.write_bytes(weights.read_bytes()[:-8])
    refused("may be truncated")
    weights.unlink()
    refused("adapter_model.safetensors is missing")
    about = folder / "wmtp_adapter.json"
    about.write_text(json.dumps({k: v for k, v in json.loads(about.read_text()).items() if k != "base_weights"}))
    refused("lacks base_weights")


def test_a_tied_embedding_is_one_in_the_adapter_too(tmp_path):
    options = {"sizes": SIZES | {"tie_word_embeddings": True}, "train_unembedding": True}
    save_adapter(adapted(**options), tmp_path / "adapter", base_weights=BASE)
    model = adapted(2, **options)
    load_adapter(model, tmp_path / "adapter", base_weights=BASE)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    content = load_file(weights)
    content["base_model.model.lm_head.weight"] += 1  # peft trains the two apart
    save_file(content, weights)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is not .*embed_tokens\.weight, and the model is tied"):
        load_adapter(model, tmp_path / "adapter", base_weights=BASE)
