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


def parameter_groups(model: nn.Module, part: nn.Module, part_lr: float | None, decay_all: bool) -> list[dict[str, Any]]:
    """Returns what is trained, cut by learning rate and by weight decay.

    Args:
        part: extra heads, or a value head: a group of its own where it has its own learning rate.
        decay_all: False gives norms, biases (all that has one dimension, such as DoRA's magnitudes) and embeddings, a
            tied unembedding among them, groups with weight decay 0. The matrices of adapters and of a value head decay
            like others.

    Raises:
        ConfigError: a learning rate of extra heads of which none is trained.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": trained}]
    if part_lr is not None:
        inside = set(part.parameters())
        own, rest = [p for p in trained if p in inside], [p for p in trained if p not in inside]
        if not own:
            why = "no extra head is trained" if inside else "model.num_future_tokens is 1"
            raise ConfigError(f"extra_heads_lr is set, but {why}; set extra_heads_lr=null")
        groups = [*([{"params": rest}] if rest else []), {"params": own, "lr": part_lr}]
    if decay_all:
        return groups
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    cut: list[dict[str, Any]] = []
    for group in groups:
        matrices = [p for p in group["params"] if p.dim() > 1 and p not in tables]
        others = [p for p in group["params"] if p.dim() <= 1 or p in tables]
        cut += [{**group, "params": matrices}] if matrices else []
        cut += [{**group, "params": others, "weight_decay": 0.0}] if others else []
    return cut


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
    optimizer = build(section, groups, where="optimizer")
    if "weight_decay" not in optimizer.defaults:  # it would pass for a counter
        for group in optimizer.param_groups:
            group.pop("weight_decay", None)
    return optimizer


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
        ConfigError: the optimizer keeps other state than the checkpoint holds, or counts in more parameter groups.
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
        kept, found = (_described(keys) for keys in (ours, theirs))
        raise ConfigError(
            f"cannot resume{changes}: {type(optimizer).__name__} keeps the state {kept}, the checkpoint holds "
            f"{found}; restore the section optimizer, or start a new run from the checkpoint's weights"
        )
    loaded: dict[str, Any] = {"optimizer": wanted}
    dcp.load(loaded, checkpoint_id=checkpoint)
    for group, counter in zip(state["param_groups"], loaded["optimizer"]["param_groups"], strict=True):
        group.update(counter)
    state["state"] = loaded["optimizer"]["state"]
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(strict=False))


def _described(keys: set[str]) -> str:
    names = ", ".join(sorted({key.rpartition(".")[2] for key in keys})) or "none"
    groups = {key.split(".")[1] for key in keys if key.startswith("param_groups.")}
    return f"{names} in {len(groups)} parameter group(s)" if groups else names


def _hyperparameters(kind: type) -> set[str]:
    """Names of the constructor's parameters, of the class and of those it comes from."""
    return {name for cls in kind.__mro__ if "__init__" in vars(cls) for name in inspect.signature(cls).parameters}


def _smallest(parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    return list({p.dim(): p for p in sorted(parameters, key=lambda p: -p.numel())}.values())
