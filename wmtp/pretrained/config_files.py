"""The model in config files: HF's config.json, mtp_config.json and Meta's params.json, read and exported."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from wmtp.errors import UserError, cannot_be_read, one_line
from wmtp.pretrained.families import FAMILIES, Family
from wmtp.pretrained.shape import FULL, SLIDING, DecoderShape, checked_scaling

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
MTP_WEIGHTS, MTP_CONFIG = "mtp_heads.safetensors", "mtp_config.json"
MODELING = "modeling_wmtp.py"  # in an export with several heads: how `transformers` reads them
META_WEIGHTS, META_CONFIG = "consolidated.pth", "params.json"

# field of DecoderShape -> key of HF's config.json
_HF_KEYS = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "embed_dim": "hidden_size",
    "intermediate_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
    "head_dim": "head_dim",
}
# Wrong for an export: code that is not copied, weights that are no longer quantised, another H.
_NOT_EXPORTED = ("auto_map", "quantization_config", "num_future_tokens", "looped_heads")
OTHER_MODEL = "use a checkpoint of a family in docs/models.md"


class CheckpointError(UserError):
    """The error of a checkpoint that cannot be used: one line that names the file, the fault and the way out."""


def unreadable(file: Path, error: Exception, kind: str = "") -> CheckpointError:
    """Returns the error of a file of a checkpoint that its reader, or the file system, refuses."""
    return CheckpointError(cannot_be_read(error, file, "copy it again", f"{kind}, it may be truncated"))


def read_json(file: Path, *required: str) -> dict[str, Any]:
    """Returns the object in a JSON file, which has a value for each required key."""
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


@cache
def known_keys() -> dict[str, Any]:
    """Returns the keys of each kind of config file, as known_keys.yaml has them."""
    return dict(OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("known_keys.yaml"))))  # type: ignore[arg-type]


def refuse_unknown(file: Path, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Refuses keys that are not among the known ones of their kind of file, and other values of fixed ones."""
    for key, value in given.items():
        if value is None or any(key in known.get(part, ()) for part in ("required", "read", "harmless")):
            continue
        allowed = known.get("fixed", {}).get(key)
        if allowed is None:
            raise CheckpointError(
                f"{file}: {key} is {value!r:.100}, which WMTP does not know; if it does not change the model's logits, "
                "take it out of the file, else use another checkpoint"
            )
        if value not in allowed:
            raise CheckpointError(
                f"{file}: {key} must be {allowed[0]!r}, got {value!r}; this decoder has no other, {OTHER_MODEL}"
            )


def hf_shape(path: Path) -> DecoderShape:
    """Returns the shape of an HF folder's model; a CheckpointError says why it is none of this decoder's."""
    from transformers import CONFIG_MAPPING  # knows the values of keys that a config.json lacks

    file = path / CONFIG
    raw = read_json(file)
    name: Any = raw.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise CheckpointError(f"{file}: model_type must be one of {', '.join(FAMILIES)}, got {name!r}; {OTHER_MODEL}")
    known = known_keys()[CONFIG]
    own = {"read": {*known["read"], *family.keys}, "fixed": {**known["fixed"], **family.fixed}}
    refuse_unknown(file, raw, {**known, **own})
    heads, looped = _num_heads(path, raw)
    with _values_of(file):
        ropes = _hf_rope(file, raw, family)
        hf: Any = CONFIG_MAPPING[name].from_dict({k: v for k, v in raw.items() if not k.startswith("rope_")})
        sizes: dict[str, Any] = {field: getattr(hf, key, None) for field, key in _HF_KEYS.items()}
        read = {field: value(hf) for field, value in family.read.items()}
        beside = {"num_future_tokens": heads, "looped_heads": looped, "family": name}
        return DecoderShape(**sizes, **ropes, **read, **family.constants, **beside)


