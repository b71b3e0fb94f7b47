"""The two checkpoint formats, read one tensor at a time: HF folders (safetensors) and Meta's (consolidated.pth).

Parameter names here are torchtune's, as in :class:`~wmtp.models.MTPDecoder`; a format's own names are its keys. The
additional heads of an HF folder are in mtp_heads.safetensors, which `transformers` does not read.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from wmtp.pretrained.config_files import (
    CONFIG,
    META_CONFIG,
    META_WEIGHTS,
    MTP_WEIGHTS,
    CheckpointError,
    hf_shape,
    read_json,
    shape_of_params,
    unreadable,
)
from wmtp.pretrained.families import FAMILIES
from wmtp.pretrained.shape import DecoderShape

HF_WEIGHTS, HF_INDEX = "model.safetensors", "model.safetensors.index.json"
_HF_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # that are read
_ADAPTERS = {"adapter_config.json", "wmtp_adapter.json"}

# Parts of names that torch.compile, DDP, FSDP and activation checkpointing put in, and peft puts in front.
_WRAPPERS = re.compile(
    r"^base_model\.model\.|\b(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer)\."
)

# name inside a block -> (HF key, Meta key)
BLOCK_KEYS = {
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
# Those that Llama has not: name inside a block -> HF key
_OTHER_KEYS = {
    "attn.q_proj.bias": "self_attn.q_proj.bias",
    "attn.k_proj.bias": "self_attn.k_proj.bias",
    "attn.v_proj.bias": "self_attn.v_proj.bias",
    "attn.q_norm.scale": "self_attn.q_norm.weight",
    "attn.k_norm.scale": "self_attn.k_norm.weight",
    "sa_post_norm.scale": "post_attention_layernorm.weight",
    "mlp_post_norm.scale": "post_feedforward_layernorm.weight",
}
_ROTATED = re.compile(r"attn\.(q_proj\.(weight|bias)|k_proj\.(weight|bias)|q_norm\.scale|k_norm\.scale)$")
ROOT_KEYS = {
    "tok_embeddings.weight": ("model.embed_tokens.weight", "tok_embeddings.weight"),
    "norm.scale": ("model.norm.weight", "norm.weight"),
    "output.weight": ("lm_head.weight", "output.weight"),
}


class StoredTensor(NamedTuple):
    """A tensor of a checkpoint that is not read yet."""

    file: Path
    shape: tuple[int, ...]
    read: Callable[[], Tensor]  # on the CPU, in the stored dtype, mapped from the file where possible


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its shape, its format, and the place of each of its tensors."""

    path: Path
    shape: DecoderShape
    tensors: dict[str, StoredTensor]  # by the format's key
    form: str  # "hf" or "meta"

    def key_of(self, name: str) -> str | None:
        """Returns a parameter's key, see :func:`key_of`."""
        return key_of(name, self.form, self.shape.family)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a parameter that is stored: of its rows, where it is stored with others."""
        stored, place = self.tensors[self.key_of(name)].shape, self._place(name)
        return stored if place is None else (place.stop - place.start, *stored[1:])

    def read(self, name: str) -> Tensor:
        """Reads a parameter's full tensor, in torchtune's layout."""
        tensor, place = self.tensors[self.key_of(name)].read(), self._place(name)
        tensor = tensor if place is None else tensor[place]
        return to_interleaved(tensor, self.shape.head_dim) if self.form == "hf" and is_rotated(name) else tensor

    def _place(self, name: str) -> slice | None:
        """Returns the rows of a parameter that is stored with others; a tensor of another size is all its own."""
        parts = stored_together(name, self.shape) if self.form == "hf" else {}
        if not parts or self.tensors[self.key_of(name)].shape[0] != sum(parts.values()):
            return None
        start = sum(parts[part] for part in takewhile(name.__ne__, parts))
        return slice(start, start + parts[name])


def key_of(name: str, form: str, family: str = "llama") -> str | None:
    """Returns a parameter's key in the format ``hf`` or ``meta``; None where that format has no such parameter.

    ``layers.0.attn.q_proj.weight`` is ``model.layers.0.self_attn.q_proj.weight`` or ``layers.0.attention.wq.weight``.
    Blocks of additional heads keep their place, ``extra_heads.{j}``, with the format's names inside.
    """
    column = ("hf", "meta").index(form)
    if name in ROOT_KEYS:
        return ROOT_KEYS[name][column]
    block = re.fullmatch(r"((layers|extra_heads)\.\d+)\.(.+)", name)
    keys = {inside: both[column] for inside, both in BLOCK_KEYS.items()}
    if form == "hf":
        keys |= _OTHER_KEYS | dict(FAMILIES[family].tensors)
    if block is None or block[3] not in keys:
        return None
    prefix = "model." if form == "hf" and block[2] == "layers" else ""
    return f"{prefix}{block[1]}.{keys[block[3]]}"


def stored_together(name: str, shape: DecoderShape) -> dict[str, int]:
    """Returns the parameters that an HF folder of the family stores as one tensor with this one, in the order of their
    rows, and how many rows each has; empty where it is stored alone."""
    block = re.fullmatch(r"((?:layers|extra_heads)\.\d+)\.(.+)", name)
    tensors = FAMILIES[shape.family].tensors
    key = tensors.get(block[2]) if block else None
    inside = [part for part in tensors if tensors[part] == key]
    if key is None or len(inside) < 2:
        return {}
    queries, keys = (count * (shape.head_dim or 0) for count in (shape.num_heads, shape.num_kv_heads))
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    return {f"{block[1]}.{part}": rows.get(part.split(".")[1], shape.intermediate_dim) for part in inside}


def is_rotated(name: str) -> bool:
    """Returns whether a parameter's values belong to coordinates that RoPE turns, whose order is a convention."""
    return _ROTATED.search(name) is not None


