"""A trained adapter as a folder: files that `peft` loads onto the `transformers` model, and files of our own.

    adapter_config.json         peft's own, with the next: adapters of the trunk and head 1, as modules_to_save their
    adapter_model.safetensors   trained norms and unembedding; both absent with a frozen trunk, which has none of these
    wmtp_heads.safetensors      all other trained parameters (the extra heads'), by their names in MTPDecoder
    wmtp_adapter.json           the hash of its base, and the arguments of add_lora

Rows of q and k, and so of their B and magnitudes, are in HF's order in peft's files. Projections that HF's model has as
one have one adapter there, of rank r each: their A below each other, their B as blocks of a diagonal.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn

from wmtp.config import ConfigError, differences
from wmtp.distributed import on_rank_0
from wmtp.models.export import full_parameter, whole_folder
from wmtp.models.load import local_part, local_tensor, named_parameters
from wmtp.models.lora import Adapters
from wmtp.pretrained.checkpoint_formats import (
    is_rotated,
    key_of,
    open_safetensors,
    stored_together,
    to_half_split,
    to_interleaved,
)
from wmtp.pretrained.config_files import CheckpointError, read_json
from wmtp.pretrained.resolve import checkpoint_sha256, resolve_checkpoint

ADAPTER = "wmtp_adapter.json"
HEADS_WEIGHTS = "wmtp_heads.safetensors"
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_PREFIX, _B = "base_model.model.", ".lora_b.weight"
_PARTS = {"lora_a.weight": "lora_A.weight", "lora_b.weight": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
# These may differ between the run that trained an adapter and the one that reads it.
_FREE = ("dropout", "quantize")


@torch.no_grad()
def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    base_weights: str,
    base_name: str | None = None,
    whole_base: bool = False,
) -> None:
    """Writes the trained parameters of a model as an adapter folder, which appears whole or not at all.

    Every rank of a sharded model calls this; rank 0 writes.

    Args:
        model: an :class:`~wmtp.models.MTPDecoder` that :func:`~wmtp.models.add_lora` adapted.
        folder: must not exist.
        base_weights: :func:`~wmtp.pretrained.checkpoint_sha256` of the base's folder.
        base_name: the base's folder or name, for peft's base_model_name_or_path.
        whole_base: that base holds all that was trained but the low-rank adapters: norms, unembedding, extra heads.

    Raises:
        FileExistsError: the folder is there already.
    """
    with whole_folder(model, Path(folder), "adapter") as writing:
        peft, ours = {}, {}
        parts: dict[str, dict[str, Tensor]] = {}
        for name, parameter in named_parameters(model):
            if not parameter.requires_grad:
                continue
            tensor = full_parameter(parameter)  # a collective: every rank takes part
            if writing is None:
                continue
            tensor = tensor.to("cpu", copy=True).contiguous()
            keys = _peft_keys(name, model)
            if not keys:
                ours[name] = tensor
                continue
            if _has_rotated_rows(name):
                tensor = to_half_split(tensor, model.config.head_dim).contiguous()
            if together := _together(name, model):
                parts.setdefault(keys[0], {})[name] = tensor
                if len(parts[keys[0]]) < len(together):
                    continue
                all_parts = [parts[keys[0]].pop(part) for part in together]
                tensor = torch.block_diag(*all_parts) if name.endswith(_B) else torch.cat(all_parts)
            peft |= {key: tensor.clone() for key in keys}
        if writing is None:
            return
        if peft:
            save_file(peft, writing / PEFT_WEIGHTS, metadata={"format": "pt"})
            (writing / PEFT_CONFIG).write_text(json.dumps(_peft_config(model, base_name, whole_base), indent=2) + "\n")
        if ours:
            save_file(ours, writing / HEADS_WEIGHTS, metadata={"format": "pt"})
        about = {"base_weights": base_weights, "base_name": base_name, "adapters": asdict(model.adapters)}
        about |= {"num_future_tokens": model.num_future_tokens, "looped_heads": model.config.looped_heads}
        about["head_init"] = model.head_init if model.num_new_heads else None  # of heads that the base has not
        (writing / ADAPTER).write_text(json.dumps(about, indent=2) + "\n")


def read_adapter(folder: str | Path) -> dict[str, Any]:
    """Reads wmtp_adapter.json: base_weights, base_name, adapters (arguments of `add_lora`), num_future_tokens,
    looped_heads, and head_init, null where the base has all heads.

    Raises:
        CheckpointError: the folder holds no adapter.
    """
    file = Path(folder) / ADAPTER
    if not file.is_file():
        raise CheckpointError(f"{folder} holds no adapter ({ADAPTER}); train one with lora_wmtp.py")
    return read_json(file, "base_weights", "adapters", "num_future_tokens", "looped_heads")


@torch.no_grad()
def load_adapter(model: nn.Module, folder: str | Path, *, base_weights: str) -> None:
    """Fills the trained parameters of an adapted model from an adapter folder; each rank reads its own part.

    Raises:
        CheckpointError: one line, before anything is changed: no adapter there, one of another base, one whose settings
            are not the model's, or files that do not fit.
    """
    check_adapter(folder, model, base_weights)
    parameters = {name: parameter for name, parameter in named_parameters(model) if parameter.requires_grad}
    stored = _read(Path(folder), parameters, model)
    for name, parameter in parameters.items():
        tensor = stored[name]
        if _has_rotated_rows(name):
            tensor = to_interleaved(tensor, model.config.head_dim)
        local_tensor(parameter).copy_(local_part(tensor, parameter))


def check_adapter(folder: str | Path, model: Any, base_weights: str) -> None:
    """Raises CheckpointError where an adapter folder does not belong to a base, or to a model that `add_lora` made."""
    about = read_adapter(folder)
    if about["base_weights"] != base_weights:
        raise CheckpointError(
            f"adapter {folder} belongs to another base: it was trained on {about['base_weights']:.23}, this one is "
            f"{base_weights:.23}; give the checkpoint that the adapter was trained on"
        )
    wanted = {**asdict(model.adapters), "num_future_tokens": model.num_future_tokens, "head_init": model.head_init}
    wanted["looped_heads"] = model.config.looped_heads
    beside = [key for key in ("num_future_tokens", "looped_heads", "head_init") if about[key] is not None]
    for key, theirs in {**about["adapters"], **{key: about[key] for key in beside}}.items():
        same = set(theirs) == set(wanted[key]) if key == "targets" else theirs == wanted.get(key)
        if key not in _FREE and not same:
            ours = list(wanted[key]) if key == "targets" else wanted.get(key)
            raise CheckpointError(f"adapter {folder} has {key} {theirs}, the model {ours}; set it to the adapter's")


def _read(folder: Path, parameters: dict[str, nn.Parameter], model: nn.Module) -> dict[str, Tensor]:
    """Returns the stored tensor of every parameter, mapped from the files and checked, in the files' row order."""
    files = {}
    for name in parameters:
        keys = _peft_keys(name, model)
        files.setdefault(folder / (PEFT_WEIGHTS if keys else HEADS_WEIGHTS), {})[name] = keys[0] if keys else name
    found = {}
    for file, keys in files.items():
        content = open_safetensors(file)
        both = {key: name for name in keys for key in _peft_keys(name, model) or [name]}
        unknown = sorted(content.keys() - both.keys())
        if unknown:
            raise CheckpointError(f"{file}: {unknown[0]} has no place in the model's adapters; copy the adapter again")
        for key, name in both.items():
            both_there = key != keys[name] and key in content and keys[name] in content
            if both_there and not torch.equal(content[key].read(), content[keys[name]].read()):
                raise CheckpointError(f"{file}: {key} is not {keys[name]}, and the model is tied; untie its base")
        for name, key in keys.items():
            expected, stored = _stored_shape(name, tuple(parameters[name].shape), model), content.get(key)
            if stored is None or stored.shape != expected:
                has = "lacks it" if stored is None else f"holds {list(stored.shape)}"
                raise CheckpointError(f"{file} {has}: {key} must be {list(expected)}; copy the adapter again")
            found[name] = _own_part(name, stored.read(), model)
    return found


