"""Frozen models that run beside the policy, for weightings whose signals the data do not bring."""

from collections.abc import Collection
from typing import Any

import torch

from wmtp.config import ConfigError
from wmtp.data import hf_tokenizer, require_same_vocabulary
from wmtp.distributed import World
from wmtp.models import ValueModel, load_value_model, resolve_checkpoint


def runs_beside(needs: Collection[str], signal: str, *, in_data: bool, key: str, model: Any) -> bool:
    """Whether a frozen model must give what the weighting reads, because the data do not bring it.

    Args:
        needs: the weighting's.
        signal: ``reference_ce`` or ``values``.
        in_data: whether the dataset has a column of that name.
        key, model: the config's key that names the model, and its value, None where it is not set.

    Raises:
        ConfigError: nothing gives the signal, or both do.
    """
    if signal not in needs:
        return False
    if in_data == (model is not None):
        both = f"the dataset has a {signal} column and {key} is set; keep one of them"
        neither = f"this weighting needs {signal}: set {key}, or use a dataset with a {signal} column"
        raise ConfigError(both if in_data else neither)
    return not in_data


def value_model_beside(
    path: str, tokenizer: Any, seq_len: int, world: World, *, dtype: torch.dtype, cpu_offload: bool = False
) -> ValueModel:
    """The critic's frozen value model, sharded as the policy is, for rows of ``seq_len`` tokens of its tokenizer.

    Args:
        path: as `resolve_checkpoint` takes it.
        tokenizer: the policy's.
        dtype: of the computation.

    Raises:
        ValueError: no value model there, one of other token ids, or one of shorter rows.
    """
    path = resolve_checkpoint(path)
    require_same_vocabulary(tokenizer, hf_tokenizer(path), "value model")
    device = "cpu" if cpu_offload else world.device
    model = load_value_model(path, mesh=world.mesh, param_dtype=dtype, device=device, cpu_offload=cpu_offload)
    if seq_len > model.max_seq_len:
        raise ConfigError(f"seq_len {seq_len} is longer than the value model's {model.max_seq_len}")
    return model
