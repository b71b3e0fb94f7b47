"""What one config has otherwise than another."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from wmtp.errors import mask_secrets


def config_changes(before: Mapping | None, now: DictConfig) -> str:
    """What a run that goes on does otherwise: `` with max_steps 20 -> 40, optimizer.lr 0.003 -> 0.001``, or ''.

    Args:
        before: the config of its checkpoint, None where it holds none.
        now: the config; its keys resume and overwrite say nothing about the run.
    """
    if before is None:
        return ""
    after = dict(OmegaConf.to_container(now, resolve=True))  # type: ignore[arg-type]
    found = [line for line in differences(before, after) if line.split(" ", 1)[0] not in ("resume", "overwrite")]
    return f" with {', '.join(found)}" if found else ""


def differences(before: Mapping, after: Mapping, prefix: str = "") -> list[str]:
    """Each (dotted) key whose value differs, with both values, short and without secrets; an absent one is null."""
    found = []
    for key in dict.fromkeys([*before, *after]):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} {_short(old)} -> {_short(new)}")
    return found


def _short(value: Any) -> str:
    if isinstance(value, Mapping) and "_component_" in value:
        value = value["_component_"]
    return mask_secrets("null" if value is None else str(value))[:100]
