"""The model in a checkpoint's config files: HF's config.json, mtp_config.json and Meta's params.json.

A key that is neither read here nor known to be harmless is refused by name and value: its effect on the logits would
silently be missing.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from wmtp.errors import UserError, cannot_be_read
from wmtp.pretrained.shape import LlamaShape, checked_scaling

CONFIG = "config.json"
MTP_WEIGHTS, MTP_CONFIG = "mtp_heads.safetensors", "mtp_config.json"
META_WEIGHTS, META_CONFIG = "consolidated.pth", "params.json"

# Read below. LlamaConfig gives the default of `transformers` where a file lacks one of them.
_HF_READ = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
    head_dim max_position_embeddings rms_norm_eps tie_word_embeddings rope_theta rope_scaling rope_parameters
    original_max_position_embeddings num_future_tokens"""
# The only values that this decoder computes.
_HF_FIXED: dict[str, tuple] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0,),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "pruned_heads": ({},),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
}
# Other keys of `transformers` 4 and 5, and of tools around it: names, storage, initialisation, generation.
_HF_HARMLESS = """model_type architectures auto_map transformers_version torch_dtype dtype initializer_range use_cache
    pretraining_tp bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id tokenizer_class prefix
    return_dict output_hidden_states output_attentions torchscript use_bfloat16 tf_legacy_loss is_decoder
    tie_encoder_decoder chunk_size_feed_forward finetuning_task task_specific_params problem_type id2label label2id
    num_labels max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature
    top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    _name_or_path _commit_hash _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled
    use_flash_attention_2 use_sdpa unsloth_fixed unsloth_version transformers.js_config is_llama_config
    model_max_length max_sequence_length"""

_META_READ = """dim n_layers n_heads n_kv_heads norm_eps rope_theta use_scaled_rope rope_scaling_factor
    rope_high_freq_factor max_seq_len n_future_tokens vocab_size"""
# The first two give the MLP's width by a formula; it is read from the tensors' shapes.
_META_HARMLESS = "multiple_of ffn_dim_multiplier max_batch_size model_parallel_size"


OTHER_MODEL = "use a checkpoint of the Llama family (Llama, CodeLlama, SmolLM2)"


class CheckpointError(UserError):
    """The error of a checkpoint that cannot be used: one line that names the file, the fault and the way out."""


def unreadable(file: Path, error: Exception, kind: str = "") -> CheckpointError:
    """Returns the error of a file of a checkpoint that its reader, or the file system, refuses."""
    return CheckpointError(cannot_be_read(error, file, "copy it again", f"{kind}, it may be truncated"))


def read_json(file: Path, *required: str) -> dict[str, Any]:
    """Reads the object in a JSON file.

    Raises:
        CheckpointError: it cannot be read, is no object, or lacks a required key or its value.
    """
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(file, error) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold an object, {{...}}, got {content!r:.60}; copy it again")
    missing = [key for key in required if content.get(key) is None]
    if missing:
        raise CheckpointError(f"{file} lacks {missing[0]}; it is not what its name says, copy it again")
    return content


def refuse_unknown(
    file: Path, given: Mapping[str, Any], known: Collection[str], fixed: Mapping[str, tuple] | None = None
) -> None:
    """Refuses keys of a config that the computation does not follow; a key whose value is None counts as absent.

    Raises:
        CheckpointError: a key that is neither known nor fixed, or a fixed one with another value than allowed.
    """
    for key, value in given.items():
        allowed = (fixed or {}).get(key)
        if value is None or key in known:
            continue
        if allowed is None:
            raise CheckpointError(
                f"{file}: {key} is {value!r:.100}, which WMTP does not know; if it does not change the model's logits, "
                "take it out of the file, else use another checkpoint"
            )
        if value not in allowed:
            raise CheckpointError(
                f"{file}: {key} must be {allowed[0]!r}, got {value!r}; this decoder has no other, {OTHER_MODEL}"
            )


def hf_shape(path: Path) -> LlamaShape:
    """Reads the shape of an HF folder's model.

    Raises:
        CheckpointError: no config.json there, or a model that is no plain Llama.
    """
    from transformers import LlamaConfig  # knows the defaults of keys that a config.json lacks

    file = path / CONFIG
    raw = read_json(file)
    if raw.get("model_type") != "llama":
        raise CheckpointError(f"{file}: model_type must be 'llama', got {raw.get('model_type')!r}; {OTHER_MODEL}")
    refuse_unknown(file, raw, f"{_HF_READ} {_HF_HARMLESS}".split(), _HF_FIXED)
    rope_base, rope_scaling = _hf_rope(file, raw)
    heads = _num_heads(path, raw)
    try:
        hf = LlamaConfig.from_dict({key: value for key, value in raw.items() if not key.startswith("rope_")})
    except Exception as error:  # huggingface_hub has errors of its own for values of a wrong type
        raise CheckpointError(f"{file}: {' '.join(str(error).split())}; mend it, or copy it again") from error
    return _shape(
        file,
        vocab_size=hf.vocab_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        embed_dim=hf.hidden_size,
        intermediate_dim=hf.intermediate_size,
        max_seq_len=hf.max_position_embeddings,
        num_future_tokens=heads,
        rope_base=rope_base,
        norm_eps=hf.rms_norm_eps,
        tie_word_embeddings=hf.tie_word_embeddings,
        rope_scaling=rope_scaling,
        head_dim=hf.head_dim,
    )


