"""Loading of a checkpoint into a model, sharded or not: each rank reads its own part."""

import math
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from wmtp.models.new_heads import check_new_heads, start_value
from wmtp.models.nf4 import quantize_nf4, quantized_modules
from wmtp.pretrained.checkpoint_formats import Checkpoint, open_checkpoint, refuse_wrapped
from wmtp.pretrained.config_files import CheckpointError, read_source
from wmtp.pretrained.shape import DecoderShape

# Constants of the computation that no tensor's shape shows: all but these.
_FREE = ("vocab_size", "num_layers", "embed_dim", "intermediate_dim", "max_seq_len", "num_future_tokens")
_CONSTANTS = [f.name for f in fields(DecoderShape) if f.name not in (*_FREE, "tie_word_embeddings", "looped_heads")]


@torch.no_grad()
def load_checkpoint(
    model: Any,
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    log: Callable[[str], None] | None = None,
) -> None:
    """Fills an :class:`~wmtp.models.MTPDecoder` from an HF or Meta checkpoint.

    A model on the meta device is materialised on ``device``. Of a model sharded with FSDP2, each rank cuts its own
    shard out of one tensor after another, without a collective, and never holds more than its shards and one full
    tensor. Values are cast to the parameters' dtype.

    Heads that the checkpoint lacks start as the model's ``head_init`` says (:mod:`wmtp.models.new_heads`); heads that
    the model lacks are left out. Looped heads may run another number of rounds than the checkpoint's.
    An untied model takes a tied checkpoint's embedding as its unembedding too. Low-rank adapters are no part of a
    checkpoint: on the meta device they become NaN, until :func:`~wmtp.models.init_lora` sets them. Weights that
    `add_lora` marked for quantisation are quantised one by one as they are read, on the device of the computation.

    Args:
        model: an MTPDecoder; it may be compiled, or wrapped for activation checkpointing.
        path: a folder, see :func:`~wmtp.pretrained.resolve_checkpoint`.
        device: of the parameters of a model on the meta device. RoPE's cache goes to the device of the computation, so
            with CPU-offloaded shards give ``cpu``.
        log: told which heads are new.

    Raises:
        CheckpointError: one line, before anything is changed: a file missing or truncated, a parameter missing, unknown
            or of another shape, or constants (RoPE base, norm epsilon, ...) other than the model's.
        UserError: new heads that the model's adapters could not train.
    """
    checkpoint = open_checkpoint(Path(path))
    source = read_source(checkpoint.path, checkpoint.form, checkpoint.shape.max_seq_len)
    reshard(model)
    parameters = without_adapters(model)
    sources = _sources(model.config, checkpoint, parameters)
    new = {name: start_value(name, model) for name in parameters if _is_new(name, checkpoint.shape)}
    if new:
        check_new_heads(model)
    model.num_new_heads = len({name.split(".")[1] for name in new})
    if new and log is not None:
        first = 1 + checkpoint.shape.num_future_tokens
        log(f"heads {first} to {model.num_future_tokens} are new, {path} lacks them: head_init {model.head_init}")
    quantized: dict[str, Any] = {f"{own_name(name)}.weight": module for name, module in quantized_modules(model)}

    if any(parameter.is_meta for parameter in parameters.values()):
        for module in quantized.values():
            module.weight = None  # it never exists in full precision
        model.to_empty(device=device)
        for name, parameter in named_parameters(model):
            if is_adapter(name):  # leftovers in memory could pass for weights
                local_tensor(parameter).fill_(math.nan)
        parameters |= without_adapters(model)
    target = compute_device(parameters["norm.scale"])
    for name, parameter in parameters.items():
        # No variable holds the tensor that was read, so it is freed before the next one is read.
        if name in quantized:
            quantized[name].weight = quantize_nf4(checkpoint.read(sources[name]).to(target, parameter.dtype), name)
            continue
        if (value := new.get(name)) is not None:
            local_tensor(parameter).fill_(value)
            continue
        local_tensor(parameter).copy_(local_part(checkpoint.read(sources[name]), parameter))
    model.reset_rope(target)
    model.source = source


def named_parameters(model: Any) -> Iterable[tuple[str, nn.Parameter]]:
    """Yields parameters by their own names, whatever wraps the blocks (activation checkpointing, torch.compile)."""
    for name, parameter in model.named_parameters():
        yield own_name(name), parameter


def own_name(name: str) -> str:
    """Returns a parameter's or module's name without the prefixes of activation checkpointing and torch.compile."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def is_adapter(name: str) -> bool:
    """Returns whether a parameter belongs to a low-rank adapter (see wmtp.models.lora)."""
    return name.endswith((".lora_a.weight", ".lora_b.weight", ".magnitude"))


def without_adapters(model: Any) -> dict[str, nn.Parameter]:
    """Returns the parameters that a checkpoint has, by their own names."""
    return {name: parameter for name, parameter in named_parameters(model) if not is_adapter(name)}


def reshard(model: Any) -> None:
    """Makes the shards the registered parameters again, where a forward pass left the gathered ones."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def compute_device(parameter: Tensor) -> torch.device:
    """Returns the device of a parameter's computation, which is not that of a CPU-offloaded shard."""
    if isinstance(parameter, DTensor) and parameter.device_mesh.device_type != parameter.device.type:
        kind = parameter.device_mesh.device_type
        return torch.device(kind, torch.get_device_module(kind).current_device())
    return parameter.device


