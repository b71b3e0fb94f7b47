"""A run's optimizer: built from the config, also when the run goes on, and given the moments of a checkpoint."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from omegaconf import DictConfig
from torch import nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from wmtp.config import ConfigError, build
from wmtp.errors import one_line, raised_in
from wmtp.models import MTPDecoder


def parameter_groups(model: MTPDecoder, extra_heads_lr: float | None) -> list[dict[str, Any]]:
    """Returns what is trained; heads 2 to H in a group of their own where they have their own learning rate.

    Raises:
        ConfigError: a learning rate of extra heads of which none is trained.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if extra_heads_lr is None:
        return [{"params": trained}]
    heads = set(model.extra_heads.parameters())
    own, rest = [p for p in trained if p in heads], [p for p in trained if p not in heads]
    if not own:
        why = "no extra head is trained" if heads else "model.num_future_tokens is 1"
        raise ConfigError(f"extra_heads_lr is set, but {why}; set extra_heads_lr=null")
    return [*([{"params": rest}] if rest else []), {"params": own, "lr": extra_heads_lr}]


def build_optimizer(section: DictConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Builds the config's optimizer, after it has taken a step on stand-ins of the parameters.

    FSDP2's parameters are DTensors, which not every optimizer can update: that shows here, by name, before anything is
    written. Every rank calls it.

    Args:
        section: optimizer of the config: any class whose ``step()`` needs no closure.
        groups: parameter groups, sharded.

    Raises:
        ConfigError: not to be found, an unknown key, a value torch refuses, or no optimizer for sharded parameters.
    """
    # The smallest parameter of each number of dimensions: some optimizers take matrices only.
    stand_ins = [{**group, "params": [torch.zeros_like(p) for p in _smallest(group["params"])]} for group in groups]
    optimizer = build(section, stand_ins, where="optimizer")
    for group in stand_ins:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer.step()
    except Exception as error:
        if raised_in(error) != __file__:  # in the user's own code, not in a library's
            raise
        raise ConfigError(
            f"optimizer ({section._component_}) cannot update this model's sharded parameters "
            f"({one_line(error):.160}); use another, such as torch.optim.AdamW"
        ) from error
    return build(section, groups, where="optimizer")


def load_optimizer_state(
    checkpoint: str, saved: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, *, changes: str = ""
) -> None:
    """Reads the moments and counters of a checkpoint; the hyperparameters stay those that the optimizer was built with.

    Of the entries of a parameter group, those named in a constructor are hyperparameters; others are state.

    Args:
        checkpoint: folder of torch.distributed.checkpoint.
        saved: its metadata, by key.
        optimizer: as built, with whatever parameter groups.
        changes: what the config says otherwise than the checkpoint's, for the message.

    Raises:
        ConfigError: the optimizer keeps other state than the checkpoint holds.
    """
    state: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizer))
    named = _hyperparameters(type(optimizer)) | {"params", "initial_lr"}
    counters = [{key: value for key, value in group.items() if key not in named} for group in state["param_groups"]]
    held = {key.removeprefix("optimizer.") for key in saved if key.startswith("optimizer.")}
    if any(key.startswith("state.") for key in held):  # a parameter without any never had a gradient
        for parameter in list(state["state"]):
            if not any(key.startswith(f"state.{parameter}.") for key in held):
                del state["state"][parameter]
    wanted = {"state": state["state"], "param_groups": counters}
    ours = set(flatten_state_dict(wanted)[0])
    theirs = {key for key in held if key.startswith("state.") or key in ours}
    if ours != theirs:
        names = [", ".join(sorted({key.rpartition(".")[2] for key in keys})) or "none" for keys in (ours, theirs)]
        raise ConfigError(
            f"cannot resume{changes}: {type(optimizer).__name__} keeps the state {names[0]}, the checkpoint holds "
            f"{names[1]}; restore the section optimizer, or start a new run from the checkpoint's weights"
        )
    loaded: dict[str, Any] = {"optimizer": wanted}
    dcp.load(loaded, checkpoint_id=checkpoint)
    for group, counter in zip(state["param_groups"], loaded["optimizer"]["param_groups"], strict=True):
        group.update(counter)
    state["state"] = loaded["optimizer"]["state"]
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(strict=False))


def _hyperparameters(kind: type) -> set[str]:
    """Names of the constructor's parameters, of the class and of those it comes from."""
    return {name for cls in kind.__mro__ if "__init__" in vars(cls) for name in inspect.signature(cls).parameters}


def _smallest(parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    return list({p.dim(): p for p in sorted(parameters, key=lambda p: -p.numel())}.values())
