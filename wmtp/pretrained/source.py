"""The contents of a checkpoint's config files: kept with the model, and written again by its export."""

from dataclasses import dataclass
from typing import Any

import torch

from wmtp.pretrained.checkpoint_formats import Checkpoint
from wmtp.pretrained.config_files import CONFIG, read_json
from wmtp.pretrained.shape import LlamaShape

GENERATION_CONFIG = "generation_config.json"
# Keys that are wrong for an export: code that is not copied, weights that are no longer quantised, another H.
_NOT_KEPT = ("auto_map", "quantization_config", "num_future_tokens")


@dataclass(frozen=True)
class Source:
    """The contents of a checkpoint's config files, with HF's keys also for Meta's format, which has few."""

    config: dict[str, Any]  # config.json
    generation_config: dict[str, Any] | None  # generation_config.json, where there is one

    @property
    def end_ids(self) -> list[int]:
        """Returns every token id that ends a text of this model."""
        return _ids(self.config.get("eos_token_id"), (self.generation_config or {}).get("eos_token_id"))


def read_source(checkpoint: Checkpoint) -> Source:
    """Reads the config files of an opened checkpoint; raises a CheckpointError where one cannot be read."""
    config = {"max_position_embeddings": checkpoint.shape.max_seq_len}
    if checkpoint.form == "meta":
        return Source(config, None)
    generation = checkpoint.path / GENERATION_CONFIG
    config |= read_json(checkpoint.path / CONFIG)
    return Source(config, read_json(generation) if generation.is_file() else None)


def exported_configs(
    source: Source | None, shape: LlamaShape, dtype: torch.dtype, token_ids: dict[str, int | None]
) -> dict[str, dict[str, Any]]:
    """Returns the config files of an export by name: the source's, with the values of the trained model.

    RoPE is written with the keys of `transformers` 5 and of 4. max_seq_len is the size of the cache that a config asked
    for, so it may raise the source's longest sequence, but not lower it.

    Args:
        source: of the checkpoint that the model was read from; None where it started from random weights.
        dtype: of the stored weights.
        token_ids: bos_token_id, eos_token_id and pad_token_id of the tokenizer. Training put its EOS at each document's
            end, so it joins those of the source; the other two count where the source names none.
    """
    said = source.config if source is not None else {}
    # Where no file of HF's gives them, transformers would take Llama's 1 and 2.
    unnamed = {} if "model_type" in said else {"bos_token_id": None, "eos_token_id": None}
    rope = {"rope_type": "default", **(shape.rope_scaling or {})}
    token_ids = {key: i for key, i in token_ids.items() if i is None or i < shape.vocab_size}
    config = {
        **unnamed,
        **token_ids,
        **{k: v for k, v in said.items() if k not in _NOT_KEPT and not (v is None and k in token_ids)},
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.embed_dim,
        "intermediate_size": shape.intermediate_dim,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": max(shape.max_seq_len, said.get("max_position_embeddings", 0)),
        "rms_norm_eps": shape.norm_eps,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "rope_theta": shape.rope_base,
        "rope_scaling": shape.rope_scaling,
        "rope_parameters": {**rope, "rope_theta": shape.rope_base},
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    files = {CONFIG: config}
    if source is not None and source.generation_config is not None:
        files[GENERATION_CONFIG] = dict(source.generation_config)
    for content in files.values():
        ends = _ids(content.get("eos_token_id"), token_ids.get("eos_token_id"))
        if ends:
            content["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return files


def _ids(*named: int | list[int] | None) -> list[int]:
    """Returns the ids in several values of eos_token_id, each once and in their order."""
    listed = [ids if isinstance(ids, list) else [ids] for ids in named if ids is not None]
    return list(dict.fromkeys(i for ids in listed for i in ids))