def shape_of_params(
    file: Path, params: dict[str, Any], embedding: tuple[int, ...], mlp: tuple[int, ...], tied: bool
) -> DecoderShape:
    """Returns the shape of Meta's model; a CheckpointError says why it is no plain Llama.

    Args:
        params: the content of params.json.
        embedding: shape of the embedding; params.json may give vocab_size as -1.
        mlp: shape of a gate projection, whose width params.json gives by a formula.
        tied: there is no unembedding.
    """
    refuse_unknown(file, params, known_keys()[META_CONFIG])
    params = {key: value for key, value in params.items() if value is not None}
    if params.get("vocab_size", -1) not in (-1, embedding[0]):
        raise CheckpointError(
            f"{file}: vocab_size is {params['vocab_size']}, the embedding has {embedding[0]} rows; copy both again"
        )
    heads, layers = params.get("n_future_tokens", 1), params["n_layers"]
    for key, value in (("n_future_tokens", heads), ("n_layers", layers)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise CheckpointError(f"{file}: {key} must be a whole number, got {value!r}; copy it again")
    with _values_of(file):
        return DecoderShape(
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


@contextmanager
def _values_of(file: Path) -> Iterator[None]:
    """Turns an error about a value into one that names its file."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # huggingface_hub has errors of its own for values of a wrong type
        raise CheckpointError(f"{file}: {one_line(error)}; mend it, or copy it again") from error


def _hf_rope(file: Path, raw: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Returns RoPE's fields of the shape from the keys of `transformers` 4 and 5, which must agree where both are.

    Of two values one version takes the first and another the second, so no choice here could be right for all.
    """
    given = {key: raw[key] for key in ("rope_parameters", "rope_scaling") if raw.get(key) not in (None, {})}
    bases, local_bases = ({key: raw.get(key)} for key in ("rope_theta", "rope_local_base_freq"))
    base, local_base = family.rope_bases
    by_kind = given.get("rope_parameters")
    if local_base is not None and isinstance(by_kind, Mapping) and not {FULL, SLIDING}.isdisjoint(by_kind):
        given["rope_parameters"], sliding = (by_kind.get(kind) or {} for kind in (FULL, SLIDING))
        local_bases[f"rope_parameters.{SLIDING}.rope_theta"] = sliding.get("rope_theta")
        others = {key: value for key, value in by_kind.items() if key not in (FULL, SLIDING)}
        others |= checked_scaling({key: value for key, value in sliding.items() if key != "rope_theta"}) or {}
        if others:
            raise CheckpointError(f"{file}: rope_parameters has {others}, {SLIDING} must be plain; {OTHER_MODEL}")
    for key, value in given.items():
        if isinstance(value, Mapping):  # `transformers` 5 writes the base into it too
            bases[f"{key}.rope_theta"] = value.get("rope_theta")
            given[key] = {k: v for k, v in value.items() if k != "rope_theta"}
    scalings = {key: checked_scaling(value) for key, value in given.items()}
    length = raw.get("original_max_position_embeddings")
    if length is not None and "original_max_position_embeddings" not in family.keys:
        lengths = {key: (value or {}).get("original_max_position_embeddings") for key, value in scalings.items()}
        _same(file, {"original_max_position_embeddings": length, **(lengths or {"rope_scaling": None})}, None)
    bases, local_bases = ({k: v for k, v in named.items() if v is not None} for named in (bases, local_bases))
    scaling = _same(file, scalings, None)
    if scaling is not None and family.rope and scaling["rope_type"] not in family.rope:
        raise CheckpointError(
            f"{file}: rope_type of {raw['model_type']} must be {' or '.join(family.rope)}, got "
            f"{scaling['rope_type']!r}; {OTHER_MODEL}"
        )
    return {
        "rope_base": _same(file, bases, base),
        "local_rope_base": _same(file, local_bases, local_base),
        "rope_scaling": scaling,
    }


def _same(file: Path, values: Mapping[str, Any], default: Any) -> Any:
    """Returns the one value that all keys have, and the default without any."""
    first, *others = values.items() or [("", default)]
    for key, value in others:
        if value != first[1]:
            raise CheckpointError(
                f"{file}: {first[0]} says {first[1]}, {key} {value}; make them the same, as the model was trained"
            )
    return first[1]


def _num_heads(path: Path, raw: Mapping[str, Any]) -> tuple[int, bool]:
    """Returns H, and whether they are looped, which mtp_config.json gives and config.json may declare too."""
    heads, looped, there = 1, False, (path / MTP_WEIGHTS).is_file()
    if (path / MTP_CONFIG).is_file():
        about = read_json(path / MTP_CONFIG, "num_future_tokens")
        refuse_unknown(path / MTP_CONFIG, about, known_keys()[MTP_CONFIG])
        heads, looped = about["num_future_tokens"], about.get("looped_heads", False)
    elif there:
        raise CheckpointError(f"{path / MTP_CONFIG} is missing, {MTP_WEIGHTS} lies there; copy the checkpoint again")
    declared = raw.get("num_future_tokens")
    if declared not in (None, heads):
        gives, way_out = f"gives {heads}", "copy the checkpoint again, whole"
        if not (path / MTP_CONFIG).is_file():  # what `transformers` saves of an export that it read without its code
            gives, way_out = "is missing", f"{way_out}, or take the key out to use head 1 alone"
        raise CheckpointError(f"{path / CONFIG} declares num_future_tokens {declared}, {MTP_CONFIG} {gives}; {way_out}")
    if raw.get("looped_heads") not in (None, looped):
        raise CheckpointError(
            f"{path / CONFIG} declares looped_heads {raw['looped_heads']}, {MTP_CONFIG} gives {looped}; copy the "
            "checkpoint again, whole"
        )
    if heads != 1 and not there:
        raise CheckpointError(f"{path / MTP_WEIGHTS} is missing, {MTP_CONFIG} declares {heads} heads; copy it again")
    if heads == 1 and there:
        raise CheckpointError(
            f"{path / MTP_WEIGHTS} holds extra heads, {MTP_CONFIG} declares 1 head, which needs none; copy both again, "
            "or remove both to use head 1 alone"
        )
    return heads, looped


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


# ----------------------------------------------------------------------------------------------------------------------
# The config files that are kept with the model, and written again by its export


@dataclass(frozen=True)
class Source:
    """The contents of a checkpoint's config files, with HF's keys also for Meta's format, which has few."""

    config: dict[str, Any]  # config.json
    generation_config: dict[str, Any] | None  # generation_config.json, where there is one

    @property
    def end_ids(self) -> list[int]:
        """Every token id that ends a text of this model."""
        return _ids(self.config.get("eos_token_id"), (self.generation_config or {}).get("eos_token_id"))


def read_source(path: Path, form: str, max_seq_len: int) -> Source:
    """Returns the config files of a checkpoint in that folder and format; Meta's has only the length."""
    config = {"max_position_embeddings": max_seq_len}
    if form == "meta":
        return Source(config, None)
    generation = path / GENERATION_CONFIG
    return Source(config | read_json(path / CONFIG), read_json(generation) if generation.is_file() else None)


def declared_heads(shape: DecoderShape) -> dict[str, Any]:
    """Returns what an export's config files say of its extra heads."""
    return {"num_future_tokens": shape.num_future_tokens, **({"looped_heads": True} if shape.looped_heads else {})}


def exported_configs(
    source: Source | None, shape: DecoderShape, dtype: torch.dtype, token_ids: dict[str, int | None]
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
    rope: dict[str, Any] = {"rope_type": "default", **(shape.rope_scaling or {}), "rope_theta": shape.rope_base}
    local = {}
    if shape.local_rope_base is not None:
        rope = {FULL: rope, SLIDING: {"rope_type": "default", "rope_theta": shape.local_rope_base}}
        local = {"rope_local_base_freq": shape.local_rope_base}
    token_ids = {key: i for key, i in token_ids.items() if i is None or i < shape.vocab_size}
    config = {
        **unnamed,
        **token_ids,
        **{k: v for k, v in said.items() if k not in _NOT_EXPORTED and not (v is None and k in token_ids)},
        "architectures": [FAMILIES[shape.family].architecture],
        "model_type": shape.family,
        **({"hidden_act": "silu", "attention_bias": False, "mlp_bias": False} if shape.family == "llama" else {}),
        **{key: getattr(shape, field) for field, key in _HF_KEYS.items()},
        "max_position_embeddings": max(shape.max_seq_len, said.get("max_position_embeddings", 0)),
        "rope_theta": shape.rope_base,
        "rope_scaling": shape.rope_scaling,
        "rope_parameters": rope,
        **local,
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if shape.num_future_tokens > 1:
        config |= declared_heads(shape)
        config["auto_map"] = {"AutoModelForCausalLM": f"{Path(MODELING).stem}.{config['architectures'][0]}"}
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