def meta_shape(path: Path, embedding: tuple[int, ...], mlp: tuple[int, ...], *, tied: bool) -> LlamaShape:
    """Reads the shape of a Meta folder's model.

    Args:
        embedding: shape of the embedding; params.json may give vocab_size as -1.
        mlp: shape of a gate projection, whose width params.json gives by a formula.
        tied: there is no unembedding.

    Raises:
        CheckpointError: a model that is no plain Llama.
    """
    file = path / META_CONFIG
    params = read_json(file, "dim", "n_layers", "n_heads")
    refuse_unknown(file, params, f"{_META_READ} {_META_HARMLESS}".split())
    params = {key: value for key, value in params.items() if value is not None}
    if params.get("vocab_size", -1) not in (-1, embedding[0]):
        raise CheckpointError(
            f"{file}: vocab_size is {params['vocab_size']}, the embedding has {embedding[0]} rows; copy both again"
        )
    heads, layers = params.get("n_future_tokens", 1), params["n_layers"]
    for key, value in (("n_future_tokens", heads), ("n_layers", layers)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise CheckpointError(f"{file}: {key} must be a whole number, got {value!r}; copy it again")
    return _shape(
        file,
        vocab_size=embedding[0],
        num_layers=layers - heads + 1,
        num_heads=params["n_heads"],
        num_kv_heads=params.get("n_kv_heads", params["n_heads"]),
        embed_dim=params["dim"],
        intermediate_dim=mlp[0],
        max_seq_len=params.get("max_seq_len", 4096),
        num_future_tokens=heads,
        rope_base=params.get("rope_theta", 10_000.0),
        norm_eps=params.get("norm_eps", 1e-5),
        tie_word_embeddings=tied,
        rope_scaling=_meta_scaling(file, params),
    )


def _hf_rope(file: Path, raw: Mapping[str, Any]) -> tuple[float, dict | None]:
    """Returns RoPE's base and scaling from the keys of `transformers` 4 and 5, which must agree where both are there.

    Of two values one version takes the first and another the second, so no choice here could be right for all.
    """
    given = {key: raw[key] for key in ("rope_parameters", "rope_scaling") if raw.get(key) not in (None, {})}
    bases: dict[str, Any] = {"rope_theta": raw.get("rope_theta")}
    for key, value in given.items():
        if isinstance(value, Mapping):  # `transformers` 5 writes the base into it too
            bases[f"{key}.rope_theta"] = value.get("rope_theta")
            given[key] = {k: v for k, v in value.items() if k != "rope_theta"}
    bases = {key: value for key, value in bases.items() if value is not None}
    try:
        scalings = {key: checked_scaling(value) for key, value in given.items()}
    except UserError as error:
        raise CheckpointError(f"{file}: {error}") from error
    length = raw.get("original_max_position_embeddings")
    if length is not None:
        lengths = {key: (value or {}).get("original_max_position_embeddings") for key, value in scalings.items()}
        _same(file, {"original_max_position_embeddings": length, **(lengths or {"rope_scaling": None})})
    _same(file, bases)
    _same(file, scalings)
    return next(iter(bases.values()), 10_000.0), next(iter(scalings.values()), None)


def _same(file: Path, values: Mapping[str, Any]) -> None:
    first, *others = values.items() or [(None, None)]
    for key, value in others:
        if value != first[1]:
            raise CheckpointError(
                f"{file}: {first[0]} says {first[1]}, {key} {value}; make them the same, as the model was trained"
            )


def _num_heads(path: Path, raw: Mapping[str, Any]) -> int:
    """Returns H, which mtp_config.json gives and config.json may declare too."""
    heads, there = 1, (path / MTP_WEIGHTS).is_file()
    if (path / MTP_CONFIG).is_file():
        about = read_json(path / MTP_CONFIG, "num_future_tokens")
        refuse_unknown(path / MTP_CONFIG, about, {"num_future_tokens"})
        heads = about["num_future_tokens"]
    elif there:
        raise CheckpointError(f"{path / MTP_CONFIG} is missing, {MTP_WEIGHTS} lies there; copy the checkpoint again")
    declared = raw.get("num_future_tokens")
    if declared not in (None, heads):
        raise CheckpointError(
            f"{path / CONFIG} declares num_future_tokens {declared}, {MTP_CONFIG} "
            f"{f'gives {heads}' if (path / MTP_CONFIG).is_file() else 'is missing'}; copy the checkpoint again, whole"
        )
    if heads != 1 and not there:
        raise CheckpointError(f"{path / MTP_WEIGHTS} is missing, {MTP_CONFIG} declares {heads} heads; copy it again")
    if heads == 1 and there:
        raise CheckpointError(
            f"{path / MTP_WEIGHTS} holds extra heads, {MTP_CONFIG} declares 1 head, which needs none; copy both again, "
            "or remove both to use head 1 alone"
        )
    return heads


def _meta_scaling(file: Path, params: Mapping[str, Any]) -> dict | None:
    """Returns Llama 3's RoPE scaling, whose factor is not in Meta's own params.json."""
    if not params.get("use_scaled_rope"):
        return None
    if params.get("rope_scaling_factor") is None:
        raise CheckpointError(
            f"{file}: use_scaled_rope is true without rope_scaling_factor, which it does not give; add to the file "
            '"rope_scaling_factor": 8 for Llama 3.1, 32 for Llama 3.2'
        )
    return {
        "rope_type": "llama3",
        "factor": params["rope_scaling_factor"],
        "low_freq_factor": 1.0,
        "high_freq_factor": params.get("rope_high_freq_factor", 4.0),
        "original_max_position_embeddings": 8192,
    }


def _shape(file: Path, **values: Any) -> LlamaShape:
    try:
        return LlamaShape(**values)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
