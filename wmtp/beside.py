"""Frozen models that run beside the policy, for weightings whose signals the data do not bring."""

from collections.abc import Collection
from typing import Any

from wmtp.config import ConfigError


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