def to_interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """Converts a q or k projection from HF's row order to Meta's and torchtune's.

    RoPE turns pairs of rows of each head. HF pairs row i with row i + head_dim / 2, Meta row 2i with row 2i + 1.
    """
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def to_half_split(weight: Tensor, head_dim: int) -> Tensor:
    """Converts back."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


# ----------------------------------------------------------------------------------------------------------------------
# Opening


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens and checks every file of a checkpoint; no tensor is read but an unembedding that should be tied.

    Raises:
        CheckpointError: no checkpoint there, or two; a file missing or truncated, files that contradict each other, or
            a model that is no plain Llama.
    """
    if form_of(path) == "meta":
        tensors = _open_pth(path / META_WEIGHTS)
        return Checkpoint(path, _meta_shape(path, tensors), tensors, "meta")
    shape = hf_shape(path)
    tensors = _hf_tensors(path)
    if shape.num_future_tokens > 1:
        tensors |= open_safetensors(path / MTP_WEIGHTS)
    if shape.tie_word_embeddings:
        _refuse_untied(path, tensors)
    return Checkpoint(path, shape, tensors, "hf")


def read_shape(path: Path) -> DecoderShape:
    """Reads a model's shape from config.json, or from params.json and the shapes in consolidated.pth."""
    return hf_shape(path) if form_of(path) == "hf" else _meta_shape(path, _open_pth(path / META_WEIGHTS))


def refuse_wrapped(tensors: dict[str, StoredTensor], key: str) -> None:
    """Refuses a checkpoint that has a key under the name that a wrapper gave it."""
    wrapped = next((stored for stored in tensors if stored != key and _WRAPPERS.sub("", stored) == key), None)
    if wrapped is not None:
        raise CheckpointError(
            f"{tensors[wrapped].file}: {wrapped} should be {key}: the state dict is a wrapper's (torch.compile, DDP, "
            "FSDP or peft); save the module inside, a peft model after merge_and_unload(), or rename the keys"
        )


def form_of(path: Path) -> str:
    """Returns ``hf`` or ``meta``, by the files of a folder; a CheckpointError says that it is neither, or both."""
    there = {file.name for file in path.iterdir()} if path.is_dir() else set()
    meta, adapters = {META_CONFIG, META_WEIGHTS} <= there, sorted(there & _ADAPTERS)
    if meta and there & {CONFIG, HF_WEIGHTS, HF_INDEX}:
        raise CheckpointError(
            f"{path} holds two checkpoints, {META_CONFIG} with {META_WEIGHTS} and HF's {CONFIG}; keep one in the folder"
        )
    if not meta and CONFIG not in there:
        found, hint = ", ".join(sorted(there)[:8]) or ("nothing" if path.is_dir() else "no folder"), ""
        if gguf := sorted(path.glob("*.gguf")):
            hint = f"; give the file itself, {gguf[0]}"
        if adapters:
            hint = "; it is an adapter: give the checkpoint that it was trained on, and this folder as the adapter"
        raise CheckpointError(
            f"{path} is no checkpoint: expected {CONFIG} with {HF_WEIGHTS} (HF), or {META_CONFIG} with "
            f"{META_WEIGHTS} (Meta), found {found}{hint}"
        )
    if adapters:
        raise CheckpointError(
            f"{path} holds a model and an adapter ({adapters[0]}); transformers would load the adapter's base, and the"
            " adapter into it: move the adapter to a folder of its own, or merge it"
        )
    return "meta" if meta else "hf"


