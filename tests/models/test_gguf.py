"""GGUF files: written here from `transformers` models and tokenizers, whose logits and ids the conversion must give."""

import io
import json
import os

import gguf
import pytest
import sentencepiece
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from wmtp.models import from_checkpoint, load_checkpoint
from wmtp.pretrained import CheckpointError, hf_tokenizer, read_shape, resolve_checkpoint
from wmtp.pretrained.checkpoint_formats import is_rotated, key_of, to_interleaved

TOKENS = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(2))
TEXTS = ["def f(x):\n    return 10 + x  # café, 2048 of 日本語", "It's 12345.67  and\n\n\t\tI'LL see  ", " a  b"]
SPECIAL = ["<|begin|>", "<|end|>", "<|turn|>"]
LLAMA3_SPLIT = (  # from Llama 3's tokenizer.json
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
PRE = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"), BYTES]),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WMTP_CACHE", str(tmp_path / "cache"))


def byte_level(pre):
    """A `tokenizers` BPE of 300 ids, SPECIAL last, that cuts text as Llama-family models of that kind do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = PRE[pre]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=297, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def bpe_fields(pre, tokenizer):
    ids = tokenizer.get_vocab()
    tokens = sorted(ids, key=ids.get)
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": ids["<|begin|>"],
        "tokenizer.ggml.eos_token_id": ids["<|end|>"],
    }


@pytest.fixture(scope="module")
def gpt2_fields():
    return bpe_fields("gpt-2", byte_level("gpt-2"))


def write_gguf(file, hf, fields, *, tensors=None):
    """A `transformers` model in float32 as llama.cpp's converter writes it; a field that is None is left out."""
    config = hf.config
    fields = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": config.rope_parameters["rope_theta"],
        "llama.vocab_size": config.vocab_size,
        "general.name": "tiny",
        **fields,
    }
    writer = GGUFWriter(file, "llama")
    for key, value in fields.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if value is not None:
            add.get(type(value), writer.add_array)(key, value)
    for key, tensor in {**gguf_tensors(hf), **(tensors or {})}.items():
        writer.add_tensor(key, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def gguf_tensors(hf):
    state, config = hf.state_dict(), hf.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    rotated = {
        key_of(name, "hf")
        for i in range(config.num_hidden_layers)
        for name in (f"layers.{i}.attn.q_proj.weight", f"layers.{i}.attn.k_proj.weight")
        if is_rotated(name)
    }
    found = {}
    for key, tensor in state.items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        tensor = to_interleaved(tensor, config.head_dim) if key in rotated else tensor
        found[names.get_name(key, try_suffixes=(".weight",))] = tensor.contiguous()
    return found


def logits_of(file):
    folder = resolve_checkpoint(file)
    model = from_checkpoint(folder)
    load_checkpoint(model, folder)
    with torch.no_grad():
        return model(TOKENS)[0]


def refused(file, *parts):
    with pytest.raises(CheckpointError) as error:
        resolve_checkpoint(file)
    message = str(error.value)
    assert "\n" not in message and str(file) in message and all(part in message for part in parts), message


@pytest.mark.parametrize("tied", [True, False])
def test_logits_and_config_are_the_models(tiny_hf, tmp_path, gpt2_fields, tied):
    hf, _ = tiny_hf(
        vocab_size=300, tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 1e5}
    )
    turn = {"tokenizer.ggml.eot_token_id": gpt2_fields["tokenizer.ggml.tokens"].index("<|turn|>")}
    known = {"llama.rope.scaling.type": "none", "llama.expert_count": 0, "quantize.imatrix.file": "x.dat"}
    file = write_gguf(
        tmp_path / "m.gguf", hf, {**gpt2_fields, **turn, **known}, tensors={"rope_freqs.weight": torch.ones(3)}
    )
    with torch.no_grad():
        torch.testing.assert_close(logits_of(file), hf(TOKENS).logits, atol=1e-5, rtol=1e-5)
    shape = read_shape(resolve_checkpoint(file))
    assert (shape.rope_base, shape.rope_scaling, shape.tie_word_embeddings) == (1e5, None, tied)
    config = json.loads((resolve_checkpoint(file) / "config.json").read_text())
    assert config["eos_token_id"] == [gpt2_fields["tokenizer.ggml.eos_token_id"], *turn.values()]
    assert config["bos_token_id"] == gpt2_fields["tokenizer.ggml.bos_token_id"]


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3s_scaling_is_read_from_its_tensor(tiny_hf, tmp_path, gpt2_fields, factor):
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    hf, _ = tiny_hf(vocab_size=300, head_dim=32, max_position_embeddings=131_072, rope_parameters=rope)
    plain = 5e5 ** -(torch.arange(0, 32, 2) / 32)
    factors = plain / hf.model.rotary_emb.inv_freq  # as llama.cpp's converter has it
    for end in (1, factor):  # which that writes exactly
        factors[(factors / end - 1).abs() < 1e-5] = end
    assert factors.min() == 1 and factors.max() == factor and len(factors.unique()) == 3
    file = write_gguf(tmp_path / "m.gguf", hf, gpt2_fields, tensors={"rope_freqs.weight": factors})
    shape = read_shape(resolve_checkpoint(file))
    assert shape.rope_scaling == {key: value for key, value in rope.items() if key != "rope_theta"}
    odd = factors.clone()
    odd[8] *= 1.01  # the one between
    file = write_gguf(tmp_path / "odd.gguf", hf, gpt2_fields, tensors={"rope_freqs.weight": odd})
    refused(file, "rope_freqs.weight scales RoPE in another way than Llama 3")


