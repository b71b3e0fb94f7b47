"""A GGUF file of the Llama family as an HF folder in float32, tokenizer and chat template included."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from wmtp.models.checkpoint_formats import HF_WEIGHTS, CheckpointError, is_rotated, key_of, to_half_split

# name inside a block -> GGUF key
_BLOCK_KEYS = {
    "attn.q_proj.weight": "attn_q.weight",
    "attn.k_proj.weight": "attn_k.weight",
    "attn.v_proj.weight": "attn_v.weight",
    "attn.output_proj.weight": "attn_output.weight",
    "mlp.w1.weight": "ffn_gate.weight",
    "mlp.w2.weight": "ffn_down.weight",
    "mlp.w3.weight": "ffn_up.weight",
    "sa_norm.scale": "attn_norm.weight",
    "mlp_norm.scale": "ffn_norm.weight",
}
_ROOT_KEYS = {
    "tok_embeddings.weight": "token_embd.weight",
    "norm.scale": "output_norm.weight",
    "output.weight": "output.weight",
}


def convert_gguf(file: Path, folder: Path) -> None:
    """Write ``folder`` from ``file``: config and tokenizer through `transformers`, weights dequantised by `gguf`.

    `transformers` could read the weights too, but only with `accelerate` installed, and holding the model twice.

    Raises:
        CheckpointError: the file is no Llama, or cannot be read.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from transformers import AutoConfig, AutoTokenizer

    try:
        reader = GGUFReader(file)
        architecture = _field(reader, "general.architecture")
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{file} cannot be read as GGUF, it may be truncated: {why}; copy it again") from error
    if architecture != "llama":
        raise CheckpointError(f"{file}: general.architecture must be 'llama', got {architecture!r}")
    if _field(reader, "tokenizer.ggml.pre") == "smollm":
        _split_digits(tokenizer)

    stored = {tensor.name: tensor for tensor in reader.tensors}
    names = [*_ROOT_KEYS, *(f"layers.{i}.{inside}" for i in range(config.num_hidden_layers) for inside in _BLOCK_KEYS)]
    keys = {name: _gguf_key(name) for name in names}
    config.tie_word_embeddings = "output.weight" not in stored
    if config.tie_word_embeddings:
        del keys["output.weight"]
    odd = sorted(set(stored) ^ set(keys.values()))
    if odd:
        raise CheckpointError(f"{file}: tensor {odd[0]} is {'unknown' if odd[0] in stored else 'missing'}; not a Llama")
    weights = {}
    for name, key in keys.items():
        # llama.cpp keeps q and k in Meta's RoPE layout.
        weight = torch.from_numpy(dequantize(stored[key].data, stored[key].tensor_type).copy())
        weight = to_half_split(weight, config.head_dim) if is_rotated(name) else weight
        weights[key_of(name, "hf")] = weight.contiguous()

    folder.mkdir(parents=True)
    save_file(weights, folder / HF_WEIGHTS, metadata={"format": "pt"})
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.float32
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _field(reader: Any, key: str) -> Any:
    return reader.fields[key].contents() if key in reader.fields else None


def _gguf_key(name: str) -> str:
    if name in _ROOT_KEYS:
        return _ROOT_KEYS[name]
    _, index, inside = name.split(".", 2)
    return f"blk.{index}.{_BLOCK_KEYS[inside]}"


def _split_digits(tokenizer: Any) -> None:
    # SmolLM splits off every digit before the byte-level rule; transformers' reader drops that step, which changes the
    # ids of white space in front of a number (an indented line that starts with one).
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
