"""The export of a model in Meta's format, which holds a Llama with parallel heads and nothing else."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from wmtp.models.export import as_tokenizer, whole_tensors
from wmtp.models.load import without_adapters
from wmtp.pretrained.checkpoint_formats import key_of
from wmtp.pretrained.config_files import META_CONFIG, META_WEIGHTS, CheckpointError, shape_of_params
from wmtp.pretrained.shape import DecoderShape


@torch.no_grad()
def write_meta(
    model: Any, writing: Path | None, tokenizer_source: Any, dtype: torch.dtype | None, *, untie: bool = False
) -> None:
    """Writes consolidated.pth and params.json into the folder of a :func:`~wmtp.models.export.whole_folder`.

    Low-rank adapters are merged. Rank 0 holds all weights at once, as the one file does. For ``untie`` and what is
    refused see :func:`check_meta`.
    """
    params = check_meta(model, untie=untie)
    tokenizer = as_tokenizer(tokenizer_source)
    state = {key_of(name, "meta"): tensor for name, tensor in whole_tensors(model, writing is not None, dtype)}
    if writing is None:
        return
    if model.config.tie_word_embeddings:
        state[key_of("output.weight", "meta")] = state[key_of("tok_embeddings.weight", "meta")]
    torch.save(state, writing / META_WEIGHTS)
    (writing / META_CONFIG).write_text(json.dumps(params, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(writing)


def check_meta(model: Any, *, untie: bool = False) -> dict[str, Any]:
    """Returns the params.json of a model.

    Args:
        untie: a tied model's embedding is written as its unembedding too, for the format does not say that it is tied.

    Raises:
        CheckpointError: the model has what the format has no place for; it is named.
    """
    for name in without_adapters(model):
        if key_of(name, "meta") is None:
            key = key_of(name, "hf", model.config.family) or name
            raise CheckpointError(f"Meta's format has no place for {key}; use format=hf")
    return _params(model.config, untie)


def _params(shape: DecoderShape, untie: bool) -> dict[str, Any]:
    plain, width = int(8 * shape.embed_dim / 3), shape.intermediate_dim
    params: dict[str, Any] = {
        "dim": shape.embed_dim,
        "n_layers": shape.num_layers + shape.num_future_tokens - 1,
        "n_heads": shape.num_heads,
        "n_kv_heads": shape.num_kv_heads,
        "vocab_size": shape.vocab_size,
        "norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_base,
        "max_seq_len": shape.max_seq_len,
        "multiple_of": 256,
    }
    if width != -(-plain // 256) * 256:  # the MLP's width as Meta's code computes it: Llama 2's rounding, or a factor
        params |= {"multiple_of": 1, "ffn_dim_multiplier": (width + 0.5) / plain}
    if shape.num_future_tokens > 1:
        params["n_future_tokens"] = shape.num_future_tokens
    if (scaling := shape.rope_scaling) is not None:
        params |= {"use_scaled_rope": True, "rope_scaling_factor": scaling.get("factor")}
        params["rope_high_freq_factor"] = scaling.get("high_freq_factor")
    sizes = (shape.vocab_size, shape.embed_dim), (width, shape.embed_dim)
    read = shape_of_params(Path(META_CONFIG), params, *sizes, tied=False)
    for field in sorted(fields(shape), key=lambda field: field.name == "tie_word_embeddings"):  # the one with a way out
        ours, theirs = getattr(shape, field.name), getattr(read, field.name)
        spelling = field.name == "family"  # a Mistral without a window is computed as a Llama
        if ours != theirs and not spelling and not (field.name == "tie_word_embeddings" and untie):
            tied = "set untie=true to write the embedding twice, or " if field.name == "tie_word_embeddings" else ""
            raise CheckpointError(
                f"Meta's format has no place for {field.name} {ours!r}, its readers would take {theirs!r}; {tied}use "
                "format=hf"
            )
    return params
