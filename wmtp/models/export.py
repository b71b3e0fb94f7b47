"""The export of a model as its family's HF folder: head 1 for `transformers`, the other heads in files of their own."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from wmtp.distributed import wait_for_all
from wmtp.errors import ExistsError, UserError
from wmtp.files import publish, unfinished
from wmtp.models.load import compute_device, reshard, without_adapters
from wmtp.models.lora import adapter_parameters, lora_modules, merged_weight, refuse_quantized
from wmtp.models.nf4 import is_nf4
from wmtp.pretrained.checkpoint_formats import HF_INDEX, HF_WEIGHTS, is_rotated, key_of, stored_together, to_half_split
from wmtp.pretrained.config_files import MODELING, MTP_CONFIG, MTP_WEIGHTS, declared_heads, exported_configs


@torch.no_grad()
def export_hf(
    model: nn.Module,
    folder: str | Path,
    *,
    tokenizer_source: Any = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: float = 5e9,
    merge_quantized: bool = False,
) -> None:
    """Writes ``folder`` so that `transformers` loads head 1 as a model of its family, and `load_checkpoint` all heads.

    Additional heads go to mtp_heads.safetensors and mtp_config.json, which `transformers` reads by the code in
    modeling_wmtp.py where it is trusted, and else leaves alone. Low-rank
    adapters are merged into the written weights; the model itself keeps them apart. config.json and
    generation_config.json are those of the checkpoint that the model was read from, with the changes of training, and
    the tokenizer's files are the tokenizer's own; `transformers` reads them from 4.40 on. The folder appears whole or
    not at all.

    Every rank of a sharded model calls this; parameters are gathered one at a time and rank 0 writes, holding at most
    ``max_shard_bytes`` (or the additional heads, if they are larger).

    Args:
        model: an :class:`~wmtp.models.MTPDecoder`.
        folder: must not exist.
        tokenizer_source: a :class:`wmtp.pretrained.Tokenizer`, a folder that `hf_tokenizer` reads, or a tokenizer of
            `transformers`. Without it the folder has no tokenizer, and its end tokens are those of the source alone.
        dtype: of the stored weights; by default each parameter's own.
        max_shard_bytes: largest size of one file.
        merge_quantized: write the weights of a quantised trunk with their rounding errors, adapters merged.

    Raises:
        FileExistsError: the folder is there already.
        FileNotFoundError: tokenizer_source holds no tokenizer.
        ValueError: the model has parameters that are no part of its family, the tokenizer cannot be used, or the trunk
            is quantised and merge_quantized is false.
    """
    with whole_folder(model, Path(folder), "export") as writing:
        write_hf(model, writing, tokenizer_source, dtype, max_shard_bytes, merge_quantized)


@contextmanager
def whole_folder(model: nn.Module, folder: Path, kind: str) -> Iterator[Path | None]:
    """Gives rank 0 a folder to write into, and publishes it as ``folder`` when the block ends; other ranks get None.

    Every rank of a sharded model enters the block, in which it gathers parameters, and leaves it when the folder is
    there. A block that raises leaves nothing behind.

    Raises:
        FileExistsError: the folder is there already.
    """
    reshard(model)
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    if (is_main or sharded) and folder.exists():
        raise ExistsError(f"{kind} folder {folder} already exists; give another, or remove it")
    if sharded:
        # Every rank has looked before rank 0 writes. Gathering does not order them all: it stays inside a replica.
        wait_for_all()
    if is_main:
        writing = unfinished(folder)
        writing.mkdir()
        try:
            yield writing
        except BaseException:
            shutil.rmtree(writing)
            raise
        publish(writing, folder)
    else:
        yield None
    if sharded:
        wait_for_all()


def write_hf(
    model: nn.Module,
    writing: Path | None,
    tokenizer_source: Any,
    dtype: torch.dtype | None,
    max_shard_bytes: float = 5e9,
    merge_quantized: bool = False,
    merge: bool = True,
) -> None:
    """Writes the files of :func:`export_hf` into the folder of a :func:`whole_folder`.

    Args:
        merge: False leaves low-rank adapters out of the weights.
    """
    refuse_quantized(model, merge_quantized)
    tokenizer = as_tokenizer(tokenizer_source)
    parameters = without_adapters(model)
    family = model.config.family
    strangers = [name for name in parameters if key_of(name, "hf", family) is None]
    if strangers:
        raise UserError(
            f"parameter {strangers[0]} has no place in an HF folder of {family}; remove what was added to the decoder"
        )
    files, pending, heads, weight_map, total = 0, {}, {}, {}, 0
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in whole_tensors(model, writing is not None, dtype, merge):
        key = key_of(name, "hf", family)
        if is_rotated(name):
            tensor = to_half_split(tensor, model.config.head_dim).contiguous()
        if together := stored_together(name, model.config):
            parts.setdefault(key, {})[name] = tensor
            if len(parts[key]) < len(together):
                continue
            tensor = torch.cat([parts[key].pop(part) for part in together])
        if key.startswith("extra_heads."):
            heads[key] = tensor
            continue
        if pending and sum(map(_num_bytes, pending.values())) + _num_bytes(tensor) > max_shard_bytes:
            files += 1
            weight_map |= _write(writing, files, pending)
            pending = {}
        pending[key] = tensor
        total += _num_bytes(tensor)
    if writing is not None:
        weight_map |= _write(writing, files + 1, pending)
        _name_files(writing, files + 1, weight_map, total)
        if heads:
            save_file(heads, writing / MTP_WEIGHTS, metadata={"format": "pt"})
            (writing / MTP_CONFIG).write_text(json.dumps(declared_heads(model.config)) + "\n")
            shutil.copyfile(Path(__file__).with_name(MODELING), writing / MODELING)
        _write_configs(writing, model, dtype or parameters["norm.scale"].dtype, tokenizer)


def whole_tensors(
    model: nn.Module, writes: bool, dtype: torch.dtype | None, merge: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor on the CPU) of every parameter, adapters merged, on the rank that writes."""
    adapters = {f"{name}.weight": module for name, module in lora_modules(model)}
    for name, parameter in without_adapters(model).items():
        tensor = full_parameter(parameter)  # a collective: every rank takes part
        module = adapters.get(name) if merge else None
        low_rank = () if module is None else [full_parameter(p) for p in adapter_parameters(module)]
        if not writes:
            continue
        tensor = tensor.to(torch.float32) if is_nf4(tensor) else tensor
        stored = dtype or tensor.dtype
        if low_rank:
            tensor = merged_weight(tensor, module, *low_rank)
        # A copy, in a layout of its own: safetensors writes only what does not share memory.
        yield name, tensor.to("cpu", dtype=stored, copy=True).contiguous()


