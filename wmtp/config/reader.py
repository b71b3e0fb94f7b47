"""Strict reading of a recipe's config: each value is checked when it is read, and an unread key is an error."""

import difflib
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wmtp.errors import UserError, one_line
from wmtp.files import bytes_of


class ConfigError(UserError):
    """A config that cannot be run: one line with the key, its value, and the allowed values."""


class StopTraining(UserError):
    """Training that cannot go on: one line with the step, the reason, and a place to look."""


_REQUIRED = object()


class ConfigReader:
    """Typed access to a config's keys. :meth:`done` is called once all are read: an unread key is a misspelt one.

    A recipe allows a key by reading it; there is no schema beside the code. Texts that begin with ``~/`` are paths in
    the home folder, everywhere in the config. A number in quotes is that number.
    """

    def __init__(self, cfg: DictConfig) -> None:
        try:
            OmegaConf.resolve(cfg)
        except OmegaConfBaseException as error:
            raise ConfigError(f"the config has a reference that leads nowhere: {one_line(error)}") from error
        _expand_home(cfg)
        self._cfg = cfg
        self._read: set[str] = set()

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        """Returns the value of a (dotted) key, or `default` if it is absent or null; raises if there is no default."""
        self._read.add(key.split(".")[0])
        value = OmegaConf.select(self._cfg, key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ConfigError(f"config key {key!r} is missing; add it (configs/ has commented examples)")
        return default

    def number(
        self, key: str, default: Any = _REQUIRED, *, above: float = -math.inf, minimum: float = -math.inf,
        maximum: float = math.inf,
    ) -> float | None:  # fmt: skip
        """Returns a finite number in the given range; None only if that is the default."""
        value = as_number(self.get(key, default))
        if value is None:
            return None
        bounds = [f"> {above}"] * (above > -math.inf) + [f">= {minimum}"] * (minimum > -math.inf)
        bounds += [f"<= {maximum}"] * (maximum < math.inf)
        allowed = f"a number {' and '.join(bounds)}".strip()
        real = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not real or not above < value or not minimum <= value <= maximum:
            raise ConfigError(f"{key} must be {allowed}, got {value!r}")
        return float(value)

    def integer(self, key: str, default: Any = _REQUIRED, *, minimum: int = 0) -> int | None:
        """Returns a whole number >= minimum; None only if that is the default."""
        value = whole_number(as_number(self.get(key, default)))
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ConfigError(f"{key} must be a whole number >= {minimum}, got {value!r}")
        return value

    def num_bytes(self, key: str, default: Any = _REQUIRED) -> int | None:
        """Returns a number of bytes, given as such or as a size such as 20GB; None only if that is the default."""
        value = self.get(key, default)
        number = whole_number(as_number(value))
        if isinstance(number, str):
            number = bytes_of(number)
        if value is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise ConfigError(f"{key} must be a number of bytes >= 1 or a size such as 20GB, got {value!r}")
        return number

    def numbers(
        self,
        key: str,
        default: Any = _REQUIRED,
        *,
        minimum: float = -math.inf,
        whole: bool = False,
        distinct: bool = True,
    ) -> list[float] | None:
        """Returns a list of one or more finite numbers >= minimum; None only if that is the default."""
        values = self.get(key, default)
        if values is None:
            return None
        if isinstance(values, Sequence) and not isinstance(values, str):
            values = [whole_number(as_number(v)) if whole else as_number(v) for v in values]
        kinds = int if whole else int | float
        good = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0 and all(
            isinstance(v, kinds) and not isinstance(v, bool) and math.isfinite(v) and v >= minimum for v in values
        )  # fmt: skip
        if not good or (distinct and len(set(values)) < len(values)):
            kind = f"{'different ' * distinct}{'whole ' * whole}numbers{f' >= {minimum}' * (minimum > -math.inf)}"
            raise ConfigError(f"{key} must be {kind}, in a list, got {values!r}")
        return list(values) if whole else [float(v) for v in values]

    def text(self, key: str, default: Any = _REQUIRED, *, null: bool = False) -> str | None:
        """Returns a text of more than blanks, such as a path; None if that is the default, and with `null` for null."""
        value = self.get(key, default)
        if null and key in self._cfg and self._cfg[key] is None:
            return None
        if value is not None and not (isinstance(value, str) and value.strip()):
            raise ConfigError(f"{key} must be one text, got {value!r}")
        return value

    def flag(self, key: str, default: Any = _REQUIRED) -> bool:
        """Returns the value of a key that must be true or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{key} must be true or false, got {value!r}")
        return value

    def choice(
        self, key: str, options: dict[Any, Any], default: Any = _REQUIRED, *, or_whole: int | None = None
    ) -> Any:
        """Returns the option that the value names, or the value itself if it is a whole number >= or_whole; null means
        the default, or None if that is an option."""
        value = self.get(key, default)
        if None in options.values() and key in self._cfg and self._cfg[key] is None:
            return None
        for name, option in options.items():
            if name == value and isinstance(name, bool) == isinstance(value, bool):
                return option
        number = whole_number(as_number(value))
        if or_whole is not None and type(number) is int and number >= or_whole:
            return number
        written = {False: "false", True: "true", None: "null"}  # as YAML has it, which reads off and on so too
        names = {option: written.get(name, name) for name, option in reversed(options.items())}
        got = repr(value)
        if isinstance(value, bool):
            got = "true, as YAML reads on and yes too" if value else "false, as YAML reads off and no too"
        whole = [] if or_whole is None else [f"a whole number >= {or_whole}"]
        raise ConfigError(f"{key} must be one of {', '.join([*reversed(names.values()), *whole])}, got {got}")

    def plain(self, key: str, default: Any = _REQUIRED) -> Any:
        """Returns a value of nested lists and sections as Python's own; a list or a section if the default is one."""
        value = self.get(key, default)
        value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        for kind, name in ((list, "a list"), (dict, "a section of keys and values")):
            if isinstance(default, kind) and not isinstance(value, kind):
                raise ConfigError(f"{key} must be {name}, got {value!r}")
        return value

    def section(self, key: str, *, optional: bool = False) -> DictConfig | None:
        """Returns a section of the config, for :func:`build`."""
        value = self.get(key, None if optional else _REQUIRED)
        if value is not None and not OmegaConf.is_dict(value):
            raise ConfigError(f"{key} must be a section with a _component_, got {value!r}")
        return value

    def done(self) -> None:
        """Refuses keys that were not read."""
        unread = [str(key) for key in self._cfg if key not in self._read]
        if unread:
            raise ConfigError("; ".join(unknown_key(key, self._read, "config") for key in unread))


def as_number(value: Any) -> Any:
    """Returns the number that a text spells, such as '1e-5' in quotes; anything else unchanged."""
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        with suppress(ValueError):
            number = kind(value)
            return number if math.isfinite(number) else value
    return value


def whole_number(value: Any) -> Any:
    """Returns a float without a fraction, such as 1e5 in YAML, as an int; anything else unchanged."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _expand_home(node: Any) -> None:
    for key in list(node) if OmegaConf.is_dict(node) else range(len(node)):
        child = None if OmegaConf.is_missing(node, key) else node[key]
        if OmegaConf.is_config(child):
            _expand_home(child)
        elif isinstance(child, str) and child.startswith("~"):
            node[key] = os.path.expanduser(child)


def unknown_key(key: str, known: set[str], where: str) -> str:
    """Returns the message for an unknown key, with the nearest known one, or with all."""
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known)) or 'none'}"
    return f"unknown key {key!r} in {where}; {hint}"
