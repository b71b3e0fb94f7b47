"""The two checkpoint formats, read one tensor at a time: HF folders (safetensors) and Meta's (consolidated.pth).

Parameter names here are torchtune's, as in :class:`~wmtp.models.MTPDecoder`; a format's own names are its keys. The
additional heads of an HF folder lie beside the model that `transformers` reads, in mtp_heads.safetensors.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from wmtp.errors import UserError
from wmtp.models.shape import LlamaShape

HF_WEIGHTS, HF_INDEX = "model.safetensors", "model.safetensors.index.json"
MTP_WEIGHTS, MTP_CONFIG = "mtp_heads.safetensors", "mtp_config.json"
META_WEIGHTS, META_CONFIG = "consolidated.pth", "params.json"

# name inside a block -> (HF key, Meta key)
_BLOCK_KEYS = {
    "attn.q_proj.weight": ("self_attn.q_proj.weight", "attention.wq.weight"),
    "attn.k_proj.weight": ("self_attn.k_proj.weight", "attention.wk.weight"),
    "attn.v_proj.weight": ("self_attn.v_proj.weight", "attention.wv.weight"),
    "attn.output_proj.weight": ("self_attn.o_proj.weight", "attention.wo.weight"),
    "mlp.w1.weight": ("mlp.gate_proj.weight", "feed_forward.w1.weight"),
    "mlp.w2.weight": ("mlp.down_proj.weight", "feed_forward.w2.weight"),
    "mlp.w3.weight": ("mlp.up_proj.weight", "feed_forward.w3.weight"),
    "sa_norm.scale": ("input_layernorm.weight", "attention_norm.weight"),
    "mlp_norm.scale": ("post_attention_layernorm.weight", "ffn_norm.weight"),
}
_ROOT_KEYS = {
    "tok_embeddings.weight": ("model.embed_tokens.weight", "tok_embeddings.weight"),
    "norm.scale": ("model.norm.weight", "norm.weight"),
    "output.weight": ("lm_head.weight", "output.weight"),
}


class CheckpointError(UserError):
    """A checkpoint that cannot be used: one line saying which file, what is wrong with it, and what to do."""


class StoredTensor(NamedTuple):
    """A tensor of a checkpoint that is not read yet."""

    file: Path
    shape: tuple[int, ...]
    read: Callable[[], Tensor]  # on the CPU, in the stored dtype, mapped from the file where possible


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: what it is, and where each of its tensors lies."""

    path: Path
    shape: LlamaShape
    tensors: dict[str, StoredTensor]  # by the format's key
    form: str  # "hf" or "meta"

    def read(self, name: str) -> Tensor:
        """A parameter's full tensor, in torchtune's layout."""
        tensor = self.tensors[key_of(name, self.form)].read()
        return to_interleaved(tensor, self.shape.head_dim) if self.form == "hf" and is_rotated(name) else tensor


def key_of(name: str, form: str) -> str | None:
    """A parameter's key in the format ``hf`` or ``meta``, None where that format has no such parameter.

    ``layers.0.attn.q_proj.weight`` is ``model.layers.0.self_attn.q_proj.weight`` or ``layers.0.attention.wq.weight``.
    Blocks of additional heads keep their place, ``extra_heads.{j}``, with the format's names inside.
    """
    column = ("hf", "meta").index(form)
    if name in _ROOT_KEYS:
        return _ROOT_KEYS[name][column]
    place, _, rest = name.partition(".")
    index, _, inside = rest.partition(".")
    if place not in ("layers", "extra_heads") or not index.isdigit() or inside not in _BLOCK_KEYS:
        return None
    prefix = "model." if form == "hf" and place == "layers" else ""
    return f"{prefix}{place}.{index}.{_BLOCK_KEYS[inside][column]}"


def is_rotated(name: str) -> bool:
    """Whether RoPE turns a projection's output, so that the order of its rows is a convention."""
    return name.endswith(("attn.q_proj.weight", "attn.k_proj.weight"))


