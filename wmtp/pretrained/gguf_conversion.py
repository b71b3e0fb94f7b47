"""The conversion of a GGUF file of the Llama family into an HF folder in float32, with tokenizer and chat template."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from wmtp.pretrained.checkpoint_formats import BLOCK_KEYS, HF_WEIGHTS, ROOT_KEYS, is_rotated, key_of, to_half_split
from wmtp.pretrained.config_files import CheckpointError, known_keys, refuse_unknown, unreadable

_ROPE_FACTORS = "rope_freqs.weight"
_OTHER = "use a Llama's GGUF, or the model's HF folder"

# Rules of tokenizer.ggml.pre that cut a text before the merges: `transformers` reads these right, as mended below.
_GPT2, _DIGITS, _LLAMA3 = ("gpt-2",), ("smollm", "starcoder", "refact"), ("llama-bpe", "llama3", "llama-v3")

_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def convert_gguf(file: Path, folder: Path) -> None:
    """Writes ``folder`` from ``file``: tokenizer through `transformers`, weights dequantised by `gguf`.

    `transformers` could read the rest too, but it ignores unknown keys and tensors, and needs the model twice in
    memory. A CheckpointError says why the model, or its tokenizer, may not be read right.
    """
    from gguf import MODEL_ARCH, GGUFReader, get_tensor_name_map
    from gguf.quants import dequantize
    from transformers import LlamaConfig

    try:
        reader = GGUFReader(file)
        fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    except Exception as error:
        raise unreadable(file, error, " as GGUF") from error
    if fields.get("general.architecture") != "llama":
        got = fields.get("general.architecture")
        raise CheckpointError(f"{file}: general.architecture must be 'llama', got {got!r}; {_OTHER}")
    known = known_keys()["gguf"]
    missing = [key for key in known["required"] if key not in fields]
    if missing:
        raise CheckpointError(f"{file} lacks {missing[0]}; not a Llama, {_OTHER}")
    about = ("general.", "quantize.", "tokenizer.chat_template")
    refuse_unknown(file, {key: value for key, value in fields.items() if not key.startswith(about)}, known)
    tokenizer = _tokenizer(file, fields)

    stored = {tensor.name: tensor for tensor in reader.tensors}
    layers = fields["llama.block_count"]
    names = [*ROOT_KEYS, *(f"layers.{i}.{inside}" for i in range(layers) for inside in BLOCK_KEYS)]
    if tied := "output.weight" not in stored:
        names.remove("output.weight")
    named = get_tensor_name_map(MODEL_ARCH.LLAMA, layers)  # the GGUF key of a key of HF's
    keys = {name: str(named.get_name(str(key_of(name, "hf")), (".weight",))) for name in names}
    odd = sorted((set(stored) ^ set(keys.values())) - {_ROPE_FACTORS})
    if odd:
        what = "unknown" if odd[0] in stored else "missing"
        raise CheckpointError(f"{file}: tensor {odd[0]} is {what}; not a Llama, {_OTHER}")

    def tensor(key: str) -> torch.Tensor:
        return torch.from_numpy(dequantize(stored[key].data, stored[key].tensor_type).copy())

    embedding = tensor(keys["tok_embeddings.weight"])
    sizes = _sizes(file, fields, vocab_size=len(embedding))
    factors = tensor(_ROPE_FACTORS) if _ROPE_FACTORS in stored else None
    rope = _rope(file, fields.get("llama.rope.freq_base", 10_000.0), sizes["head_dim"], factors)
    ids = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(i for i in ids if i is not None))
    config = LlamaConfig(
        **sizes,
        architectures=["LlamaForCausalLM"],
        rope_parameters=rope,
        tie_word_embeddings=tied,
        dtype="float32",
        bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=ends if len(ends) > 1 else next(iter(ends), None),
        pad_token_id=fields.get("tokenizer.ggml.padding_token_id"),
    )
    weights = {}
    for name, key in keys.items():
        # llama.cpp keeps q and k in Meta's RoPE layout.
        weight = to_half_split(tensor(key), sizes["head_dim"]) if is_rotated(name) else tensor(key)
        weights[str(key_of(name, "hf"))] = weight.contiguous()

    folder.mkdir(parents=True)
    save_file(weights, folder / HF_WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _sizes(file: Path, fields: dict[str, Any], *, vocab_size: int) -> dict[str, Any]:
    llama = {key.removeprefix("llama."): value for key, value in fields.items()}
    dim, heads = llama["embedding_length"], llama["attention.head_count"]
    head_dim = llama.get("attention.key_length", dim // heads if isinstance(heads, int) else None)
    expected = {"attention.value_length": head_dim, "rope.dimension_count": head_dim, "vocab_size": vocab_size}
    for key, value in expected.items():
        if llama.get(key, value) != value:
            raise CheckpointError(
                f"{file}: llama.{key} must be {value}, got {llama[key]}; this decoder has no other, {_OTHER}"
            )
    return {
        "vocab_size": vocab_size,
        "hidden_size": dim,
        "intermediate_size": llama["feed_forward_length"],
        "num_hidden_layers": llama["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": llama.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": llama["context_length"],
        "rms_norm_eps": llama["attention.layer_norm_rms_epsilon"],
    }


def _rope(file: Path, base: float, head_dim: int, factors: torch.Tensor | None) -> dict[str, Any]:
    """Returns RoPE for HF's config; a GGUF holds Llama 3's scaling only as the factor of each frequency."""
    plain = {"rope_type": "default", "rope_theta": base}
    if factors is None or bool((factors == 1).all()):
        return plain
    length, low, high = 8192, 1.0, 4.0  # of every Llama 3
    scaling = {"factor": float(factors.max()), "low_freq_factor": low, "high_freq_factor": high}
    turns = length * base ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim) / (2 * torch.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    if not torch.allclose(factors.double(), 1 / ((1 - smooth) / scaling["factor"] + smooth), rtol=1e-4, atol=0):
        raise CheckpointError(
            f"{file}: {_ROPE_FACTORS} scales RoPE in another way than Llama 3, which this decoder does not compute; "
            "use another checkpoint"
        )
    return {**plain, "rope_type": "llama3", **scaling, "original_max_position_embeddings": length}


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer


def _tokenizer(file: Path, fields: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kind, pre = (fields.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind not in ("llama", "gpt2"):
        raise CheckpointError(f"{file}: tokenizer.ggml.model must be 'llama' or 'gpt2', got {kind!r}; {_OTHER}")
    if kind == "gpt2" and pre not in (*_GPT2, *_DIGITS, *_LLAMA3):
        raise CheckpointError(
            f"{file}: tokenizer.ggml.pre {pre!r} is none whose token ids are known to be read right "
            f"({', '.join((*_GPT2, *_DIGITS, *_LLAMA3))}); use the model's HF folder instead"
        )
    try:
        # Not AutoTokenizer, which reads the whole file twice to find that it is a Llama.
        read = PreTrainedTokenizerFast.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    except Exception as error:
        raise unreadable(file, error, " as GGUF") from error
    spec, tokens = json.loads(read.backend_tokenizer.to_str()), fields["tokenizer.ggml.tokens"]
    # transformers' classes add the special tokens of their own first model.
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] < len(tokens)]
    if kind == "gpt2" and pre in _LLAMA3:
        spec["model"]["ignore_merges"] = True  # a piece that is a token stays that token, whatever the merges say
    backend = Tokenizer.from_str(json.dumps(spec))
    if kind == "gpt2" and pre in _DIGITS:
        # SmolLM splits off every digit before the byte-level rule; transformers' reader drops that step, which changes
        # the ids of white space in front of a number (an indented line that starts with one).
        digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    if kind == "llama" and not fields.get("tokenizer.ggml.add_space_prefix", True):
        # transformers' reader gives every SentencePiece model Llama's space before the text.
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made = backend.get_vocab(with_added_tokens=True)
    odd = sorted(set(made.items()) ^ {(token, i) for i, token in enumerate(tokens)}, key=lambda item: item[1])
    if odd:
        raise CheckpointError(
            f"{file}: id {odd[0][1]} of the tokenizer, {odd[0][0]!r}, is another one in transformers; use the "
            "model's HF folder instead"
        )
    ids = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{name: tokens[i] for name, i in ids.items() if i is not None},
        chat_template=fields.get("tokenizer.chat_template"),
        # llama.cpp's default, where the file does not say it
        add_bos_token=fields.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre in _LLAMA3),
    )