def full_parameter(parameter: Tensor) -> Tensor:
    """Returns a parameter whole, on its compute device; for a sharded model this is a collective of all ranks."""
    if not isinstance(parameter, DTensor):
        return parameter.detach()
    return parameter.detach().to(compute_device(parameter)).full_tensor()


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _write(folder: Path, number: int, tensors: dict[str, Tensor]) -> dict[str, int]:
    save_file(tensors, folder / f"model-{number:05d}.safetensors", metadata={"format": "pt"})
    return dict.fromkeys(tensors, number)


def _name_files(folder: Path, files: int, weight_map: dict[str, int], total: int) -> None:
    """Gives the files HF's names, which contain their number, and writes the index."""
    names = (
        {1: HF_WEIGHTS} if files == 1 else {n: f"model-{n:05d}-of-{files:05d}.safetensors" for n in range(1, files + 1)}
    )
    for number, name in names.items():
        (folder / f"model-{number:05d}.safetensors").rename(folder / name)
    if files > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {key: names[n] for key, n in weight_map.items()}}
        (folder / HF_INDEX).write_text(json.dumps(index, indent=2) + "\n")


def as_tokenizer(source: Any) -> Any:
    """Returns the tokenizer of any form of tokenizer_source, or None."""
    from wmtp.pretrained.tokenizer import Tokenizer, hf_tokenizer  # which imports this package

    if isinstance(source, str | Path):
        return hf_tokenizer(source)
    return source if source is None or isinstance(source, Tokenizer) else Tokenizer(source)


def _write_configs(folder: Path, model: nn.Module, dtype: torch.dtype, tokenizer: Any) -> None:
    ids = {} if tokenizer is None else tokenizer.config_ids()
    for name, content in exported_configs(model.source, model.config, dtype, ids).items():
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    if tokenizer is not None:
        tokenizer.save(folder)