def test_what_changes_the_computation_is_refused(tiny_hf, tmp_path, gpt2_fields):
    hf, _ = tiny_hf(vocab_size=300)
    for change, part in (
        ({"llama.rope.scaling.type": "linear"}, "llama.rope.scaling.type must be 'none', got 'linear'"),
        ({"llama.rope.scaling.type": "yarn"}, "got 'yarn'"),
        ({"llama.rope.scaling.factor": 4.0}, "llama.rope.scaling.factor must be 1, got 4.0"),
        ({"llama.attention.sliding_window": 8}, "llama.attention.sliding_window is 8, which WMTP does not know"),
        ({"llama.expert_count": 8}, "llama.expert_count must be 0, got 8"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count must be 6, got 4"),
        ({"llama.vocab_size": 299}, "llama.vocab_size must be 300, got 299"),
        ({"llama.block_count": None}, "lacks llama.block_count"),
        ({"tokenizer.ggml.pre": "qwen2"}, "tokenizer.ggml.pre 'qwen2' is none whose token ids are known"),
        ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre None is none whose token ids are known"),
        ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model must be 'llama' or 'gpt2', got 't5'"),
        ({"tokenizer.ggml.lowercase": True}, "tokenizer.ggml.lowercase is True, which WMTP does not know"),
    ):
        refused(write_gguf(tmp_path / "m.gguf", hf, {**gpt2_fields, **change}), part)


@pytest.mark.parametrize("pre", PRE)
def test_ids_are_the_original_tokenizers(tiny_hf, tmp_path, pre):
    hf, _ = tiny_hf(vocab_size=300)
    original = byte_level(pre)
    fields = bpe_fields(pre, original)
    texts = TEXTS
    if pre == "llama-bpe":  # a token that the merges do not make, as Llama 3 has some: it counts as a whole piece alone
        spec = json.loads(original.to_str())
        merges = spec["model"]["merges"]
        last = max(i for i, merge in enumerate(merges) if "".join(merge).isascii() and "".join(merge).isalpha())
        token = "".join(merges.pop(last))
        assert fields["tokenizer.ggml.merges"].pop(last).replace(" ", "") == token
        spec["model"]["ignore_merges"] = True
        original = Tokenizer.from_str(json.dumps(spec))
        assert original.encode(token, add_special_tokens=False).tokens == [token]
        texts = [*TEXTS, token]
    read = hf_tokenizer(write_gguf(tmp_path / "m.gguf", hf, fields))
    for text in texts:
        assert read.encode(text) == original.encode(text, add_special_tokens=False).ids
    assert read.vocab() == original.get_vocab()
    # llama.cpp adds BOS to Llama 3's texts where the file says nothing, and to no other byte-level model's.
    assert read.add_bos == (pre == "llama-bpe")
    fields["tokenizer.ggml.add_bos_token"] = pre != "llama-bpe"
    assert hf_tokenizer(write_gguf(tmp_path / "m.gguf", hf, fields)).add_bos == (pre != "llama-bpe")


@pytest.mark.parametrize("prefix", [True, False])
def test_ids_are_sentencepieces(tiny_hf, tmp_path, prefix):
    hf, _ = tiny_hf(vocab_size=330)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3), model_writer=model, vocab_size=330, model_type="bpe", byte_fallback=True,
        add_dummy_prefix=prefix, remove_extra_whitespaces=False, normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    original = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(original.vocab_size())
    types = [
        2 if original.is_unknown(i) else 3 if original.is_control(i) else 6 if original.is_byte(i) else 1 for i in ids
    ]
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [original.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [original.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    file = write_gguf(tmp_path / "m.gguf", hf, fields)
    from transformers import AutoTokenizer

    read = AutoTokenizer.from_pretrained(resolve_checkpoint(file))
    for text in TEXTS[:2]:
        assert read(text, add_special_tokens=False).input_ids == original.encode(text)
        assert read.decode(original.encode(text)) == text
    assert hf_tokenizer(file).add_bos


def test_files_that_look_alike_are_converted_apart(tiny_hf, tmp_path, gpt2_fields):
    """Of one name, size and mtime: a cache that is keyed by these gives the first model for the second."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    hf, _ = tiny_hf(vocab_size=300)
    first = write_gguf(tmp_path / "a" / "m.gguf", hf, gpt2_fields)
    with torch.no_grad():
        hf.model.norm.weight.mul_(2)
    second = write_gguf(tmp_path / "b" / "m.gguf", hf, gpt2_fields)
    for file in (first, second):
        os.utime(file, ns=(10**18, 10**18))
    assert first.stat().st_size == second.stat().st_size and first.stat().st_mtime_ns == second.stat().st_mtime_ns
    norms = [load_file(resolve_checkpoint(file) / "model.safetensors")["model.norm.weight"] for file in (first, second)]
    assert torch.equal(norms[0] * 2, norms[1])
    first.write_bytes(second.read_bytes())  # in place
    os.utime(first, ns=(10**18, 10**18))
    assert resolve_checkpoint(first) == resolve_checkpoint(second)