def to_interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """q or k projection from HF's row order to Meta's and torchtune's.

    RoPE turns pairs of rows of each head. HF pairs row i with row i + head_dim / 2, Meta row 2i with row 2i + 1.
    """
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def to_half_split(weight: Tensor, head_dim: int) -> Tensor:
    """The inverse of :func:`to_interleaved`."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


# ----------------------------------------------------------------------------------------------------------------------
# Opening


def open_checkpoint(path: Path) -> Checkpoint:
    """Look at every file of a checkpoint, without reading its tensors.

    Raises:
        CheckpointError: no checkpoint there, a file missing or truncated, or a model that is no plain Llama.
    """
    if (path / META_CONFIG).is_file() and (path / META_WEIGHTS).is_file():
        tensors = _open_pth(path / META_WEIGHTS)
        return Checkpoint(path, _meta_shape(path, tensors), tensors, "meta")
    shape = _hf_shape(path)
    tensors = {key: tensor for file in _hf_files(path, shape) for key, tensor in _open_safetensors(file).items()}
    return Checkpoint(path, shape, tensors, "hf")


def read_shape(path: Path) -> LlamaShape:
    """What a checkpoint's config.json, or params.json, says about the model.

    Raises:
        CheckpointError: as :func:`open_checkpoint`.
    """
    if (path / META_CONFIG).is_file() and (path / META_WEIGHTS).is_file():
        return _meta_shape(path, _open_pth(path / META_WEIGHTS))
    return _hf_shape(path)


def _hf_files(path: Path, shape: LlamaShape) -> list[Path]:
    index = path / HF_INDEX
    names = [HF_WEIGHTS]
    if index.is_file():
        names = sorted(set(_read_json(index, "weight_map")["weight_map"].values()))
    elif not (path / HF_WEIGHTS).is_file():
        raise CheckpointError(
            f"{path} holds neither {HF_WEIGHTS} nor {HF_INDEX}; save it with transformers' save_pretrained, "
            "which writes safetensors"
        )
    return [path / name for name in names] + [path / MTP_WEIGHTS] * (shape.num_future_tokens > 1)


def _open_safetensors(file: Path) -> dict[str, StoredTensor]:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; copy the checkpoint again, with all of its files")
    try:
        handle = safe_open(file, framework="pt")  # maps the file, and checks its length against its header
    except Exception as error:
        raise _unreadable(file, error) from error
    shapes = {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118
    return {key: StoredTensor(file, shape, partial(handle.get_tensor, key)) for key, shape in shapes.items()}


def _open_pth(file: Path) -> dict[str, StoredTensor]:
    try:
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise _unreadable(file, error) from error
    if not isinstance(state, dict) or not all(torch.is_tensor(tensor) for tensor in state.values()):
        raise CheckpointError(f"{file} is no state dict of tensors; expected Meta's consolidated.pth")
    return {key: StoredTensor(file, tuple(tensor.shape), lambda t=tensor: t) for key, tensor in state.items()}


def _unreadable(file: Path, error: Exception) -> CheckpointError:
    why = " ".join(str(error).split())[:200]
    return CheckpointError(
        f"{file} ({file.stat().st_size} bytes) cannot be read, it may be truncated: {why}; copy it again"
    )


def _read_json(file: Path, *required: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; copy it again") from error
    missing = [key for key in required if key not in content]
    if missing:
        raise CheckpointError(f"{file} lacks {missing[0]}; it is not what its name says, copy it again")
    return content


# ----------------------------------------------------------------------------------------------------------------------
# What the config files say


def _hf_shape(path: Path) -> LlamaShape:
    file = path / "config.json"
    if not file.is_file():
        there = ", ".join(sorted(f.name for f in path.iterdir())[:8]) if path.is_dir() else "no folder"
        raise CheckpointError(
            f"{path} is no checkpoint: expected config.json with {HF_WEIGHTS} (HF), or {META_CONFIG} with "
            f"{META_WEIGHTS} (Meta), found {there or 'nothing'}"
        )
    raw = _read_json(file)
    if raw.get("model_type") != "llama":
        raise CheckpointError(f"{file}: model_type must be 'llama', got {raw.get('model_type')!r}")
    refused = {
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "hidden_act": ("silu",),
        "quantization_config": (None,),
    }
    for key, allowed in refused.items():
        if raw.get(key, allowed[0]) not in allowed:
            raise CheckpointError(f"{file}: {key} must be {allowed[0]!r}, got {raw[key]!r}; this decoder has no other")

    from transformers import LlamaConfig  # knows the defaults and spellings of every version's config.json

    hf = LlamaConfig.from_dict(raw)
    heads = (
        _read_json(path / MTP_CONFIG, "num_future_tokens")["num_future_tokens"] if (path / MTP_CONFIG).is_file() else 1
    )
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
        rope_base=hf.rope_parameters["rope_theta"],
        norm_eps=hf.rms_norm_eps,
        tie_word_embeddings=hf.tie_word_embeddings,
        rope_scaling=hf.rope_parameters,
        head_dim=hf.head_dim,
    )


def _meta_shape(path: Path, tensors: dict[str, StoredTensor]) -> LlamaShape:
    """params.json, and from the tensors what it gives only by formula (MLP width) or not at all (vocab_size: -1)."""
    file = path / META_CONFIG
    params = _read_json(file, "dim", "n_layers", "n_heads")
    for key in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):
        if key not in tensors:
            raise CheckpointError(f"{path / META_WEIGHTS} lacks {key}; expected the keys of Meta's Llama")
    heads = params.get("n_future_tokens", 1)
    return _shape(
        file,
        vocab_size=tensors["tok_embeddings.weight"].shape[0],
        num_layers=params["n_layers"] - heads + 1,
        num_heads=params["n_heads"],
        num_kv_heads=params.get("n_kv_heads") or params["n_heads"],
        embed_dim=params["dim"],
        intermediate_dim=tensors["layers.0.feed_forward.w1.weight"].shape[0],
        max_seq_len=params.get("max_seq_len", 4096),
        num_future_tokens=heads,
        rope_base=params.get("rope_theta", 10_000.0),
        norm_eps=params.get("norm_eps", 1e-5),
        tie_word_embeddings="output.weight" not in tensors,
    )


def _shape(file: Path, **values: Any) -> LlamaShape:
    try:
        return LlamaShape(**values)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