def local_tensor(parameter: Tensor) -> Tensor:
    """Returns this rank's part of a parameter: its shard, or all of it."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def local_part(full: Tensor, parameter: Tensor) -> Tensor:
    """Returns this rank's part of the full tensor of ``parameter``: a view, cut as torch.chunk cuts."""
    if not isinstance(parameter, DTensor):
        return full
    for mesh_dim, placement in enumerate(parameter.placements):
        if type(placement) is Shard:
            size, rank = parameter.device_mesh.size(mesh_dim), parameter.device_mesh.get_local_rank(mesh_dim)
            rows = full.shape[placement.dim]
            chunk = -(-rows // size)  # the last ranks may have fewer rows, or none
            start = min(rank * chunk, rows)
            full = full.narrow(placement.dim, start, min(chunk, rows - start))
        elif not isinstance(placement, Replicate):
            raise NotImplementedError(f"parameters placed as {placement} cannot be cut; shard them with FSDP2 alone")
    return full


# ----------------------------------------------------------------------------------------------------------------------
# The stored tensor of each parameter


def _sources(model: DecoderShape, checkpoint: Checkpoint, parameters: dict[str, nn.Parameter]) -> dict[str, str]:
    """Returns, for each parameter, the name of its values in the checkpoint, after all checks."""
    stored = checkpoint.shape
    if model.looped_heads != stored.looped_heads and min(model.num_future_tokens, stored.num_future_tokens) > 1:
        theirs, ours = ("one looped block", "separate ones") if stored.looped_heads else ("separate ones", "one block")
        raise CheckpointError(
            f"{checkpoint.path} has {theirs} for its heads 2 to {stored.num_future_tokens}, the model {ours} "
            f"(looped_heads {str(model.looped_heads).lower()}); set looped_heads to {str(stored.looped_heads).lower()}"
        )
    if model.tie_word_embeddings and not stored.tie_word_embeddings:
        raise CheckpointError(
            f"{checkpoint.path} has an unembedding of its own, the model's is tied to the embedding; "
            "build the model with tie_word_embeddings=False, or with from_checkpoint"
        )
    sources = {name: _source(name, model, stored) for name in parameters}
    used = set()
    for name, source in sources.items():
        key = checkpoint.key_of(source)
        if key is None:
            raise CheckpointError(f"the model's parameter {name} has no place in a checkpoint; load before adding it")
        if key not in checkpoint.tensors:
            refuse_wrapped(checkpoint.tensors, key)
            raise CheckpointError(
                f"{checkpoint.path} lacks {key} (the model's {name}); its config says {stored.num_layers} layers and "
                f"{stored.num_future_tokens} heads, the model has {model.num_layers} and {model.num_future_tokens}: "
                "copy it again, or build the model with from_checkpoint"
            )
        tensor, shape = checkpoint.tensors[key], tuple(parameters[name].shape)
        if checkpoint.shape_of(source) != shape:
            raise CheckpointError(
                f"{tensor.file}: {key} is {list(tensor.shape)}, the model's {name} is {list(shape)}; "
                "build the model with from_checkpoint, or mend its sizes"
            )
        used.add(key)
    unknown = [key for key in checkpoint.tensors if key not in used and not _may_be_left_out(key, model, stored)]
    if unknown:
        raise CheckpointError(
            f"{checkpoint.tensors[unknown[0]].file}: {unknown[0]} has no place in the model "
            f"({len(unknown)} such keys); build the model with from_checkpoint"
        )
    for constant in _CONSTANTS:
        ours, theirs = getattr(model, constant), getattr(stored, constant)
        # Files that went through float32 say 9.9999997e-06 where others say 1e-05.
        near = isinstance(ours, float) and isinstance(theirs, int | float) and math.isclose(ours, theirs, rel_tol=1e-6)
        if not (near or ours == theirs):
            raise CheckpointError(
                f"{checkpoint.path} has {constant} {theirs}, the model {ours}; "
                f"build the model with from_checkpoint, or set its {constant}"
            )
    if (model.rope_scaling or {}).get("rope_type") == "dynamic" and model.max_seq_len > stored.max_seq_len:
        raise CheckpointError(
            f"{checkpoint.path} has RoPE of type dynamic, which beyond its {stored.max_seq_len} positions turns every "
            f"token by the whole text's length; set max_seq_len {model.max_seq_len} to that, or rope_scaling to yarn"
        )
    return sources


def _source(name: str, model: DecoderShape, stored: DecoderShape) -> str:
    if _is_new(name, stored):
        return f"layers.{model.num_layers - 1}.{name.split('.', 2)[2]}"
    if name == "output.weight" and stored.tie_word_embeddings:
        return "tok_embeddings.weight"
    return name


def _is_new(name: str, stored: DecoderShape) -> bool:
    """Tells a parameter of an extra head that the checkpoint lacks."""
    return name.startswith("extra_heads.") and int(name.split(".")[1]) >= stored.num_extra_blocks


def _may_be_left_out(key: str, model: DecoderShape, stored: DecoderShape) -> bool:
    """Tells heads beyond the model's, RoPE frequencies of older files, and a tied unembedding stored twice."""
    place, _, rest = key.partition(".")
    if place == "extra_heads":
        return model.num_extra_blocks <= int(rest.partition(".")[0]) < stored.num_extra_blocks
    return key.endswith("rotary_emb.inv_freq") or key == "rope.freqs" or (
        key == "lm_head.weight" and stored.tie_word_embeddings
    )  # fmt: skip