def _hf_tensors(path: Path) -> dict[str, StoredTensor]:
    """Finds the tensors of the model that `transformers` reads: each in one file, as an index, if any, says."""
    index, weight_map = path / HF_INDEX, None
    if index.is_file():
        weight_map = read_json(index, "weight_map")["weight_map"]
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{index}: weight_map must name files, got {weight_map!r:.60}; copy it again")
    elif not (path / HF_WEIGHTS).is_file():
        raise CheckpointError(
            f"{path} holds neither {HF_WEIGHTS} nor {HF_INDEX}; save it with transformers' save_pretrained, "
            "which writes safetensors"
        )
    names = [HF_WEIGHTS] if weight_map is None else sorted(set(weight_map.values()))
    strays = sorted(file.name for file in path.iterdir() if _HF_FILE.fullmatch(file.name) and file.name not in names)
    if strays:
        named = HF_WEIGHTS if weight_map is None else f"the files that {HF_INDEX} names"
        raise CheckpointError(f"{path} holds {strays[0]} beside {named}: two models; remove the one that is not meant")
    tensors = {}
    for name in names:
        for key, tensor in open_safetensors(path / name).items():
            if key in tensors:
                raise CheckpointError(f"{path}: {tensors[key].file.name} and {name} both hold {key}; copy it again")
            tensors[key] = tensor
    for key in () if weight_map is None else sorted(weight_map.keys() | tensors.keys()):
        there = tensors[key].file.name if key in tensors else "no file"
        if weight_map.get(key) != there:
            raise CheckpointError(
                f"{index} has {key} in {weight_map.get(key, 'no file')}, it lies in {there}; copy the checkpoint again"
            )
    return tensors


def _refuse_untied(path: Path, tensors: dict[str, StoredTensor]) -> None:
    """Refuses a tied unembedding that is stored too and differs: `transformers` 4 and 5 read two models from it."""
    embedding, unembedding = (tensors.get(key_of(name, "hf")) for name in ("tok_embeddings.weight", "output.weight"))
    if embedding is None or unembedding is None:
        return
    rows = zip(embedding.read().split(4096), unembedding.read().split(4096), strict=False)
    if embedding.shape != unembedding.shape or not all(torch.equal(a.float(), b.float()) for a, b in rows):
        raise CheckpointError(
            f"{path / CONFIG} has tie_word_embeddings true, but lm_head.weight is not model.embed_tokens.weight; set it"
            " to false to use both, as transformers 5 does, or remove lm_head.weight, which transformers 4 ignores"
        )


def open_safetensors(file: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a safetensors file by key; a CheckpointError says that it is missing or truncated."""
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; copy its folder again, with all files")
    try:
        handle = safe_open(file, framework="pt")  # maps the file, and checks its length against its header
    except Exception as error:
        raise unreadable(file, error) from error
    tensors = {}
    for key in handle.keys():  # noqa: SIM118
        stored = handle.get_slice(key)
        _refuse_quantized(file, key, _DTYPES.get(stored.get_dtype(), stored.get_dtype()))
        tensors[key] = StoredTensor(file, tuple(stored.get_shape()), partial(handle.get_tensor, key))
    return tensors


def _open_pth(file: Path) -> dict[str, StoredTensor]:
    try:
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise unreadable(file, error) from error
    if not isinstance(state, dict) or not all(torch.is_tensor(tensor) for tensor in state.values()):
        raise CheckpointError(f"{file} is no state dict of tensors; expected Meta's consolidated.pth")
    for key, tensor in state.items():
        _refuse_quantized(file, key, tensor.dtype)
    return {key: StoredTensor(file, tuple(tensor.shape), lambda t=tensor: t) for key, tensor in state.items()}


def _refuse_quantized(file: Path, key: str, dtype: Any) -> None:
    """Refuses whole numbers and 8 bits: without their scales, which no name here has, they are no weights."""
    if dtype not in _DTYPES.values():
        raise CheckpointError(
            f"{file}: {key} is stored as {str(dtype).removeprefix('torch.')}, as quantised weights are; use the "
            "model's checkpoint in float32, bfloat16 or float16"
        )


def _meta_shape(path: Path, tensors: dict[str, StoredTensor]) -> DecoderShape:
    keys = ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight")
    for key in keys:
        if key not in tensors:
            refuse_wrapped(tensors, key)
            raise CheckpointError(f"{path / META_WEIGHTS} lacks {key}; expected the keys of Meta's Llama")
    file, shapes = path / META_CONFIG, (tensors[key].shape for key in keys)
    params = read_json(file, "dim", "n_layers", "n_heads")
    return shape_of_params(file, params, *shapes, tied="output.weight" not in tensors)
