"""Frozen models that run beside the policy, for weightings whose signals the data do not bring."""

import difflib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from wmtp.config import ConfigError, build
from wmtp.data import PackedDataset
from wmtp.distributed import World
from wmtp.models import load_checkpoint, require_fit, shard_model
from wmtp.pretrained import hf_tokenizer, require_same_vocabulary, resolve_checkpoint
from wmtp.weighting.base import FROM_A_MODEL, OF_THE_POLICY, way_to

# Whose weights cpu_offload keeps in host memory: of the model that is trained, of those that are frozen beside it.
OFFLOAD = {False: (), True: ("model", "frozen"), "frozen": ("frozen",)}


def frozen_signals(needs: Collection[str], data: PackedDataset, models: Mapping[str, Any]) -> set[str]:
    """Returns the signals that a frozen model must give, because the weighting needs them and the data lack them.

    Args:
        needs: the weighting's.
        models: by their keys, what the config sets for the models that can give signals, or None.

    Raises:
        ConfigError: nothing gives a signal, or two things do.
        UserError: nothing reads the weights of the prompts (:meth:`~wmtp.data.PackedDataset.require_read`).
    """
    data.require_read(needs)
    beside = set()
    for name in sorted(needs):
        model = models.get(FROM_A_MODEL.get(name, ""))
        if name in data.signals and name in OF_THE_POLICY:
            raise ConfigError(f"the dataset has a {name} column, which the loss computes; rename the column")
        if name in data.signals and model is not None:
            raise ConfigError(f"the dataset has a {name} column and {FROM_A_MODEL[name]} is set; keep one of them")
        if model is not None:
            beside.add(name)
        elif name not in data.signals and name not in OF_THE_POLICY:
            ours = () if name in FROM_A_MODEL else (*OF_THE_POLICY, *FROM_A_MODEL)  # a name of ours is meant
            near = difflib.get_close_matches(name, [*ours, *data.signals], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            if name in data.unread:
                hint = f"; its column {name} has not one finite number for each token in every row"
            raise ConfigError(f"this weighting needs {name}: {way_to(name)}{hint}")
    return beside


def frozen_reference(
    section: DictConfig | None,
    checkpoint: str | None,
    tokenizer: Any,
    data: PackedDataset,
    world: World,
    *,
    dtype: torch.dtype,
    cpu_offload: bool = False,
    compile: bool = False,
    log: Callable[[str], None] = print,
) -> nn.Module:
    """Builds the frozen reference model of a config's section, sharded as the policy is; each rank reads its own shard.

    It is stored in the dtype of the computation: its weights would be rounded to that when they are gathered.

    Args:
        checkpoint, tokenizer, dtype: as ``path``, ``tokenizer`` and ``dtype`` of :func:`frozen_value_model`.
        data: what it will read.
        compile: its blocks.
        log: called with what is to be said of its weights.

    Raises:
        ValueError: no checkpoint, one of other token ids, or a model that does not fit it or the data.
    """
    if checkpoint is None:
        raise ConfigError("reference_model has no weights: set reference_checkpoint")
    path = resolve_checkpoint(checkpoint)
    require_same_vocabulary(tokenizer, hf_tokenizer(path))
    with torch.device("meta"):
        model = build(section, where="reference_model")
    require_fit(model, data.max_token_id, data.seq_len, "reference_model")
    model.requires_grad_(False).eval().to(dtype)
    for block in (*model.layers, *model.extra_heads) if compile else ():
        block.compile()
    shard_model(model, world.mesh, param_dtype=dtype, cpu_offload=cpu_offload)
    load_checkpoint(model, path, device="cpu" if cpu_offload else world.device, log=log)
    return model


def frozen_value_model(
    path: str | None, tokenizer: Any, seq_len: int, world: World, *, dtype: torch.dtype, cpu_offload: bool = False
) -> nn.Module | None:
    """Builds the critic's frozen value model, sharded as the policy is, for rows of ``seq_len`` tokens.

    Args:
        path: as `resolve_checkpoint` takes it; None for no model.
        tokenizer: the policy's.
        dtype: of the computation.

    Raises:
        ValueError: no value model there, one of other token ids, or one of shorter rows.
    """
    if path is None:
        return None
    from wmtp.models.value import load_value_model  # most runs have none

    folder = resolve_checkpoint(path)
    require_same_vocabulary(tokenizer, hf_tokenizer(folder), "value model")
    device = "cpu" if cpu_offload else world.device
    model = load_value_model(folder, mesh=world.mesh, param_dtype=dtype, device=device, cpu_offload=cpu_offload)
    if seq_len > model.max_seq_len:
        raise ConfigError(f"seq_len {seq_len} is longer than the value model's {model.max_seq_len}")
    return model
