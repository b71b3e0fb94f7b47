"""Which base a run's trained parameters belong to: what its checkpoints and adapters do not hold."""

import json
from collections.abc import Mapping

from omegaconf import DictConfig, OmegaConf

from wmtp.config import ConfigError, differences
from wmtp.distributed import on_rank_0
from wmtp.pretrained.folders import checkpoint_sha256
from wmtp.pretrained.resolve import resolve_checkpoint


def describe_base(checkpoint: str | None, sections: Mapping[str, DictConfig], *, seed: int) -> dict[str, str]:
    """``base_weights``, the SHA-256 of the base's files, and the config sections that shape the model, as JSON.

    Every rank calls it; rank 0 reads the files.

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