def _together(name: str, model: nn.Module) -> dict[str, int]:
    """Returns the adapter's parameters that are one tensor in peft's file with this one, see `stored_together`."""
    for ours in _PARTS:
        if name.endswith(f".{ours}"):
            weights = stored_together(name.removesuffix(ours) + "weight", model.config)
            return {weight.removesuffix("weight") + ours: rows for weight, rows in weights.items()}
    return {}


def _stored_shape(name: str, shape: tuple[int, ...], model: nn.Module) -> tuple[int, ...]:
    """Returns the shape in the file of a parameter that has this shape in the model."""
    together = _together(name, model) if _peft_keys(name, model) else {}
    if not together:
        return shape
    rows = shape[0] * len(together) if name.endswith(".lora_a.weight") else sum(together.values())
    return (rows, *(width * len(together) if name.endswith(_B) else width for width in shape[1:]))


def _own_part(name: str, stored: Tensor, model: nn.Module) -> Tensor:
    """Returns a parameter's part of the tensor that the file has."""
    together = _together(name, model) if _peft_keys(name, model) else {}
    if not together:
        return stored
    place = list(together).index(name)
    if name.endswith(".lora_a.weight"):
        return stored.chunk(len(together))[place]
    rows = stored.split(list(together.values()))[place]
    return rows.chunk(len(together), dim=1)[place].contiguous() if name.endswith(_B) else rows


