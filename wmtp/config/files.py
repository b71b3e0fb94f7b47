"""A recipe's config from its file, the files in its `defaults`, and the command line; differences of two configs."""

import argparse
import functools
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from wmtp.config.reader import ConfigError
from wmtp.errors import mask_secrets, one_line


def parse(main: Callable[[DictConfig], Any]) -> Callable[[], None]:
    """Decorates a recipe's `main` to call it with the config of :func:`read_command_line`."""

    @functools.wraps(main)
    def wrapper() -> None:
        main(read_command_line(sys.argv[1:], about=sys.modules[main.__module__].__doc__))

    return wrapper


def read_command_line(arguments: Sequence[str], about: str | None = None) -> DictConfig:
    """Returns the config of ``--config file.yaml``, with the command line's changes, in their order.

    ``key=value`` sets a (dotted) key to a YAML value, which may contain further ``=``; a text for a section sets its
    `_component_`. ``~key`` removes a key.

    Args:
        about: text for ``--help``.

    Raises:
        ConfigError: the file is no config, or an argument is no change of a key.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="YAML file; change its keys with key=value, or ~key to remove")
    parser.add_argument("--print-config", action="store_true", help="print the whole config as it would run, and end")
    known, changes = parser.parse_known_args(arguments)
    cfg = changed(load(known.config), changes)
    if known.print_config:
        if os.environ.get("RANK", "0") == "0":
            print(OmegaConf.to_yaml(cfg), end="")
        raise SystemExit
    return cfg


def changed(cfg: DictConfig, changes: Iterable[str]) -> DictConfig:
    """Makes the changes of a command line in a config, and returns it.

    Raises:
        ConfigError: an argument is no change of a key.
    """
    for change in changes:
        try:
            _change(cfg, change)
        except (OmegaConfBaseException, TypeError, ValueError, IndexError) as error:
            raise ConfigError(f"{change!r} on the command line: {one_line(error)}") from error
    return cfg


def load(path: str | os.PathLike[str]) -> DictConfig:
    """Returns the keys of a config file, merged over those of the files that its `defaults` names.

    `defaults` is a path relative to the file's folder, or a list of paths, of which later ones win; these files may
    have `defaults` too. Sections are merged key by key, but a section with another `_component_` replaces the earlier
    one. ``~key:``, with no value, removes a key of theirs.

    Raises:
        ConfigError: a file cannot be read, is no config, or starts from itself; a key to remove does not exist.
    """
    return OmegaConf.create(_load(Path(path).expanduser(), ()))


def _load(file: Path, after: tuple[Path, ...]) -> dict:
    """Returns a file's keys merged over its `defaults`; `after` are the files that lead to it."""
    name = f"--config {file}" if not after else f"{file}, which {after[-1]} starts from (defaults),"
    if any(file.resolve() == other.resolve() for other in after):
        raise ConfigError(f"{after[0]} starts from itself (defaults): {' -> '.join(map(str, [*after, file]))}")
    try:
        cfg = OmegaConf.load(file)
    except (OSError, ValueError, YAMLError) as error:
        raise ConfigError(f"{name} cannot be read: {one_line(error)}") from error
    if not isinstance(cfg, DictConfig):
        raise ConfigError(f"{name} holds a list; a config is keys and values")
    keys: dict = OmegaConf.to_container(cfg)  # type: ignore[assignment]
    bases = keys.pop("defaults", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"defaults of {file} must be the path of a config, or a list of paths, got {bases!r}")
    merged: dict = {}
    for base in bases:
        merged = _on_top(merged, _load(file.parent / Path(base).expanduser(), (*after, file)), str(file))
    return _on_top(merged, keys, str(file))


def _on_top(base: dict, keys: dict, where: str) -> dict:
    """Returns `keys` merged over `base`, in the order of `base`."""
    merged = dict(base)
    for key, value in keys.items():
        old = merged.get(key)
        if isinstance(key, str) and key.startswith("~") and value is None:
            if key[1:] not in merged:
                raise ConfigError(f"{where}: {key} removes a key that is not there")
            del merged[key[1:]]
        elif isinstance(old, dict) and isinstance(value, dict):
            other = value.get("_component_", old.get("_component_")) != old.get("_component_")
            merged[key] = _on_top({} if other else old, value, f"{where}: {key}")
        else:
            merged[key] = value
    return merged


def _change(cfg: DictConfig, change: str) -> None:
    key, equals, text = change.partition("=")
    if change.startswith("~"):
        parent, _, name = key[1:].rpartition(".")
        node = OmegaConf.select(cfg, parent) if parent else cfg
        if not OmegaConf.is_dict(node) or name not in node:
            raise ConfigError("the config has no such key to remove")
        del node[name]
        return
    if not equals or not key or key.startswith("-"):
        raise ConfigError("write key=value, such as max_steps=20, or ~key to remove a key")
    try:
        read = OmegaConf.from_dotlist([f"value={'null' if text == 'None' else text}"])
        value = dict(OmegaConf.to_container(read))["value"]  # type: ignore[arg-type]
    except YAMLError as error:
        raise ConfigError(f"the value is no YAML, quote it: \"{key}='{text}'\" ({one_line(error)})") from error
    if value is None and text.lower() not in ("null", "none", "~"):
        raise ConfigError(f"the value is empty; write {key}=null if nothing is meant")
    node = OmegaConf.select(cfg, key)
    if isinstance(value, str) and OmegaConf.is_dict(node) and "_component_" in node:
        key += "._component_"
    OmegaConf.update(cfg, key, value, merge=False, force_add=True)


def config_changes(before: Mapping | None, now: DictConfig) -> str:
    """Returns the changes of a resumed run: `` with max_steps 20 -> 40, optimizer.lr 0.003 -> 0.001``, or ''.

    Args:
        before: the config of its checkpoint, None if it holds none.
        now: the config; its keys resume and overwrite do not count.
    """
    if before is None:
        return ""
    after = dict(OmegaConf.to_container(now, resolve=True))  # type: ignore[arg-type]
    found = [line for line in differences(before, after) if line.split(" ", 1)[0] not in ("resume", "overwrite")]
    return f" with {', '.join(found)}" if found else ""


def differences(before: Mapping, after: Mapping, prefix: str = "") -> list[str]:
    """Returns each (dotted) key whose value differs, with both values, short and masked; an absent one is null."""
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