def _peft_keys(name: str, model: nn.Module) -> list[str]:
    """Returns the keys of a parameter in peft's file; empty where it has no place for it, or there is no such file."""
    if name.startswith("extra_heads.") or model.adapters.trunk == "frozen":
        return []
    for ours, theirs in _PARTS.items():
        if name.endswith(f".{ours}"):
            key = key_of(name.removesuffix(ours) + "weight", "hf", model.config.family)
            return [_PREFIX + key.removesuffix("weight") + theirs]
    # peft wraps embedding and unembedding separately, even where they are one.
    tied = ["lm_head.weight"] if name == "tok_embeddings.weight" else []
    return [_PREFIX + key for key in (key_of(name, "hf", model.config.family), *tied)]


def _has_rotated_rows(name: str) -> bool:
    """Returns whether peft's file orders a parameter's rows otherwise: of trunk and head 1, B and magnitude of q and k,
    and the norms of queries and keys."""
    weight = re.sub(r"\.(lora_b\.weight|magnitude)$", ".weight", name)
    return name.startswith("layers.") and is_rotated(weight)


def _peft_config(model: nn.Module, base_name: str | None, whole_base: bool) -> dict[str, Any]:
    chosen: Adapters = model.adapters

    def module(name: str) -> str:  # of HF's block
        return key_of(name, "hf", model.config.family).split(".")[-2]

    weights = [f"layers.0.{_inside(target)}.weight" for target in chosen.targets]
    merged = {module(weight): len(stored_together(weight, model.config)) for weight in weights}
    several = {name: count for name, count in merged.items() if count}
    whole = []
    if chosen.train_norms:
        norms = [name for name, _ in named_parameters(model) if re.match(r"layers\.0\..*norm\.scale$", name)]
        whole = [*dict.fromkeys(map(module, norms)), "model.norm"]
    if chosen.train_unembedding:
        whole += ["embed_tokens", "lm_head"] if model.config.tie_word_embeddings else ["lm_head"]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": chosen.rank,
        "lora_alpha": chosen.alpha,
        "lora_dropout": chosen.dropout,
        "use_dora": chosen.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": list(merged),
        "rank_pattern": {name: count * chosen.rank for name, count in several.items()},
        "alpha_pattern": {name: count * chosen.alpha for name, count in several.items()},
        "modules_to_save": whole or None,
        # `transformers` may read such a base with all heads, whose modules have the same names.
        **({"modules_to_save": None, "exclude_modules": r"extra_heads\..*"} if whole_base else {}),
    }


def _inside(target: str) -> str:
    return f"{'mlp' if target.startswith('w') else 'attn'}.{target}"


# ----------------------------------------------------------------------------------------------------------------------
# Which base they belong to


def describe_base(checkpoint: str | None, sections: Mapping[str, DictConfig], *, seed: int) -> dict[str, str]:
    """Returns what a checkpoint of an adapter does not hold: which base its parameters belong to.

    That is ``base_weights``, the SHA-256 of the base's files, and the config sections that shape the model,
    as JSON. Every rank calls it; rank 0 reads the files.

    Args:
        checkpoint: as `resolve_checkpoint` takes it; None for random weights, which the seed names.
    """
    weights = f"random, seed {seed}"
    if checkpoint is not None:
        path = resolve_checkpoint(checkpoint)
        weights = on_rank_0(lambda: checkpoint_sha256(path))
    plain = {name: OmegaConf.to_container(section, resolve=True) for name, section in sections.items()}
    return {"base_weights": weights, **{name: json.dumps(value, sort_keys=True) for name, value in plain.items()}}


def require_same_base(saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raises ConfigError where a checkpoint was saved on another base than the run would go on with."""
    before, after = ({key: _plain(value) for key, value in base.items()} for base in (saved, now))
    changed = differences(before, after)
    if changed:
        raise ConfigError(f"cannot resume with {', '.join(changed)}; restore it, or start a new run")


def _plain(value: str) -> object:
    return json.loads(value) if value.startswith("{") else value
